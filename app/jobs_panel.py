"""Jobs as the page shows them: what is under way, how far it is, how it ended.

Everything is read from the folders under `runs/`, anew each time. While a job is under way a fragment runs once a
second; when one begins or ends, the whole page runs again.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import streamlit as st

from app import text
from app.text import sentences
from es2.jobs.job import ACTIVE, Job
from es2.jobs.queue import launch, list_jobs
from es2.jobs.running import jobs_ahead
from es2.workflow.sweeps import cancel_sweep

KINDS = {
    "prepare": "Capture and analyse",
    "project": "UMAP of every layer",
    "series": "Numbers of a series",
    "finetune": "ES2 fine-tune",
    "evaluate": "Evaluate",
    "check": "Check the model",
    "sweep": "Sweep",
}
STAGES = {
    "wait": ("Waiting for another process that computes the same", None),
    "download": ("Fetching the model", "%"),
    "convert": ("Converting the model", None),
    "load": ("Loading the model", None),
    "capture": ("Reading prompts", "tokens"),
    "analyse": ("Fitting probes", "layers"),
    "draw": ("Drawing the layers", "layers"),
    "umap": ("Computing UMAP", "layers"),
    "base": ("Reading the base model's replies", "prompts"),
    "finetune": ("Fine-tuning", "steps"),
    "reply base": ("Base replies", "tokens"),
    "reply tuned": ("Tuned replies", "tokens"),
    "read base": ("Base reads the replies", "prompts"),
    "read tuned": ("Tuned reads the replies", "prompts"),
    "steer base": ("Base replies under steering", "tokens"),
    "steer tuned": ("Tuned replies under steering", "tokens"),
    "fit base": ("Fitting a soft prompt to base", "steps"),
    "fit tuned": ("Fitting a soft prompt to tuned", "steps"),
    "soft base": ("Base replies after a soft prompt", "tokens"),
    "soft tuned": ("Tuned replies after a soft prompt", "tokens"),
    "check": ("Checking", "checks"),
    "judge": ("Asking the judge", "replies"),
    "defence": ("Replies under attack", "tokens"),
    "sweep": ("Fine-tuning with other settings", "trials"),
}
"""By stage, its name and its unit; a percentage, or None where there is nothing worth counting."""
N_ENDED = 5
REFRESH_SECONDS = 1.0


def active_jobs() -> list[Job]:
    """The jobs that are queued or running, oldest first: the order of their turns."""
    # What has a result has ended; results of runs are long, and this is asked every second.
    unended = (job for job in reversed(list_jobs()) if not (job.path / "result.json").exists())
    return [job for job in unended if job.status() in ACTIVE]


def latest(kind: str, config: Mapping[str, Any]) -> Job | None:
    """The newest job of this kind with these settings, of these runs and this rendering, or of none, in any state."""
    wanted = {"run": None, "against": None, "rendering": None} | dict(config)
    same = (job for job in list_jobs(kind=kind) if all(job.config.get(name) == wanted[name] for name in wanted))
    return next(same, None)


def ensure(kind: str, config: Mapping[str, Any]) -> None:
    """Start a job, unless one with the same settings is under way: a second click starts nothing."""
    job = latest(kind, config)
    if job is None or job.status() not in ACTIVE:
        launch(kind, config)


def start(kind: str, config: Mapping[str, Any]) -> None:
    """Start a job as `ensure` does, and run the page again."""
    ensure(kind, config)
    st.rerun()


def title(job: Job) -> str:
    """What the job does and to what, in a few words."""
    prompts = str(job.config.get("prompts", ""))
    about = [str(job.config.get("model", "")), prompts if prompts.startswith("hf:") else Path(prompts).name]
    return f"{job.name or KINDS.get(job.kind, job.kind)}: {', '.join(part for part in about if part)}"


def state(job: Job) -> tuple[float, str]:
    """How far an active job is, from 0 to 1, and that in words."""
    if job.status() == "queued":
        waiting = len(jobs_ahead(job))
        return 0.0, f"Waiting for its turn, {waiting} before it" if waiting else "Starting"
    progress = job.progress()
    if progress is None:
        return 0.0, "Starting"
    done, total = progress["done"], progress["total"]
    words, unit = STAGES.get(progress["stage"], (str(progress["stage"]).capitalize(), ""))
    if unit == "%" and total > 0:
        words += f", {100 * done // total} %"
    elif unit is not None and total > 0:
        words += f", {done:,} of {total:,} {unit}".rstrip()
    if progress["seconds_left"] is not None:
        words += f", about {text.duration(progress['seconds_left'])} left"
    return (min(1.0, done / total) if total > 0 else 0.0), words


def bar(job: Job, *, place: str) -> None:
    """A job's progress with a button to cancel it. `place` makes its keys unique on the page."""
    fraction, words = state(job)
    st.progress(fraction, text=text.markdown(words))
    asked = (job.path / "cancel").exists()
    if st.button(
        "Cancelling" if asked else "Cancel",
        key=f"cancel_{place}_{job.id}",
        help="Asks the job to stop; what is complete on disk is kept. Asked again after a while, it is stopped hard.",
        type="tertiary",
        icon=":material/stop_circle:",
    ):
        cancel_sweep(job) if job.kind == "sweep" else job.cancel()
        st.rerun()


