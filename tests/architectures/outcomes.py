"""What a cell of the table says, and the table as text."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EQUAL, OWN_HOOKS, IN_PART, REFUSED = "equal", "own hooks", "equal, in part refused", "refused"
GOOD = (IN_PART, EQUAL, OWN_HOOKS, REFUSED)  # none begins as one before it does
WRONG, TRACEBACK = "wrong", "traceback"

_FAULTS = 3  # of a wrong cell, that are named


@dataclass(frozen=True)
class Cell:
    """One outcome.

    Attributes:
        outcome: one of `GOOD`, or `WRONG` or `TRACEBACK`.
        difference: the largest relative difference that was found; None where nothing was measured.
        detail: the sentence of a refusal, the exception, or what differs by how much.
    """

    outcome: str
    difference: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table: its cells by the name of their column."""

    name: str
    cells: Mapping[str, Cell]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"name": self.name, "cells": {name: asdict(cell) for name, cell in self.cells.items()}}


@dataclass
class Check:
    """What a cell compared.

    Attributes:
        faults: what is not as it must be.
        difference: the largest relative difference within its bound.
        note: what a good cell adds.
        outcome: of a cell without faults.
    """

    faults: list[str] = field(default_factory=list)
    difference: float | None = None
    note: str = ""
    outcome: str = EQUAL

    def compare(self, what: str, differences: Iterable[float], limit: float) -> None:
        """Differences by layer, each of which must be below the limit."""
        found = list(differences)
        self.difference = max([self.difference or 0.0, *(one for one in found if one == one)])
        if not all(one <= limit for one in found):
            by_layer = ", ".join(f"{one:.1e}" for one in found)
            self.faults.append(f"{what} differ, by layer: {by_layer}")

    def expect(self, holds: bool, fault: str) -> None:
        """Note a fault unless something holds."""
        if not holds:
            self.faults.append(fault)

    def cell(self) -> Cell:
        """The outcome of all comparisons."""
        if self.faults:
            return Cell(WRONG, self.difference, "; ".join(self.faults[:_FAULTS]))
        return Cell(self.outcome, self.difference, self.note)


def sentence_of(error: Exception, hidden: Path) -> str:
    """A refusal's sentence, in which the folder `hidden` is called MODEL."""
    return str(error).replace(str(hidden), "MODEL")


def attempt(compare: Callable[[], Cell], hidden: Path) -> Cell:
    """The cell that `compare` gives, or what it ends with. The folder `hidden` is called MODEL in messages."""
    from es2.core.errors import Es2Error

    try:
        return compare()
    except Es2Error as error:
        sentence = sentence_of(error, hidden)
        if "\n" in sentence or not sentence.rstrip().endswith("."):
            return Cell(WRONG, None, f"the refusal is no sentence: {sentence[:300]!r}")
        return Cell(REFUSED, None, sentence)
    except Exception as error:  # whatever it is, it is what a user would see
        frames = traceback.extract_tb(error.__traceback__)
        own = next((frame for frame in reversed(frames) if "/es2/" in frame.filename), frames[-1])
        where = f"{Path(own.filename).name}:{own.lineno}, at last {Path(frames[-1].filename).name}:{frames[-1].lineno}"
        message = " ".join(str(error).replace(str(hidden), "MODEL").split())[:300]
        return Cell(TRACEBACK, None, f"{type(error).__name__}: {message} ({where})")


def markdown(rows: Sequence[Row], first: str) -> str:
    """Rows as a table in Markdown; sentences of refusals are numbered below it."""
    columns = list(rows[0].cells)
    sentences = sorted({cell.detail for row in rows for cell in row.cells.values() if REFUSED in cell.outcome})
    numbers = {sentence: number for number, sentence in enumerate(sentences, 1)}
    lines = ["| " + " | ".join([first, *columns]) + " |", "| --- |" + " --- |" * len(columns)]
    lines += [
        "| " + " | ".join([row.name, *(_shown(row.cells[column], numbers) for column in columns)]) + " |"
        for row in rows
    ]
    if sentences:
        lines += ["", *(f"{number}. {sentence}" for sentence, number in numbers.items())]
    return "\n".join(lines) + "\n"


def _shown(cell: Cell, numbers: Mapping[str, int]) -> str:
    size = "" if cell.difference is None else f" {cell.difference:.0e}"
    if REFUSED in cell.outcome:
        return f"{cell.outcome} ({numbers[cell.detail]}){size}"
    if cell.outcome not in GOOD:
        return f"{cell.outcome}: {cell.detail}".replace("|", "\\|")
    return cell.outcome + size


def outcomes_in(text: str, columns: int) -> dict[str, list[str]]:
    """The outcomes by row that a written table names, digits and sentences left out."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == columns + 1:
            words = [
                next((word for word in (*GOOD, WRONG, TRACEBACK) if cell.startswith(word)), "") for cell in cells[1:]
            ]
            if all(words):
                found[cells[0]] = words
    return found
