"""How long a sweep takes, from the estimates of a single fine-tune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from es2.jobs.job import Job
from es2.models.costs import LOAD_SECONDS
from es2.models.machine import Machine, this_machine
from es2.models.shape import local_folder
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.workflow.plan import plan
from es2.workflow.sweep_space import Space, first_config, most_compared


def estimate_sweep(sweep: Job) -> float:
    """Seconds that a sweep takes at most on an idle machine (`sweep_seconds`).

    Raises:
        InputError: when the model's size is unknown.
        MachineError: as `this_machine`.
    """
    space = Space.from_dict(sweep.config["space"], f"The config.json of sweep {sweep.id}")
    machine = replace(this_machine(space.fixed.get("device")), n_devices=1)
    n_trials = int(sweep.config["sweep"]["trials"])
    return sweep_seconds(space, n_trials, load_prompts(sweep.config["prompts"]), machine)


def sweep_seconds(
    space: Space, n_trials: int, prompts: PromptSet, machine: Machine, lengths: Sequence[int] | None = None
) -> float:
    """Seconds of a sweep at most: all trials at the highest layers, none pruned, as many compared as ever are.

    `lengths` is the number of tokens of every prompt; counted if not given.
    """
    config = first_config(space)  # of a pair of layers the upper one decides, and that is the highest
    made = plan(config, prompts, local_folder(config.model), machine=machine, lengths=lengths).seconds
    once = made["start"] + made["base capture"] + made["replies"] + made["analysis"]
    each = made["steps"] + made["validation"]
    compared = made["tuned capture"] + made["analysis"] + LOAD_SECONDS
    return once + n_trials * each + most_compared(n_trials) * compared
