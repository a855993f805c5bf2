"""Torch tensors in safetensors files, whole or absent, each with a format version and a digest of its content."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import MachineError, one_line
from es2.core.files import DamagedError, give_usual_mode, machine_error, numbered, parse_json, unreadable
from es2.core.versions import format_of

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and a JSON document as one safetensors file, atomically.

    Raises:
        MachineError: when the disk refuses; the former file is still there.
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
        give_usual_mode(temporary)
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
        path.open("rb").close()  # safetensors distinguishes a missing permission from damage by its text alone
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


CHECKPOINT_FORMAT = 1
