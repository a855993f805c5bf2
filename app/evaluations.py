"""What the pages of behaviour and of robustness share: the run on screen, its evaluations, and starting one.

An evaluation is kept in its run's folder; which one is shown is kept per run, for both pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import streamlit as st

from app import artifacts, jobs_panel, state, text
from app.evaluation_form import CHOSEN, FORM, SUITE_NAMES, form
from app.run_rows import row
from app.state import Choice
from app.text import sentences
from app.view_controls import introduction, link_notes, told_apart
from es2.core.errors import Es2Error
from es2.core.files import stamp_of
from es2.evaluation.config import SUITES
from es2.evaluation.results import KIND, find_evaluations, read_evaluation
from es2.jobs.job import Job
from es2.jobs.queue import list_jobs, reopen, start
from es2.workflow.runs import open_run, tuned_weights

SHOWN_CHARACTERS = 200
"""A prompt or a reply is cut here until it is opened in full."""
VERDICT_NAMES: Mapping[str, str] = {
    "refusal": "refused",
    "answer": "answered",
    "degenerate": "degenerate",
    "empty": "empty",
    "unfinished": "still thinking",
}


@dataclass(frozen=True)
class Evaluation:
    """One kept result of a run: its file, and what `read_evaluation` returns, shared by all sessions and only read."""

    path: Path
    document: Mapping[str, Any]

    def part(self, suite: str) -> Mapping[str, Any] | None:
        """The numbers of a suite; None where it was not run or could not be."""
        found: Mapping[str, Any] | None = self.document["suite"].get(suite)
        return None if found is None or "problem" in found else found

    def problem(self, suite: str) -> str | None:
        """Why a suite could not be run, in a sentence."""
        return (self.document["suite"].get(suite) or {}).get("problem")

    def rows(self, suite: str) -> Sequence[Mapping[str, Any]]:
        """The replies behind the numbers of a suite."""
        rows: Sequence[Mapping[str, Any]] = self.document["rows"].get(suite, ())
        return rows

    @property
    def title(self) -> str:
        """Which prompts, which suite if not all, how many, when."""
        document = self.document
        suite = document["settings"].get("suite", "all")
        when = datetime.fromtimestamp(document["created"]).strftime("%-d %b %Y, %H:%M")
        which = [SUITE_NAMES.get(suite, suite)] if suite != "all" else []
        return " · ".join(
            [str(document["prompts"]), *which, f"at most {document['settings']['limit']} of each label", when]
        )


@dataclass(frozen=True)
class Intro:
    """A page before there is an evaluation: its words, and the suite its form has preset after other evaluations."""

    title: str
    about: str
    steps: tuple[tuple[str, str], ...]
    suite: str


def shown_run(choice: Choice) -> Job | None:
    """The run on screen; None where there is none. Raises `InputError` for one that does not exist."""
    if choice.run is not None:
        return open_run(choice.run)
    comparison = artifacts.find_comparison(choice)
    return open_run(comparison.run) if comparison is not None else None


def of_run(run: Job, suites: Sequence[str]) -> list[Evaluation]:
    """The kept evaluations that ran one of `suites`, newest first; the error of a damaged file is shown."""
    found = []
    for path in find_evaluations(run):
        with sentences():
            one = Evaluation(path, _read(path, stamp_of(path)))
            if any(suite in one.document["suite"] for suite in suites):
                found.append(one)
    return found


@st.cache_resource(max_entries=32, show_spinner="Reading the evaluation")
def _read(path: Path, stamp: object) -> Mapping[str, Any]:
    return read_evaluation(path)


def opened(intro: Intro, suites: Sequence[str]) -> tuple[Job, Evaluation] | None:
    """The evaluation to show, of those that ran one of `suites`, below the page's head; None before there is one."""
    link_notes()
    choice = state.current()
    run = shown_run(choice)
    found = of_run(run, suites) if run is not None else []
    if run is None or (run.is_shipped and not found):
        _no_run(intro, run)
        return None
    if not found:
        _first(intro, run, choice)
        return None
    return run, _head(intro, run, choice, found, suites)


def _no_run(intro: Intro, shipped: Job | None) -> None:
    with st.container(width=820, key="no_evaluation"):
        introduction(intro.title, intro.about, intro.steps)
        if shipped is not None:
            st.markdown(
                "On screen is the showcase, which comes without weights, so there is no model here to ask. Choose a "
                "run of your own, or start one."
            )
        else:
            st.markdown("There is no finished run of this model and these prompts yet.")
        if st.button("To the runs", key="to_runs", type="primary", icon=":material/model_training:"):
            state.go("runs")


def _first(intro: Intro, run: Job, choice: Choice) -> None:
    with st.container(width=920, key="no_evaluation"):
        introduction(intro.title, intro.about, intro.steps)
        if run.is_active():
            st.markdown("The run on screen is under way. It can be evaluated when it is done.")
            jobs_panel.live_bar(run)
            return
        _outcome(run)
        tuned_weights(run)  # a run that has left none is the sentence to show
        if not _under_way(run):
            form(run, choice, intro.suite if find_evaluations(run) else "all", _rate(run))


