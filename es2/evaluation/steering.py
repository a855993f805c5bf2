"""Steering embeddings while a model generates, and reading back what the steering did.

Probe and steering share one hook point, `blocks.{l}.hook_out` (SCAV's published code trains on a layer's inputs and
shifts its outputs), where the probe is read again after steering. Each row of a batch is steered in its own way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.core.errors import InputError
from es2.evaluation.robustness import DIRECTIONS, P0, Attacker, logit
from es2.models.blocks import BlockHooks, find_blocks, output_of, with_output

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor


BUDGETS = (0.1, 0.2, 0.4, 0.8)  # lengths of the shift relative to the embedding's own


@dataclass(frozen=True)
class Steering:
    """One way of steering the embeddings of a prompt, at every layer of the attacker.

    Attributes:
        direction: one of `DIRECTIONS`; `none` leaves the model alone.
        budget: length relative to the embedding's own norm, for a steering of fixed length.
        p0: instead of a budget: as far along the probe's normal as it takes to reach this probability, and not at all
            where the probe gives less already (SCAV).
    """

    direction: str
    budget: float | None = None
    p0: float | None = None

    def __post_init__(self) -> None:
        if self.direction not in (*DIRECTIONS, "none"):
            raise InputError(f"Unknown direction {self.direction[:40]!r}; one of {', '.join(DIRECTIONS)}.")
        if self.p0 is not None and self.direction != "scav":
            raise InputError("Only the scav direction can be followed up to a probability; give a budget instead.")

    def to_dict(self) -> dict[str, Any]:
        """The three settings."""
        return asdict(self)


def steering_sweep(
    directions: Sequence[str] = DIRECTIONS, budgets: Sequence[float] = BUDGETS, p0s: Sequence[float] = P0
) -> list[Steering]:
    """The whole sweep: no steering, every direction at every budget, and SCAV up to every p0."""
    sweep = [Steering("none", 0.0)]
    sweep += [Steering(direction, float(budget)) for direction in directions for budget in budgets]
    return sweep + [Steering("scav", None, float(p0)) for p0 in p0s]


@dataclass
class ReadBack:
    """Readings of the hooks while prompts were steered, one entry per prompt.

    Attributes:
        probability: the probe's probability at the last prompt token, after steering, the mean over layers.
        worst: the largest |P − p₀| after steering up to p₀, over layers and decoding steps; 0 where nothing was
            steered.
        highest: the largest probability after steering, over layers and decoding steps.
        lengths: of the steering vectors relative to ‖e‖, the mean over layers, summed over steps.
        steps: number of decoding steps.
    """

    probability: Float[np.ndarray, "prompt"]
    worst: Float[np.ndarray, "prompt"]
    highest: Float[np.ndarray, "prompt"]
    lengths: Float[np.ndarray, "prompt"]
    steps: Float[np.ndarray, "prompt"]

    @property
    def relative(self) -> Float[np.ndarray, "prompt"]:
        """The length of the steering vector relative to ‖e‖, the mean over layers and steps."""
        return self.lengths / np.maximum(self.steps, 1)

    def of(self, row: int) -> dict[str, float]:
        """The readings of one prompt."""
        names = ("probability", "worst", "highest", "relative")
        return {name: float(getattr(self, name)[row]) for name in names}


class Steered:
    """A context in which forward passes of a model have each row's last token steered in its own way.

    Two hooks at the output of each of the attacker's blocks, which is `blocks.{l}.hook_out`: the first steers, the
    second reads the probe's probability of what the next block gets.

    Args:
        model: a plain transformers model, with or without an adapter inside.
        attacker: made from this model's embeddings.
        cases, texts: the steering and the prompt of each row that may come.
        seed: of random directions.

    Attributes:
        read: the readings, by case.
    """

    def __init__(
        self, model: Any, attacker: Attacker, cases: Sequence[Steering], texts: Sequence[str], seed: int = 0
    ) -> None:
        self.attacker = attacker
        self.read = ReadBack(*np.zeros((5, len(cases))))
        self._blocks = find_blocks(model)[1]
        self._rows: Sequence[int] | None = None
        self._cases = list(cases)
        # One vector for all cases that share it: a direction, or a random one for each prompt.
        named = [
            (case.direction, text if case.direction == "random" else "")
            for case, text in zip(cases, texts, strict=True)
        ]
        distinct = sorted({name for name in named if name[0] != "none"})
        self._vectors = np.zeros((len(attacker.layers), len(distinct) + 1, len(attacker.planes[0].normal)))
        for number, (direction, text) in enumerate(distinct, 1):
            self._vectors[:, number] = attacker.vectors(direction, [text], seed)[:, 0]
        numbers = {name: number for number, name in enumerate(distinct, 1)}
        self._which = np.array([numbers.get(name, 0) for name in named], dtype=np.int64)
        self._budgets = np.array([case.budget or 0.0 for case in cases])
        self._until = np.array([case.p0 is not None for case in cases])
        self._goals = np.array([logit(case.p0) if case.p0 is not None else 0.0 for case in cases])
        self._reached = np.array([case.p0 if case.p0 is not None else 0.0 for case in cases])
        self._shifts: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Steered:
        for index, layer in enumerate(self.attacker.layers):
            block = self._blocks[layer]
            self._handles.append(block.register_forward_hook(partial(self._steer, index)))
            self._handles.append(block.register_forward_hook(partial(self._read_back, index)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def at(self, rows: Sequence[int] | None) -> None:
        """The cases of the next pass's rows; None for passes to leave alone."""
        self._rows = rows

    def forget(self, rows: Sequence[int]) -> None:
        """Cases whose replies begin anew."""
        for readings in (self.read.probability, self.read.worst, self.read.highest, self.read.lengths, self.read.steps):
            readings[list(rows)] = 0

    def _steer(self, index: int, block: Any, inputs: Any, output: Any) -> Any:
        """The block's output with the last token of every row steered."""
        if self._rows is None:
            return None
        activation = output_of(output)
        rows, plane = list(self._rows), self.attacker.planes[index]
        last = activation[:, -1].to(_exact(activation))
        norms = last.norm(dim=1)
        score = last @ _like(last, plane.normal) * plane.slope + plane.offset
        needed = ((score - _like(last, self._goals[rows])) / plane.slope).clamp(min=0)
        until = _like(last, self._until[rows]).bool()
        length = needed.where(until, _like(last, self._budgets[rows]) * norms)
        self._shifts[index] = length
        self.read.lengths[rows] += (length / norms.clamp(min=1e-12)).cpu().numpy() / len(self.attacker.layers)
        moved = activation.clone()
        away = -_like(last, self._vectors[index, self._which[rows]])
        moved[:, -1] = (last + length[:, None] * away).to(activation.dtype)
        return with_output(output, moved)

    def _read_back(self, index: int, block: Any, inputs: Any, output: Any) -> None:
        """Record what the probe says of the block's output as the next block gets it."""
        if self._rows is None:
            return
        activation = output_of(output)
        rows, plane, read = list(self._rows), self.attacker.planes[index], self.read
        last = activation[:, -1].to(_exact(activation))
        found = (last @ _like(last, plane.normal) * plane.slope + plane.offset).sigmoid().cpu().numpy()
        steered = self._until[rows] & (self._shifts[index] > 0).cpu().numpy()
        read.worst[rows] = np.maximum(read.worst[rows], np.where(steered, np.abs(found - self._reached[rows]), 0))
        read.highest[rows] = np.maximum(read.highest[rows], found)
        read.probability[rows] += np.where(read.steps[rows] == 0, found / len(self.attacker.layers), 0)
        if index == len(self.attacker.layers) - 1:
            read.steps[rows] += 1


