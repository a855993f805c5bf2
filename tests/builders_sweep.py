"""Sweeps as their jobs leave them, without any model: for what reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from es2.jobs.job import Job
from es2.jobs.queue import create_job
from es2.jobs.running import run_job
from es2.training.config import FinetuneConfig
from es2.training.terms import DEFAULT_OBJECTIVE
from es2.workflow.sweep_space import SEARCHED, SHAPE, Space, SweepConfig, make_space
from es2.workflow.sweeps import run_name, write_trials

SETTINGS: Sequence[dict[str, Any]] = (
    {"layers": [1, 3], "objective": "20*margin", "kl_weight": 10.0, "rate_factor": 1.0, "rank": 16},
    {"layers": [2, 4], "objective": "fisher", "kl_weight": 1.0, "rate_factor": 0.5, "rank": 8},
    {"layers": [2, 4], "objective": "fisher", "kl_weight": 100.0, "rate_factor": 0.1, "rank": 4},
    {"layers": [3, 4], "objective": DEFAULT_OBJECTIVE, "kl_weight": 3.0, "rate_factor": 2.0, "rank": 32},
    {"layers": [1, 2], "objective": "fisher", "kl_weight": 5.0, "rate_factor": 0.3, "rank": 8},
)
"""Of five trials: two on the front, one beaten, one far over the budget and pruned, one that failed."""

ENDS: Sequence[tuple[str, dict[str, Any] | None]] = (
    ("done", {"separation": 1.2, "kl": 0.05, "kept": True}),
    ("done", {"separation": 0.4, "kl": 0.002, "kept": True}),
    ("done", {"separation": 0.3, "kl": 0.03, "kept": True}),
    ("pruned", {"separation": 2.0, "kl": 0.6, "kept": False}),
    ("failed", None),
)


REFUSALS = (4, 2, 12)
"""Of the trials that kept a step, the harmful prompts refused under attack, in a sweep that is `defended`."""

OF_BASE = {"base_refusals": 3, "base_over_refusals": 1, "n_harmful": 16, "n_harmless": 16, "layers": [2, 3]}


def tiny_space(model: str, n_layers: int = 6, **given: Any) -> Space:
    """The space of a sweep with every setting searched that is not given."""
    names = [name for name in FinetuneConfig.model_fields if name not in (*SHAPE, "replies")]
    usual: dict[str, Any] = {name: FinetuneConfig.model_fields[name].default for name in names}
    usual |= dict.fromkeys((*SEARCHED, "alpha"))
    where = {} if "layers" in given else {"layer_range": (1, n_layers - 2)}
    return make_space(SweepConfig(**where), usual | {"model": model} | given, n_layers)


def write_sweep(
    model: str = "tiny",
    prompts: str = "builtin",
    *,
    refusals: Sequence[float | None] = (None,) * 5,
    outcome: Exception | None = None,
    defended: bool = False,
    **given: Any,
) -> Job:
    """A sweep of five trials with their runs, that has ended: done, or as `outcome` ends a job.

    One that is `defended` has three trials on the front, since the beaten one refuses most under attack.
    """
    space = tiny_space(model, **given)
    document = {
        "sweep": SweepConfig(trials=5, defence=defended).to_dict(),
        "space": space.to_dict(),
        "prompts_digest": "none",
    }
    sweep = create_job("sweep", document | {"model": model, "prompts": prompts})
    trials: list[dict[str, Any]] = []
    for number, (settings, (status, numbers), kept) in enumerate(zip(SETTINGS, ENDS, refusals, strict=True)):
        chosen = {name: value for name, value in settings.items() if name in space.searched}
        config = space.config(chosen)
        of = {"prompts": prompts, "sweep": sweep.id, "trial": number}
        run = create_job("finetune", config.to_dict() | of, heavy=False)
        run.rename(run_name(sweep, number))
        failure = "Memory ran out while tuning." if numbers is None else None
        run_job(run.path, {"finetune": _task(config, failure)})
        more = {"lost": None, "refusals_kept": kept, "step": 8, "defence": None}
        if defended and numbers and numbers["kept"]:
            more["defence"] = OF_BASE | {"refusals": REFUSALS[number], "over_refusals": 2}
        trials.append(
            {"number": number, "status": status, "owner": sweep.id, "settings": chosen, "run": run.id}
            | {"numbers": numbers and numbers | more, "reason": failure, "seconds": 1.0}
            | {"verdict": "separated" if number == 0 else None}
        )
    write_trials(sweep.path, trials)

    def end(*_: Any) -> Mapping[str, Any]:
        if outcome is not None:
            raise outcome
        return {"sweep": sweep.id}

    run_job(sweep.path, {"sweep": end})
    return sweep


def _task(config: FinetuneConfig, failure: str | None) -> Any:
    from es2.core.errors import MachineError

    def task(*_: Any) -> Mapping[str, Any]:
        if failure is not None:
            raise MachineError(failure)
        none = dict.fromkeys(("verdict", "activations", "kl_harmless_test"))
        return none | {"status": "done", "steps": 8, "target_layers": list(config.layers)}

    return task
