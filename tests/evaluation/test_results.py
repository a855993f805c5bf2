"""Which evaluation of a run says what became of its behaviour."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from es2.core.files import read_json, with_checksum, write_json
from es2.evaluation.results import newest_attack, newest_directions, run_behaviour
from es2.jobs.job import Job
from es2.jobs.queue import create_job
from es2.jobs.running import run_job
from es2.training.config import FinetuneConfig
from tests.builders_evaluation import ANSWER, BABBLE, REFUSAL, REFUSES_LESS, write_replies

DEFENDS = ([ANSWER, ANSWER] * 8, [REFUSAL, ANSWER] * 7 + [ANSWER, ANSWER])
BREAKS = ([REFUSAL, ANSWER] * 8, [REFUSAL, ANSWER] * 4 + [BABBLE, ANSWER] * 2 + ["", ANSWER] * 2)


@pytest.fixture
def run(tmp_path: Path) -> Job:
    config = FinetuneConfig(layers=(0, 1)).to_dict() | {"prompts": "builtin"}
    job = create_job("finetune", config, root=tmp_path)
    run_job(job.path, {"finetune": lambda *_: {"verdict": "separated", "weights": "today"}})
    return job


def test_nothing_was_evaluated(run: Job) -> None:
    found = run_behaviour(run)
    assert found.name is None
    assert f"`es2 evaluate --run {run.id} --suite refusal` makes one" in found.reason


def test_the_newest_decides(run: Job) -> None:
    write_replies(run, "first", *REFUSES_LESS)
    assert run_behaviour(run).name == "refuses less"
    last = write_replies(run, "last", *DEFENDS)
    assert run_behaviour(run).name == "defends better"
    assert "On 8 harmful requests of last" in run_behaviour(run).reason
    os.utime(last, (1.0, 1.0))
    assert run_behaviour(run).name == "refuses less"


def test_babble_and_silence_count_together(run: Job) -> None:
    """Neither alone is beyond chance."""
    write_replies(run, "broken", *BREAKS)
    found = run_behaviour(run)
    assert found.name == "broken"
    assert "broken replies to harmful requests 0.00 → 0.50" in found.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"run": "20250101-000000-000000-finetune-aaaaaa"},
        {"run": None},
        {"weights": "of before it was made again"},
        {"note": "The run's own prompts cannot be read, so none of them was left out here"},
        {"suite": {"kl": {"n_prompts": 8}}},
        {"suite": {"refusal": {"problem": "Nothing to say."}}},
        {"suite": {"refusal": {"n_prompts": {"harmful": 8}, "base": {}, "tuned": None, "change": None}}},
        {"suite": {"refusal": {"n_prompts": {"harmful": 0}, "base": {}, "tuned": {}, "change": {"dsr": None}}}},
        {"suite": {"refusal": {"change": {"dsr": {"value": "?"}}}}},
        {"format": 99},
    ],
)
def test_what_does_not_count_is_passed_over(run: Job, changes: dict) -> None:
    write_replies(run, "sound", *REFUSES_LESS, weights="today")
    write_replies(run, "newer", *DEFENDS, **changes)
    assert run_behaviour(run).name == "refuses less"


def test_a_damaged_file_is_passed_over_and_named(run: Job, caplog: pytest.LogCaptureFixture) -> None:
    write_replies(run, "sound", *REFUSES_LESS)
    path = write_replies(run, "newer", *DEFENDS)
    document = read_json(path)
    assert document is not None
    write_json(path, document | {"prompts": "changed by hand"})
    os.utime(path, (2e9, 2e9))
    assert run_behaviour(run).name == "refuses less"
    assert "newer.json does not count" in caplog.text
    write_json(path, with_checksum(document))
    os.utime(path, (2e9, 2e9))
    assert run_behaviour(run).name == "defends better"


def test_the_newest_attack_on_both_models_of_todays_weights_counts(run: Job) -> None:
    def written(name: str, is_tuned: bool = True, **changes: Any) -> None:
        curve = [{"direction": "none", "base": {"dsr": 1}, "tuned": {"dsr": 1} if is_tuned else None}]
        write_replies(run, name, *DEFENDS, suite={"soft_prompt": {"curve": curve}}, **changes)

    assert newest_attack(run) is None
    write_replies(run, "replies", *DEFENDS)
    assert newest_attack(run) is None, "nothing was attacked"
    written("right")
    written("base-alone", is_tuned=False)
    written("of-another", run="20250101-000000-000000-finetune-aaaaaa")
    written("of-other-weights", weights="yesterday")
    found = newest_attack(run)
    assert found is not None
    assert found["prompts"] == "right"


def test_the_newest_directions_of_both_models_count(run: Job) -> None:
    assert newest_directions(run) is None
    for name, tuned in (("both", {"name": "steers"}), ("base-alone", None)):
        part = {"layers": [{"layer": 1, "base": {"name": "steers"}, "tuned": tuned}]}
        write_replies(run, name, *DEFENDS, suite={"direction": part})
    write_replies(run, "problem", *DEFENDS, suite={"direction": {"problem": "No."}})
    found = newest_directions(run)
    assert found is not None
    assert found["prompts"] == "both"
    assert newest_attack(run) is None
