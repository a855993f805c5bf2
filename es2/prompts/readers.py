"""From the rows of any table to labelled prompts: which columns count, and what their values mean.

Readers are strict: an unreadable row stops the load with its number and column, since dropping it would silently change
a measurement, unless that is asked for. What was understood is kept (`PromptSet.reading`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from es2.core.errors import InputError
from es2.prompts.benchmarks import Benchmark, benchmark_row, recognised
from es2.prompts.columns import (
    FALLBACKS,
    LABEL_COLUMNS,
    find_label_column,
    find_prompt_column,
    folded,
    kind_of_harm,
    labels_of,
    named_label_columns,
    readable_labels,
    system_of,
    text_of,
    value_of,
)
from es2.prompts.prompt_set import FORMER_SPLITS, SPLITS, PromptSet, Reading, own_pair
from es2.prompts.rows import Cells, Row, from_rows
from es2.prompts.sources import Source
from es2.prompts.tables import MAX_FILE_BYTES, Twice, read_table

_HEAD_CHARACTERS = 64 * 2**20  # of rows that are looked at together; later ones are read by what these say
_SYSTEM_PROMPTS = 3  # that are kept: two different ones are a disagreement
_HARMFUL_FILES = {"harmful", "malicious", "toxic", "unsafe", "jailbreak", "jailbreaks", "forbidden", "redteam"}
_HARMFUL_FILES |= {"advbench", "harmbench", "strongreject"}
_HARMLESS_FILES = {"harmless", "benign", "safe", "unharmful", "alpaca"}
_NEGATED = re.compile(r"(?<![a-z])(?:not|non|no|un)[\W_]*(?:harmful|malicious|toxic)(?![a-z])", re.IGNORECASE)
_AS_FOUND = Source("")


@dataclass
class Table:
    """The rows of one table as rows of a prompt set, and how they were understood, complete once the rows were read."""

    rows: Iterable[Row]
    about: dict[str, Any]


def parse_prompts(data: bytes, file_name: str, how: Source = _AS_FOUND) -> PromptSet:
    """The prompts in a file's content, whose format the ending of `file_name` decides.

    Args:
        data: the content.
        file_name: its name.
        how: what overrules the reading of its columns.

    Raises:
        InputError: when it cannot be read as prompts.
    """
    table = _table(data, file_name, how)
    name = Path(file_name.removesuffix(".gz")).stem
    reading = Reading((table.about,))
    return from_rows(name, table.rows, where=repr(file_name), reading=reading, skip_bad_rows=how.skip_bad_rows)


def _table(data: bytes, file_name: str, how: Source) -> Table:
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{file_name[:200]!r} is larger than {MAX_FILE_BYTES >> 20} MB; give fewer, shorter prompts.")
    return understand(read_table(data, file_name), file_name, how)


def understand(rows: Iterable[Row], file_name: str, how: Source = _AS_FOUND, label: str | None = None) -> Table:
    """The rows of a table with the columns `prompt`, `label` and, where known, `category`, `pair` and `split`.

    Args:
        rows: as they are in the table.
        file_name: whose words tell the label where no column does.
        how: what overrules the reading of the columns.
        label: the label of all rows, where that is given.

    Raises:
        InputError: where no column can be understood as the prompt or the label, or several can.
    """
    where = repr(file_name[:200])
    head, rest = _head(rows)
    cells = [row for _, row in head if isinstance(row, Mapping)]
    columns = list(dict.fromkeys(column for row in cells for column in row if isinstance(column, str)))
    if not columns:  # nothing to understand: no row, or wrong ones alone
        return Table(chain(head, rest), _about(file_name, "prompt", None, "label"))
    everything = chain(head, rest)
    as_found = (how.prompt_column, how.label_column, how.harmful_values) == (None, None, ())
    if as_found and (benchmark := _benchmark(cells, columns, file_name)) is not None:
        prompt = next(column for column in benchmark.prompt if column in columns)
        told = f"the layout of {benchmark.title}" if label is None else "the file given"
        made = (benchmark_row(benchmark, place, row, file_name, label) for place, row in everything)
        return Table(made, _about(file_name, prompt, None, told))
    if label is None and as_found and "prompt" not in columns and _are_twins(cells, columns):
        return Table(_twins(everything), _about(file_name, "harmful and harmless", None, "the columns' names"))
    prompt = find_prompt_column(columns, how.prompt_column, where)
    others = [column for column in columns if column != prompt]
    column = None
    told = "the file given"
    if label is None:
        column = find_label_column(cells, others, how.label_column, where)
        told = f"column {column}"
        if column is None:
            label = _label_of_name(file_name)
            told = "the file's name"
            if label is None and (kind := kind_of_harm(cells, others)) is not None:
                label, told = "harmful", f"column {kind}, which names a kind of harm in every row"
            if label is None:
                raise InputError(
                    f"{where} has no column that tells harmful from harmless (columns: {', '.join(columns)[:200]}); "
                    "name it with --label-column, or give two files with --harmful and --harmless."
                )
    elif how.prompt_column is None:
        _refuse_other_label(cells, others, label, where)
    for used in (prompt, column):
        if any(isinstance(row.get(used or prompt), Twice) for row in cells[:1]):
            raise InputError(
                f"{where} needs exactly one column {used!r} in its header (found: {', '.join(columns)[:200]})."
            )
    about = _about(file_name, prompt, column, told)
    return Table(_converted(everything, cells, prompt, column, label, how, about, where), about)


def _converted(
    rows: Iterable[Row],
    head: Sequence[Mapping[str, Any]],
    prompt: str,
    column: str | None,
    label: str | None,
    how: Source,
    about: dict[str, Any],
    where: str,
) -> Iterator[Row]:
    """The rows under the columns chosen; the values of the label are counted on the way."""
    found = Counter(value_of(row.get(column)) for row in head) if column is not None else Counter()
    labels = labels_of(column or "", [value for value in found if value], how.harmful_values)
    left = [f"{value[:60]!r} ({rows})" for value, rows in found.most_common() if value and value not in labels]
    unknown = ", ".join(left)
    is_plain = prompt == "prompt" and column == "label" and bool(found.keys() & {"harmful", "harmless"})
    splits = {value_of(row.get("split")) for row in head}
    keep = ["category", "pair"] + ["split"] * (is_plain or splits <= {"", *SPLITS, *FORMER_SPLITS})
    names = {"prompt": prompt, "label": column or "label"}
    systems: dict[str, int] = {}
    has_input = folded(prompt) == "instruction" and prompt != "input"
    instead = FALLBACKS.get(prompt, prompt)
    for place, row in rows:
        if isinstance(row, InputError):
            yield place, row
            continue
        cells = Cells(names, unknown if column is not None else "")
        try:
            text = text_of(row.get(prompt) or row.get(instead), prompt)
        except ValueError as error:
            yield place, InputError(f"{where}, {place}, column {prompt}: {error}; every row needs a prompt.")
            continue
        if has_input and isinstance(text, str) and isinstance(more := row.get("input"), str) and more.strip():
            text = f"{text}\n\n{more}"  # as Alpaca's authors put them together
        cells["prompt"] = text
        _count_system_prompt(about, systems, system_of(row.get(prompt) or row.get(instead), prompt, row))
        if column is None:
            cells["label"] = label
        else:
            value = value_of(row.get(column))
            if value and not labels:
                raise InputError(
                    f"{where}, {place}, column {column}: its values say neither harmful nor harmless: "
                    f"{unknown[:300]}; name the harmful ones with --harmful-values."
                )
            if how.harmful_values and value and value not in labels:
                labels[value] = "harmless"
            cells["label"] = labels.get(value, row.get(column))
            if value in labels:
                counted = about["values"].setdefault(value, {"label": labels[value], "rows": 0})
                counted["rows"] += 1
        for name in keep:
            cell = row.get(name)
            if name not in (prompt, column) and (is_plain or isinstance(cell, (str, int))):
                cells[name] = cell
        yield place, cells


def _count_system_prompt(about: dict[str, Any], systems: dict[str, int], text: str) -> None:
    """Count one more row by its system prompt: the first few different ones, and only where there are any."""
    if text in systems or len(systems) < _SYSTEM_PROMPTS:
        systems[text] = systems.get(text, 0) + 1
    if text:
        about["system_prompts"] = systems


def _benchmark(cells: Sequence[Mapping[str, Any]], columns: Sequence[str], file_name: str) -> Benchmark | None:
    """The benchmark that the table is, unless labels were added to it."""
    benchmark = recognised(columns, file_name)
    if benchmark is None:
        return None
    added = {value for name in named_label_columns(columns) for value in readable_labels(cells, name)}
    return benchmark if not added or (benchmark.label == "xstest" and added <= {"safe", "unsafe"}) else None


def _about(file_name: str, prompt: str, column: str | None, told: str) -> dict[str, Any]:
    return {"file": file_name, "prompt_column": prompt, "label_column": column, "label_from": told, "values": {}}


def _head(rows: Iterable[Row]) -> tuple[list[Row], Iterator[Row]]:
    """The first rows, of a bounded size together, which are nearly always all, and the others."""
    rest = iter(rows)
    head: list[Row] = []
    room = _HEAD_CHARACTERS
    for row in rest:
        head.append(row)
        room -= 100 + (sum(map(_size, row[1].values())) if isinstance(row[1], Mapping) else 0)
        if room < 0:
            break
    return head, rest


def _size(cell: object) -> int:
    if isinstance(cell, (str, bytes)):
        return len(cell)
    inner = cell.values() if isinstance(cell, dict) else cell if isinstance(cell, (list, tuple)) else ()
    return 10 + sum(map(_size, inner))


def _label_of_name(file_name: str) -> str | None:
    name = re.sub("red[ _-]?team", "redteam", _NEGATED.sub("harmless", file_name), flags=re.IGNORECASE)
    words = set(re.findall("[a-z]+", name.casefold()))
    words |= {word.casefold() for word in re.findall("[A-Z][a-z]+", name)}  # MaliciousInstruct
    harmful, harmless = words & _HARMFUL_FILES, words & _HARMLESS_FILES
    if bool(harmful) == bool(harmless):
        return None
    return "harmful" if harmful else "harmless"


def _refuse_other_label(cells: Sequence[Mapping[str, Any]], columns: Sequence[str], label: str, where: str) -> None:
    """Refuse a file that is given as of one label and says in a column that rows are of the other."""
    for column in (column for column in columns if folded(column) in LABEL_COLUMNS):
        labels = readable_labels(cells, column)
        others = sum(labels.get(value_of(row.get(column)), label) != label for row in cells)
        if others:
            raise InputError(
                f"{where} is given as {label}, but by its column {column} {others:,} row(s) are not; give it with "
                "--prompts, or name the prompts' column behind the file (FILE:COLUMN) to take all of them."
            )


def _are_twins(cells: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bool:
    """Whether each row holds a harmful and a harmless prompt, as the built-in set does."""
    two = [row.get(name) for row in cells for name in ("harmful", "harmless")]
    return {"harmful", "harmless"} <= set(columns) and all(isinstance(text, str) and " " in text for text in two)


def _twins(rows: Iterable[Row]) -> Iterator[Row]:
    for place, row in rows:
        if isinstance(row, InputError):
            yield place, row
            continue
        pair = row.get("pair") or own_pair(str(row.get("harmful")))
        for label in ("harmful", "harmless"):
            cells = Cells({"prompt": label}, "")
            cells.update(prompt=row.get(label), label=label, pair=pair, category=row.get("category"))
            yield place, cells
