"""Progress of long work in a notebook, in a terminal or in a function of the caller's."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeAlias

from es2.cli.terminal import progress as terminal_bars
from es2.core.progress import Reporter, silent

Progress: TypeAlias = bool | Reporter | None
"""None or True: bars in a notebook or a terminal, else a line now and then. False: nothing. Or what gets each step."""

_SECONDS = 0.2


@contextmanager
def shown(progress: Progress) -> Iterator[Reporter]:
    """The reporter that shows progress as asked for."""
    if progress is None or progress is True:
        if (display := _notebook_display()) is not None:
            yield _NotebookBars(display)
        else:
            with terminal_bars() as report:
                yield report
    else:
        yield progress or silent


def _notebook_display() -> Any:
    """IPython's `display` where a notebook shows what it is given, else None. A terminal's IPython has a terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    return import_module("IPython.display").display  # which is there where a notebook runs, and no dependency


class _NotebookBars:
    """A line for each stage in a cell's output. Rich's own bars need ipywidgets there, which few notebooks have."""

    def __init__(self, display: Any) -> None:
        self._display = display
        self._handle: Any = None
        self._stages: dict[str, tuple[int, int]] = {}
        self._last = 0.0

    def __call__(self, stage: str, done: int, total: int, **numbers: float) -> None:
        is_new = stage not in self._stages
        self._stages[stage] = (done, total)
        now = time.monotonic()
        if not is_new and done < total and now - self._last < _SECONDS:
            return
        self._last = now
        if self._handle is None:
            self._handle = self._display(self, display_id=True)
        else:
            self._handle.update(self)

    def _repr_html_(self) -> str:
        rows = []
        for stage, (done, total) in self._stages.items():
            bar = f'<progress value="{done}" max="{total}"></progress> {done:,} of {total:,}' if total else f"{done:,}"
            rows.append(f"<tr><td>{html.escape(stage)}</td><td>{bar}</td></tr>")
        return f"<table>{''.join(rows)}</table>"

    def __repr__(self) -> str:
        return "; ".join(f"{stage} {done:,} of {total:,}" for stage, (done, total) in self._stages.items())
