"""What the page of runs shows of a run: a line about it, and how it ended.

Results are long and the page runs at every click, so their few words are cached by the result's time and size.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import streamlit as st

from app import text
from es2.analysis.verdict import Behaviour
from es2.core.files import stamp_of
from es2.evaluation.results import find_evaluations, run_behaviour
from es2.jobs.job import Job
from es2.prompts.benchmarks import source_files
from es2.prompts.sources import source_title

METHOD_NAMES = {"lora": "LoRA", "full": "Full", "experts": "LoRA, experts too"}


@dataclass(frozen=True)
class Row:
    """An entry of the list of runs that have ended.

    Attributes:
        behaviour: what its newest evaluation says of its replies.
        steps: number of optimizer steps taken; None where it is unknown.
        kl: KL on harmless `test` prompts in nats per token, by `prompt` and `reply`.
        comparable: whether its tuned model was captured, or is when its comparison is opened.
        given_as: how its model was given the prompts; None where that is unknown.
    """

    job: Job
    status: str
    error: str | None
    verdict: str | None
    reason: str | None
    behaviour: Behaviour
    steps: int | None
    kl: dict[str, float]
    comparable: bool
    given_as: str | None


def row(run: Job) -> Row:
    """A run's entry in the list; its result is read once."""
    if (stamp := stamp_of(run.path / "result.json")) is not None:
        summary = _summary(run.id, stamp, run)
    else:
        summary = {"status": run.status(), "error": run.error(), "comparable": False}
    result = summary.get("result", {})
    return Row(
        job=run,
        status=summary["status"],
        error=summary["error"],
        verdict=result.get("verdict"),
        reason=result.get("verdict_reason"),
        behaviour=behaviour(run),
        steps=result.get("steps"),
        kl=result.get("kl_harmless_test") or {},
        comparable="activations" in result and bool((result["activations"] or {"tuned": True}).get("tuned")),
        given_as=result.get("given_as"),
    )


@st.cache_data(max_entries=1024, show_spinner=False)
def _summary(id: str, stamp: object, _run: Job) -> dict[str, Any]:
    """The few words of a result that the list needs."""
    result = _run.result() or {}
    names = ("verdict", "verdict_reason", "steps", "kl_harmless_test", "activations", "given_as")
    return {
        "status": _run.status(),
        "error": _run.error(),
        "result": {name: result[name] for name in names if name in result},
    }


def behaviour(run: Job) -> Behaviour:
    """As `run_behaviour`; read again when an evaluation or the run's result has changed."""
    files = [run.path / "result.json", *find_evaluations(run)]
    return _behaviour(run.path, [(file.name, stamp_of(file)) for file in files], run)


@st.cache_data(max_entries=1024, show_spinner=False)
def _behaviour(path: Path, stamps: object, _run: Job) -> Behaviour:
    return run_behaviour(_run)


def warn(run: Job) -> None:
    """Show the warning that the behaviour of a run calls for."""
    text.warn(behaviour(run).warning)


def about(job: Job, steps: int | None = None) -> str:
    """A run in one line of Markdown, without what the title of an unnamed run already has."""
    config = job.config
    model, prompts = str(config.get("model", "")), str(config.get("prompts", ""))
    method = METHOD_NAMES.get(str(config.get("method")), "")
    taken = "" if steps is None else f", {steps} of {config.get('steps', '?')} steps"
    parts = [
        Path(model).name if model.startswith("/") else model,
        source_title(prompts),
        f"{config.get('objective', '')} at {', '.join(map(str, config.get('layers', ())))}" if job.name else "",
        method + taken,
        when(job.created),
    ]
    return " · ".join(text.markdown(part) for part in parts if part)


def when(created: str) -> str:
    """A job's time of creation, in the machine's own time zone."""
    try:
        return datetime.fromisoformat(created).astimezone().strftime("%-d %b %Y, %H:%M")
    except ValueError:
        return created


def lost_prompts(job: Job) -> str | None:
    """A sentence for a run whose prompt file is gone, without which it can neither be compared nor resumed."""
    source = str(job.config.get("prompts", "builtin"))
    lost = [str(file) for file in source_files(source) if not file.exists()]
    if not lost:
        return None
    return f"Its prompts are no longer at {' and '.join(lost)}; put the file back to compare it or to resume it."
