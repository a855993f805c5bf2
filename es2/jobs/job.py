"""A job as its folder shows it: how far it is, how it ended, and how to stop it.

All that a job and its onlookers share is the folder, so every state is read from files, anew at each question. A job
lives for as long as its process holds the kernel's lock on `lock`: a pid proves nothing (zombies, reuse), and a status
that a process writes about itself is wrong as soon as it is killed. Only for a job of another host, whose locks cannot
be seen, does the age of the heartbeat decide. The end is `result.json`, written by rename; a job with neither a result
nor a live process was interrupted.
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
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from es2.core.errors import InputError
from es2.core.files import (
    is_shipped,
    machine_error,
    parse_json,
    read_json,
    verify_checksum,
    way_out,
    with_checksum,
    write_json,
)
from es2.core.former import todays_names
from es2.core.progress import seconds_left
from es2.core.versions import format_of

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
STATUSES = ("queued", "running", "done", "cancelled", "interrupted", "failed", "stopped")
ACTIVE = ("queued", "running")

MAX_NAME = 80

STALE_SECONDS = 60.0
"""A job of another host whose heartbeat is older than this is taken for dead."""
KILL_AFTER_SECONDS = 10.0
"""Asked again to cancel after this long, a job is killed."""

HOST = socket.gethostname()
_TAIL_BYTES = 2**16

children: dict[Path, subprocess.Popen[bytes]] = {}
"""The processes that this process launched and that have not been seen to end."""


@dataclass(frozen=True)
class Job:
    """One job: a folder. Every method looks at the disk anew; a folder that was removed reads as `interrupted`.

    Attributes:
        path: its folder, whose name is the job's id.
        config: what `config.json` says: `kind`, `created`, `heavy`, `host` and `pid` of who laid it down, and what the
            caller of `launch` gave.
    """

    path: Path
    config: dict[str, Any] = field(compare=False, repr=False)

    @property
    def id(self) -> str:
        """The folder's name; ids sort by time of creation."""
        return self.path.name

    @property
    def kind(self) -> str:
        """Which task it runs."""
        return str(self.config["kind"])

    @property
    def created(self) -> str:
        """When it was launched: ISO 8601, UTC."""
        return str(self.config["created"])

    @property
    def name(self) -> str:
        """What a person called it; empty if nobody did."""
        name = (read_json(self.path / "name.json") or {}).get("name", "")
        return name if isinstance(name, str) else ""

    @property
    def is_shipped(self) -> bool:
        """Whether it comes with the program: it is only read, and has no weights."""
        return is_shipped(self.path)

    def check_own(self) -> None:
        """Refuse a shipped one (`InputError`), before it is changed or its weights are wanted."""
        if self.is_shipped:
            raise InputError(
                f"Run {self.id} comes with the program, to be looked at: it has no weights and cannot be changed; "
                "`es2 finetune` makes a run of your own."
            )

    def rename(self, name: str) -> None:
        """Call it something, or nothing; the id and the folder stay as they are.

        Raises:
            InputError: for a name that is too long or not one line of text, or a shipped one.
            MachineError: when the folder cannot be written.
        """
        self.check_own()
        name = " ".join(name.split())
        if len(name) > MAX_NAME or not name.isprintable():
            raise InputError(f"A name is one line of at most {MAX_NAME} characters, not {name[:40]!r}; shorten it.")
        try:
            write_json(self.path / "name.json", {"name": name})
        except OSError as error:
            raise machine_error(error, self.path) from error

    def status(self) -> str:
        """One of `STATUSES`."""
        reap()
        if (end := self.ending()) is not None:
            return end
        if (active := self._active()) is not None:
            return active
        if (end := self.ending()) is not None:  # it ended between the two looks
            return end
        return "cancelled" if (self.path / "cancel").exists() else "interrupted"

    def is_active(self) -> bool:
        """Whether it is queued or running."""
        return self.status() in ACTIVE

    def result(self) -> dict[str, Any] | None:
        """What the task returned; None before the end and after any end but `done`, `stopped` or one disowned.

        It is remembered for as long as the file stays the same, so nobody writes into it.
        """
        path = self.path / "result.json"
        try:
            stat = path.stat()
        except OSError:
            return _result.__wrapped__(path)  # absent, or why it cannot be read
        return _result(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)

    def error(self) -> str | None:
        """One sentence: why it failed, stopped or was interrupted; None otherwise."""
        status = self.status()
        if status == "interrupted":
            if not self.path.is_dir():
                return f"The folder of job {self.id} was removed."
            if (self.path / "result.json").exists():
                return self._why_no_end()
            return f"The process of job {self.id} ended without a result (killed, or out of memory); see its log."
        return self._end()[1]

    def events(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The events from byte `offset` on, and the offset to ask from next time.

        A last line that is still being written is left for the next call; a damaged line is skipped with a warning.
        """
        path = self.path / "events.jsonl"
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return [], offset
        end = data.rfind(b"\n") + 1
        return _parse_events(data[:end], path), offset + end

    def progress(self) -> dict[str, Any] | None:
        """The last progress event (`stage`, `done`, `total`, its numbers) with `seconds_left` added; None if none."""
        path = self.path / "events.jsonl"
        data = tail(path)
        events = _parse_events(data[: data.rfind(b"\n") + 1], path)
        steps = [event for event in events if event["event"] == "progress"]
        return {**steps[-1], "seconds_left": seconds_left(steps)} if steps else None

    def log_tail(self, n: int = 20) -> list[str]:
        """The last `n` lines of what the process printed."""
        return tail(self.path / "log.txt").decode("utf-8", "replace").splitlines()[-n:]

    def cancel(self) -> None:
        """Ask it to stop: a waiting job never starts, a running one stops at its next step.

        Asked again after `KILL_AFTER_SECONDS`, its process is killed with what it started. A job of another host
        sees the request at its next heartbeat. A job that has ended is left as it is.

        Raises:
            InputError: for a shipped one.
            MachineError: when the request cannot be written.
        """
        self.check_own()
        if not self.is_active():
            return
        marker = self.path / "cancel"
        try:
            if not marker.exists():
                marker.touch()
        except OSError as error:
            raise machine_error(error, marker) from error
        if (pid := self._pid()) is not None:
            _signal(pid, signal.SIGKILL if _age(marker) > KILL_AFTER_SECONDS else signal.SIGTERM)

    def delete(self) -> None:
        """Remove its folder.

        Raises:
            InputError: while it is queued or running, or for a shipped one.
            MachineError: when the folder cannot be removed.
        """
        self.check_own()
        if self.is_active():
            raise InputError(f"Job {self.id} is {self.status()}; cancel it before deleting it.")
        aside = self.path.with_name(f".deleted-{self.id}")  # out of sight at once, however long removing takes
        try:
            self.path.rename(aside)
            shutil.rmtree(aside)
            for stale in aside.parent.glob(".deleted-*"):
                shutil.rmtree(stale, ignore_errors=True)  # of a process that was killed here
        except FileNotFoundError:
            return
        except OSError as error:
            raise machine_error(error, self.path) from error

    def ending(self) -> str | None:
        """How it ended; None before."""
        return self._end()[0]

    def disown(self, error: str) -> str:
        """Let a job that is done count as failed, since what it made is lost; its result can still be read.

        Returns:
            `error`, the sentence that says so, for the caller to raise.

        Raises:
            MachineError: when the folder cannot be written.
        """
        path = self.path / "result.json"
        try:
            write_json(path, with_checksum((_read_end(path) or {}) | {"status": "failed", "error": error}))
        except OSError as failure:
            raise machine_error(failure, path) from failure
        return error

    def _end(self) -> tuple[str | None, str | None]:
        """Status and error in `result.json`; None twice when it is absent, damaged or of a newer format."""
        path = self.path / "result.json"
        try:
            stat = path.stat()
        except OSError:
            return None, None
        return _ending(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)

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
        """`queued` or `running` while a process lives, or is on its way to the lock; else None."""
        heartbeat = self.path / "heartbeat.json"
        if (beat := read_json(heartbeat)) is None:
            return "queued" if self._starting() else None
        held = _is_held(self.path / "lock") if beat.get("host") == HOST else None
        alive = _age(heartbeat) < STALE_SECONDS if held is None else held
        if not alive:
            return None
        return "queued" if beat.get("state") == "queued" else "running"

    def _starting(self) -> bool:
        """Whether its process was launched, has not taken the lock yet, and is not gone."""
        record_path = self.path / "launched.json"
        if (record := read_json(record_path)) is None:
            pid = self.config.get("pid")
            known = self.config.get("host") == HOST and isinstance(pid, int) and 0 < pid < 2**31
            gone = known and not psutil.pid_exists(pid)  # who laid it down and would have started it
            return not gone and _age(self.path / "config.json") < STALE_SECONDS
        if record.get("host") != HOST:
            return _age(record_path) < STALE_SECONDS
        try:
            process = psutil.Process(int(record["pid"]))
            # Another process was given the pid if it is younger, unless the clock was set: then its command line tells.
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
        """Whether it was launched before `other` on this host, and both have to take turns."""
        record = read_json(self.path / "heartbeat.json") or read_json(self.path / "launched.json") or {}
        return self.id < other.id and self.config.get("heavy", True) and record.get("host") == HOST


def read_job(path: Path) -> Job:
    """The job in this folder.

    Raises:
        InputError: when it holds none, or one of a newer format. The version in `config.json` is that of everything
            in the folder but `result.json`, which states its own.
    """
    config = read_json(path / "config.json")
    sound = config is not None and verify_checksum(config) and _is_config(config)
    if config is None or not sound or format_of(config.get("format"), FORMAT_VERSION, str(path)) is None:
        fix = way_out(path, "delete the folder")
        raise InputError(f"{path} is no job: its config.json is missing or damaged; {fix}.")
    return Job(path, todays_names(config))


def _is_config(config: Mapping[str, Any]) -> bool:
    """Whether the entries that every onlooker reads are there and of their kind; the rest is for the task to check."""
    texts = all(isinstance(config.get(name, ""), str) for name in ("model", "prompts", "objective", "position"))
    ids = all(isinstance(config.get(name), str | None) for name in ("run", "against", "imported"))
    layers = config.get("layers") or []
    numbers = isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)
    return texts and ids and numbers and all(isinstance(config.get(name), str) for name in ("kind", "created"))


def _read_end(path: Path) -> dict[str, Any] | None:
    """What `result.json` says; None when it is absent, damaged or of a newer format."""
    document = read_json(path)
    if document is None or document.get("format", 1) != FORMAT_VERSION or not verify_checksum(document):
        return None
    end: dict[str, Any] = todays_names(document)
    return end


@lru_cache(maxsize=16)
def _result(path: Path, *stamp: int) -> dict[str, Any] | None:
    """The result in a file with this inode, time and size: a page asks at every click, and reading takes a while."""
    result = (_read_end(path) or {}).get("result")
    return result if isinstance(result, dict) else None


@lru_cache(maxsize=1024)
def _ending(path: Path, *stamp: int) -> tuple[str | None, str | None]:
    """Status and error of a file with this inode, time and size: lists of jobs ask often, and results are large."""
    end = _read_end(path) or {}
    status, error = end.get("status"), end.get("error")
    return status if status in STATUSES else None, error if isinstance(error, str) else None


def reap() -> None:
    """Forget the children that have ended."""
    for path, child in list(children.items()):
        if child.poll() is not None:
            children.pop(path, None)


def _is_held(path: Path) -> bool | None:
    """Whether a process holds the lock of this file; None where locks cannot be asked for.

    Asked with a shared lock, so that two who ask at once do not take each other for the job.
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


def tail(path: Path) -> bytes:
    """The last 64 KB of a file, from the beginning of a line on; empty if it is absent."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            data = file.read()
    except FileNotFoundError:
        return b""
    return data if size <= _TAIL_BYTES else data.partition(b"\n")[2]


def _parse_events(lines: bytes, path: Path) -> list[dict[str, Any]]:
    events = []
    for line in lines.splitlines():
        try:
            event = parse_json(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and _is_event(event):
            events.append(todays_names(event))
        else:
            logger.warning("Skipped a damaged line in %s.", path)
    return events


def _is_event(event: Mapping[str, Any]) -> bool:
    """Whether a line is an event; of one with a stage all but `event` and `stage` are numbers, or None."""
    if not isinstance(event.get("event"), str):
        return False
    if event["event"] != "progress" and "stage" not in event:
        return True
    numbers = {name: entry for name, entry in event.items() if name not in ("event", "stage")}
    needed = all(isinstance(event.get(name), (int, float)) for name in ("time", "done", "total"))
    kinds = all(entry is None or isinstance(entry, (int, float)) for entry in numbers.values())
    return needed and kinds and isinstance(event.get("stage"), str)
