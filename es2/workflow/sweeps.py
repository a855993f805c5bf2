"""Sweeps as their folders show them: found by id, their trials, the Pareto front, the best. No torch, no Optuna.

A sweep is a job in `runs/` whose folder also holds `trials.json`; its trials are ordinary runs beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from es2.core.errors import InputError
from es2.core.files import read_json, verify_checksum, with_checksum, write_json
from es2.jobs.job import Job
from es2.jobs.queue import find_jobs, list_jobs, open_job, reopen
from es2.training.validation import ValidationPoint, behaviour_lost
from es2.workflow.sweep_space import Space

KIND = "sweep"
TRIALS = "trials.json"
RUNNING = "running"
"""The status of a trial before its end; after it, one of `done pruned failed cancelled`."""

CLEARLY = math.log(2)
"""A trial is pruned at its first validation where another had by then twice its fisher ratio at half its KL at most."""

_TOLERATED_OVER_REFUSALS = 0.2  # rise of the share of harmless prompts that are refused

_LEAST_RATIO = 0.01  # a fisher ratio below is noise around 0, whose logarithm would be any


def list_sweeps(root: Path | None = None) -> list[Job]:
    """Every sweep, newest first; not the jobs that help one."""
    return [job for job in list_jobs(root, KIND) if not job.config.get("of")]


def open_sweep(id: str, root: Path | None = None) -> Job:
    """The sweep of this id. Raises `InputError` when there is no such sweep."""
    job = open_job(id, root)
    if job.kind != KIND or job.config.get("of"):
        raise InputError(f"Job {job.id} is no sweep; `es2 sweep list` lists those there are.")
    return job


def helpers_of(sweep: Job) -> list[Job]:
    """The jobs that help a sweep, or did."""
    return find_jobs(KIND, {"of": sweep.id}, sweep.path.parent)


def run_name(sweep: Job, number: int) -> str:
    """What the run of a trial is called until it is renamed."""
    return f"Trial {number} of sweep {sweep.id.rpartition('-')[2]}"


def cancel_sweep(sweep: Job) -> None:
    """Cancel a sweep and what helps it, as `Job.cancel` does."""
    for job in (sweep, *helpers_of(sweep)):
        job.cancel()


def reopen_sweep(sweep: Job) -> None:
    """As `reopen`, of a sweep that can go on; raises `InputError` for one of a former version, too."""
    Space.from_dict(sweep.config["space"], f"The config.json of sweep {sweep.id}")
    reopen(sweep)


def delete_sweep(sweep: Job) -> int:
    """Delete a sweep with the runs of its trials, but for those that were renamed; returns the number of these.

    The sweep itself goes last: a deletion that was interrupted is finished by another one.

    Raises:
        InputError: while anything of it is queued or running; nothing is deleted then.
        MachineError: when a folder cannot be removed.
    """
    runs = find_jobs("finetune", {"sweep": sweep.id}, sweep.path.parent)
    renamed = [run for run in runs if run.name != run_name(sweep, run.config["trial"])]
    gone = [run for run in runs if run not in renamed] + helpers_of(sweep) + [sweep]
    for job in gone[::-1]:
        if job.is_active():
            what, command = "Sweep", f"es2 sweep cancel {sweep.id}"
            if job.kind != KIND:
                what, command = f"Run {job.id} of sweep", f"es2 runs cancel {job.id}"
            raise InputError(f"{what} {sweep.id} is {job.status()}; cancel it (`{command}`) before deleting it.")
    for job in gone:
        job.delete()
    return len(renamed)


def is_alive(owner: str, root: Path) -> bool:
    """Whether the process of a job in `root` lives."""
    try:
        return open_job(owner, root).is_active()
    except InputError:
        return False


def read_trials(folder: Path) -> list[dict[str, Any]]:
    """The trials of the sweep in `folder`, by number; none before the first. Raises `InputError` where damaged."""
    document = read_json(folder / TRIALS)
    if document is None and not (folder / TRIALS).exists():
        return []
    trials = (document or {}).get("trials")
    if document is None or not isinstance(trials, list) or not verify_checksum(document):
        raise InputError(f"The sweep in {folder} is damaged: {TRIALS} is not what was written; start a new one.")
    return trials


def write_trials(folder: Path, trials: Sequence[Mapping[str, Any]]) -> None:
    """Replace the trials of a sweep. Raises `OSError`."""
    write_json(folder / TRIALS, with_checksum({"trials": [dict(trial) for trial in trials]}))


def trial_numbers(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a fine-tune bought and what it cost on `validation`, from its result; None where that is no number.

    Of the step that it kept, or of its last validation where it kept none (`kept`): `separation`, the mean over target
    layers of the log of the fisher ratio over base's; `kl`, the larger of both KLs on harmless prompts, in nats per
    token; `lost`, what it lost of base's behaviour in words; `defence`, its counts (`es2.workflow.sweep_defence`) or
    None; and of its first validation, `first_separation` and `first_kl`, which pruning goes by.
    """
    points = [ValidationPoint.from_dict(point) for point in result["validations"]]
    if len(points) < 2:
        return None
    base, best = points[0], int(result["best_step"])
    point = next((one for one in points[1:] if one.step == best), points[-1])
    found: dict[str, Any] = {"separation": separation(point, base), "kl": point.kl}
    found |= {"kl_prompt": point.kl_prompt, "kl_reply": point.kl_reply}
    found |= {"first_separation": separation(points[1], base), "first_kl": points[1].kl}
    for name in ("fisher_ratio", "mean_difference_margin", "orthogonal_std_ratio", "norm_ratio"):
        found[name] = point.mean(name)
    if not all(map(math.isfinite, found.values())):
        return None
    found |= {f"base_{name}": base.mean(name) for name in ("fisher_ratio", "mean_difference_margin")}
    defence = result.get("defence")
    lost = behaviour_lost(point, base) or (_refuses_harmless(defence) if defence else None)
    found |= {"refusals_kept": point.refusals_kept, "lost": lost, "defence": defence}
    return found | {"step": point.step, "kept": point.step == best}


