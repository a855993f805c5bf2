"""How far apart the two clouds of one layer are, and the spread that is left beside the direction that separates them.

Numbers come from the Gram matrix of the test prompts, so rotations change nothing and a bootstrap is one product of
matrices. Directions and scale come from `probe` and stay fixed while `test` is resampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from es2.analysis.resampling import Replicates, drawn_together, safe_ratio
from es2.prompts.prompt_set import HARMFUL, HARMLESS

if TYPE_CHECKING:
    from jaxtyping import Float, Int


ROUNDING = 1e-10  # lengths below this part of the scale

Weights: TypeAlias = 'Float[np.ndarray, "resample prompt"]'

_AT_ONCE = 64  # prompts, which in 4,096 dimensions fit into a cache


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
        """z = (e − centre) / scale."""
        z: Float[np.ndarray, "prompt d_model"] = np.asarray(embeddings, dtype=dtype) - self.centre.astype(dtype)
        z /= self.scale
        return z


def parts_of(embeddings: Float[np.ndarray, "prompt d_model"]) -> list[Float[np.ndarray, "part d_model"]]:
    """Views of a few prompts each, at least one view."""
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
    """Sums of `values` over harmful and over harmless prompts under every resample, and numbers of these prompts.

    `labels` has a column for each of `values`, or one for all. One matrix product, as reading weights takes the time.
    """
    sides = (labels == HARMFUL, labels == HARMLESS)
    columns = [side * values for side in sides] + [side.astype(values.dtype) for side in sides]
    ends = np.cumsum([part.shape[1] for part in columns])
    harmful, harmless, *counts = np.split(weights @ np.concatenate(columns, axis=1), ends[:-1], axis=1)
    return np.stack([harmful, harmless]), np.stack(counts)


def balanced_mean(
    values: Float[np.ndarray, "prompt column"], labels: Int[np.ndarray, "prompt labeling"], weights: Weights
) -> Float[np.ndarray, "resample column"]:
    """The mean of `values` per class, then over the two classes, under every resample; a missing class counts as 0."""
    sums, counts = class_sums(values, labels, weights)
    return (sums / np.maximum(counts, 1)).mean(axis=0)


def inner(left: Float[np.ndarray, "a column"], right: Float[np.ndarray, "a column"]) -> Float[np.ndarray, "column"]:
    """left · right of every column."""
    return np.einsum("ac,ac->c", left, right)


@dataclass(frozen=True)
class _Shares:
    """Resamples of the two classes, in one precision.

    Attributes:
        sides: each prompt's share of its class, harmful and harmless.
        units: each unit's share of a class; prompts that are always resampled together, such as twins, are one unit.
    """

    sides: tuple[Float[np.ndarray, "harmful resample"], Float[np.ndarray, "harmless resample"]]
    units: Float[np.ndarray, "unit resample"]

    def cast(self, dtype: type[np.floating]) -> _Shares:
        return _Shares((self.sides[0].astype(dtype), self.sides[1].astype(dtype)), self.units.astype(dtype))


@dataclass(frozen=True)
class Resampled:
    """The test prompts, at least two of each label, and their resamples, the same for all layers and models.

    Attributes:
        weights: multiplicities from `resample_pairs`; row 0 all ones.
        exact, single: the resamples in double precision, and in single precision for products of matrices.
        itself: resample 0 alone.
        members: units and one prompt of each, harmful prompts counted first; all units, then those with a second
            prompt, and so on.
    """

    labels: Int[np.ndarray, "prompt"]
    weights: Weights
    exact: _Shares
    single: _Shares
    itself: _Shares
    members: tuple[tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]], ...]

    @classmethod
    def of(cls, labels: Int[np.ndarray, "prompt"], weights: Weights) -> Resampled:
        """The resamples of `resample_pairs`."""
        harmful, harmless = (weights.T[labels == label] for label in (HARMFUL, HARMLESS))
        sides = (harmful / harmful.sum(axis=0), harmless / harmless.sum(axis=0))
        stacked = np.concatenate(sides)
        units = drawn_together(stacked)
        _, first, sizes = np.unique(units, return_index=True, return_counts=True)
        by_unit = np.argsort(units, kind="stable")
        place = np.arange(len(units)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        groups = (by_unit[place == number] for number in range(sizes.max()))
        exact = _Shares(sides, stacked[first])
        itself = _Shares((sides[0][:, :1].copy(), sides[1][:, :1].copy()), exact.units[:, :1].copy())
        members = tuple((units[prompts], prompts) for prompts in groups)
        return cls(labels, weights, exact, exact.cast(np.float32), itself, members)

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of harmful and harmless prompts."""
        return len(self.exact.sides[0]), len(self.exact.sides[1])

    @property
    def blocks(self) -> tuple[slice, slice]:
        """The rows of harmful and of harmless prompts, harmful ones first."""
        return slice(0, self.sizes[0]), slice(self.sizes[0], None)

    @property
    def unbiased(self) -> tuple[float, float]:
        """n / (n − 1) of both classes."""
        harmful, harmless = self.sizes
        return harmful / (harmful - 1), harmless / (harmless - 1)

    def sum_units(self, rows: Float[np.ndarray, "prompt column"]) -> Float[np.ndarray, "unit column"]:
        """Rows of the prompts, harmful ones first, added up within each unit."""
        (_, prompts), *others = self.members
        total = rows[prompts]
        for units, prompts in others:
            total[units] += rows[prompts]
        return total


