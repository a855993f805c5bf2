"""The two models of a run side by side, from what lies on disk: what a report and a figure are about."""

from __future__ import annotations

import shlex

from es2.core.errors import InputError
from es2.jobs.job import Job
from es2.prompts.loading import load_prompts
from es2.report.page import Compared
from es2.store.store import SHOWCASE, Store
from es2.workflow import showcase
from es2.workflow.derived import find_analysis
from es2.workflow.runs import open_run


def find_compared(run: str) -> Compared:
    """A run beside its base, or the showcase, from what lies on disk.

    Args:
        run: a run's id, or `showcase`.

    Raises:
        InputError: when there is no such run or showcase, or something that the report needs is missing.
    """
    if run != SHOWCASE:
        return _of_run(open_run(run))
    found = showcase.load()
    if found is None:
        raise InputError("There is no showcase in this checkout; `es2 showcase` makes it.")
    return Compared(**vars(found.comparison), title="Showcase", events=found.events)


def _of_run(run: Job) -> Compared:
    result = run.result()
    if result is None:
        raise InputError(
            f"Run {run.id} is {run.status()} and has no result to report; `es2 runs resume {run.id}` goes on."
        )
    position = "last"
    prompts = load_prompts(run.config["prompts"]).measured()
    base, tuned = (Store().get(result["activations"][name]) for name in ("base", "tuned"))
    if base is None or tuned is None:
        raise InputError(f"The embeddings of run {run.id} are not here any more; {_again(run)}")
    if base.texts_digest != prompts.texts_digest:
        raise InputError(f"The prompts {run.config['prompts']!r} have changed since run {run.id}; fine-tune again.")
    analysis = find_analysis(base, prompts, position, tuned)
    if analysis is None:
        raise InputError(f"The analysis of run {run.id} is not here any more; {_again(run)}")
    return Compared(
        prompts=prompts,
        base=base,
        tuned=tuned,
        analysis=analysis,
        position=position,
        names=("Base", "Tuned"),
        targets=tuple(result["target_layers"]),
        config=run.config,
        result=result,
        run=run.id,
        title=run.name or run.id,
        events=run.events()[0],
    )


def _again(run: Job) -> str:
    options = shlex.join(("--model", run.config["model"], "--prompts", run.config["prompts"], "--run", run.id))
    return f"`es2 analyze {options}` makes it again."
