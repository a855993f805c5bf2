"""The model card that goes with an exported adapter or model: what it was made of, what was measured, what was not.

It travels, so it names no place on this machine: local models and files are called by their last part alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from es2.analysis.results import LENGTHS
from es2.core.versions import installed_versions
from es2.evaluation.results import run_ability, run_behaviour
from es2.jobs.job import Job
from es2.models.catalogue import CATALOGUE
from es2.prompts.sources import read_source
from es2.report.findings import accuracy_sentence, interval_of
from es2.report.glossary import COMPARED, TERMS, Term
from es2.report.labels import plain, shortened
from es2.training.config import FinetuneConfig

_PAPER = "[arXiv 2603.20206](https://arxiv.org/abs/2603.20206)"
_LIMITS = (
    "Separation was measured on prompts of the same origin as those it was tuned on; on others it may be less.",
    "Clouds that stand further apart do not by themselves make a model refuse, and a model that refuses more is not "
    "safe: attacks other than those that were tried may still succeed.",
    "What the base model gets wrong it still gets wrong. Nothing is known of abilities and languages that were not "
    "measured.",
)


def model_card(run: Job, config: FinetuneConfig, *, merged: bool = False) -> str:
    """The text of a `README.md` as the Hub reads it, of a run with these settings and a result or none."""
    result = run.result() or {}
    local = PurePath(config.model).is_absolute()
    known = {entry.name: entry.hub_id for entry in CATALOGUE}
    base = PurePath(config.model).name if local else known.get(config.model, config.model)
    head: dict[str, Any] = {"library_name": "transformers" if merged else "peft", "pipeline_tag": "text-generation"}
    head |= {} if local else {"base_model": base}
    head |= {"tags": ["es2", "safety", *([] if merged else ["lora"])]}
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in head.items()), "---", ""]
    kind = "The model" if merged else "An adapter"
    lines += [f"# {_text(run.name or run.id)}", ""]
    if run.config.get("imported"):
        lines += [f"{kind} of {_text(base)} that was trained elsewhere; ES2 Workbench compared it with its base.", ""]
    else:
        lines += [
            f"{kind} after Embedding Space Separation ({_PAPER}), made with ES2 Workbench from {_text(base)}: a short "
            "fine-tune that moves embeddings of harmful and harmless prompts apart at the target layers.",
            "",
        ]
    lines += ["## How to load it", "", *_loading(base, merged), ""]
    lines += ["## How it was made", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {_text(str(value))} |" for name, value in _facts(run, config, result)]
    lines += ["", "## What was measured", "", *_measured(run, result), "", "## Limits", ""]
    return "\n".join([*lines, *(f"- {sentence}" for sentence in _LIMITS)]) + "\n"


def _loading(base: str, merged: bool) -> Iterator[str]:
    """Python, indented; a folder is where the reader put it."""
    if not merged:
        yield "    from peft import PeftModel"
    yield "    from transformers import AutoModelForCausalLM"
    yield ""
    if merged:
        yield '    model = AutoModelForCausalLM.from_pretrained("FOLDER")'
    else:
        yield f"    base = AutoModelForCausalLM.from_pretrained({json.dumps(plain(base))})"
        yield '    model = PeftModel.from_pretrained(base, "FOLDER")'


def _facts(run: Job, config: FinetuneConfig, result: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "data", _source(str(run.config.get("prompts", "builtin")))
    yield "target layers", ", ".join(map(str, result.get("target_layers") or config.layers)) or "not known"
    if run.config.get("imported"):
        yield "training", "elsewhere; ES2 Workbench took the adapter in and compared it"
    else:
        yield "objective", config.objective
        yield "λ, weight of the KL", f"{config.kl_weight:g}"
        yield "method", config.method
        yield "steps", f"{result.get('best_step')} of {result.get('steps')} kept" if result else config.steps
        rate = config.learning_rate
        yield "learning rate", "automatic" if rate is None else f"{rate:g}"
        yield "pairs per step", config.pairs_per_step
        yield "seed", config.seed
        if result.get("trained"):
            yield "trained", result["trained"]["sentence"]
    yield "run", f"{run.id}, of {run.created[:10]}"
    yield "versions at export", ", ".join(f"{name} {text}" for name, text in installed_versions().items())


def _measured(run: Job, result: Mapping[str, Any]) -> Iterator[str]:
    behaviour = run_behaviour(run)
    verdict = result.get("verdict")
    if verdict is None or not result.get("before"):
        yield "The tuned model was not compared with its base."
        return
    yield f"**{_text(behaviour.outcome(verdict).capitalize())}.** {_text(result.get('verdict_reason') or '')}"
    yield ""
    measured = behaviour.name is not None
    yield _text(behaviour.warning or behaviour.reason) if measured else "What it replies was not measured."
    if measured:
        yield "DSR, the defence success rate, is the share of harmful requests that are refused."
    yield ""
    kls = result.get("kl_harmless_test") or {}
    budget = run.config.get("kl_budget")
    if kls:
        said = ", ".join(f"{value:.3f} on the {name}" for name, value in kls.items())
        yield f"KL from base on harmless test prompts, nats per token: {said}; budget {budget:g} each."
        yield ""
    ability = run_ability(run)
    yield "Ability was not measured." if ability is None else _text(accuracy_sentence(ability))
    yield ""
    yield "Base → tuned on test prompts that neither the fine-tune nor the probes saw; 95 % intervals in brackets."
    yield ""
    layers = [str(layer) for layer in result["target_layers"]]
    yield f"| number | {' | '.join(f'layer {layer}' for layer in layers)} |"
    yield f"| --- |{' --- |' * len(layers)}"
    shown = [term for term in (*TERMS, *COMPARED) if all(term.name in result["after"][layer] for layer in layers)]
    for term in shown:
        yield f"| {term.title} | {' | '.join(_cell(term, result, layer) for layer in layers)} |"
    yield ""
    for term in shown:
        yield f"- *{term.title}*: {term.definition}"


def _cell(term: Term, result: Mapping[str, Any], layer: str) -> str:
    after = result["after"][layer]

    def text(number: Mapping[str, float]) -> str:
        return f"{term.value(interval_of(number))} ({term.range(interval_of(number))})"

    if term in COMPARED:  # base against itself is always 1
        return text(after[term.name])
    ratio = (after["change"].get(term.name) or {}).get("ratio") if term.name in LENGTHS else None
    times = f", ×{ratio['value']:.2f} (×{ratio['low']:.2f} to ×{ratio['high']:.2f})" if ratio else ""
    return f"{text(result['before'][layer][term.name])} → {text(after[term.name])}{times}"


def _source(text: str) -> str:
    """What a source of prompts is called, without folders of this machine."""
    return " and ".join(map(_of_a_place, read_source(text).places))


def _of_a_place(place: str) -> str:
    name, colon, path = place.partition(":")
    if place.startswith("hf:") or "/" not in place:
        return place
    return f"{name}:{PurePath(path).name}" if colon and "/" not in name else PurePath(place).name


def _text(text: str) -> str:
    """On one line, with nothing in it that Markdown or HTML would interpret."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", shortened(plain(text), 1000))
