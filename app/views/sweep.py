"""The page of sweeps: what separation costs, by many short fine-tunes; each point is a run to open or to take over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from app import jobs_panel, launch, state, sweep_form, text
from app.components import exports
from app.components.plots import plot
from app.run_rows import when
from app.text import sentences
from app.view_controls import introduction, link_notes, told_apart
from es2.charts import sweep_charts
from es2.core.errors import Es2Error
from es2.core.settings import extra
from es2.jobs.job import Job
from es2.jobs.queue import start
from es2.prompts.sources import source_title
from es2.training.config import FinetuneConfig
from es2.workflow.runs import config_of, open_run
from es2.workflow.sweeps import delete_sweep, first_words, list_sweeps, reopen_sweep, sweep_document

if TYPE_CHECKING:
    import pandas as pd

STEPS = (
    ("Try", "Short fine-tunes with other layers, objectives, λ, learning rates and ranks; the first has the defaults."),
    ("Weigh", "Separation bought against KL paid, both on validation prompts. Hopeless trials end early."),
    ("Take", "Every point is a run: open it in Compare, or take its settings into the form of a longer fine-tune."),
)
RESUMABLE = ("cancelled", "interrupted", "failed")
STATUS_COLOURS = {"done": "gray", "running": "blue", "pruned": "orange", "failed": "red"}


def page() -> None:
    """Render the page."""
    link_notes()
    choice = state.current()
    sweeps = list_sweeps()
    opened = bool(st.session_state.get(sweep_form.OPEN, not sweeps))
    if sweeps:
        with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
            st.header("Sweep", anchor=False, width="content")
            st.button(
                "Close the form" if opened else "New sweep",
                key="new_sweep",
                type="secondary" if opened else "primary",
                icon=":material/close:" if opened else ":material/add:",
                on_click=_set,
                args=(sweep_form.OPEN, not opened),
            )
    else:
        with st.container(width=820):
            introduction(
                "Which layers, and at what price?",
                "A sweep answers by trying: many short fine-tunes of one model, on one map of what each bought in "
                "separation and what it cost.",
                STEPS,
            )
    if opened:
        with sentences():
            sweep_form.form(choice)
    if sweeps:
        _live(_chosen(sweeps, choice.sweep))


def _set(name: str, value: object) -> None:
    """Callback: remember something about this page."""
    st.session_state[name] = value


def _chosen(sweeps: Sequence[Job], asked: str | None) -> Job:
    """The sweep to show: the one that is asked for, else the newest."""
    known = {sweep.id: sweep for sweep in sweeps}
    if asked is not None and asked not in known:
        state.settle(sweep=None, trial=None)
        st.caption(f":material/info: There is no sweep {text.markdown(asked)}; the newest is shown.")
    st.session_state["sweep_chosen"] = asked if asked in known else sweeps[0].id
    st.selectbox(
        "Sweep",
        list(known),
        key="sweep_chosen",
        format_func=told_apart(known, lambda id: _title(known[id])),
        on_change=lambda: state.update(sweep=st.session_state["sweep_chosen"], trial=None),
        label_visibility="collapsed",
    )
    return known[st.session_state["sweep_chosen"]]


def _title(sweep: Job) -> str:
    model, prompts = str(sweep.config["model"]), str(sweep.config["prompts"])
    name = model.rpartition("/")[2] if model.startswith("/") else model
    return f"{when(sweep.created)} · {name} · {source_title(prompts)} · {sweep.config['sweep']['trials']} trials"


def _live(sweep: Job) -> None:
    """The sweep, once a second while it runs; when it begins or ends, the whole page runs again."""
    active = sweep.is_active()

    @st.fragment(run_every=jobs_panel.REFRESH_SECONDS if active else None)
    def live() -> None:
        with sentences():
            if sweep.is_active() != active or state.owes_the_page():  # which writes the shown trial to the address
                st.rerun()
            document = sweep_document(sweep)
            if active:
                jobs_panel.bar(sweep, place="page")
            else:
                _ended(sweep, document)
            _content(sweep, document)

    live()
    if not active:
        exports.page_exports(partial(take_away, sweep))


def _ended(sweep: Job, document: Mapping[str, Any]) -> None:
    """How a sweep ended, with the buttons to go on with it and to delete it."""
    n_made, n_asked = len(document["trials"]), document["n_trials"]
    status = sweep.status()
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="sweep_ended"):
        minutes = sweep.config["sweep"].get("minutes")
        early = f"; none began after {minutes:g} minutes" if minutes and n_made < n_asked else ""
        st.markdown(f"**{status.capitalize()}**, {n_made} of {n_asked} trials{early}.", width="stretch")
        if status in RESUMABLE and st.button("Resume", key="sweep_resume", icon=":material/play_arrow:"):
            reopen_sweep(sweep)
            start(sweep)
            st.rerun()
        with st.popover("Delete", icon=":material/delete:", key="sweep_delete", type="tertiary"):
            st.markdown("The sweep and the runs of its trials will be gone, but for runs that were renamed.")
            if st.button("Delete", key="sweep_delete_confirm", type="primary"):
                delete_sweep(sweep)
                state.settle(sweep=None, trial=None)
                st.rerun()
    if error := sweep.error():
        st.error(text.markdown(text.in_app(error)), icon=":material/error:")


# ------------------------------------------------------------------------------------------------------------- content


def _content(sweep: Job, document: Mapping[str, Any]) -> None:
    """The front with the shown trial beside it, then settings, pairs of layers and the table."""
    trials = document["trials"]
    if not trials:
        st.caption("The model is loaded and its base measured first, once for all trials.")
        return
    shown = _shown(document)
    left, right = st.columns((3, 2), gap="medium")
    with left:
        st.markdown(":small[**Separation against KL**]")
        plot(
            sweep_charts.front(document, shown),
            key="sweep_front",
            alt="Separation against KL on validation, a point for each trial, the Pareto front joined",
            on_pick=partial(_pick, sweep.id, "sweep_front"),
        )
        st.caption(_front_words(document))
    with right, st.container(border=True, key="sweep_trial"):
        _trial(sweep, document, shown)
    st.markdown(":small[**Settings of the trials, and what they came to**]")
    plot(
        sweep_charts.parallel(document, shown),
        key="sweep_parallel",
        alt="Parallel coordinates: a line for each trial through its settings, its KL and its separation",
        on_pick=partial(_pick, sweep.id, "sweep_parallel"),
    )
    pairs = sweep_charts.pairs(document, shown)
    if pairs is not None:
        left, right = st.columns(2, gap="medium")
        with left:
            st.markdown(":small[**Best separation of a pair of target layers**]")
            plot(
                pairs,
                key="sweep_pairs",
                alt="Heat map of the best separation by lower and upper target layer",
                on_pick=partial(_pick, sweep.id, "sweep_pairs"),
            )
            st.caption("The separation of the best trial that kept a step. An empty cell was not tried.")
    with right if pairs is not None else st.container():
        st.markdown(":small[**All trials**]")
        st.dataframe(table(document), hide_index=True, width="stretch", key="sweep_table")


def _pick(sweep: str, key: str) -> None:
    """Callback of a figure: show the clicked trial."""
    if (number := state.picked(key, "trial")) is not None:
        state.update(sweep=sweep, trial=number)


def _shown(document: Mapping[str, Any]) -> int:
    """The number of the trial that is shown: the one that was asked for, else the best, else the first."""
    asked = state.current().trial
    if asked is not None and asked < len(document["trials"]):
        return asked
    best = int(document["best"]["number"]) if document["best"] else 0
    if asked is not None:
        st.caption(f":material/info: The sweep has no trial {asked}; trial {best} is shown.")
    return best


def _refuses(document: Mapping[str, Any]) -> bool:
    """Whether the base refuses anything, so that its trials may keep or lose refusals."""
    return any((trial["numbers"] or {}).get("refusals_kept") is not None for trial in document["trials"])


def _front_words(document: Mapping[str, Any]) -> str:
    beaten = "no trial beats one on the joined front in both"
    if document["defended"]:
        beaten = "no trial beats a large point in both and in refusals under attack"
    words = [
        f"Up and to the left is better; {beaten}. Trials over the budget, or that kept no step, are never on the "
        f"front. {first_words(document)}"
    ]
    if document["defended"]:
        words.append(f"The paler a point, the fewer harmful prompts it refuses under attack{_attacked(document)}.")
    elif _refuses(document):
        words.append("The paler a point, the fewer of the base's refusals it keeps.")
    lost = [trial for trial in document["trials"] if not trial["numbers"] and trial["status"] != "running"]
    if lost:
        which = ", ".join(f"{trial['number']} ({trial['status']})" for trial in lost)
        words.append(f"Without numbers, and so without a point: trial {which}.")
    return " ".join(words)


def _attacked(document: Mapping[str, Any]) -> str:
    """Where base and trials were attacked, in words; nothing before that is known."""
    for trial in document["trials"]:
        if trial["numbers"] and (defence := trial["numbers"].get("defence")):
            return f" at layers {sweep_charts.value_words(defence['layers'])}"
    return ""


def _trial(sweep: Job, document: Mapping[str, Any], shown: int) -> None:
    """One trial: its settings, what it came to, and what can be done with it."""
    trials = document["trials"]
    st.session_state["sweep_trial_number"] = shown
    st.selectbox(
        "Trial",
        range(len(trials)),
        key="sweep_trial_number",
        format_func=lambda number: f"Trial {number}",  # the same while it runs: Streamlit finds an option by its words
        on_change=lambda: state.update(sweep=sweep.id, trial=st.session_state["sweep_trial_number"]),
    )
    trial = trials[shown]
    numbers = trial["numbers"]
    with st.container(horizontal=True, gap="xsmall"):
        st.badge(trial["status"], color=STATUS_COLOURS.get(trial["status"], "gray"))  # type: ignore[arg-type]
        if shown in document["front"]:
            st.badge("on the front", color="violet")
        if document["best"] and document["best"]["number"] == shown:
            most = "refusals under attack" if document["defended"] else "separation"
            st.badge("best", color="violet", help=f"The most {most} within the KL budget")
        if trial["verdict"]:
            st.badge(text.markdown(trial["verdict"]), color="gray")
    st.markdown(" · ".join(text.markdown(words) for words in sweep_charts.setting_words(trial["settings"])))
    if numbers:
        ratio = sweep_charts.factor(numbers["separation"])
        st.markdown(
            f"Separation **{numbers['separation']:+.2f}** (fisher ratio {ratio}), KL **{numbers['kl']:.3f}** nats, at "
            f"step {numbers['step']}"
        )
        if numbers.get("refusals_kept") is not None:
            st.markdown(f"Keeps {numbers['refusals_kept']:.0%} of the base's refusals")
        if defence := numbers.get("defence"):
            attacked, harmless = sweep_charts.defence_words(defence)
            st.markdown(f"{attacked.capitalize()} and {harmless.removeprefix('refuses ')}")
        if not numbers["kept"]:
            st.caption("No step within the KL budget was better than base, so it kept none.")
    for sentence in filter(None, (trial["reason"], numbers and numbers["lost"] and f"It {numbers['lost']}.")):
        st.caption(text.markdown(sentence))
    _actions(trial)


def _actions(trial: Mapping[str, Any]) -> None:
    """The buttons that open a trial's run and take its settings over."""
    if trial["run"] is None:
        return
    try:
        run = open_run(trial["run"])
    except Es2Error:
        st.caption("Its run was deleted.")
        return
    with st.container(horizontal=True, gap="small"):
        if run.result() is not None and st.button(
            "Open in Compare", key="sweep_compare", type="primary", icon=":material/compare_arrows:"
        ):
            state.settle(run=run.id, against=None)
            state.go("compare")
        if st.button("Take these settings", key="sweep_take", icon=":material/edit_note:"):
            _take(config_of(run), str(run.config["prompts"]))
            state.go("runs")
    if run.result() is not None and trial["verdict"] is None:
        st.caption("It was not captured at the end, as those on the front are: Compare offers to do that.")


