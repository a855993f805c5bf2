"""How far apart the two clouds of one layer stand, and what is left beside the direction that separates them.

Every number is worked out from inner products between the test prompts alone (their Gram matrix), never from
coordinates. That makes rotations of the model's space irrelevant by construction, costs the same for a model of 576
and of 8,192 dimensions once the matrix is made, and turns a bootstrap into a product of a weight matrix
`[resample, prompt]` with matrices `[prompt, prompt]`, exactly and without a loop. Directions and scale come from the
`probe` split and stay fixed while `test` is resampled: an interval says how sure a number is, given the ruler.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from es2.prompts import HARMFUL, HARMLESS
from es2.resampling import Replicates, safe_ratio

ROUNDING = 1e-10
"""Lengths below this part of the scale are rounding: no stored embedding resolves a relative 1e-7."""

Weights = Float[np.ndarray, "resample prompt"]


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

    def normalise(self, embeddings: Float[np.ndarray, "prompt d_model"]) -> Float[np.ndarray, "prompt d_model"]:
        """z = (e − centre) / scale, in float64."""
        return (np.asarray(embeddings, dtype=np.float64) - self.centre) / self.scale


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


def class_weights(
    weights: Weights, labels: Int[np.ndarray, "prompt"]
) -> tuple[Float[np.ndarray, "resample harmful"], Float[np.ndarray, "resample harmless"]]:
    """Multiplicities as weights that sum to 1 within each class, which must be there in every resample."""
    harmful, harmless = (weights[:, labels == label] for label in (HARMFUL, HARMLESS))
    return harmful / harmful.sum(axis=1, keepdims=True), harmless / harmless.sum(axis=1, keepdims=True)


def balanced_mean(
    values: Float[np.ndarray, "prompt"], labels: Int[np.ndarray, "prompt"], weights: Weights
) -> Replicates:
    """The mean of `values` per class, then over the two classes, under every resample; a missing class counts as 0."""
    classes = np.stack([labels == HARMFUL, labels == HARMLESS], axis=1)
    sums = weights @ (classes * values[:, None])
    return (sums / np.maximum(weights @ classes, 1)).mean(axis=1)


def _form(
    left: Float[np.ndarray, "resample a"], matrix: Float[np.ndarray, "a b"], right: Float[np.ndarray, "resample b"]
) -> Replicates:
    """left · matrix · right for every resample."""
    return np.einsum("rb,rb->r", left @ matrix, right)


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
    sides = class_weights(weights, labels)
    clouds = (embeddings[is_harmful], embeddings[~is_harmful])
    sizes = tuple(len(cloud) for cloud in clouds)
    floor = ROUNDING * frame.scale

    origin = embeddings[0]
    middle = origin + ((clouds[0] - origin).mean(axis=0) + (clouds[1] - origin).mean(axis=0)) / 2
    centred = tuple(cloud - middle for cloud in clouds)
    gram = [[left @ right.T for right in centred] for left in centred]
    squares = [np.diag(gram[side][side]) for side in (0, 1)]

    # ‖μ₁ − μ₀‖², and tr Σ of each class.
    own = [_form(sides[side], gram[side][side], sides[side]) for side in (0, 1)]
    squared_distance = own[0] + own[1] - 2 * _form(sides[0], gram[0][1], sides[1])
    # Resampling spreads a class by its variance with n below, the sample was drawn with n − 1 below.
    bias = max(_added_by_resampling(squared_distance), 0) * np.mean([size / (size - 1) for size in sizes])
    squared_distance = _without_added_bias(squared_distance)
    traces = [
        np.maximum(sides[side] @ squares[side] - own[side], 0) * sizes[side] / (sizes[side] - 1) for side in (0, 1)
    ]
    corrected = np.sqrt(np.maximum(squared_distance - bias, 0))
    deviation = np.sqrt((traces[0] + traces[1]) / 2)
    corrected[corrected < floor] = 0
    deviation[deviation < floor] = 0

    squared_pairwise = squares[0][:, None] + squares[1][None, :] - 2 * gram[0][1]
    norms = np.sqrt(np.einsum("pd,pd->p", embeddings, embeddings))
    along = (embeddings - frame.centre) @ frame.direction / frame.scale
    rest, rank = _rest_numbers(gram, [cloud @ frame.direction for cloud in centred], sides, floor)
    return {
        "centroid_distance": np.sqrt(np.maximum(squared_distance, 0)),
        "pairwise_distance": _form(sides[0], np.sqrt(np.maximum(squared_pairwise, 0)), sides[1]),
        "mean_norm": balanced_mean(norms, labels, weights),
        "relative_distance": corrected / frame.scale,
        "fisher_ratio": safe_ratio(corrected, deviation, both_zero=0.0),
        "rest_deviation": rest / frame.scale,
        "effective_rank": rank,
        "mean_difference_margin": balanced_mean(np.where(is_harmful, along, -along), labels, weights),
    }


def _rest_numbers(
    gram: list[list[Float[np.ndarray, "a b"]]],
    along: list[Float[np.ndarray, "a"]],
    sides: tuple[Float[np.ndarray, "resample a"], Float[np.ndarray, "resample b"]],
    floor: float,
) -> tuple[Replicates, Replicates]:
    """RMS deviation within classes, and participation ratio, orthogonal to a unit direction.

    `along` holds the prompts' coordinates on that direction. With q the weights of a class, K the Gram matrix without
    the direction, and c, d running over the classes,

        tr C² = ¼ Σ_cd [ q_c (K∘K)_cd q_d − q_c (K_cd q_d)² − q_d (K_dc q_c)² + (q_c K_cd q_d)² ],

    since each bracket is the mean square of a matrix whose row and column means have been removed.
    """
    kernel = [[gram[c][d] - np.outer(along[c], along[d]) for d in (0, 1)] for c in (0, 1)]
    towards = [[sides[d] @ kernel[d][c] for d in (0, 1)] for c in (0, 1)]
    traces, squares = [], []
    for c in (0, 1):
        size = len(along[c])
        unbiased = size / (size - 1)
        own = np.einsum("ra,ra->r", towards[c][c], sides[c])
        traces.append(np.maximum(sides[c] @ np.diag(kernel[c][c]) - own, 0) * unbiased)
        for d in (0, 1):
            mean = np.einsum("ra,ra->r", towards[c][d], sides[c])
            bracket = (
                _form(sides[c], kernel[c][d] ** 2, sides[d])
                - np.einsum("ra,ra->r", sides[c], towards[c][d] ** 2)
                - np.einsum("rb,rb->r", sides[d], towards[d][c] ** 2)
                + mean**2
            )
            squares.append(bracket * unbiased * len(along[d]) / (len(along[d]) - 1))
    trace = (traces[0] + traces[1]) / 2
    trace[trace < floor**2] = 0
    square = sum(squares) / 4
    rank = np.where(trace > 0, trace**2 / np.where(square > 0, square, 1), 0.0)
    # A resample holds fewer distinct prompts and so spans fewer dimensions; that shrinkage is the resampling's own.
    if rank[0] > 0:
        spans = rank[1:] > 0
        shrinkage = np.exp(np.log(rank[1:][spans]).mean()) / rank[0] if spans.any() else 1.0
        rank[1:] /= shrinkage
        rank[rank > 0] = np.maximum(rank[rank > 0], 1.0)
    return np.sqrt(trace), rank


def direction_cosine(
    base: Float[np.ndarray, "prompt d_model"],
    tuned: Float[np.ndarray, "prompt d_model"],
    labels: Int[np.ndarray, "prompt"],
    weights: Weights,
) -> Replicates:
    """Cosine between base's and tuned's mean differences on the same prompts, under every resample; 0 if one vanishes.

    What resampling adds on average is taken off numerator and denominator, as in `cloud_numbers`.
    """
    signed = _signed_weights(weights, labels)
    base, tuned = (cloud - cloud[0] for cloud in (np.asarray(base, np.float64), np.asarray(tuned, np.float64)))
    across = _without_added_bias(_form(signed, base @ tuned.T, signed))
    lengths = [_without_added_bias(_form(signed, cloud @ cloud.T, signed)) for cloud in (base, tuned)]
    product = np.sqrt(np.maximum(lengths[0], 0) * np.maximum(lengths[1], 0))
    return np.where(product > 0, np.clip(across / np.where(product > 0, product, 1), -1, 1), 0.0)


def _signed_weights(weights: Weights, labels: Int[np.ndarray, "prompt"]) -> Weights:
    """Weights under which the weighted sum of the embeddings is μ_harmful − μ_harmless."""
    harmful, harmless = class_weights(weights, labels)
    signed = np.empty_like(weights)
    signed[:, labels == HARMFUL] = harmful
    signed[:, labels == HARMLESS] = -harmless
    return signed
