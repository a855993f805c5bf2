"""What the processes of the tests of many at once do; importable, so that a fork server can hand it out.

Each takes the home folder as an argument: what a fork server starts has the environment of the server.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TypeAlias

Answers: TypeAlias = "Queue[tuple[str, str, list[str]]]"
PRELOAD = [
    "accelerate",
    "peft",
    "sklearn.linear_model",
    "transformer_lens.model_bridge",
    "es2.training.finetune",
    "es2.workflow.prepare",
]
"""Imported once, by the fork server."""
PATIENCE = 120
"""Seconds until all have come."""


def settle_in(home: str, environment: Mapping[str, str]) -> None:
    """Be a process of this home."""
    import torch

    os.environ |= {"ES2_HOME": home, "ES2_CACHE": str(Path(home) / "cache"), **environment}
    torch.set_num_threads(1)


def prepare_once(
    home: str, model: str, source: str, together: Barrier, told: Queue[tuple[str, str, list[str]]]
) -> None:
    """Ask for embeddings and their analysis when all are ready; tell both keys and which stages there were."""
    from es2.prompts.loading import load_prompts
    from es2.workflow.prepare import prepare

    settle_in(home, {})
    stages: list[str] = []
    prompts = load_prompts(source)
    together.wait(PATIENCE)
    prepared = prepare(model, prompts, report=lambda stage, done, total, **numbers: stages.append(stage))
    told.put((prepared.activations.key, prepared.analysis.reason, sorted(set(stages))))


def run_one(home: str, job: str, environment: Mapping[str, str], together: Barrier) -> None:
    """Run a job that was laid down, when all are ready."""
    settle_in(home, environment)
    from es2.jobs.running import run_job
    from es2.workflow.job_kinds import JOBS

    together.wait(PATIENCE)
    raise SystemExit(run_job(Path(job), JOBS))