def poll() -> None:
    """The sidebar's list of jobs, live while something is under way."""
    known = {job.id for job in active_jobs()}

    @st.fragment(run_every=REFRESH_SECONDS if known else None)
    def jobs() -> None:
        with sentences():
            active = active_jobs()
            if {job.id for job in active} != known:
                st.rerun()
            for job in active:
                with st.container(border=True, key=f"job_{job.id}", gap="xsmall"):
                    st.markdown(f":small[{text.markdown(title(job))}]")
                    bar(job, place="sidebar")
            if not active:
                st.caption("Nothing is under way.")

    jobs()
    ended = [job for job in list_jobs() if job.id not in known][:N_ENDED]
    if ended:
        with st.expander("Earlier jobs", key="earlier_jobs"):
            for job in ended:
                _ended(job)


def _ended(job: Job) -> None:
    status = job.status()
    error = job.error()
    line = f"{text.markdown(title(job))}  \n{status}, {_ago(job.created)}"
    st.caption(line if error is None else f"{line}  \n:red[{text.markdown(text.in_app(error))}]")


def _ago(created: str) -> str:
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()
    except (ValueError, TypeError):
        return "at an unknown time"
    if seconds < 172_800:
        return f"started {text.duration(max(1.0, seconds))} ago"
    return f"started on {created[:10]}"


def live_bar(job: Job) -> None:
    """One job's progress in the page itself; the sidebar's list runs the page again when it ends."""

    @st.fragment(run_every=REFRESH_SECONDS)
    def progress() -> None:
        with sentences():
            bar(job, place="page")

    progress()


def offer(
    kind: str, config: Mapping[str, Any], label: str, key: str, icon: str | None = ":material/play_arrow:"
) -> bool:
    """Show the job that makes what is missing, or how it ended and a button to start it; returns whether it runs."""
    job = latest(kind, config)
    if job is not None and job.is_active():
        live_bar(job)
        return True
    ending(job)
    if st.button(label, key=key, type="primary", icon=icon):
        start(kind, config)
    return False


def ending(job: Job | None) -> None:
    """Show how a job ended that left no result; nothing while it is under way or where there is none."""
    if job is None or (status := job.status()) in (*ACTIVE, "done"):
        return
    if status == "cancelled":
        st.info("It was cancelled; what was complete is kept.", icon=":material/info:")
    else:
        st.error(text.markdown(text.in_app(job.error() or f"It is {status}.")), icon=":material/error:")
