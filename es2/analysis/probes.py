"""Linear probes: one L2-regularised logistic regression per layer, with class weights balanced.

The features are z = (e − centre)/scale, one scalar for all dimensions, so a margin is a Euclidean distance in the
model's own space and a rotation of that space changes nothing. The problem is scikit-learn's, solved in `logistic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from es2.analysis.geometry import Frame, balanced_mean, class_sums, parts_of
from es2.analysis.logistic import Fits, Products, fit_columns
from es2.analysis.resampling import Replicates, drawn_together
from es2.core.errors import InputError
from es2.prompts.prompt_set import HARMFUL, HARMLESS

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Probes:
    """The probes of all layers of one model, with their frames.

    Attributes:
        weights, bias: w and b of each layer's probe, for z.
        centre: the mean of the two class means of `probe`.
        scale: the length of one scale-free unit.
        C: inverse regularisation strength, as in scikit-learn.
        direction: unit mean-difference direction of `probe`, from harmless to harmful.
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
        """The frame of layer `layer`."""
        return Frame(self.centre[layer], float(self.scale[layer]), self.direction[layer])

    def normal(self, layer: int) -> Float[np.ndarray, "d_model"]:
        """The unit normal w/‖w‖ of layer `layer`'s hyperplane, towards harmful; zero if the probe reads nothing."""
        weights = self.weights[layer]
        length = np.linalg.norm(weights)
        return weights / length if length > 0 else np.zeros_like(weights)

    def margin(self, embeddings: Float[np.ndarray, "prompt d_model"], layer: int) -> Float[np.ndarray, "prompt"]:
        """Signed distance (w·z + b)/‖w‖ to layer `layer`'s hyperplane in scale-free units, + on the harmful side.

        Zero where the probe reads nothing (‖w‖ = 0): there is no hyperplane then.
        """
        frame, weights, bias = self.frame(layer), self.weights[layer], float(self.bias[layer])
        distances = [signed_distance(frame.normalise(part), weights, bias) for part in parts_of(embeddings)]
        return np.concatenate(distances)


def signed_distance(
    z: Float[np.ndarray, "prompt d_model"], weights: Float[np.ndarray, "d_model"], bias: float
) -> Float[np.ndarray, "prompt"]:
    """(w·z + b)/‖w‖, or zero if w is."""
    return signed_distances(z, weights[None], np.array([bias]))[:, 0]


def signed_distances(
    z: Float[np.ndarray, "prompt d_model"], weights: Float[np.ndarray, "C d_model"], bias: Float[np.ndarray, "C"]
) -> Float[np.ndarray, "prompt C"]:
    """`signed_distance` under each of several probes."""
    lengths = np.linalg.norm(weights, axis=1)
    reads = lengths > 0
    return np.where(reads, (z @ weights.T + bias) / np.where(reads, lengths, 1), 0.0)


def fit_path(
    features: Float[np.ndarray, "prompt d"],
    labels: Int[np.ndarray, "prompt"],
    Cs: Sequence[float],
    products: Products | None = None,
) -> tuple[Float[np.ndarray, "C d"], Float[np.ndarray, "C"]]:
    """Balanced L2-regularised logistic regression at each of ascending `Cs` (scikit-learn's C).

    The objective of `fit_columns`, which `sklearn.linear_model.LogisticRegression(C=C, class_weight="balanced")`
    minimises too. `products` are of `features`.

    Returns:
        Weights `[C, d]` and intercepts `[C]`. Features without any variance give zero weights.

    Raises:
        ValueError: when a label is missing.
    """
    everyone = np.ones((len(labels), 1), dtype=bool)
    return _last_column(list(fit_columns(products or Products.of(features), labels[:, None], everyone, Cs)), features)


def _last_column(
    fits: Sequence[Fits], features: Float[np.ndarray, "prompt d"]
) -> tuple[Float[np.ndarray, "C d"], Float[np.ndarray, "C"]]:
    """Weights and intercept of the last fit at each C."""
    return np.stack([fit.duals[:, -1] for fit in fits]) @ features, np.array([fit.intercept[-1] for fit in fits])


def fit_each(
    features: Float[np.ndarray, "prompt d"],
    labelings: Int[np.ndarray, "labeling prompt"],
    C: float,
    products: Products | None = None,
) -> tuple[Float[np.ndarray, "labeling d"], Float[np.ndarray, "labeling"]]:
    """Weights and intercepts at one C for each of several labelings of the same prompts, as `fit_path` gives them."""
    everyone = np.ones(labelings.T.shape, dtype=bool)
    (fits,) = fit_columns(products or Products.of(features), labelings.T, everyone, (C,))
    return fits.duals.T @ features, fits.intercept


