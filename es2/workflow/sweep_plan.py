"""How long a sweep takes, from the estimates of a single fine-tune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from es2.jobs.job import Job
from es2.models import costs
from es2.models.machine import Machine, this_machine
from es2.models.shape import Shape, local_folder
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import HARMFUL, HARMLESS, PromptSet
from es2.training.config import FinetuneConfig
from es2.workflow.memory import number_format
from es2.workflow.plan import capture_products, plan, token_counts
from es2.workflow.sweep_defence import PROBED, n_answered
from es2.workflow.sweep_space import Space, first_config, most_compared


def estimate_sweep(sweep: Job) -> float:
    """Seconds that a sweep takes at most on an idle machine (`sweep_seconds`).

    Raises:
        InputError: when the model's size is unknown.
        MachineError: as `this_machine`.
    """
    space = Space.from_dict(sweep.config["space"], f"The config.json of sweep {sweep.id}")
    machine = replace(this_machine(space.fixed.get("device")), n_devices=1)
    asked = sweep.config["sweep"]
    prompts = load_prompts(sweep.config["prompts"])
    return sweep_seconds(space, int(asked["trials"]), prompts, machine, defended=bool(asked.get("defence")))


def sweep_seconds(
    space: Space,
    n_trials: int,
    prompts: PromptSet,
    machine: Machine,
    lengths: Sequence[int] | None = None,
    *,
    defended: bool = False,
) -> float:
    """Seconds of a sweep at most: all trials at the highest layers, none pruned, as many compared as ever are.

    `lengths` is the number of tokens of every prompt; counted if not given. `defended`: with refusals under attack.
    """
    config = first_config(space)  # of a pair of layers the upper one decides, and that is the highest
    folder = local_folder(config.model)
    lengths = token_counts(folder, prompts) if lengths is None else lengths
    made = plan(config, prompts, folder, machine=machine, lengths=lengths).seconds
    once = made["start"] + made["base capture"] + made["replies"] + made["analysis"]
    each = made["steps"] + made["validation"]
    if defended:
        attack = _defence_seconds(config, prompts, machine, lengths)
        once, each = once + attack, each + attack
    compared = made["tuned capture"] + made["analysis"] + costs.LOAD_SECONDS
    return once + n_trials * each + most_compared(n_trials) * compared


def _defence_seconds(config: FinetuneConfig, prompts: PromptSet, machine: Machine, lengths: Sequence[int]) -> float:
    """Seconds of one model's refusals under attack: the attacker reads its prompts, then all are answered at once."""
    shape, n = Shape.of_model(config.model), len(prompts)
    length = sum(lengths) / n + costs.TEMPLATE_TAIL
    weight_bytes = shape.parameters * costs.DTYPES[number_format(config, machine)]
    read = capture_products(shape, round(2 * PROBED * length)) / (machine.flops * costs.CAPTURE_EFFICIENCY)
    replied = costs.reply_seconds(
        sum(n_answered(config, prompts, label) for label in (HARMFUL, HARMLESS)),
        length + config.reply_tokens,
        config.reply_tokens,
        tokens_per_second=machine.flops * costs.REPLY_EFFICIENCY / (2 * shape.parameters),
        reading=weight_bytes / costs.weight_bytes_per_second(machine.device),
        rows=config.validation_prompts,
    )
    return read + replied
