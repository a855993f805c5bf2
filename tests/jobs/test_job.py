"""A job as its folder shows it, from folders laid down by hand."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from es2.core.errors import InputError
from es2.core.progress import seconds_left
from es2.jobs.job import FORMAT_VERSION, HOST, STALE_SECONDS, Job, read_job

ID = "20260101-120000-000000-prepare-0123ab"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    path = tmp_path / ID
    path.mkdir()
    write(path / "config.json", format=FORMAT_VERSION, kind="prepare", created="2026-01-01T12:00:00+00:00", surprise=1)
    return read_job(path)


def write(path: Path, *, age: float = 0.0, **document: Any) -> None:
    path.write_text(json.dumps(document))
    then = time.time() - age
    os.utime(path, (then, then))


def log_events(job: Job, text: str) -> None:
    with (job.path / "events.jsonl").open("a") as file:
        file.write(text)


def step(done: int, time: float, stage: str = "capture", total: int = 10) -> dict[str, Any]:
    return {"event": "progress", "stage": stage, "done": done, "total": total, "time": time}


# ------------------------------------------------------------------------------------------------------------- config


def test_what_the_config_says(job: Job) -> None:
    assert (job.id, job.kind, job.created) == (ID, "prepare", "2026-01-01T12:00:00+00:00")
    assert job.config["surprise"] == 1


@pytest.mark.parametrize("config", [None, "", "{}", "[]", '{"format": 1, "kind": 3, "created": ""}'])
def test_a_folder_that_is_no_job(job: Job, config: str | None) -> None:
    (job.path / "config.json").unlink()
    if config is not None:
        (job.path / "config.json").write_text(config)
    with pytest.raises(InputError, match="is no job"):
        read_job(job.path)


@pytest.mark.parametrize(
    ("version", "sentence"),
    [(FORMAT_VERSION + 1, "newer ES2 Workbench"), ("1", "is no job"), (0, "is no job")],
)
def test_a_config_of_another_format_is_refused(job: Job, version: object, sentence: str) -> None:
    write(job.path / "config.json", **{**job.config, "format": version})
    with pytest.raises(InputError, match=sentence):
        read_job(job.path)


# ------------------------------------------------------------------------------------------------------------- status


def test_a_job_of_another_host_is_judged_by_its_heartbeat(job: Job) -> None:
    heartbeat = job.path / "heartbeat.json"
    (job.path / "lock").touch()
    for state in ("queued", "running"):
        write(heartbeat, host="elsewhere", pid=1, state=state)
        assert job.status() == state
    write(heartbeat, age=STALE_SECONDS + 1, host="elsewhere", pid=1, state="running")
    assert job.status() == "interrupted"
    (job.path / "cancel").touch()
    assert job.status() == "cancelled"


def test_a_request_to_cancel_reaches_another_host_by_the_folder(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_signal(*_args: object) -> None:
        raise AssertionError("a process of this host was signalled")

    for name in ("kill", "killpg"):
        monkeypatch.setattr(os, name, no_signal)
    write(job.path / "heartbeat.json", host="elsewhere", pid=os.getpid(), state="running")
    job.cancel()
    assert (job.path / "cancel").exists()
    assert job.status() == "running", "until its process has seen the request"


def test_a_fresh_heartbeat_of_this_host_without_its_lock_is_no_life(job: Job) -> None:
    write(job.path / "heartbeat.json", host=HOST, pid=os.getpid(), state="running")
    assert job.status() == "interrupted"
    (job.path / "lock").touch()
    assert job.status() == "interrupted"


def test_where_locks_cannot_be_asked_for_the_heartbeat_decides(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_args: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("es2.jobs.job.fcntl.flock", unsupported)
    (job.path / "lock").touch()
    write(job.path / "heartbeat.json", host=HOST, pid=1, state="running")
    assert job.status() == "running"
    write(job.path / "heartbeat.json", age=STALE_SECONDS + 1, host=HOST, pid=1, state="running")
    assert job.status() == "interrupted"


def test_before_the_lock_the_launched_process_decides(job: Job) -> None:
    assert job.status() == "queued", "its launcher has a moment to write down the process"
    write(job.path / "config.json", age=STALE_SECONDS + 1, **job.config)
    assert job.status() == "interrupted"
    launched = job.path / "launched.json"
    write(launched, host=HOST, pid=os.getpid(), time=time.time())
    assert job.status() == "queued"
    write(launched, host=HOST, pid=os.getpid(), time=0.0)
    assert job.status() == "interrupted", "the pid was given to a younger process"
    write(launched, host=HOST, pid=2**22 + 1, time=time.time())
    assert job.status() == "interrupted"
    write(launched, host="elsewhere", pid=1, time=time.time())
    assert job.status() == "queued"
    write(launched, age=STALE_SECONDS + 1, host="elsewhere", pid=1, time=time.time())
    assert job.status() == "interrupted"


@pytest.mark.parametrize("status", ["done", "stopped", "failed", "cancelled"])
def test_the_result_has_the_last_word(job: Job, status: str) -> None:
    write(job.path / "heartbeat.json", host="elsewhere", pid=1, state="running")
    write(job.path / "result.json", format=1, status=status, result={"x": 1}, error="Why.")
    assert job.status() == status
    assert job.result() == {"x": 1}
    assert job.error() == "Why."
    job.cancel()
    assert not (job.path / "cancel").exists()


def test_a_damaged_result_is_none(job: Job) -> None:
    write(job.path / "config.json", age=STALE_SECONDS + 1, **job.config)
    for text in ("", "{", '{"status": "splendid"}', '{"status": "done"'):
        (job.path / "result.json").write_text(text)
        assert job.status() == "interrupted"
        assert job.result() is None
        assert f"The result of job {job.id} is damaged" in str(job.error())


# ------------------------------------------------------------------------------------------------------------- events


def test_events_are_read_on_from_where_one_stopped(job: Job) -> None:
    assert job.events() == ([], 0)
    log_events(job, '{"event": "a"}\n{"event": "ü"}\n{"eve')
    events, offset = job.events()
    assert [event["event"] for event in events] == ["a", "ü"]
    assert job.events(offset) == ([], offset)
    log_events(job, 'nt": "c"}\n')
    events, end = job.events(offset)
    assert events == [{"event": "c"}]
    assert end == (job.path / "events.jsonl").stat().st_size


@pytest.mark.parametrize("line", ["{", "[]", "", '{"a": 1}{"b": 2}', "\ufffd", "[" * 100_000])
def test_a_damaged_line_is_skipped(job: Job, line: str, caplog: pytest.LogCaptureFixture) -> None:
    log_events(job, f'{{"event": "a"}}\n{line}\n{{"event": "b"}}\n')
    assert [event["event"] for event in job.events()[0]] == ["a", "b"]
    assert "damaged line" in caplog.text


def test_progress_is_the_last_of_a_long_log(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    assert job.progress() is None
    log_events(job, '{"event": "status", "status": "running"}\n')
    assert job.progress() is None
    now = time.time()
    for done in range(3000):
        log_events(job, json.dumps(step(done, now - 3000 + done, total=4000) | {"loss": 0.5}) + "\n")
    log_events(job, '{"event": "status", "status": "x"}\n{"event": "progress", "stage"')
    progress = job.progress()
    assert progress is not None
    assert (progress["stage"], progress["done"], progress["total"], progress["loss"]) == ("capture", 2999, 4000, 0.5)
    assert progress["seconds_left"] == pytest.approx(1000, abs=30)
    assert "damaged" not in caplog.text


def test_log_tail(job: Job) -> None:
    assert job.log_tail() == []
    (job.path / "log.txt").write_bytes(b"one\ntwo\xff\n" + b"x" * 70_000 + b"\nlast\n")
    assert job.log_tail(5) == ["last"]
    (job.path / "log.txt").write_bytes(b"one\ntwo\xff\nthree")
    assert job.log_tail(2) == ["two\ufffd", "three"]


# ------------------------------------------------------------------------------------------------------- seconds left


def test_seconds_left_follows_the_pace() -> None:
    events = [step(0, 100.0), step(2, 104.0), step(5, 110.0)]
    assert seconds_left(events, now=110.0) == pytest.approx(10.0)
    assert seconds_left(events, now=113.0) == pytest.approx(7.0)
    assert seconds_left(events, now=200.0) == 0.0


def test_seconds_left_looks_at_the_current_stage_alone() -> None:
    load = [step(0, 0.0, "load"), step(10, 90.0, "load")]
    assert seconds_left([*load, step(1, 100.0)], now=100.0) is None
    assert seconds_left([*load, step(1, 100.0), step(2, 101.0)], now=101.0) == pytest.approx(8.0)
    again = [step(0, 0.0), step(10, 90.0), step(0, 100.0), step(5, 105.0)]
    assert seconds_left(again, now=105.0) == pytest.approx(5.0), "the same stage, begun anew"


def test_seconds_left_is_none_where_nothing_is_known() -> None:
    assert seconds_left([]) is None
    assert seconds_left([step(3, 1.0)]) is None
    assert seconds_left([step(3, 1.0), step(3, 9.0)]) is None
    assert seconds_left([step(1, 1.0, total=0), step(3, 9.0, total=0)]) is None


# ------------------------------------------------------------------------------------------------------------ deleting


def test_delete(job: Job) -> None:
    with pytest.raises(InputError, match="queued; cancel it"):
        job.delete()
    write(job.path / "result.json", status="done")
    (job.path.parent / ".deleted-before" / "adapter").mkdir(parents=True)  # as a process leaves it that is killed here
    job.delete()
    assert list(job.path.parent.iterdir()) == []
    job.delete()
    assert job.status() == "interrupted"
    assert "was removed" in str(job.error())
    assert job.events(5) == ([], 5)
    assert (job.progress(), job.result(), job.log_tail()) == (None, None, [])
