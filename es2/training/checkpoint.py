"""What a fine-tune has changed so far, and how it survives a kill: one file that is whole or absent.

A checkpoint is a single safetensors file: tensors under their names, everything else as JSON in the file's own header.
One file can be replaced by one rename, so a run that is killed while it writes keeps the checkpoint before; and nothing
has to be unpickled to go on. The header carries a digest of all of it, since safetensors has none and a flipped bit in
an optimizer's state would quietly train another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError, one_line
from es2.models.tensors import load_tensors, save_tensors
from es2.training.validation import WatchPoint, reason_to_stop

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass
class Progress:
    """How far a fine-tune has come.

    Attributes:
        kl_weight: λ as it is now; it doubles while the KL is over its budget.
        step: optimizer steps taken.
        times_over: measurements in a row, up to the latest, that were over the KL budget.
        best_step: the step with the highest score within the budget; 0 is the base.
        reason: why it must not go on, if it must not.
        losses: of every step.
        watched: every measurement on `watch`; the first is the base's.
    """

    kl_weight: float
    step: int = 0
    times_over: int = 0
    best_step: int = 0
    reason: str | None = None
    losses: list[float] = field(default_factory=list)
    watched: list[WatchPoint] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"watched": [point.to_dict() for point in self.watched]}

    def restore(self, document: Mapping[str, Any]) -> None:
        """Become what `to_dict` wrote."""
        vars(self).update({**document, "watched": [WatchPoint.from_dict(point) for point in document["watched"]]})

    def judge(self, point: WatchPoint, kl_budget: float) -> None:
        """Take note of a measurement: is it the best so far, has the run to back off, or to stop?

        Over the KL budget the run backs off: the KL counts double from there on. The best step is the one of the
        highest score within the budget, and a collapsed one is never it.
        """
        is_over = not point.kl <= kl_budget  # NaN is over, too
        self.times_over = self.times_over + 1 if is_over else 0
        self.reason = reason_to_stop(point, self.watched[0], kl_budget, self.times_over)
        best = next(known for known in self.watched if known.step == self.best_step)
        if is_over:
            self.kl_weight *= 2
        elif self.reason is None and point.score > best.score:
            self.best_step = point.step
        self.watched.append(point)


@dataclass
class State:
    """Everything that a step changes: what a checkpoint has to hold.

    Attributes:
        progress: how far the fine-tune has come.
        trained: the trained weights by name.
        best: what they were at `progress.best_step`.
        optimizer: AdamW over `trained`.
        directions: the running mean-difference direction of every target layer.
    """

    progress: Progress
    trained: dict[str, torch.nn.Parameter]
    best: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    directions: Tensor

    def save(self, path: Path, identity: str) -> None:
        """Write the checkpoint of a run with this identity; raises `MachineError`."""
        tensors = {"directions": self.directions}
        tensors |= {f"trained/{name}": weight for name, weight in self.trained.items()}
        tensors |= {f"best/{name}": weight for name, weight in self.best.items()}
        for name, weight in self.trained.items():
            tensors |= {f"optimizer/{key}/{name}": moment for key, moment in self.optimizer.state[weight].items()}
        save_tensors(path, tensors, {"identity": identity, "progress": self.progress.to_dict()})

    def load(self, path: Path, identity: str) -> None:
        """Take over what `save` wrote.

        Raises:
            InputError: when the file is damaged, or of a run with another config or other prompts.
        """
        tensors, document = load_tensors(path)
        if document.get("identity") != identity:
            raise InputError(f"The checkpoint {str(path)!r} is of another config or other prompts; start a new run.")
        if missing := [name for name in self.trained if f"trained/{name}" not in tensors]:
            raise InputError(f"The checkpoint {str(path)!r} has no weights {missing[0]}; start a new run.")
        try:
            self.progress.restore(document["progress"])
            self.directions.copy_(tensors["directions"])
            self.best = {name: tensors[f"best/{name}"] for name in self.trained}
            assign(self.trained, {name: tensors[f"trained/{name}"] for name in self.trained})
            for name, weight in self.trained.items():
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    moment = tensors[f"optimizer/{key}/{name}"]
                    self.optimizer.state[weight][key] = moment if key == "step" else moment.to(weight.device)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"The checkpoint {str(path)!r} lacks a part ({one_line(repr(error))}); start a new run."
            ) from error


def copies(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as they are now, on the CPU."""
    return {name: weight.detach().to("cpu", copy=True) for name, weight in trained.items()}


def assign(trained: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Set weights to values of the same names."""
    for name, weight in trained.items():
        weight.data.copy_(values[name])
