"""A job as its folder shows it: its progress, its end, and how to stop it.

A job lives while its process holds the kernel's lock on `lock`, since a pid proves nothing (zombies, reuse) and a
status on disk survives a kill; for a job of another host the age of its heartbeat decides.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from es2.core.errors import InputError
from es2.core.files import is_shipped, read_json, stamp_of, verify_checksum, way_out, with_checksum, write_json, writing
from es2.core.former import todays_names
from es2.core.progress import seconds_left
from es2.core.versions import format_of
from es2.jobs.events import parse_events, tail

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
STATUSES = ("queued", "running", "done", "cancelled", "interrupted", "failed", "stopped")
ACTIVE = ("queued", "running")

MAX_NAME = 80

STALE_SECONDS = 60.0  # a job of another host with an older heartbeat is dead
KILL_AFTER_SECONDS = 10.0  # a second call of `cancel` after this time kills

HOST = socket.gethostname()

children: dict[Path, subprocess.Popen[bytes]] = {}
"""The processes that this process launched and has not reaped."""


@dataclass(frozen=True)
class Job:
    """One job: a folder. Every method reads the disk anew; a folder that was removed counts as `interrupted`.

    Attributes:
        path: its folder, whose name is the job's id.
        config: `config.json`: `kind`, `created`, `heavy`, `host` and `pid` of the process that created it, and the
            config given to `create_job`.
    """

    path: Path
    config: dict[str, Any] = field(compare=False, repr=False)

    @property
    def id(self) -> str:
        """The folder's name; ids sort by time of creation."""
        return self.path.name

    @property
    def kind(self) -> str:
        """The name of its task."""
        return str(self.config["kind"])

    @property
    def created(self) -> str:
        """When it was launched: ISO 8601, UTC."""
        return str(self.config["created"])

    @property
    def name(self) -> str:
        """The name given by `rename`; empty by default."""
        name = (read_json(self.path / "name.json") or {}).get("name", "")
        return name if isinstance(name, str) else ""

    @property
    def is_shipped(self) -> bool:
        """Whether it comes with the program: read-only and without weights."""
        return is_shipped(self.path)

    def check_own(self) -> None:
        """Raise `InputError` for a shipped job, which has no weights and cannot be changed."""
        if self.is_shipped:
            raise InputError(
                f"Run {self.id} comes with the program, to be looked at: it has no weights and cannot be changed; "
                "`es2 finetune` makes a run of your own."
            )

    def rename(self, name: str) -> None:
        """Set its name, which may be empty.

        Raises:
            InputError: for a name that is too long or not one line of text, or a shipped job.
            MachineError: when the folder cannot be written.
        """
        self.check_own()
        name = " ".join(name.split())
        if len(name) > MAX_NAME or not name.isprintable():
            raise InputError(f"A name is one line of at most {MAX_NAME} characters, not {name[:40]!r}; shorten it.")
        with writing(self.path):
            write_json(self.path / "name.json", {"name": name})

    def status(self) -> str:
        """One of `STATUSES`."""
        reap()
        # The end is read twice, since it may be written between the two reads.
        if (status := self.ending() or self._active() or self.ending()) is not None:
            return status
        return "cancelled" if (self.path / "cancel").exists() else "interrupted"

    def is_active(self) -> bool:
        """Whether it is queued or running."""
        return self.status() in ACTIVE

    def result(self) -> dict[str, Any] | None:
        """The task's result; None before the end and after any end but `done`, `stopped` or `disown`.

        It is shared until the file changes, so callers must not change it.
        """
        path = self.path / "result.json"
        if (stamp := stamp_of(path)) is None:
            return _result.__wrapped__(path, stamp)  # absent, or an error that reading raises
        return _result(path, stamp)

    def error(self) -> str | None:
        """One sentence on why it failed, stopped or was interrupted; None otherwise."""
        status = self.status()
        if status == "interrupted":
            if not self.path.is_dir():
                return f"The folder of job {self.id} was removed."
            if (self.path / "result.json").exists():
                return self._why_no_end()
            return f"The process of job {self.id} ended without a result (killed, or out of memory); see its log."
        return self._end()[1]

    def events(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The events from byte `offset` on, and the offset for the next call.

        A partial last line is left for the next call; a damaged line is skipped with a warning.
        """
        path = self.path / "events.jsonl"
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return [], offset
        end = data.rfind(b"\n") + 1
        return parse_events(data[:end], path), offset + end

    def progress(self) -> dict[str, Any] | None:
        """The last progress event (`stage`, `done`, `total`, its numbers) with `seconds_left` added; None if none."""
        path = self.path / "events.jsonl"
        data = tail(path)
        events = parse_events(data[: data.rfind(b"\n") + 1], path)
        steps = [event for event in events if event["event"] == "progress"]
        return {**steps[-1], "seconds_left": seconds_left(steps)} if steps else None

    def log_tail(self, n: int = 20) -> list[str]:
        """The last `n` lines of the process's output."""
        return tail(self.path / "log.txt").decode("utf-8", "replace").splitlines()[-n:]

    def cancel(self) -> None:
        """Request its end: a waiting job never starts, a running one stops at its next step.

        A second call after `KILL_AFTER_SECONDS` kills its process and those that it started. A job of another host
        sees the request at its next heartbeat. A job that has ended stays as it is.

        Raises:
            InputError: for a shipped job.
            MachineError: when the request cannot be written.
        """
        self.check_own()
        if not self.is_active():
            return
        marker = self.path / "cancel"
        with writing(marker):
            if not marker.exists():  # its age decides about the kill
                marker.touch()
        if (pid := self._pid()) is not None:
            _signal(pid, signal.SIGKILL if _age(marker) > KILL_AFTER_SECONDS else signal.SIGTERM)

    def delete(self) -> None:
        """Remove its folder.

        Raises:
            InputError: while it is queued or running, or for a shipped job.
            MachineError: when the folder cannot be removed.
        """
        self.check_own()
        if self.is_active():
            raise InputError(f"Job {self.id} is {self.status()}; cancel it before deleting it.")
        aside = self.path.with_name(f".deleted-{self.id}")  # out of lists at once, however long removing takes
        with writing(self.path), suppress(FileNotFoundError):
            self.path.rename(aside)
            shutil.rmtree(aside)
            for stale in aside.parent.glob(".deleted-*"):
                shutil.rmtree(stale, ignore_errors=True)  # of a process that was killed here

    def ending(self) -> str | None:
        """The status that it ended with; None before."""
        return self._end()[0]

    def disown(self, error: str) -> str:
        """Mark a finished job as failed, since what it made is lost; its result can still be read.

        Returns `error`, for the caller to raise. Raises `MachineError`.
        """
        path = self.path / "result.json"
        with writing(path):
            write_json(path, with_checksum((_read_end(path) or {}) | {"status": "failed", "error": error}))
        return error

    def amend(self, result: Mapping[str, Any]) -> None:
        """Replace the result of a job that has one. Raises `MachineError`."""
        path = self.path / "result.json"
        with writing(path):
            write_json(path, with_checksum((_read_end(path) or {}) | {"result": dict(result)}))

    def _end(self) -> tuple[str | None, str | None]:
        """Status and error in `result.json`; None twice when it is absent, damaged or of a newer format."""
        path = self.path / "result.json"
        stamp = stamp_of(path)
        return _ending(path, stamp) if stamp is not None else (None, None)

    def _why_no_end(self) -> str:
        path = self.path / "result.json"
        document = read_json(path) or {}
        try:
            if verify_checksum(document):
                format_of(document.get("format"), FORMAT_VERSION, str(path))
        except InputError as error:
            return str(error)
        fix = way_out(self.path, f"do the same again, or `es2 runs resume {self.id}` for a run")
        return f"The result of job {self.id} is damaged; {fix}."

    def _active(self) -> str | None:
        """`queued` or `running` while a process lives or is starting; else None."""
        heartbeat = self.path / "heartbeat.json"
        if (beat := read_json(heartbeat)) is None:
            return "queued" if self._starting() else None
        held = _is_held(self.path / "lock") if beat.get("host") == HOST else None
        alive = _age(heartbeat) < STALE_SECONDS if held is None else held
        if not alive:
            return None
        return "queued" if beat.get("state") == "queued" else "running"

    def _starting(self) -> bool:
        """Whether its process was launched, is alive, and has not taken the lock yet."""
        record_path = self.path / "launched.json"
        if (record := read_json(record_path)) is None:
            pid = self.config.get("pid")
            known = self.config.get("host") == HOST and isinstance(pid, int) and 0 < pid < 2**31
            gone = known and not psutil.pid_exists(pid)  # the process that created the job and would have started it
            return not gone and _age(self.path / "config.json") < STALE_SECONDS
        if record.get("host") != HOST:
            return _age(record_path) < STALE_SECONDS
        try:
            process = psutil.Process(int(record["pid"]))
            # A younger process has reused the pid, unless the clock was set: then its command line decides.
            younger = process.create_time() > float(record["time"]) + 2
            successor = younger and str(self.path) not in process.cmdline()
            return not successor and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, KeyError, ValueError, TypeError, OverflowError):
            return False

    def _pid(self) -> int | None:
        """The pid of its live process, if that is on this host."""
        record = read_json(self.path / "heartbeat.json")
        if record is None:
            record = read_json(self.path / "launched.json") if self._starting() else None
        elif not _is_held(self.path / "lock"):
            return None
        if record is None or record.get("host") != HOST:
            return None
        pid = record.get("pid")
        return pid if isinstance(pid, int) and pid > 1 else None  # 0 and -1 would be whole groups of processes

    def is_ahead_of(self, other: Job) -> bool:
        """Whether it is a heavy job of this host that was launched before `other`."""
        record = read_json(self.path / "heartbeat.json") or read_json(self.path / "launched.json") or {}
        return self.id < other.id and self.config.get("heavy", True) and record.get("host") == HOST


