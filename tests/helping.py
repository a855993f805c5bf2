"""Pieces of work for `tests/test_helpers.py`, in a module that a helping process can import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

PATIENCE = 60  # seconds that a busy machine may take to start a process


def meet(folder: Path) -> None:
    """Wait until two processes have been here, so that both take part."""
    (folder / str(os.getpid())).touch()
    ends = time.monotonic() + PATIENCE
    while len(list(folder.iterdir())) < 2 and time.monotonic() < ends:
        time.sleep(0.01)


def where(folder: Path, number: int) -> int:
    """The process that does it."""
    meet(folder)
    return os.getpid()


def fail_elsewhere(shared: tuple[Path, int], number: int) -> int:
    folder, here = shared
    meet(folder)
    if os.getpid() != here:
        raise ValueError(f"piece {number} cannot be done")
    return number


def die_elsewhere(shared: tuple[Path, int], number: int) -> int:
    folder, here = shared
    meet(folder)
    if os.getpid() != here:
        os.kill(os.getpid(), signal.SIGKILL)
    return number
