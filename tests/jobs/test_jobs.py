"""Jobs as real processes: every status, the queue, cancelling, killing, and machines that refuse."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from es2.core.errors import InputError, MachineError
from es2.core.progress import Cancelled, Reporter, silent
from es2.jobs import job as job_folder
from es2.jobs import queue as jobs
from es2.jobs import running
from es2.jobs.job import Job
from es2.jobs.queue import launch, list_jobs, open_job
from es2.jobs.running import jobs_ahead, run_job

WORKER = """
import subprocess, sys, time
from pathlib import Path
from es2.core.errors import InputError, MachineError
from es2.jobs.running import run_job

def note(config, text):
    with open(config["notes"], "a") as file:
        file.write(text + "\\n")

def work(config, report, folder):
    note(config, config["name"])
    print("working", flush=True)
    report("work", 1, 2, loss=0.5)
    try:
        while not Path(config["gate"]).exists():
            report("wait", 0, 1)
            time.sleep(0.02)
        report("work", 2, 2)
        return {"name": config["name"]}
    finally:
        note(config, "left " + config["name"])

def refuse(config, report, folder):
    raise InputError("The prompt set has one label only; give both.")

def break_down(config, report, folder):
    raise RuntimeError("secret\\ndetail")

def stop(config, report, folder):
    return {"status": "stopped", "reason": "The KL budget is spent.", "steps": 3}

def no_json(config, report, folder):
    return {"loss": float("nan")}

def deaf(config, report, folder):
    report("deaf", 0, 1)
    time.sleep(600)

def parent(config, report, folder):
    child = subprocess.Popen(["sleep", "600"])
    note(config, str(child.pid))
    report("child", 0, 1)
    if child.wait() != 0:
        raise MachineError("The download failed.")

tasks = {f.__name__.replace("_", ""): f for f in (work, refuse, break_down, stop, no_json, deaf, parent)}
sys.exit(run_job(Path(sys.argv[1]), tasks))
"""

SLEEPER = ["sh", "-c", "exec sleep 600"]
"""A process that never comes as far as the lock."""

Launch = Callable[..., Job]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def start(tmp_path: Path, root: Path) -> Iterator[Launch]:
    """Launch a job of the test worker; whatever still lives at the end of the test is killed."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    started: list[subprocess.Popen[bytes]] = []

    def start_job(kind: str, name: str = "a", **options: Any) -> Job:
        config = {"name": name, "notes": str(tmp_path / "notes"), "gate": str(tmp_path / "gate")}
        job = launch(kind, config, root=root, **{"command": [sys.executable, str(worker)]} | options)
        started.append(job_folder.children[job.path])
        return job

    yield start_job
    for process in started:
        with contextlib.suppress(ProcessLookupError):  # it may end, and be waited for by `launch`, meanwhile
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def wait_until(job: Job, end: str) -> None:
    wait_for(lambda: not job.is_active())
    assert job.status() == end, job.log_tail()


def wait_for_work(job: Job) -> None:
    """Until the task itself is at work, not only its process."""
    wait_for(lambda: job.progress() is not None)


def open_gate(tmp_path: Path) -> None:
    (tmp_path / "gate").touch()


def notes(tmp_path: Path) -> list[str]:
    path = tmp_path / "notes"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def states(job: Job) -> list[str]:
    return [event["status"] for event in job.events()[0] if event["event"] == "status"]


