"""The command `evaluate`; `es2.cli.main` registers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from es2.cli.options import with_settings
from es2.cli.prompt_options import read_prompts, with_prompts
from es2.cli.rendering_options import show_rendering, with_rendering
from es2.cli.terminal import AllowMirror, AsJson, emit, interval_cell, out, progress, show_given_as, show_outcome
from es2.core.rendering import Rendering
from es2.evaluation.config import EvaluateConfig
from es2.report.findings import STEERING_NAMES, accuracy_sentence, direction_findings, direction_rows


@with_rendering
@with_prompts
@with_settings(EvaluateConfig)
def evaluate(
    *, rendering: Rendering, settings: dict[str, Any], allow_mirror: AllowMirror = False, json_: AsJson = False
) -> None:
    """Does the separation hold: refusals, over-refusal, ability, and attacks on the embeddings; base and tuned.

    Interrupted, the same command goes on from the replies that it has.
    """
    from es2.workflow.foreground import decide_evaluation, evaluate_here

    config = decide_evaluation(settings, rendering)
    read_prompts(config.prompts)
    with progress() as report:
        result = evaluate_here(config, report)
    emit(result, json_, lambda: _show(result))


def _cells(part: Mapping[str, Any], name: str) -> list[Mapping[str, float] | None]:
    return [(part.get(model) or {}).get(name) for model in ("base", "tuned", "change")]


def _swept(curve: Sequence[Mapping[str, Any]]) -> Table:
    """The rates under every steering or soft prompt."""
    table = Table("direction", "budget", "DSR base", "DSR tuned", "degenerate base", "degenerate tuned")
    for point in curve:
        budget = f"to p = {point['p0']:g}" if point["p0"] is not None else f"{point['budget']:g}"
        budget += f", {point['length']} vectors" if point.get("length") else ""
        models = [point[model] or {} for model in ("base", "tuned")]
        cells = [interval_cell(model.get(name)) for name in ("dsr", "degenerate") for model in models]
        table.add_row(point["direction"], budget, *cells)
    return table


def _directions(part: Mapping[str, Any]) -> Table:
    """The refused shares before and after, under the direction and under random ones."""
    table = Table("layer", "direction", "prompts", "model", "before", "after", "random", "after − random")
    for layer, model, kind, refused in direction_rows(part):
        cells = [interval_cell(refused[name]) for name in ("before", "direction", "control", "over_control")]
        label = {"remove": "harmful", "add": "harmless"}[kind]
        table.add_row(str(layer), STEERING_NAMES[kind], f"{part['n_prompts'][label]} {label}", model, *cells)
    return table


def _show(result: Mapping[str, Any]) -> None:
    suite = result["suite"]
    for name, part in suite.items():
        if "problem" in part:
            out.print(f"{name}: {part['problem']}")
    table = Table("number", "base", "tuned", "tuned − base")
    if (refusal := suite.get("refusal")) and "problem" not in refusal:
        counts = refusal["n_prompts"]
        thought = f", after up to {result['settings'].get('thinking_tokens', 512)} of thinking" * bool(
            result.get("thinks")
        )
        out.print(f"Replies to {counts['harmful']} harmful and {counts['harmless']} harmless prompts of up to "
                  f"{result['settings']['new_tokens']} tokens{thought}.")  # fmt: skip
        names = ["dsr", "harmful_degenerate", "harmful_empty", "over_refusal", "harmless_degenerate"]
        for name in names + ["harmful_unfinished", "harmless_unfinished"] * bool(result.get("thinks")):
            table.add_row(name, *map(interval_cell, _cells(refusal, name)))
        if judge := refusal["judge"]:
            for name in ("dsr", "over_refusal"):
                if any(judged := _cells(judge, name)):
                    table.add_row(f"{name} (judge)", *map(interval_cell, judged))
            if judge["problem"]:
                out.print(judge["problem"])
    if (ability := suite.get("kl")) and "problem" not in ability:
        for name in ("kl_prompt", "kl_reply", "agreement"):
            table.add_row(name, "", interval_cell(ability[name]), "")
        perplexity = (interval_cell(ability["perplexity"][model]) for model in ("base", "tuned"))
        table.add_row("perplexity of base's replies", *perplexity, "")
    if (choice := suite.get("ability")) and "problem" not in choice:
        table.add_row("accuracy (multiple choice)", *map(interval_cell, _cells(choice, "accuracy")))
        out.print(accuracy_sentence(choice))
    if table.row_count:
        out.print(table)
    if (attack := suite.get("perturbation")) and "problem" not in attack:
        where = ", ".join(map(str, attack["layers"]))
        out.print(f"{attack['n_prompts']} harmful prompts steered at layers {where}:")
        out.print(_swept(attack["curve"]))
        needs = Table("layer", "p₀", "needed / ‖e‖ base", "tuned", "ratio")
        for record in attack["needed"]:
            if record["layer"] in attack["layers"]:
                lengths = [(record[model] or {}).get("relative") for model in ("base", "tuned")]
                ratio = (record["change"] or {}).get("relative_ratio")
                needs.add_row(str(record["layer"]), f"{record['p0']:g}", *map(interval_cell, [*lengths, ratio]))
        out.print(needs)
    if (soft := suite.get("soft_prompt")) and "problem" not in soft:
        out.print(f"{soft['n_prompts']} harmful prompts after a soft prompt, fitted on {soft['n_fitted']} others:")
        out.print(_swept(soft["curve"]))
    if (directions := suite.get("direction")) and "problem" not in directions:
        random = f"beside random directions of its length ({directions['controls']})"
        out.print(f"Share refused with the difference of means removed and added, {random}:")
        out.print(_directions(directions))
        for which, reason in direction_findings(directions):
            out.print(f"{which}. {reason}")
    if "outcome" in result:
        show_outcome(result)
    for sentence in (result["note"], *result["warnings"]):
        if sentence:
            out.print(sentence)
    show_given_as(result)
    show_rendering(result.get("rendering"))
    out.print(f"Kept with its replies: {result['path']}", soft_wrap=True)
