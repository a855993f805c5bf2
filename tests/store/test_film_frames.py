"""Frames of a film are whole or absent, one a step, and damage costs a frame and nothing else."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from es2.core.errors import InputError, MachineError
from es2.core.files import DamagedError
from es2.prompts.prompt_set import HARMFUL, HARMLESS
from es2.store import film
from es2.store.film import cut_film, read_film, text_hash, texts_by_hash, write_frame
from tests.builders import tiny_prompts

TEXTS = ("Force the lock.", "Oil the lock.", "Pick it.")
LABELS = np.array([HARMFUL, HARMLESS, HARMFUL], dtype=np.int8)


def write(folder: Path, step: int, *, largest: float = 1.0, **changes: object) -> np.ndarray:
    """Write a frame of two layers; returns its embeddings."""
    embeddings = np.random.default_rng(step).normal(size=(2, 3, 8)).astype(np.float32)
    embeddings *= largest / np.abs(embeddings).max()
    about = {"layers": (3, 5), "labels": LABELS, "texts": TEXTS, "numbers": {"margin": 0.5, "kl_prompt": float("nan")}}
    write_frame(folder, step, embeddings, **about | changes)  # type: ignore[arg-type]
    return embeddings


def test_what_was_written_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "film"
    written = {step: write(folder, step) for step in (8, 0, 16)}
    frames = read_film(folder)
    assert [frame.step for frame in frames] == [0, 8, 16]
    for frame in frames:
        np.testing.assert_allclose(frame.embeddings(), written[frame.step], rtol=1e-3, atol=1e-4)
        assert frame.embeddings().dtype == np.float32
        assert (frame.layers, frame.labels) == ((3, 5), tuple(LABELS.tolist()))
        assert frame.numbers == {"margin": 0.5}, "what is no number is not kept"
        assert frame.prompts == tuple(map(text_hash, TEXTS))
    assert [path.name for path in sorted(folder.iterdir())] == [f"{step:08d}.safetensors" for step in (0, 8, 16)]


@pytest.mark.parametrize(("largest", "dtype"), [(2e4, np.float16), (4e4, np.float32), (np.nan, np.float32)])
def test_half_precision_unless_values_are_too_large(largest: float, dtype: type, tmp_path: Path) -> None:
    written = write(tmp_path, 0, largest=largest)
    kept = safetensors.numpy.load_file(tmp_path / "00000000.safetensors")["embeddings"]
    assert kept.dtype == dtype
    np.testing.assert_allclose(kept, written, rtol=1e-3, atol=1e-2)


def test_a_step_that_is_done_again_replaces_its_frame(tmp_path: Path) -> None:
    write(tmp_path, 8)
    again = write(tmp_path, 8, largest=5.0)
    (frame,) = read_film(tmp_path)
    np.testing.assert_allclose(frame.embeddings(), again, rtol=1e-3, atol=1e-2)


def test_a_cut_takes_later_frames_and_what_a_killed_writer_left(tmp_path: Path) -> None:
    for step in (0, 8, 16):
        write(tmp_path, step)
    (tmp_path / ".tmp-00000016.safetensors-dead").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    cut_film(tmp_path, after=8)
    assert {path.name for path in tmp_path.iterdir()} == {"00000000.safetensors", "00000008.safetensors", "notes.txt"}
    cut_film(tmp_path / "absent", after=0)


def test_no_film_is_no_error(tmp_path: Path) -> None:
    assert read_film(tmp_path / "film") == []


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"not safetensors at all", None])
def test_a_damaged_frame_is_left_out_with_a_warning(
    content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 0)
    write(tmp_path, 8)
    path = tmp_path / "00000008.safetensors"
    path.write_bytes(path.read_bytes()[:-5] if content is None else content)
    assert [frame.step for frame in read_film(tmp_path)] == [0]
    assert "00000008.safetensors" in caplog.text


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, 0)
    path = tmp_path / "00000000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    (frame,) = read_film(tmp_path)
    with pytest.raises(DamagedError, match="digest"):
        frame.embeddings()


@pytest.mark.parametrize(
    "changes", [{"texts": (*TEXTS[:2], "Another.")}, {"layers": (3, 6)}, {"labels": 1 - LABELS}, {"layers": (3,)}]
)
def test_frames_of_other_prompts_or_layers_do_not_mix(changes: dict, tmp_path: Path) -> None:
    write(tmp_path, 0)
    write(tmp_path, 8, **changes)
    assert [frame.step for frame in read_film(tmp_path)] == [0]


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(film, "FORMAT_VERSION", 2)
    write(tmp_path, 0)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"00000000\.safetensors was written by a newer ES2 Workbench"):
        read_film(tmp_path)


def test_a_full_disk_is_a_sentence_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 0)

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(film, "write_bytes", full)
    with pytest.raises(MachineError, match="No space is left"):
        write(tmp_path, 8)
    assert [frame.step for frame in read_film(tmp_path)] == [0]


def test_texts_are_found_by_their_hash() -> None:
    prompts = tiny_prompts(3)
    found = texts_by_hash(prompts)
    assert [found[text_hash(text)] for text in prompts.texts] == list(prompts.texts)
