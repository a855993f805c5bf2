"""The commands about fine-tuning runs: `finetune`, `import`, `runs`, `export`; `es2.cli.main` registers them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from es2.cli.activations import import_embeddings
from es2.cli.options import with_settings
from es2.cli.prompt_options import read_prompts, with_prompts
from es2.cli.rendering_options import show_rendering, with_rendering
from es2.cli.terminal import (
    AllowMirror,
    AsJson,
    Device,
    Dtype,
    Model,
    Prompts,
    emit,
    out,
    progress,
    show_given_as,
    show_outcome,
)
from es2.core.errors import InputError
from es2.core.rendering import Rendering
from es2.core.settings import parse_list
from es2.jobs.job import Job
from es2.jobs.running import jobs_ahead
from es2.models.catalogue import DEFAULT_MODEL
from es2.training.config import FinetuneConfig

if TYPE_CHECKING:
    from es2.prompts.prompt_set import PromptSet


@with_rendering
@with_prompts
@with_settings(FinetuneConfig, leave_out=("model",), left_open={"layers": "the two that `analyze` recommends"})
def finetune(
    model: Model = DEFAULT_MODEL,
    prompts: Prompts = "builtin",
    *,
    rendering: Rendering,
    settings: dict[str, Any],
    log_to: Annotated[
        str | None, typer.Option(help="Log the steps of this command to tensorboard, wandb or trackio, too.")
    ] = None,
    allow_mirror: AllowMirror = False,
    json_: AsJson = False,
) -> None:
    """Fine-tune a model with ES2, compare it with its base on prompts it never saw, and print the verdict."""
    from es2.workflow.foreground import begin_finetune, decide_finetune, result_of_run
    from es2.workflow.tracking import check_tracker, tracked

    if log_to is not None:
        check_tracker(log_to)
    prompt_set = read_prompts(prompts)
    with progress() as report:
        config = decide_finetune(model, prompt_set, settings, rendering, report)
        if int(os.environ.get("RANK", "0")) > 0:
            _help_finetune(config, prompt_set)
            return
        run = begin_finetune(config, prompts)
        with tracked(log_to, run, report) as both:
            result = result_of_run(run, both)
    emit(result, json_, lambda: _show_run(result))


@with_rendering
@with_prompts
def import_(
    adapter: Annotated[
        str | None,
        typer.Option(help="The folder that peft's save_pretrained wrote, or one that holds it (copied), or a Hub id."),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            help="Instead: embeddings, with their model's name and prompts, as a safetensors or Parquet file or a "
            "folder that the library datasets saved (docs/interop.md)."
        ),
    ] = None,
    model: Model = DEFAULT_MODEL,
    prompts: Prompts = "builtin",
    layers: Annotated[
        str | None, typer.Option(help="Its target layers, such as 12,18. Default: the two that `analyze` recommends.")
    ] = None,
    name: Annotated[str, typer.Option(help="What to call the run.")] = "",
    *,
    rendering: Rendering,
    replies: Annotated[bool, typer.Option(help=FinetuneConfig.model_fields["replies"].description)] = True,
    device: Device = None,
    dtype: Dtype = None,
    allow_mirror: AllowMirror = False,
    json_: AsJson = False,
) -> None:
    """Take in an adapter that was trained elsewhere as a run, and compare the tuned model with its base; or embeddings
    that were read elsewhere, which are analysed.
    """
    if activations is not None and adapter is None:
        import_embeddings(activations, prompts, json_)
        return
    if adapter is None or activations is not None:
        raise InputError("Give either --adapter, for weights, or --activations, for embeddings.")
    from es2.workflow.foreground import begin_import, result_of_run

    rendering = read_prompts(prompts).rendered_as(rendering)
    targets = parse_list(FinetuneConfig, "layers", layers) or ()
    with progress() as report:
        run = begin_import(
            adapter,
            model,
            prompts,
            targets,
            name=name,
            rendering=rendering,
            device=device,
            dtype=dtype,
            replies=replies,
            report=report,
        )
        result = result_of_run(run, report)
    emit(result, json_, lambda: _show_run(result))


def with_outcome(document: Mapping[str, Any], run: Job) -> dict[str, Any]:
    """A document with a run's `verdict`, and what the run's newest evaluation says of behaviour."""
    from es2.evaluation.results import run_behaviour

    return {**document, **run_behaviour(run).to_dict(document.get("verdict"))}


def _help_finetune(config: FinetuneConfig, prompts: PromptSet) -> None:
    """Take part in the fine-tune of another process (`accelerate launch`), which writes and reports."""
    import signal
    import tempfile

    from es2.training.finetune import finetune as tune

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the other process gets it too, and ends this one
    with tempfile.TemporaryDirectory() as folder:
        tune(config, prompts, Path(folder))


def _show_run(result: Mapping[str, Any]) -> None:
    names = ["fisher_ratio", "relative_distance", "mean_difference_margin", "margin_mean", "margin_harmful_q1"]
    names += ["probe_accuracy", "orthogonal_std_ratio", "effective_rank", "norm_ratio", "centroid_distance"]
    table = Table("number", *(f"layer {layer}" for layer in result["target_layers"]))
    for name in names if result["before"] else ():  # a trial of a sweep may not have been compared
        cells = []
        for layer in map(str, result["target_layers"]):
            before, after = (result[when][layer][name]["value"] for when in ("before", "after"))
            cells.append(f"{before:.3f} → {after:.3f}")
        table.add_row(name, *cells)
    if result["before"]:
        out.print(table)
    kl = result["kl_harmless_test"] or {}
    out.print(f"KL on harmless test prompts, nats per token: {', '.join(f'{k} {v:.3f}' for k, v in kl.items())}")
    show_outcome(result)
    for sentence in (result["reason"], *result.get("warnings", ())):
        if sentence:
            out.print(sentence)
    if result.get("trained"):
        out.print(f"Trained: {result['trained']['sentence']}")
    show_given_as(result)
    show_rendering(result.get("rendering"))
    out.print(f"Run {result['run']}: {result['path']}", soft_wrap=True)


def runs(
    action: Annotated[str, typer.Argument(help="list, show, rename, cancel, resume or delete.")] = "list",
    id: Annotated[str | None, typer.Argument(help="Which run; not for list.")] = None,
    name: Annotated[str | None, typer.Argument(help="What to call it, for rename; '' takes the name back.")] = None,
    json_: AsJson = False,
) -> None:
    """Fine-tuning runs: list them, show one, rename, cancel, resume or delete it."""
    from es2.jobs.queue import reopen, start
    from es2.workflow.runs import list_runs, open_run

    if action not in ("list", "show", "rename", "cancel", "resume", "delete"):
        raise InputError(f"Unknown action {action[:40]!r}; one of list, show, rename, cancel, resume, delete.")
    if (name is not None) != (action == "rename" and id is not None):
        raise InputError("A name goes with rename, and rename with a name: es2 runs rename ID NAME.")
    if action == "list":
        rows = [_run_row(run) for run in list_runs()]
        emit({"runs": rows}, json_, lambda: _show_runs(rows))
        return
    if id is None:
        raise InputError(f"Which run? Give its id: es2 runs {action} ID; `es2 runs` lists them.")
    run = open_run(id)
    if action == "cancel":
        run.cancel()
    elif action == "rename" and name is not None:
        run.rename(name)
    elif action == "delete":
        run.delete()
        emit({"run": id, "deleted": True}, json_, lambda: out.print(f"Run {id} is deleted."))
        return
    elif action == "resume":
        reopen(run)
        start(run)
    document = _run_row(run) | {"config": run.config, "result": run.result()}

    def show() -> None:
        if document["result"] and action == "show":
            _show_run(with_outcome(document["result"], run))
        else:
            _show_runs([document])

    emit(document, json_, show)


def _run_row(run: Job) -> dict[str, Any]:
    result = run.result() or {}
    row = {
        "run": run.id,
        "name": run.name,
        "path": str(run.path),
        "status": run.status(),
        "jobs_ahead": len(jobs_ahead(run)) if run.status() == "queued" else None,
        "created": run.created,
        "model": run.config.get("model"),
        "layers": run.config.get("layers"),
        "objective": run.config.get("objective"),
        "verdict": result.get("verdict"),
        "progress": run.progress(),
        "error": run.error(),
    }
    return with_outcome(row, run)


def _show_runs(rows: list[dict[str, Any]]) -> None:
    if not rows:
        out.print("There is no run yet; `es2 finetune` makes one.")
        return
    table = Table("run", "name", "status", "model", "layers", "objective", "verdict")
    for row in rows:
        cells = row | {"layers": ",".join(map(str, row["layers"] or ())), "verdict": row["outcome"]}
        if row["jobs_ahead"]:
            cells["status"] = f"queued, {row['jobs_ahead']} before it"
        table.add_row(*(str(cells[str(column.header)] or "") for column in table.columns))
    out.print(table)
    for row in rows:
        if row["error"]:
            out.print(f"{row['run']}: {row['error']}")
        if row["behaviour_warning"]:
            out.print(f"{row['run']}: {row['behaviour_warning']}", style="red")
