"""The command `check`: whether what is read of a model is what it computes; `es2.cli.main` registers it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from es2.cli.prompt_options import read_prompts, with_prompts
from es2.cli.rendering_options import with_rendering
from es2.cli.terminal import AllowMirror, AsJson, Device, Dtype, Model, Prompts, emit, out, progress
from es2.core.rendering import Rendering
from es2.models.catalogue import DEFAULT_MODEL


@with_rendering
@with_prompts
def check(
    model: Model = DEFAULT_MODEL,
    adapter: Annotated[str | None, typer.Option(help="A peft adapter to check on the model: folder or Hub id.")] = None,
    prompts: Prompts = "builtin",
    *,
    rendering: Rendering,
    device: Device = None,
    dtype: Dtype = None,
    allow_mirror: AllowMirror = False,
    json_: AsJson = False,
) -> None:
    """Hold what the workbench reads of a model against the plain transformers model; exit 1 if anything differs.

    What failed is refused by capture, finetune and evaluate until the model's files change or it is checked again.
    """
    from es2.models.adapter_files import adapter_folder
    from es2.workflow.check import check as make

    prompt_set = read_prompts(prompts)
    with progress() as report:
        found = None if adapter is None else adapter_folder(adapter, report)
        result = make(model, prompt_set, adapter=found, rendering=rendering, device=device, dtype=dtype, report=report)

    def show() -> None:
        table = Table("check", "", "what was found", box=None, pad_edge=False)
        for one in result.checks:
            table.add_row(one.name, {True: "ok", False: "FAILED", None: "not tried"}[one.passed], one.sentence)
        out.print(table)
        rendered = next(
            (one.details["rendered"] for one in result.checks if one.name == "positions" and one.details), None
        )
        if rendered:
            out.print(f"A prompt as the model reads it: {rendered[0]!r}")

    emit(result.to_dict(), json_, show)
    if not result.passed:
        raise typer.Exit(1)
