"""Logistic regressions on the same prompts, many at a time: folds and shuffled labels are columns of one array.

Every solution lies in the span of the prompts, w = Xᵀa, so a fit is worked out in inner products between prompts,
however wide the model. An analysis needs thousands of fits that are alike (nine costs, five folds, ten shuffles, every
layer), and nearly all of Newton's time is the factoring of curvature matrices; so one factor, in single precision,
serves for as many steps as it takes the fit closer fast enough, and for all fits that begin alike. Gradients are exact,
so this decides how fast the solution is reached, not which one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from es2.prompts import HARMFUL

MAX_STEPS = 200
SMALLEST_STEP = 1e-10
SOLVED = 1e-13
"""Squared Newton decrement, relative to ‖w‖², at which the step at hand is the last; some 1e-8 of ‖w‖ are left."""
FAST = 0.1
"""A factor is kept for as long as each of its steps brings the squared decrement down to this part."""
SINGLE_PRECISION = 1e4
"""Trace of S K S up to which a factor in single precision gives good steps: it bounds the condition of 1 + S K S."""
ROUNDING = 1e-13
"""Changes of an objective below this part of it are rounding."""

NEGLIGIBLE = 0.3
"""Trace of S K S up to which 1 stands for B = 1 + S K S, under strong regularisation: each step still brings the
squared decrement down to 0.3², within `FAST`."""

Columns = Float[np.ndarray, "prompt fit"]


@dataclass(frozen=True)
class Fits:
    """Several fits in the span of the same prompts.

    Attributes:
        duals: the coefficients a of each, w = Xᵀa; zero for prompts that it does not see, `[prompt, fit]`.
        intercept: b of each, `[fit]`.
        fitted: w·x of every prompt, seen or not, `[prompt, fit]`.
    """

    duals: Columns
    intercept: Float[np.ndarray, "fit"]
    fitted: Columns


@dataclass(frozen=True)
class Products:
    """Inner products between prompts: K = XXᵀ itself, or X where it has fewer columns than rows.

    Attributes:
        features: X, `[prompt, d]`.
        kernel: K; None where prompts outnumber dimensions and d × d is the smaller matrix to factor.
    """

    features: Float[np.ndarray, "prompt d"]
    kernel: Float[np.ndarray, "prompt prompt"] | None

    @classmethod
    def of(cls, features: Float[np.ndarray, "prompt d"]) -> Products:
        """The products of `features`, in the smaller form."""
        return cls(features, features @ features.T if len(features) <= features.shape[1] else None)

    def times(self, values: Columns) -> Columns:
        """K · values."""
        return self.features @ (self.features.T @ values) if self.kernel is None else self.kernel @ values

    def lengths(self) -> Float[np.ndarray, "prompt"]:
        """Squared length of every prompt, the diagonal of K."""
        return np.einsum("pd,pd->p", self.features, self.features) if self.kernel is None else np.diag(self.kernel)

    def among(self, rows: Int[np.ndarray, "row"]) -> Float[np.ndarray, "row other"]:
        """What a curvature matrix of these prompts is made from: their K, or their X."""
        return self.features[rows] if self.kernel is None else self.kernel[np.ix_(rows, rows)]


def fit_columns(
    products: Products,
    labels: Int[np.ndarray, "prompt fit"],
    seen: Bool[np.ndarray, "prompt fit"],
    costs: Sequence[float],
) -> Iterator[Fits]:
    """One fit a column at each of ascending costs, started from the cost before.

    Minimises ½‖w‖² + C Σᵢ sᵢ log(1 + exp(−yᵢ(w·xᵢ + b))) over the prompts that the fit sees, yᵢ = ±1 and
    sᵢ = n / (2 n_class), the intercept unpenalised.

    Raises:
        ValueError: when a fit sees but one label.
    """
    targets = (labels == HARMFUL).astype(np.float64)
    sizes, n_harmful = seen.sum(axis=0), (targets * seen).sum(axis=0)
    if not n_harmful.all() or (n_harmful == sizes).any():
        raise ValueError("A probe needs prompts of both labels.")
    importance = seen * np.where(targets == 1, sizes / (2 * n_harmful), sizes / (2 * (sizes - n_harmful)))
    alike = _alike(products, seen)
    fits = Fits(np.zeros(seen.shape), np.zeros(seen.shape[1]), np.zeros(seen.shape))
    for cost in costs:
        fits = _minimise(products, alike, targets, importance * cost, fits)
        yield fits


@dataclass(frozen=True)
class _View:
    """The prompts that a fit sees: `rows`, `Products.among` them in single precision, and their squared lengths."""

    rows: Int[np.ndarray, "row"]
    single: Float[np.ndarray, "row other"]
    lengths: Float[np.ndarray, "row"]


_Alike = list[tuple[_View, Int[np.ndarray, "fit"]]]
"""What is seen, and by which fits."""


def _alike(products: Products, seen: Bool[np.ndarray, "prompt fit"]) -> _Alike:
    fits_of: defaultdict[bytes, list[int]] = defaultdict(list)
    for fit, column in enumerate(seen.T):
        fits_of[column.tobytes()].append(fit)
    lengths = products.lengths()
    alike = []
    for fits in fits_of.values():
        rows = np.flatnonzero(seen[:, fits[0]])
        view = _View(rows, products.among(rows).astype(np.float32), lengths[rows])
        alike.append((view, np.array(fits)))
    return alike


@dataclass(frozen=True)
class _Group:
    """Fits that see the same prompts and take their steps with one curvature S² of the loss, that of some iterate.

    Attributes:
        view: the prompts.
        fits: the fits, as columns.
        rooted: S, `[row, 1]`.
        factor: the Cholesky factor of B = 1 + S K S, which is well conditioned whatever the data (Rasmussen & Williams,
            Gaussian Processes for Machine Learning, section 3.4); or of 1 + XᵀS²X, where that is smaller (Woodbury);
            None where B is near 1.
        weighted: S X in the second case.
        by_shift: S B⁻¹ S 1, `[row, 1]`.
    """

    view: _View
    fits: Int[np.ndarray, "fit"]
    rooted: Float[np.ndarray, "row 1"]
    factor: Float[np.ndarray, "a a"] | None
    weighted: Float[np.ndarray, "row d"] | None
    by_shift: Float[np.ndarray, "row 1"]


def _group(products: Products, view: _View, fits: Int[np.ndarray, "fit"], curvature: Columns) -> _Group:
    """A group whose curvature is the mean of its fits' own."""
    from scipy.linalg import LinAlgError
    from scipy.linalg.lapack import dpotrf, spotrf

    squared = curvature[np.ix_(view.rows, fits)].mean(axis=1)
    rooted = np.sqrt(squared)[:, None]
    trace = squared @ view.lengths
    if trace < NEGLIGIBLE:
        return _Group(view, fits, rooted, None, None, rooted**2)
    single = trace < SINGLE_PRECISION
    source = view.single if single else products.among(view.rows)
    rooted = rooted.astype(source.dtype)
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
    return _Group(view, fits, rooted, factor, weighted, _smoothed(rooted, factor, weighted, np.ones((len(rooted), 1))))


