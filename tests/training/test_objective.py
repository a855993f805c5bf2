"""The separation terms and the KL: values worked by hand, exact gradients, and what must not break them."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from es2.core.errors import InputError
from es2.models import kl as kl_module
from es2.models.kl import LmHead, read_lm_head, token_kl
from es2.training.objective import (
    BaseLayer,
    anchored,
    distance,
    es2_loss,
    fisher,
    margin,
    measure_base,
    refusal,
    running_direction,
    separation,
)
from es2.training.terms import OBJECTIVES, Term, parse_objective
from tests.builders import ARCHITECTURES, tiny_model

# Two clouds in the plane: harmful at (3, ±1), harmless at (0, ±1). Means (3, 0) and (0, 0).
HARMFUL = torch.tensor([[3.0, 1.0], [3.0, -1.0]])
HARMLESS = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
SCALE = math.sqrt((10 + 1) / 2)
PAIRWISE = (3 + math.sqrt(13)) / 2  # two pairs at distance 3, two at √(9 + 4)


def clouds(n: int = 5, d_model: int = 4, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    harmful = torch.randn(n, d_model, generator=generator, dtype=torch.float64) + 1
    harmless = torch.randn(n + 1, d_model, generator=generator, dtype=torch.float64)
    return harmful.to(dtype), harmless.to(dtype)


def every_term(harmful: Tensor, harmless: Tensor, base: BaseLayer, harmless_base: Tensor) -> dict[str, Tensor]:
    return {
        "distance": distance(harmful, harmless, base),
        "anchored": anchored(harmful, harmless, harmless_base, base),
        "fisher": fisher(harmful, harmless, base),
        "margin": margin(harmful, harmless, base.difference),
    }


class TestByHand:
    def test_base_constants(self) -> None:
        base = measure_base(HARMFUL, HARMLESS)
        assert base.pairwise_distance == pytest.approx(PAIRWISE)
        assert base.harmless_mean.tolist() == [0, 0]
        assert base.distance_to_harmless_mean == pytest.approx(math.sqrt(10))
        assert base.scale == pytest.approx(SCALE)
        assert base.difference.tolist() == pytest.approx([3 / SCALE, 0])

    def test_distance_is_one_for_the_base_and_two_for_twice_as_far(self) -> None:
        base = measure_base(HARMFUL, HARMLESS)
        assert distance(HARMFUL, HARMLESS, base).item() == pytest.approx(1)
        assert distance(2 * HARMFUL, 2 * HARMLESS, base).item() == pytest.approx(2)

    def test_anchored_pays_for_moving_the_harmless_cloud(self) -> None:
        base = measure_base(HARMFUL, HARMLESS)
        moved = HARMLESS + torch.tensor([-2.0, 0.0])
        far = HARMFUL * 3
        assert anchored(HARMFUL, HARMLESS, HARMLESS, base).item() == pytest.approx(1)
        assert anchored(far, HARMLESS, HARMLESS, base).item() == pytest.approx(3)
        assert anchored(far, moved, HARMLESS, base).item() == pytest.approx(3 - 4 / SCALE**2)

    def test_fisher_is_the_log_of_between_over_within(self) -> None:
        # ‖μ₁ − μ₀‖² = 9; tr Σ = (1 + 1) / (2 − 1) = 2 for each class.
        value = fisher(HARMFUL, HARMLESS, measure_base(HARMFUL, HARMLESS)).item()
        assert value == pytest.approx(math.log(9 / 2), abs=1e-5)

    def test_margin_is_the_softened_shortfall(self) -> None:
        # Midpoint (1.5, 0): every prompt stands 1.5 on its side, all four alike.
        value = margin(HARMFUL, HARMLESS, torch.tensor([5.0, 0.0]), target=0.7).item()
        shortfall = 0.7 - 1.5 / SCALE
        assert value == pytest.approx(-math.log1p(math.exp(24 * shortfall)) / 24, rel=1e-5)

    def test_running_direction_counts_a_batch_for_a_tenth(self) -> None:
        direction = running_direction(torch.tensor([0.0, 1.0]), HARMFUL, HARMLESS)
        assert direction.tolist() == pytest.approx([0.1 * 3 / SCALE, 0.9])

    def test_mixture_is_the_weighted_sum_averaged_over_layers(self) -> None:
        harmful, harmless = clouds()
        two = torch.stack([harmful, 2 * harmful + 1], dim=1), torch.stack([harmless, harmless - 3], dim=1)
        base = {layer: measure_base(two[0][:, i], two[1][:, i]) for i, layer in enumerate((3, 7))}
        harmless_base = two[1] + 0.1
        directions = torch.stack([constants.difference for constants in base.values()])
        terms = parse_objective("2*distance+0.5*anchored+fisher+3*margin")
        weights = {"distance": 2, "anchored": 0.5, "fisher": 1, "margin": 3}
        by_layer = [
            every_term(two[0][:, i], two[1][:, i], constants, harmless_base[:, i])
            for i, constants in enumerate(base.values())
        ]
        expected = sum(weights[name] * value for values in by_layer for name, value in values.items()) / 2
        value = separation(terms, *two, harmless_base=harmless_base, base=base, directions=directions)
        assert value.item() == pytest.approx(float(expected))

    def test_refusal(self) -> None:
        harmful, harmless = torch.tensor([1.0, 3.0]), torch.tensor([-1.0])
        by_hand = -((math.log(2) + math.log1p(math.exp(-2))) / 2 + math.log1p(math.exp(1))) / 2
        assert refusal(harmful, harmless, usual=-1.0).item() == pytest.approx(by_hand)
        better, worse = refusal(harmful + 1, harmless, -1.0), refusal(harmful, harmless + 1, -1.0)
        assert better > refusal(harmful, harmless, -1.0) > worse

    def test_refusal_is_added_once_however_many_layers(self) -> None:
        two = [torch.stack([cloud, cloud], dim=1) for cloud in clouds()]
        base = {layer: measure_base(*(cloud[:, 0] for cloud in two)) for layer in (1, 2)}
        directions = torch.stack([constants.difference for constants in base.values()])
        odds = torch.linspace(0.5, 2.0, len(two[0])), torch.linspace(-1.0, 0.0, len(two[1])), -0.5
        kept = {"harmless_base": None, "base": base, "directions": directions}
        alone = separation(parse_objective("3*margin"), *two, **kept)
        terms = parse_objective("3*margin+2*refusal")
        both = separation(terms, *two, **kept, log_odds=odds)
        assert both.item() == pytest.approx(float(alone + 2 * refusal(*odds)))
        assert separation(terms, *two, **kept).item() == alone.item(), "a base that refuses nothing"

    def test_log_odds_are_those_of_the_whole_softmax(self) -> None:
        torch.manual_seed(0)
        head, states = LmHead(torch.randn(7, 3)), torch.randn(4, 3)
        among = torch.tensor([True, False, False, True, False, False, False])
        p = head.logits(states).softmax(dim=-1)[:, among].sum(dim=-1)
        torch.testing.assert_close(head.log_odds(states, among), torch.log(p / (1 - p)))

    def test_es2_loss(self) -> None:
        assert es2_loss(separation=3.0, kl_prompt=0.1, kl_reply=0.2, kl_weight=2.0) == pytest.approx(-2.4)


class TestGradients:
    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_gradcheck_in_float64(self, name: str) -> None:
        harmful, harmless = (cloud.requires_grad_() for cloud in clouds())
        base = measure_base(*clouds(seed=1))
        harmless_base = clouds(seed=2)[1]
        assert torch.autograd.gradcheck(
            lambda a, b: every_term(a, b, base, harmless_base)[name], (harmful, harmless), atol=1e-6
        )

    @pytest.mark.parametrize("name", ["fisher", "margin"])
    def test_inflating_pays_nothing_in_the_scale_free_terms(self, name: str) -> None:
        harmful, harmless = clouds()
        base = measure_base(harmful, harmless)
        factor = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        value = every_term(factor * harmful, factor * harmless, base, harmless)[name]
        value.backward()
        assert factor.grad is not None
        assert abs(factor.grad.item()) < 1e-4  # fisher's floor is all that feels it
        inflated = every_term(100 * harmful, 100 * harmless, base, harmless)
        assert inflated[name].item() == pytest.approx(value.item(), abs=1e-4)
        assert inflated["distance"].item() == pytest.approx(100)  # the paper's form is won by it

    def test_margin_pulls_hardest_on_the_prompt_that_lags_behind(self) -> None:
        harmful = torch.tensor([[3.0, 0.0, 1.0], [-1.0, 0.0, 1.0]], requires_grad=True)
        harmless = torch.tensor([[-3.0, 0.0, 1.0], [-3.0, 0.0, -1.0]])
        margin(harmful, harmless, torch.tensor([1.0, 0.0, 0.0])).backward()
        assert harmful.grad is not None
        assert harmful.grad[1, 0] > 3 * abs(harmful.grad[0, 0])

    def test_separation_pushes_apart(self) -> None:
        for name in OBJECTIVES:
            harmful, harmless = (cloud.requires_grad_() for cloud in clouds(dtype=torch.float32))
            base = measure_base(harmful, harmless)
            value = every_term(harmful, harmless, base, harmless.detach())[name]
            value.backward()
            with torch.no_grad():
                after = every_term(
                    harmful + 0.01 * harmful.grad, harmless + 0.01 * harmless.grad, base, harmless.detach()
                )
            assert after[name] > value, name


class TestDegenerate:
    @pytest.mark.parametrize(
        ("harmful", "harmless"),
        [
            (torch.ones(1, 3), torch.zeros(1, 3)),
            (torch.ones(4, 3), torch.ones(4, 3)),
            (torch.zeros(2, 3), torch.zeros(2, 3)),
            (torch.ones(1, 3), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))),
            (torch.full((2, 3), 1e-20), torch.full((2, 3), -1e-20)),
        ],
        ids=["one sample each", "identical", "all zero", "one harmful", "tiny"],
    )
    def test_values_and_gradients_stay_finite(self, harmful: Tensor, harmless: Tensor) -> None:
        base = measure_base(harmful, harmless)
        for name in OBJECTIVES:
            inputs = harmful.clone().requires_grad_(), harmless.clone().requires_grad_()
            value = every_term(*inputs, base, harmless)[name]
            gradients = torch.autograd.grad(value, inputs, allow_unused=True)
            assert math.isfinite(value.item()), name
            assert all(gradient is None or gradient.isfinite().all() for gradient in gradients), name

    def test_identical_clouds_are_not_separated(self) -> None:
        same = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        base = measure_base(same + 1, same)
        assert fisher(same, same, base).item() < -10
        assert margin(same, same, base.difference).item() == pytest.approx(
            -float(functional.softplus(24 * (0.15 - _margins(same, base))).mean()) / 24, rel=1e-5
        )

    @pytest.mark.parametrize("name", OBJECTIVES)
    @pytest.mark.parametrize("autocast", [False, True])
    def test_bfloat16_embeddings_are_measured_in_float32(self, name: str, autocast: bool) -> None:
        harmful, harmless = clouds(n=16, d_model=64, dtype=torch.bfloat16)
        base = measure_base(harmful, harmless)
        assert base.difference.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = every_term(harmful, harmless, base, harmless)[name]
        assert value.dtype == torch.float32
        exact = every_term(harmful.double(), harmless.double(), base, harmless.double())[name]
        assert value.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-6)

    def test_half_precision_gradients_come_back_in_half_precision(self) -> None:
        harmful, harmless = clouds(dtype=torch.bfloat16)
        harmful.requires_grad_()
        fisher(harmful, harmless, measure_base(harmful, harmless)).backward()
        assert harmful.grad is not None
        assert harmful.grad.dtype == torch.bfloat16


def _margins(same: Tensor, base: BaseLayer) -> Tensor:
    unit = base.difference / base.difference.norm()
    along = (same - same.mean(dim=0)) @ unit / same.square().sum(dim=1).mean().sqrt()
    return torch.cat([along, -along])


class TestMixtures:
    def test_weights_and_spaces(self) -> None:
        assert parse_objective("fisher") == (Term(1.0, "fisher"),)
        assert parse_objective(" 1.0 * margin + .5*fisher ") == (Term(1.0, "margin"), Term(0.5, "fisher"))

    @pytest.mark.parametrize(
        "text",
        ["", "cosine", "fisher+", "fisher+fisher", "0*fisher", "-1*fisher", "nan*fisher", "inf*margin", "*fisher",
         "x*fisher", "fisher*2", "1*2*fisher", "fisher margin", "fisher\n+\0"],
    )  # fmt: skip
    def test_what_is_no_mixture_is_refused_in_a_sentence(self, text: str) -> None:
        with pytest.raises(InputError) as error:
            parse_objective(text)
        assert "\n" not in str(error.value)

    @given(st.text(max_size=30))
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        with suppress(InputError):
            assert parse_objective(text)

    def test_needs_no_torch(self) -> None:
        code = "import sys; from es2.training.terms import parse_objective as parse; parse('fisher+margin'); "
        code += "assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestKL:
    def reference(self, tuned: Tensor, base: Tensor, head: LmHead) -> Tensor:
        log_base, log_tuned = (functional.log_softmax(head.logits(states), dim=-1) for states in (base, tuned))
        return functional.kl_div(log_tuned, log_base, log_target=True, reduction="none").sum(dim=-1)

    def head(self, *, softcap: float | None = None, dtype: torch.dtype = torch.float64) -> LmHead:
        generator = torch.Generator().manual_seed(1)
        weight, bias = torch.randn(11, 4, generator=generator), torch.randn(11, generator=generator)
        return LmHead(weight.to(dtype), bias.to(dtype), softcap)

    def test_two_words_by_hand(self) -> None:
        # Logits (0, 0) against (ln 3, 0): p = (1/2, 1/2), q = (3/4, 1/4).
        head = LmHead(torch.tensor([[1.0], [0.0]]))
        found = token_kl(torch.tensor([[math.log(3.0)]]), torch.tensor([[0.0]]), head).item()
        assert found == pytest.approx(0.5 * math.log((1 / 2) / (3 / 4)) + 0.5 * math.log((1 / 2) / (1 / 4)))

    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("at_once", [2**23, 33, 1])
    def test_chunks_change_neither_values_nor_gradients(
        self, softcap: float | None, at_once: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kl_module, "LOGITS_AT_ONCE", at_once)
        head = self.head(softcap=softcap)
        tuned, base = clouds(n=7)
        base = base[:7]
        tuned.requires_grad_()
        weights = torch.arange(7, dtype=torch.float64)
        expected = self.reference(tuned, base, head)
        (gradient,) = torch.autograd.grad((weights * expected).sum(), tuned)
        found = token_kl(tuned, base, head)
        (found_gradient,) = torch.autograd.grad((weights * found).sum(), tuned)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found_gradient, gradient)
        assert torch.autograd.gradcheck(lambda states: token_kl(states, base, head), (tuned,))

    def test_no_token_and_no_gradient(self) -> None:
        head = self.head()
        empty = torch.zeros(0, 4, dtype=torch.float64)
        assert token_kl(empty, empty, head).shape == (0,)
        assert not token_kl(*(cloud[:5] for cloud in clouds()), head).requires_grad

    def test_equal_states_diverge_by_nothing_also_in_bfloat16(self) -> None:
        head = self.head(dtype=torch.bfloat16)
        states = clouds(dtype=torch.bfloat16)[0].requires_grad_()
        divergence = token_kl(states, states.detach(), head)
        divergence.sum().backward()
        assert divergence.dtype == torch.float32
        assert divergence.abs().max() < 1e-6
        assert states.grad is not None
        assert states.grad.abs().max() < 1e-6

    def test_states_kept_in_half_precision_cost_this_much(self) -> None:
        """The error that keeping bfloat16 states of a bfloat16 model would add to a float32 one, for the record."""
        generator = torch.Generator().manual_seed(0)
        head = LmHead(torch.randn(1000, 64, generator=generator) / 8)
        states = torch.randn(50, 64, generator=generator)
        assert token_kl(states, states.bfloat16().float(), head).mean() < 1e-5

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_the_head_is_the_models_own(self, architecture: str) -> None:
        model = tiny_model(architecture)
        head = read_lm_head(model)
        tokens = torch.tensor([[3, 1, 4, 1, 5]])
        with torch.no_grad():
            states = model.base_model(tokens).last_hidden_state[0]
            torch.testing.assert_close(head.logits(states), model(tokens).logits[0])
        assert not head.weight.requires_grad

    def test_a_soft_cap_is_found(self) -> None:
        from transformers import Gemma2Config, Gemma2ForCausalLM

        config = Gemma2Config(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, initializer_range=2.0, final_logit_softcapping=3.0,
        )  # fmt: skip
        assert read_lm_head(Gemma2ForCausalLM(config).eval()).softcap == 3.0

    def test_a_scale_is_found_and_the_gradient_has_it(self) -> None:
        model: Any = tiny_model("cohere", logit_scale=0.3, num_key_value_heads=2)
        head = read_lm_head(model)
        assert head.scale == pytest.approx(0.3)
        base, tuned = torch.randn(2, 5, 32)
        tuned.requires_grad_(True)
        (found,) = torch.autograd.grad(token_kl(tuned, base, head).sum(), tuned)
        log_base, log_tuned = ((0.3 * (states @ head.weight.T)).log_softmax(dim=-1) for states in (base, tuned))
        (expected,) = torch.autograd.grad((log_base.exp() * (log_base - log_tuned)).sum(), tuned)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_a_model_that_changes_its_logits_is_refused(self) -> None:
        model: Any = tiny_model()
        model.lm_head.register_forward_hook(lambda layer, inputs, output: output.sin())
        with pytest.raises(InputError, match="changes its logits"):
            read_lm_head(model)


def test_terms_agree_with_the_numbers_that_are_reported() -> None:
    """fisher and margin measure what es2.analysis.geometry measures, on the same prompts, up to bias and softening."""
    from es2.analysis.geometry import fit_frame

    harmful, harmless = clouds(n=40, d_model=6)
    embeddings = torch.cat([harmful, harmless]).numpy()
    labels = np.array([1] * len(harmful) + [0] * len(harmless))
    frame = fit_frame(embeddings, labels)
    base = measure_base(harmful, harmless)
    assert base.scale == pytest.approx(frame.scale)
    unit = (base.difference / base.difference.norm()).numpy()
    assert unit == pytest.approx(frame.direction)
    along = frame.normalise(embeddings) @ frame.direction * np.where(labels == 1, 1, -1)
    shortfall = np.logaddexp(0, 24 * (0.15 - along)) / 24
    expected = -(shortfall[labels == 1].mean() + shortfall[labels == 0].mean()) / 2
    assert margin(harmful, harmless, base.difference).item() == pytest.approx(expected, rel=1e-9)
