"""Linear probes: one L2-regularised logistic regression per layer, with class weights balanced.

The features are z = (e − centre)/scale, one scalar for all dimensions, so a margin is a Euclidean distance in the
model's own space and a rotation of that space changes nothing. The solution lies in the span of the prompts, so fits
are worked out exactly in n × n, however wide the model, by Newton's method with warm starts along the path of costs.
It is our own because an analysis needs thousands of fits of one kind (nine costs, five folds, ten shuffles, every
layer): it solves scikit-learn's problem to more digits in less time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from es2.errors import InputError
from es2.geometry import Frame, balanced_mean
from es2.prompts import HARMFUL, HARMLESS
from es2.resampling import Replicates

MAX_NEWTON_STEPS = 100
SMALLEST_STEP = 1e-10
SOLVED = 1e-6
"""Squared Newton decrement, relative to ‖w‖², at which the step at hand is the last; what is left after it is smaller
still by as much again, convergence being quadratic: a millionth of ‖w‖."""


@dataclass(frozen=True)
class Probes:
    """The probes of all layers of one model, with the frames they live in.

    Attributes:
        weights: w of each layer's probe, for z, `[layer, d_model]`.
        bias: b of each, `[layer]`.
        centre: the mean of the two class means of `probe`, `[layer, d_model]`.
        scale: the length that one scale-free unit stands for, `[layer]`.
        C: each probe's inverse regularisation strength, as in scikit-learn, `[layer]`.
        direction: unit mean-difference direction of `probe`, from harmless to harmful, `[layer, d_model]`.
    """

    weights: Float[np.ndarray, "layer d_model"]
    bias: Float[np.ndarray, "layer"]
    centre: Float[np.ndarray, "layer d_model"]
    scale: Float[np.ndarray, "layer"]
    C: Float[np.ndarray, "layer"]
    direction: Float[np.ndarray, "layer d_model"]

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return len(self.bias)

    def frame(self, layer: int) -> Frame:
        """The centre, scale and mean-difference direction of layer `layer`."""
        return Frame(self.centre[layer], float(self.scale[layer]), self.direction[layer])

    def normal(self, layer: int) -> Float[np.ndarray, "d_model"]:
        """The unit normal w/‖w‖ of layer `layer`'s hyperplane, towards harmful; zero if the probe reads nothing."""
        return unit_normal(self.weights[layer])

    def margin(self, embeddings: Float[np.ndarray, "prompt d_model"], layer: int) -> Float[np.ndarray, "prompt"]:
        """Signed distance (w·z + b)/‖w‖ to layer `layer`'s hyperplane in scale-free units, + on the harmful side.

        Zero where the probe reads nothing (‖w‖ = 0): there is no hyperplane then.
        """
        return signed_distance(self.frame(layer).normalise(embeddings), self.weights[layer], float(self.bias[layer]))

    def mean_difference_margin(
        self, embeddings: Float[np.ndarray, "prompt d_model"], layer: int
    ) -> Float[np.ndarray, "prompt"]:
        """Signed distance from the midpoint along the mean-difference direction, scale-free, + towards harmful."""
        return self.frame(layer).normalise(embeddings) @ self.direction[layer]

    def probability(self, embeddings: Float[np.ndarray, "prompt d_model"], layer: int) -> Float[np.ndarray, "prompt"]:
        """The probability of harmful that layer `layer`'s probe gives, sigmoid(w·z + b)."""
        return _sigmoid(self.frame(layer).normalise(embeddings) @ self.weights[layer] + self.bias[layer])


def unit_normal(weights: Float[np.ndarray, "d_model"]) -> Float[np.ndarray, "d_model"]:
    """w/‖w‖, or zero if w is."""
    length = np.linalg.norm(weights)
    return weights / length if length > 0 else np.zeros_like(weights)


def signed_distance(
    z: Float[np.ndarray, "prompt d_model"], weights: Float[np.ndarray, "d_model"], bias: float
) -> Float[np.ndarray, "prompt"]:
    """(w·z + b)/‖w‖, or zero if w is."""
    length = float(np.linalg.norm(weights))
    return (z @ weights + bias) / length if length > 0 else np.zeros(len(z))


def _sigmoid(logits: Float[np.ndarray, "prompt"]) -> Float[np.ndarray, "prompt"]:
    return np.exp(-np.logaddexp(0, -logits))