def _head(intro: Intro, run: Job, choice: Choice, found: Sequence[Evaluation], suites: Sequence[str]) -> Evaluation:
    """The page's head above an evaluation: the run, which evaluation, and a button for another one."""
    by_name = {one.path.stem: one for one in found}
    chosen = st.session_state.get(CHOSEN, {}).get(run.id)
    name = chosen if chosen in by_name else found[0].path.stem
    is_open = bool(st.session_state.get(FORM, False))
    with st.container(key="header"):
        left, right = st.columns((1.35, 1), gap="medium", vertical_alignment="bottom")
    with left:
        model = str(run.config.get("model", ""))
        name_of_model = Path(model).name if model.startswith("/") else model
        st.subheader(f"{text.markdown(name_of_model)} · {text.markdown(artifacts.run_title(run))}", anchor=False)
    with right, st.container(horizontal=True, wrap=False, vertical_alignment="bottom", gap="small"):
        st.session_state["evaluation"] = name
        st.selectbox(
            "Evaluation",
            list(by_name),
            key="evaluation",
            format_func=told_apart(by_name, lambda stem: by_name[stem].title),
            on_change=lambda: _choose(run, st.session_state["evaluation"]),
        )
        if not run.is_shipped:
            st.button(
                "Close" if is_open else "New",
                key="new_evaluation",
                icon=":material/close:" if is_open else ":material/add:",
                help="Evaluate this run on other prompts, or on more of them",
                on_click=lambda: st.session_state.update({FORM: not is_open}),
            )
    evaluation = by_name[name]
    st.caption(_about(evaluation, suites))
    _outcome(run)
    if choice.against is not None:
        st.caption(
            ":material/info: Evaluations compare a run with its base; the other run of the comparison plays no part."
        )
    text.given_as(evaluation.document.get("given_as"))
    if note := evaluation.document.get("note"):
        st.caption(f":material/warning: {text.markdown(str(note))}")
    if run.is_shipped:
        st.caption(
            "The showcase comes without weights and without replies: the verdict on each reply is kept. For replies of "
            "your own, start a run."
        )
    elif not _under_way(run) and is_open:
        with sentences():
            form(run, choice, intro.suite, _rate(run))
    return evaluation


def _outcome(run: Job) -> None:
    """The verdict on the run and its behaviour, with its warning; the same whichever evaluation is shown."""
    found = row(run)
    if found.verdict:
        st.markdown(f"Verdict on this run: **{text.markdown(found.behaviour.outcome(found.verdict))}**.")
    text.warn(found.behaviour.warning)


def _choose(run: Job, stem: str) -> None:
    state.update()
    st.session_state[CHOSEN] = {**st.session_state.get(CHOSEN, {}), run.id: stem}


def _about(evaluation: Evaluation, suites: Sequence[str]) -> str:
    """Which prompts, how many, how long the replies, in one line of Markdown; of the suites that the page shows."""
    document, settings = evaluation.document, evaluation.document["settings"]
    parts = [f"prompts: {document['prompts']}"]
    found = {suite: evaluation.part(suite) if suite in suites else None for suite in SUITES}
    if (refusal := found["refusal"]) is not None:
        counts = refusal["n_prompts"]
        parts.append(f"replies to {counts['harmful']:,} harmful and {counts['harmless']:,} harmless prompts")
        parts.append(f"of up to {settings['new_tokens']} tokens, greedy")
    if (ability := found["kl"]) is not None:
        parts.append(f"KL on {ability['n_prompts']:,} harmless prompts")
    if (choice := found["ability"]) is not None:
        parts.append(f"{choice['n_questions']:,} multiple-choice questions of {choice['questions']}")
    if (attack := found["perturbation"]) is not None:
        layers = ", ".join(map(str, attack["layers"]))
        parts.append(f"{attack['n_prompts']:,} harmful prompts steered at layers {layers}")
        parts.append(f"replies of up to {settings['new_tokens']} tokens, greedy")
    if (soft := found["soft_prompt"]) is not None:
        parts.append(f"{soft['n_prompts']:,} harmful prompts after a soft prompt")
    if (directions := found["direction"]) is not None:
        counts = directions["n_prompts"]
        parts.append(f"a direction removed for {counts['harmful']:,} harmful prompts, added for {counts['harmless']:,}")
    return " · ".join(text.markdown(part) for part in parts)


def _rate(run: Job) -> float | None:
    """Tokens per second of the newest evaluation that generated enough of them to tell."""
    for path in find_evaluations(run):
        try:
            generated = _read(path, stamp_of(path))["generated"]
        except (Es2Error, OSError):
            continue
        if generated["tokens"] >= 1000:
            return float(generated["tokens_per_second"])
    return None


def _under_way(run: Job) -> bool:
    """Show the newest evaluation job of this run, or how it ended if not well; returns whether it is under way."""
    job = next((job for job in list_jobs(kind=KIND) if job.config.get("run") == run.id), None)
    if job is None:
        return False
    if job.is_active():
        jobs_panel.live_bar(job)
        st.caption("It goes on when this page is closed. What was replied is kept, also after a cancel.")
        return True
    jobs_panel.ending(job)
    if job.status() in ("cancelled", "interrupted", "failed") and st.button(
        "Go on with it", key="resume_evaluation", icon=":material/resume:", help="Generates only what is missing"
    ):
        reopen(job)
        start(job)
        st.rerun()
    return False


def shown(words: str | None) -> None:
    """A text from outside, as text, cut where it is long; nothing for a reply whose words were not kept."""
    if words is None:
        return
    if words.strip():
        st.text(shortened(words), width="stretch")
    else:
        st.caption("(nothing)")


def shortened(words: str) -> str:
    """The first `SHOWN_CHARACTERS` of a text, its lines kept."""
    words = words.strip()
    return words if len(words) <= SHOWN_CHARACTERS else words[: SHOWN_CHARACTERS - 1].rstrip() + "…"


def badge(verdict: str, *, harmful: bool) -> None:
    """The verdict on a reply: green where it is the wanted one, orange where not, grey where it is no language."""
    wanted = "refusal" if harmful else "answer"
    colour = "green" if verdict == wanted else "orange" if verdict in ("refusal", "answer") else "gray"
    st.badge(text.markdown(VERDICT_NAMES.get(verdict, verdict)), color=colour)  # type: ignore[arg-type]
