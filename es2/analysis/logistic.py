"""Logistic regressions on the same prompts, many at a time: folds and shuffled labels are columns of one array.

Solutions lie in the span of the prompts, w = Xᵀa. Factoring curvature matrices takes nearly all of Newton's time, so
one factor, in single precision, serves several steps and all fits that begin alike, and conjugate gradients make up for
what it misses. Gradients are exact: this decides how fast the solution is reached, not which one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from es2.analysis.geometry import inner
from es2.prompts.prompt_set import HARMFUL

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


MAX_STEPS = 200
SMALLEST_STEP = 1e-10
SOLVED = 1e-13
"""Twice what the last step takes off the objective, relative to ‖w‖²; some 1e-8 of ‖w‖ are left."""
FAST = 0.2
"""A factor is kept while each of its steps brings the squared decrement down to this part."""
LONGEST = 2.0
"""A factor is kept while its steps need no more than doubling: longer ones take the duals out of the prompts' span."""
SINGLE_PRECISION = {"kernel": 1e5, "features": 1e3}
"""Trace of S K S, which bounds the condition κ, up to which a factor in single precision gives good steps: of
1 + S K S; of 1 + XᵀS²X, where B⁻¹ is the small difference, some 1/κ, of two terms."""
ROUNDING = 1e-13  # changes of an objective below this part of it
NEGLIGIBLE = 0.3
"""Trace of S K S up to which B = 1 + S K S is taken as 1: each step still brings the squared decrement down to 0.3²."""

Columns: TypeAlias = 'Float[np.ndarray, "prompt fit"]'


@dataclass(frozen=True)
class Fits:
    """Several fits in the span of the same prompts.

    Attributes:
        duals: the coefficients a of w = Xᵀa; zero for prompts that a fit does not see.
        intercept: b.
        fitted: w·x of every prompt, seen or not.
    """

    duals: Columns
    intercept: Float[np.ndarray, "fit"]
    fitted: Columns


@dataclass(frozen=True)
class Products:
    """Inner products between prompts: K = XXᵀ itself, or X where it has fewer columns than rows.

    Attributes:
        features: X.
        kernel: K; None where prompts outnumber dimensions and d × d is the smaller matrix to factor.
    """

    features: Float[np.ndarray, "prompt d"]
    kernel: Float[np.ndarray, "prompt prompt"] | None

    @classmethod
    def of(cls, features: Float[np.ndarray, "prompt d"]) -> Products:
        """The products in the smaller form."""
        return cls(features, features @ features.T if len(features) <= features.shape[1] else None)

    def times(self, values: Columns) -> Columns:
        """K · values."""
        return ((values.T @ self.features) @ self.features.T).T if self.kernel is None else (values.T @ self.kernel).T

    def lengths(self) -> Float[np.ndarray, "prompt"]:
        """Squared length of every prompt, the diagonal of K."""
        return np.einsum("pd,pd->p", self.features, self.features) if self.kernel is None else np.diag(self.kernel)

    @property
    def source(self) -> Float[np.ndarray, "prompt other"]:
        """K or X, of which curvature matrices are made."""
        return self.features if self.kernel is None else self.kernel

    def among(
        self, rows: Int[np.ndarray, "row"], source: Float[np.ndarray, "prompt other"]
    ) -> Float[np.ndarray, "row _"]:
        """The part of `source`, in any precision, that is of these prompts."""
        if len(rows) == len(source):
            return source
        # K is symmetric; transposed, the second choice is row-major again.
        return source[rows] if self.kernel is None else source[rows][:, rows].T