def _added_by_resampling(replicates: Replicates) -> float:
    """What resampling adds on average to a squared length, about as much as sampling added; right for twins, too."""
    return float(replicates[1:].mean() - replicates[0])


def _without_added_bias(replicates: Replicates) -> Replicates:
    """Replicates less what resampling adds, so that the interval surrounds the number."""
    return np.concatenate([replicates[:1], replicates[1:] - _added_by_resampling(replicates)])


def cloud_numbers(
    embeddings: Float[np.ndarray, "prompt d_model"], frame: Frame, resampled: Resampled
) -> dict[str, Replicates]:
    """Distances and spreads of one layer's two clouds, by name (`docs/numbers.md`), under every resample.

    Args:
        embeddings: of the test prompts.
        frame: of the same model and layer, from `probe`.
        resampled: the test prompts and their resamples.

    Returns:
        `centroid_distance` and `pairwise_distance` in the model's own units; `mean_norm`, the mean ‖e‖, likewise;
        `relative_distance` and `orthogonal_std` in units of the scale; `fisher_ratio`, `effective_rank` and
        `mean_difference_margin` without unit. All are class-balanced; Σ is a class's covariance with n − 1 below.
        Products over resamples are in single precision, which moves bounds of intervals by at most 6·10⁻⁶ of the
        number (default model, built-in prompts).

        Bias: ‖μ₁ − μ₀‖² of two independent samples exceeds the true value by tr Σ₁/n₁ + tr Σ₀/n₀, of twins by
        2 tr Σ₁₀/n less. What resampling whole pairs adds estimates it in both cases; `relative_distance` and
        `fisher_ratio` subtract it and floor at 0. Resamples lose it twice, for the sample and for the resampling;
        `centroid_distance` is uncorrected, so its replicates lose only the second.

        `orthogonal_std` is the within-class deviation orthogonal to `frame.direction` (the unit mean-difference
        direction of `probe` of the same model), root mean square over classes; `effective_rank` the participation
        ratio (tr C)² / tr C² of C = (Σ₁ + Σ₀)/2 in that orthogonal complement, 0 without any spread.
    """
    embeddings = np.asarray(embeddings, dtype=np.float64)
    is_harmful = resampled.labels == HARMFUL
    sides, blocks, unbiased = resampled.exact.sides, resampled.blocks, resampled.unbiased
    floor = ROUNDING * frame.scale

    # Every cloud is seen from its own mean, so that what is worked out in single precision is small.
    centred = np.concatenate([embeddings[is_harmful], embeddings[~is_harmful]])
    means = []
    for block in blocks:
        origin = centred[block][0].copy()  # so that equal embeddings are zero to the last bit
        centred[block] -= origin
        middle = centred[block].mean(axis=0)
        centred[block] -= middle
        means.append(origin + middle)
    difference = means[0] - means[1]
    gram = centred @ centred.T
    aside, towards = centred @ frame.direction, centred @ difference
    del centred  # as large as the embeddings
    squares, distance = np.diag(gram).copy(), float(difference @ difference)
    pairwise = gram[blocks[0], blocks[1]] * -2
    pairwise += (squares + 2 * towards)[blocks[0], None]
    pairwise += (squares - 2 * towards)[blocks[1]] + distance
    np.sqrt(np.maximum(pairwise, 0, out=pairwise), out=pairwise)
    # From here on without the direction, whose part in a product is the product of the prompts' coordinates on it.
    gram -= np.outer(aside, aside)
    forms = _Forms.of(gram, pairwise, resampled)
    del gram, pairwise

    # How far resampling moves each mean along the direction and towards the other, and mean squares, all and aside.
    moved = [np.stack([aside, towards, squares, squares - aside**2])[:, blocks[c]] @ sides[c] for c in (0, 1)]
    own = [forms.own[c] + moved[c][0] ** 2 for c in (0, 1)]
    across = forms.across + moved[0][0] * moved[1][0]
    # ‖μ₁ − μ₀‖², and tr Σ of each class.
    squared_distance = distance + 2 * (moved[0][1] - moved[1][1]) + own[0] + own[1] - 2 * across
    # Resampling spreads a class by its variance with n below, the sample has n − 1 below.
    bias = max(_added_by_resampling(squared_distance), 0) * np.mean(unbiased)
    squared_distance = _without_added_bias(squared_distance)
    corrected = np.sqrt(np.maximum(squared_distance - bias, 0))
    traces = [np.maximum(moved[c][2] - own[c], 0) * unbiased[c] for c in (0, 1)]
    deviation = np.sqrt((traces[0] + traces[1]) / 2)
    corrected[corrected < floor] = 0
    deviation[deviation < floor] = 0
    traces = [np.maximum(moved[c][3] - forms.own[c], 0) * unbiased[c] for c in (0, 1)]
    rest = (traces[0] + traces[1]) / 2
    rest[rest < floor**2] = 0

    norms = np.sqrt(np.einsum("pd,pd->p", embeddings, embeddings))
    along = (embeddings @ frame.direction - frame.centre @ frame.direction) / frame.scale
    columns = np.stack([norms, np.where(is_harmful, along, -along)], axis=1)
    mean_norm, margin = balanced_mean(columns, resampled.labels[:, None], resampled.weights).T
    return {
        "centroid_distance": np.sqrt(np.maximum(squared_distance, 0)),
        "pairwise_distance": forms.pairwise,
        "mean_norm": mean_norm,
        "relative_distance": corrected / frame.scale,
        "fisher_ratio": safe_ratio(corrected, deviation, both_zero=0.0),
        "orthogonal_std": np.sqrt(rest) / frame.scale,
        "effective_rank": _effective_rank(rest, forms.square),
        "mean_difference_margin": margin,
    }


