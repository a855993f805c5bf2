"""The effect of a layer: a slope that is a derivative, gain and KL of a step, and a model that stays as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from es2.core.errors import InputError
from es2.models.blocks import find_blocks
from tests.benchmarks.effect_of_layers import LayerEffect, layer_effects
from tests.builders import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = (3, 4, 5)
LABELS = [1, 0] * 6
PROMPTS = [(*PREFIX, *range(10 + 3 * row, 14 + 3 * row + row % 4), 100 + label) for row, label in enumerate(LABELS)]


def effects(model: Any, **settings: Any) -> list[LayerEffect]:
    return layer_effects(model, PROMPTS, LABELS, n_prefix=len(PREFIX), **settings)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_small_step_gains_what_the_slope_says_and_costs_by_the_square(architecture: str) -> None:
    model = tiny_model(architecture)
    model.lm_head.weight.requires_grad_(False)
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    small, larger = effects(model, step=1e-3), effects(model, step=2e-3)
    json.dumps([one.to_dict() for one in small])
    for one, other in zip(small, larger, strict=True):
        assert list(one.gains) == list(range(one.layer, 3)), "no block changes what is below it"
        mean = sum(one.gains.values()) / len(one.gains)
        assert mean == pytest.approx(1e-3 * one.slope, rel=0.1)
        assert other.kl == pytest.approx(4 * one.kl, rel=0.15)
        assert other.gain_at(0.1) == pytest.approx(one.gain_at(0.1), rel=0.15)
        assert one.kl > 1e-7
    assert all(torch.equal(kept[name], weight) for name, weight in model.state_dict().items())
    assert [weight for weight in model.parameters() if not weight.requires_grad] == [model.lm_head.weight]
    assert all(weight.grad is None for weight in model.parameters())


def test_batches_change_nothing() -> None:
    whole, parts = (effects(tiny_model(), tokens_at_once=n) for n in (10_000, 20))
    for one, other in zip(whole, parts, strict=True):
        assert other.slope == pytest.approx(one.slope, rel=1e-4)
        assert other.kl == pytest.approx(one.kl, rel=1e-2)
        assert other.gains == pytest.approx(one.gains, rel=1e-2, abs=1e-5)


def test_a_block_without_weights_gains_and_costs_nothing() -> None:
    model = tiny_model()
    last = find_blocks(model)[1][-1]
    with torch.no_grad():
        for weight in last.parameters():
            weight.zero_()
    found = effects(model)
    assert (found[-1].slope, found[-1].kl, found[-1].gain_at(0.1)) == (0, 0, 0)
    assert found[0].slope > 0
    # What the last block passes on is what it gets, so both layers gain alike.
    assert found[1].gains[2] == pytest.approx(found[1].gains[1], rel=1e-4)


def test_what_cannot_be_measured_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="at least two prompts of each label"):
        layer_effects(model, PROMPTS[:3], LABELS[:3])
    with pytest.raises(InputError, match="positive number"):
        effects(model, step=0.0)
    with pytest.raises(InputError, match="float32"):
        effects(model.to(torch.bfloat16))
