"""Progress where stderr is no terminal: a line every ten seconds, whatever the work reports."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from es2.cli import terminal
from es2.cli.terminal import ProgressLines, progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestLine:
    def test_before_the_first_step(self, clock: Clock) -> None:
        lines = ProgressLines(clock)
        clock.now += 10
        assert lines.line() == "At work, 10 s since the start."

    def test_a_step_that_takes_long(self, clock: Clock) -> None:
        lines = ProgressLines(clock)
        lines.report("convert", 0, 2)
        clock.now += 600
        assert lines.line() == "convert: 0 of 2, 10 min since the start."

    def test_time_left_is_that_of_the_stage_at_its_pace(self, clock: Clock) -> None:
        lines = ProgressLines(clock)
        lines.report("download", 5, 5)
        clock.now += 20
        for done in (0, 100, 250):
            lines.report("capture", done, 2000, loss=1.0)
            clock.now += 10
        assert lines.line() == "capture: 250 of 2,000, 50 s since the start, about 2 min left."

    def test_a_stage_that_begins_again(self, clock: Clock) -> None:
        lines = ProgressLines(clock)
        lines.report("capture", 1000, 1000)
        clock.now += 10
        lines.report("capture", 0, 50)
        assert lines.line() == "capture: 0 of 50, 10 s since the start."

    def test_an_unknown_number_of_steps(self, clock: Clock) -> None:
        lines = ProgressLines(clock)
        lines.report("read", 1234, 0)
        clock.now += 10
        assert lines.line() == "read: 1,234, 10 s since the start."


class TestProgress:
    def wait_for(self, arrived: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not arrived():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def test_lines_come_while_nothing_is_reported(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(terminal, "LINE_SECONDS", 0.01)
        text = ""

        def has(what: str) -> bool:
            nonlocal text
            text += capsys.readouterr().err
            return text.count(what) >= 3

        with progress() as report:
            self.wait_for(lambda: has("At work"))
            report("convert", 0, 2)
            self.wait_for(lambda: has("convert: 0 of 2"))
        assert {line.partition(",")[0] for line in text.splitlines()} == {"At work", "convert: 0 of 2"}
        capsys.readouterr()
        time.sleep(0.1)
        assert capsys.readouterr().err == ""

    def test_short_work_prints_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert terminal.LINE_SECONDS == 10
        with progress() as report:
            report("capture", 5, 5)
        assert capsys.readouterr().err == ""

    def test_the_first_of_several_processes_shows_it(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(terminal, "LINE_SECONDS", 0.01)
        monkeypatch.setenv("RANK", "1")
        with progress() as report:
            report("capture", 1, 5)
            time.sleep(0.1)
        assert capsys.readouterr().err == ""
