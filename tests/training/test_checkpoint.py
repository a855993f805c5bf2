"""A checkpoint is whole or absent, and damage is noticed."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from es2.core.errors import InputError, MachineError
from es2.models.tensors import load_tensors, save_tensors

TENSORS = {
    "weights": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "step": torch.tensor(7.0),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}
STATE = {"step": 7, "losses": [0.1, -2.5], "reason": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint" / "state.safetensors"
    save_tensors(path, TENSORS, STATE)
    return path


def test_what_was_saved_is_loaded(path: Path) -> None:
    tensors, state = load_tensors(path)
    assert state == STATE
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert [entry.name for entry in path.parent.iterdir()] == ["state.safetensors"]


def test_plain_safetensors_reads_it(path: Path) -> None:
    assert torch.equal(safetensors.torch.load_file(path)["weights"], TENSORS["weights"])


@pytest.mark.parametrize("place", [0.02, 0.5, 0.999])
def test_a_flipped_bit_is_noticed(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"state\.safetensors' is damaged"):
        load_tensors(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"not safetensors at all", None])
def test_what_is_no_checkpoint_is_refused(path: Path, content: bytes | None) -> None:
    path.write_bytes(path.read_bytes()[:-5] if content is None else content)
    with pytest.raises(InputError) as error:
        load_tensors(path)
    assert "\n" not in str(error.value)


def test_safetensors_of_somebody_else_is_refused(path: Path) -> None:
    safetensors.torch.save_file(TENSORS | {"turned": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="damaged"):
        load_tensors(path)


def test_a_newer_format_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("es2.models.tensors.CHECKPOINT_FORMAT", 2)
    save_tensors(path, TENSORS, STATE)
    monkeypatch.undo()
    with pytest.raises(InputError, match="newer ES2 Workbench"):
        load_tensors(path)


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), safetensors.SafetensorError("I/O error: No space left (os 28)")],
)
def test_a_full_disk_leaves_what_was_there(path: Path, failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half a checkpoint")
        raise failure

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(MachineError, match="No space is left"):
        save_tensors(path, TENSORS, {**STATE, "step": 8})
    assert load_tensors(path)[1]["step"] == 7
    assert [entry.name for entry in path.parent.iterdir()] == ["state.safetensors"]


def test_what_a_killed_writer_left_is_swept(path: Path) -> None:
    (path.parent / ".tmp-state.safetensors-dead").write_bytes(b"half")
    save_tensors(path, TENSORS, STATE)
    assert [entry.name for entry in path.parent.iterdir()] == ["state.safetensors"]


def test_no_number_is_never_saved(path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save_tensors(path, TENSORS, {"loss": float("nan")})
