"""The steps of a fine-tune in an experiment tracker, which may be missing, refuse or fail."""

from __future__ import annotations

import logging
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from es2.core.errors import InputError, MachineError
from es2.jobs.job import Job
from es2.jobs.queue import create_job
from es2.training.config import FinetuneConfig
from es2.workflow.tracking import TRACKERS, check_tracker, tracked


@pytest.fixture
def run(tmp_path: Path) -> Job:
    return create_job("finetune", FinetuneConfig(layers=(1, 2), kl_weight=3.0).to_dict(), root=tmp_path / "runs")


class Trackio(ModuleType):
    """What accelerate calls of the package trackio, which the tests do without."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.__spec__ = ModuleSpec("trackio", None)
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.settings: dict[str, Any] = {}
        self.finished = 0
        self.config = SimpleNamespace(update=lambda values, **_: self.settings.update(values))

    def init(self, **settings: Any) -> Trackio:
        self.begun.append(settings)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Trackio:
    module = Trackio()
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_steps_are_logged_and_passed_on(run: Job, trackio: Trackio) -> None:
    passed: list[tuple[Any, ...]] = []
    with tracked("trackio", run, lambda *step, **numbers: passed.append((*step, numbers))) as report:
        report("base", 1, 1)
        report("finetune", 0, 4)
        report("finetune", 1, 4, loss=2.0, kl_prompt=0.1)
        report("finetune", 2, 4, loss=1.5)
    assert trackio.begun == [{"project": "es2", "name": run.id}]
    assert trackio.logged == [(1, {"loss": 2.0, "kl_prompt": 0.1}), (2, {"loss": 1.5})]
    assert (trackio.settings["kl_weight"], trackio.settings["layers"]) == (3.0, "[1, 2]")
    assert trackio.finished == 1
    assert [step[:2] for step in passed] == [("base", 1), ("finetune", 0), ("finetune", 1), ("finetune", 2)]


def test_a_tracker_that_fails_stops_no_run(
    run: Job, trackio: Trackio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[int] = []

    def fail(values: object, step: int) -> None:
        tries.append(step)
        raise ConnectionError("no network")

    monkeypatch.setattr(trackio, "log", fail)
    passed: list[int] = []
    with (
        caplog.at_level(logging.WARNING),
        tracked("trackio", run, lambda stage, done, total, **numbers: passed.append(done)) as report,
    ):
        for step in (1, 2, 3):
            report("finetune", step, 3, loss=1.0)
    assert (tries, passed, trackio.finished) == ([1], [1, 2, 3], 0)
    assert [record.getMessage() for record in caplog.records] == [
        "The tracker trackio failed (no network); the run goes on without it."
    ]


def test_a_tracker_that_cannot_start_is_a_sentence(run: Job, trackio: Trackio, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**settings: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(trackio, "init", refuse)
    with (
        pytest.raises(MachineError, match=r"trackio cannot be started \(no API key\); leave out --log-to"),
        tracked("trackio", run, lambda *step, **numbers: None),
    ):
        pytest.fail("the run began")


def test_an_interrupted_run_ends_its_tracker(run: Job, trackio: Trackio) -> None:
    with pytest.raises(KeyboardInterrupt), tracked("trackio", run, lambda *step, **numbers: None):
        raise KeyboardInterrupt
    assert trackio.finished == 1


def test_what_is_not_there_is_refused_before_a_model_is_read(es2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("es2.workflow.tracking.find_spec", lambda name: None)
    for name, packages in TRACKERS.items():
        with pytest.raises(InputError, match=f"`pip install {packages[0]}`"):
            check_tracker(name)
    code, document = es2("finetune", "--model", "nowhere/at/all", "--log-to", "mlflow")
    assert (code, document["error"]) == (2, "Unknown tracker 'mlflow'; one of tensorboard, wandb, trackio.")


def test_tensorboard_writes_into_the_runs_folder(run: Job) -> None:
    if not any(map(find_spec, TRACKERS["tensorboard"])):
        pytest.skip("tensorboard is not installed")
    with tracked("tensorboard", run, lambda *step, **numbers: None) as report:
        report("finetune", 1, 1, loss=2.0)
    assert list((run.path / "logs" / "es2").glob("events*"))
