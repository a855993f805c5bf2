"""Jobs, work in processes of its own: creating, starting and finding them.

Work that needs torch runs apart from the app, so that a crash cannot take the app down and closing the browser stops
nothing. Both sides share a folder under `runs/` (`es2.jobs.job`). Jobs wait for their turn without a scheduler.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from es2.core.errors import InputError, MachineError
from es2.core.files import home, machine_error, shipped, with_checksum, write_json, writing
from es2.jobs.job import ACTIVE, FORMAT_VERSION, HOST, Job, children, read_job, reap

logger = logging.getLogger(__name__)
_COMMAND = (sys.executable, "-P", "-m", "es2", "job")  # -P: no module of the current folder is taken for a library
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9]{6}-[a-z][a-z0-9]{0,31}-[0-9a-f]{6}")
_KIND = re.compile(r"[a-z][a-z0-9]{0,31}")
_OWN_ENTRIES = ("format", "kind", "created", "heavy", "host", "pid", "digest")


def create_job(kind: str, config: Mapping[str, Any], *, root: Path | None = None, heavy: bool = True) -> Job:
    """A new job in a folder of its own, for `start` or `run_job`.

    Args:
        config: the task's settings, as JSON values.
        root: the folder of all jobs; `home()/runs` if not given.
        heavy: whether it takes turns with the other heavy jobs of this host.

    Raises:
        MachineError: when the folder cannot be written; nothing is left behind.
    """
    if not _KIND.fullmatch(kind) or any(name in config for name in _OWN_ENTRIES):
        raise ValueError(f"A job's kind is a lower-case word and its config has no {', '.join(_OWN_ENTRIES)}.")
    now = datetime.now(UTC)
    path = _root(root) / f"{now:%Y%m%d-%H%M%S-%f}-{kind}-{secrets.token_hex(3)}"
    own = {"format": FORMAT_VERSION, "kind": kind, "created": now.isoformat(), "heavy": heavy}
    own |= {"host": HOST, "pid": os.getpid()}
    try:
        path.mkdir(parents=True)
        write_json(path / "config.json", with_checksum(own | dict(config)))
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise machine_error(error, path) from error
    return read_job(path)


def start(job: Job, command: Sequence[str] | None = None) -> None:
    """Start a process for a job that has no process and no end. Raises `MachineError`.

    `command` gets the folder as its last argument; `python -m es2 job` if not given.
    """
    reap()
    child = None
    try:
        with (job.path / "log.txt").open("ab") as log:
            child = subprocess.Popen(
                [*(command or _COMMAND), str(job.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        write_json(job.path / "launched.json", {"host": HOST, "pid": child.pid, "time": time.time()})
    except OSError as error:
        if child is not None:
            child.kill()
            child.wait()
        raise machine_error(error, job.path) from error
    children[job.path] = child
    _collect(child)


def _collect(child: subprocess.Popen[bytes]) -> None:
    """Wait for a child in the background, so that it leaves no zombie."""
    threading.Thread(target=child.wait, daemon=True).start()


def launch(
    kind: str,
    config: Mapping[str, Any],
    *,
    root: Path | None = None,
    heavy: bool = True,
    command: Sequence[str] | None = None,
) -> Job:
    """A new job that was started; arguments and errors as for `create_job` and `start`. A failure leaves nothing."""
    job = create_job(kind, config, root=root, heavy=heavy)
    try:
        start(job, command)
    except MachineError:
        shutil.rmtree(job.path, ignore_errors=True)
        raise
    return job


def reopen(job: Job) -> None:
    """Remove a job's end, so that it can be started again and continues.

    Raises:
        InputError: when it is queued, running, done or shipped.
        MachineError: when the folder cannot be written.
    """
    job.check_own()
    status = job.status()
    if status in (*ACTIVE, "done"):
        raise InputError(f"Job {job.id} is {status}; only one that ended before its time can be resumed.")
    with writing(job.path):
        # The end goes last: until then the job counts as ended.
        for name in ("heartbeat.json", "launched.json", "cancel", "result.json"):
            (job.path / name).unlink(missing_ok=True)


def list_jobs(root: Path | None = None, kind: str | None = None) -> list[Job]:
    """The readable jobs (of one kind), newest first; others are skipped with a warning."""
    folder = _root(root)
    jobs = []
    for path in sorted(folder.iterdir() if folder.is_dir() else (), reverse=True):
        if not _ID.fullmatch(path.name) or not (path / "config.json").exists():
            continue  # no job, or one that is being created
        try:
            job = read_job(path)
        except InputError as error:
            logger.warning("%s", error)
            continue
        if kind in (None, job.kind):
            jobs.append(job)
    return jobs


def find_jobs(kind: str, config: Mapping[str, Any], root: Path | None = None) -> list[Job]:
    """The jobs of this kind whose config includes `config`, and no `rendering` beside it, newest first."""
    wanted = {"rendering": None} | dict(config)
    return [job for job in list_jobs(root, kind) if {name: job.config.get(name) for name in wanted} == wanted]


def open_job(id: str, root: Path | None = None) -> Job:
    """The job of this id, in `root` or shipped. Raises `InputError` when there is none, or it is of a newer format."""
    for folder in (_root(root), shipped() / "runs"):
        if _ID.fullmatch(id) and (folder / id).is_dir():
            return read_job(folder / id)
    raise InputError(f"There is no job {id[:80]!r} in {_root(root)}; `es2 runs` lists those there are.")


def _root(root: Path | None) -> Path:
    return (root or home() / "runs").absolute()
