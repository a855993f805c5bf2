"""The page of fine-tuning runs: start one, follow it, and find every former one again.

Everything is read from the run folders. Which dialog is open is kept here: the page runs again by itself while runs are
under way, and would close it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import streamlit as st

from app import artifacts, jobs_panel, launch, run_film, run_live, state, text
from app.run_rows import Row, about, lost_prompts, row, when
from app.state import Choice
from app.text import sentences
from app.view_controls import link_notes, told_apart
from es2.core.errors import Es2Error
from es2.jobs.job import Job
from es2.jobs.queue import reopen, start
from es2.report import labels
from es2.workflow.runs import config_of, list_runs, open_run

COLUMNS = (3.2, 1.3, 1.4, 2.5)
HEAD = (
    ("Run", None),
    (
        "Outcome",
        "The gravest verdict over its target layers, and what its newest evaluation says of replies; and how it ended, "
        "where it did not end well.",
    ),
    ("KL", "On harmless prompts of the test split, in nats per token: of the prompts / of the base's replies."),
    ("", None),
)
N_SHOWN = 20
RESUMABLE = ("cancelled", "interrupted", "failed")
VERDICT_COLOURS = {"separated": "green", "unchanged": "gray", "inflated": "orange", "contracted": "orange"}
BEHAVIOUR_COLOURS = {"defends better": "green", "refuses less": "red", "broken": "red"}
STATUS_COLOURS = {"done": "gray", "cancelled": "gray", "interrupted": "orange", "stopped": "orange", "failed": "red"}

_ASKED, _N = "runs_asked", "runs_shown"


def page() -> None:
    """Render the page."""
    link_notes()
    choice = state.current()
    runs = list_runs()
    active = [job for job in jobs_panel.active_jobs() if job.kind == "finetune"]
    _open_what_ended({job.id for job in active})
    under_way = {job.id for job in active}
    ended = [run for run in runs if run.id not in under_way]
    opened = bool(st.session_state.get(launch.OPEN, not runs))
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.header("Runs", anchor=False, width="content")
        if runs:
            st.button(
                "Close the form" if opened else "New fine-tune",
                key="new_run",
                type="secondary" if opened else "primary",
                icon=":material/close:" if opened else ":material/add:",
                on_click=_set,
                args=(launch.OPEN, not opened),
            )
    if not runs:
        st.markdown(
            "A run is one fine-tune of a model: its settings, how it went, and the adapter it left behind. "
            "Nothing was tuned yet. Two target layers are picked below and the settings are good to start with, so one "
            "click begins; the run goes on when this page is closed, and the comparison with the base opens when it "
            "is done."
        )
    run_live.live(active)
    if opened:
        with sentences():
            launch.form(choice)
    if ended:
        former(ended, choice)
    _dialogs(choice, ended)


def _set(name: str, value: object) -> None:
    """Callback: remember something about this page."""
    st.session_state[name] = value


def _open_what_ended(active: set[str]) -> None:
    """Turn a page that followed a run which has just ended to its comparison, unless a form or a dialog is open."""
    followed = run_live.followed_until_now()
    if st.session_state.get(launch.OPEN, False) or st.session_state.get(_ASKED) is not None:
        return
    for id in followed - active:
        try:
            ended = row(open_run(id))
        except Es2Error:
            continue  # deleted meanwhile
        if ended.comparable and "sweep" not in ended.job.config:  # of a sweep the next trial begins
            _compare(id, None)


def _compare(run: str, against: str | None) -> None:
    """Turn to the comparison of a run with its base, or with another run."""
    st.session_state[_ASKED] = None
    state.update(run=run, against=against)
    state.go("compare")


# --------------------------------------------------------------------------------------------------------- every former


def former(runs: Sequence[Job], choice: Choice) -> None:
    """The list of runs that have ended, newest first."""
    n_shown = st.session_state.get(_N, N_SHOWN)
    st.subheader("Former runs", anchor=False)
    with st.container(key="runs_head"):
        for column, (title, tip) in zip(st.columns(COLUMNS, gap="small"), HEAD, strict=True):
            column.caption(title, help=tip)
    for run in runs[:n_shown]:
        with sentences(), st.container(key=f"run_{run.id}", border=True, gap="xsmall"):
            _listed(row(run))
    if len(runs) > n_shown:
        st.button(
            f"Show {min(N_SHOWN, len(runs) - n_shown)} more",
            key="more_runs",
            on_click=_set,
            args=(_N, n_shown + N_SHOWN),
        )


def _listed(run: Row) -> None:
    """One run of the list with what can be done about it."""
    job = run.job
    what, verdict, kl, actions = st.columns(COLUMNS, gap="small", vertical_alignment="center")
    with what, st.container(gap=None):
        st.markdown(f"**{text.markdown(artifacts.run_title(job))}**")
        st.caption(about(job, run.steps))
        text.given_as(run.given_as)
    with verdict, st.container(gap="xxsmall"):
        if run.verdict:
            colour = VERDICT_COLOURS.get(run.verdict, "red")
            if run.behaviour.warning and colour == "green":
                colour = "orange"
            st.badge(text.markdown(run.verdict), color=colour, help=text.markdown(run.reason or ""))  # type: ignore[arg-type]
            words, tip = text.markdown(run.behaviour.words), text.markdown(run.behaviour.reason)
            if run.behaviour.name in BEHAVIOUR_COLOURS:
                st.badge(words, color=BEHAVIOUR_COLOURS[run.behaviour.name], help=tip)  # type: ignore[arg-type]
            else:
                st.caption(words, help=tip)  # a badge would cut them off in a narrow window
        if run.status != "done":
            st.badge(text.markdown(run.status), color=STATUS_COLOURS.get(run.status, "gray"))  # type: ignore[arg-type]
    with kl:
        st.markdown(f"{run.kl['prompt']:.3f} / {run.kl['reply']:.3f}" if {"prompt", "reply"} <= run.kl.keys() else "–")
    with actions, st.container(horizontal=True, wrap=False, gap="xsmall", horizontal_alignment="right"):
        if run.comparable and st.button("Open", key=f"open_{job.id}", help="Open the comparison with the base"):
            _compare(job.id, None)
        if run.status in RESUMABLE:
            _resume(job)
        for asked, icon, tip, shown in (
            ("against", ":material/compare_arrows:", "Compare with another run", run.comparable),
            ("curves", ":material/show_chart:", "Curves, film and settings", True),
            ("rename", ":material/edit:", "Rename", True),
            ("delete", ":material/delete:", "Delete", True),
        ):
            if shown:
                st.button(
                    "",
                    key=f"{asked}_{job.id}",
                    icon=icon,
                    help=tip,
                    type="tertiary",
                    on_click=_set,
                    args=(_ASKED, (asked, job.id)),
                )
    text.warn(run.behaviour.warning)
    for sentence in filter(None, (run.error, lost_prompts(job))):
        st.markdown(f":small[:red[{text.markdown(sentence)}]]")


def _resume(job: Job) -> None:
    """A button that lets a run go on from its last checkpoint."""
    if st.button("Resume", key=f"resume_{job.id}", help="Go on from its last checkpoint, or from the start"):
        reopen(job)
        start(job)
        st.rerun()


# ------------------------------------------------------------------------------------------------------------ dialogs


def _dialogs(choice: Choice, ended: Sequence[Job]) -> None:
    """Render the dialog that was asked for; it stays until it is closed, also when the page runs again meanwhile."""
    asked = st.session_state.get(_ASKED)
    if asked is None:
        return
    what, id = asked
    job = next((run for run in ended if run.id == id), None)
    if job is None:
        st.session_state[_ASKED] = None
        return
    title, draw = {
        "rename": ("Rename the run", _rename),
        "delete": ("Delete the run", _delete),
        "against": ("Compare with another run", _against),
        "curves": (artifacts.run_title(job), _curves),
    }[what]

    @st.dialog(
        text.markdown(title),
        width="large" if what == "curves" else "small",
        on_dismiss=lambda: _set(_ASKED, None),
    )
    def shown() -> None:
        with sentences():
            draw(job, choice, ended)

    shown()


def _done() -> None:
    """Close the dialog."""
    st.session_state[_ASKED] = None
    st.rerun()


def _rename(job: Job, choice: Choice, ended: Sequence[Job]) -> None:
    name = st.text_input(
        "Name",
        job.name,
        key=f"name_{job.id}",
        placeholder=artifacts.run_title(job),
        help="Empty: named by what it did.",
    )
    if st.button("Rename", key="rename_confirm", type="primary"):
        job.rename(name)
        _done()


def _delete(job: Job, choice: Choice, ended: Sequence[Job]) -> None:
    st.markdown(
        f"**{text.markdown(artifacts.run_title(job))}** with its adapter, its checkpoint and its log will be gone. "
        "The embeddings captured from it stay in the cache."
    )
    with st.container(horizontal=True):
        if st.button("Delete", key="delete_confirm", type="primary", icon=":material/delete:"):
            job.delete()
            if job.id in (choice.run, choice.against):
                state.update(run=None, against=None)
            _done()
        if st.button("Keep it", key="delete_refuse"):
            _done()


def _against(job: Job, choice: Choice, ended: Sequence[Job]) -> None:
    same = ("model", "prompts")
    others = [
        run for run in ended if run.id != job.id and all(run.config.get(name) == job.config.get(name) for name in same)
    ]
    others = [run for run in others if row(run).comparable]
    if not others:
        st.markdown("There is no other finished run of the same model and the same prompts to compare it with.")
        return
    titles = {run.id: f"{artifacts.run_title(run)} · {when(run.created)}" for run in others}
    st.markdown(
        f"**{text.markdown(artifacts.run_title(job))}** will stand at the right, the other run at the left, in the "
        "place of the base."
    )
    other = st.selectbox(
        "Other run", list(titles), key="against_other", format_func=told_apart(titles, titles.__getitem__)
    )
    wanted = replace(choice, run=job.id, against=other)
    ready = artifacts.find_comparison(wanted) is not None
    if not ready:
        st.caption("The two were not compared before: that is computed first, which takes a moment.")
    if st.button("Compare", key="against_confirm", type="primary") and other is not None:
        if not ready:
            config = {name: job.config[name] for name in same} | {"position": choice.position}
            jobs_panel.ensure("prepare", config | {"run": job.id, "against": other})
        _compare(job.id, other)


def _curves(job: Job, choice: Choice, ended: Sequence[Job]) -> None:
    found = row(job)
    st.caption(about(job, found.steps))
    if found.verdict:
        outcome = found.behaviour.outcome(found.verdict).capitalize()
        st.markdown(f"**{text.markdown(outcome)}.** {text.markdown(found.reason or '')}")
        if found.behaviour.warning is None:
            st.markdown(text.markdown(found.behaviour.reason))
    text.warn(found.behaviour.warning)
    logged = run_live.history(job)
    if logged.steps:
        run_live.curves(job, logged, key="former")
        run_film.film(job, logged, key="former")
    else:
        st.markdown("It ended before its first step.")
    with st.expander("Settings", key="former_settings"):
        st.json(config_of(job).to_dict() | {"prompts": job.config.get("prompts")})
    if log := job.log_tail(40):
        with st.expander("Log", key="former_log"):
            st.code(labels.plain("\n".join(log)), language=None)
