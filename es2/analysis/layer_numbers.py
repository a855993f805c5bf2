"""One layer's numbers: probe, held-out numbers with intervals, the shuffled-label control, base against tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from es2.analysis.geometry import Frame, cloud_numbers, fit_frame
from es2.analysis.logistic import Products
from es2.analysis.probes import (
    accuracy,
    auroc,
    cross_validate,
    fit_each,
    fit_path,
    mean_auroc,
    probe_numbers,
    signed_distances,
)
from es2.analysis.resampling import Replicates, safe_ratio
from es2.analysis.results import LENGTHS, NUMBERS, Change, CostPoint, LayerNumbers
from es2.analysis.setup import AnalysisSetup

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class FittedProbe:
    """One layer's probe in its frame."""

    weights: Float[np.ndarray, "d_model"]
    bias: float
    C: float
    frame: Frame


@dataclass(frozen=True)
class _Measured:
    """One layer of one model, before intervals."""

    probe: FittedProbe
    C_index: int
    in_domain_C: float | None
    log_losses: Float[np.ndarray, "C"] | None
    cv_accuracy: float | None
    numbers: dict[str, Replicates]
    curve: list[dict[str, Replicates]]


def measure(
    probe_embeddings: Float[np.ndarray, "probe d_model"],
    test_embeddings: Float[np.ndarray, "test d_model"],
    setup: AnalysisSetup,
    base: _Measured | None,
) -> _Measured:
    """Everything about one layer of one model; `base` is given for the tuned model, which takes its Cs from it."""
    config, labels, weights = setup.config, setup.resampled.labels, setup.resampled.weights
    frame = fit_frame(probe_embeddings, setup.probe_labels)
    features = frame.normalise(probe_embeddings)
    products = Products.of(features)
    log_losses = cv_accuracy = fitted = None
    if base is None:
        held_out = cross_validate(features, setup.probe_labels, setup.probe_folds, config.Cs, products, with_path=True)
        fitted = held_out.path
        C_index, log_losses = held_out.best, held_out.log_loss
        cv_accuracy = float(_held_out_numbers(held_out.logits[C_index], setup.probe_labels, None)[0][0])
    else:
        C_index = base.C_index

    z = frame.normalise(test_embeddings)
    path, intercepts = fitted or fit_path(features, setup.probe_labels, config.Cs, products)
    curve = probe_numbers(signed_distances(z, path, intercepts), labels, weights)
    numbers = curve[C_index] | _control(features, products, z, setup, config.Cs[C_index])
    del z  # as large as the embeddings
    numbers |= cloud_numbers(test_embeddings, frame, setup.resampled)

    in_domain_C = None
    if setup.in_domain_folds is not None:
        Cs = config.Cs if base is None or base.in_domain_C is None else (base.in_domain_C,)
        numbers["in_domain_accuracy"], numbers["in_domain_auroc"], in_domain_C = _in_domain_numbers(
            test_embeddings, setup, setup.in_domain_folds, Cs
        )
    probe = FittedProbe(path[C_index], float(intercepts[C_index]), config.Cs[C_index], frame)
    return _Measured(probe, C_index, in_domain_C, log_losses, cv_accuracy, numbers, curve)


def _held_out_numbers(
    logits: Float[np.ndarray, "prompt"],
    labels: Int[np.ndarray, "prompt"],
    weights: Float[np.ndarray, "resample prompt"] | None,
) -> tuple[Replicates, Replicates]:
    """Balanced accuracy and AUROC of cross-validated logits, over the prompts that a fold could hold out."""
    seen = ~np.isnan(logits)
    kept = np.ones((1, int(seen.sum()))) if weights is None else weights[:, seen]
    (accuracies,) = accuracy(logits[seen, None], labels[seen, None], kept).T
    return accuracies, auroc(logits[seen], labels[seen], kept)


def _control(
    features: Float[np.ndarray, "probe d_model"],
    products: Products,
    test_features: Float[np.ndarray, "test d_model"],
    setup: AnalysisSetup,
    C: float,
) -> dict[str, Replicates]:
    """Accuracy and AUROC of probes of the same C when the labels of `probe` and of the test prompts are shuffled."""
    weights, intercepts = fit_each(features, setup.probe_shuffles, C, products)
    scores, tested = test_features @ weights.T + intercepts, setup.test_shuffles.T
    return {
        "probe_accuracy_control": accuracy(scores, tested, setup.resampled.weights).mean(axis=1),
        "probe_auroc_control": mean_auroc(scores, tested, setup.resampled.weights, setup.test_twins),
    }


def _in_domain_numbers(
    embeddings: Float[np.ndarray, "test d_model"],
    setup: AnalysisSetup,
    folds: Int[np.ndarray, "test"],
    Cs: tuple[float, ...],
) -> tuple[Replicates, Replicates, float]:
    """Accuracy and AUROC of probes cross-validated inside the test set, in its own frame, and the C they used."""
    features = fit_frame(embeddings, setup.resampled.labels).normalise(embeddings)
    held_out = cross_validate(features, setup.resampled.labels, folds, Cs, stop_early=True)
    reached = _held_out_numbers(held_out.logits[held_out.best], setup.resampled.labels, setup.resampled.weights)
    return *reached, Cs[held_out.best]


def layer_numbers(
    layer: int, measured: _Measured, setup: AnalysisSetup, numbers: Mapping[str, Replicates]
) -> LayerNumbers:
    losses = measured.log_losses
    return LayerNumbers(
        layer=layer,
        C=measured.probe.C,
        scale=measured.probe.frame.scale,
        log_loss=None if losses is None else float(losses[measured.C_index]),
        cv_accuracy=measured.cv_accuracy,
        numbers=setup.intervals({name: numbers[name] for name in NUMBERS if name in numbers}),
        by_C=tuple(
            CostPoint(C, None if losses is None else float(losses[index]), setup.intervals(measured.curve[index]))
            for index, C in enumerate(setup.config.Cs)
        ),
    )


def paired_changes(
    base: Mapping[str, Replicates], tuned: Mapping[str, Replicates], setup: AnalysisSetup
) -> dict[str, Change]:
    shared = [name for name in NUMBERS if name in base and name in tuned]
    differences = setup.intervals({name: tuned[name] - base[name] for name in shared})
    ratios = setup.intervals(
        {name: safe_ratio(tuned[name], base[name], both_zero=1.0) for name in shared if name in LENGTHS}
    )
    return {name: Change(differences[name], ratios.get(name)) for name in shared}
