"""What all benchmarks share: contestants that take turns, and figures beside what they are to reach.

A machine that other programs use is slower from one minute to the next, but seldom between two contestants that follow
each other. So contestants alternate, every second round in reverse, and what counts is the ratio of their medians. On
a machine that others use in bursts even that wavers: `busy` measures one thread by the time that the processor gave it.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from es2.prompts.prompt_set import PromptSet


def _processor_seconds() -> float:
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        folder: of the model.
        prompts: of the built-in set or another.
        n_prompts: so many of its measured prompts are used where a contestant would take too long on all.
        repeats: rounds.
        busy: whether seconds are those of the processor, on one thread, instead of the clock's.
    """

    folder: Path
    prompts: PromptSet
    n_prompts: int
    repeats: int
    busy: bool = False

    def sample(self) -> PromptSet:
        """About `n_prompts` of the measured prompts: whole pairs, spread evenly over the set, in its order."""
        measured = self.prompts.measured()
        pairs = list(dict.fromkeys(measured.pairs))
        n_pairs = min(len(pairs), max(1, round(self.n_prompts * len(pairs) / len(measured))))
        chosen = {pairs[place] for place in np.linspace(0, len(pairs) - 1, n_pairs).astype(int)}
        return measured.select(np.array([pair in chosen for pair in measured.pairs]))

    @property
    def clock(self) -> Callable[[], float]:
        """What tells the seconds: the clock, or the processor's for this process and those that it started."""
        return _processor_seconds if self.busy else time.perf_counter

    def alternate(self, contestants: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, list[float]], dict[str, Any]]:
        """Let contestants take turns.

        Returns:
            The seconds of every round, and what each contestant returned last.
        """
        clock = self.clock
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        results: dict[str, Any] = {}
        for number in range(self.repeats):
            for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
                started = clock()
                results[name] = contestants[name]()
                seconds[name].append(clock() - started)
        return seconds, results


@dataclass(frozen=True)
class Figure:
    """One number of the table.

    Attributes:
        what: in words.
        value: the number.
        unit: `×`, `s`, `ms`, `MB`, or nothing.
        at_least: what it is to reach, if anything.
        at_most: what it is to stay below, if anything.
    """

    what: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        """What it is to be, in words."""
        if self.at_least is not None:
            return f"≥ {self.at_least:g} {self.unit}"
        return "" if self.at_most is None else f"≤ {self.at_most:g} {self.unit}"

    @property
    def holds(self) -> bool | None:
        """Whether it is what it is to be; `None` where nothing is asked."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


@dataclass(frozen=True)
class Report:
    """What one benchmark found.

    Attributes:
        name: the benchmark's.
        figures: rows of the table.
        details: everything else that is worth keeping, as JSON values: seconds of every round, sizes, differences.
    """

    name: str
    figures: tuple[Figure, ...]
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        figures = [asdict(figure) | {"holds": figure.holds} for figure in self.figures]
        return {"figures": figures, "details": self.details}


def ratio(seconds: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """How many times as long `slow` takes as `fast`: of the medians."""
    return statistics.median(seconds[slow]) / statistics.median(seconds[fast])


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size: 1 where the cost is proportional to the size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def largest_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest distance between two embeddings (last axis) in units of the expected one's length."""
    lengths = np.linalg.norm(expected, axis=-1)
    return float((np.linalg.norm(found - expected, axis=-1) / lengths).max())


def table(reports: Sequence[Report]) -> Table:
    """The figures of all reports beside what they are to reach."""
    shown = Table("benchmark", "figure", "value", "target", "holds")
    for report in reports:
        for figure in report.figures:
            digits = 2 if abs(figure.value) < 100 else 0
            value = f"{figure.value:.{digits}f}" if math.isfinite(figure.value) else str(figure.value)
            holds = {True: "yes", False: "NO", None: ""}[figure.holds]
            shown.add_row(report.name, figure.what, f"{value} {figure.unit}".strip(), figure.target, holds)
    return shown
