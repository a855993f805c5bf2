"""From the source that a user names to a prompt set: the built-in pairs, a file or two, a data set, a benchmark."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

from es2.core.errors import InputError
from es2.core.files import expanded
from es2.prompts.benchmarks import benchmark_rows, is_benchmark, load_benchmark
from es2.prompts.columns import value_of
from es2.prompts.hub import read_hub_rows
from es2.prompts.prompt_set import LABELS, PromptSet, Reading
from es2.prompts.readers import parse_prompts, understand
from es2.prompts.rows import Row, from_rows
from es2.prompts.sources import Source, read_source
from es2.prompts.tables import ENDINGS, read_bounded, read_table

_AS_FOUND = Source("")
MAX_VALUES = 50
MAX_VALUE_LENGTH = 80
"""Of the values that a column of labels may have."""


def load_prompts(source: str) -> PromptSet:
    """The prompt set of a source.

    Args:
        source: `builtin`; the path of a table (`es2.prompts.tables`) with a column of prompts and one of labels;
            `hf:<dataset>[:split]` for a data set of the Hugging Face Hub; a benchmark's name, with `:path` for its
            published file (`es2.prompts.benchmarks`); or `pair:HARMFUL|HARMLESS` for two of these. What overrules the
            reading of columns may stand behind it (`es2.prompts.sources`).

    Raises:
        InputError: with the row and the column, when the source cannot be read as prompts.
        MachineError: when the Hub cannot be reached.
    """
    how = read_source(source)
    place = how.place
    if how.harmless is not None:
        return _load_pair(how)
    if place == "builtin":
        return load_builtin()
    if place.startswith("hf:"):
        table = understand(_hub_rows(place), place, how)
        where = f"the data set {place.split(':')[1]!r}"
        return from_rows(
            place, table.rows, where=where, reading=Reading((table.about,)), skip_bad_rows=how.skip_bad_rows
        )
    if is_benchmark(place):
        return load_benchmark(place, how)
    return load_file(Path(place), how)


def _load_pair(how: Source) -> PromptSet:
    """The prompts of two places, one of them all harmful, the other all harmless."""
    rows: list[Iterator[Row]] = []
    tables: list[dict[str, Any]] = []
    columns = (how.prompt_column, how.harmless_column)
    for label, place, column in zip(("harmful", "harmless"), how.places, columns, strict=True):
        of_place, about = _labelled(place, label, replace(how, prompt_column=column))
        rows.append((f"{about['file']}, {at}", row) for at, row in of_place)
        tables.append(about)
    name = " and ".join(Path(table["file"].removesuffix(".gz")).stem for table in tables)
    return from_rows(
        name,
        chain(*rows),
        where="the two files",
        reading=Reading(tuple(tables)),
        skip_bad_rows=how.skip_bad_rows,
    )


def _labelled(place: str, label: str, how: Source) -> tuple[Iterator[Row], dict[str, Any]]:
    if place == "builtin":
        raise InputError(f"builtin has prompts of both labels; give a file of {label} ones.")
    if place.startswith("hf:"):
        table = understand(_hub_rows(place), place, how, label)
    elif is_benchmark(place):
        rows, about = benchmark_rows(place, label)
        return iter(rows), about
    else:
        path = Path(place)
        table = understand(read_table(_content(path), path.name), path.name, how, label)
    return iter(table.rows), table.about


def table_columns(place: str) -> dict[str, dict[str, int]]:
    """The columns of a table, and the rows by value of those that may hold a label.

    Values are as `es2.prompts.columns.value_of` gives them, the most frequent first; a column of more than
    `MAX_VALUES`, or of anything but short texts and numbers, has none.

    Args:
        place: a path or `hf:<dataset>[:split]`; of a benchmark, whose columns are fixed, there are none.

    Raises:
        InputError: when it cannot be read as a table.
        MachineError: when the Hub cannot be reached.
    """
    if place == "builtin" or is_benchmark(place):
        return {}
    path = Path(place)
    rows = _hub_rows(place) if place.startswith("hf:") else read_table(_content(path), path.name)
    found: dict[str, dict[str, int] | None] = {}
    for _, row in rows:
        for column, cell in row.items() if isinstance(row, Mapping) else ():
            counts = found.setdefault(column, {}) if isinstance(column, str) else None
            if counts is None:
                continue
            value = value_of(cell) if cell is None or isinstance(cell, (str, int, float)) else " " * MAX_VALUE_LENGTH
            counts[value] = counts.get(value, 0) + 1
            if len(counts) > MAX_VALUES or len(value) >= MAX_VALUE_LENGTH:
                found[column] = None
    return {
        column: {value: counts[value] for value in sorted(counts, key=counts.__getitem__, reverse=True) if value}
        for column, counts in ((column, counts or {}) for column, counts in found.items())
    }


def _hub_rows(place: str) -> list[Row]:
    name, _, split = place.removeprefix("hf:").partition(":")
    return read_hub_rows(name, split or "train")


def two_files(harmful: str, harmless: str) -> Source:
    """The source of two places, each of which may have its prompts' column behind it (`FILE:COLUMN`)."""
    (place, column), (other, other_column) = map(_place_and_column, (harmful, harmless))
    return Source(place, other, column, other_column)


def _place_and_column(text: str) -> tuple[str, str | None]:
    place, _, column = text.rpartition(":")
    if text.startswith("hf:") or is_benchmark(text) or len(place) < 2 or not column:
        return text, None
    try:
        return (text, None) if Path(expanded(text)).exists() else (place, column)
    except (OSError, ValueError):  # a name that no file can have
        return text, None


@cache
def load_builtin() -> PromptSet:
    """The contrast pairs written for this project (`es2/data/contrast_pairs.csv`, see `docs/prompts.md`)."""
    table = resources.files("es2") / "data" / "contrast_pairs.csv"
    rows = []
    for number, pair in enumerate(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))), start=2):
        for label in LABELS:
            row = {"prompt": pair[label], "label": label, "category": pair["category"], "pair": pair["pair"]}
            rows.append((f"row {number}", row))
    return from_rows("builtin", rows, where="the built-in prompts")


def load_file(path: Path, how: Source = _AS_FOUND) -> PromptSet:
    """The prompts of a file. Raises `InputError`."""
    return parse_prompts(_content(path), path.name, how)


def _content(path: Path) -> bytes:
    shown = repr(str(path)[:300])
    if "\0" in str(path):
        raise InputError(f"The prompt file's name holds a NUL byte; give the path of a file ({ENDINGS}).")
    try:
        if not path.exists():
            raise InputError(f"There is no prompt file {shown}; give builtin, a file ({ENDINGS}), or hf:<dataset>.")
        if path.is_dir():
            raise InputError(f"{shown} is a folder; give the file inside it.")
        return read_bounded(path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{shown} cannot be read ({reason}); check its name and permissions.") from error
