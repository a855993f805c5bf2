"""Records on disk: a JSON document beside an archive of arrays, with a format version.

All that a job computes for the app is kept in this way, inside folders whose digests the store checks. A caller makes a
record inside the `with` block of `load`, so that every entry that does not fit ends in one sentence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from es2.core.errors import InputError, one_line
from es2.core.files import give_usual_mode, parse_json
from es2.core.former import todays_names
from es2.core.versions import format_of


@dataclass(frozen=True)
class RecordFiles:
    """The two files of one kind of record.

    Attributes:
        document: name of the JSON file.
        arrays: name of the safetensors file; the arrays are of finite floating-point numbers.
        format: the version that is written, and the newest that is read.
        missing, remedy: parts of the sentence when nothing can be read: "is no readable analysis", and what to do.
    """

    document: str
    arrays: str
    format: int
    missing: str
    remedy: str

    def save(self, folder: Path, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Write both files into an existing folder."""
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / self.arrays)
        give_usual_mode(folder / self.arrays)
        text = json.dumps({"format": self.format, **document}, allow_nan=False)
        (folder / self.document).write_text(text, encoding="utf-8")

    @contextmanager
    def load(self, folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
        """Yield the document and the arrays that `save` wrote, for the block to make a record of.

        Raises:
            InputError: when they cannot be read, are of a newer format, or make the block fail.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = folder / self.document
        try:
            document = todays_names(parse_json(path.read_bytes()))
            if format_of(document.get("format"), self.format, str(path)) is None:
                raise ValueError("no format version")
            arrays = load_file(folder / self.arrays)
            for name, array in arrays.items():
                if array.dtype.kind != "f" or not np.isfinite(array).all():
                    raise ValueError(f"{name} is not of finite numbers")
            yield document, arrays
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            raise InputError(f"There {self.missing} in {str(folder)!r} ({one_line(error)}); {self.remedy}.") from error
