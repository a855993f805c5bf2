"""The command that takes results to other tools: `export`; `es2.cli.main` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from es2.cli.runs import with_outcome
from es2.cli.terminal import AsJson, Position, Prompts, emit, out, progress, show_outcome
from es2.core.errors import InputError


def export(
    out_path: Annotated[
        Path, typer.Option("--out", help="A folder that does not exist yet or is empty; of activations a new file.")
    ],
    run: Annotated[str | None, typer.Option(help="The run (`es2 runs`) whose adapter or model is taken.")] = None,
    merged: Annotated[bool, typer.Option(help="Plain transformers weights, the fine-tune merged in.")] = False,
    activations: Annotated[
        str | None, typer.Option(help="The key or the folder of an activation set, which is taken instead of a run.")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="Of activations: parquet, a row for each prompt with text, label, split, coordinates x and y, and its "
            "margin at every layer; or safetensors, all embeddings."
        ),
    ] = "parquet",
    prompts: Prompts = "builtin",
    position: Position = "last",
    layer: Annotated[
        int | None, typer.Option(help="Whose coordinates a table holds. Default: the first that is recommended.")
    ] = None,
    embeddings: Annotated[bool, typer.Option(help="Put the layer's embeddings into the table, too.")] = False,
    json_: AsJson = False,
) -> None:
    """Take a run's adapter or tuned model, or an activation set, to other tools."""
    if (run is None) == (activations is None):
        raise InputError("Give either --run, for weights, or --activations, for embeddings.")
    if run is not None:
        _export_run(run, out_path, merged, json_)
        return
    from es2.workflow.activation_export import export_activations

    assert activations is not None
    document = export_activations(
        activations, out_path, format=format, prompts=prompts, position=position, layer=layer, embeddings=embeddings
    )

    def show() -> None:
        out.print(f"{document['n_prompts']:,} prompts of {document['model']}: {document['path']}", soft_wrap=True)
        if document["format"] == "parquet":
            out.print(f"x and y: {document['coordinates']} of layer {document['layer']}, position {position}.")
            if not document["margins"]:
                out.print("It has no margins, since this set has no analysis; `es2 analyze` makes one.")

    emit(document, json_, show)


def _export_run(run: str, out_folder: Path, merged: bool, json_: bool) -> None:
    from es2.workflow.runs import export as write
    from es2.workflow.runs import open_run

    exported = open_run(run)
    with progress() as report:
        folder = write(exported, out_folder, merged=merged, report=report)
    verdict = (exported.result() or {}).get("verdict")
    document = with_outcome({"run": run, "path": str(folder), "merged": merged, "verdict": verdict}, exported)

    def show() -> None:
        out.print(f"{'Merged model' if merged else 'Adapter'} of run {run}: {folder}")
        show_outcome(document)

    emit(document, json_, show)