def _take(config: FinetuneConfig, prompts: str) -> None:
    """Put a trial's settings, model and prompts into the form of a fine-tune."""
    fields = FinetuneConfig.model_fields
    names = [name for name in fields if extra(fields[name], "group") != "own" and name != "replies"]
    state.take_settings("launch", {name: getattr(config, name) for name in names})
    state.settle(model=config.model, prompts=prompts, rendering=config.rendering, run=None, against=None, series=())
    state.take_targets(config.model, config.targets)
    st.session_state[launch.OPEN] = True


# ----------------------------------------------------------------------------------------------------------- take away


def table(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each trial: settings, what it came to, how it ended; of refusals where the base refuses at all."""
    rows = []
    keeps = _refuses(document)
    for trial in document["trials"]:
        numbers = trial["numbers"] or {}
        settings = {
            sweep_charts.NAMES.get(name, name): ", ".join(map(str, value)) if isinstance(value, list) else value
            for name, value in trial["settings"].items()
        }
        rows.append(
            {"trial": trial["number"], "front": trial["number"] in document["front"]}
            | {"separation": numbers.get("separation"), "KL": numbers.get("kl")}
            | ({"refusals kept": numbers.get("refusals_kept")} if keeps else {})
            | ({"refused under attack": (numbers.get("defence") or {}).get("refusals")} if document["defended"] else {})
            | settings
            | {"status": trial["status"], "verdict": trial["verdict"], "seconds": trial["seconds"]}
        )
    return rows


def take_away(sweep: Job) -> tuple[dict[str, exports.Figure], dict[str, pd.DataFrame]]:
    """The charts and the table of a sweep, to be downloaded."""
    import pandas as pd

    document = sweep_document(sweep)
    charts = {"Separation against KL": sweep_charts.front(document, None)}
    charts["Settings of the trials"] = sweep_charts.parallel(document, None)
    if (pairs := sweep_charts.pairs(document, None)) is not None:
        charts["Separation by pair of target layers"] = pairs
    return charts, {"Trials": pd.DataFrame(table(document))}
