"""The series of a base: which activation sets can be set beside it, what they are, and their numbers.

Everything is read from what captures, runs and `es2.training.RepresentationCallback` left on disk; no model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from es2.analysis.results import AnalysisConfig
from es2.analysis.series import Member
from es2.analysis.setup import check_prompts
from es2.core.errors import InputError
from es2.core.files import expanded
from es2.core.progress import Reporter, silent
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.jobs.job import Job
from es2.models.catalogue import resolve
from es2.prompts.prompt_set import PromptSet
from es2.store.activation_set import ActivationSet
from es2.store.sources import check_position, usual_positions
from es2.store.store import Store
from es2.workflow.derived import find_activations
from es2.workflow.prepare import analysis_of
from es2.workflow.runs import list_runs, run_title

_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,12})")
"""The name of the folder that transformers' trainer writes at a step."""


def find_base(
    model: str, prompts: PromptSet, position: str, rendering: Rendering = AS_THE_TEMPLATE, store: Store | None = None
) -> ActivationSet:
    """The embeddings of a base, which need not be on this machine itself.

    Args:
        prompts: the measured prompts.

    Raises:
        InputError: when there are none, or `model` names nothing.
    """
    position = check_position(position)
    found = find_activations(model, prompts, position, store, rendering=rendering)
    found = found or find_activations(resolve(model).name, prompts, position, store, rendering=rendering)
    if found is None:
        raise InputError(
            f"{model} is not captured at {position} of these prompts; `es2 analyze --model {model}` with the same "
            "options does it."
        )
    return found


def why_not(base: ActivationSet, other: ActivationSet, position: str) -> str | None:
    """Why a set cannot be set beside base at a position, as the end of a sentence; None where it can."""
    if _identity(other) == _identity(base):
        return "is the base itself"
    if not _is_of(base, other):
        return f"is of another base ({other.meta.get('base') or other.model})"
    if other.texts_digest != base.texts_digest:
        return "holds other prompts"
    if (other.n_layers, other.d_model) != (base.n_layers, base.d_model):
        return (
            f"has {other.n_layers} layers of {other.d_model} dimensions, and the base {base.n_layers} of {base.d_model}"
        )
    if position not in other.positions:
        return f"was captured at {' and '.join(other.positions)}, not at {position}"
    tokens, of_base = (one.meta.get("decides", {}).get("tokens") for one in (other, base))
    alike = tokens == of_base if tokens and of_base else any(one in base.renderings for one in other.renderings)
    return None if alike else "was given the prompts in other words (system prompt, thinking or chat template)"


def _identity(activations: ActivationSet) -> tuple[object, ...]:
    """What is equal for sets of one model, whatever their positions and prompts."""
    decides = activations.meta.get("decides")
    if decides:
        return (decides.get("weights"), decides.get("adapter"))
    return (activations.model, activations.run)


def _is_of(base: ActivationSet, other: ActivationSet) -> bool:
    """Whether the set is of the base with an adapter, or of weights whose training began with it."""
    weights = base.meta.get("decides", {}).get("weights")
    if weights and weights in (other.meta.get("decides", {}).get("weights"), other.meta.get("base_weights")):
        return True
    names = {*base.models}
    return bool(names & {*other.models} and (other.run or base.run)) or other.meta.get("base") in names


def find_members(base: ActivationSet, position: str, store: Store | None = None) -> list[Member]:
    """What fits beside a base: trainings in the order of their beginning, each by step; without analyses.

    Of several sets of one model the one that an analysis captures, else the newest.
    """
    found: dict[tuple[object, ...], ActivationSet] = {}
    usual = usual_positions(position)
    for one in sorted((store or Store()).list(), key=lambda one: one.positions != usual):
        if why_not(base, one, position) is None:
            found.setdefault(_identity(one), one)
    return _in_order(found.values())


def _in_order(sets: Iterable[ActivationSet]) -> list[Member]:
    runs = {run.id: run for run in list_runs()}
    members = [_member(one, runs) for one in sets]
    begun: dict[str, str] = {}
    for member in members:
        created = member.activations.created
        begun[member.training] = min(begun.get(member.training, created), created)
    return sorted(
        members,
        key=lambda one: (begun[one.training], one.training, one.step or 0, one.activations.created),
    )


