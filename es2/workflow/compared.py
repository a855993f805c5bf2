"""The two models of a run side by side, read from disk: what the page, a report and a figure are about."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import numpy as np

from es2.analysis.comparison import Comparison
from es2.analysis.results import Analysis
from es2.core.errors import InputError
from es2.core.files import checked_key, way_out
from es2.core.rendering import Rendering
from es2.evaluation.results import newest_attack, newest_directions, run_ability, run_behaviour
from es2.jobs.job import Job
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.report.page import Compared
from es2.store.activation_set import ActivationSet
from es2.store.store import Store
from es2.workflow.derived import find_activations, find_analysis
from es2.workflow.film import find_film
from es2.workflow.runs import open_run, rendering_of


class AbsentError(InputError):
    """Something that a comparison is made of is not on disk, or not of these prompts."""


def find_compared(run: str) -> Compared:
    """A run, by its id or `showcase`, beside its base, with all that a report needs.

    Raises:
        InputError: when there is no such run, or something that the report needs is missing (`AbsentError`).
    """
    job = open_run(run)
    prompts = load_prompts(str(job.config.get("prompts", "builtin")))
    found = find_comparison(job, prompts.measured())
    return Compared(
        **vars(found),
        title=job.name or job.id,
        events=job.events()[0],
        film=find_film(job, prompts),
        attacked=newest_attack(job),
        directed=newest_directions(job),
        ability=run_ability(job),
    )


def find_comparison(
    run: Job,
    prompts: PromptSet,
    position: str = "last",
    against: Job | None = None,
    *,
    keep: Callable[[ActivationSet], ActivationSet] = lambda found: found,
    find: Callable[[ActivationSet, PromptSet, str, ActivationSet], Analysis | None] = find_analysis,
) -> Comparison:
    """A run beside its base, or beside another run.

    Args:
        run: the run.
        prompts: its measured prompts.
        position: whose embeddings are read.
        against: the run that takes the place of base.
        keep: returns the cached object of a set, for a caller that asks again and again.
        find: as `find_analysis`, likewise.

    Raises:
        AbsentError: when something is missing, or the run's result is not what a fine-tune writes.
        InputError, MachineError: as `Store.get` does; for a shipped run beside another one.
    """
    if against is not None:
        run.check_own()
        against.check_own()
    result = run.result()
    if result is None:
        fix = way_out(run.path, f"`es2 runs resume {run.id}` goes on")
        raise AbsentError(f"Run {run.id} is {run.status()} and has no result to report; {fix}.")
    again = way_out(run.path, "fine-tune again")
    try:
        left = _key(against, "tuned", prompts, position) if against else _key(run, "base", prompts, position)
        keys = (left, _key(run, "tuned", prompts, position))
        targets = tuple(map(int, result["target_layers"]))
    except (LookupError, TypeError, ValueError) as error:
        raise AbsentError(f"The result of run {run.id} lacks an entry, or has one that cannot be; {again}.") from error
    base, tuned = map(Store().get, keys)
    if base is None or tuned is None:
        raise AbsentError(f"The embeddings of run {run.id} are not here any more; {_again(run)}.")
    if not run.is_shipped:  # a position that the run itself did not capture lies in sets of their own
        base, tuned = _holding(base, position), _holding(tuned, position)
        if base is None or tuned is None:
            what = f"The embeddings of run {run.id} at position {position}"
            raise AbsentError(f"{what} are not here; {_again(run, position)}.")
    base, tuned = keep(base), keep(tuned)
    if not any(rendering in tuned.renderings for rendering in base.renderings):
        raise AbsentError(
            f"Run {run.id} and what it is compared with were captured under different renderings (system prompt, "
            "thinking, template arguments), and models are compared under one; compare it with its base."
        )
    shown = captured_of(prompts, base)
    if shown is None or base.texts_digest != tuned.texts_digest:
        raise AbsentError(f"The prompts {prompts.name!r} have changed since run {run.id}; {again}.")
    if run.is_shipped and position not in base.positions:
        raise AbsentError(f"Run {run.id} comes with the program at position {base.positions[0]} only; choose that one.")
    analysis = find(base, prompts, position, tuned)
    if analysis is None:
        what = f"The analysis of run {run.id} at position {position} of its prompts as they are now"
        raise AbsentError(f"{what} is not here; {_again(run, position)}.")
    return Comparison(
        prompts=shown,
        base=base,
        tuned=tuned,
        analysis=analysis,
        position=position,
        names=("Base", "Tuned"),
        targets=targets,
        config=run.config,
        result=result,
        run=run.id,
        behaviours=tuple(map(run_behaviour, filter(None, (against, run)))),
    )


def _key(run: Job, side: str, prompts: PromptSet, position: str) -> str:
    """The key of a run's `base` or `tuned` embeddings; those of a run that was not compared at its end are looked for.

    Raises `AbsentError` where there are none, `LookupError` or `TypeError` for a result that is not a fine-tune's.
    """
    known = (run.result() or {})["activations"]
    if known is not None:
        return checked_key(known[side])
    of = run.id if side == "tuned" else None
    found = find_activations(run.config["model"], prompts, position, run=of, rendering=rendering_of(run))
    if found is None:
        raise AbsentError(f"Run {run.id} was not compared with its base yet; {_again(run, position)}.")
    return found.key


def captured_of(prompts: PromptSet, activations: ActivationSet) -> PromptSet | None:
    """Those of `prompts` that a set holds: all, or where the set is a part of another, a part; None for other ones."""
    if activations.whole != activations.key:
        held = set(activations.texts)
        prompts = prompts.select(np.array([text in held for text in prompts.texts], dtype=bool))
    return prompts if prompts.texts_digest == activations.texts_digest else None


def _holding(found: ActivationSet, position: str) -> ActivationSet | None:
    """The set itself where it holds a position, else one of the same model, prompts and rendering that does."""
    if position in found.positions:
        return found
    rendering = Rendering.from_dict(found.renderings[0])
    return Store().find(
        model=found.model, texts_digest=found.texts_digest, position=position, run=found.run, rendering=rendering
    )


def _again(run: Job, position: str = "last") -> str:
    model, prompts = (str(run.config.get(name)) for name in ("model", "prompts"))
    of_position = () if position == "last" else ("--position", position)
    options = shlex.join(("--model", model, "--prompts", prompts, "--run", run.id, *of_position))
    return way_out(run.path, f"`es2 analyze {options}` makes it again")
