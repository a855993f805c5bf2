"""The suite of accidents in short: every kind of fault, each at another operation. In full it is a command of its own.

It runs in a process of its own because it forks, which a process with many libraries' threads must not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system.faults import FAULTS, Case, judge, plan
from tests.system.operations import BUG, OPERATIONS, Ended

CASES = 16
WELL: dict[str, Any] = {
    "app": [],
    "whole": ["cached_activations/a", "cached_activations/a/derived/b", "runs/r/adapter"],
    "damaged": [],
    "jobs": [{"id": "r", "kind": "finetune", "status": "interrupted", "error": "It was killed.", "result": False}],
}


@pytest.mark.long
def test_nothing_is_lost_and_nobody_lies(tmp_path: Path) -> None:
    out = tmp_path / "counts.json"
    command = ["-m", "tests.system.faults", "--quick", "--cases", str(CASES), "--seed", "7", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.exists(), done.stderr
    counts = json.loads(out.read_text())
    assert counts["cases"] + sum(counts["skipped"].values()) == CASES
    assert counts["survivors"] == counts["cases"], counts["failed"]
    assert (counts["artifacts_lost"], counts["wrong_states"]) == (0, 0)
    assert counts["artifacts_whole"] > 0
    assert counts["app_opened"] > 0
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", [0, 7])
def test_every_combination_comes_before_any_comes_twice(seed: int) -> None:
    n_all = len(OPERATIONS) * len(FAULTS)
    chosen = plan(seed, 2 * n_all, OPERATIONS)
    assert len({(operation.name, fault) for operation, fault in chosen[:n_all]}) == n_all
    assert plan(seed, 30, OPERATIONS) == chosen[:30], "a case does not depend on how many follow"


def judged(found: dict[str, Any], excused: str | None = None, ended: Ended | None = None) -> Case:
    case = Case(0, "capture", "killed")
    judge(case, WELL | found, frozenset(WELL["whole"]), excused, ended)
    return case


def job(**changes: Any) -> dict[str, Any]:
    return {"jobs": [WELL["jobs"][0] | changes]}


def test_what_is_well() -> None:
    assert judged({}, ended=Ended(-9, None, "", 0)).held
    assert judged(job(status="done", result=True)).held
    assert judged(
        job(status="failed", error="The weights are gone; `es2 runs resume r` makes them again.", result=True)
    ).held


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (job(status="running"), "no process lives"),
        (job(status="queued"), "no process lives"),
        (job(status="done"), "has no result"),
        (job(status="cancelled", result=True), "has result"),
        ({"damaged": ["cached_activations/c"]}, "is there and not whole"),
    ],
)
def test_what_is_a_wrong_state(found: dict[str, Any], words: str) -> None:
    (wrong,) = judged(found).wrong
    assert words in wrong


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (Ended(None, None, "", 0), "hung"),
        (Ended(BUG, None, "Traceback", 0), "Traceback"),
        (Ended(1, None, "", 1), "left processes"),
    ],
)
def test_what_is_a_bad_end(ended: Ended, words: str) -> None:
    (problem,) = judged({}, ended=ended).problems
    assert words in problem
    assert not judged(job(status="failed", error="The job failed unexpectedly (KeyError).")).held
    assert not judged({"app": ["an exception"]}).held


def test_what_is_lost_and_what_was_hit() -> None:
    rest = {"whole": ["runs/r/adapter"]}
    assert judged(rest).lost == ["cached_activations/a", "cached_activations/a/derived/b"]
    assert judged(rest, excused="cached_activations/a").lost == [], "what lies in it went with it"
    assert judged({"whole": []}, excused="cached_activations").lost == ["runs/r/adapter"]
