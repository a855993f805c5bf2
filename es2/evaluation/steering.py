"""Steering embeddings while a model generates, and reading back what the steering did.

Probe and steering share one hook point, `blocks.{l}.hook_out` (SCAV's published code trains on a layer's inputs and
shifts its outputs), where the probe is read again after steering. Each row of a batch is steered in its own way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.core.errors import InputError
from es2.evaluation.robustness import DIRECTIONS, P0, Attacker, logit

if TYPE_CHECKING:
    from jaxtyping import Float
    from transformer_lens.model_bridge import TransformerBridge


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
    """Readings of the hooks while a batch was steered, one entry per prompt.

    Attributes:
        probability: the probe's probability at the last prompt token, after steering, the mean over layers.
        worst: the largest |P − p₀| after steering up to p₀, over layers and decoding steps; 0 where nothing was
            steered.
        highest: the largest probability after steering, over layers and decoding steps.
        relative: length of the steering vector relative to ‖e‖, the mean over layers and steps.
    """

    probability: Float[np.ndarray, "prompt"]
    worst: Float[np.ndarray, "prompt"]
    highest: Float[np.ndarray, "prompt"]
    relative: Float[np.ndarray, "prompt"]
    steps: int = field(default=0, repr=False)

    def of(self, row: int) -> dict[str, float]:
        """The readings of one prompt."""
        names = ("probability", "worst", "highest", "relative")
        return {name: float(getattr(self, name)[row]) for name in names}


@contextmanager
def steered(
    bridge: TransformerBridge, attacker: Attacker, batch: Sequence[Steering], texts: Sequence[str], seed: int = 0
) -> Iterator[ReadBack]:
    """A context in which every forward pass has its last token steered at the attacker's layers, each row its own way.

    Two hooks at each layer's `hook_out`: the first steers, the second reads the probe's probability of what the next
    block gets.

    Args:
        attacker: made from the embeddings of the model of `bridge`.
        batch, texts: the steering and the prompt of each row.

    Yields:
        The readings, complete when the context ends.
    """
    import torch

    model: Any = bridge.original_model
    device: torch.device = model.device
    exact = torch.float32 if device.type == "mps" else torch.float64
    n_layers = len(attacker.layers)
    record = ReadBack(*np.zeros((4, len(batch))))

    def tensor(values: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(values), dtype=exact, device=device)

    budgets = tensor([steering.budget or 0.0 for steering in batch])
    until = torch.tensor([steering.p0 is not None for steering in batch], device=device)
    goals = tensor([logit(steering.p0) if steering.p0 is not None else 0.0 for steering in batch])
    reached = tensor([steering.p0 if steering.p0 is not None else 0.0 for steering in batch])
    towards = np.zeros((n_layers, len(batch), len(attacker.planes[0].normal)))
    for name in {steering.direction for steering in batch} - {"none"}:
        rows = [row for row, steering in enumerate(batch) if steering.direction == name]
        towards[:, rows] = attacker.vectors(name, [texts[row] for row in rows], seed)
    shifts: dict[int, Any] = {}

    def steer_at(index: int) -> Any:
        plane, away = attacker.planes[index], tensor(-towards[index])
        normal = tensor(plane.normal)

        def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            last = activation[:, -1].to(exact)
            norms = last.norm(dim=1)
            excess = (last @ normal * plane.slope + plane.offset - goals) / plane.slope
            length = torch.where(until, excess.clamp(min=0), budgets * norms)
            shifts[index] = length
            record.relative += (length / norms.clamp(min=1e-12)).cpu().numpy() / n_layers
            moved = activation.clone()
            moved[:, -1] = (last + length[:, None] * away).to(activation.dtype)
            return moved

        return hook

    def read_at(index: int) -> Any:
        plane = attacker.planes[index]
        normal = tensor(plane.normal)

        def hook(activation: torch.Tensor, hook: Any) -> None:
            found = torch.sigmoid(activation[:, -1].to(exact) @ normal * plane.slope + plane.offset)
            error = torch.where(until & (shifts[index] > 0), (found - reached).abs(), torch.zeros_like(found))
            np.maximum(record.worst, error.cpu().numpy(), out=record.worst)
            np.maximum(record.highest, found.cpu().numpy(), out=record.highest)
            if record.steps == 0:
                record.probability += found.cpu().numpy() / n_layers
            if index == n_layers - 1:
                record.steps += 1

        return hook

    hooks = []
    for index, layer in enumerate(attacker.layers):
        name = f"blocks.{layer}.hook_out"
        hooks += [(name, steer_at(index)), (name, read_at(index))]
    with bridge.hooks(fwd_hooks=hooks):
        yield record
    record.relative /= max(record.steps, 1)