@dataclass(frozen=True)
class CrossValidation:
    """Held-out logits and losses at every C.

    Attributes:
        log_loss: class-balanced mean log-loss of the held-out prompts, in nats, for the Cs tried.
        logits: w·z + b of each prompt under the probe of its fold; NaN where no fold could hold the prompt out.
        best: index of the C with the least log-loss, the larger C where several agree.
        path: `fit_path` of the same prompts, with `with_path`.
    """

    log_loss: Float[np.ndarray, "C"]
    logits: Float[np.ndarray, "C prompt"]
    best: int
    path: tuple[Float[np.ndarray, "C d"], Float[np.ndarray, "C"]] | None


def cross_validate(
    features: Float[np.ndarray, "prompt d"],
    labels: Int[np.ndarray, "prompt"],
    folds: Int[np.ndarray, "prompt"],
    Cs: Sequence[float],
    products: Products | None = None,
    *,
    stop_early: bool = False,
    with_path: bool = False,
) -> CrossValidation:
    """Held-out logits and log-loss at ascending Cs.

    A fold whose remainder lacks a label cannot be held out and is passed over; its prompts take no part in the loss.
    With `stop_early` no further C is tried once the log-loss has risen twice in a row. `with_path` fits all prompts
    beside the folds, in less time than `fit_path` takes afterwards.

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
    seen_by = np.stack([*(~out for out in held_out), *[np.ones_like(seen)] * with_path], axis=1)
    labels_of = np.repeat(labels[:, None], seen_by.shape[1], axis=1)
    signs = np.where(labels == HARMFUL, 1.0, -1.0)
    every_logits: list[Float[np.ndarray, "prompt"]] = []
    losses: list[float] = []
    done: list[Fits] = []
    for fits in fit_columns(products or Products.of(features), labels_of, seen_by, Cs):
        done.append(fits)
        logits = np.full(len(labels), np.nan)
        for fold, out in enumerate(held_out):
            logits[out] = fits.fitted[out, fold] + fits.intercept[fold]
        loss = np.logaddexp(0, -signs * logits)
        every_logits.append(logits)
        losses.append(float(np.mean([loss[seen & (labels == label)].mean() for label in (HARMFUL, HARMLESS)])))
        if stop_early and len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
            break
    log_loss = np.array(losses)
    agreeing = np.flatnonzero(log_loss <= log_loss.min() * (1 + 1e-9))
    path = _last_column(done, features) if with_path else None
    return CrossValidation(log_loss, np.stack(every_logits), int(agreeing[-1]), path)


def accuracy(
    scores: Float[np.ndarray, "prompt column"],
    labels: Int[np.ndarray, "prompt labeling"],
    weights: Float[np.ndarray, "resample prompt"],
) -> Float[np.ndarray, "resample column"]:
    """Balanced accuracy of calling a prompt harmful when its score is above 0, under every resample.

    0.5 where a class vanished from a resample, which only shuffled labels can do.
    """
    # Single precision holds whole numbers exactly.
    correct = np.where(labels == HARMFUL, scores > 0, scores <= 0).astype(np.float32)
    sums, counts = class_sums(correct, labels, weights.astype(np.float32, copy=False))
    shares = np.divide(sums, np.maximum(counts, 1), dtype=np.float64)
    return np.where((counts == 0).any(axis=0), 0.5, shares.mean(axis=0))


RUN = 16  # prompts whose running sums are one matrix product
EXACT = 256
"""Prompts whose sum of products stays in single precision, exact below 2²⁴: for up to 32,000 of the others."""


def _running_sums(
    counts: Float[np.ndarray, "prompt resample"], order: Int[np.ndarray, "place"]
) -> Float[np.ndarray, "place+1 resample"]:
    """Sums of whole numbers over the first 0, 1, 2, … prompts of an order, exact in single precision.

    Products with triangles of ones take a fifth of the time of a sum from row to row.
    """
    n_prompts, n_resamples = len(order), counts.shape[1]
    n_runs = -(-n_prompts // RUN)
    padded = np.empty((n_runs * RUN, n_resamples), dtype=np.float32)
    padded[:n_prompts], padded[n_prompts:] = counts[order], 0
    sums = np.empty((1 + n_runs * RUN, n_resamples), dtype=np.float32)
    sums[0] = 0
    runs = sums[1:].reshape(n_runs, RUN, n_resamples)
    np.matmul(np.tri(RUN, dtype=np.float32), padded.reshape(runs.shape), out=runs)
    runs[1:] += np.cumsum(runs[:-1, -1], axis=0)[:, None]
    return sums[: 1 + n_prompts]


def auroc(
    scores: Float[np.ndarray, "prompt"],
    labels: Int[np.ndarray, "prompt"],
    weights: Float[np.ndarray, "resample prompt"],
) -> Replicates:
    """Area under the ROC curve under every resample: the share of harmful × harmless won by the harmful, ties half."""
    is_harmful = labels == HARMFUL
    counts = [weights.T[side].astype(np.float32, copy=False) for side in (is_harmful, ~is_harmful)]
    return _auroc(scores[is_harmful], scores[~is_harmful], counts[0], counts[1])


def _auroc(
    harmful: Float[np.ndarray, "harmful"],
    harmless: Float[np.ndarray, "harmless"],
    of_harmful: Float[np.ndarray, "harmful resample"],
    of_harmless: Float[np.ndarray, "harmless resample"],
) -> Replicates:
    """`auroc` from the scores of both classes and their multiplicities in single precision."""
    order = np.argsort(harmless, kind="stable")
    below = _running_sums(of_harmless, order)
    worse, not_better = (np.searchsorted(harmless[order], harmful, side=side) for side in ("left", "right"))
    beaten = below[worse]
    if (worse != not_better).any():
        beaten = (beaten + below[not_better]) / 2
    wins = np.zeros(of_harmful.shape[1])
    for start in range(0, len(harmful), EXACT):
        some = slice(start, start + EXACT)
        wins += np.einsum("pr,pr->r", of_harmful[some], beaten[some])
    total = of_harmful.sum(axis=0).astype(np.float64) * below[-1]
    return np.where(total > 0, wins / np.maximum(total, 1), 0.5)


def twins_of(
    labels: Int[np.ndarray, "prompt labeling"], weights: Float[np.ndarray, "resample prompt"]
) -> Int[np.ndarray, "2 pair"] | None:
    """The prompts as pairs that share every resample and differ in every labeling; None if they are no such pairs."""
    units = drawn_together(weights.T)
    if (np.bincount(units) != 2).any():
        return None
    twins: Int[np.ndarray, "2 pair"] = np.argsort(units, kind="stable").reshape(-1, 2).T
    return twins if (labels[twins[0]] != labels[twins[1]]).all() else None


def mean_auroc(
    scores: Float[np.ndarray, "prompt column"],
    labels: Int[np.ndarray, "prompt column"],
    weights: Float[np.ndarray, "resample prompt"],
    twins: Int[np.ndarray, "2 pair"] | None,
) -> Replicates:
    """The mean over columns of `auroc`; `twins` are from `twins_of` the same labels and weights.

    A resample of twins holds as many harmful as harmless prompts under every labeling, so the wins of all columns are
    added up before they are weighted.
    """
    if twins is None:
        return np.mean([auroc(*columns, weights) for columns in zip(scores.T, labels.T, strict=True)], axis=0)
    first, second = twins
    swapped = labels[first] != HARMFUL
    harmful = np.where(swapped, scores[second], scores[first]).T
    harmless = np.where(swapped, scores[first], scores[second]).T
    wins = np.zeros((len(first), len(first)), dtype=np.float32)
    for won, lost in zip(harmful, harmless, strict=True):
        wins += (won[:, None] > lost).astype(np.float32)
        wins += (won[:, None] >= lost).astype(np.float32)
    counts = weights.T[first].astype(np.float32, copy=False)
    sums = np.einsum("pr,pr->r", counts, wins @ counts, dtype=np.float64)
    return sums / (2 * len(harmful) * counts.sum(axis=0, dtype=np.float64) ** 2)


def lower_quartile(values: Float[np.ndarray, "prompt"], weights: Float[np.ndarray, "resample prompt"]) -> Replicates:
    """`np.quantile(np.repeat(values, multiplicities), 0.25)` for every row of integer multiplicities."""
    order = np.argsort(values, kind="stable")
    counts = weights.T
    place = (counts.sum(axis=0) - 1) / 4  # exact in single precision, as all quarters are up to 2²²
    below, above = np.floor(place), np.ceil(place)
    # Nearly every resample has its quartile among the lower half of the prompts.
    cumulated = _running_sums(counts, order[: len(order) // 2])[1:]
    if not len(cumulated) or (cumulated[-1] <= above).any():
        cumulated = _running_sums(counts, order)[1:]
    ends = [values[order][np.count_nonzero(cumulated <= rank, axis=0)] for rank in (below, above)]
    return ends[0] + (place - below) * (ends[1] - ends[0])


def probe_numbers(
    margins: Float[np.ndarray, "prompt C"],
    labels: Int[np.ndarray, "prompt"],
    weights: Float[np.ndarray, "resample prompt"],
) -> list[dict[str, Replicates]]:
    """`probe_accuracy`, `probe_auroc`, `margin_mean` and `margin_harmful_q1` at each C.

    Args:
        margins: (w·z + b)/‖w‖ of the test prompts under the probe of each C, + = harmful side.
        weights: multiplicities from `resample_pairs`.
    """
    harmful = labels == HARMFUL
    # Exact, as these are whole numbers, and half as much to read.
    of_harmful, of_harmless = (weights.T[side].astype(np.float32) for side in (harmful, ~harmful))
    accuracies = accuracy(margins, labels[:, None], weights)
    means = balanced_mean(np.where(harmful[:, None], margins, -margins), labels[:, None], weights)
    return [
        {
            "probe_accuracy": accuracies[:, index],
            "probe_auroc": _auroc(margins[harmful, index], margins[~harmful, index], of_harmful, of_harmless),
            "margin_mean": means[:, index],
            "margin_harmful_q1": lower_quartile(margins[harmful, index], of_harmful.T),
        }
        for index in range(margins.shape[1])
    ]
