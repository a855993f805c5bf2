"""The numbers on `validation` are honest, and the rule that ends a run does what it says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from es2.analysis.verdict import COLLAPSED_KL_BUDGETS, LEAST_REFUSALS, LEAST_REFUSALS_KEPT, TOLERATED_BROKEN_RISE
from es2.prompts.prompt_set import HARMFUL, PromptSet
from es2.training.validation import (
    PATIENCE,
    Decision,
    ValidationPoint,
    behaviour_lost,
    decide,
    held_out_margin,
    reason_to_stop,
    validation_numbers,
)
from tests.builders import tiny_prompts

BUDGET = 0.1


def embeddings(prompts: PromptSet, distance: float, d_model: int = 200, seed: int = 0) -> np.ndarray:
    cloud = np.random.default_rng(seed).normal(size=(len(prompts), d_model))
    cloud[:, 0] += distance * prompts.labels
    return cloud.astype(np.float32)


def point(
    step: int = 5,
    kl: float = 0.0,
    rank: float = 10.0,
    score: float = 1.0,
    kept: float | None = None,
    refusals: int = 10,
    broken: float | None = None,
) -> ValidationPoint:
    layers = {7: {"effective_rank": rank, "mean_difference_margin": score}}
    log_prob = None if kept is None else -0.5
    return ValidationPoint(step, kl / 2, kl, layers, refusals, kept, kept, log_prob, broken)


def decided(*points: ValidationPoint, last_step: int = 100) -> Decision:
    return decide(points, 2.0, BUDGET, last_step)


class TestNumbers:
    def test_noise_has_no_held_out_margin_though_it_has_one_along_its_own_direction(self) -> None:
        prompts = tiny_prompts(30)
        noise = embeddings(prompts, 0.0)
        own = noise[prompts.labels == HARMFUL].mean(axis=0) - noise[prompts.labels != HARMFUL].mean(axis=0)
        along = noise @ (own / np.linalg.norm(own)) / np.sqrt(np.square(noise).sum(axis=1).mean())
        flattered = (along[prompts.labels == HARMFUL].mean() - along[prompts.labels != HARMFUL].mean()) / 2
        assert flattered > 0.08
        assert abs(held_out_margin(prompts, noise)) < 0.02

    def test_held_out_margin_is_half_the_relative_distance_of_clouds_far_apart(self) -> None:
        prompts = tiny_prompts(30)
        cloud = embeddings(prompts, 20.0, d_model=8)
        scale = np.sqrt((np.square(cloud).sum(axis=1))[prompts.labels == 1].mean() / 2 + 8 / 2)
        assert held_out_margin(prompts, cloud) == pytest.approx(10 / scale, rel=0.03)

    def test_base_against_itself(self) -> None:
        prompts = tiny_prompts(20)
        cloud = embeddings(prompts, 3.0)
        numbers = validation_numbers(prompts, cloud, cloud)
        assert numbers["orthogonal_std_ratio"] == pytest.approx(1)
        assert numbers["norm_ratio"] == pytest.approx(1)

    def test_inflation_shows_in_the_norms_alone(self) -> None:
        prompts = tiny_prompts(20)
        cloud = embeddings(prompts, 3.0)
        before, after = validation_numbers(prompts, cloud, cloud), validation_numbers(prompts, cloud, 10 * cloud)
        assert after["norm_ratio"] == pytest.approx(10, rel=1e-5)
        assert after["centroid_distance"] == pytest.approx(10 * before["centroid_distance"], rel=1e-5)
        for name in (
            "fisher_ratio",
            "relative_distance",
            "mean_difference_margin",
            "effective_rank",
            "orthogonal_std_ratio",
        ):
            assert after[name] == pytest.approx(before[name], rel=1e-4), name

    def test_embeddings_without_any_spread_are_numbers_too(self) -> None:
        prompts = tiny_prompts(4)
        flat = np.ones((8, 5), dtype=np.float32)
        assert all(np.isfinite(value) for value in validation_numbers(prompts, flat, flat).values())

    def test_a_pair_that_is_all_there_is_of_a_label_is_not_measured(self) -> None:
        prompts = tiny_prompts(2)
        alone = replace(prompts, pairs=("a", "a", "a", "b"))
        assert np.isfinite(held_out_margin(alone, embeddings(alone, 1.0, d_model=3)))

    @pytest.mark.parametrize("original", [point(), point(kept=0.0, broken=0.25)])
    def test_a_point_survives_json(self, original: ValidationPoint) -> None:
        assert ValidationPoint.from_dict(json.loads(json.dumps(original.to_dict()))) == original

    def test_a_point_of_an_earlier_version_knows_nothing_of_refusals(self) -> None:
        old = {name: point().to_dict()[name] for name in ("step", "kl_prompt", "kl_reply", "layers")}
        found = ValidationPoint.from_dict(old)
        assert (found.n_refusals, found.refusals_kept, found.broken_first) == (0, None, None)
        assert not [name for name in found.numbers(found) if "refusal" in name or "broken" in name]

    def test_what_was_not_measured_is_not_logged(self) -> None:
        assert point(broken=0.0).numbers(point(0))["validation_broken_first"] == 0.0
        assert "validation_refusals_kept" not in point(broken=0.0).numbers(point(0))
        assert point(kept=0.25).numbers(point(0))["validation_refusals_kept"] == 0.25
        assert point(broken=0.0).numbers(point(0, broken=0.5))["validation_base_broken_first"] == 0.5


class TestRule:
    def test_a_collapsed_layer_stops_the_run(self) -> None:
        base = point(0, rank=10)
        assert reason_to_stop(point(rank=5.1), base, BUDGET, 0) is None
        assert "layer 7 collapsed at step 5" in (reason_to_stop(point(rank=5.0), base, BUDGET, 0) or "")

    def test_kl_stops_at_once_when_hopeless_and_after_patience_when_over(self) -> None:
        base = point(0)
        assert reason_to_stop(point(kl=0.09), base, BUDGET, 0) is None
        assert reason_to_stop(point(kl=0.11), base, BUDGET, PATIENCE - 1) is None
        assert "stayed above the budget" in (reason_to_stop(point(kl=0.11), base, BUDGET, PATIENCE) or "")
        assert "budgets" in (reason_to_stop(point(kl=1.01 * COLLAPSED_KL_BUDGETS * BUDGET), base, BUDGET, 1) or "")

    def test_the_best_is_the_highest_score_within_the_budget(self) -> None:
        validations = [point(0, score=0.1)]
        for step, (kl, score, best) in enumerate([(0.05, 0.5, 1), (0.2, 0.9, 1), (0.05, 0.4, 1), (0.1, 0.6, 4)], 1):
            validations.append(point(step, kl=kl, score=score))
            assert decided(*validations).best_step == best
        assert decided(*validations).reason is None

    def test_a_collapsed_point_is_never_the_best(self) -> None:
        decision = decided(point(0, score=0.1), point(1, rank=1, score=5))
        assert decision.best_step == 0
        assert decision.reason is not None

    def test_a_step_that_gave_up_refusals_is_the_best_only_where_there_is_no_other(self) -> None:
        base = point(0, score=0.1, kept=1.0, broken=0.0)
        bad = point(1, score=0.9, kept=LEAST_REFUSALS_KEPT - 0.01)
        good = point(2, score=0.4, kept=LEAST_REFUSALS_KEPT)
        assert decided(base, bad).best_step == 1
        assert decided(base, bad, good).best_step == 2
        assert decided(base, good, replace(bad, step=3)).best_step == 2
        assert decided(base, bad, replace(bad, step=2, layers=good.layers)).best_step == 1, "the better of two such"
        assert decided(base, bad, point(2, score=0.05, kept=1.0)).best_step == 1, "no better than the base"
        assert decided(base, bad, point(2, score=0.4, kept=1.0, kl=2 * BUDGET)).best_step == 1, "over the budget"

    def test_likewise_one_that_breaks_first_tokens(self) -> None:
        base = point(0, score=0.1, broken=0.2)
        bad, good = point(1, score=0.9, broken=0.26), point(2, score=0.4, broken=0.2 + TOLERATED_BROKEN_RISE)
        assert decided(base, bad, good).best_step == 2
        assert "0.26" in (behaviour_lost(bad, base) or "")
        assert behaviour_lost(point(broken=0.9), point(0)) is None, "the base was not measured"

    def test_a_few_refusals_decide_nothing(self) -> None:
        base = point(0, score=0.1, kept=1.0)
        for refusals, best in ((LEAST_REFUSALS, 2), (LEAST_REFUSALS - 1, 1)):
            bad = point(1, score=0.9, kept=0.0, refusals=refusals)
            assert decided(base, bad, point(2, score=0.4, kept=1.0)).best_step == best

    def test_over_the_budget_the_kl_weight_doubles_until_patience_ends(self) -> None:
        validations = [point(0), point(1, kl=0.2), point(2, kl=0.05)]
        decision = decided(*validations)
        assert (decision.kl_weight, decision.times_over) == (4.0, 0)
        for step in range(3, 3 + PATIENCE):
            assert decided(*validations).reason is None
            validations.append(point(step, kl=0.2))
        assert decided(*validations).reason is not None
        assert decided(*validations).kl_weight == 4.0 * 2**PATIENCE

    def test_a_kl_that_is_no_number_is_over_the_budget(self) -> None:
        decision = decided(point(0, score=0.0), point(1, kl=float("nan"), score=3))
        assert (decision.best_step, decision.times_over) == (0, 1)

    def test_a_run_that_ends_without_a_step_within_the_budget_came_to_nothing(self) -> None:
        validations = [point(0), point(1, kl=0.2), point(2, kl=0.2)]
        assert decided(*validations, last_step=3).reason is None
        assert "No step kept the KL" in (decided(*validations, last_step=2).reason or "")
        assert decided(*validations[:2], point(2, kl=0.05), last_step=2).reason is None
        assert decided(validations[0], point(1, kl=0.05), point(2, kl=0.2), last_step=2).reason is None
