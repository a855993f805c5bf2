"""What somebody finds who comes to a home folder after an accident: artifacts, jobs, and what the app shows of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from es2.core.errors import Es2Error, InputError
from es2.core.files import is_key, shipped
from es2.evaluation.results import find_evaluations, read_evaluation
from es2.jobs.queue import list_jobs
from es2.store.store import Store
from es2.workflow.compared import find_compared
from es2.workflow.derived import find_umap
from es2.workflow.runs import list_runs, shipped_run, tuned_weights
from tests.system.operations import World

MAIN = str(Path(__file__).parents[2] / "app" / "main.py")


def look(world: World, page: str | None = None) -> dict[str, Any]:
    """What there is: jobs with their states, artifacts that are whole and those that are not, and what the app shows.

    The app comes first, so that it meets what nobody has set aside yet.
    """
    app = [] if page is None else open_the_app(world, page)
    whole, damaged = [], []

    def judge(path: Path, verify_checksum: bool) -> None:
        (whole if verify_checksum else damaged).append(str(path.relative_to(world.home)))

    for activations in Store().list():
        derived = sorted((activations.path / "derived").glob("*"))
        try:
            activations.check()
            judge(activations.path, bool(activations.texts))
        except Es2Error:
            judge(activations.path, False)
            continue
        for folder in derived:
            if is_key(folder.name):
                judge(folder, activations.derived(folder.name) is not None)
    for run in list_runs():
        for path in find_evaluations(run):
            try:
                judge(path, bool(read_evaluation(path)))
            except InputError:
                judge(path, False)
        if run.status() in ("done", "stopped"):
            try:
                judge(tuned_weights(run), True)
            except InputError:
                judge(run.path / "adapter", False)
    try:
        if (run := shipped_run()) is not None:
            found = find_compared("showcase")
            umap = find_umap(found.base, found.prompts, found.position, found.tuned)
            judge(shipped(), found.run == run.id and umap is not None)
    except Es2Error:
        judge(shipped(), False)
    jobs = [
        {
            "id": job.id,
            "kind": job.kind,
            "status": job.status(),
            "error": job.error(),
            "result": job.result() is not None,
        }
        for job in list_jobs()
    ]
    return {"app": app, "whole": whole, "damaged": damaged, "jobs": jobs}


def open_the_app(world: World, page: str) -> list[str]:
    """Open a page on this home; returns what is wrong with it."""
    from streamlit.testing.v1 import AppTest
    from streamlit.util import calc_hash

    at = AppTest.from_file(MAIN, default_timeout=60)
    at._page_hash = calc_hash(page)
    at.query_params["model"], at.query_params["prompts"] = world.model, world.source
    ended = [(job, job.status()) for job in list_jobs()[:5]]
    at.run()
    problems = [f"{error.value} {error.stack_trace}" for error in at.exception]
    kinds = ("caption", "markdown", "error", "warning", "info")
    shown = "\n".join(element.value for kind in kinds for element in getattr(at, kind))
    for job, status in ended:
        if status != "done" and status not in shown:
            problems.append(f"it does not say that the {job.kind} job is {status}")
    return problems
