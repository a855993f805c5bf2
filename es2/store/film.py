"""The film of a fine-tune: what some `validation` prompts' embeddings were at every validation, a file for each.

A file is written under another name and renamed, so it is whole or absent; its step is its name, so a step that is done
again replaces its frame. Texts stay in the prompt set; a frame knows its prompts by their hashes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from es2.core.errors import one_line
from es2.core.files import DamagedError, parse_json, unreadable, write_bytes, writing
from es2.core.versions import format_of
from es2.prompts.prompt_set import LABEL_NAMES, PromptSet, stable_hash
from es2.store.embeddings import fits_half

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int

logger = logging.getLogger(__name__)


FILM = "film"
"""The folder in that of a run."""
FORMAT_VERSION = 1

_SUFFIX = ".safetensors"
_EMBEDDINGS = "embeddings"


@dataclass(frozen=True)
class FilmFrame:
    """One validation of a film; cheap to make, since only the header of its file is read.

    Attributes:
        path: its file.
        step: number of optimizer steps; 0 is the base model.
        layers: the target layers.
        labels: of the prompts.
        prompts: `text_hash` of each prompt.
        numbers: what the validation measured, by name; without what was no finite number.
    """

    path: Path
    step: int
    layers: tuple[int, ...]
    labels: tuple[int, ...]
    prompts: tuple[str, ...]
    numbers: dict[str, float]

    def embeddings(self) -> Float32[np.ndarray, "layer prompt d_model"]:
        """The embeddings at position `last`.

        Raises:
            DamagedError: when the file is not what was written, or gone.
            MachineError: when it cannot be read.
        """
        _, header, array = _read(self.path)
        if header["digest"] != _digest(array, header["about"]):
            raise _damaged(self.path, "its digest does not match")
        return array.astype(np.float32)


def text_hash(text: str) -> str:
    """What a frame knows a prompt by."""
    return f"{stable_hash(text):016x}"


def texts_by_hash(prompts: PromptSet) -> dict[str, str]:
    """The texts of a prompt set by `text_hash`."""
    return {text_hash(text): text for text in prompts.texts}


def write_frame(
    folder: Path,
    step: int,
    embeddings: Float[np.ndarray, "layer prompt d_model"],
    *,
    layers: Sequence[int],
    labels: Int[np.ndarray, "prompt"],
    texts: Sequence[str],
    numbers: Mapping[str, float | None],
) -> None:
    """Write one validation, in place of a former one of the same step. Raises `MachineError`."""
    from safetensors.numpy import save

    array = np.ascontiguousarray(embeddings, dtype=np.float16 if fits_half(embeddings) else np.float32)
    finite = {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}
    about = json.dumps(
        {
            "step": step,
            "layers": list(layers),
            "labels": labels.tolist(),
            "prompts": [text_hash(text) for text in texts],
            "numbers": finite,
        }
    )
    header = {"format": str(FORMAT_VERSION), "about": about, "digest": _digest(array, about)}
    path = folder / f"{step:08d}{_SUFFIX}"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save({_EMBEDDINGS: array}, header))


def cut_film(folder: Path, after: int) -> None:
    """Remove the frames of steps beyond `after`, and what a killed writer left. Raises `MachineError`."""
    for path in folder.glob(f"*{_SUFFIX}*"):
        if path.name.startswith(".tmp-") or (_step_of(path) or 0) > after:
            with writing(path):
                path.unlink(missing_ok=True)


def frame_files(folder: Path) -> list[Path]:
    """The files of a film's frames by step, damaged ones too; empty where there is none."""
    return sorted(path for path in folder.glob(f"*{_SUFFIX}") if _step_of(path) is not None)


def read_film(folder: Path) -> list[FilmFrame]:
    """The frames of a film by step; empty where there is none.

    Damaged ones, and those of other prompts or layers than the first, are left out with a warning.

    Raises:
        InputError: for a frame of a newer format.
        MachineError: when a frame cannot be read.
    """
    frames: list[FilmFrame] = []
    for path in frame_files(folder):
        try:
            frame = _frame(path)
        except DamagedError as error:
            logger.warning("%s", error)
            continue
        first = frames[0] if frames else frame
        if (frame.layers, frame.labels, frame.prompts) == (first.layers, first.labels, first.prompts):
            frames.append(frame)
        else:
            logger.warning("%s", _damaged(path, "it is of other prompts than the first"))
    return frames


def _step_of(path: Path) -> int | None:
    """The step that a frame's name states; None for other files."""
    name = path.name.removesuffix(_SUFFIX)
    return int(name) if name.isascii() and name.isdecimal() and len(name) <= 18 else None


def _frame(path: Path) -> FilmFrame:
    about, _, array = _read(path, headers_only=True)
    try:
        labels = tuple(map(int, about["labels"]))
        prompts = tuple(map(str, about["prompts"]))
        frame = FilmFrame(
            path=path,
            step=int(about["step"]),
            layers=tuple(map(int, about["layers"])),
            labels=labels,
            prompts=prompts,
            numbers={str(name): float(value) for name, value in about["numbers"].items()},
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(path, one_line(repr(error))) from error
    sound = array.shape[:2] == (len(frame.layers), len(prompts)) and len(labels) == len(prompts)
    if not sound or frame.step != _step_of(path) or set(labels) != set(LABEL_NAMES):
        raise _damaged(path, "its entries do not fit together")
    return frame


def _read(path: Path, headers_only: bool = False) -> tuple[dict[str, Any], dict[str, str], np.ndarray]:
    """What a file says of itself, its header and its array, which is empty of the same shape for `headers_only`."""
    try:
        path.open("rb").close()  # safetensors distinguishes a missing permission from damage by its text alone
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if format_of(int(header["format"]), FORMAT_VERSION, str(path)) is None:
                raise ValueError("no format version")
            about = parse_json(header["about"])
            kept = file.get_slice(_EMBEDDINGS)
            shape, kind = tuple(kept.get_shape()), kept.get_dtype()
            if len(shape) != 3 or kind not in ("F16", "F32") or not isinstance(about, dict) or "digest" not in header:
                raise ValueError("not what was written")
            array = np.broadcast_to(np.float32(0), shape) if headers_only else file.get_tensor(_EMBEDDINGS)
    except (FileNotFoundError, SafetensorError, LookupError, ValueError, TypeError) as error:
        raise _damaged(path, one_line(error)) from error
    except OSError as error:
        raise unreadable(error, path) from error
    return about, header, array


def _digest(array: np.ndarray, about: str) -> str:
    digest = hashlib.blake2b(f"{array.dtype.name}{array.shape}{about}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _damaged(path: Path, problem: str) -> DamagedError:
    return DamagedError(f"The frame {path.name} of the film in {path.parent} is damaged ({problem}) and left out.")
