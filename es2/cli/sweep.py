"""The command `sweep`: many short fine-tunes, and what separation costs; `es2.cli.main` registers it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from es2.cli.options import with_settings
from es2.cli.prompt_options import read_prompts, with_prompts
from es2.cli.rendering_options import with_rendering
from es2.cli.terminal import AllowMirror, AsJson, Model, Prompts, emit, errors, out, progress
from es2.core.errors import InputError
from es2.core.rendering import Rendering
from es2.models.catalogue import DEFAULT_MODEL
from es2.training.config import FinetuneConfig
from es2.workflow.sweep_space import SEARCHED, SHAPE, SweepConfig

if TYPE_CHECKING:
    from es2.jobs.job import Job

_ACTIONS = ("start", "list", "show", "cancel", "resume", "delete")
_OPEN = {name: f"searched, see --{where.replace('_', '-')}" for name, where in SEARCHED.items()}


@with_rendering
@with_prompts
@with_settings(
    FinetuneConfig,
    leave_out=("model", "replies", *SHAPE),
    left_open=_OPEN | {"alpha": "twice the rank"},
    into="fixed",
)
@with_settings(SweepConfig)
def sweep(
    action: Annotated[str, typer.Argument(help="start, list, show, cancel, resume or delete.")] = "start",
    id: Annotated[str | None, typer.Argument(help="Which sweep; for show, cancel, resume and delete.")] = None,
    model: Model = DEFAULT_MODEL,
    prompts: Prompts = "builtin",
    *,
    rendering: Rendering,
    settings: dict[str, Any],
    fixed: dict[str, Any],
    allow_mirror: AllowMirror = False,
    json_: AsJson = False,
) -> None:
    """Many short fine-tunes over layers, objective, λ, learning rate and rank: how much separation for how much KL.

    What is given is fixed, the rest is searched. Killed or cancelled, `es2 sweep resume ID` goes on; while a sweep
    runs, the same command takes part in it. Deleted with a sweep are the runs of its trials, unless they were renamed.
    """
    from es2.workflow.sweeps import cancel_sweep, delete_sweep, list_sweeps, open_sweep, sweep_document

    if action not in _ACTIONS:
        raise InputError(f"Unknown action {action[:40]!r}; one of {', '.join(_ACTIONS)}.")
    if action in ("start", "list"):
        if id is not None:
            raise InputError(f"es2 sweep {action} takes no id; leave {id[:40]!r} out.")
    elif id is None:
        raise InputError(f"Which sweep? Give its id: es2 sweep {action} ID; `es2 sweep list` lists them.")
    if action == "start":
        document = _start(model, prompts, rendering, settings, fixed)
        emit(document, json_, lambda: _show(document))
        return
    _refuse_settings(action, model, prompts, rendering, settings, fixed)
    if id is None:
        rows = [_row(job) for job in list_sweeps()]
        emit({"sweeps": rows}, json_, lambda: _show_list(rows))
        return
    found = open_sweep(id)
    if action == "cancel":
        cancel_sweep(found)
    if action == "delete":
        n_renamed = delete_sweep(found)
        kept = f" The runs of {n_renamed} trials were renamed, and are kept." if n_renamed else ""
        deleted = {"sweep": found.id, "deleted": True, "runs_kept": n_renamed}
        emit(deleted, json_, lambda: out.print(f"Sweep {found.id} is deleted, with its runs.{kept}"))
        return
    if action == "resume":
        _resume(found)
    document = _row(found) | sweep_document(found)
    emit(document, json_, lambda: _show(document))


def _start(
    model: str, source: str, rendering: Rendering, settings: dict[str, Any], fixed: dict[str, Any]
) -> dict[str, Any]:
    """Make a sweep in this process, and say before how long it takes."""
    from es2.models.catalogue import resolve
    from es2.prompts.benchmarks import absolute_source
    from es2.workflow.sweep import create_sweep

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "A sweep's trials run in one process each; start `es2 sweep` in one process, and `es2 sweep resume ID` in "
            "another for every further GPU."
        )
    config = SweepConfig(**settings)
    prompt_set = read_prompts(source)
    with progress() as report:
        given = fixed | dict(prompt_set.rendered_as(rendering)) | {"model": resolve(model).name}
        job = create_sweep(config, given, prompt_set, absolute_source(source), report)
    _say_how_long(job)
    errors.print(f"Sweep {job.id}; `es2 sweep resume {job.id}` goes on where it is interrupted.", soft_wrap=True)
    return _run(job, job)


def _resume(found: Job) -> None:
    """Go on with a sweep in this process, or take part in one that runs."""
    from es2.workflow.sweep import create_helper
    from es2.workflow.sweeps import reopen_sweep

    if found.is_active():
        _run(create_helper(found), found)
        return
    reopen_sweep(found)
    _run(found, found)


def _run(job: Job, of: Job) -> dict[str, Any]:
    """The result of a sweep's job or a helper's, run in this process."""
    from es2.jobs.running import result_of, run_job
    from es2.workflow.job_kinds import JOBS

    with progress() as report:
        exit_code = run_job(job.path, JOBS, report)
    result = result_of(job, exit_code, f"Sweep {of.id} was {job.status()}; `es2 sweep resume {of.id}` goes on.")
    return {"status": job.status()} | result


def _say_how_long(job: Job) -> None:
    """Say on stderr how long a sweep takes, where that is known."""
    from es2.workflow.sweep_plan import estimate_sweep

    try:
        seconds = estimate_sweep(job)
    except InputError:
        return  # a Hub model that is not here has no size yet
    n = job.config["sweep"]["trials"]
    errors.print(f"{n} trials take {seconds / 60:.0f} minutes at most on an idle machine.", soft_wrap=True)


def _refuse_settings(
    action: str, model: str, source: str, rendering: Rendering, settings: Mapping[str, Any], fixed: Mapping[str, Any]
) -> None:
    """A sweep that is there has its settings; others would be passed over silently."""
    usual = SweepConfig().to_dict() | dict.fromkeys(("layers", "alpha", *SEARCHED))
    given = {"model": model, "prompts": source, **settings, **fixed, **rendering.to_dict()}
    usual |= {"model": DEFAULT_MODEL, "prompts": "builtin", **dict.fromkeys(Rendering.model_fields)}
    for name, value in given.items():
        default = usual[name] if name in usual else FinetuneConfig.model_fields[name].default
        if (list(value) if isinstance(value, tuple) else value) != default:
            raise InputError(f"es2 sweep {action} takes no settings; leave --{name.replace('_', '-')} out.")


def _row(job: Job) -> dict[str, Any]:
    from es2.workflow.sweeps import RUNNING, read_trials

    ended = sum(trial["status"] != RUNNING for trial in read_trials(job.path))
    row = {"sweep": job.id, "status": job.status(), "created": job.created, "model": job.config["model"]}
    return row | {"n_trials": job.config["sweep"]["trials"], "n_ended": ended, "error": job.error()}


def _show_list(rows: list[dict[str, Any]]) -> None:
    if not rows:
        out.print("There is no sweep yet; `es2 sweep` makes one.")
        return
    table = Table("sweep", "status", "model", "trials")
    for row in rows:
        table.add_row(row["sweep"], row["status"], row["model"], f"{row['n_ended']} of {row['n_trials']}")
    out.print(table)


def _show(document: Mapping[str, Any]) -> None:
    from es2.workflow.sweeps import first_words

    searched = list(document["space"]["searched"])
    defended = document["defended"]
    came_to = ("separation", "KL", *["refused under attack"] * defended)
    table = Table("trial", *(name.replace("_", " ") for name in searched), *came_to, "status", "run")
    front = set(document["front"])
    for trial in document["trials"]:
        numbers = trial["numbers"]
        cells = [_cell(trial["settings"].get(name)) for name in searched]
        cells += [f"{numbers['separation']:+.2f}", f"{numbers['kl']:.3f}"] if numbers else ["", ""]
        defence = numbers and numbers.get("defence")
        cells += [f"{defence['refusals']} of {defence['n_harmful']}" if defence else ""] * defended
        status = trial["status"] + ("" if not numbers or numbers["kept"] else ", kept nothing")
        mark = " ◀" if trial["number"] in front else ""
        table.add_row(f"{trial['number']}{mark}", *cells, status, (trial["run"] or "").rpartition("-")[2])
    out.print(table)
    out.print(
        "Separation: log of the fisher ratio over base's on validation, mean over the target layers. KL: nats per "
        "token on harmless validation prompts. ◀: no other trial has more separation at less KL"
        + (", and as many refusals under attack." if defended else ".")
    )
    out.print(first_words(document))
    of_any = [trial["numbers"]["defence"] for trial in document["trials"] if (trial["numbers"] or {}).get("defence")]
    if of_any:
        same = of_any[0]
        refused = f"{same['base_refusals']} of {same['n_harmful']}"
        out.print(f"Base refuses {refused} under the same attack, at layers {_cell(same['layers'])}.")
    best = document["best"]
    if best is None:
        out.print(f"No trial kept a step within the KL budget of {document['kl_budget']:g} nats.")
    else:
        of = ", ".join(f"{name} {_cell(value)}" for name, value in best["settings"].items())
        most = "refusals under attack" if defended else "separation"
        out.print(f"Most {most} within the KL budget of {document['kl_budget']:g}: trial {best['number']}, {of}.")
        if best["numbers"]["lost"]:
            out.print(f"Warning: it {best['numbers']['lost']}.", style="red")
        elif passed_over := _passed_over(document["trials"], best):
            out.print(f"With more, but behaviour of the base lost: trial {', '.join(map(str, passed_over))}.")
        out.print(f"Run {best['run']}", soft_wrap=True)
    out.print(f"Sweep {document['sweep']}: {document['path']}", soft_wrap=True)


def _passed_over(trials: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> list[int]:
    """The trials that would be the best if they had lost no behaviour."""
    from es2.workflow.sweeps import best_of

    lost = [trial for trial in trials if trial["numbers"] and trial["numbers"]["lost"]]
    unlost = [{**trial, "numbers": {**trial["numbers"], "lost": None}} for trial in lost]
    return [one["number"] for one in unlost if best_of([one, best]) == one["number"]]


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