def _smoothed(
    rooted: Float[np.ndarray, "row 1"],
    factor: Float[np.ndarray, "a a"] | None,
    weighted: Float[np.ndarray, "row d"] | None,
    values: Float[np.ndarray, "row column"],
) -> Float[np.ndarray, "row column"]:
    """S B⁻¹ S values."""
    if factor is None:
        return rooted**2 * values
    scaled = rooted * values.astype(rooted.dtype)
    if weighted is None:
        return (rooted * _solve(factor, scaled)).astype(np.float64)
    return (rooted * (scaled - weighted @ _solve(factor, weighted.T @ scaled))).astype(np.float64)


def _solve(factor: Float[np.ndarray, "a a"], values: Float[np.ndarray, "a column"]) -> Float[np.ndarray, "a column"]:
    """Solve with a Cholesky factor; a single column takes half the time as a vector."""
    from scipy.linalg.blas import dtrsv, strsv
    from scipy.linalg.lapack import dpotrs, spotrs

    single = factor.dtype == np.float32
    if values.shape[1] > 1:
        return (spotrs if single else dpotrs)(factor, values, lower=1)[0]
    trsv = strsv if single else dtrsv
    return trsv(factor, trsv(factor, values[:, 0], lower=1), lower=1, trans=1, overwrite_x=1)[:, None]


