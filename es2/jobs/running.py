"""A job's own process: it waits for its turn, holds the lock, shows a heartbeat, logs events and writes its end.

Other processes take the lock on the job's folder as a sign of life. A request to stop arrives as a signal, or from
another host as a file, and ends the work at its next report of progress.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from es2.core.errors import Es2Error, InputError, MachineError, one_line
from es2.core.files import machine_error, with_checksum, write_json, writing
from es2.core.progress import Cancelled, Reporter, silent
from es2.jobs.events import tail
from es2.jobs.job import FORMAT_VERSION, HOST, Job, read_job
from es2.jobs.queue import list_jobs

logger = logging.getLogger(__name__)


HEARTBEAT_SECONDS = 2.0


Task = Callable[[dict[str, Any], Reporter, Path], dict[str, Any]]
"""The work of a job: from its config, a reporter and its folder to a result of JSON values.

A task that ends itself early returns `{"status": "stopped", "reason": sentence, …}`.
"""


class StoppedError(MachineError):
    """A signal to this process stopped the job that it ran, such as Ctrl-C."""


def run_job(folder: Path, tasks: Mapping[str, Task], also: Reporter = silent) -> int:
    """Run the job in `folder` in this process, write its end, and return the exit code.

    The exit code is 0 for done or stopped, 2 for bad input, 1 for anything else. An `Es2Error` ends the job as failed
    with its sentence; any other exception with a sentence that names the log, which has the traceback.

    Args:
        also: receives progress too, such as a bar in the terminal.

    Raises:
        InputError: when the folder holds no job, the job has ended, or another process runs it.
    """
    job = read_job(folder.absolute())
    with _Life(job, also) as life:
        end, exit_code = _attempt(job, tasks, life)
        document = {"format": FORMAT_VERSION, "finished": time.time()} | end
        try:
            life.write_event(event="status", status=end["status"])
            write_json(job.path / "result.json", with_checksum(document))
        except (OSError, MachineError) as error:
            logger.error("Job %s cannot record that it is %s: %s", job.id, end["status"], error)
            return 1
    return exit_code


def result_of(job: Job, exit_code: int, otherwise: str) -> dict[str, Any]:
    """The result of a job that `run_job` ran in the foreground.

    Raises:
        InputError, MachineError: by the exit code of `run_job`, with the job's sentence, when it has no result; with
            `otherwise` when it has no sentence either, such as a cancelled one; of a signal `StoppedError`.
    """
    result = job.result()
    if result is None:
        if job.status() == "cancelled" and not (job.path / "cancel").exists():
            raise StoppedError(otherwise)
        sentence = job.error() or otherwise
        raise InputError(sentence) if exit_code == InputError.exit_code else MachineError(sentence)
    return result


def _attempt(job: Job, tasks: Mapping[str, Task], life: _Life) -> tuple[dict[str, Any], int]:
    """Run the task; return the entries of `result.json`, and the exit code."""
    try:
        if job.kind not in tasks:
            raise InputError(f"Unknown kind of job {job.kind!r}; one of {', '.join(tasks)}.")
        life.check()
        with ExitStack() as turn:
            if job.config.get("heavy", True):
                turn.enter_context(_turn(job, life))
            life.enter("running")
            result = tasks[job.kind](dict(job.config), life.report, job.path)
        json.dumps(result, allow_nan=False)
        if result.get("status") == "stopped":
            return {"status": "stopped", "result": result, "error": result.get("reason")}, 0
        return {"status": "done", "result": result, "error": None}, 0
    except Exception as error:
        # A process that has to stop may fail in any way, since its children got the signal too; and a request to a job
        # inside this one reaches this one as the exception alone.
        if life.stop or isinstance(error, Cancelled):
            logger.info("Cancelled.", exc_info=not isinstance(error, Cancelled))
            return {"status": "cancelled", "result": None, "error": None}, 1
        if isinstance(error, Es2Error):
            logger.error("%s", error)
            return {"status": "failed", "result": None, "error": str(error)}, error.exit_code
        logger.exception("Job %s failed unexpectedly.", job.id)
        what = one_line(f"{type(error).__name__}: {error}")
        log = job.path / "log.txt"  # of a process of its own; in the foreground stderr has it
        details = f"; {log} has the details" if log.is_file() else ""
        sentence = f"The {job.kind} job failed unexpectedly ({what}){details}."
        return {"status": "failed", "result": None, "error": sentence}, 1


def heavy_limit() -> int:
    """Number of heavy jobs of one host that may run at once: `$ES2_HEAVY_JOBS`, or 1. Raises `InputError`."""
    stated = os.environ.get("ES2_HEAVY_JOBS") or "1"
    if not (stated.isascii() and stated.isdigit() and int(stated[:9]) >= 1):
        raise InputError(f"ES2_HEAVY_JOBS must be a whole number of at least 1, not {stated[:40]!r}.")
    return int(stated[:9])


def jobs_ahead(job: Job) -> list[Job]:
    """The unended heavy jobs of this host that were launched before a heavy job; none for a light one."""
    if not job.config.get("heavy", True):
        return []
    unended = (other for other in list_jobs(job.path.parent) if not (other.path / "result.json").exists())
    return [other for other in unended if other.is_ahead_of(job) and other.is_active()]


@contextmanager
def _turn(job: Job, life: _Life) -> Iterator[None]:
    """Hold one of the host's turns, once fewer earlier heavy jobs are left than may run at once."""
    names = [f".turn-{HOST}.lock", *(f".turn-{HOST}-{number}.lock" for number in range(2, heavy_limit() + 1))]
    turns = [FileLock(job.path.parent / name) for name in names]
    ahead = jobs_ahead(job)
    n_at_first = len(ahead)
    while True:
        life.check()
        ahead = [other for other in ahead if other.is_active()]
        # A later job may hold a turn, from before this one was resumed.
        if len(ahead) < len(turns) and (turn := next(filter(_try, turns), None)) is not None:
            break
        life.also("queue", n_at_first - len(ahead), n_at_first)
        time.sleep(0.2)
    try:
        yield
    finally:
        turn.release()