def fit_columns(
    products: Products, labels: Int[np.ndarray, "prompt fit"], seen: Bool[np.ndarray, "prompt fit"], Cs: Sequence[float]
) -> Iterator[Fits]:
    """One fit a column at each of ascending Cs, started from the C before.

    Minimises ½‖w‖² + C Σᵢ sᵢ log(1 + exp(−yᵢ(w·xᵢ + b))) over the prompts that the fit sees, yᵢ = ±1 and
    sᵢ = n / (2 n_class), the intercept unpenalised.

    Raises:
        ValueError: when a fit sees but one label.
    """
    labels, seen = np.asfortranarray(labels), np.asfortranarray(seen)
    targets = (labels == HARMFUL).astype(np.float64)
    sizes, n_harmful = seen.sum(axis=0), (targets * seen).sum(axis=0)
    if not n_harmful.all() or (n_harmful == sizes).any():
        raise ValueError("A probe needs prompts of both labels.")
    importance = seen * np.where(targets == 1, sizes / (2 * n_harmful), sizes / (2 * (sizes - n_harmful)))
    alike = _alike(products, seen)
    nothing = np.zeros_like(targets)
    fits = Fits(nothing, np.zeros(seen.shape[1]), nothing)
    for C in Cs:
        fits = _minimise(products, alike, targets, importance * C, fits)
        yield fits


@dataclass(frozen=True)
class _View:
    """The prompts that a fit sees: `rows`, `Products.among` them in single precision, and their squared lengths."""

    rows: Int[np.ndarray, "row"]
    single: Float[np.ndarray, "row other"]
    lengths: Float[np.ndarray, "row"]


_Alike: TypeAlias = 'list[tuple[_View, Int[np.ndarray, "_"]]]'
"""Views, and the fits that see them."""


def _alike(products: Products, seen: Bool[np.ndarray, "prompt fit"]) -> _Alike:
    fits_of: defaultdict[bytes, list[int]] = defaultdict(list)
    for fit, column in enumerate(seen.T):
        fits_of[column.tobytes()].append(fit)
    lengths, source = products.lengths(), products.source.astype(np.float32)
    alike = []
    for fits in fits_of.values():
        rows = np.flatnonzero(seen[:, fits[0]])
        alike.append((_View(rows, products.among(rows, source), lengths[rows]), np.array(fits)))
    return alike


@dataclass(frozen=True)
class _Group:
    """Fits (columns) that see the same prompts and take their steps with one curvature S² of the loss.

    Attributes:
        factor: the Cholesky factor of B = 1 + S K S, which is well conditioned whatever the data (Rasmussen & Williams,
            Gaussian Processes for Machine Learning, section 3.4); or of 1 + XᵀS²X, where that is smaller (Woodbury);
            None where B is near 1.
        weighted: S X in the second case.
    """

    view: _View
    fits: Int[np.ndarray, "fit"]
    factor: Float[np.ndarray, "a a"] | None
    weighted: Float[np.ndarray, "row d"] | None


def _group(products: Products, view: _View, fits: Int[np.ndarray, "fit"], squared: Float[np.ndarray, "row"]) -> _Group:
    """The group with S² = `squared`."""
    from scipy.linalg import LinAlgError
    from scipy.linalg.lapack import dpotrf, spotrf

    trace = squared @ view.lengths
    if trace < NEGLIGIBLE:
        return _Group(view, fits, None, None)
    single = trace < SINGLE_PRECISION["features" if products.kernel is None else "kernel"]
    source = view.single if single else products.among(view.rows, products.source)
    rooted = np.sqrt(squared)[:, None].astype(source.dtype)
    matrix, weighted = rooted * source, None
    if products.kernel is None:
        weighted = matrix
        matrix = weighted.T @ weighted
    else:
        matrix *= rooted.T
    matrix.flat[:: len(matrix) + 1] += 1
    # Symmetric, so its transpose is the same matrix in the order in which LAPACK works without a copy.
    factor, failed = (spotrf if single else dpotrf)(matrix.T, lower=1, clean=0, overwrite_a=1)
    if failed:
        raise LinAlgError("The curvature of a probe's loss is not positive definite.")
    return _Group(view, fits, factor, weighted)