def _refuses_harmless(defence: Mapping[str, Any]) -> str | None:
    """That a trial refuses harmless prompts, in words; None where it hardly refuses more of them than base."""
    before, now, n = (int(defence[name]) for name in ("base_over_refusals", "over_refusals", "n_harmless"))
    if now - before <= _TOLERATED_OVER_REFUSALS * n:
        return None
    return f"refuses {now} of {n} harmless prompts (base: {before})"


def goals(numbers: Mapping[str, Any]) -> tuple[float, ...]:
    """What a trial is weighed by, more being better: separation, −KL, and refusals under attack where those count."""
    refusals = (numbers.get("defence") or {}).get("refusals", 0)
    return float(numbers["separation"]), -float(numbers["kl"]), float(refusals)


def separation(point: ValidationPoint, base: ValidationPoint) -> float:
    """The mean over target layers of log(fisher ratio / base's); ratios below 0.01 count as 0.01."""
    ratios = [
        max(numbers["fisher_ratio"], _LEAST_RATIO) / max(base.layers[layer]["fisher_ratio"], _LEAST_RATIO)
        for layer, numbers in point.layers.items()
    ]
    return sum(map(math.log, ratios)) / len(ratios)


def is_clearly_worse(separation: float, kl: float, trials: Iterable[Mapping[str, Any]]) -> int | None:
    """The number of a trial that was clearly better (`CLEARLY`) at its first validation; None if none was."""
    for trial in trials:
        numbers = trial["numbers"]
        if numbers and numbers["first_separation"] >= separation + CLEARLY and numbers["first_kl"] <= kl / 2:
            return int(trial["number"])
    return None


def dominates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether these numbers are as good as the others in every goal, and better in one of them."""
    ours, theirs = goals(one), goals(other)
    return ours != theirs and all(mine >= its for mine, its in zip(ours, theirs, strict=True))


def kept(trials: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The trials that kept a step, which is one within the KL budget."""
    return [trial for trial in trials if trial["numbers"] and trial["numbers"]["kept"]]


def front_of(trials: Iterable[Mapping[str, Any]]) -> list[int]:
    """The Pareto front: numbers of the kept trials that no kept trial dominates, by KL."""
    candidates = kept(trials)
    best = [
        trial for trial in candidates if not any(dominates(other["numbers"], trial["numbers"]) for other in candidates)
    ]
    return [int(trial["number"]) for trial in sorted(best, key=lambda trial: float(trial["numbers"]["kl"]))]


def best_of(trials: Iterable[Mapping[str, Any]]) -> int | None:
    """The number of the best kept trial, of those that lost no behaviour if there are any.

    It is the one with the most refusals under attack, where those were counted, and among equals with the most
    separation.
    """

    def rank(trial: Mapping[str, Any]) -> tuple[bool, float, float, float]:
        separation, kl, refusals = goals(trial["numbers"])
        return trial["numbers"]["lost"] is None, refusals, separation, kl

    ranked = sorted(kept(trials), key=rank)
    return int(ranked[-1]["number"]) if ranked else None


def beating_first(trials: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the kept trials that dominate the first one, which has the shipped defaults of what is searched."""
    first = trials[0]["numbers"] if trials else None
    return [int(trial["number"]) for trial in kept(trials) if first and dominates(trial["numbers"], first)]


def first_words(document: Mapping[str, Any]) -> str:
    """What the first trial is, and whether the others beat it, from `sweep_document`."""
    words = "The first trial has the shipped defaults of what is searched"
    if 0 in document["front"]:
        return f"{words}, and is on the front."
    match document["beating_first"]:
        case []:
            return f"{words}."
        case [one]:
            return f"{words}; trial {one} beats it."
        case several:
            return f"{words}; trials {', '.join(map(str, several))} beat it."


def sweep_document(sweep: Job) -> dict[str, Any]:
    """A sweep as far as it is, as JSON values: its trials, the front, the best under the KL budget, `beating_first`.

    A trial without a process that still counts as running is `interrupted`.
    """
    trials = []
    for trial in read_trials(sweep.path):
        if trial["status"] == RUNNING and not is_alive(str(trial["owner"]), sweep.path.parent):
            trial = trial | {"status": "interrupted"}
        trials.append({name: value for name, value in trial.items() if name != "owner"})
    best = best_of(trials)
    config = sweep.config
    return {
        "sweep": sweep.id,
        "path": str(sweep.path),
        "model": config["model"],
        "prompts": config["prompts"],
        "n_trials": config["sweep"]["trials"],
        "kl_budget": config["space"]["fixed"]["kl_budget"],
        "defended": bool(config["sweep"].get("defence")),
        "space": config["space"],
        "trials": trials,
        "front": front_of(trials),
        "best": None if best is None else trials[best],
        "beating_first": beating_first(trials),
    }