def _try(lock: FileLock) -> bool:
    """Take a lock, unless another process holds it. Raises `MachineError`."""
    with writing(Path(lock.lock_file)):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
    return True


class _Life:
    """The duties of a job's process beside its work: lock, heartbeat, events, and requests to stop."""

    def __init__(self, job: Job, also: Reporter) -> None:
        self.job = job
        self.also = also
        self.stop = False
        self._over = threading.Event()
        self._beat = threading.Thread(target=self._show_heartbeat, daemon=True)
        self._last: tuple[str, float] = ("", 0.0)
        self._stack = ExitStack()

    def __enter__(self) -> _Life:
        path = self.job.path
        with ExitStack() as stack:
            lock = FileLock(path / "lock")
            try:
                lock.acquire(timeout=2)  # not 0: `Job.status` takes the lock for a moment, too
                stack.callback(lock.release)
                self._events = stack.enter_context((path / "events.jsonl").open("ab", buffering=0))
            except Timeout:
                raise InputError(f"Job {self.job.id} is being run by another process.") from None
            except OSError as error:
                raise machine_error(error, path) from error
            if (end := self.job.ending()) is not None:
                raise InputError(f"Job {self.job.id} has ended already ({end}).")
            if (written := tail(path / "events.jsonl")) and not written.endswith(b"\n"):
                self._events.write(b"\n")  # a partial line of a killed process must not spoil the next one
            # Python takes signals in the main thread alone.
            own = threading.current_thread() is threading.main_thread()
            for number in (signal.SIGTERM, signal.SIGINT) if own else ():
                stack.callback(signal.signal, number, signal.signal(number, self._on_signal))
            self.enter("queued")
            self._beat.start()
            stack.callback(self._beat.join)
            stack.callback(self._over.set)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def enter(self, state: str) -> None:
        """Show that the job is now `queued` or `running`."""
        with writing(self.job.path):
            write_json(self.job.path / "heartbeat.json", {"host": HOST, "pid": os.getpid(), "state": state})
        self.write_event(event="status", status=state)

    def check(self) -> None:
        """Raise `Cancelled` when a request to stop has arrived."""
        self.stop = self.stop or (self.job.path / "cancel").exists()
        if self.stop:
            raise Cancelled

    def report(self, stage: str, done: int, total: int, **numbers: float) -> None:
        """The `Reporter` of the task. At most ten events a second, unless they carry numbers or end a stage."""
        if self.stop:
            raise Cancelled
        self.also(stage, done, total, **numbers)
        now = time.monotonic()
        if stage == self._last[0] and now - self._last[1] < 0.1 and done < total and not numbers:
            return
        self._last = (stage, now)
        finite = {name: float(number) if math.isfinite(number) else None for name, number in numbers.items()}
        self.write_event(event="progress", stage=stage, done=int(done), total=int(total), **finite)

    def write_event(self, **entries: Any) -> None:
        """Append one line to `events.jsonl`. Raises `MachineError` when the disk refuses."""
        line = json.dumps({"time": time.time(), **entries}, ensure_ascii=False)
        with writing(self.job.path / "events.jsonl"):
            self._events.write(line.encode() + b"\n")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop = True

    def _show_heartbeat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            if not self.job.path.is_dir():
                self.stop = True  # the folder was removed, so that no result is wanted
                break
            if (self.job.path / "cancel").exists():
                self.stop = True  # the request of another host
            try:
                os.utime(self.job.path / "heartbeat.json")
            except OSError as error:
                logger.warning("The heartbeat of job %s cannot be written: %s", self.job.id, error)
