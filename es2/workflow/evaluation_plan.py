"""How long an evaluation will take, before anything is loaded.

Tokens are counted and divided by the speed of an earlier evaluation of the model here, or, before there is one, by the
machine's rate of matrix products (`es2.models.machine.this_machine`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from es2.evaluation.config import EvaluateConfig
from es2.evaluation.direction import KINDS
from es2.evaluation.reply_log import base_log, read_replies
from es2.evaluation.soft_prompt import N_FITTED, OPENING_TOKENS, PROMPTS_PER_STEP, REFUSAL_TOKENS, STEPS, soft_sweep
from es2.evaluation.steering import steering_sweep
from es2.models import costs
from es2.models.batching import rows_that_fit
from es2.models.fingerprint import fingerprint
from es2.models.machine import Machine
from es2.models.shape import Shape, local_folder
from es2.prompts.prompt_set import HARMLESS, PromptSet
from es2.workflow.plan import analysis_products

_USUAL_LAYERS = 2  # targets, or recommended ones
_BACK_TOO = 2  # a pass back to the embeddings, without weights' gradients, costs as much as the pass itself


@dataclass(frozen=True)
class Sample:
    """The prompts of an evaluation.

    Attributes:
        harmful, harmless: number of prompts that are replied to.
        steered: number of harmful prompts that are steered.
        measured: number of prompts that are captured and analysed for the attack; 0 where they are on disk already.
        characters: of a prompt, on average.
        questions: number of multiple-choice questions.
        question_characters: of what is read of a question with its options, on average.
        directed: number of prompts, of both labels, that are replied to with directions removed or added.
        known: the share of the base's replies that are on disk, by suite (`known_shares`).
    """

    harmful: int
    harmless: int
    steered: int
    measured: int
    characters: float
    questions: int = 0
    question_characters: float = 0.0
    directed: int = 0
    known: Mapping[str, float] = field(default_factory=dict)


def replies_of_base(model: str) -> Path | None:
    """The file of what a base replied in this home, for any of its fine-tunes; None where there is none.

    Raises:
        InputError, MachineError: when the model cannot be read.
    """
    folder = local_folder(model)
    path = base_log(folder, fingerprint(folder).to_dict()) if folder is not None else None
    return path if path is not None and path.is_file() else None


def replied_by_base(path: Path) -> frozenset[str]:
    """What the base replied to, in the form that `known_shares` asks for; raises `MachineError`."""
    return frozenset(
        _asked(record["prompt"], record["new_tokens"], record.get("steering"), record.get("layers"))
        for record in read_replies(path).values()
        if {"prompt", "new_tokens"} <= record.keys()
    )


def _asked(prompt: str, n_tokens: int, steering: Any = None, layers: Sequence[int] | None = None) -> str:
    return json.dumps([prompt, n_tokens, steering, layers], sort_keys=True)


def known_shares(
    config: EvaluateConfig,
    replied: Collection[str],
    sample: PromptSet,
    steered: Sequence[str] = (),
    directed: PromptSet | None = None,
    layers: Sequence[int] = (),
) -> dict[str, float]:
    """The share of the base's replies that an evaluation will find, by suite; it need not load the model to tell.

    An attack counts as known for another set of probe prompts, too, which only the attacker's digest would tell apart.

    Args:
        replied: `replied_by_base`.
        sample, steered, directed: the prompts of the replies, of the attacks and of the causal check.
        layers: that are attacked; none where they are not known yet.
    """
    n_tokens = _reply_tokens(config)
    sweeps = {
        "perturbation": [one.to_dict() for one in steering_sweep(config.directions, config.budgets, config.p0s)],
        "soft_prompt": [one.to_dict() for one in soft_sweep(config.soft_lengths, config.soft_budgets)],
    }
    asked: dict[str, list[str]] = {
        "refusal": [_asked(text, n_tokens) for text in sample.texts],
        "kl": [_asked(text, n_tokens) for text in sample.select(sample.labels == HARMLESS).texts],
    }
    for suite, sweep in sweeps.items():
        asked[suite] = [_asked(text, n_tokens, one, [*layers]) for one in sweep for text in steered]
    if directed is not None and layers:
        asked["direction"] = [_asked(text, n_tokens) for text in directed.texts]
        for kind, label in KINDS.items():
            texts = directed.select(directed.labels == label).texts
            steerings = [
                {"kind": kind, "layer": layer, "control": control}
                for layer in layers
                for control in (None, *range(config.controls))
            ]
            asked["direction"] += [_asked(text, n_tokens, one) for one in steerings for text in texts]
    return {suite: _share(wanted, replied) for suite, wanted in asked.items()}


def _share(wanted: Sequence[str], among: Collection[str]) -> float:
    return sum(one in among for one in wanted) / max(len(wanted), 1)


def _reply_tokens(config: EvaluateConfig) -> int:
    return config.new_tokens + (config.thinking_tokens if config.thinking == "on" else 0)


def evaluation_seconds(
    config: EvaluateConfig,
    sample: Sample,
    shape: Shape,
    machine: Machine | None,
    *,
    tokens_per_second: float | None = None,
) -> Mapping[str, float]:
    """Estimated seconds of the suites asked for: `loading`, `replies`, `ability`, `attacks`, `directions`, `questions`.

    `tokens_per_second` is the speed of an earlier evaluation here; where it is known, `machine` may be None.
    """
    counted = tokens_per_second
    if counted is None:
        assert machine is not None
        counted = machine.flops * costs.REPLY_EFFICIENCY / (2 * shape.parameters)
    device = machine.device if machine else "cpu"
    n_models = 1 if config.run is None else 2
    weight_bytes = 4 * shape.parameters
    key_bytes = 4 * 2 * shape.d_kv * shape.n_layers
    prompt = sample.characters / costs.CHARACTERS_PER_TOKEN + costs.TEMPLATE_TAIL
    reply = _reply_tokens(config)
    exchange = prompt + reply

    def replying(replies: int, suite: str, models: int = n_models) -> float:
        reading = 0.0 if tokens_per_second else weight_bytes / costs.weight_bytes_per_second(device)
        rows = rows_that_fit(device, int(exchange * key_bytes))
        return (models - sample.known.get(suite, 0.0)) * costs.reply_seconds(
            replies, exchange, reply, tokens_per_second=counted, reading=reading, rows=rows
        )

    found: dict[str, float] = {}
    loads = 0
    if "refusal" in config.suites:
        found["replies"] = replying(sample.harmful + sample.harmless, "refusal")
        loads += 1
    if "kl" in config.suites:
        replies = 0 if "refusal" in config.suites else sample.harmless  # base's replies are needed alone
        found["ability"] = replying(replies, "kl", 1)
        found["ability"] += n_models * sample.harmless * (prompt + config.kl_tokens) / counted
        loads += 1
    attacks = [suite for suite in config.suites if suite in ("perturbation", "soft_prompt")]
    captured = n_models * sample.measured * prompt / counted
    captured += analysis_products(shape, sample.measured) / (2 * shape.parameters * counted)
    if attacks:
        found["attacks"] = captured
        loads += n_models * (len(attacks) + (sample.measured > 0))
    if "perturbation" in attacks:
        sweep = len(steering_sweep(config.directions, config.budgets, config.p0s))
        found["attacks"] += replying(sample.steered * sweep, "perturbation")
    if "soft_prompt" in attacks and sample.steered:
        sweep = len(soft_sweep(config.soft_lengths, config.soft_budgets))
        found["attacks"] += replying(sample.steered * sweep, "soft_prompt")
        found["attacks"] += replying(N_FITTED, "soft_prompt") * OPENING_TOKENS / config.new_tokens
        steps = STEPS * len(set(config.soft_lengths)) * len(set(config.soft_budgets))
        tokens = PROMPTS_PER_STEP * (prompt + max(config.soft_lengths) + REFUSAL_TOKENS)
        below_head = 1 - shape.head_parameters / shape.parameters  # few tokens go through the head
        n_fitted = n_models - (sample.known.get("soft_prompt") == 1)
        found["attacks"] += n_fitted * steps * tokens * _BACK_TOO * below_head / counted
    if "direction" in config.suites:
        layers = len(config.layers) if config.layers else _USUAL_LAYERS
        found["directions"] = captured + replying(sample.directed * (1 + layers * (1 + config.controls)), "direction")
        loads += n_models * (1 + (sample.measured > 0))
    if "ability" in config.suites:
        per_question = sample.question_characters / costs.CHARACTERS_PER_TOKEN
        found["questions"] = n_models * sample.questions * per_question / counted
        loads += 1
    return {"loading": costs.start_seconds(loads, weight_bytes)} | found
