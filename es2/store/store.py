"""The store behind `cached_activations/`: folders that are whole or absent, found by what decided their content.

A folder's name is a hash of everything that decided its numbers. It is checked against its own digests before they are
used, and a damaged one is moved aside. Locks keep two processes from computing the same set.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import Es2Error, InputError
from es2.core.files import (
    DamagedError,
    checked_key,
    home,
    is_key,
    is_shipped,
    lock,
    new_folder,
    quarantine,
    shipped,
    unreadable,
    with_checksum,
    write_json,
    writing,
)
from es2.core.rendering import AS_THE_TEMPLATE, Rendering
from es2.store.activation_set import (
    ACTIVATIONS,
    FORMAT_VERSION,
    META,
    TEXTS,
    ActivationSet,
    _digests,
    _read_meta,
    _UnsoundError,
)
from es2.store.embeddings import STORED_DTYPES, lay_out, read_header, release_pages, shape_and_dtype
from es2.store.sources import in_order, is_position, usual_positions

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float


logger = logging.getLogger(__name__)

FOLDER = "cached_activations"  # below `home()` and below the root of shipped sets


class Store:
    """Activation sets under one folder, by key.

    Args:
        root: the folder, made at the first write; if not given, `home()/cached_activations`, and keys that it lacks
            are looked up among the shipped sets.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or home() / FOLDER).absolute()
        self._places = (self.root,) if root else (self.root, shipped() / FOLDER)

    def _place(self, key: str) -> Path:
        paths = [place / checked_key(key) for place in self._places]
        return next((path for path in paths if path.is_dir()), paths[0])

    def open(self, key: str) -> ActivationSet:
        """The checked activation set of this key.

        Raises:
            InputError: when it is absent, damaged (`DamagedError`), of a newer format, or `key` is no key.
            MachineError: when it cannot be read.
        """
        path = self._place(key)
        try:
            inode = path.stat().st_ino
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"There is no activation set {key} in {self.root}; capture it first.") from None
        except OSError as error:
            raise unreadable(error, path) from error
        try:
            activations = _read_meta(path)
        except _UnsoundError as error:
            raise quarantine(path, inode, str(error)) from error
        activations.check()
        return activations

    def get(self, key: str) -> ActivationSet | None:
        """As `open`, but None when it is absent or damaged; a damaged shipped one raises."""
        path = self._place(key)
        if not path.is_dir():
            return None
        try:
            return self.open(key)
        except DamagedError as error:
            if is_shipped(path):
                raise
            logger.warning("%s", error)
            return None

    def list(self) -> list[ActivationSet]:
        """Every set of `root` with a readable `meta.json`, newest first; others are skipped with a warning."""
        found = []
        for path in self.root.iterdir() if self.root.is_dir() else ():
            if not (is_key(path.name) and path.is_dir()) or (path / FOLDER).is_dir():
                continue  # no set, or the shipped root, which lies beside the sets
            try:
                found.append(_read_meta(path))
            except (_UnsoundError, Es2Error, OSError) as error:
                logger.warning("Skipped %s: %s", path, error)
        return sorted(found, key=lambda activations: (activations.created, activations.key), reverse=True)

    def find(
        self,
        *,
        model: str,
        texts_digest: str,
        position: str,
        run: str | None = None,
        rendering: Rendering = AS_THE_TEMPLATE,
    ) -> ActivationSet | None:
        """The newest checked set of these prompts under this model, run and rendering that holds `position`, if any."""
        among = self._of(model, texts_digest, run, rendering)
        return self._newest_with(position, among)

    def by_position(
        self, *, model: str, texts_digest: str, run: str | None = None, rendering: Rendering = AS_THE_TEMPLATE
    ) -> dict[str, ActivationSet]:
        """What `find` returns for each position that was captured, from the end of the prompt on."""
        among = self._of(model, texts_digest, run, rendering)
        held = in_order(position for found in among for position in found.positions if is_position(position))
        newest = {position: self._newest_with(position, among) for position in held}
        return {position: found for position, found in newest.items() if found is not None}

    def _of(self, model: str, texts_digest: str, run: str | None, rendering: Rendering) -> Sequence[ActivationSet]:
        asked = rendering.settled.to_dict()
        return [
            found
            for found in self.list()
            if found.texts_digest == texts_digest
            and model in found.models
            and run in found.runs
            and asked in found.renderings
        ]

    def _newest_with(self, position: str, among: Sequence[ActivationSet]) -> ActivationSet | None:
        usual = usual_positions(position)
        # Such a set is what an analysis captures; of others the newest.
        for activations in sorted(among, key=lambda found: found.positions != usual):
            if position in activations.positions and (checked := self.get(activations.key)):
                return checked
        return None

    def add_name(
        self, activations: ActivationSet, model: str, run: str | None = None, rendering: Rendering = AS_THE_TEMPLATE
    ) -> ActivationSet:
        """The set under one more name of its model, run or rendering, for `find`. Raises `MachineError`."""
        asked = rendering.settled.to_dict()
        renderings = [] if asked in activations.renderings else [asked]
        models = [] if model in activations.models else [model]
        runs = [] if run is None or run in activations.runs else [run]
        if not models and not runs and not renderings:
            return activations
        names: dict[str, Any] = {
            "aliases": [*activations.models[1:], *models],
            "other_runs": [*activations.runs[1:], *runs],
        }
        if renderings:
            names["other_renderings"] = [*activations.renderings[1:], *renderings]
        with writing(activations.path):
            write_json(activations.path / META, with_checksum(activations.meta | names))
        return _read_meta(activations.path)

    @contextmanager
    def lock(self, key: str, while_waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the lock of `key`, of a set or of a result derived from one, so that only one process computes it.

        `while_waiting` is called twice a second while another process holds the lock; it may raise to give up.
        """
        with lock(self.root, key, while_waiting):
            yield

    def write(
        self,
        key: str,
        meta: Mapping[str, Any],
        texts: Sequence[str],
        arrays: Mapping[str, Float[np.ndarray, "layer prompt d_model"]],
    ) -> ActivationSet:
        """Write an activation set and return it, or an existing one of this key.

        Args:
            key: see `content_key`.
            meta: at least `model` and `texts_digest`; format, shape, dtype, digests and time are added here.
            texts: the prompts, in the order of the arrays' second axis.
            arrays: float16 or float32, by position, all of one shape.

        Raises:
            InputError: for an impossible key.
            MachineError: when the disk is full or refuses; nothing is left behind.
            ValueError: when the arrays do not fit each other or the texts.
        """
        shape, dtype = shape_and_dtype(arrays)
        if shape[1] != len(texts):
            raise ValueError(f"{len(texts)} texts for embeddings of {shape[1]} prompts.")
        with lock(self.root, key):
            if existing := self.get(key):
                return existing
            with self.new_set(key, meta, texts) as file:
                for position, whole in lay_out(file, list(arrays), shape, dtype).items():
                    for l, layer in enumerate(arrays[position]):
                        whole[l] = layer
                        release_pages(whole)
                        release_pages(arrays[position])
            return self.written(key)

    def written(self, key: str) -> ActivationSet:
        """The set that was just written, unchecked until its files are used."""
        return _read_meta(self.root / checked_key(key))

    @contextmanager
    def new_set(self, key: str, meta: Mapping[str, Any], texts: Sequence[str]) -> Iterator[Path]:
        """Yield the path of the file of embeddings, for `lay_out`; the set exists once the block succeeds.

        Arguments and errors as for `write`; `meta` is read when the block ends.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        with new_folder(self.root, self.root, key) as folder:
            yield folder / ACTIVATIONS
            header = read_header(folder / ACTIVATIONS)
            entry = next(iter(header.values()))
            pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / TEXTS)
            own = {
                "format": FORMAT_VERSION,
                "key": key,
                "created": datetime.now(UTC).isoformat(timespec="microseconds"),
                "positions": list(header),
                "n_layers": entry["shape"][0],
                "n_prompts": entry["shape"][1],
                "d_model": entry["shape"][2],
                "dtype": STORED_DTYPES[entry["dtype"]],
                "files": _digests(folder),
            }
            write_json(folder / META, with_checksum(dict(meta) | own))
