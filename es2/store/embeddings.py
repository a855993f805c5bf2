"""A safetensors file of embeddings that is laid out first and then written into, layer by layer, where it lies.

The header says where each array begins, so what is computed can go to its place in the file at once and needs no room
in memory, and no second file. No torch, and none of safetensors' own writers: they want all of it in memory.
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

from es2.core.files import machine_error

if TYPE_CHECKING:
    from jaxtyping import Float

STORED_DTYPES = {"F16": "float16", "F32": "float32"}
_PREFIX_BYTES = 8  # of the header's length


def lay_out(
    path: Path, positions: Sequence[str], shape: tuple[int, int, int], dtype: str = "float32"
) -> dict[str, Float[np.ndarray, "layer prompt d_model"]]:
    """Zeros on disk for the embeddings of every position, mapped for writing.

    Args:
        path: of a safetensors file to be made, whose bytes they are.
        positions: names of the arrays.
        shape: `[layer, prompt, d_model]` of each.
        dtype: `float32` or `float16`.

    Raises:
        MachineError: when the disk is full or refuses.
    """
    text = _header(positions, shape, dtype)
    begin = _PREFIX_BYTES + len(text)
    size = np.dtype(dtype).itemsize * math.prod(shape)
    try:
        with path.open("xb") as file:
            file.write(len(text).to_bytes(_PREFIX_BYTES, "little") + text)
            file.flush()
            if hasattr(os, "posix_fallocate"):  # a mapped file that meets a full disk later would kill the process
                os.posix_fallocate(file.fileno(), begin, size * len(positions))
            else:
                file.truncate(begin + size * len(positions))
        return _mapped(path, begin, positions, shape, dtype)
    except OSError as error:
        raise machine_error(error, path) from error


def narrow(path: Path) -> None:
    """Make the float32 arrays of a file that was laid out float16, where they lie."""
    header = read_header(path)
    positions = list(header)
    shape = tuple(header[positions[0]]["shape"])
    with path.open("rb") as file:
        begin = _PREFIX_BYTES + int.from_bytes(file.read(_PREFIX_BYTES), "little")
    whole = _mapped(path, begin, positions, shape, "float32")
    halves = _mapped(path, begin, positions, shape, "float16")
    for position in positions:
        for l, layer in enumerate(whole[position]):
            halves[position][l] = layer.astype(np.float16)  # a copy: its place overlaps with where it comes from
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
    """What a file that was laid out says of its arrays, in their order."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(_PREFIX_BYTES), "little")))
    return header


def layers_of(array: Float[np.ndarray, "layer prompt d_model"]) -> Iterator[Float[np.ndarray, "prompt d_model"]]:
    """One layer after the other, of which only the current one is held where they lie on disk."""
    for layer in array:
        yield layer
        release_pages(array)


def release_pages(array: np.ndarray) -> None:
    """What was read from a mapped file, or written to it, is the disk's and counts as this process's memory no more."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def shape_and_dtype(arrays: Mapping[str, np.ndarray]) -> tuple[tuple[int, int, int], str]:
    """What all arrays of a set have in common; raises `ValueError` where they do not fit each other or a set."""
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