@dataclass(frozen=True)
class _Slope:
    """Where all fits stand: the gradient, from which any curvature gives a step.

    Attributes:
        pull: r + a, with r the gradient of the loss by the logits, `[prompt, fit]`.
        pulled: K(r + a), the gradient by the duals.
        total: Σ r, the gradient by the intercept, `[fit]`.
        curvature: S² of the loss by the logits, `[prompt, fit]`.
    """

    pull: Columns
    pulled: Columns
    total: Float[np.ndarray, "fit"]
    curvature: Columns


@dataclass(frozen=True)
class _Steps:
    """The next step of every fit, zero for those that are solved: of the duals, of the intercept, and how much the
    square of the Newton decrement is."""

    duals: Columns
    intercept: Float[np.ndarray, "fit"]
    decrement: Float[np.ndarray, "fit"]


def _step(group: _Group, slope: _Slope, steps: _Steps) -> None:
    """Write the steps of a group's fits.

    A step changes the intercept by δ and the duals by −(r + a) − S B⁻¹ S (δ − K(r + a)), where the last term is the
    curvature times the change of the logits; δ is such that its sum is −Σ r, the intercept's equation.
    """
    here, fits = np.ix_(group.view.rows, group.fits), group.fits
    pulled, total = slope.pulled[here], slope.total[fits]
    by_pull = _smoothed(group.rooted, group.factor, group.weighted, pulled)
    shift = (by_pull.sum(axis=0) - total) / group.by_shift.sum()
    duals = by_pull - shift * group.by_shift - slope.pull[here]
    steps.duals[here] = duals
    steps.intercept[fits] = shift
    steps.decrement[fits] = -np.einsum("rf,rf->f", duals, pulled) - shift * total


def _without(groups: Sequence[_Group], leaving: Bool[np.ndarray, "fit"]) -> list[_Group]:
    """The groups without the fits that leave, and without those that are empty then."""
    kept = [replace(group, fits=group.fits[~leaving[group.fits]]) for group in groups]
    return [group for group in kept if len(group.fits)]


def _minimise(
    products: Products,
    alike: _Alike,
    targets: Columns,
    importance: Columns,
    start: Fits,
) -> Fits:
    """Newton's method with backtracking, for all fits at once; `alike` are those that see the same prompts."""
    from scipy.special import expit

    signs = 2 * targets - 1

    def objective(duals: Columns, fitted: Columns, logits: Columns) -> Float[np.ndarray, "fit"]:
        losses = np.logaddexp(0, -signs * logits)
        return np.einsum("pf,pf->f", duals, fitted) / 2 + np.einsum("pf,pf->f", importance, losses)

    duals, intercept, fitted = start.duals, start.intercept, start.fitted
    logits = fitted + intercept
    value = objective(duals, fitted, logits)
    groups: list[_Group] = []
    previous = np.full(len(intercept), 1e300)
    for _ in range(MAX_STEPS):
        probability = expit(logits)
        residual = importance * (probability - targets)
        # The floor keeps the intercept's equation solvable where every prompt is classified to the last bit.
        curvature = np.maximum(importance * probability * (1 - probability), 1e-12)
        slope = _Slope(residual + duals, products.times(residual) + fitted, residual.sum(axis=0), curvature)
        steps = _Steps(np.zeros_like(duals), np.zeros_like(intercept), np.zeros_like(intercept))
        groups = groups or [_group(products, view, fits, curvature) for view, fits in alike]
        for group in groups:
            _step(group, slope, steps)
        slow = steps.decrement > FAST * previous
        if slow.any():
            fresh = [
                _group(products, group.view, np.array([fit]), curvature)
                for group in groups
                for fit in group.fits[slow[group.fits]]
            ]
            for group in fresh:
                _step(group, slope, steps)
            groups = _without(groups, slow) + fresh
        previous = steps.decrement
        along = products.times(steps.duals)
        last = steps.decrement <= SOLVED * np.maximum(np.einsum("pf,pf->f", duals, fitted), 1e-8)
        size = np.ones_like(intercept)
        while True:
            candidate = duals + size * steps.duals, intercept + size * steps.intercept, fitted + size * along
            logits = candidate[2] + candidate[1]
            reached = objective(candidate[0], candidate[2], logits)
            short = ~last & (reached > value - 1e-4 * size * steps.decrement + ROUNDING * value)
            if not short.any():
                break
            size[short] /= 2
            last |= size < SMALLEST_STEP
        (duals, intercept, fitted), value = candidate, reached
        if last.any():
            groups = _without(groups, last)
            if not groups:
                break
    return Fits(duals, intercept, fitted)
