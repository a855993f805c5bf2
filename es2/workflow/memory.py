"""How much memory and disk a fine-tune and its captures take, part by part, and what to change where it is too much.

Weights are counted; what autograd keeps is counted per token and block, with a factor that was measured on the CPU
(`docs/results/memory.md` has the peaks).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from es2.models import costs
from es2.models.batching import REPLIES_AT_ONCE, usual_tokens
from es2.models.costs import DTYPES
from es2.training.terms import reads_refusals

if TYPE_CHECKING:
    from es2.models.machine import Machine
    from es2.models.shape import Shape
    from es2.training.config import FinetuneConfig

ALONE, TOGETHER, SHARDED = "", "--multi_gpu", "--use_fsdp --fsdp_version 2"
"""How processes are launched: one; several, each with the whole model; several, each with a share of the blocks."""


@dataclass(frozen=True)
class Way:
    """A way to run a fine-tune.

    Attributes:
        launch: one of `ALONE`, `TOGETHER` and `SHARDED`.
        config: its settings.
        needs: bytes at the peak, by part: `capture`, `replies` and `steps`.
    """

    launch: str
    config: FinetuneConfig
    needs: Mapping[str, float]

    @property
    def finetune_bytes(self) -> float:
        """At the peak of the fine-tune itself; a capture has a process of its own, or may lie on several devices."""
        return max(self.needs["replies"], self.needs["steps"])


def needs(
    config: FinetuneConfig, shape: Shape, own: Sequence[int], n_measured: int, machine: Machine, launch: str = ALONE
) -> dict[str, float]:
    """Bytes on the device at the peak of each part.

    Args:
        config: of the fine-tune.
        shape: of the model.
        own: number of tokens of every prompt after the template's prefix.
        n_measured: number of prompts that are captured.
        machine: where.
        launch: how; data-parallel processes share a step's prompts.
    """
    on_cpu = machine.device == "cpu"
    width = DTYPES[number_format(config, machine)]
    runtime = costs.runtime_bytes(machine.device)
    of_blocks = shape.n_layers * shape.block_parameters
    rest = (shape.parameters - of_blocks) * width
    whole = rest + of_blocks * width
    share = machine.n_devices if launch else 1
    held_weights = rest + of_blocks * (costs.FOUR_BIT_BYTES if config.quantize else width)
    if launch == SHARDED:
        held_weights = rest + (of_blocks / machine.n_devices + 2 * shape.block_parameters) * width

    def numbers(tokens: float, kept: tuple[int, int]) -> float:
        return tokens * (kept[0] * shape.d_model + kept[1] * shape.d_ff) * width

    # What autograd keeps: harmful prompts up to the last target, those with a KL up to the LM head, as are all whose
    # first words are read.
    mean = float(np.mean(own))
    n_kl = min(config.kl_prompts, config.pairs_per_step)
    parts = share * config.accumulate
    shallow = (2 * config.pairs_per_step - n_kl) * mean / parts
    deep = math.ceil(n_kl / parts) * (mean + config.reply_tokens) + costs.TEMPLATE_PREFIX
    if reads_refusals(config.objective):
        shallow, deep = 0.0, shallow + deep
    n_trained, n_deep = len(config.blocks), shape.n_layers - config.blocks[0]
    if config.gradient_checkpointing:  # blocks keep their input alone, and the one that is recomputed everything
        kept = numbers(shallow + deep, costs.KEPT_PER_TOKEN)
        kept += (shallow * n_trained + deep * n_deep) * shape.d_model * width
    else:
        kept = numbers(shallow, costs.KEPT_PER_TOKEN) * n_trained + numbers(deep, costs.KEPT_PER_TOKEN) * n_deep

    # Trained weights are float32 whatever the rest is in; an adapter's come on top, a block's replace what was there.
    trained = trained_parameters(config, shape)
    added = trained * (4 - width if config.method == "full" else 4)
    optimizer = trained * 4 * 4  # gradient, two moments, the best weights so far

    n_replies = (2 * config.validation_prompts + config.steps * config.kl_prompts) / share
    states = n_replies * (mean + config.reply_tokens) * shape.d_model * width if on_cpu else 0.0
    at_once = usual_tokens(machine.device)
    n_replying = min(n_replies, REPLIES_AT_ONCE * at_once / mean)
    cached = n_replying * (mean + config.reply_tokens) * 2 * shape.d_kv * shape.n_layers * width
    passing = numbers(min(at_once, n_measured * mean), costs.PASSING_PER_TOKEN)
    return {
        "capture": runtime + whole + passing,
        "replies": runtime + held_weights + cached + states + costs.LOGIT_BYTES,
        "steps": runtime + held_weights + added + optimizer + kept + states + costs.LOGIT_BYTES,
    }


def number_format(config: FinetuneConfig, machine: Machine) -> str:
    """The number format that a fine-tune's frozen weights are in."""
    return config.dtype or ("float32" if machine.device in ("cpu", "mps") else "bfloat16")


def trained_parameters(config: FinetuneConfig, shape: Shape) -> float:
    """How many weights are trained, about."""
    if config.method == "full":
        return float(len(config.blocks) * shape.block_parameters)
    return float(len(config.blocks) * config.rank * (11 * shape.d_model + 3 * shape.d_ff))


def disk_bytes(config: FinetuneConfig, shape: Shape, n_measured: int, machine: Machine) -> float:
    """What a fine-tune and its two captures leave on the disk, the model itself not counted."""
    width = 4 if number_format(config, machine) == "float32" else 2
    sets = 2 * width * shape.n_layers * n_measured * shape.d_model
    return sets + trained_parameters(config, shape) * 4 * 5  # the checkpoint: weights, best, two moments; the adapter


def find_way(config: FinetuneConfig, shape: Shape, own: Sequence[int], n_measured: int, machine: Machine) -> Way | None:
    """The first way to run the fine-tune that fits into the memory that is free, the cheapest first; None if none does.

    Raises:
        ValueError: when it is unknown how much is free.
    """
    if machine.free_gb is None:
        raise ValueError("How much memory is free is not known.")
    for launch, changed in _ways(config, machine):
        way = Way(launch, changed, needs(changed, shape, own, n_measured, machine, launch))
        if way.finetune_bytes <= machine.free_gb * 1e9:
            return way
    return None


def _ways(config: FinetuneConfig, machine: Machine) -> Iterator[tuple[str, FinetuneConfig]]:
    """Ways to run a fine-tune, the cheapest first: parts cost a little, recomputation a third, shards the wire."""
    launches = [ALONE] if machine.n_devices == 1 else [TOGETHER]
    if machine.n_devices > 1 and config.method == "lora" and not config.quantize:
        launches.append(SHARDED)
    parts = sorted({min(n, config.pairs_per_step) for n in (1, 2, 4, 8, 16) if n >= config.accumulate})
    formats = [(launch, config.quantize) for launch in launches]
    if machine.device == "cuda" and config.method == "lora":
        formats.append((launches[0], "4bit"))
    for launch, quantize in formats:
        for recompute in sorted({config.gradient_checkpointing, True}):
            for n in parts:
                yield launch, config.replace(accumulate=n, gradient_checkpointing=recompute, quantize=quantize)