@dataclass(frozen=True)
class _Forms:
    """Quadratic forms of all resamples q of the classes; K is the Gram matrix without the direction, each class seen
    from its mean.

    Attributes:
        own: q_c K_cc q_c of both classes.
        across: q₁ K₁₀ q₀.
        square: tr C², which is, with c and d running over the classes and factors n / (n − 1) of both left out here,
            ¼ Σ_cd [ q_c (K∘K)_cd q_d − q_c (K_cd q_d)² − q_d (K_dc q_c)² + (q_c K_cd q_d)² ],
            since each bracket is the mean square of a matrix whose row and column means have been removed.
        pairwise: q₁ P₁₀ q₀ of the pairwise distances.
    """

    own: tuple[Replicates, Replicates]
    across: Replicates
    square: Replicates
    pairwise: Replicates

    @classmethod
    def of(
        cls,
        kernel: Float[np.ndarray, "prompt prompt"],
        pairwise: Float[np.ndarray, "harmful harmless"],
        resampled: Resampled,
    ) -> _Forms:
        """Resample 0 in double, all others in single precision; the matrices are overwritten.

        Divided by their size, so that single precision holds their squares.
        """
        size = float(np.abs(np.diag(kernel)).max()) or 1.0
        length = float(pairwise.max()) or 1.0
        kernel /= size
        pairwise /= length
        every = _forms(kernel.astype(np.float32), pairwise.astype(np.float32), resampled, resampled.single)
        itself = _forms(kernel, pairwise, resampled, resampled.itself)
        every = [np.concatenate([one, others[1:]], dtype=np.float64) for one, others in zip(itself, every, strict=True)]
        return cls((every[0] * size, every[1] * size), every[2] * size, every[3] * size**2, every[4] * length)