@contextmanager
def steered_throughout(model: Any, vector: Float[np.ndarray, "d_model"], layer: int | None = None) -> Iterator[None]:
    """A context in which all tokens of all rows are steered alike, in every pass: no row depends on the others.

    Args:
        model: a plain transformers model, with or without an adapter inside.
        vector: not zero.
        layer: where the vector is added to the block's output; without one, its direction is projected out of the
            output of every block.
    """

    def steer(activation: Tensor, hook: Any) -> Tensor:
        exact = activation.to(_exact(activation))
        if layer is not None:
            return (exact + _like(exact, vector)).to(activation.dtype)
        unit = _like(exact, vector / np.linalg.norm(vector))
        return (exact - (exact @ unit)[..., None] * unit).to(activation.dtype)

    hooks = BlockHooks(model)
    layers = range(len(hooks.blocks)) if layer is None else (layer,)
    with hooks.hooks([(f"blocks.{one}.hook_out", steer) for one in layers]):
        yield


def _exact(activation: Tensor) -> torch.dtype:
    """The precision of the steering: double, where the device has it."""
    import torch

    return torch.float32 if activation.device.type == "mps" else torch.float64


def _like(tensor: Tensor, values: np.ndarray) -> Tensor:
    """An array as a tensor of this one's precision, where this one is."""
    import torch

    return torch.as_tensor(values).to(tensor.device, tensor.dtype)
