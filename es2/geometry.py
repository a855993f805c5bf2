"""How far apart the two clouds of one layer stand, and what is left beside the direction that separates them.

Every number is worked out from inner products between the test prompts alone (their Gram matrix), never from
coordinates. That makes rotations of the model's space irrelevant by construction, costs the same for a model of 576
and of 8,192 dimensions once the matrix is made, and turns a bootstrap into a product of matrices `[prompt, prompt]`
with a matrix of weights `[prompt, resample]`, exactly and without a loop. These products are most of an analysis, so
numbers share them, and prompts that are always drawn together are added up first where that gives the same. Directions
and scale come from the `probe` split and stay fixed while `test` is resampled: an interval says how sure a number is,
given the ruler.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from es2.prompts import HARMFUL, HARMLESS
from es2.resampling import Replicates, drawn_together, safe_ratio

ROUNDING = 1e-10
"""Lengths below this part of the scale are rounding: no stored embedding resolves a relative 1e-7."""

Weights = Float[np.ndarray, "resample prompt"]

_AT_ONCE = 64  # prompts


@dataclass(frozen=True)
class Frame:
    """One model's ruler at one layer, taken from its `probe` prompts.

    Attributes:
        centre: the mean of the two class means, `[d_model]`.
        scale: sqrt of the class-balanced mean of ‖e‖², the length that the next block's norm divides by; 1 if all
            embeddings are zero.
        direction: unit vector from the harmless to the harmful mean, `[d_model]`; zero if the means coincide.
    """

    centre: Float[np.ndarray, "d_model"]
    scale: float
    direction: Float[np.ndarray, "d_model"]

    def normalise(
        self, embeddings: Float[np.ndarray, "prompt d_model"], dtype: type[np.floating] = np.float64
    ) -> Float[np.ndarray, "prompt d_model"]:
        """z = (e − centre) / scale, in float64 unless said otherwise."""
        z: Float[np.ndarray, "prompt d_model"] = np.asarray(embeddings, dtype=dtype) - self.centre.astype(dtype)
        z /= self.scale
        return z


def parts_of(embeddings: Float[np.ndarray, "prompt d_model"]) -> list[Float[np.ndarray, "part d_model"]]:
    """Views of a few prompts each, one at least: what is worked out of one, of 4,096 dimensions, fits into a cache."""
    return [embeddings[start : start + _AT_ONCE] for start in range(0, max(1, len(embeddings)), _AT_ONCE)]


def fit_frame(embeddings: Float[np.ndarray, "prompt d_model"], labels: Int[np.ndarray, "prompt"]) -> Frame:
    """The frame of one layer: `embeddings` and `labels` of the `probe` split, both labels present."""
    embeddings = np.asarray(embeddings, dtype=np.float64)
    # Seen from one of the embeddings, so that equal embeddings give means that are equal to the last bit.
    origin = embeddings[0]
    harmful, harmless = (embeddings[labels == label] for label in (HARMFUL, HARMLESS))
    mean_harmful, mean_harmless = ((cloud - origin).mean(axis=0) for cloud in (harmful, harmless))
    squares = [np.einsum("pd,pd->p", cloud, cloud).mean() for cloud in (harmful, harmless)]
    scale = float(np.sqrt(np.mean(squares))) or 1.0
    difference = mean_harmful - mean_harmless
    length = float(np.linalg.norm(difference))
    direction = difference / length if length > ROUNDING * scale else np.zeros_like(difference)
    return Frame(origin + (mean_harmful + mean_harmless) / 2, scale, direction)


def class_sums(
    values: Float[np.ndarray, "prompt column"], labels: Int[np.ndarray, "prompt labeling"], weights: Weights
) -> tuple[Float[np.ndarray, "class resample column"], Float[np.ndarray, "class resample labeling"]]:
    """Sums of `values` over harmful and over harmless prompts under every resample, and how many prompts these are.

    `labels` are a column for each of `values`, or one column for all. Everything is one matrix product, since what
    takes time is to read the weights.
    """
    sides = (labels == HARMFUL, labels == HARMLESS)
    columns = [side * values for side in sides] + [side.astype(np.float64) for side in sides]
    ends = np.cumsum([part.shape[1] for part in columns])
    harmful, harmless, *counts = np.split(weights @ np.concatenate(columns, axis=1), ends[:-1], axis=1)
    return np.stack([harmful, harmless]), np.stack(counts)


def balanced_mean(
    values: Float[np.ndarray, "prompt column"], labels: Int[np.ndarray, "prompt labeling"], weights: Weights
) -> Float[np.ndarray, "resample column"]:
    """The mean of `values` per class, then over the two classes, under every resample; a missing class counts as 0."""
    sums, counts = class_sums(values, labels, weights)
    return (sums / np.maximum(counts, 1)).mean(axis=0)


def _shares(
    weights: Weights, labels: Int[np.ndarray, "prompt"]
) -> tuple[Float[np.ndarray, "harmful resample"], Float[np.ndarray, "harmless resample"]]:
    """Multiplicities, scaled so that each class, which must be there in every resample, sums to its size."""
    sides = (weights.T[labels == label] for label in (HARMFUL, HARMLESS))
    harmful, harmless = (side * (len(side) / side.sum(axis=0)) for side in sides)
    return harmful, harmless


def _inner(left: Float[np.ndarray, "a resample"], right: Float[np.ndarray, "a resample"]) -> Replicates:
    """left · right for every resample."""
    return np.einsum("ar,ar->r", left, right)


@dataclass(frozen=True)
class _Together:
    """Prompts that are always drawn together, such as twins, as one: sums over prompts become sums over fewer units.

    Attributes:
        drawn: how often each unit is drawn, `[unit, resample]`.
        units: the unit of each prompt, harmful prompts first.
        factors: with what each prompt counts.
    """

    drawn: Float[np.ndarray, "unit resample"]
    units: Int[np.ndarray, "prompt"]
    factors: Float[np.ndarray, "prompt"]

    def sum(self, rows: Float[np.ndarray, "prompt column"]) -> Float[np.ndarray, "unit column"]:
        """Rows times their factors, added up within each unit."""
        from scipy.sparse import csr_array

        return csr_array((self.factors, (self.units, np.arange(len(self.units))))) @ rows


def _together(
    shares: tuple[Float[np.ndarray, "harmful resample"], Float[np.ndarray, "harmless resample"]],
    factors: tuple[float, float],
) -> _Together:
    """`factors` are of harmful and of harmless prompts."""
    stacked = np.concatenate(shares)
    units = drawn_together(stacked)
    _, first = np.unique(units, return_index=True)
    return _Together(stacked[first], units, np.repeat(factors, [len(share) for share in shares]))


def _added_by_resampling(replicates: Replicates) -> float:
    """What resampling adds on average to a squared length.

    The squared length of a sample mean exceeds the true one; that of a resample exceeds the sample's by about as much
    again. Read off the replicates, it is right for twins that resemble each other as well as for independent prompts.
    """
    return float(replicates[1:].mean() - replicates[0])


def _without_added_bias(replicates: Replicates) -> Replicates:
    """Take off what resampling adds, so that the interval surrounds the number."""
    return np.concatenate([replicates[:1], replicates[1:] - _added_by_resampling(replicates)])


def cloud_numbers(
    embeddings: Float[np.ndarray, "prompt d_model"],
    labels: Int[np.ndarray, "prompt"],
    weights: Weights,
    frame: Frame,
) -> dict[str, Replicates]:
    """Distances and spreads of one layer's two clouds, by DESIGN's names, under every resample.

    Args:
        embeddings: of the test prompts.
        labels: of the test prompts, at least two of each.
        weights: multiplicities from `resample_pairs`; row 0 all ones.
        frame: of the same model and layer, from `probe`.

    Returns:
        `centroid_distance` and `pairwise_distance` in the model's own units; `mean_norm`, the mean ‖e‖, likewise;
        `relative_distance` and `rest_deviation` in units of the scale; `fisher_ratio`, `effective_rank` and
        `mean_difference_margin` without unit. All are class-balanced; Σ is a class's covariance with n − 1 below.

        Bias: ‖μ₁ − μ₀‖² of two independent samples exceeds the true value by tr Σ₁/n₁ + tr Σ₀/n₀ (DESIGN's formula).
        Twins share a topic, so their means move together and the excess is smaller, by 2 tr Σ₁₀/n. What resampling
        whole pairs adds to the squared distance estimates it in both cases; `relative_distance` and `fisher_ratio`
        subtract it and floor at 0. In every resample it is subtracted twice, once for the sample and once for the
        resampling; `centroid_distance` is uncorrected, so its replicates lose only the second.

        `rest_deviation` is the within-class deviation orthogonal to `frame.direction` (the unit mean-difference
        direction of `probe` of the same model), root mean square over classes; `effective_rank` the participation
        ratio (tr C)² / tr C² of C = (Σ₁ + Σ₀)/2 in that orthogonal complement, 0 without any spread.
    """
    embeddings = np.asarray(embeddings, dtype=np.float64)
    is_harmful = labels == HARMFUL
    shares = _shares(weights, labels)
    sizes = (len(shares[0]), len(shares[1]))
    sides = (shares[0] / sizes[0], shares[1] / sizes[1])
    floor = ROUNDING * frame.scale

    origin = embeddings[0]
    middle = origin + sum((embeddings[labels == label] - origin).mean(axis=0) for label in (HARMFUL, HARMLESS)) / 2
    centred = np.concatenate([embeddings[is_harmful], embeddings[~is_harmful]])
    centred -= middle
    gram = centred @ centred.T
    aside = centred @ frame.direction
    del centred  # as large as the embeddings
    squares = np.diag(gram).copy()
    pairwise = gram[: sizes[0], sizes[0] :] * -2
    pairwise += squares[: sizes[0], None]
    pairwise += squares[sizes[0] :]
    np.sqrt(np.maximum(pairwise, 0, out=pairwise), out=pairwise)
    pairwise_distance = _inner(sides[0], pairwise @ sides[1])
    del pairwise

    # From here on without the direction, whose part in a product is the product of the prompts' coordinates on it.
    gram -= np.outer(aside, aside)
    rest, rank, own, across = _rest_numbers(gram, shares, floor)
    means = [aside[: sizes[0]] @ sides[0], aside[sizes[0] :] @ sides[1]]

    # ‖μ₁ − μ₀‖², and tr Σ of each class.
    squared_distance = own[0] + own[1] - 2 * across + (means[0] - means[1]) ** 2
    # Resampling spreads a class by its variance with n below, the sample was drawn with n − 1 below.
    bias = max(_added_by_resampling(squared_distance), 0) * np.mean([size / (size - 1) for size in sizes])
    squared_distance = _without_added_bias(squared_distance)
    lengths = (squares[: sizes[0]] @ sides[0], squares[sizes[0] :] @ sides[1])
    traces = [
        np.maximum(lengths[side] - own[side] - means[side] ** 2, 0) * sizes[side] / (sizes[side] - 1) for side in (0, 1)
    ]
    corrected = np.sqrt(np.maximum(squared_distance - bias, 0))
    deviation = np.sqrt((traces[0] + traces[1]) / 2)
    corrected[corrected < floor] = 0
    deviation[deviation < floor] = 0

    norms = np.sqrt(np.einsum("pd,pd->p", embeddings, embeddings))
    along = (embeddings @ frame.direction - frame.centre @ frame.direction) / frame.scale
    columns = np.stack([norms, np.where(is_harmful, along, -along)], axis=1)
    mean_norm, margin = balanced_mean(columns, labels[:, None], weights).T
    return {
        "centroid_distance": np.sqrt(np.maximum(squared_distance, 0)),
        "pairwise_distance": pairwise_distance,
        "mean_norm": mean_norm,
        "relative_distance": corrected / frame.scale,
        "fisher_ratio": safe_ratio(corrected, deviation, both_zero=0.0),
        "rest_deviation": rest / frame.scale,
        "effective_rank": rank,
        "mean_difference_margin": margin,
    }


def _rest_numbers(
    kernel: Float[np.ndarray, "prompt prompt"],
    shares: tuple[Float[np.ndarray, "harmful resample"], Float[np.ndarray, "harmless resample"]],
    floor: float,
) -> tuple[Replicates, Replicates, list[Replicates], Replicates]:
    """RMS deviation within classes, and participation ratio, orthogonal to a unit direction.

    `kernel` is the Gram matrix without that direction, harmful prompts first; it is overwritten. With q the weights of
    a class, K the kernel, and c, d running over the classes,

        tr C² = ¼ Σ_cd [ q_c (K∘K)_cd q_d − q_c (K_cd q_d)² − q_d (K_dc q_c)² + (q_c K_cd q_d)² ],

    since each bracket is the mean square of a matrix whose row and column means have been removed; here without the
    factors n / (n − 1) of both classes.

    Returns:
        Both, then q_c K_cc q_c of both classes and q_1 K_10 q_0.
    """
    sizes = [len(share) for share in shares]
    unbiased = [size / (size - 1) for size in sizes]
    blocks = (slice(0, sizes[0]), slice(sizes[0], None))
    sides = [share / size for share, size in zip(shares, sizes, strict=True)]
    diagonal = np.diag(kernel).copy()
    means, square = np.empty((2, 2, sides[0].shape[1])), np.zeros(sides[0].shape[1])
    for d in (0, 1):
        towards = kernel[:, blocks[d]] @ sides[d]
        for c in (0, 1):
            part = towards[blocks[c]]
            means[c, d] = _inner(sides[c], part)
            part *= part
            # The sum over c and d holds the bracket's second and third term twice each.
            square += unbiased[c] * unbiased[d] * (means[c, d] ** 2 - 2 * _inner(sides[c], part))
    kernel *= kernel
    together = _together(shares, (unbiased[0] / sizes[0], unbiased[1] / sizes[1]))
    square += _inner(together.drawn, together.sum(together.sum(kernel).T) @ together.drawn)
    square /= 4
    traces = [np.maximum(diagonal[blocks[c]] @ sides[c] - means[c, c], 0) * unbiased[c] for c in (0, 1)]
    trace = (traces[0] + traces[1]) / 2
    trace[trace < floor**2] = 0
    rank = np.where(trace > 0, trace**2 / np.where(square > 0, square, 1), 0.0)
    # A resample holds fewer distinct prompts and so spans fewer dimensions; that shrinkage is the resampling's own.
    if rank[0] > 0:
        spans = rank[1:] > 0
        shrinkage = np.exp(np.log(rank[1:][spans]).mean()) / rank[0] if spans.any() else 1.0
        rank[1:] /= shrinkage
        rank[rank > 0] = np.maximum(rank[rank > 0], 1.0)
    return np.sqrt(trace), rank, [means[0, 0], means[1, 1]], means[0, 1]


def direction_cosine(
    base: Float[np.ndarray, "prompt d_model"],
    tuned: Float[np.ndarray, "prompt d_model"],
    labels: Int[np.ndarray, "prompt"],
    weights: Weights,
) -> Replicates:
    """Cosine between base's and tuned's mean differences on the same prompts, under every resample; 0 if one vanishes.

    What resampling adds on average is taken off numerator and denominator, as in `cloud_numbers`.
    """
    shares = _shares(weights, labels)
    together = _together(shares, (1 / len(shares[0]), -1 / len(shares[1])))

    def differences(embeddings: Float[np.ndarray, "prompt d_model"]) -> Float[np.ndarray, "d_model resample"]:
        cloud = np.asarray(embeddings, dtype=np.float64)
        cloud = np.concatenate([cloud[labels == HARMFUL], cloud[labels == HARMLESS]]) - cloud[0]
        return together.sum(cloud).T @ together.drawn

    of_base, of_tuned = differences(base), differences(tuned)
    across = _without_added_bias(_inner(of_base, of_tuned))
    lengths = [_without_added_bias(_inner(own, own)) for own in (of_base, of_tuned)]
    product = np.sqrt(np.maximum(lengths[0], 0) * np.maximum(lengths[1], 0))
    return np.where(product > 0, np.clip(across / np.where(product > 0, product, 1), -1, 1), 0.0)
