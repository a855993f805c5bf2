"""Fine-tunes under way: how far they are, and their curves as they come.

A fragment reads on in the event logs once a second; when a run begins or ends, the whole page runs again. It also notes
when it last ran, so that the page knows whether its visitor followed the run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import streamlit as st

from app import artifacts, jobs_panel, run_film, text
from app.components.plots import plot
from app.run_rows import about
from app.text import sentences
from es2.charts import run_charts
from es2.charts.run_charts import History
from es2.jobs.job import Job
from es2.workflow.runs import config_of

STAGES = {
    "base": "Base replies",
    "finetune": "Fine-tune",
    "capture": "Capture",
    "analyse": "Analyse",
    "reply": "Both reply",
}
"""The stages of a run in their order; loading and waiting belong to what follows them."""
LOOKING_SECONDS = 20.0
"""A session that showed a live run this short a time before it ended was following it."""

_SEEN, _HISTORY = "runs_seen", "runs_history"


def live(active: Sequence[Job]) -> None:
    """The runs under way: how far they are, and their curves as they come."""
    if not active:
        return
    known = {job.id for job in active}

    @st.fragment(run_every=jobs_panel.REFRESH_SECONDS)
    def live() -> None:
        with sentences():
            now = {job.id for job in jobs_panel.active_jobs() if job.kind == "finetune"}
            if now != known:
                st.rerun()
            st.session_state[_SEEN] = {"ids": known, "time": time.time()}
            for job in active:
                with st.container(border=True, key=f"live_{job.id}"):
                    _live_run(job)

    live()


def _live_run(job: Job) -> None:
    logged = history(job)
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.subheader(text.markdown(artifacts.run_title(job)), anchor=False, width="content")
        st.markdown(_track(logged.stage), width="content")
    st.caption(about(job))
    jobs_panel.bar(job, place="page")
    if logged.steps:
        curves(job, logged, key=f"live_{job.id}")
        run_film.film(job, logged, key=f"live_{job.id}", live=True)
    elif job.status() == "running":
        st.caption(
            "The base model replies to harmless prompts first, since that is what the fine-tune has to keep; the "
            "curves begin with the first step."
        )


def _track(stage: str) -> str:
    """The stages of a run with the present one marked; `load` and `wait` before any of them mark none."""
    stage = "analyse" if stage == "draw" else stage  # a short part, and of large layers only
    stage = "reply" if stage.startswith("reply ") else stage  # base's, then tuned's
    return " › ".join(f"**{name}**" if key == stage else f":gray[{name}]" for key, name in STAGES.items())


def curves(job: Job, history: History, *, key: str) -> None:
    """Separation, KL against its budget, two numbers of held-out prompts; and what became of refusals, where seen."""
    budget = config_of(job).kl_budget
    shown = [
        ("What is trained on", run_charts.separation_curve(history), "separation"),
        ("Harmless behaviour (markers: held-out prompts)", run_charts.kl_curve(history, budget), "kl"),
        (
            "Held-out prompts: Fisher ratio",
            run_charts.held_out_curve(history, "validation_fisher_ratio", "Fisher ratio"),
            "fisher",
        ),
        (
            "Held-out prompts: mean-difference margin",
            run_charts.held_out_curve(history, "validation_mean_difference_margin", "scale-free units"),
            "margin",
        ),
    ]
    if history.sees_refusals:
        name, base = "validation_refusal_log_prob", "validation_base_refusal_log_prob"
        log_prob = run_charts.held_out_curve(history, name, "nats per token", base)
        shares = run_charts.refusals_curve(history)
        shown += [
            ("Held-out harmful prompts: the base's refusals, first tokens", shares, "refusals"),
            ("Held-out harmful prompts: log-probability of the base's refusals", log_prob, "log_prob"),
        ]
    with st.container(key=f"curves_{key}"):
        for start in range(0, len(shown), 2):
            pair = shown[start : start + 2]
            for column, (title, figure, name) in zip(st.columns(2, gap="medium"), pair, strict=True):
                with column, st.container(gap="xsmall"):
                    st.markdown(f":small[**{title}**]")
                    plot(figure, key=f"{key}_{name}", alt=f"{title} over steps")


def history(job: Job) -> History:
    """The run's curves so far; only what was added to its log since the last call is read."""
    known: dict[str, tuple[int, History]] = st.session_state.setdefault(_HISTORY, {})
    offset, logged = known.get(job.id, (0, History()))
    events, offset = job.events(offset)
    logged.add(events)
    known[job.id] = offset, logged
    return logged


def followed_until_now() -> set[str]:
    """The runs that this session was shown live a moment ago; asked a second time, none."""
    seen = st.session_state.pop(_SEEN, None)
    if seen is None or time.time() - seen["time"] > LOOKING_SECONDS:
        return set()
    ids: set[str] = seen["ids"]
    return ids
