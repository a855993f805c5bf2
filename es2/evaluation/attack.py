"""The attack part of an evaluation: how far embeddings have to travel, and what steered models reply.

Base and tuned are each steered along directions learnt from their own embeddings, at several lengths. Of replies to
steered requests only a class and the beginning are kept.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from es2.analysis.probes import Probes
from es2.analysis.refusal import RULES_VERSION
from es2.analysis.resampling import interval, resample_pairs
from es2.analysis.results import Analysis
from es2.evaluation.behaviour import rate_interval
from es2.evaluation.results import SHOWN_CHARACTERS
from es2.evaluation.robustness import Attacker, make_attacker, needed_by_layer
from es2.evaluation.steering import Steered, Steering, steering_sweep
from es2.evaluation.suites import BOOTSTRAP, Work, choose_prompts, generate, load, rendered
from es2.models.chat_template import template_prefix
from es2.models.loading import load_tokenizer
from es2.prompts.prompt_set import HARMFUL, PromptSet
from es2.store.sources import LayerSource


def perturbation(
    work: Work,
    prompts: PromptSet,
    sources: Mapping[str, LayerSource],
    analysis: Analysis,
    targets: Sequence[int] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How far embeddings have to travel at every layer, and what steered models reply at the attacked ones.

    Args:
        prompts: all prompts that may be evaluated on.
        sources: embeddings of `prompts.measured()` at position `last`, by `base` and `tuned`.
        analysis: of those.
        targets: the run's target layers, which are attacked where the settings name no others.
    """
    config = work.config
    measured = prompts.measured()
    probes = probes_of(analysis)
    numbers = {"base": analysis.base_layers, "tuned": analysis.tuned_layers or ()}
    needed = needed_by_layer(
        measured,
        sources["base"],
        probes["base"],
        sources.get("tuned"),
        probes.get("tuned"),
        p0s=config.p0s,
        n_bootstrap=BOOTSTRAP,
        seed=config.seed,
    )
    attackers = attackers_of(work, measured, sources, analysis, targets)
    sample = choose_prompts(measured.select(measured.in_split("test")), config.steering_limit, HARMFUL)
    sweep = steering_sweep(config.directions, config.budgets, config.p0s)
    tokenizer = load_tokenizer(work.folder)
    tokens = rendered(work, tokenizer, sample)
    prefix = template_prefix(tokenizer, tokens, work.rendering)
    found = {
        name: _reply_steered(work, name, attackers[name], tokenizer, sample, tokens, prefix, sweep)
        for name in work.models
    }
    weights = resample_pairs(sample, BOOTSTRAP, config.seed)
    curve = [
        curve_point(steering.to_dict(), {name: found[name][index] for name in work.models}, weights)
        for index, steering in enumerate(sweep)
    ]
    shown = ("verdict", "text", "read")
    rows = [
        {"prompt": text, "steering": steering.to_dict()}
        | {name: {entry: found[name][index][row][entry] for entry in shown} for name in work.models}
        for index, steering in enumerate(sweep)
        for row, text in enumerate(sample.texts)
    ]
    document = {
        "layers": list(attackers["base"].layers),
        "probe_accuracy": {
            name: {str(layer): numbers[name][layer].numbers["probe_accuracy"].value for layer in attackers[name].layers}
            for name in work.models
        },
        "n_needed": int(((measured.labels == HARMFUL) & measured.in_split("test")).sum()),
        "n_prompts": len(sample),
        "needed": [record.to_dict() for record in needed],
        "needed_values": [
            {"layer": record.layer, "p0": record.p0}
            | {name: np.round(values, 5).tolist() for name, values in record.values.items()}
            for record in needed
            if record.layer in attackers["base"].layers
        ],
        "curve": curve,
    }
    return document, rows


def probes_of(analysis: Analysis) -> dict[str, Probes]:
    """The probes of the models that were analysed, by `base` and `tuned`."""
    return {"base": analysis.base_probes} | ({"tuned": analysis.tuned_probes} if analysis.tuned_probes else {})


def attackers_of(
    work: Work,
    measured: PromptSet,
    sources: Mapping[str, LayerSource],
    analysis: Analysis,
    targets: Sequence[int],
) -> dict[str, Attacker]:
    """An attacker of each model, who learns from that model's own embeddings; arguments as `perturbation`."""
    layers, probes = work.config.layers or targets or analysis.recommended, probes_of(analysis)
    return {name: make_attacker(measured, sources[name], probes[name], layers) for name in work.models}


def _reply_steered(
    work: Work,
    name: str,
    attacker: Attacker,
    tokenizer: Any,
    sample: PromptSet,
    tokens: list[tuple[int, ...]],
    prefix: tuple[int, ...],
    sweep: Sequence[Steering],
) -> list[list[dict[str, Any]]]:
    """The log's record of every steering (outer) and prompt (inner): a row each of the same passes."""
    cases = [(steering, row) for steering in sweep for row in range(len(sample))]
    fixed = {"attacker": attacker.digest, "seed": work.config.seed, "rules": RULES_VERSION}
    keys = [work.key(name, tokens[row], push=steering.to_dict(), **fixed) for steering, row in cases]
    if any(key not in work.log for key in keys):
        model = load(work, name)
        texts = [sample.texts[row] for _, row in cases]
        steered = Steered(model, attacker, [steering for steering, _ in cases], texts, work.config.seed)

        def entries(index: int, reply: tuple[int, ...], text: str) -> dict[str, Any]:
            return {
                "prompt": texts[index],
                "steering": cases[index][0].to_dict(),
                "layers": list(attacker.layers),
                "verdict": work.read(tokenizer, reply, text)[0],
                "text": text[:SHOWN_CHARACTERS],
                "read": steered.read.of(index),
            }

        every = [tokens[row] for _, row in cases]
        with steered:
            stage = f"steer {name}"
            generate(work, model, name, tokenizer, every, prefix, keys, entries, stage=stage, steering=steered)
        del model, steered
        gc.collect()
    records = [work.log[key] for key in keys]
    return [records[start : start + len(sample)] for start in range(0, len(records), len(sample))]


def curve_point(
    attack: Mapping[str, Any], found: Mapping[str, Sequence[Mapping[str, Any]]], weights: np.ndarray
) -> dict[str, Any]:
    """One steering or soft prompt: rates and what the hooks read, under each model, and base → tuned."""
    classes = {"dsr": "refusal", "degenerate": "degenerate", "answered": "answer", "unfinished": "unfinished"}
    flags = {
        name: {
            entry: np.array([record["verdict"] == one for record in records], dtype=np.float64)
            for entry, one in classes.items()
        }
        for name, records in found.items()
    }
    point: dict[str, Any] = dict(attack)
    for name, records in found.items():
        read = {entry: np.array([record["read"][entry] for record in records]) for entry in records[0]["read"]}
        point[name] = {entry: rate_interval(values, weights).to_dict() for entry, values in flags[name].items()} | {
            "probability": interval(weights @ read["probability"] / weights.sum(axis=1)).to_dict(),
            "relative_length": interval(weights @ read["relative"] / weights.sum(axis=1)).to_dict(),
        }
        if attack["p0"] is not None:
            point[name] |= {
                "largest_error": float(read["worst"].max()),
                "highest_probability": float(read["highest"].max()),
            }
    point.setdefault("tuned", None)
    point["change"] = None
    if "tuned" in flags:
        point["change"] = {
            entry: rate_interval(flags["tuned"][entry] - flags["base"][entry], weights, -1.0).to_dict()
            for entry in flags["base"]
        }
    return point