def seen_by_an_onlooker(job: Job) -> str:
    """The status as a process sees it that is not the job's parent and can reap nothing."""
    code = (
        "import sys; from pathlib import Path; from es2.jobs.queue import open_job\n"
        "path = Path(sys.argv[1]); print(open_job(path.name, path.parent).status())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(job.path)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def create_job(root: Path, kind: str = "work", **config: Any) -> Path:
    """A job's folder as a scheduler would find it, without a process."""
    path = root / f"20260101-120000-000000-{kind}-0123ab"
    path.mkdir(parents=True)
    entries = {"format": 1, "kind": kind, "created": "2026-01-01T12:00:00+00:00", "heavy": True} | config
    (path / "config.json").write_text(json.dumps(entries))
    return path


# ------------------------------------------------------------------------------------------------------------- the end


def test_a_job_that_is_done(start: Launch, tmp_path: Path, root: Path) -> None:
    job = start("work")
    assert job.path.parent == root
    assert job.status() == "queued"
    wait_for_work(job)
    assert job.status() == "running"
    assert seen_by_an_onlooker(job) == "running"
    assert job.result() is None
    pid = job_folder.children[job.path].pid
    open_gate(tmp_path)
    wait_until(job, "done")
    assert job.result() == {"name": "a"}
    assert job.error() is None
    assert states(job) == ["queued", "running", "done"]
    steps = [event for event in job.events()[0] if event["event"] == "progress"]
    assert [(event["stage"], event["done"], event["total"]) for event in steps[:2]] == [("work", 1, 2), ("wait", 0, 1)]
    assert steps[0]["loss"] == 0.5
    assert job.log_tail() == ["working"]
    wait_for(lambda: job.status() and job.path not in job_folder.children)
    assert not psutil.pid_exists(pid)
    assert open_job(job.id, root) == job


@pytest.mark.parametrize(
    ("kind", "status", "words", "exit_code"),
    [
        ("refuse", "failed", "^The prompt set has one label only; give both.$", 2),
        (
            "breakdown",
            "failed",
            r"^The breakdown job failed unexpectedly \(RuntimeError: secret detail\); .*log.txt",
            1,
        ),
        ("nojson", "failed", "failed unexpectedly .*Out of range", 1),
        ("nosuch", "failed", "Unknown kind of job 'nosuch'; one of work, ", 2),
        ("stop", "stopped", "^The KL budget is spent.$", 0),
    ],
)
def test_other_ends(start: Launch, kind: str, status: str, words: str, exit_code: int) -> None:
    job = start(kind)
    assert job_folder.children[job.path].wait(60) == exit_code
    assert job.status() == status
    assert re.search(words, str(job.error()))
    returned = {"status": "stopped", "reason": "The KL budget is spent.", "steps": 3}
    assert job.result() == (returned if status == "stopped" else None)
    assert ("Traceback" in "\n".join(job.log_tail(50))) == (kind in ("breakdown", "nojson"))


def test_an_end_that_nobody_looks_at_leaves_no_zombie(start: Launch) -> None:
    job = start("refuse")
    pid = job_folder.children[job.path].pid
    wait_for(lambda: not psutil.pid_exists(pid))


def leave_zombies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another parent may."""
    monkeypatch.setattr(jobs, "_collect", lambda child: None)


def test_killed_with_no_chance_to_say_so(start: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_zombies(monkeypatch)
    job = start("work")
    wait_for_work(job)
    process = psutil.Process(job_folder.children[job.path].pid)
    process.kill()
    wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert seen_by_an_onlooker(job) == "interrupted", "a zombie is not alive"
    assert job.status() == "interrupted"
    wait_for(lambda: job.status() and not process.is_running())
    assert "ended without a result" in str(job.error())
    job.cancel()
    assert job.status() == "interrupted"


def test_a_process_that_never_reaches_the_lock(start: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_zombies(monkeypatch)
    job = start("work", command=SLEEPER)
    assert job.status() == seen_by_an_onlooker(job) == "queued"
    process = psutil.Process(job_folder.children[job.path].pid)
    process.kill()
    wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert seen_by_an_onlooker(job) == "interrupted"
    wait_until(job, "interrupted")


def test_a_clock_that_is_set_back_after_the_launch(start: Launch) -> None:
    job = start("work", command=[sys.executable, "-c", "import time; time.sleep(600)"])
    record = json.loads((job.path / "launched.json").read_text())
    (job.path / "launched.json").write_text(json.dumps(record | {"time": record["time"] - 3600}))
    assert job.status() == seen_by_an_onlooker(job) == "queued"
    job_folder.children[job.path].kill()
    wait_until(job, "interrupted")


# ---------------------------------------------------------------------------------------------------------- the queue


def test_heavy_jobs_take_turns_in_the_order_of_their_launch(start: Launch, tmp_path: Path) -> None:
    heavy = [start("work", name) for name in "abcd"]
    light = start("work", "light", heavy=False)
    wait_for_work(heavy[0])
    wait_for_work(light)
    wait_for(lambda: all("queued" in states(job) for job in heavy))
    assert [job.status() for job in (*heavy, light)] == ["running", "queued", "queued", "queued", "running"]
    open_gate(tmp_path)
    for job in heavy:
        wait_until(job, "done")
    order = [note for note in notes(tmp_path) if "light" not in note]
    assert order == ["a", "left a", "b", "left b", "c", "left c", "d", "left d"]


def test_a_queued_job_that_is_cancelled_never_starts(start: Launch, tmp_path: Path) -> None:
    first, second, third = (start("work", name) for name in "abc")
    wait_for_work(first)
    wait_for(lambda: states(second) == ["queued"])
    second.cancel()
    wait_until(second, "cancelled")
    assert states(second) == ["queued", "cancelled"]
    open_gate(tmp_path)
    wait_until(third, "done")
    assert notes(tmp_path) == ["a", "left a", "c", "left c"]


def test_an_earlier_job_that_comes_late_waits_for_the_one_at_work(start: Launch, tmp_path: Path, root: Path) -> None:
    root.mkdir()
    open_gate(tmp_path)
    with FileLock(root / f".turn-{job_folder.HOST}.lock"):
        job = start("work")
        wait_for(lambda: states(job) == ["queued"])
        time.sleep(0.5)
        assert job.status() == "queued"
        assert notes(tmp_path) == []
    wait_until(job, "done")


def test_the_death_of_a_job_passes_the_turn_on(start: Launch, tmp_path: Path) -> None:
    first, second, third = (start("work", name) for name in "abc")
    wait_for_work(first)
    wait_for(lambda: states(second) == states(third) == ["queued"])
    for job in (second, first):
        os.kill(job_folder.children[job.path].pid, signal.SIGKILL)
    open_gate(tmp_path)
    wait_until(third, "done")
    assert [job.status() for job in (first, second)] == ["interrupted", "interrupted"]
    assert notes(tmp_path) == ["a", "c", "left c"]


def test_as_many_run_at_once_as_the_environment_says(
    start: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ES2_HEAVY_JOBS", "2")
    jobs_ = [start("work", name) for name in "abcd"]
    for job in jobs_[:2]:
        wait_for_work(job)
    wait_for(lambda: all("queued" in states(job) for job in jobs_))
    assert [job.status() for job in jobs_] == ["running", "running", "queued", "queued"]
    assert [len(jobs_ahead(job)) for job in jobs_] == [0, 1, 2, 3]
    os.kill(job_folder.children[jobs_[0].path].pid, signal.SIGKILL)
    wait_for_work(jobs_[2])
    assert [job.status() for job in jobs_] == ["interrupted", "running", "running", "queued"]
    open_gate(tmp_path)
    for job in jobs_[1:]:
        wait_until(job, "done")


def test_light_jobs_and_those_of_other_hosts_are_not_waited_for(start: Launch, tmp_path: Path) -> None:
    light = start("work", "light", heavy=False)
    wait_for_work(light)
    elsewhere = start("work", "elsewhere")
    wait_for_work(elsewhere)
    heartbeat = elsewhere.path / "heartbeat.json"
    heartbeat.write_text(heartbeat.read_text().replace(job_folder.HOST, "another-host"))
    job = start("work", "here")
    wait_for(lambda: "queued" in states(job))
    assert elsewhere.is_active()
    assert jobs_ahead(job) == []
    assert jobs_ahead(light) == []
    open_gate(tmp_path)
    wait_until(job, "done")


@pytest.mark.parametrize("stated", ["0", "-1", "two", "1.5"])
def test_a_limit_that_is_none(root: Path, monkeypatch: pytest.MonkeyPatch, stated: str) -> None:
    monkeypatch.setenv("ES2_HEAVY_JOBS", stated)
    path = create_job(root)
    assert run_job(path, {"work": lambda config, report, folder: {}}) == 2
    assert f"ES2_HEAVY_JOBS must be a whole number of at least 1, not '{stated}'" in str(
        open_job(path.name, root).error()
    )


def test_the_command_line_says_how_many_are_ahead(
    start: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, es2: Callable[..., tuple[int, dict[str, Any]]]
) -> None:
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    first, second = (start("finetune", name, command=SLEEPER) for name in "ab")
    code, document = es2("runs")
    assert code == 0
    assert [(row["run"], row["status"], row["jobs_ahead"]) for row in document["runs"]] == [
        (second.id, "queued", 1),
        (first.id, "queued", 0),
    ]


def test_who_waits_in_the_foreground_is_told(root: Path, start: Launch, tmp_path: Path) -> None:
    first = start("work")
    wait_for_work(first)
    told: list[tuple[str, int, int]] = []

    def listen(stage: str, done: int, total: int, **numbers: float) -> None:
        told.append((stage, done, total))
        open_gate(tmp_path)

    job = jobs.create_job("work", {}, root=root)
    assert run_job(job.path, {"work": lambda config, report, folder: {}}, listen) == 0
    assert told[0] == ("queue", 0, 1)


def test_laid_down_by_a_process_that_died(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from es2.jobs.queue import create_job\n"
        "job = create_job('work', {}, root=Path(sys.argv[1])); print(job.id, job.status())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True)
    id, seen = done.stdout.split()
    assert seen == "queued"
    assert open_job(id, root).status() == "interrupted"


# --------------------------------------------------------------------------------------------------------- cancelling


def test_a_running_job_stops_at_its_next_step(start: Launch, tmp_path: Path) -> None:
    job = start("work")
    wait_for_work(job)
    process = job_folder.children[job.path]
    job.cancel()
    assert process.wait(60) == 1
    assert job.status() == "cancelled"
    assert (job.result(), job.error()) == (None, None)
    assert notes(tmp_path) == ["a", "left a"], "what the task holds is released"
    assert states(job) == ["queued", "running", "cancelled"]


def test_cancelled_before_its_process_is_ready(start: Launch) -> None:
    job = start("work", command=SLEEPER)
    job.cancel()
    wait_until(job, "cancelled")
    assert job.error() is None


def test_a_request_that_came_before_the_start_is_obeyed(root: Path) -> None:
    path = create_job(root, heavy=False)
    (path / "cancel").touch()
    assert run_job(path, {"work": lambda config, report, folder: {}}) == 1
    assert open_job(path.name, root).status() == "cancelled"


def test_what_a_job_started_is_stopped_with_it(start: Launch, tmp_path: Path) -> None:
    job = start("parent")
    wait_for_work(job)
    child = psutil.Process(int(notes(tmp_path)[0]))
    job.cancel()
    wait_until(job, "cancelled")
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_job_that_does_not_listen_is_killed_when_asked_again(start: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    job = start("deaf")
    wait_for_work(job)
    process = job_folder.children[job.path]
    job.cancel()
    job.cancel()
    assert job.status() == "running", "asked twice at once is asked once"
    monkeypatch.setattr(job_folder, "KILL_AFTER_SECONDS", -1.0)
    job.cancel()
    assert process.wait(60) == -signal.SIGKILL
    assert job.status() == "cancelled"


def test_interrupted_from_the_keyboard(start: Launch) -> None:
    job = start("work")
    wait_for_work(job)
    process = job_folder.children[job.path]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 1
    assert job.status() == "cancelled"


def test_a_request_without_a_signal_arrives_with_the_heartbeat(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "HEARTBEAT_SECONDS", 0.02)
    path = create_job(root)
    heartbeat = path / "heartbeat.json"

    def work(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
        os.utime(heartbeat, (0, 0))
        wait_for(lambda: heartbeat.stat().st_mtime > 0)
        (path / "cancel").touch()
        for _ in range(1000):
            report("work", 0, 1)
            time.sleep(0.01)
        return {}

    assert run_job(path, {"work": work}) == 1
    assert open_job(path.name, root).status() == "cancelled"


# ----------------------------------------------------------------------------------------------------- in this process


def test_only_one_process_runs_a_job_and_only_once(start: Launch, tmp_path: Path) -> None:
    job = start("work")
    wait_for_work(job)
    with pytest.raises(InputError, match="being run by another process"):
        run_job(job.path, {})
    assert job.status() == "running"
    open_gate(tmp_path)
    wait_until(job, "done")
    with pytest.raises(InputError, match=r"has ended already \(done\)"):
        run_job(job.path, {})
    with pytest.raises(InputError, match="is no job"):
        run_job(tmp_path, {})


def test_what_a_killed_process_began_to_write_spoils_nothing(root: Path) -> None:
    path = create_job(root)
    (path / "events.jsonl").write_text('{"event": "progress", "stage": "wo')
    assert run_job(path, {"work": lambda config, report, folder: {"kind": config["kind"]}}) == 0
    job = open_job(path.name, root)
    assert states(job) == ["queued", "running", "done"]
    assert job.result() == {"kind": "work"}


def test_events_are_few_and_valid(root: Path) -> None:
    def work(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
        for done in range(1, 5001):
            report("many", done, 5000)
        report("numbers", 1, 3, loss=float("nan"), kl=0.25)
        report("numbers", 2, 3, loss=float("inf"), kl=0.5)
        return {}

    path = create_job(root)
    assert run_job(path, {"work": work}) == 0
    assert "NaN" not in (path / "events.jsonl").read_text()
    steps = [event for event in open_job(path.name, root).events()[0] if event["event"] == "progress"]
    many = [event["done"] for event in steps if event["stage"] == "many"]
    assert many[0] == 1
    assert many[-1] == 5000
    assert len(many) < 1000
    assert [(event["loss"], event["kl"]) for event in steps[len(many) :]] == [(None, 0.25), (None, 0.5)]


def test_signal_handlers_are_given_back(root: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run_job(create_job(root), {"work": lambda config, report, folder: {}})
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_silent_says_nothing() -> None:
    reporter: Reporter = silent
    assert reporter("stage", 1, 2, loss=0.1) is None
    assert issubclass(Cancelled, Exception)


# ------------------------------------------------------------------------------------------------- finding and refusing


def test_list_jobs(start: Launch, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert list_jobs(root) == []
    first, second = start("stop"), start("refuse")
    (root / "notes").mkdir()
    (root / first.id.replace("stop", "laid")).mkdir()
    assert list_jobs(root) == [second, first]
    assert list_jobs(root, "stop") == [first]
    wait_until(second, "failed")
    (second.path / "config.json").write_text("{")
    assert list_jobs(root) == [first]
    assert "config.json is missing or damaged" in caplog.text
    with pytest.raises(InputError, match="is no job"):
        open_job(second.id, root)


def test_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))
    job = launch("work", {}, command=["true"])
    assert job.path.parent == tmp_path / "home" / "runs"
    assert list_jobs() == [open_job(job.id)] == [job]
    job_folder.children[job.path].wait(60)
    assert job.status() == "interrupted"


@pytest.mark.parametrize(
    "name", ["..", "../runs", "a/../b", "/etc", "", ".", "x" * 500, "20260101-120000-000000-work-0123ab\n"]
)
def test_an_id_never_becomes_a_path(root: Path, name: str) -> None:
    create_job(root)
    with pytest.raises(InputError, match="There is no job"):
        open_job(name, root)


def test_an_unknown_id(root: Path) -> None:
    with pytest.raises(InputError, match="`es2 runs` lists"):
        open_job("20260101-120000-000000-work-0123ab", root)


@pytest.mark.parametrize(
    ("kind", "config"), [("../x", {}), ("Work", {}), ("work", {"kind": "other"}), ("work", {"heavy": 1})]
)
def test_a_launch_that_contradicts_itself(root: Path, kind: str, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lower-case word"):
        launch(kind, config, root=root)
    assert not root.exists()


def test_a_launch_that_the_machine_refuses(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="Cannot write"):
        launch("work", {}, root=tmp_path / "file" / "runs")
    with pytest.raises(MachineError, match="No such file"):
        launch("work", {}, root=root, command=["/nowhere/python"])
    pids: list[int] = []
    write_json = jobs.write_json

    def fill_up(path: Path, document: dict[str, Any]) -> None:
        if path.name == "launched.json":
            pids.append(document["pid"])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_json(path, document)

    monkeypatch.setattr(jobs, "write_json", fill_up)
    with pytest.raises(MachineError, match="No space is left"):
        launch("work", {}, root=root, command=SLEEPER)
    assert not psutil.pid_exists(pids[0])
    assert list(root.iterdir()) == []


def test_a_disk_that_fills_up_during_a_job(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json = running.write_json

    def fill_up(path: Path, document: dict[str, Any]) -> None:
        if path.name == "result.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_json(path, document)

    path = create_job(root)
    monkeypatch.setattr(running, "write_json", fill_up)
    assert run_job(path, {"work": lambda config, report, folder: {}}) == 1
    assert open_job(path.name, root).status() == "interrupted"


def test_the_folder_of_all_jobs_removed_underfoot(start: Launch, root: Path) -> None:
    job = start("work")
    wait_for_work(job)
    process = job_folder.children[job.path]
    shutil.rmtree(root)
    assert list_jobs(root) == []
    assert job.status() == "interrupted"
    assert "was removed" in str(job.error())
    job.cancel()
    assert process.wait(60) == 1, "it sees with its next heartbeat that nobody wants its result"
    assert not root.exists()
