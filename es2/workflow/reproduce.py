"""The paper's protocol from end to end: capture and analyse, fine-tune, evaluate base against tuned, one table.

Every step is that of `es2 analyze`, `es2 finetune` or `es2 evaluate`, with settings from one TOML file. Each is looked
for on disk first, so an interrupted reproduction goes on where it was.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from es2.core.errors import InputError, one_line
from es2.core.files import expanded
from es2.core.former import todays_names
from es2.core.progress import Reporter, silent
from es2.core.rendering import UNMENTIONED
from es2.core.settings import Settings, setting
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.results import run_behaviour
from es2.jobs.queue import find_jobs, open_job
from es2.models.catalogue import resolve
from es2.models.folders import model_folder
from es2.models.shape import count_layers
from es2.prompts.benchmarks import absolute_source
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.prompts.questions import absolute_questions, load_questions
from es2.report.findings import (
    DIRECTION_NAMES,
    attack_sentence,
    needed_sentence,
    refusal_sentence,
    side_effects,
    soft_sentence,
)
from es2.training.config import FinetuneConfig
from es2.workflow import evaluate as evaluating
from es2.workflow.job_kinds import run_here
from es2.workflow.prepare import prepare
from es2.workflow.runs import KIND as FINETUNE

SHIPPED = ("paper", "reduced")
"""The configs that come with the package, by name."""

S = TypeVar("S", bound=Settings)
_MAX_BYTES = 2**20
_DECIDED = {"model", "run", "suite", "prompts", "replies"}  # by the protocol itself


class Sources(Settings):
    """What a protocol is about."""

    models: tuple[str, ...] = setting((), "The models that it is meant for.")
    tuned_on: str = setting("builtin", "The source of the prompts to tune on.")
    evaluated_on: tuple[str, ...] = setting(("builtin",), "Sources of prompts; each gives a table of its own.")

    def model_post_init(self, _: Any) -> None:
        """Refuse a protocol without prompts (`InputError`)."""
        if not self.evaluated_on:
            raise InputError("There is nothing in evaluated_on; name at least one source of prompts, such as builtin.")


@dataclass(frozen=True)
class Protocol:
    """The content of a config file; a fine-tune without layers has those that the analysis of the base recommends."""

    name: str
    sources: Sources
    finetune: FinetuneConfig
    evaluate: EvaluateConfig


def protocol_for(model: str) -> Protocol:
    """The shipped protocol that is meant for this model.

    Raises:
        InputError: when there is none.
    """
    name = resolve(model).name
    for shipped in SHIPPED:
        if name in (protocol := read_protocol(shipped)).sources.models:
            return protocol
    raise InputError(
        f"No shipped config is meant for the model {name!r}; choose with --config {' or --config '.join(SHIPPED)}, or "
        "give a file of your own."
    )


def read_protocol(source: str) -> Protocol:
    """The protocol in one of `SHIPPED`, or in a TOML file.

    The file has settings of `Sources`, and the tables `finetune` and `evaluate` with those of the two configs.

    Raises:
        InputError: when it cannot be read, or a setting is unknown or cannot be.
    """
    where = f"The config {source[:300]!r}"
    try:
        if source in SHIPPED:
            text = (resources.files("es2") / "data" / f"reproduce-{source}.toml").read_text(encoding="utf-8")
        else:
            path = Path(expanded(source))
            if not path.is_file() or path.stat().st_size > _MAX_BYTES:
                raise InputError(f"{where} is no TOML file; give {', '.join(SHIPPED)} or the path of one.")
            text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise InputError(
            f"{where} cannot be read ({error.strerror or error}); give {', '.join(SHIPPED)} or a TOML file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no TOML ({one_line(error)}); mend it there.") from error

    finetune, evaluate = (document.pop(name, {}) for name in ("finetune", "evaluate"))
    for name, table in (("finetune", finetune), ("evaluate", evaluate)):
        if not isinstance(table, dict):
            raise InputError(f"{where} has {name!r} as a value; write it as a table, [{name}].")
    finetune = {"layers": [], **finetune}
    return Protocol(
        source,
        _read(Sources, document, where),
        _read(FinetuneConfig, finetune, f"{where}, [finetune],"),
        _read(EvaluateConfig, evaluate, f"{where}, [evaluate],"),
    )


def _read(settings: type[S], table: Mapping[str, Any], where: str) -> S:
    """The settings in a table; refuses a setting that there is none of (`InputError`)."""
    table = todays_names(dict(table))
    known = set(settings.model_fields) - _DECIDED
    for name in table.keys() - known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}."
        raise InputError(f"{where} has no setting {name[:80]!r}; {hint}")
    return settings.read(table, where)


def reproduce(protocol: Protocol, model: str, report: Reporter = silent) -> dict[str, Any]:
    """Go through the protocol with one model; `report` may raise to stop.

    Returns:
        JSON values: the run with its verdict, and `evaluations`, one for each source of prompts: its `table`
        (`table_rows`), what was found in words, and `path`, where the whole evaluation is kept.

    Raises:
        InputError, MachineError: as each of the steps; everything that can be is checked before the first of them.
    """
    source = absolute_source(protocol.sources.tuned_on)
    prompts = load_prompts(source)
    sets = {name: load_prompts(name) for name in map(absolute_source, protocol.sources.evaluated_on)}
    load_questions(protocol.evaluate.questions)
    spec = resolve(model)
    config = protocol.finetune.replace(model=spec.name)
    n_layers = count_layers(model_folder(spec, report))
    stand_in = config if config.layers else config.replace(layers=(0,), first_block=None)
    stand_in.check(n_layers, prompts)

    prepared = prepare(spec.name, prompts, rendering=config, device=config.device, dtype=config.dtype, report=report)
    if not config.layers:
        config = config.replace(layers=prepared.analysis.recommended)
        config.check(n_layers, prompts)
    tuned = _tune(config, source, prompts, prepared.activations.key, report)
    evaluated = [_evaluate(protocol, spec.name, tuned, name, found, report) for name, found in sets.items()]
    kept = ("run", "status", "reason", "target_layers", "verdict", "verdict_reason", "kl_harmless_test")
    return {
        "model": spec.name,
        "config": protocol.name,
        "objective": config.objective,
        "given_as": prepared.activations.given_as,
        "rendering": prepared.activations.rendering,
        **{name: tuned[name] for name in kept},
        **run_behaviour(open_job(tuned["run"])).to_dict(tuned["verdict"]),
        "evaluations": evaluated,
    }


def _tune(config: FinetuneConfig, source: str, prompts: PromptSet, base: str, report: Reporter) -> dict[str, Any]:
    """What the run of this config, these prompts and this base came to: one on disk, gone on with or made."""
    # Whether a run made replies of its own is all the same: its evaluations follow.
    wanted = {name: value for name, value in config.to_dict().items() if name != "replies"} | {"prompts": source}
    unfinished = None
    for run in find_jobs(FINETUNE, UNMENTIONED | wanted | {"sweep": None}):  # a sweep may have pruned its own
        if run.config.get("prompts_digest", prompts.digest) != prompts.digest:
            continue  # the file had other prompts then
        result = run.result()
        if result is not None and result.get("activations", {}).get("base") == base:
            return result
        if result is None and unfinished is None:
            unfinished = run
    return run_here(FINETUNE, wanted | {"replies": False, "prompts_digest": prompts.digest}, unfinished, report)


def _evaluate(
    protocol: Protocol, model: str, tuned: Mapping[str, Any], source: str, prompts: PromptSet, report: Reporter
) -> dict[str, Any]:
    """One evaluation of the run, from disk or made, as the paper would tabulate it."""
    questions = absolute_questions(protocol.evaluate.questions)
    config = protocol.evaluate.replace(model=model, run=tuned["run"], prompts=source, questions=questions, suite="all")
    document = evaluating.find_evaluation(config, prompts, open_job(tuned["run"]))
    if document is None:
        document = run_here(evaluating.KIND, config.to_dict(), evaluating.unfinished_job(config), report)
    suite = {name: part for name, part in document["suite"].items() if "problem" not in part}
    attack, refusal = suite.get("perturbation"), suite.get("refusal")
    findings = []
    if refusal is not None:
        findings += [refusal_sentence(refusal, tuned["verdict"] == "separated"), *side_effects(refusal)]
    if attack is not None:
        findings += [*filter(None, [needed_sentence(attack)]), attack_sentence(attack)]
    if (soft := suite.get("soft_prompt")) is not None:
        findings.append(soft_sentence(soft))
    return {
        "prompts": source,
        "path": document["path"],
        "n_prompts": refusal and refusal["n_prompts"],
        "n_steered": attack and attack["n_prompts"],
        "new_tokens": config.new_tokens,
        "table": table_rows(suite),
        "findings": findings,
        "problems": list(dict.fromkeys(part["problem"] for part in document["suite"].values() if "problem" in part)),
        "note": document["note"],
    }


def table_rows(suite: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The paper's table from the parts of an evaluation that came to something.

    Returns:
        A row each for `base` and `ES2`: `dsr` and `degenerate` (shares of harmful requests, by column: `direct`, then
        each steering and soft prompt), `over_refusal`, `perplexity`, `accuracy` (multiple choice), `kl_prompt`,
        `kl_reply` and `agreement`; numbers have `value`, `low` and `high`, and are None where they are of no meaning or
        were not measured.
    """
    refusal, ability, choice = (suite.get(name) for name in ("refusal", "kl", "ability"))
    curves = [*suite.get("perturbation", {}).get("curve", ()), *suite.get("soft_prompt", {}).get("curve", ())]
    attacks = [point for point in curves if point["direction"] != "none"]
    rows = []
    for model, name in (("base", "base"), ("tuned", "ES2")):
        replied = refusal[model] if refusal else {}
        row: dict[str, Any] = {
            "row": name,
            "dsr": {"direct": replied.get("dsr")},
            "degenerate": {"direct": replied.get("harmful_degenerate")},
            "over_refusal": replied.get("over_refusal"),
            "perplexity": ability and ability["perplexity"][model],
            "accuracy": choice and choice[model] and choice[model]["accuracy"],
        }
        for point in attacks:
            for number in ("dsr", "degenerate"):
                row[number][_column(point)] = point[model][number]
        for number in ("kl_prompt", "kl_reply", "agreement"):
            row[number] = ability[number] if ability and model == "tuned" else None
        rows.append(row)
    return rows


def _column(point: Mapping[str, Any]) -> str:
    how = f"{point['budget']:g}" if point["p0"] is None else f"to p₀ {point['p0']:g}"
    how += f", {point['length']} vectors" if point.get("length") else ""
    return f"{DIRECTION_NAMES[point['direction']]} {how}"
