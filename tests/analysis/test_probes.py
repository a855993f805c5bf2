"""Probes against scikit-learn and against clouds whose margin is known."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from es2.analysis.geometry import fit_frame
from es2.analysis.probes import (
    Probes,
    accuracy,
    auroc,
    cross_validate,
    fit_each,
    fit_path,
    lower_quartile,
    mean_auroc,
    probe_numbers,
    signed_distance,
    twins_of,
)
from es2.analysis.resampling import resample_pairs, shuffled_labels
from es2.core.errors import InputError
from tests.clouds import clouds, paired_prompts, probability, rotation, single_prompts

COSTS = tuple(10.0**power for power in range(-4, 5))


def sklearn_fit(features, labels, cost: float) -> LogisticRegression:
    model = LogisticRegression(C=cost, class_weight="balanced", tol=1e-12, max_iter=200_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(features, labels)


@pytest.mark.parametrize(("n_prompts", "d_model", "distance"), [(60, 200, 0.5), (200, 30, 0.5), (80, 80, 2.0)])
def test_path_equals_sklearn(n_prompts: int, d_model: int, distance: float) -> None:
    """Wider than prompts, narrower, and square; unbalanced classes; every cost; coefficients and margins."""
    generator = np.random.default_rng(1)
    labels = (np.arange(n_prompts) % 3 == 0).astype(int)
    features = generator.normal(size=(n_prompts, d_model)) / np.sqrt(d_model)
    features[:, 0] += distance * labels
    new = generator.normal(size=(20, d_model))
    weights, bias = fit_path(features, labels, COSTS)
    for index, cost in enumerate(COSTS):
        reference = sklearn_fit(features, labels, cost)
        size = np.linalg.norm(reference.coef_)
        np.testing.assert_allclose(weights[index], reference.coef_[0], rtol=1e-4, atol=1e-4 * size)
        assert bias[index] == pytest.approx(reference.intercept_[0], rel=1e-4, abs=1e-4)
        np.testing.assert_allclose(
            signed_distance(new, weights[index], bias[index]),
            reference.decision_function(new) / size,
            rtol=1e-4,
            atol=1e-4,
        )


def by_newton(
    features: np.ndarray, labels: np.ndarray, cost: float, weights: np.ndarray, bias: float
) -> tuple[np.ndarray, float]:
    """The solution near a start: Newton's method in the coordinates, as plain as can be."""
    design = np.column_stack([features, np.ones(len(labels))])
    penalty = np.diag([1.0] * features.shape[1] + [0.0])
    importance = cost * len(labels) / (2 * np.bincount(labels)[labels])
    point = np.append(weights, bias)
    for _ in range(4):
        probability = 1 / (1 + np.exp(-design @ point))
        gradient = penalty @ point + design.T @ (importance * (probability - labels))
        curvature = penalty + (design.T * (importance * probability * (1 - probability))) @ design
        point = point - np.linalg.solve(curvature, gradient)
    return point[:-1], float(point[-1])


@pytest.mark.parametrize("seed", range(20, 40))
def test_any_problem_is_solved(seed: int) -> None:
    """More prompts than dimensions and fewer, separable or not, spectra flat and steep, classes of any sizes.

    From where a fit ends, exact steps lead nowhere further.
    """
    generator = np.random.default_rng(seed)
    n_prompts, d_model = int(generator.integers(6, 120)), int(generator.choice([2, 5, 20, 64, 150]))
    labels = (generator.random(n_prompts) < generator.choice([0.2, 0.5])).astype(int)
    labels[:2] = 0, 1
    features = generator.normal(size=(n_prompts, d_model))
    features *= np.exp(-generator.uniform(0, 6) * np.arange(d_model) / d_model)
    features /= np.sqrt((features**2).sum(axis=1).mean())
    features[:, 0] += generator.choice([0, 0.3, 1, 3]) * labels
    weights, bias = fit_path(features, labels, COSTS)
    for index, cost in enumerate(COSTS):
        exact, exact_bias = by_newton(features, labels, cost, weights[index], bias[index])
        size = np.linalg.norm(exact)
        assert np.linalg.norm(weights[index] - exact) <= 1e-6 * max(size, 1e-4), cost
        assert bias[index] == pytest.approx(exact_bias, rel=1e-6, abs=1e-6 * max(size, 1e-4)), cost


def test_weak_regularisation_gives_the_known_margin() -> None:
    """Two pairs of points 4 apart: the hardest margin is the line in the middle, 2 away from each."""
    features = np.array([[3.0, 5.0], [3.0, 3.0], [-1.0, 5.0], [-1.0, 3.0]])
    labels = np.array([1, 1, 0, 0])
    weights, bias = fit_path(features, labels, (1.0, 1e4))
    np.testing.assert_allclose(signed_distance(features, weights[1], bias[1]), [2, 2, -2, -2], rtol=1e-6)