def read_job(path: Path) -> Job:
    """The job in this folder.

    Raises:
        InputError: when the folder holds none, or one of a newer format: `config.json` states the version of all files
            but `result.json`, which states its own.
    """
    config = read_json(path / "config.json")
    sound = config is not None and verify_checksum(config) and _is_config(config)
    if config is None or not sound or format_of(config.get("format"), FORMAT_VERSION, str(path)) is None:
        fix = way_out(path, "delete the folder")
        raise InputError(f"{path} is no job: its config.json is missing or damaged; {fix}.")
    return Job(path, todays_names(config))


def _is_config(config: Mapping[str, Any]) -> bool:
    """Whether the entries that every reader needs are there and of their kind; the task checks the others."""
    texts = all(isinstance(config.get(name, ""), str) for name in ("model", "prompts", "objective", "position"))
    ids = all(isinstance(config.get(name), str | None) for name in ("run", "against", "imported"))
    layers = config.get("layers") or []
    numbers = isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)
    return texts and ids and numbers and all(isinstance(config.get(name), str) for name in ("kind", "created"))


def _read_end(path: Path) -> dict[str, Any] | None:
    """The content of `result.json`; None when it is absent, damaged or of a newer format."""
    document = read_json(path)
    if document is None or document.get("format", 1) != FORMAT_VERSION or not verify_checksum(document):
        return None
    return dict(todays_names(document))


