"""Intervals, shuffled labels and folds: the unit is the pair, and the order of prompts plays no part."""

from __future__ import annotations

import numpy as np
import pytest

from es2.analysis.resampling import (
    RATIO_LIMIT,
    canonical,
    drawn_together,
    fold_of,
    interval,
    intervals,
    resample_pairs,
    safe_ratio,
    shuffled_labels,
)
from es2.prompts.prompt_set import HARMFUL, HARMLESS, stable_hash
from tests.clouds import _set, paired_prompts, permuted, single_prompts


def test_resampling_keeps_pairs_together_and_classes_whole() -> None:
    _, prompts = canonical(
        _set("mixed", list("abcdefg"), [1, 0, 1, 0, 1, 0, 0], ["p", "p", "q", "q", "r", "s", "t"], ["test"] * 7)
    )
    weights = resample_pairs(prompts, 200, seed=3)
    assert weights.shape == (201, 7)
    np.testing.assert_array_equal(weights[0], 1)
    by_text = dict(zip(prompts.texts, weights.T, strict=True))
    np.testing.assert_array_equal(by_text["a"], by_text["b"])
    np.testing.assert_array_equal(by_text["c"], by_text["d"])
    np.testing.assert_array_equal(by_text["a"] + by_text["c"], 2)  # the two full pairs are drawn among themselves
    np.testing.assert_array_equal(by_text["e"], 1)  # the only prompt of its composition
    np.testing.assert_array_equal(by_text["f"] + by_text["g"], 2)
    assert set(by_text["a"]) == {0, 1, 2}


def test_resamples_are_seeded() -> None:
    prompts = paired_prompts(20)
    np.testing.assert_array_equal(resample_pairs(prompts, 5, 1), resample_pairs(prompts, 5, 1))
    assert (resample_pairs(prompts, 5, 1) != resample_pairs(prompts, 5, 2)).any()


def test_shuffled_labels_swap_within_pairs_by_fair_coins() -> None:
    prompts = paired_prompts(500)
    shuffled = shuffled_labels(prompts, 4, seed=0)
    np.testing.assert_array_equal(shuffled[:, ::2] + shuffled[:, 1::2], 1)  # one harmful in each pair still
    agreement = (shuffled[:, ::2] == HARMFUL).mean(axis=1)
    assert np.all(np.abs(agreement - 0.5) < 0.1)
    swapped = shuffled[:, ::2] == HARMLESS
    assert np.abs(np.corrcoef(swapped)[np.triu_indices(4, 1)]).max() < 0.15  # every shuffle has coins of its own


def test_shuffled_labels_of_single_prompts_keep_the_class_sizes() -> None:
    prompts = single_prompts([1] * 30 + [0] * 90)
    shuffled = shuffled_labels(prompts, 3, seed=0)
    np.testing.assert_array_equal(shuffled.sum(axis=1), 30)
    assert np.all(shuffled[:, :30].sum(axis=1) < 20)


@pytest.mark.parametrize("prompts", [paired_prompts(30), single_prompts([1, 0] * 20)])
def test_shuffles_folds_and_canonical_order_ignore_the_order_of_prompts(prompts) -> None:
    order = np.random.default_rng(0).permutation(len(prompts))
    other = permuted(prompts, order)
    np.testing.assert_array_equal(shuffled_labels(prompts, 3, 7)[:, order], shuffled_labels(other, 3, 7))
    np.testing.assert_array_equal(fold_of(prompts, 5)[order], fold_of(other, 5))
    rows, first = canonical(prompts)
    other_rows, second = canonical(other)
    assert first.texts == second.texts
    np.testing.assert_array_equal(rows, order[other_rows])


def test_canonical_takes_one_split() -> None:
    prompts = paired_prompts(10, splits=("tune", "probe"))
    rows, probe = canonical(prompts, "probe")
    assert set(probe.splits) == {"probe"}
    assert [prompts.texts[row] for row in rows] == list(probe.texts)
    assert len(probe) == 10


def test_folds_are_the_hash_of_the_pair() -> None:
    prompts = paired_prompts(12)
    folds = fold_of(prompts, 5)
    np.testing.assert_array_equal(folds[::2], folds[1::2])
    assert folds[0] == stable_hash(f"fold:{prompts.pairs[0]}") % 5


def test_interval_is_of_percentiles_and_holds_the_value() -> None:
    replicates = np.concatenate([[50.0], np.arange(101.0)])
    found = interval(replicates, 0.9)
    assert (found.value, found.low, found.high) == pytest.approx((50.0, 5.0, 95.0))
    outside = interval(np.concatenate([[200.0], np.arange(101.0)]), 0.9)
    assert (outside.low, outside.high) == pytest.approx((5.0, 200.0))


def test_intervals_of_several_numbers_are_each_its_own() -> None:
    replicates = {"a": np.random.default_rng(0).normal(size=51), "b": np.arange(51.0)[::-1]}
    assert intervals(replicates, 0.8) == {name: interval(own, 0.8) for name, own in replicates.items()}


def test_twins_are_drawn_together() -> None:
    _, prompts = canonical(paired_prompts(30))
    units = drawn_together(resample_pairs(prompts, 100, 0).T)
    np.testing.assert_array_equal(units[::2], units[1::2])
    assert sorted(set(units)) == list(range(30))


def test_safe_ratio_never_overflows() -> None:
    ratio = safe_ratio(np.array([6.0, 1.0, 0.0, 1e300]), np.array([3.0, 0.0, 0.0, 1e-300]), both_zero=1.0)
    np.testing.assert_allclose(ratio, [2.0, RATIO_LIMIT, 1.0, RATIO_LIMIT])
