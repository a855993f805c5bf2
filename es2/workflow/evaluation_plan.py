"""How long an evaluation will take, before anything is loaded.

Nearly all of it is tokens, read and said, one after the other for many prompts at once; so tokens are counted and
divided by the speed that was seen in an earlier evaluation of the model here, or, before there is one, by the machine's
rate of matrix products (`es2.models.machine.this_machine`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from es2.analysis.results import AnalysisConfig
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.steering import pushes
from es2.models.machine import Machine
from es2.models.shape import Shape

_CHARACTERS_PER_TOKEN = 4
_TEMPLATE_TAIL = 8  # tokens after the user's text; the head is run once for all
_EFFICIENCY = 0.6  # of the rate of matrix products: 180 to 250 tokens/s with 135 M weights on two cores
_WEIGHT_BYTES_PER_SECOND = 1e10  # every step of a batch reads all weights
_TOKENS_AT_ONCE = 9_600
_START_SECONDS, _LOAD_SECONDS, _LOAD_BYTES_PER_SECOND = 8.0, 3.0, 1e9
_ANALYSIS_PRODUCTS = 24


@dataclass(frozen=True)
class Sample:
    """What an evaluation will be made of.

    Attributes:
        harmful: harmful prompts that are replied to.
        harmless: harmless ones.
        pushed: harmful prompts that are pushed.
        measured: prompts that are captured and analysed for the attack; 0 where they are on disk already.
        characters: of a prompt, on average.
    """

    harmful: int
    harmless: int
    pushed: int
    measured: int
    characters: float


def evaluation_seconds(
    config: EvaluateConfig,
    sample: Sample,
    shape: Shape,
    machine: Machine | None,
    *,
    tokens_per_second: float | None = None,
) -> Mapping[str, float]:
    """About how long each part takes.

    Args:
        config: what is to be done; with a run both models reply, else base alone.
        sample: on what.
        shape: the model's sizes.
        machine: where; may be None where `tokens_per_second` is known.
        tokens_per_second: what an earlier evaluation of this model came to here.

    Returns:
        Seconds by `loading`, `replies`, `ability` and `attacks`, of the suites that are asked for.
    """
    counted = tokens_per_second
    if counted is None:
        assert machine is not None
        counted = machine.flops * _EFFICIENCY / (2 * shape.parameters)
    n_models = 1 if config.run is None else 2
    weight_bytes = 4 * shape.parameters
    prompt = sample.characters / _CHARACTERS_PER_TOKEN + _TEMPLATE_TAIL
    exchange = prompt + config.new_tokens

    def saying(replies: int) -> float:
        if not replies:
            return 0.0
        reading = 0.0 if tokens_per_second else weight_bytes / _WEIGHT_BYTES_PER_SECOND
        batches = math.ceil(replies * exchange / _TOKENS_AT_ONCE)
        return n_models * (replies * exchange / counted + batches * config.new_tokens * reading)

    found: dict[str, float] = {}
    loads = 0
    if "refusal" in config.suites:
        found["replies"] = saying(sample.harmful + sample.harmless)
        loads += 1
    if "kl" in config.suites:
        said = 0 if "refusal" in config.suites else sample.harmless  # base's replies are needed alone
        found["ability"] = saying(said) / n_models + n_models * sample.harmless * (prompt + config.kl_tokens) / counted
        loads += 1
    if "perturbation" in config.suites:
        sweep = len(pushes(config.directions, config.budgets, config.p0s))
        capture = n_models * sample.measured * prompt / counted
        products = _ANALYSIS_PRODUCTS * shape.n_layers * AnalysisConfig().n_bootstrap * sample.measured * shape.d_model
        found["attacks"] = saying(sample.pushed * sweep) + capture + products / (2 * shape.parameters * counted)
        loads += n_models * (2 if sample.measured else 1)
    loading = _START_SECONDS + loads * (_LOAD_SECONDS + weight_bytes / _LOAD_BYTES_PER_SECOND)
    return {"loading": loading} | found
