"""The attack part of an evaluation: how far embeddings have to travel, and what steered models reply.

The needed perturbation of every layer comes from activation sets and the probes of the analysis. Then base and tuned
are each steered along directions that were learnt from their own embeddings, at several lengths; the curve over lengths
is the result. Of replies to steered requests only a verdict and the beginning are kept.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from es2.analysis.resampling import interval, resample_pairs
from es2.analysis.results import Analysis
from es2.evaluation.behaviour import rate_interval
from es2.evaluation.refusal import RULES_VERSION, judge_reply
from es2.evaluation.robustness import Attacker, make_attacker, needed_by_layer
from es2.evaluation.steering import Steering, steered, steering_sweep
from es2.evaluation.suites import BOOTSTRAP, Work, choose_prompts, count_tokens, rendered
from es2.models.batching import end_tokens
from es2.models.chat_template import template_prefix
from es2.models.loading import load_bridge, load_tokenizer
from es2.models.replies import greedy_replies
from es2.prompts.prompt_set import HARMFUL, PromptSet
from es2.store.sources import LayerSource

SHOWN_CHARACTERS = 200
"""So much is kept of a reply to a steered request: enough to see what it is."""


def perturbation(
    work: Work,
    prompts: PromptSet,
    sources: Mapping[str, LayerSource],
    analysis: Analysis,
    targets: Sequence[int] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How far embeddings have to travel at every layer, and what steered models reply at the attacked ones.

    Args:
        work: what the parts of the evaluation share.
        prompts: all prompts that may be looked at.
        sources: embeddings of `prompts.measured()` at position `last`, by `base` and `tuned`.
        analysis: of those.
        targets: the run's target layers, which are attacked where the settings name no others.
    """
    config = work.config
    measured = prompts.measured()
    probes = {"base": analysis.base_probes} | ({"tuned": analysis.tuned_probes} if analysis.tuned_probes else {})
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
    layers = config.layers or targets or analysis.recommended
    attackers = {name: make_attacker(measured, sources[name], probes[name], layers) for name in work.models}
    sample = choose_prompts(measured.select(measured.in_split("test")), config.steering_limit, HARMFUL)
    sweep = steering_sweep(config.directions, config.budgets, config.p0s)
    tokenizer = load_tokenizer(work.folder)
    tokens = rendered(work, tokenizer, sample)
    head = template_prefix(tokenizer, tokens)
    found = {
        name: _reply_steered(work, name, attackers[name], tokenizer, sample, tokens, head, sweep)
        for name in work.models
    }
    weights = resample_pairs(sample, BOOTSTRAP, config.seed)
    curve = [
        _point(steering, {name: found[name][index] for name in work.models}, weights)
        for index, steering in enumerate(sweep)
    ]
    rows = [
        {"prompt": text, "steering": steering.to_dict()}
        | {
            name: {entry: found[name][index][row][entry] for entry in ("verdict", "text", "read")}
            for name in work.models
        }
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


def _reply_steered(
    work: Work,
    name: str,
    attacker: Attacker,
    tokenizer: Any,
    sample: PromptSet,
    tokens: list[tuple[int, ...]],
    head: tuple[int, ...],
    sweep: Sequence[Steering],
) -> list[list[dict[str, Any]]]:
    """The log's record of every steering (outer) and prompt (inner); all steerings share batches."""
    cases = [(steering, row) for steering in sweep for row in range(len(sample))]
    every = [tokens[row] for _, row in cases]
    keys = [
        work.key(
            name,
            tokens[row],
            push=steering.to_dict(),
            attacker=attacker.digest,
            seed=work.config.seed,
            rules=RULES_VERSION,
        )
        for steering, row in cases
    ]
    done = {index for index, key in enumerate(keys) if key in work.log}
    if len(done) < len(cases):
        work.report("load", 0, 1)
        bridge = load_bridge(
            work.folder,
            adapter=work.weights if name == "tuned" else None,
            dtype=work.dtype,
            device=work.device,
        )
        work.report("load", 1, 1)
        model: Any = bridge.original_model

        def around(batch: list[int]) -> Any:
            chosen = [cases[index] for index in batch]
            texts = [sample.texts[row] for _, row in chosen]
            return steered(bridge, attacker, [steering for steering, _ in chosen], texts, work.config.seed)

        begun = time.perf_counter()
        for batch in greedy_replies(
            model,
            every,
            work.config.new_tokens,
            end_tokens(model),
            prefix=head,
            done=done,
            around=around,
            report=work.report,
            stage=f"steer {name}",
        ):
            records = []
            for place, (index, reply) in enumerate(zip(batch.rows, batch.replies, strict=True)):
                steering, row = cases[index]
                text = tokenizer.decode(reply, skip_special_tokens=True)
                records.append(
                    {
                        "key": keys[index],
                        "model": name,
                        "run": work.config.run if name == "tuned" else None,
                        "prompt": sample.texts[row],
                        "steering": steering.to_dict(),
                        "verdict": judge_reply(text),
                        "text": text[:SHOWN_CHARACTERS],
                        "read": batch.seen.of(place),
                    }
                )
            work.log.add(records)
            begun = count_tokens(work, begun, batch.replies, [every[index] for index in batch.rows], len(head))
        del bridge, model
        gc.collect()
    records = [work.log[key] for key in keys]
    return [records[start : start + len(sample)] for start in range(0, len(records), len(sample))]


def _point(steering: Steering, found: Mapping[str, Sequence[Mapping[str, Any]]], weights: np.ndarray) -> dict[str, Any]:
    """One steering: rates and what the hooks read, under each model, and base → tuned."""
    flags = {
        name: {
            "dsr": np.array([record["verdict"] == "refusal" for record in records], dtype=np.float64),
            "degenerate": np.array([record["verdict"] == "degenerate" for record in records], dtype=np.float64),
            "answered": np.array([record["verdict"] == "answer" for record in records], dtype=np.float64),
        }
        for name, records in found.items()
    }
    point: dict[str, Any] = steering.to_dict()
    for name, records in found.items():
        read = {entry: np.array([record["read"][entry] for record in records]) for entry in records[0]["read"]}
        point[name] = {entry: rate_interval(values, weights).to_dict() for entry, values in flags[name].items()} | {
            "probability": interval(weights @ read["probability"] / weights.sum(axis=1)).to_dict(),
            "relative_length": interval(weights @ read["relative"] / weights.sum(axis=1)).to_dict(),
        }
        if steering.p0 is not None:
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