def inner_products(features: Float[np.ndarray, "prompt d"]) -> Float[np.ndarray, "prompt prompt"] | None:
    """K = XXᵀ, in which a fit is worked out; `None` where prompts outnumber dimensions and d × d is smaller."""
    return features @ features.T if len(features) <= features.shape[1] else None


def fit_path(
    features: Float[np.ndarray, "prompt d"],
    labels: Int[np.ndarray, "prompt"],
    costs: Sequence[float],
    kernel: Float[np.ndarray, "prompt prompt"] | None = None,
) -> tuple[Float[np.ndarray, "cost d"], Float[np.ndarray, "cost"]]:
    """Balanced L2-regularised logistic regression at each of ascending `costs` (scikit-learn's C).

    Minimises ½‖w‖² + C Σᵢ sᵢ log(1 + exp(−yᵢ(w·xᵢ + b))), yᵢ = ±1 and sᵢ = n / (2 n_class), the intercept unpenalised:
    what `sklearn.linear_model.LogisticRegression(C=C, class_weight="balanced")` minimises. `kernel` may be given where
    `inner_products` of the same features is at hand.

    Returns:
        Weights `[cost, d]` and intercepts `[cost]`. Features without any variance give zero weights.

    Raises:
        ValueError: when a label is missing.
    """
    fits = list(_fits(features, labels, costs, inner_products(features) if kernel is None else kernel))
    return np.stack([weights for weights, _ in fits]), np.array([bias for _, bias in fits])


def _fits(
    features: Float[np.ndarray, "prompt d"],
    labels: Int[np.ndarray, "prompt"],
    costs: Sequence[float],
    kernel: Float[np.ndarray, "prompt prompt"] | None,
) -> Iterator[tuple[Float[np.ndarray, "d"], float]]:
    """`fit_path`, one cost at a time, each fit started from the one before."""
    n_harmful = int((labels == HARMFUL).sum())
    n_harmless = len(labels) - n_harmful
    if not n_harmful or not n_harmless:
        raise ValueError("A probe needs prompts of both labels.")
    targets = (labels == HARMFUL).astype(np.float64)
    importance = np.where(targets == 1, len(labels) / (2 * n_harmful), len(labels) / (2 * n_harmless))
    duals, intercept = np.zeros(len(labels)), 0.0
    for cost in costs:
        duals, intercept = _newton(features, kernel, targets, importance * cost, duals, intercept)
        yield duals @ features, intercept


def _newton(
    features: Float[np.ndarray, "prompt d"],
    kernel: Float[np.ndarray, "prompt prompt"] | None,
    targets: Float[np.ndarray, "prompt"],
    importance: Float[np.ndarray, "prompt"],
    duals: Float[np.ndarray, "prompt"],
    intercept: float,
) -> tuple[Float[np.ndarray, "prompt"], float]:
    """Newton's method with backtracking on the dual coefficients a, w = Xᵀa, and the intercept b.

    With K = XXᵀ, r the gradient of the loss by the logits and S the root of its curvature, a step changes the logits by
    q = h − K S B⁻¹ S h, h = δb − K(r + a), and the duals by −(r + a) − S²q, where B = 1 + S K S and δb is such that the
    intercept's equation Σ S²q = −Σ r holds. B is well conditioned whatever the data (Rasmussen & Williams, Gaussian
    Processes for Machine Learning, section 3.4).
    """
    signs = 2 * targets - 1

    def through_kernel(values: Float[np.ndarray, "prompt *column"]) -> Float[np.ndarray, "prompt *column"]:
        return features @ (features.T @ values) if kernel is None else kernel @ values

    def objective(fitted: Float[np.ndarray, "prompt"], candidate: Float[np.ndarray, "prompt"], bias: float) -> float:
        return float(candidate @ fitted / 2 + importance @ np.logaddexp(0, -signs * (fitted + bias)))

    fitted = through_kernel(duals)
    value = objective(fitted, duals, intercept)
    for _ in range(MAX_NEWTON_STEPS):
        logits = fitted + intercept
        residual = importance * (_sigmoid(logits) - targets)
        # The floor keeps the intercept's equation solvable where every prompt is classified to the last bit.
        curvature = np.maximum(importance * _sigmoid(logits) * _sigmoid(-logits), 1e-12)
        rooted = np.sqrt(curvature)[:, None]
        pull = residual + duals
        pulled = through_kernel(pull)
        shifts = np.stack([-pulled, np.ones_like(pulled)], axis=1)
        changes = shifts - through_kernel(rooted * _solve(features, kernel, rooted, rooted * shifts))
        without_shift, of_shift = changes[:, 0], changes[:, 1]
        shift = -float(residual.sum() + curvature @ without_shift) / float(curvature @ of_shift)
        step = -pull - curvature * (without_shift + shift * of_shift)
        decrement = -float(step @ pulled) - shift * float(residual.sum())
        if decrement <= SOLVED * max(float(duals @ fitted), 1e-8):
            return duals + step, intercept + shift
        fitted_step = through_kernel(step)
        size = 1.0
        while True:
            candidate, bias = duals + size * step, intercept + size * shift
            candidate_value = objective(fitted + size * fitted_step, candidate, bias)
            if candidate_value <= value - 1e-4 * size * decrement:
                break
            size /= 2
            if size < SMALLEST_STEP:
                return duals, intercept  # the objective falls no further than its own rounding
        duals, intercept, fitted, value = candidate, bias, fitted + size * fitted_step, candidate_value
    return duals, intercept