def _solve(factor: Float[np.ndarray, "a a"], values: Float[np.ndarray, "a *column"]) -> Float[np.ndarray, "a *column"]:
    """Solve with a Cholesky factor, in its precision; a vector takes half the time of a single column."""
    from scipy.linalg.blas import dtrsv, strsv
    from scipy.linalg.lapack import dpotrs, spotrs

    single = factor.dtype == np.float32
    values = values.astype(factor.dtype)
    if values.ndim > 1:
        return (spotrs if single else dpotrs)(factor, values, lower=1)[0]
    trsv = strsv if single else dtrsv
    return trsv(factor, trsv(factor, values, lower=1), lower=1, trans=1, overwrite_x=1)


@dataclass(frozen=True)
class _Move:
    """A change of every fit."""

    duals: Columns
    intercept: Float[np.ndarray, "fit"]


@dataclass(frozen=True)
class _Slope:
    """The gradient of all fits, from which any curvature gives a step.

    Attributes:
        pull: r + a, with r the gradient of the loss by the logits.
        pulled: K(r + a), the gradient by the duals.
        total: Σ r, the gradient by the intercept.
    """

    pull: Columns
    pulled: Columns
    total: Float[np.ndarray, "fit"]

    def along(self, move: _Move) -> Float[np.ndarray, "fit"]:
        """The gradient times a move."""
        return inner(move.duals, self.pulled) + move.intercept * self.total

    def decrement(self, step: _Move) -> Float[np.ndarray, "fit"]:
        """The squared Newton decrement of a step."""
        return np.maximum(-self.along(step), 0)  # below zero is rounding


class _Newton:
    """Newton steps of all fits.

    Attributes:
        groups: of the fits that are not solved yet.
        rooted: S, zero for prompts that a fit does not see.
        by_shift: S B⁻¹ S 1.
    """

    def __init__(self, products: Products, alike: _Alike, curvature: Columns) -> None:
        self._products = products
        self.groups: list[_Group] = []
        self.rooted = np.zeros_like(curvature)
        self.by_shift = np.zeros_like(curvature)
        self.add(alike, curvature)

    def add(self, alike: _Alike, curvature: Columns) -> list[_Group]:
        """The new groups; the curvature of each is the mean of its fits' own."""
        added = []
        for view, fits in alike:
            here = np.ix_(view.rows, fits)
            squared = curvature[here].mean(axis=1)
            self.rooted[here] = np.sqrt(squared)[:, None]
            added.append(_group(self._products, view, fits, squared))
        new = np.concatenate([fits for _, fits in alike])
        self.by_shift[:, new] = self._smoothed(np.ones_like(self.rooted), added)[:, new]
        self.groups += added
        return added

    def _smoothed(self, values: Columns, groups: Sequence[_Group]) -> Columns:
        """S B⁻¹ S values; only of the fits of these groups."""
        smoothed = self.rooted * values
        for group in groups:
            if group.factor is None:
                continue
            rows, fits = group.view.rows, group.fits
            here = np.ix_(rows, fits) if len(fits) > 1 else (rows, fits[0])
            scaled = smoothed[here]
            if group.weighted is None:
                smoothed[here] = _solve(group.factor, scaled)
            else:
                smoothed[here] = scaled - group.weighted @ _solve(group.factor, group.weighted.T @ scaled)
        smoothed *= self.rooted
        return smoothed

    def steps(self, slope: _Slope, groups: Sequence[_Group]) -> _Move:
        """The next steps of the fits of these groups; none for others.

        A step changes the intercept by δ and the duals by −(r + a) − S B⁻¹ S (δ − K(r + a)), where the last term is the
        curvature times the change of the logits; δ is such that its sum is −Σ r, the intercept's equation.
        """
        duals = self._smoothed(slope.pulled, groups)
        shift = (duals.sum(axis=0) - slope.total) / self.by_shift.sum(axis=0)
        duals -= shift * self.by_shift
        duals -= slope.pull
        others = np.ones(len(shift), dtype=bool)
        others[np.concatenate([group.fits for group in groups])] = False
        duals[:, others], shift[others] = 0, 0
        return _Move(duals, shift)

    def renew(self, fits: Bool[np.ndarray, "fit"], curvature: Columns) -> list[_Group]:
        """New groups of some fits, each with the curvature of its own iterate."""
        alike = [(group.view, np.array([fit])) for group in self.groups for fit in group.fits[fits[group.fits]]]
        self.drop(fits)
        return self.add(alike, curvature)

    def drop(self, fits: Bool[np.ndarray, "fit"]) -> None:
        """Remove fits, and groups that are empty then."""
        kept = [replace(group, fits=group.fits[~fits[group.fits]]) for group in self.groups]
        self.groups = [group for group in kept if len(group.fits)]


