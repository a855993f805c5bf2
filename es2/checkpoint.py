"""What a fine-tune has changed so far, and how it survives a kill: one file that is whole or absent.

A checkpoint is a single safetensors file: tensors under their names, everything else as JSON in the file's own header.
One file can be replaced by one rename, so a run that is killed while it writes keeps the checkpoint before; and nothing
has to be unpickled to go on. The header carries a digest of all of it, since safetensors has none and a flipped bit in
an optimizer's state would quietly train another model.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.errors import InputError, MachineError, one_line
from es2.files import DamagedError, machine_error, numbered, parse_json, unreadable
from es2.versions import format_of
from es2.watch import WatchPoint, reason_to_stop

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHECKPOINT_FORMAT = 1


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


def save_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and a JSON document as one safetensors file, atomically.

    Raises:
        MachineError: when the disk refuses; what stood there before still stands.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    document = json.dumps(dict(state), sort_keys=True, allow_nan=False)
    header = {"format": str(CHECKPOINT_FORMAT), "state": document, "digest": _digest(kept, document)}
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".tmp-{path.name}-*"):
            stale.unlink(missing_ok=True)  # what a killed run left behind
        save_file(kept, temporary, metadata=header)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise disk_refused(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        InputError: when the file is damaged or cut short (`DamagedError`), or of a newer format.
        MachineError: when it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    damaged = f"The file {str(path)!r} is damaged"
    try:
        path.open("rb").close()  # safetensors tells a missing permission from damage by its text alone
    except OSError as error:
        raise unreadable(error, path) from error
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        format_of(int(header["format"]), CHECKPOINT_FORMAT, str(path))
        document = header["state"]
        if header["digest"] != _digest(tensors, document):
            raise DamagedError(f"{damaged} (its digest does not match); start the run again.")
        state = parse_json(document)
        if not isinstance(state, dict):
            raise ValueError("its state is no object")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DamagedError(f"{damaged} ({one_line(error)}); start the run again.") from error
    return tensors, state


def _digest(tensors: Mapping[str, Tensor], document: str) -> str:
    import torch

    digest = hashlib.blake2b(document.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def disk_refused(error: Exception, path: Path) -> MachineError:
    """The sentence for a write that failed; safetensors leaves the error's number out when the disk is full."""
    return machine_error(numbered(error, path.parent), path)
