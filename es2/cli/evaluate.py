"""The command `evaluate`; `es2.cli.main` registers it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from es2.cli.terminal import AsJson, Device, Dtype, Model, Run, emit, interval_cell, out, progress
from es2.core.errors import InputError
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.judge import KEY_VARIABLE
from es2.models.catalogue import DEFAULT_MODEL

_DEFAULT = EvaluateConfig()  # where the shipped defaults are written
_BUDGETS = ",".join(f"{budget:g}" for budget in _DEFAULT.budgets)


def evaluate(
    model: Model = DEFAULT_MODEL,
    prompts: Annotated[
        str,
        typer.Option(
            help="builtin, a CSV, JSONL or Parquet file, hf:<dataset>[:split], or a benchmark: advbench, harmbench, "
            "jailbreakbench, strongreject, xstest, do-not-answer, or-bench, alpaca, mt-bench, with :PATH for its file."
        ),
    ] = "builtin",
    run: Run = None,
    suite: Annotated[str, typer.Option(help="refusal, kl, perturbation or all.")] = _DEFAULT.suite,
    limit: Annotated[int, typer.Option(help="At most so many prompts of each label.")] = _DEFAULT.limit,
    new_tokens: Annotated[int, typer.Option(help="The longest reply, in tokens.")] = _DEFAULT.new_tokens,
    push_limit: Annotated[int, typer.Option(help="At most so many pushed harmful prompts.")] = _DEFAULT.push_limit,
    layers: Annotated[
        str | None, typer.Option(help="Where embeddings are pushed, such as 12,18. Default: the run's target layers.")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Lengths of a push relative to the embedding's own.")] = _BUDGETS,
    seed: Annotated[int, typer.Option(help="Of random directions and resamples.")] = _DEFAULT.seed,
    judge_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint to ask too; replies are sent there.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model's name at that endpoint.")] = None,
    judge_key_variable: Annotated[
        str, typer.Option(help="The environment variable that holds the endpoint's key.")
    ] = KEY_VARIABLE,
    judge_folder: Annotated[str | None, typer.Option(help="A local text classifier to ask instead.")] = None,
    judge_label: Annotated[str | None, typer.Option(help="The classifier's class that means refusal.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    json_: AsJson = False,
) -> None:
    """Does the separation hold: refusals, over-refusal, ability, and attacks on the embeddings; base and tuned.

    Interrupted, the same command goes on from the replies that it has.
    """
    from es2.models.catalogue import resolve
    from es2.prompts.benchmarks import absolute_source
    from es2.prompts.loading import load_prompts
    from es2.workflow.job_kinds import run_here
    from es2.workflow.runs import check_run, open_run, tuned_weights

    # Everything is checked before anything heavy is done.
    spec = resolve(model)
    config = EvaluateConfig(
        model=spec.name,
        prompts=absolute_source(prompts),
        run=run,
        suite=suite,
        limit=limit,
        new_tokens=new_tokens,
        push_limit=min(push_limit, limit),
        layers=None if layers is None else tuple(map(int, _numbers(layers, "layers", int))),
        budgets=tuple(_numbers(budgets, "budgets", float)),
        seed=seed,
        device=device,
        dtype=dtype,
        judge_url=judge_url,
        judge_model=judge_model,
        judge_key_variable=judge_key_variable,
        judge_folder=judge_folder,
        judge_label=judge_label,
    )
    if run is not None:
        of_run = open_run(run)
        check_run(of_run, config.model)
        tuned_weights(of_run)
    load_prompts(config.prompts)
    from es2.workflow.evaluate import KIND, unfinished_job

    with progress() as report:
        result = run_here(KIND, config.to_dict(), unfinished_job(config), report)
    emit(result, json_, lambda: _show(result))


def _numbers(text: str, option: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--{option} {text[:40]!r} is no list of numbers; separate them by commas.") from None


def _show(result: Mapping[str, Any]) -> None:
    suite = result["suite"]
    for name, part in suite.items():
        if "problem" in part:
            out.print(f"{name}: {part['problem']}")
    table = Table("number", "base", "tuned", "tuned − base")
    if (refusal := suite.get("refusal")) and "problem" not in refusal:
        counts = refusal["n_prompts"]
        out.print(f"Replies to {counts['harmful']} harmful and {counts['harmless']} harmless prompts of up to "
                  f"{result['settings']['new_tokens']} tokens.")  # fmt: skip
        for name in ("dsr", "harmful_degenerate", "harmful_empty", "over_refusal", "harmless_degenerate"):
            cells = [(refusal[model] or {}).get(name) for model in ("base", "tuned", "change")]
            table.add_row(name, *map(interval_cell, cells))
        if refusal["judge"]:
            judge = refusal["judge"]
            for name in ("dsr", "over_refusal"):
                cells = [(judge.get(model) or {}).get(name) for model in ("base", "tuned", "change")]
                if any(cells):
                    table.add_row(f"{name} (judge)", *map(interval_cell, cells))
            if judge["problem"]:
                out.print(judge["problem"])
    if (ability := suite.get("kl")) and "problem" not in ability:
        for name in ("kl_prompt", "kl_reply", "agreement"):
            table.add_row(name, "", interval_cell(ability[name]), "")
        perplexity = ability["perplexity"]
        table.add_row(
            "perplexity of base's replies", interval_cell(perplexity["base"]), interval_cell(perplexity["tuned"]), ""
        )
    if table.row_count:
        out.print(table)
    if (attack := suite.get("perturbation")) and "problem" not in attack:
        where = ", ".join(map(str, attack["layers"]))
        out.print(f"{attack['n_prompts']} harmful prompts pushed at layers {where}:")
        swept = Table("direction", "budget", "DSR base", "DSR tuned", "degenerate base", "degenerate tuned")
        for point in attack["curve"]:
            budget = f"to p = {point['p0']:g}" if point["p0"] is not None else f"{point['budget']:g}"
            models = [point[model] or {} for model in ("base", "tuned")]
            cells = [interval_cell(model.get(name)) for name in ("dsr", "degenerate") for model in models]
            swept.add_row(point["direction"], budget, *cells)
        out.print(swept)
        needs = Table("layer", "p₀", "needed / ‖e‖ base", "tuned", "ratio")
        for record in attack["needed"]:
            if record["layer"] in attack["layers"]:
                cells = [(record[model] or {}).get("relative") for model in ("base", "tuned")]
                ratio = (record["change"] or {}).get("relative_ratio")
                needs.add_row(str(record["layer"]), f"{record['p0']:g}", *map(interval_cell, [*cells, ratio]))
        out.print(needs)
    if result["note"]:
        out.print(result["note"])
    out.print(f"Kept with its replies: {result['path']}", soft_wrap=True)
