"""Rows of a prompt file, checked one by one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from es2.core.errors import InputError
from es2.prompts.prompt_set import (
    FORMER_SPLITS,
    LABELS,
    SPLITS,
    PromptSet,
    Reading,
    normalised,
    own_pair,
    split_of,
)

logger = logging.getLogger(__name__)


MAX_PROMPT_CHARACTERS = 20_000
MAX_ROWS = 1_000_000
MAX_CELL_CHARACTERS = 1_000  # of a pair's id or a category, which tables show beside prompts

Row = tuple[str, Mapping[str, Any] | InputError]
"""The place of a row (`row 7`), and its cells by column, or why it cannot be read."""


class Cells(dict[str, Any]):
    """The cells of a row whose columns have other names in the file, which error messages use."""

    def __init__(self, names: Mapping[str, str], unknown: str) -> None:
        super().__init__()
        self.names = names
        self.unknown = unknown
        """All values of the label that have no meaning, for the message about one of them."""


def from_rows(
    name: str, rows: Iterable[Row], *, where: str, reading: Reading | None = None, skip_bad_rows: bool = False
) -> PromptSet:
    """A prompt set of checked rows: texts stripped, splits assigned, duplicates merged.

    Exact duplicates, and near-duplicates in different splits, are warned of.

    Error messages call the source `where`.

    Args:
        name: for display.
        rows: the rows.
        where: what error messages call the source.
        reading: how the columns were understood; it is kept with what became of the rows.
        skip_bad_rows: leave wrong rows out and count them instead of raising.

    Raises:
        InputError: for the first wrong row, with its place and column; for one text under both labels, a pair in two
            splits, or no row at all.
    """
    taken = CheckedRows(where)
    skipped: list[str] = []
    for place, row in rows:
        if len(taken.rows) + taken.merged + len(skipped) >= MAX_ROWS:
            raise InputError(f"{where}, {place}: more than {MAX_ROWS:,} rows are not read; give fewer prompts.")
        try:
            taken.take(place, row)
        except InputError as error:
            if not skip_bad_rows:
                raise InputError(f"{str(error).removesuffix('.')} (--skip-bad-rows leaves such rows out).") from error
            skipped.append(str(error))
    if not taken.rows:
        if skipped:
            raise InputError(f"No row of {where} can be read; the first: {skipped[0]}")
        raise InputError(f"{where} holds no prompt; it needs at least one row under the columns prompt and label.")
    if taken.merged:
        logger.warning("%s: %d exact duplicate(s) merged.", where, taken.merged)
    labels, categories, pairs, splits = zip(*taken.rows.values(), strict=True)
    if skipped:
        logger.warning("%s: %d wrong row(s) left out; the first: %s", where, len(skipped), skipped[0])
    if reading is not None:
        counts = {word: labels.count(label) for word, label in LABELS.items()}
        reading = replace(reading, counts=counts, duplicates=taken.merged, skipped=tuple(skipped))
    prompts = PromptSet(name, tuple(taken.rows), np.array(labels, dtype=np.int8), categories, pairs, splits, reading)
    if prompts.leak:
        logger.warning("%s", prompts.leak)
    return prompts


class CheckedRows:
    """Rows that were checked one by one: label, category, pair and split by text."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.rows: dict[str, tuple[int, str, str, str]] = {}
        self.merged = 0
        self._seen: dict[str, tuple[int, str]] = {}
        self._split_of_pair: dict[str, tuple[str, str]] = {}

    def take(self, place: str, row: Mapping[str, Any] | InputError) -> None:
        """Add one more row, or raise `InputError` and leave it out."""
        if isinstance(row, InputError):
            raise row
        at = f"{self.where}, {place}"
        text = _cell(row, "prompt", at)
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise InputError(
                f"{at}, column {_name(row, 'prompt')}: {len(text):,} characters are too many; "
                f"prompts are short requests of at most {MAX_PROMPT_CHARACTERS:,} characters."
            )
        label_name = _cell(row, "label", at).casefold()
        if label_name not in LABELS:
            unknown = f" ({row.unknown[:300]})" if isinstance(row, Cells) and row.unknown else ""
            raise InputError(
                f"{at}, column {_name(row, 'label')}: {label_name[:60]!r} is unknown{unknown}; "
                "write harmful or harmless, or name the harmful values with --harmful-values."
            )
        label = LABELS[label_name]
        other_label, other_place = self._seen.setdefault(normalised(text), (label, place))
        if other_label != label:
            raise InputError(
                f"{at}: this text stands under both labels (the other at {other_place}); keep one: {text[:80]!r}."
            )
        if text in self.rows:
            self.merged += 1
            return
        pair = _cell(row, "pair", at, needed=False) or own_pair(text)
        split = _cell(row, "split", at, needed=False).casefold() or split_of(pair)
        split = FORMER_SPLITS.get(split, split)
        if split not in SPLITS:
            raise InputError(f"{at}, column split: {split[:60]!r} is unknown; write one of {', '.join(SPLITS)}.")
        other_split, other_place = self._split_of_pair.setdefault(pair, (split, place))
        if other_split != split:
            raise InputError(
                f"{at}, column split: the pair {pair[:60]!r} stands in {split} here and in {other_split} at "
                f"{other_place}; both members of a pair belong to one split."
            )
        category = _cell(row, "category", at, needed=False) or "unspecified"
        for column, cell in (("pair", pair), ("category", category)):
            if len(cell) > MAX_CELL_CHARACTERS:
                raise InputError(f"{at}, column {column}: at most {MAX_CELL_CHARACTERS:,} characters; shorten it.")
        self.rows[text] = (label, category, pair, split)


def _name(row: Mapping[str, Any], column: str) -> str:
    """What the file calls a column."""
    return row.names.get(column, column) if isinstance(row, Cells) else column


def _cell(row: Mapping[str, Any], column: str, at: str, *, needed: bool = True) -> str:
    value = row.get(column)
    column = _name(row, column)
    if value is None or (isinstance(value, str) and not value.strip()):
        if needed:
            raise InputError(f"{at}, column {column}: empty; every row needs a prompt and a label.")
        return ""
    if not isinstance(value, str):
        if not needed and isinstance(value, int):
            return str(value)
        raise InputError(f"{at}, column {column}: expected text, found {type(value).__name__}.")
    text = value.strip()
    if "\0" in text:
        raise InputError(f"{at}, column {column}: holds a NUL byte; remove it.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{at}, column {column}: holds half of a surrogate pair, which is no character; remove it.")
    return text