def test_probes_measure_in_scale_free_units() -> None:
    embeddings = np.array([[3.0, 5.0], [3.0, 3.0], [-1.0, 5.0], [-1.0, 3.0]])
    labels = np.array([1, 1, 0, 0])
    frame = fit_frame(embeddings, labels)
    weights, bias = fit_path(frame.normalise(embeddings), labels, (10.0,))
    probes = Probes(weights, bias, frame.centre[None], np.array([frame.scale]), np.array([10.0]), frame.direction[None])
    np.testing.assert_allclose(probes.margin(embeddings, 0), np.array([2, 2, -2, -2]) / frame.scale, rtol=1e-6)
    np.testing.assert_allclose(probes.normal(0), [1, 0], atol=1e-9)
    reference = sklearn_fit(frame.normalise(embeddings), labels, 10.0)
    np.testing.assert_allclose(
        probability(probes, embeddings, 0), reference.predict_proba(frame.normalise(embeddings))[:, 1], rtol=1e-5
    )
    assert probes.n_layers == 1


def test_features_without_variance_give_a_probe_that_reads_nothing() -> None:
    weights, bias = fit_path(np.zeros((6, 3)), np.array([1, 0, 0, 0, 0, 1]), COSTS)
    np.testing.assert_array_equal(weights, 0)
    np.testing.assert_allclose(bias, 0, atol=1e-12)
    np.testing.assert_array_equal(signed_distance(np.ones((2, 3)), weights[0], 5.0), 0)


def test_separable_points_far_apart_converge() -> None:
    """Logits in the hundreds: the curvature underflows and the objective is flat, yet the fit is scikit-learn's."""
    features = np.concatenate([np.full((10, 2), 50.0), np.full((10, 2), -50.0)])
    features += np.random.default_rng(0).normal(size=features.shape)
    labels = np.repeat([1, 0], 10)
    weights, bias = fit_path(features, labels, COSTS)
    reference = sklearn_fit(features, labels, 1.0)
    np.testing.assert_allclose(weights[4], reference.coef_[0], rtol=1e-4)
    assert np.isfinite(weights).all()
    assert np.isfinite(bias).all()


@pytest.mark.parametrize("d_model", [15, 100])
def test_fits_side_by_side_are_the_fits_alone(d_model: int) -> None:
    """Several labelings of unequal class sizes at once, and all prompts beside the folds."""
    generator = np.random.default_rng(2)
    features = generator.normal(size=(60, d_model)) / 4
    labelings = (generator.random((4, 60)) < [[0.5], [0.5], [0.3], [0.7]]).astype(int)
    together, intercepts = fit_each(features, labelings, 100.0)
    for labels, weights, bias in zip(labelings, together, intercepts, strict=True):
        alone, intercept = fit_path(features, labels, (100.0,))
        np.testing.assert_allclose(weights, alone[0], rtol=1e-6, atol=1e-6 * np.linalg.norm(alone))
        assert bias == pytest.approx(intercept[0], rel=1e-6, abs=1e-6)
    found = cross_validate(features, labelings[0], np.arange(60) % 4, COSTS, with_path=True)
    assert found.path is not None
    for whole, expected in zip(found.path, fit_path(features, labelings[0], COSTS), strict=True):
        np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d_model", [5, 60])
def test_curvature_beyond_single_precision(d_model: int) -> None:
    """Features so long that the curvature is factored in double precision; scikit-learn is given short ones."""
    generator = np.random.default_rng(3)
    labels = np.arange(40) % 2
    features = generator.normal(size=(40, d_model))
    features[:, 0] += labels
    weights, bias = fit_path(300 * features, labels, (1e-3, 0.1))
    for index, cost in enumerate((1e-3, 0.1)):
        reference = sklearn_fit(features, labels, 300**2 * cost)
        expected = reference.coef_[0] / 300
        np.testing.assert_allclose(weights[index], expected, rtol=1e-4, atol=1e-4 * np.linalg.norm(expected))
        assert bias[index] == pytest.approx(reference.intercept_[0], rel=1e-4, abs=1e-4)


