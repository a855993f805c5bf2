"""Faults inside a process: a hook that counts what the process asks of its home folder, and strikes at one of them.

CPython tells audit hooks of every file that is opened, renamed or removed, by whatever library, before it happens. An
exception raised there is what the caller gets, so one hook makes a full disk and a missing permission; and since only
the main thread's requests below one folder are counted, the n-th is the same one every time.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

SIGNALS = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM, "interrupted": signal.SIGINT}
CLOCKS = {"clock set back": -1, "clock set forward": 1}

_NEED_ROOM = ("os.mkdir", "os.rename")
_NEED_NONE = ("os.remove", "os.rmdir", "os.truncate", "os.utime", "os.listdir", "os.scandir")
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Fault:
    """What happens, and when.

    Attributes:
        kind: one of `SIGNALS` or `CLOCKS`, `disk full`, `no permission` or `folder removed`.
        at: at which request, counted from 0; those for reading do not count where only writing can fail.
        lasting: whether a disk stays full or a permission stays away, or only this request fails.
        seed: of what else there is to choose: which folder, how many hours.
    """

    kind: str
    at: int
    lasting: bool = False
    seed: int = 0


class Injected:
    """Counts the requests of this process below `home`, and lets the fault happen; cannot be taken out again."""

    def __init__(self, home: Path, fault: Fault | None = None) -> None:
        self.count = {"all": 0, "writes": 0}
        self._home = str(home)
        self._fault = fault
        self._busy = False
        self._removed = ""
        self._flush = os.fsync
        os.fsync = self._fsync  # type: ignore[assignment]
        sys.addaudithook(self._hear)

    def _fsync(self, descriptor: int) -> None:
        self._request(writes=True)
        self._flush(descriptor)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(isinstance(flags, int) and flags & _FOR_WRITING) or bool(mode and set(mode) & set("wax+"))
        elif event in _NEED_ROOM or event in _NEED_NONE:
            path, writes = arguments[0], event in _NEED_ROOM
        else:
            return
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self._home):
            self._request(writes)

    def _request(self, writes: bool) -> None:
        if self._busy or threading.current_thread() is not threading.main_thread():
            return
        for kind in ("all", "writes") if writes else ("all",):
            self.count[kind] += 1
        fault = self._fault
        if fault is None or (fault.kind == "disk full" and not writes):
            return
        number = self.count["writes" if fault.kind == "disk full" else "all"] - 1
        if number == fault.at or (fault.lasting and number > fault.at):
            self._busy = True
            try:
                self._strike(fault, first=number == fault.at)
            finally:
                self._busy = False

    def _strike(self, fault: Fault, *, first: bool) -> None:
        rng = random.Random(fault.seed)
        if fault.kind == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fault.kind == "no permission":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not first:
            return
        if fault.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.kind])
        elif fault.kind in CLOCKS:
            step_clock(CLOCKS[fault.kind] * rng.uniform(1, 48) * 3600)
        elif fault.kind == "folder removed":
            remove_folder(Path(self._home), rng)


def remove_folder(home: Path, rng: random.Random) -> None:
    """Remove one of the folders below `home`; note which, in a file beside it."""
    folders = sorted(path for path in home.rglob("*") if path.is_dir() and not path.is_symlink())
    if folders:
        gone = rng.choice(folders)
        home.with_name("removed").write_text(str(gone.relative_to(home)))
        shutil.rmtree(gone, ignore_errors=True)


def step_clock(seconds: float) -> None:
    """Let this process's clock be wrong from now on; modification times are the kernel's and stay right."""
    import es2.jobs.queue
    import es2.store.store

    truly = time.time
    time.time = lambda: truly() + seconds  # type: ignore[assignment]

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=seconds)

    for module in (es2.jobs.queue, es2.store.store):
        module.datetime = Wrong  # type: ignore[attr-defined]
