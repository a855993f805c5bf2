"""How far work has come, and the call to stop it.

Long work calls a `Reporter` at each step; a reporter that wants the work to end raises `Cancelled`. So functions of the
library know nothing of jobs, bars or signals.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


class Cancelled(Exception):  # noqa: N818 (a request that was followed, not an error)
    """Raised by a `Reporter` when the work should stop."""


@runtime_checkable
class Reporter(Protocol):
    """Receives progress; every library function that takes long calls one at each step."""

    def __call__(self, stage: str, done: int, total: int, **numbers: float) -> None:
        """Take in that `done` of `total` steps of `stage` are complete, with `numbers` worth a curve.

        Raises:
            Cancelled: when the work should stop.
        """


def silent(stage: str, done: int, total: int, **numbers: float) -> None:
    """A `Reporter` that shows nothing and never cancels."""


def duration(seconds: float) -> str:
    """Seconds in words that are no more exact than an estimate is: `12 s`, `3 min`, `1 h 40 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def seconds_left(events: Sequence[Mapping[str, Any]], now: float | None = None) -> float | None:
    """Seconds (at least 0) that the current stage will still take, by its pace so far.

    None before the stage has advanced twice, or when its total is unknown (0).

    Args:
        events: progress events, oldest first; those of earlier stages are ignored.
        now: seconds since 1970; the clock's if not given.
    """
    if not events:
        return None
    last = events[-1]
    first = last
    for event in reversed(events):
        if event["stage"] != last["stage"] or event["done"] > first["done"]:
            break
        first = event
    steps, elapsed = last["done"] - first["done"], last["time"] - first["time"]
    if steps <= 0 or last["total"] <= 0:
        return None
    left = (last["total"] - last["done"]) * elapsed / steps
    return float(max(0.0, left - ((time.time() if now is None else now) - last["time"])))