def _solve(
    features: Float[np.ndarray, "prompt d"],
    kernel: Float[np.ndarray, "prompt prompt"] | None,
    rooted: Float[np.ndarray, "prompt 1"],
    values: Float[np.ndarray, "prompt column"],
) -> Float[np.ndarray, "prompt column"]:
    """B⁻¹ values for B = 1 + S K S: in n × n, or where there are more prompts than dimensions in d × d (Woodbury)."""
    from scipy.linalg import LinAlgError
    from scipy.linalg.lapack import dpotrf, dpotrs

    if kernel is None:
        weighted = rooted * features
        matrix, wanted = weighted.T @ weighted, weighted.T @ values
    else:
        matrix, wanted = rooted * kernel, values
        matrix *= rooted.T
    matrix.flat[:: len(matrix) + 1] += 1
    # Symmetric, so its transpose is the same matrix in the order in which LAPACK works without a copy.
    factor, failed = dpotrf(matrix.T, lower=1, clean=0, overwrite_a=1)
    if failed:
        raise LinAlgError("The curvature of a probe's loss is not positive definite.")
    solved = dpotrs(factor, wanted, lower=1)[0]
    return solved if kernel is not None else values - weighted @ solved


@dataclass(frozen=True)
class CrossValidation:
    """What held-out prompts say of every cost.

    Attributes:
        log_loss: class-balanced mean log-loss of the held-out prompts, in nats, for the costs tried, `[cost]`.
        logits: each held-out prompt's w·z + b under the fold's own probe, `[cost, prompt]`; NaN where no fold could
            hold the prompt out.
        best: index of the cost with the least log-loss, the larger cost where several agree.
    """

    log_loss: Float[np.ndarray, "cost"]
    logits: Float[np.ndarray, "cost prompt"]
    best: int


def cross_validate(
    features: Float[np.ndarray, "prompt d"],
    labels: Int[np.ndarray, "prompt"],
    folds: Int[np.ndarray, "prompt"],
    costs: Sequence[float],
    *,
    stop_early: bool = False,
) -> CrossValidation:
    """Held-out logits and log-loss at ascending costs.

    A fold whose remainder lacks a label cannot be held out and is passed over; its prompts take no part in the loss.
    With `stop_early` no further cost is tried once the log-loss has risen twice in a row.

    Raises:
        InputError: when no fold can be held out, or the held-out prompts lack a label.
    """
    held_out = [folds == fold for fold in np.unique(folds)]
    held_out = [out for out in held_out if len(np.unique(labels[~out])) == 2]
    seen = np.any(held_out, axis=0) if held_out else np.zeros(len(labels), dtype=bool)
    if len(np.unique(labels[seen])) < 2:
        raise InputError(
            f"{len(labels)} prompts are too few to cross-validate a probe: held-out prompts of both labels are needed; "
            "add prompts (a few dozen of each label at least)."
        )
    kernel = inner_products(features)
    kernels = [inner_products(features[~out]) if kernel is None else kernel[np.ix_(~out, ~out)] for out in held_out]
    fits_of_folds = [
        _fits(features[~out], labels[~out], costs, own) for out, own in zip(held_out, kernels, strict=True)
    ]
    signs = np.where(labels == HARMFUL, 1.0, -1.0)
    every_logits: list[Float[np.ndarray, "prompt"]] = []
    losses: list[float] = []
    for fits in zip(*fits_of_folds, strict=True):
        logits = np.full(len(labels), np.nan)
        for out, (weights, bias) in zip(held_out, fits, strict=True):
            logits[out] = features[out] @ weights + bias
        loss = np.logaddexp(0, -signs * logits)
        every_logits.append(logits)
        losses.append(float(np.mean([loss[seen & (labels == label)].mean() for label in (HARMFUL, HARMLESS)])))
        if stop_early and len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
            break
    log_loss = np.array(losses)
    agreeing = np.flatnonzero(log_loss <= log_loss.min() * (1 + 1e-9))
    return CrossValidation(log_loss, np.stack(every_logits), int(agreeing[-1]))


