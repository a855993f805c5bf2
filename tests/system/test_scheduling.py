"""The tests' own processes: how many, and that two of them never drive a browser at once."""

from __future__ import annotations

import os

import pytest

from tests.scheduling import AT_MOST, OneBrowser, n_workers


@pytest.mark.parametrize(
    ("cores", "markers", "paths", "expected"),
    [
        (2, "not long", ["tests"], 2),
        (64, "not long", ["tests"], AT_MOST),
        (1, "not long", ["tests"], 0),
        (2, "not long and not real", ["tests/analysis", "tests/models"], 2),
        (2, "not long", ["tests/core/test_files.py::test_one"], 0),
        (2, "long", ["tests"], 0),
    ],
)
def test_how_many(cores: int, markers: str, paths: list[str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    assert n_workers(markers, paths) == expected


def test_browsers_are_one_after_another() -> None:
    scheduler = OneBrowser.__new__(OneBrowser)  # without the workers that it would ask
    browsers = {scheduler._split_scope(f"tests/system/browser/test_{name}.py::test") for name in ("own_page", "launch")}
    assert len(browsers) == 1
    assert scheduler._split_scope("tests/system/test_doors.py::TestNames::test_one[a]") == "tests/system/test_doors.py"