def test_rotation_and_order_leave_margins() -> None:
    prompts = paired_prompts(40)
    features = clouds(prompts, [1.0], 100, offset=0.0)[0] / 10
    order = np.random.default_rng(0).permutation(len(prompts))
    turn = rotation(100)
    plain, bias = fit_path(features, prompts.labels, COSTS)
    turned, turned_bias = fit_path((features @ turn)[order], prompts.labels[order], COSTS)
    np.testing.assert_allclose(turned @ turn.T, plain, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(turned_bias, bias, atol=1e-6)


def test_one_label_is_refused() -> None:
    with pytest.raises(ValueError, match="both labels"):
        fit_path(np.eye(3), np.ones(3, dtype=int), COSTS)


def test_cross_validation_equals_sklearn_fold_by_fold() -> None:
    labels = np.array([1, 0, 0] * 20)
    features = np.random.default_rng(2).normal(size=(60, 15))
    features[:, 0] += 1.5 * labels
    folds = np.arange(60) % 4
    found = cross_validate(features, labels, folds, COSTS)
    expected = []
    for cost in COSTS:
        logits = np.empty(60)
        for fold in range(4):
            out = folds == fold
            logits[out] = sklearn_fit(features[~out], labels[~out], cost).decision_function(features[out])
        losses = np.where(labels == 1, np.logaddexp(0, -logits), np.logaddexp(0, logits))
        expected.append((losses[labels == 1].mean() + losses[labels == 0].mean()) / 2)
    np.testing.assert_allclose(found.log_loss, expected, rtol=1e-4)
    assert found.best == int(np.argmin(expected))
    early = cross_validate(features, labels, folds, COSTS, stop_early=True)
    assert len(early.log_loss) == found.best + 3  # two costs beyond the best, each worse
    assert early.best == found.best
    assert 0 < found.best < len(COSTS) - 1


def test_ties_go_to_the_larger_cost() -> None:
    assert cross_validate(np.zeros((20, 2)), np.array([1, 0] * 10), np.arange(20) // 2 % 5, COSTS).best == 8


def test_folds_that_cannot_be_held_out_are_passed_over() -> None:
    features = np.random.default_rng(0).normal(size=(12, 3))
    labels = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1])
    folds = np.array([0, 1, 1, 2, 2, 0, 1, 1, 2, 2, 2, 2])
    assert not np.isnan(cross_validate(features, labels, folds, (1.0,)).logits).any()
    alone = np.where(labels == 0, 0, folds)  # every harmless prompt stands in fold 0
    found = cross_validate(features, labels, np.where((labels == 0) & (np.arange(12) == 5), 1, alone), (1.0,))
    assert np.isfinite(found.log_loss).all()
    with pytest.raises(InputError, match="too few to cross-validate"):
        cross_validate(features, labels, np.zeros(12, dtype=int), (1.0,))


def test_numbers_equal_sklearn_under_every_resample() -> None:
    prompts = single_prompts([1] * 15 + [0] * 25)
    generator = np.random.default_rng(0)
    margins = np.round(generator.normal(size=40) + 0.5 * prompts.labels, 1)  # rounded, so that some tie
    weights = resample_pairs(prompts, 30, seed=2)
    other_cost = generator.normal(size=40)
    numbers, others = probe_numbers(np.stack([margins, other_cost], axis=1), prompts.labels, weights)
    np.testing.assert_array_equal(others["probe_auroc"], auroc(other_cost, prompts.labels, weights))
    for index, multiplicities in enumerate(weights.astype(int)):
        drawn, labels = np.repeat(margins, multiplicities), np.repeat(prompts.labels, multiplicities)
        mean = (drawn[labels == 1].mean() - drawn[labels == 0].mean()) / 2
        assert numbers["probe_accuracy"][index] == pytest.approx(balanced_accuracy_score(labels, drawn > 0))
        assert numbers["probe_auroc"][index] == pytest.approx(roc_auc_score(labels, drawn))
        assert numbers["margin_mean"][index] == pytest.approx(mean)
        assert numbers["margin_harmful_q1"][index] == pytest.approx(np.quantile(drawn[labels == 1], 0.25))


def test_numbers_of_many_prompts_count_exactly() -> None:
    """More prompts than one block of running sums or products holds, with ties between classes and within."""
    generator = np.random.default_rng(5)
    labels = (generator.random(1500) < 0.6).astype(int)
    scores = np.round(generator.normal(size=1500) + labels, 1)
    weights = resample_pairs(single_prompts(labels.tolist()), 3, seed=0)
    found = auroc(scores, labels, weights)
    harmful = scores[labels == 1]
    quartiles = lower_quartile(harmful, weights[:, labels == 1])
    for index, multiplicities in enumerate(weights.astype(int)):
        drawn, own = np.repeat(scores, multiplicities), np.repeat(labels, multiplicities)
        assert found[index] == pytest.approx(roc_auc_score(own, drawn), rel=1e-13)
        assert quartiles[index] == pytest.approx(np.quantile(drawn[own == 1], 0.25), abs=1e-15)


def test_the_mean_over_shuffled_labels_is_that_of_each() -> None:
    prompts = paired_prompts(60)
    weights = resample_pairs(prompts, 40, seed=0)
    labels = shuffled_labels(prompts, 7, seed=0).T
    scores = np.round(np.random.default_rng(5).normal(size=labels.shape), 1)  # with ties
    twins = twins_of(labels, weights)
    assert twins is not None
    found, expected = (mean_auroc(scores, labels, weights, known) for known in (twins, None))
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    single = single_prompts([0, 1] * 60)
    assert twins_of(labels, resample_pairs(single, 40, seed=0)) is None  # not drawn together
    assert twins_of(np.ones_like(labels), weights) is None  # of one label


def test_lower_quartile_of_one_value() -> None:
    np.testing.assert_array_equal(lower_quartile(np.array([3.0]), np.array([[1.0], [5.0]])), 3.0)


def test_a_vanished_class_is_chance() -> None:
    weights = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    labels = np.array([1, 0, 0])
    scores = np.array([1.0, -1.0, -2.0])
    np.testing.assert_array_equal(accuracy(scores[:, None], labels[:, None], weights), [[1.0], [0.5]])
    np.testing.assert_array_equal(auroc(scores, labels, weights), [1.0, 0.5])
