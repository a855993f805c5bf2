"""Many processes at once on one home: who computes, who waits, and that nobody gets another's numbers."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import psutil
import pytest

from es2.jobs.job import Job
from es2.jobs.queue import create_job, list_jobs
from es2.store.store import Store
from es2.training.config import FinetuneConfig
from tests.builders import save_tiny_model, tiny_prompts, write_prompts
from tests.system.operations import SETTINGS, lasting
from tests.system.workers import PATIENCE, PRELOAD, prepare_once, run_one

AT_ONCE = 8


@dataclass(frozen=True)
class Files:
    """What a user brings."""

    model: str
    prompts: str
    others: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    return Files(
        str(save_tiny_model(folder / "model")),
        str(write_prompts(folder / "locks.csv", tiny_prompts(40))),
        str(write_prompts(folder / "more.csv", tiny_prompts(56))),
    )


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@pytest.mark.long
def test_eight_ask_for_the_same_and_one_computes(files: Files, processes: ForkServerContext, tmp_path: Path) -> None:
    together, told = processes.Barrier(AT_ONCE), processes.Queue()
    arguments = (str(tmp_path), files.model, files.prompts, together, told)
    asking = [processes.Process(target=prepare_once, args=arguments) for _ in range(AT_ONCE)]
    for process in asking:
        process.start()
    answers = [told.get(timeout=PATIENCE) for _ in asking]
    for process in asking:
        process.join(PATIENCE)
    assert [process.exitcode for process in asking] == [0] * AT_ONCE
    assert len({(key, reason) for key, reason, _ in answers}) == 1, "all read the same"
    for stage in ("load", "capture", "analyse"):
        assert sum(stage in stages for _, _, stages in answers) == 1, f"one process did the {stage}"
    store = Store(tmp_path / "cached_activations")
    (only,) = store.list()
    only.check()
    assert len(list((only.path / "derived").iterdir())) == 1
    assert not list(tmp_path.rglob(".tmp-*"))


def run_together(home: Path, files: Files, processes: ForkServerContext, limit: int) -> list[Job]:
    """Two fine-tunes that differ in their seed and a capture, all launched at the same moment."""
    tunes = [
        FinetuneConfig(layers=(1, 2), model=files.model, **SETTINGS | {"seed": seed}).to_dict()
        | {"prompts": files.prompts}
        for seed in (0, 1)
    ]
    look = {"model": files.model, "prompts": files.others, "position": "last"}
    wanted: list[tuple[str, dict[str, Any]]] = [("finetune", tunes[0]), ("finetune", tunes[1]), ("prepare", look)]
    jobs = [create_job(kind, config, root=home / "runs") for kind, config in wanted]
    together = processes.Barrier(len(jobs))
    environment = {"ES2_HEAVY_JOBS": str(limit)}
    running = [
        processes.Process(target=run_one, args=(str(home), str(job.path), environment, together)) for job in jobs
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(2 * PATIENCE)
    assert [process.exitcode for process in running] == [0, 0, 0], [job.log_tail() for job in jobs]
    return jobs


def span(job: Job) -> tuple[float, float]:
    """When it ran, by its own events."""
    times = {event["status"]: event["time"] for event in job.events()[0] if event["event"] == "status"}
    return times["running"], times["done"]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Everything in a nested document by its path."""
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, one in entries for name, leaf in flat(one, f"{path}/{key}").items()}
    return {path: value}


@pytest.mark.long
def test_two_fine_tunes_and_a_capture_at_once(files: Files, processes: ForkServerContext, tmp_path: Path) -> None:
    made: dict[int, list[dict[str, Any]]] = {}
    for limit in (1, 3):
        home = tmp_path / f"limit-{limit}"
        home.mkdir()
        jobs = run_together(home, files, processes, limit)
        spans = sorted(span(job) for job in jobs)
        overlaps = sum(later[0] < earlier[1] for earlier, later in pairwise(spans))
        assert (overlaps == 0) == (limit == 1), f"with a limit of {limit} the jobs ran at {spans}"
        made[limit] = [lasting(job.result()) for job in jobs]
        assert [job.status() for job in list_jobs(home / "runs")] == ["done"] * 3
    # To rounding: which prompts are captured together depends on who comes first, and fused attention rounds by batch.
    for alone, beside in zip(made[1], made[3], strict=True):
        one, other = flat(alone), flat(beside)
        numbers = [name for name, leaf in one.items() if isinstance(leaf, float)]
        assert one.keys() == other.keys()
        assert [one.pop(name) for name in numbers] == pytest.approx(
            [other.pop(name) for name in numbers], rel=1e-5, abs=1e-5
        )
        assert one == other, "what each job made does not depend on who else was at work"
    assert made[1][0] != made[1][1], "two seeds are two runs"
    leftover = [child for child in psutil.Process().children(recursive=True) if child.status() == psutil.STATUS_ZOMBIE]
    assert leftover == []
