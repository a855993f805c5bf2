"""The state of a fine-tune, and its checkpoint: one safetensors file, replaced by one rename, so whole or absent.

The rest of the state is JSON in its header, with a digest: a flipped bit in an optimizer's state would quietly train
another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from es2.core.errors import InputError, one_line
from es2.core.former import todays_names
from es2.models.tensors import load_tensors, save_tensors
from es2.training.validation import ValidationPoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass
class State:
    """Everything that a step changes: what a checkpoint has to hold.

    Attributes:
        trained: the trained weights by name.
        best: their values at the best step so far.
        optimizer: AdamW over `trained`.
        directions: the running mean-difference direction of every target layer.
        losses: of every step that was taken.
        validations: the first is the base's.
    """

    trained: dict[str, torch.nn.Parameter]
    best: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    directions: Tensor
    losses: list[float]
    validations: list[ValidationPoint]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return len(self.losses)

    def save(self, path: Path, identity: str) -> None:
        """Write the checkpoint of a run with this identity; raises `MachineError`."""
        tensors = {"directions": self.directions}
        tensors |= {f"trained/{name}": weight for name, weight in self.trained.items()}
        tensors |= {f"best/{name}": weight for name, weight in self.best.items()}
        for name, weight in self.trained.items():
            tensors |= {f"optimizer/{key}/{name}": moment for key, moment in self.optimizer.state[weight].items()}
        validations = [point.to_dict() for point in self.validations]
        progress = {"step": self.step, "losses": self.losses, "validations": validations}
        save_tensors(path, tensors, {"identity": identity, "progress": progress})

    def load(self, path: Path, identity: str) -> None:
        """Restore what `save` wrote.

        Raises:
            InputError: when the file is damaged, or of a run with another config or other prompts.
        """
        tensors, document = load_tensors(path)
        if document.get("identity") != identity:
            raise InputError(f"The checkpoint {str(path)!r} is of another config or other prompts; start a new run.")
        if missing := [name for name in self.trained if f"trained/{name}" not in tensors]:
            raise InputError(f"The checkpoint {str(path)!r} has no weights {missing[0]}; start a new run.")
        try:
            progress = todays_names(document["progress"])
            self.losses = list(progress["losses"])
            self.validations = [ValidationPoint.from_dict(point) for point in progress["validations"]]
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
