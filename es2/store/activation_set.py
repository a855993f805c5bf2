"""One activation set: embeddings on disk, memory-mapped and checked against their digests before they are used."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from es2.core.errors import Es2Error, InputError
from es2.core.files import (
    checked_key,
    file_digest,
    files_below,
    is_shipped,
    new_folder,
    quarantine,
    read_json,
    unreadable,
    verify_checksum,
    with_checksum,
    write_json,
)
from es2.core.versions import format_of
from es2.store.embeddings import STORED_DTYPES
from es2.store.sources import CHAT_TEMPLATE, LENS, OWN_HOOKS, PLAIN_TEXT

if TYPE_CHECKING:
    from jaxtyping import Float32

logger = logging.getLogger(__name__)


FORMAT_VERSION = 1

META, ACTIVATIONS, TEXTS, DIGESTS = "meta.json", "activations.safetensors", "texts.parquet", "digests.json"


class _UnsoundError(Exception):
    """A problem with an artifact, before the decision whether to set it aside."""


@dataclass(frozen=True)
class ActivationSet:
    """Embeddings of a prompt set under one model, on disk; cheap to make, since only `meta.json` is read.

    Attributes:
        key: the name of its folder, a hash of everything that decided its numbers.
        path: its folder.
        meta: the content of `meta.json`; unknown entries are kept.
        inode: the folder's identity when it was read, which a successor of the same name does not share.
        model: the model's display name.
        positions: the captured token positions.
        n_layers, n_prompts, d_model: sizes; prompts are in the order of `texts`.
        texts_digest: `PromptSet.texts_digest` of the prompts.
        created: when it was written, in ISO 8601 and UTC; empty if not recorded.
    """

    key: str
    path: Path
    meta: dict[str, Any] = field(compare=False, repr=False)
    inode: int = field(compare=False, repr=False)
    model: str = field(compare=False)
    positions: tuple[str, ...] = field(compare=False)
    n_layers: int = field(compare=False)
    n_prompts: int = field(compare=False)
    d_model: int = field(compare=False)
    texts_digest: str = field(compare=False)
    created: str = field(compare=False)

    @property
    def models(self) -> tuple[str, ...]:
        """Every name under which this model was captured, `model` first: equal weights may be in two places."""
        return (self.model, *(name for name in self.meta.get("aliases") or () if isinstance(name, str)))

    @property
    def run(self) -> str | None:
        """The fine-tuning run whose adapter was on; None for the base model."""
        return self.meta.get("run")

    @property
    def runs(self) -> tuple[str | None, ...]:
        """Every run whose adapter is this one, `run` first: two equal fine-tunes leave equal weights."""
        return (self.run, *(id for id in self.meta.get("other_runs") or () if isinstance(id, str)))

    @property
    def rendering(self) -> dict[str, Any]:
        """How the model was given the prompts: `settings`, the system prompt, the words around a text, and where `last`
        lies; empty for sets of before this was written down."""
        return dict(self.meta.get("rendering") or {})

    @property
    def renderings(self) -> tuple[dict[str, Any], ...]:
        """Every rendering (`Rendering.to_dict()`) that was asked for and gave the model these tokens."""
        return (self.rendering.get("settings", {}), *self.meta.get("other_renderings", ()))

    @property
    def hooks(self) -> str:
        """Whose hooks read it: `LENS` or `OWN_HOOKS`."""
        return OWN_HOOKS if self.meta.get("hooks") == OWN_HOOKS else LENS

    @property
    def given_as(self) -> str:
        """How the model was given the prompts: `CHAT_TEMPLATE` or `PLAIN_TEXT`."""
        return PLAIN_TEXT if self.meta.get("templated") is False else CHAT_TEMPLATE

    @property
    def whole(self) -> str:
        """The key of the set that this one is a part of, or its own key. All numbers are computed from the whole."""
        return str(self.meta.get("part_of", self.key))

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The prompts, in the order of the embeddings. Raises as `check` does."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.check()
        try:
            data = (self.path / TEXTS).read_bytes()
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            texts = tuple(pq.read_table(pa.BufferReader(data), columns=["text"])["text"].to_pylist())
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            raise quarantine(self.path, self.inode, f"{TEXTS}: {error}") from error
        if len(texts) != self.n_prompts:
            raise quarantine(self.path, self.inode, f"{len(texts)} texts for {self.n_prompts} prompts")
        return texts

    def layer(self, l: int, position: str = "last") -> Float32[np.ndarray, "prompt d_model"]:
        """The float32 embeddings of layer `0 ≤ l < n_layers`, read in one contiguous piece.

        Raises:
            InputError: for a layer or position that is not there, and as `check` does.
        """
        if not 0 <= l < self.n_layers:
            raise InputError(f"Layer {l} is out of range: {self.model} has layers 0 to {self.n_layers - 1}.")
        if position not in self.positions:
            raise InputError(
                f"Position {position!r} was not captured for {self.model} (only {', '.join(self.positions)}); "
                f"capture it with --position {position}."
            )
        self.check()
        try:
            with safe_open(self.path / ACTIVATIONS, framework="numpy") as file:
                return np.asarray(file.get_slice(position)[l], dtype=np.float32)
        except SafetensorError as error:
            raise quarantine(self.path, self.inode, str(error)) from error
        except OSError as error:
            raise self._unreadable(error) from error

    def check(self) -> None:
        """Compare the files with their digests and the header with `meta.json`, once per object.

        Raises:
            DamagedError: when they differ; the folder has then been set aside.
            InputError: when the folder is gone.
            MachineError: when it cannot be read.
        """
        _ = self._checked

    @cached_property
    def _checked(self) -> bool:
        try:
            self._compare()
        except OSError as error:
            raise self._unreadable(error) from error
        except (_UnsoundError, SafetensorError) as error:
            raise quarantine(self.path, self.inode, str(error)) from error
        return True

    def _compare(self) -> None:
        for name in (ACTIVATIONS, TEXTS):
            path = self.path / name
            if self.path.exists() and not path.is_file():
                raise _UnsoundError(f"{name} is missing")
            if file_digest(path) != self.meta["files"].get(name):
                raise _UnsoundError(f"{name} is not what was written")
        shape = [self.n_layers, self.n_prompts, self.d_model]
        with safe_open(self.path / ACTIVATIONS, framework="numpy") as file:
            for position in self.positions:
                tensor = file.get_slice(position)
                if tensor.get_shape() != shape or tensor.get_dtype() not in STORED_DTYPES:
                    raise _UnsoundError(f"{position} is {tensor.get_dtype()} {tensor.get_shape()}, not {shape}")

    def _unreadable(self, error: OSError) -> Es2Error:
        return unreadable(error, self.path) if self.path.is_dir() else self._removed()

    def _removed(self) -> InputError:
        return InputError(f"The activation set {self.key} was removed; capture it again.")

    def derived(self, key: str) -> Path | None:
        """The folder of what was computed from this set under `key`; None if absent, or damaged (then set aside).

        Raises:
            InputError: for an impossible key, a folder of a newer version, or a damaged shipped one (`DamagedError`).
        """
        path = self.path / "derived" / checked_key(key)
        try:
            inode = path.stat().st_ino
        except OSError:
            return None
        document = read_json(path / DIGESTS) or {}
        try:
            if not verify_checksum(document):
                raise _UnsoundError(f"{DIGESTS} is not what was written")
            _check_format(document.get("format"), path)
            found, stated = _digests(path), document.get("files")
            if not isinstance(stated, dict):
                raise _UnsoundError(f"{DIGESTS} is missing or lacks an entry")
            for name in sorted(found.keys() | stated.keys()):
                if found.get(name) != stated.get(name):
                    raise _UnsoundError(f"{name} is {'not what was written' if name in found else 'missing'}")
        except _UnsoundError as error:
            damaged = quarantine(path, inode, str(error))
            if is_shipped(path):
                raise damaged from error
            logger.warning("%s", damaged)
            return None
        except OSError as error:
            raise self._unreadable(error) from error
        return path

    @contextmanager
    def write_derived(self, key: str) -> Iterator[Path]:
        """Yield a folder that `derived(key)` finds once the block succeeds, and that is removed otherwise.

        Raises:
            InputError: for an impossible key, or when this set was removed.
            MachineError: when the disk is full or refuses; nothing is left behind.
        """
        if not self.path.is_dir():
            raise self._removed()
        with new_folder(self.path / "derived", self.path.parent, key) as folder:
            yield folder
            write_json(folder / DIGESTS, with_checksum({"format": FORMAT_VERSION, "files": _digests(folder)}))


def _check_format(version: object, path: Path) -> None:
    if format_of(version, FORMAT_VERSION, str(path)) is None:
        raise _UnsoundError("it has no format version")


def _digests(folder: Path) -> dict[str, str]:
    files = [path for path in files_below(folder) if path != folder / DIGESTS]
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def _read_meta(path: Path) -> ActivationSet:
    """The set that a folder's `meta.json` describes. Raises `_UnsoundError` or, for a newer format, `InputError`."""
    inode = path.stat().st_ino
    meta = read_json(path / META)
    if meta is None:
        raise _UnsoundError(f"{META} is missing or no JSON object")
    if not verify_checksum(meta):
        raise _UnsoundError(f"{META} is not what was written")
    _check_format(meta.get("format"), path)
    positions = meta.get("positions")
    sound = (
        all(isinstance(meta.get(name), int) and meta[name] > 0 for name in ("n_layers", "n_prompts", "d_model"))
        and isinstance(positions, list)
        and all(isinstance(text, str) for text in (meta.get("model"), meta.get("texts_digest"), *positions))
        and isinstance(meta.get("files"), dict)
        and all(isinstance(meta.get(name, []), list) for name in ("aliases", "other_runs", "other_renderings"))
        and isinstance(meta.get("rendering", {}), dict)
        and meta.get("key", path.name) == path.name
    )
    if not sound:
        raise _UnsoundError(f"{META} lacks an entry, or describes something else")
    known = {name: meta[name] for name in ("model", "n_layers", "n_prompts", "d_model", "texts_digest")}
    created = str(meta.get("created", ""))
    return ActivationSet(path.name, path, meta, inode, positions=tuple(meta["positions"]), created=created, **known)
