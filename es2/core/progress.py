"""How far work has come, and the call to stop it.

Long work takes a `Reporter` and calls it as it goes on. A caller that wants the work to end raises `Cancelled` from
there, so that functions of the library know nothing of jobs, bars or signals.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


class Cancelled(Exception):  # noqa: N818 (a request that was followed, not an error)
    """Raised by a `Reporter` when the work should stop."""


@runtime_checkable
class Reporter(Protocol):
    """Told about progress; every library function that takes long takes one and calls it at each step."""

    def __call__(self, stage: str, done: int, total: int, **numbers: float) -> None:
        """Say that `done` of `total` steps of `stage` are behind us, with any `numbers` worth a curve.

        Raises:
            Cancelled: when the work should stop.
        """


def silent(stage: str, done: int, total: int, **numbers: float) -> None:
    """A `Reporter` that tells nobody and never cancels."""
