"""A safetensors file of embeddings that is laid out first and then filled, layer by layer.

So arrays larger than memory go to their places in the file as they are computed; safetensors' own writers want all of
them in memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.core.files import writing

if TYPE_CHECKING:
    from jaxtyping import Float

STORED_DTYPES = {"F16": "float16", "F32": "float32"}
_PREFIX_BYTES = 8  # of the header's length
_HALF_BELOW = 3e4  # float16 ends at 65504


def fits_half(embeddings: Float[np.ndarray, "..."]) -> bool:
    """Whether float16 holds every value with room to spare; NaN does not fit."""
    return float(np.abs(embeddings).max(initial=0)) < _HALF_BELOW


def lay_out(
    path: Path, positions: Sequence[str], shape: tuple[int, int, int], dtype: str = "float32"
) -> dict[str, Float[np.ndarray, "layer prompt d_model"]]:
    """Arrays of zeros in a new safetensors file, one for each position, mapped for writing.

    Each is `[layer, prompt, d_model]`, in `float32` or `float16`. Raises `MachineError`.
    """
    text = _header(positions, shape, dtype)
    begin = _PREFIX_BYTES + len(text)
    size = np.dtype(dtype).itemsize * math.prod(shape)
    with writing(path):
        with path.open("xb") as file:
            file.write(len(text).to_bytes(_PREFIX_BYTES, "little") + text)
            file.flush()
            if hasattr(os, "posix_fallocate"):  # a mapped file that meets a full disk later would kill the process
                os.posix_fallocate(file.fileno(), begin, size * len(positions))
            else:
                file.truncate(begin + size * len(positions))
        return _mapped(path, begin, positions, shape, dtype)


def narrow(path: Path) -> None:
    """Turn the float32 arrays of a laid-out file into float16, in place."""
    header = read_header(path)
    positions = list(header)
    shape = tuple(header[positions[0]]["shape"])
    with path.open("rb") as file:
        begin = _PREFIX_BYTES + int.from_bytes(file.read(_PREFIX_BYTES), "little")
    whole = _mapped(path, begin, positions, shape, "float32")
    halves = _mapped(path, begin, positions, shape, "float16")
    for position in positions:
        for l, layer in enumerate(whole[position]):
            halves[position][l] = layer.astype(np.float16)  # a copy, since source and destination overlap
            release_pages(halves[position])
            release_pages(whole[position])
    end = begin + sum(half.nbytes for half in halves.values())
    del whole, halves, layer
    text = _header(positions, shape, "float16").ljust(begin - _PREFIX_BYTES)
    with path.open("r+b") as file:
        file.seek(_PREFIX_BYTES)
        file.write(text)
        file.truncate(end)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a laid-out file: an entry for each array, in order."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(_PREFIX_BYTES), "little")))
    return header


def layers_of(array: Float[np.ndarray, "layer prompt d_model"]) -> Iterator[Float[np.ndarray, "prompt d_model"]]:
    """The layers, of which only the current one stays in memory when the array is mapped."""
    for layer in array:
        yield layer
        release_pages(array)


def release_pages(array: np.ndarray) -> None:
    """Release the pages of a mapped file, so that they no longer count as this process's memory."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def shape_and_dtype(arrays: Mapping[str, np.ndarray]) -> tuple[tuple[int, int, int], str]:
    """The shape and dtype of all arrays of a set. Raises `ValueError` where they differ or do not fit a set."""
    kinds = {(array.shape, array.dtype.name) for array in arrays.values()}
    if len(kinds) != 1:
        raise ValueError(f"Arrays of one shape and dtype are needed, not {sorted(kinds)}.")
    (shape, dtype) = kinds.pop()
    if len(shape) != 3 or dtype not in STORED_DTYPES.values():
        raise ValueError(f"[layer, prompt, d_model] in float16 or float32 is needed, not {shape} in {dtype}.")
    return shape, dtype


def _header(positions: Sequence[str], shape: Sequence[int], dtype: str) -> bytes:
    kind = next(kind for kind, name in STORED_DTYPES.items() if name == dtype)
    size = np.dtype(dtype).itemsize * math.prod(shape)
    entries = {
        position: {"dtype": kind, "shape": list(shape), "data_offsets": [size * place, size * (place + 1)]}
        for place, position in enumerate(positions)
    }
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % _PREFIX_BYTES)


def _mapped(
    path: Path, begin: int, positions: Sequence[str], shape: tuple[int, ...], dtype: str
) -> dict[str, Float[np.ndarray, "layer prompt d_model"]]:
    size = np.dtype(dtype).itemsize * math.prod(shape)
    return {
        position: np.memmap(path, dtype=dtype, mode="r+", offset=begin + size * place, shape=shape)
        for place, position in enumerate(positions)
    }
