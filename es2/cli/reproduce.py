"""The command `reproduce`; `es2.cli.main` registers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.table import Table

from es2.cli.prompt_options import with_prompts
from es2.cli.rendering_options import show_rendering, with_rendering
from es2.cli.terminal import (
    AllowMirror,
    AsJson,
    Device,
    Dtype,
    Model,
    emit,
    interval_cell,
    out,
    progress,
    show_given_as,
    show_outcome,
)
from es2.core.rendering import Rendering
from es2.models.catalogue import DEFAULT_MODEL

_ABILITY = ("over_refusal", "perplexity", "accuracy", "kl_prompt", "kl_reply", "agreement")


@with_rendering
@with_prompts
def reproduce(
    model: Model = DEFAULT_MODEL,
    config: Annotated[
        str | None,
        typer.Option(help="paper, reduced or a TOML file (docs/reproduce.md). Default: the one meant for the model."),
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="Evaluate on these instead, as for `es2 evaluate`; may be given again.")
    ] = None,
    *,
    rendering: Rendering,
    device: Device = None,
    dtype: Dtype = None,
    allow_mirror: AllowMirror = False,
    json_: AsJson = False,
) -> None:
    """The paper's protocol end to end: analyse, fine-tune, evaluate base against ES2, and print the paper's table.

    Interrupted, the same command goes on from what it has.
    """
    from es2.workflow.reproduce import protocol_for, read_protocol
    from es2.workflow.reproduce import reproduce as go_through

    protocol = read_protocol(config) if config is not None else protocol_for(model)
    given: dict[str, Any] = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
    given |= rendering.to_dict()
    protocol = replace(
        protocol,
        sources=protocol.sources.replace(evaluated_on=tuple(prompts or protocol.sources.evaluated_on)),
        finetune=protocol.finetune.replace(**given),
        evaluate=protocol.evaluate.replace(**given),
    )
    with progress() as report:
        result = go_through(protocol, model, report)
    emit(result, json_, lambda: _show(result))


def _show(result: Mapping[str, Any]) -> None:
    layers = ", ".join(map(str, result["target_layers"]))
    out.print(f"{result['model']}, {result['objective']} at layers {layers}, run {result['run']}.")
    show_outcome(result)
    show_given_as(result)
    show_rendering(result["rendering"])
    for found in result["evaluations"]:
        counts = found["n_prompts"] or {"harmful": 0, "harmless": 0}
        out.print(
            f"\n{found['prompts']}: {counts['harmful']} harmful and {counts['harmless']} harmless requests, "
            f"{found['n_steered'] or 0} steered, replies of up to {found['new_tokens']} tokens."
        )
        rows = found["table"]
        attacks = Table(
            "harmful requests", *(f"{title}, {row['row']}" for title in ("DSR", "degenerate") for row in rows)
        )
        for attack in rows[0]["dsr"]:
            attacks.add_row(
                attack, *(interval_cell(row[number][attack]) for number in ("dsr", "degenerate") for row in rows)
            )
        ability = Table("ability", *(name.replace("_", " ") for name in _ABILITY))
        for row in rows:
            ability.add_row(row["row"], *(interval_cell(row[name]) for name in _ABILITY))
        out.print(attacks)
        if any(row[name] for row in rows for name in _ABILITY):
            out.print(ability)
        for sentence in [*found["findings"], *found["problems"], *([found["note"]] if found["note"] else [])]:
            out.print(sentence)
        out.print(f"Kept with its replies: {found['path']}", soft_wrap=True)
