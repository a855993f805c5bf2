"""The command `series`: runs, checkpoints and adapters of one base side by side; `es2.cli.main` registers it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from es2.cli.prompt_options import read_prompts, reading_of, with_prompts
from es2.cli.rendering_options import with_rendering
from es2.cli.terminal import AsJson, Model, Position, Prompts, emit, interval_cell, out, progress
from es2.core.errors import InputError
from es2.core.rendering import Rendering
from es2.models.catalogue import DEFAULT_MODEL

if TYPE_CHECKING:
    from es2.store.activation_set import ActivationSet

_COLUMNS = ("probe_accuracy", "fisher_ratio", "mean_difference_margin")


@with_rendering
@with_prompts
def series(
    sets: Annotated[
        list[str] | None,
        typer.Argument(
            help="Ids of runs, folders of captured checkpoints, or keys of activation sets. Default: all there are."
        ),
    ] = None,
    model: Model = DEFAULT_MODEL,
    prompts: Prompts = "builtin",
    position: Position = "last",
    layer: Annotated[int | None, typer.Option(help="Of this layer alone; by default of all.")] = None,
    *,
    rendering: Rendering,
    json_: AsJson = False,
) -> None:
    """Numbers by step of a base and its runs, checkpoints and adapters, from embeddings that are on disk.

    Checkpoints are those that a training with the RepresentationCallback has left; no model is loaded.
    """
    from es2.workflow.series import analyse_members, find_base, open_members, series_document

    prompt_set = read_prompts(prompts)
    measured = prompt_set.measured()
    base = find_base(model, measured, position, rendering)
    _check_layer(layer, base)
    members = open_members(sets or (), base, position)
    with progress() as report:
        found = analyse_members(base, members, measured, position, report=report)
    document: dict[str, Any] = series_document(found, layer) | {"position": position, "reading": reading_of(prompt_set)}

    def show() -> None:
        analysis = found[0].analysis
        at = layer if layer is not None or analysis is None else analysis.best_layer
        table = Table(f"at layer {at}", "step", *(column.replace("_", " ") for column in _COLUMNS), "KL prompt, reply")
        for member in found:
            (numbers,) = member.to_dict(at)["layers"]
            step = "" if member.step is None else str(member.step)
            kl = ", ".join(f"{value:.3f}" for value in (member.kl or {}).values())
            table.add_row(member.name, step, *(interval_cell(numbers[column]) for column in _COLUMNS), kl)
        out.print(table)

    emit(document, json_, show)


def _check_layer(layer: int | None, base: ActivationSet) -> None:
    if layer is not None and not 0 <= layer < base.n_layers:
        raise InputError(f"Layer {layer} is out of range: {base.model} has layers 0 to {base.n_layers - 1}.")