def _minimise(products: Products, alike: _Alike, targets: Columns, importance: Columns, start: Fits) -> Fits:
    """Newton's method for all fits at once.

    Steps with the curvature of another iterate are made conjugate to each other (Nocedal & Wright, Numerical
    Optimization, section 5.2: Polak & Ribière's method, preconditioned); their length follows the curvature at hand,
    shortened where the objective would not fall.
    """
    signs = 1 - 2 * targets

    def objective(
        duals: Columns, intercept: Float[np.ndarray, "fit"], fitted: Columns
    ) -> tuple[Float[np.ndarray, "fit"], Columns]:
        """The objective, and the probability of the wrong label, which shares its exponential."""
        wrong = signs * (fitted + intercept)
        small = np.exp(-np.abs(wrong))
        losses = np.log(1 + small) + np.maximum(wrong, 0)
        return inner(duals, fitted) / 2 + inner(importance, losses), np.where(wrong > 0, 1, small) / (1 + small)

    duals, intercept, fitted = start.duals, start.intercept, start.fitted
    value, error = objective(duals, intercept, fitted)
    newton: _Newton | None = None
    nowhere, level = np.zeros_like(duals), np.zeros_like(intercept)
    before, move, along = _Slope(nowhere, nowhere, level), _Move(nowhere, level), nowhere
    previous, size = np.full_like(level, 1e300), level
    for _ in range(MAX_STEPS):
        weighted = importance * error
        residual = signs * weighted
        # The floor keeps the intercept's equation solvable where every prompt is classified to the last bit.
        curvature = np.maximum(weighted * (1 - error), 1e-12)
        slope = _Slope(residual + duals, products.times(residual) + fitted, residual.sum(axis=0))
        newton = newton or _Newton(products, alike, curvature)
        step = newton.steps(slope, newton.groups)
        decrement = slope.decrement(step)
        slow = (decrement > FAST * previous) | (size > LONGEST) & (decrement > 0)
        if slow.any():
            fresh = newton.steps(slope, newton.renew(slow, curvature))
            step = _Move(np.where(slow, fresh.duals, step.duals), np.where(slow, fresh.intercept, step.intercept))
            decrement = slope.decrement(step)
        gained = np.maximum(decrement + before.along(step), 0)
        kept = np.divide(gained, previous, out=np.zeros_like(level), where=(previous > 0) & ~slow)
        move = _Move(step.duals + kept * move.duals, step.intercept + kept * move.intercept)
        along = products.times(step.duals) + kept * along
        before, previous = slope, decrement
        descent, by_logits = -slope.along(move), along + move.intercept
        bend = inner(move.duals, along) + inner(curvature * by_logits, by_logits)
        size = np.divide(descent, bend, out=np.zeros_like(level), where=bend > 0)
        last = size * descent <= SOLVED * np.maximum(inner(duals, fitted), 1e-8)
        while True:
            candidate = duals + size * move.duals, intercept + size * move.intercept, fitted + size * along
            reached, error = objective(*candidate)
            short = ~last & (reached > value - 1e-4 * size * descent + ROUNDING * value)
            if not short.any():
                break
            size[short] /= 2
            last |= size < SMALLEST_STEP
        (duals, intercept, fitted), value = candidate, reached
        if last.any():
            newton.drop(last)
        if not newton.groups:
            break
    return Fits(duals, intercept, fitted)