def _forms(
    kernel: Float[np.ndarray, "prompt prompt"],
    pairwise: Float[np.ndarray, "harmful harmless"],
    resampled: Resampled,
    shares: _Shares,
) -> list[Replicates]:
    """The fields of `_Forms`, K and P in the precision of the resamples; K is overwritten."""
    sides, blocks, unbiased = shares.sides, resampled.blocks, resampled.unbiased
    means: dict[tuple[int, int], Replicates] = {}
    square = np.zeros(sides[0].shape[1])
    for d in (0, 1):
        towards = kernel[:, blocks[d]] @ sides[d]
        for c in (0, 1):
            part = towards[blocks[c]]
            means[c, d] = inner(sides[c], part)
            part *= part
            # The sum over c and d holds the bracket's second and third term twice each.
            square += unbiased[c] * unbiased[d] * (means[c, d] ** 2 - 2 * inner(sides[c], part))
    kernel *= kernel
    factors = np.repeat(unbiased, resampled.sizes).astype(kernel.dtype)
    kernel *= factors[:, None]
    kernel *= factors
    square += inner(shares.units, resampled.sum_units(resampled.sum_units(kernel).T) @ shares.units)
    return [means[0, 0], means[1, 1], means[0, 1], square / 4, inner(sides[0], pairwise @ sides[1])]


def _effective_rank(trace: Replicates, square: Replicates) -> Replicates:
    """(tr C)² / tr C², 0 without any spread."""
    rank = np.where(trace > 0, trace**2 / np.where(square > 0, square, 1), 0.0)
    # A resample holds fewer distinct prompts and so spans fewer dimensions; that shrinkage is the resampling's own.
    if rank[0] > 0:
        spans = rank[1:] > 0
        shrinkage = np.exp(np.log(rank[1:][spans]).mean()) / rank[0] if spans.any() else 1.0
        rank[1:] /= shrinkage
        rank[rank > 0] = np.maximum(rank[rank > 0], 1.0)
    return rank


def direction_cosine(
    base: Float[np.ndarray, "prompt d_model"], tuned: Float[np.ndarray, "prompt d_model"], resampled: Resampled
) -> Replicates:
    """Cosine between base's and tuned's mean differences on the same prompts, under every resample; 0 if one vanishes.

    Numerator and denominator are bias-corrected as in `cloud_numbers`.
    """
    signs = np.repeat([1.0, -1.0], resampled.sizes)[:, None]

    def differences(embeddings: Float[np.ndarray, "prompt d_model"]) -> Float[np.ndarray, "d_model resample"]:
        cloud = np.asarray(embeddings, dtype=np.float64)
        cloud = np.concatenate([cloud[resampled.labels == HARMFUL], cloud[resampled.labels == HARMLESS]]) - cloud[0]
        cloud *= signs
        return resampled.sum_units(cloud).T @ resampled.exact.units

    of_base, of_tuned = differences(base), differences(tuned)
    across = _without_added_bias(inner(of_base, of_tuned))
    lengths = [_without_added_bias(inner(own, own)) for own in (of_base, of_tuned)]
    product = np.sqrt(np.maximum(lengths[0], 0) * np.maximum(lengths[1], 0))
    return np.where(product > 0, np.clip(across / np.where(product > 0, product, 1), -1, 1), 0.0)