def _member(activations: ActivationSet, runs: Mapping[str, Job]) -> Member:
    """A set with what is known of where it comes from."""
    run = next(filter(None, (runs.get(id or "") for id in activations.runs)), None)
    result = (run.result() if run is not None else None) or {}
    places = [*filter(None, activations.runs), *activations.models]
    if run is not None:
        places.insert(0, str(run.config.get("imported", "")))
    checkpoint = next((Path(place) for place in places if _CHECKPOINT.fullmatch(Path(place).name)), None)
    if checkpoint is not None:
        step: int | None = int(checkpoint.name.rpartition("-")[2])
        training, name = str(checkpoint.parent), f"{checkpoint.parent.name}, step {step}"
    elif run is not None:
        known = None if run.config.get("imported") else (result.get("best_step") or result.get("steps"))
        step, training, name = known if isinstance(known, int) else None, run.id, run_title(run)
    else:
        step, training, name = None, activations.key, Path(activations.run or activations.model).name
    if run is not None and run.name:
        name = run.name
    return Member(activations, name, training, step, result.get("kl_harmless_test"))


def base_member(base: ActivationSet) -> Member:
    """The first of every series."""
    return Member(base, "Base", step=0)


def open_members(names: Sequence[str], base: ActivationSet, position: str, store: Store | None = None) -> list[Member]:
    """The sets of these names, in order; all that fit, where no name is given.

    Args:
        names: each the id of a run, the folder of a checkpoint, or the key of an activation set.

    Raises:
        InputError: for a name of no set, or one that does not fit; where nothing fits.
    """
    store = store or Store()
    fitting = find_members(base, position, store)
    chosen = [_named(name, fitting, base, position, store) for name in dict.fromkeys(names)] if names else fitting
    chosen = [member for member in fitting if member in chosen]
    if not chosen:
        raise InputError(
            f"There is nothing to set beside {base.model} yet; `es2 finetune`, `es2 import` or a training with the "
            "RepresentationCallback (docs/watching.md) makes some."
        )
    return chosen


def _named(name: str, fitting: Sequence[Member], base: ActivationSet, position: str, store: Store) -> Member:
    place = str(Path(expanded(name)).absolute())

    def is_called(one: ActivationSet) -> bool:
        return name == one.key or bool({name, place} & {*filter(None, one.runs), *(one.models if not one.run else ())})

    if (member := next((one for one in fitting if is_called(one.activations)), None)) is not None:
        return member
    others = [one for one in store.list() if is_called(one)]
    if not others:
        raise InputError(
            f"There is no activation set of {name[:200]!r}; give the id of a run (`es2 runs`), the folder of a "
            "captured checkpoint or the key of a set."
        )
    raise InputError(refusal(base, others[0], position, name))


def refusal(base: ActivationSet, other: ActivationSet, position: str, name: str | None = None) -> str:
    """The sentence on a set that does not fit."""
    called = name or other.run or other.model
    reason = why_not(base, other, position) or "is there twice"
    return f"{called} cannot be set beside {base.model}: it {reason}; leave it out."


def analyse_members(
    base: ActivationSet,
    members: Sequence[Member],
    prompts: PromptSet,
    position: str,
    store: Store | None = None,
    report: Reporter = silent,
) -> list[Member]:
    """Base and the members with their analyses, which are computed where they are missing.

    Args:
        prompts: the measured prompts of all.

    Raises:
        InputError, MachineError: as `es2.analysis.layers.analyze` does.
    """
    check_prompts(prompts)
    if prompts.texts_digest != base.texts_digest:
        raise InputError(f"The prompts {prompts.name!r} have changed since they were captured; capture them again.")
    n_sets = 1 + len(members)
    found = []
    for number, member in enumerate([base_member(base), *members]):
        analysis = analysis_of(
            prompts,
            base,
            member.activations if number else None,
            AnalysisConfig(position=position),
            store or Store(),
            report=partial(_part, report, number, n_sets),
        )
        found.append(replace(member, analysis=analysis))
    return found


def _part(report: Reporter, number: int, n_sets: int, stage: str, done: int, total: int, **numbers: float) -> None:
    report(stage, number * total + done, n_sets * total, **numbers)


def series_document(members: Sequence[Member], layer: int | None = None) -> dict[str, Any]:
    """Base and the others with their numbers, at one layer or at all."""
    base, *others = members
    return {
        "model": base.activations.model,
        "base": base.to_dict(layer),
        "sets": [member.to_dict(layer) for member in others],
    }
