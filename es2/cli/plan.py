"""The command `plan`: what a fine-tune will take, before it is started; `es2.cli.main` registers it."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer
from rich.table import Table

from es2.cli.options import with_settings
from es2.cli.prompt_options import read_prompts, with_prompts
from es2.cli.rendering_options import with_rendering
from es2.cli.terminal import AllowMirror, AsJson, Model, Prompts, emit, out
from es2.core.errors import InputError
from es2.core.rendering import Rendering
from es2.core.settings import option_words
from es2.models.catalogue import DEFAULT_MODEL, resolve
from es2.training.config import FinetuneConfig


@with_rendering
@with_prompts
@with_settings(
    FinetuneConfig,
    leave_out=("model",),
    left_open={"layers": "what the analysis on disk recommends, else a guess"},
)
def plan(
    model: Model = DEFAULT_MODEL,
    prompts: Prompts = "builtin",
    gpus: Annotated[
        str | None, typer.Option(help="Plan for GPUs that are not here: 24 for one of 24 GB, 8x80 for eight of 80 GB.")
    ] = None,
    *,
    rendering: Rendering,
    settings: dict[str, Any],
    allow_mirror: AllowMirror = False,
    json_: AsJson = False,
) -> None:
    """How long a fine-tune will take, whether it fits into memory and disk, and what to type so that it does.

    Nothing heavy is loaded and nothing is fetched: a folder with a config.json is enough of a model.
    """
    from es2.models.machine import Machine, this_machine
    from es2.models.shape import Shape, local_folder
    from es2.workflow.derived import find_activations, find_analysis
    from es2.workflow.plan import guessed_layers
    from es2.workflow.plan import plan as estimate

    prompt_set = read_prompts(prompts)
    spec = resolve(model)
    targets, first_block = settings["layers"], settings["first_block"]
    settings |= dict(prompt_set.rendered_as(rendering))
    config = FinetuneConfig(**settings | {"layers": (0,), "first_block": None, "model": spec.name})
    if targets is None:
        measured = prompt_set.measured()
        found = find_activations(spec.name, measured, "last", rendering=config)
        analysis = find_analysis(found, measured, "last") if found else None
        targets = analysis.recommended if analysis else guessed_layers(Shape.of_model(config.model).n_layers)
    if not targets:
        raise InputError("No target layer is given; give two, such as --layers 12,18.")
    config = config.replace(layers=targets, first_block=first_block)
    machine = this_machine(config.device) if gpus is None else Machine.elsewhere(gpus)
    made = estimate(config, prompt_set, local_folder(config.model), machine=machine)

    def show() -> None:
        table = Table("stage", "minutes")
        for stage, seconds in made.seconds.items():
            table.add_row(stage, f"{seconds / 60:.1f}")
        table.add_row("all", f"{made.total_seconds / 60:.1f}", style="bold")
        out.print(table)
        free = made.machine.free_gb
        needs = Table("memory, peak", "GB", "" if free is None else f"of {free:.1f} GB")
        for part, size in made.needs_gb.items():
            needs.add_row(part, f"{size:.1f}", "" if free is None else "fits" if size <= free else "too much")
        out.print(needs)
        where = f"{made.machine.n_devices} {made.machine.device}" + " that is elsewhere" * made.machine.assumed
        pace = "a speed that is assumed" if made.machine.assumed else "the speed that was measured"
        out.print(f"Target layers {', '.join(map(str, config.targets))}, on an idle machine ({where}), at {pace}.")
        out.print(f"Disk: {made.disk_gb:.1f} GB of {made.free_disk_gb:.1f} GB that are free.")
        if made.fetch_gb:
            out.print(f"The model is fetched first: about {made.fetch_gb:.1f} GB, whose time is not counted.")
        for sentence in made.advice:
            out.print(sentence)
        for command in commands:
            out.print(f"    {command}", soft_wrap=True)

    source = "" if prompts == "builtin" else f" --prompts {shlex.quote(prompts)}"
    source += "".join(f" {shlex.quote(word)}" for word in option_words(Rendering, rendering.to_dict()))
    commands = [command + source for command in made.commands]
    document = {"model": spec.name, "prompts": prompts, "target_layers": list(config.targets)} | made.to_dict()
    document["rendering"] = config.settled.to_dict()
    document["commands"] = commands
    emit(document, json_, show)
