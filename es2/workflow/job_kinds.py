"""What `es2 job` can run: a function for each kind of job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from es2.analysis.results import AnalysisConfig
from es2.analysis.setup import check_prompts
from es2.core.progress import Reporter, silent
from es2.core.rendering import Rendering
from es2.evaluation.config import EvaluateConfig
from es2.jobs.job import Job
from es2.jobs.queue import create_job, open_job, reopen
from es2.jobs.running import Task, result_of, run_job
from es2.models.catalogue import resolve
from es2.models.folders import model_folder
from es2.prompts.loading import load_prompts
from es2.store.store import Store
from es2.workflow.check import check
from es2.workflow.evaluate import evaluate
from es2.workflow.finetune_run import finetune_run, imported_run
from es2.workflow.prepare import prepare, project
from es2.workflow.reader import read_job
from es2.workflow.runs import config_of, tuned_weights
from es2.workflow.series import analyse_members, open_members
from es2.workflow.sweep import sweep_job


def _prepare_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    run, against = _runs(config, folder)
    prompts = load_prompts(config["prompts"])
    if config.get("allow_mirror"):  # the yes is to this job alone
        check_prompts(prompts)
        model_folder(resolve(config["model"]), report, allow_mirror=True)
    prepared = prepare(
        config["model"],
        prompts,
        run=run,
        against=against,
        rendering=_rendering(config),
        config=AnalysisConfig(position=config["position"]),
        report=report,
    )
    return {"activations": prepared.activations.key}


def _project_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    run, against = _runs(config, folder)
    prompts = load_prompts(config["prompts"])
    activations, key = project(
        config["model"],
        prompts,
        run=run,
        against=against,
        rendering=_rendering(config),
        position=config["position"],
        report=report,
    )
    return {"activations": activations.key, "umap": key}


def _series_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    base, prompts = Store().open(config["base"]), load_prompts(config["prompts"]).measured()
    members = open_members(config["sets"], base, config["position"])
    found = analyse_members(base, members, prompts, config["position"], report=report)
    return {"activations": [member.activations.key for member in found]}


def _rendering(config: dict[str, Any]) -> Rendering:
    """What a job's config says of how the model is given the prompts; open where it says nothing."""
    return Rendering.read(config.get("rendering") or {}, "The config.json of the job")


def _runs(config: dict[str, Any], folder: Path) -> tuple[Job | None, Job | None]:
    """The runs that a job compares: `run` and `against` in its config, by id."""
    ids = (config.get("run"), config.get("against"))
    run, against = (open_job(id, folder.parent) if id else None for id in ids)
    return run, against


def _finetune_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    do = imported_run if config.get("imported") else finetune_run
    return do(config_of(Job(folder, config)), load_prompts(config["prompts"]), folder, report)


def _evaluate_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    settings = EvaluateConfig.read(config, f"The config.json of job {folder.name}")
    run, _ = _runs(config, folder)
    return evaluate(settings, load_prompts(settings.prompts), folder, run=run, report=report)


def _check_job(config: dict[str, Any], report: Reporter, folder: Path) -> dict[str, Any]:
    run, _ = _runs(config, folder)
    adapter = tuned_weights(run) if run is not None else None
    adapter = adapter if adapter is not None and adapter.is_dir() else None
    return check(
        config["model"], load_prompts(config["prompts"]), adapter=adapter, rendering=_rendering(config), report=report
    ).to_dict()


JOBS: Mapping[str, Task] = {
    "read": read_job,
    "prepare": _prepare_job,
    "project": _project_job,
    "series": _series_job,
    "finetune": _finetune_job,
    "evaluate": _evaluate_job,
    "check": _check_job,
    "sweep": sweep_job,
}
"""By a job's kind, the function that does it."""


def run_here(kind: str, config: Mapping[str, Any], unfinished: Job | None, report: Reporter = silent) -> dict[str, Any]:
    """The result of a job that is run in this process: one of this config that ended before its time, or a new one.

    Raises:
        InputError, MachineError: with the job's sentence when it comes to none.
    """
    if unfinished is None:
        job = create_job(kind, config)
    else:
        job = unfinished
        reopen(job)
    exit_code = run_job(job.path, JOBS, report)
    return result_of(job, exit_code, f"Job {job.id} was {job.status()}; the same command goes on from what it has.")