@lru_cache(maxsize=16)
def _result(path: Path, stamp: object) -> dict[str, Any] | None:
    """The result in a file with this stamp: a page asks at every click, and reading takes a while."""
    result = (_read_end(path) or {}).get("result")
    return result if isinstance(result, dict) else None


@lru_cache(maxsize=1024)
def _ending(path: Path, stamp: object) -> tuple[str | None, str | None]:
    """Status and error of a file with this stamp: lists of jobs ask often, and results are large."""
    end = _read_end(path) or {}
    status, error = end.get("status"), end.get("error")
    return status if status in STATUSES else None, error if isinstance(error, str) else None


def reap() -> None:
    """Drop the children that have ended."""
    for path, child in list(children.items()):
        if child.poll() is not None:
            children.pop(path, None)


def _is_held(path: Path) -> bool | None:
    """Whether a process holds the lock of this file; None where locks do not work.

    The test takes a shared lock, so that two tests at once do not mistake each other for the job.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False


def _signal(pid: int, number: int) -> None:
    """Send a signal to a process and, where it leads a group, to all that it started."""
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
    except ProcessLookupError:
        pass  # it ended meanwhile
    except PermissionError:
        logger.warning("Process %d belongs to another user; it sees the request at its next heartbeat.", pid)


def _age(path: Path) -> float:
    """Seconds since a file was written; infinite if it is absent."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return math.inf
