"""Distances and spreads against hand-worked clouds, plain numpy, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from es2.analysis.geometry import Resampled, cloud_numbers, direction_cosine, fit_frame
from es2.analysis.resampling import canonical, interval, resample_pairs
from es2.prompts.prompt_set import HARMFUL, HARMLESS, PromptSet
from tests.clouds import clouds, paired_prompts, rotation, single_prompts

LABELS = np.array([1, 1, 0, 0])
SQUARE = np.array([[3.0, 5.0], [3.0, 3.0], [-1.0, 5.0], [-1.0, 3.0]])
"""Harmful at x = 3, harmless at x = −1, both spread by ±1 in y around 4."""
EVERY_RESAMPLE = np.array(
    [[1, 1, 1, 1], *([a, 2 - a, b, 2 - b] for a in (0, 1, 1, 2) for b in (0, 1, 1, 2))], dtype=float
)
"""The square as it is, then each of the 16 equally likely ways to draw two of two in both classes."""


def value(numbers, name: str) -> float:
    return float(numbers[name][0])


def test_frame_of_a_square() -> None:
    frame = fit_frame(SQUARE, LABELS)
    np.testing.assert_allclose(frame.centre, [1, 4])
    np.testing.assert_allclose(frame.direction, [1, 0])
    assert frame.scale == pytest.approx(np.sqrt(((34 + 18) / 2 + (26 + 10) / 2) / 2))  # the balanced mean of ‖e‖²
    np.testing.assert_allclose(frame.normalise(SQUARE)[0], np.array([2, 1]) / frame.scale)


def test_frame_balances_classes_of_unequal_size() -> None:
    embeddings = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    frame = fit_frame(embeddings, np.array([1, 0, 0, 0]))
    np.testing.assert_allclose(frame.centre, [1, 0.5])
    assert frame.scale == pytest.approx(np.sqrt((4 + 1) / 2))


def test_numbers_of_a_square() -> None:
    frame = fit_frame(SQUARE, LABELS)
    numbers = cloud_numbers(SQUARE, frame, Resampled.of(LABELS, EVERY_RESAMPLE))
    variance = 2.0  # of each class: (1 + 1) / (2 − 1)
    bias = variance / 2 + variance / 2  # tr Σ₁/n₁ + tr Σ₀/n₀: these four prompts are no twins
    assert value(numbers, "centroid_distance") == pytest.approx(4)
    assert value(numbers, "pairwise_distance") == pytest.approx((4 + np.sqrt(20)) / 2)
    assert value(numbers, "mean_norm") == pytest.approx(np.linalg.norm(SQUARE, axis=1).mean())
    assert value(numbers, "relative_distance") == pytest.approx(np.sqrt(16 - bias) / frame.scale)
    assert value(numbers, "fisher_ratio") == pytest.approx(np.sqrt(16 - bias) / np.sqrt(variance))
    assert value(numbers, "orthogonal_std") == pytest.approx(np.sqrt(variance) / frame.scale)
    assert value(numbers, "effective_rank") == pytest.approx(1)
    assert value(numbers, "mean_difference_margin") == pytest.approx(2 / frame.scale)


@pytest.mark.parametrize("prompts", [paired_prompts(40), single_prompts([1] * 25 + [0] * 15)], ids=["twins", "singles"])
def test_numbers_equal_plain_numpy_also_inside_the_bootstrap(prompts: PromptSet) -> None:
    _, prompts = canonical(prompts, "test")
    embeddings = clouds(prompts, [1.5], 7, topic=0.5)[0]
    labels = prompts.labels
    probe = clouds(prompts, [1.5], 7, seed=5)[0]
    frame = fit_frame(probe, labels)
    weights = resample_pairs(prompts, 6, seed=1)
    numbers = cloud_numbers(embeddings, frame, Resampled.of(labels, weights))
    expected = {name: [] for name in ("squared", "pairwise_distance", "trace", "rest", "rank", "margin", "norm")}
    for multiplicities in weights.astype(int):
        drawn = np.repeat(embeddings, multiplicities, axis=0)
        drawn_labels = np.repeat(labels, multiplicities)
        harmful, harmless = drawn[drawn_labels == HARMFUL], drawn[drawn_labels == HARMLESS]
        covariance = (np.cov(harmful.T) + np.cov(harmless.T)) / 2
        beside = np.eye(7) - np.outer(frame.direction, frame.direction)
        spectrum = np.linalg.eigvalsh(beside @ covariance @ beside)
        expected["squared"].append(((harmful.mean(0) - harmless.mean(0)) ** 2).sum())
        expected["pairwise_distance"].append(cdist(harmful, harmless).mean())
        expected["trace"].append(np.trace(covariance))
        expected["rest"].append(np.sqrt(spectrum.sum()) / frame.scale)
        expected["rank"].append(spectrum.sum() ** 2 / (spectrum**2).sum())
        along = [((part - frame.centre) @ frame.direction).mean() / frame.scale for part in (harmful, harmless)]
        expected["margin"].append((along[0] - along[1]) / 2)
        expected["norm"].append((np.linalg.norm(harmful, axis=1).mean() + np.linalg.norm(harmless, axis=1).mean()) / 2)
    found = {name: np.array(column) for name, column in expected.items()}
    squared = found["squared"].copy()
    added = squared[1:].mean() - squared[0]
    squared[1:] -= added
    sizes = np.bincount(labels)
    corrected = np.sqrt(np.maximum(squared - max(added, 0) * np.mean(sizes / (sizes - 1)), 0))
    rank = found["rank"].copy()
    rank[1:] *= rank[0] / np.exp(np.log(rank[1:]).mean())
    wanted = {
        "centroid_distance": np.sqrt(np.maximum(squared, 0)),
        "pairwise_distance": found["pairwise_distance"],
        "relative_distance": corrected / frame.scale,
        "fisher_ratio": corrected / np.sqrt(found["trace"]),
        "orthogonal_std": found["rest"],
        "effective_rank": rank,
        "mean_difference_margin": found["margin"],
        "mean_norm": found["norm"],
    }
    assert numbers.keys() == wanted.keys()
    for name, column in wanted.items():
        bias = name in ("relative_distance", "fisher_ratio")  # which is read off the resamples
        np.testing.assert_allclose(numbers[name][0], column[0], rtol=1e-7 if bias else 1e-12, err_msg=name)
        np.testing.assert_allclose(numbers[name], column, rtol=2e-6, err_msg=name)


def test_effective_rank_counts_the_directions_beside_the_separating_one() -> None:
    prompts = single_prompts([1, 0] * 1000)
    embeddings = clouds(prompts, [6.0], 9)[0]
    embeddings[:, 0] += 20 * np.random.default_rng(1).normal(size=len(prompts))  # along the direction: not counted
    embeddings[:, 5:] = 5.0
    frame = fit_frame(embeddings, prompts.labels)
    frame = type(frame)(frame.centre, frame.scale, np.eye(9)[0])
    numbers = cloud_numbers(embeddings, frame, Resampled.of(prompts.labels, np.ones((2, len(prompts)))))
    assert value(numbers, "effective_rank") == pytest.approx(4, rel=0.02)
    assert value(numbers, "orthogonal_std") == pytest.approx(2 / frame.scale, rel=0.02)


@pytest.mark.parametrize("distance", [0.0, 3.0, 5.0])
def test_bias_correction_by_simulation(distance: float) -> None:
    """Squared and corrected distances of small samples average to the true square; uncorrected ones exceed it."""
    d_model, size, runs = 20, 10, 400
    corrected, raw = [], []
    generator = np.random.default_rng(4)
    _, prompts = canonical(single_prompts([1, 0] * size), "test")
    labels = prompts.labels
    weights = resample_pairs(prompts, 200, seed=0)
    for _ in range(runs):
        cloud = generator.normal(size=(2 * size, d_model))
        cloud[labels == HARMFUL, 0] += distance
        numbers = cloud_numbers(cloud, fit_frame(cloud, labels), Resampled.of(labels, weights))
        scale = fit_frame(cloud, labels).scale
        corrected.append(value(numbers, "relative_distance") * scale)
        raw.append(value(numbers, "centroid_distance") ** 2)
    bias = 2 * d_model / size
    assert np.mean(raw) == pytest.approx(distance**2 + bias, rel=0.05)
    if distance:  # at 0 the floor keeps the mean above
        tolerance = 4 * np.std(np.square(corrected)) / np.sqrt(runs)
        assert tolerance < bias / 3
        assert np.mean(np.square(corrected)) == pytest.approx(distance**2, abs=tolerance)
    else:
        assert np.median(corrected) < 0.5 * np.sqrt(bias)


def coverage(topic: float, runs: int = 60) -> tuple[float, float]:
    """How often the interval of fisher_ratio holds the true value, and the mean of the value over the true one."""
    d_model, distance, held, values = 30, 3.0, 0, []
    truth = distance / np.sqrt(d_model * (1 + topic**2))
    _, prompts = canonical(paired_prompts(60, splits=("test",)))
    for run in range(runs):
        cloud = clouds(prompts, [distance], d_model, topic=topic, seed=run)[0]
        weights = resample_pairs(prompts, 200, seed=run)
        numbers = cloud_numbers(cloud, fit_frame(cloud, prompts.labels), Resampled.of(prompts.labels, weights))
        found = interval(numbers["fisher_ratio"])
        held += found.low <= truth <= found.high
        values.append(found.value)
    return held / runs, float(np.mean(values) / truth)


@pytest.mark.parametrize("topic", [0.0, 1.0, 2.0])
def test_intervals_hold_the_true_value_as_often_as_they_say(topic: float) -> None:
    """Also for twins that share a topic, which a formula for independent samples would correct far too much."""
    held, mean = coverage(topic)
    assert held >= 0.86  # 95 % less three standard errors of 60 runs
    assert mean == pytest.approx(1, abs=0.03)


def test_only_the_raw_lengths_feel_the_length_of_the_embeddings() -> None:
    _, prompts = canonical(paired_prompts(30))
    embeddings = clouds(prompts, [1.0], 8)[0]
    weights = resample_pairs(prompts, 20, seed=0)
    first = cloud_numbers(embeddings, fit_frame(embeddings, prompts.labels), Resampled.of(prompts.labels, weights))
    longer = cloud_numbers(
        8 * embeddings, fit_frame(8 * embeddings, prompts.labels), Resampled.of(prompts.labels, weights)
    )
    for name in first:
        factor = 8 if name in ("centroid_distance", "pairwise_distance", "mean_norm") else 1
        np.testing.assert_allclose(longer[name], factor * first[name], rtol=1e-9, atol=1e-12)


def test_rotation_changes_nothing() -> None:
    _, prompts = canonical(paired_prompts(30))
    embeddings = clouds(prompts, [1.0], 8)[0]
    turned = embeddings @ rotation(8)
    weights = resample_pairs(prompts, 20, seed=0)
    first = cloud_numbers(embeddings, fit_frame(embeddings, prompts.labels), Resampled.of(prompts.labels, weights))
    second = cloud_numbers(turned, fit_frame(turned, prompts.labels), Resampled.of(prompts.labels, weights))
    for name in first:
        np.testing.assert_allclose(second[name], first[name], rtol=1e-8, atol=1e-10)


def test_equal_embeddings_give_zeros() -> None:
    embeddings = np.full((6, 3), 0.1, dtype=np.float32)
    labels = np.array([1, 0] * 3)
    frame = fit_frame(embeddings, labels)
    numbers = cloud_numbers(embeddings, frame, Resampled.of(labels, np.ones((3, 6))))
    for name in set(numbers) - {"mean_norm"}:
        np.testing.assert_array_equal(numbers[name], 0)
    np.testing.assert_array_equal(frame.direction, 0)


def test_two_points_are_infinitely_separated_and_reported_at_the_limit() -> None:
    embeddings = np.repeat([[1.0, 0.3], [0.2, 0.1]], 3, axis=0)
    labels = np.array([1, 1, 1, 0, 0, 0])
    numbers = cloud_numbers(embeddings, fit_frame(embeddings, labels), Resampled.of(labels, np.ones((2, 6))))
    assert value(numbers, "centroid_distance") == pytest.approx(np.hypot(0.8, 0.2))
    assert value(numbers, "fisher_ratio") == 1e6
    assert value(numbers, "effective_rank") == 0


def test_all_zero_embeddings_are_defined() -> None:
    labels = np.array([1, 0, 1, 0])
    frame = fit_frame(np.zeros((4, 3)), labels)
    assert frame.scale == 1
    assert all(
        np.all(column == 0)
        for column in cloud_numbers(np.zeros((4, 3)), frame, Resampled.of(labels, np.ones((2, 4)))).values()
    )


def test_direction_cosine_of_known_directions() -> None:
    base = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    for angle in (0.0, 0.3, np.pi / 2, np.pi):
        tuned = base @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * 3 + 7
        assert direction_cosine(base, tuned, Resampled.of(LABELS, np.ones((2, 4))))[0] == pytest.approx(
            np.cos(angle), abs=1e-12
        )
    assert direction_cosine(base, np.ones((4, 2)), Resampled.of(LABELS, np.ones((2, 4))))[0] == 0
