"""A minute of use, which `python -m tests.system.soak` makes an hour; and how it judges, on made-up measurements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.system.browser.serving import marks
from tests.system.soak import Sample, judge, soak

FLAT = [
    Sample(seconds=10.0 * i, memory=200_000_000, files=30, sessions=4, threads=20, children=0, temporary=0, jobs=i)
    for i in range(20)
]


@pytest.mark.browser
@pytest.mark.long
@marks[1]
def test_a_minute_of_use_leaks_nothing(tmp_path: Path) -> None:
    samples, last = soak(tmp_path, seconds=60)
    assert judge(samples, last)["leaks"] == []


def test_what_counts_as_a_leak() -> None:
    assert judge(FLAT, FLAT[-1])["leaks"] == []
    growing = [replace(one, memory=int(one.memory * (1 + 0.01 * i)), files=30 + i) for i, one in enumerate(FLAT)]
    assert judge(growing, growing[-1])["leaks"] == [
        "memory grew by 11.4%",
        "open files that belong to no session grew from 24 to 36",
    ]
    busier = [replace(one, files=30 + 3 * i, sessions=4 + i) for i, one in enumerate(FLAT)]
    assert judge(busier, FLAT[-1])["leaks"] == [], "more visitors at a time"
    left = replace(FLAT[-1], children=2, temporary=1)
    assert judge(FLAT, left)["leaks"] == ["2 processes are left", "1 temporary files or folders are left"]
    warming_up = [replace(one, memory=150_000_000) for one in FLAT[:4]] + FLAT[4:]
    assert judge(warming_up, FLAT[-1])["leaks"] == []