def accuracy(
    scores: Float[np.ndarray, "prompt"],
    labels: Int[np.ndarray, "prompt"],
    weights: Float[np.ndarray, "resample prompt"],
) -> Replicates:
    """Balanced accuracy of calling a prompt harmful when its score is above 0, under every resample.

    Where a class vanished from a resample (possible under shuffled labels only) the value is chance, 0.5.
    """
    correct = np.where(labels == HARMFUL, scores > 0, scores <= 0).astype(np.float64)
    harmful = (labels == HARMFUL).astype(np.float64)
    missing = (weights @ harmful == 0) | (weights @ (1 - harmful) == 0)
    return np.where(missing, 0.5, balanced_mean(correct, labels, weights))


def auroc(
    scores: Float[np.ndarray, "prompt"],
    labels: Int[np.ndarray, "prompt"],
    weights: Float[np.ndarray, "resample prompt"],
) -> Replicates:
    """Area under the ROC curve under every resample: the share of harmful × harmless won by the harmful, ties half."""
    is_harmful = labels == HARMFUL
    order = np.argsort(scores[~is_harmful], kind="stable")
    harmless = scores[~is_harmful][order]
    # One row per prompt, so that the rows picked below lie in one piece each.
    of_harmful, of_harmless = weights.T[is_harmful], weights.T[~is_harmful][order]
    below = np.concatenate([np.zeros((1, len(weights))), np.cumsum(of_harmless, axis=0)])
    beaten = below[np.searchsorted(harmless, scores[is_harmful], side="left")]
    beaten += below[np.searchsorted(harmless, scores[is_harmful], side="right")]
    wins = np.einsum("pr,pr->r", of_harmful, beaten) / 2
    total = of_harmful.sum(axis=0) * below[-1]
    return np.where(total > 0, wins / np.maximum(total, 1), 0.5)


def lower_quartile(values: Float[np.ndarray, "prompt"], weights: Float[np.ndarray, "resample prompt"]) -> Replicates:
    """`np.quantile(np.repeat(values, multiplicities), 0.25)` for every row of integer multiplicities."""
    order = np.argsort(values, kind="stable")
    cumulated = np.cumsum(weights[:, order], axis=1)
    place = (cumulated[:, -1] - 1) / 4
    below = np.floor(place)
    ends = [values[order][np.argmax(cumulated > rank[:, None], axis=1)] for rank in (below, np.ceil(place))]
    return ends[0] + (place - below) * (ends[1] - ends[0])


def probe_numbers(
    margins: Float[np.ndarray, "prompt"],
    labels: Int[np.ndarray, "prompt"],
    weights: Float[np.ndarray, "resample prompt"],
) -> dict[str, Replicates]:
    """`probe_accuracy`, `probe_auroc`, `margin_mean` and `margin_harmful_q1` from signed distances, + = harmful side.

    Args:
        margins: (w·z + b)/‖w‖ of the test prompts.
        labels: of the test prompts.
        weights: multiplicities from `resample_pairs`.
    """
    harmful = labels == HARMFUL
    return {
        "probe_accuracy": accuracy(margins, labels, weights),
        "probe_auroc": auroc(margins, labels, weights),
        "margin_mean": balanced_mean(np.where(harmful, margins, -margins), labels, weights),
        "margin_harmful_q1": lower_quartile(margins[harmful], weights[:, harmful]),
    }
