"""The analysis of all layers against scikit-learn, layer by layer.

scikit-learn only has to do the probes: the cross-validation over folds and costs, the path of costs, the shuffled
labels, accuracy and AUROC. Ours does the same and every other number with its interval, so the ratio flatters
scikit-learn. It takes minutes for all layers, so it is compared on a few; ours is timed on all of them, too.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score

from es2.analysis.geometry import fit_frame
from es2.analysis.layers import analyze
from es2.analysis.resampling import canonical, fold_of, shuffled_labels
from es2.analysis.results import Analysis, AnalysisConfig
from es2.capture.capture import capture
from es2.prompts.prompt_set import PromptSet
from es2.store.sources import ArrayLayers
from tests.benchmarks.contest import Figure, Report, Settings, ratio

COMPARED = 3  # layers on which scikit-learn is run


def with_sklearn(prompts: PromptSet, layers: np.ndarray, config: AnalysisConfig) -> list[dict[str, float]]:
    """The probe's cost, log-loss, accuracy and AUROC of each layer."""
    probe_rows, probe = canonical(prompts, "probe")
    test_rows, test = canonical(prompts, "test")
    folds = fold_of(probe, config.n_folds)
    shuffles = [shuffled_labels(own, config.n_shuffles, config.seed) for own in (probe, test)]

    def fit(features: np.ndarray, labels: np.ndarray, cost: float) -> LogisticRegression:
        return LogisticRegression(C=cost, class_weight="balanced", max_iter=10_000, tol=1e-6).fit(features, labels)

    found = []
    for embeddings in layers:
        frame = fit_frame(embeddings[probe_rows], probe.labels)
        features, unseen = frame.normalise(embeddings[probe_rows]), frame.normalise(embeddings[test_rows])
        losses = []
        for cost in config.Cs:
            predicted = np.empty(len(probe))
            for fold in np.unique(folds):
                out = folds == fold
                predicted[out] = fit(features[~out], probe.labels[~out], cost).predict_proba(features[out])[:, 1]
            balance = np.where(probe.labels == 1, 1 / (probe.labels == 1).sum(), 1 / (probe.labels == 0).sum())
            losses.append(log_loss(probe.labels, predicted, sample_weight=balance))
        best = int(np.argmin(losses))
        path = [fit(features, probe.labels, cost) for cost in config.Cs]
        scores = path[best].decision_function(unseen)
        for labels, others in zip(*shuffles, strict=True):
            roc_auc_score(others, fit(features, labels, config.Cs[best]).decision_function(unseen))
        found.append(
            {
                "C": config.Cs[best],
                "log_loss": losses[best],
                "probe_accuracy": balanced_accuracy_score(test.labels, scores > 0),
                "probe_auroc": roc_auc_score(test.labels, scores),
            }
        )
    return found


def largest_difference(analysis: Analysis, found: list[dict[str, float]]) -> float:
    """Between ours and scikit-learn's numbers, over layers."""
    return max(
        abs(own - other[name])
        for layer, other in zip(analysis.base_layers, found, strict=True)
        for name, own in (
            ("log_loss", layer.log_loss or 0.0),
            ("probe_accuracy", layer.numbers["probe_accuracy"].value),
            ("probe_auroc", layer.numbers["probe_auroc"].value),
        )
    )


def measure(settings: Settings) -> Report:
    """Time of both on a few layers, and of ours on all."""
    prompts = settings.prompts.measured()
    activations = capture(str(settings.folder), prompts, device="cpu", dtype="float32").activations
    config = AnalysisConfig()
    n_layers = activations.n_layers
    chosen = sorted(
        set(np.linspace(0, n_layers - 1, min(COMPARED + 2, n_layers)).astype(int)[-COMPARED - 1 :][:COMPARED])
    )
    some = np.stack([activations.layer(int(layer)) for layer in chosen])
    whole = []
    for _ in range(settings.repeats):
        started = settings.clock()
        analyze(prompts, activations, config=config)
        whole.append(settings.clock() - started)
    seconds, found = settings.alternate(
        {
            "ours": lambda: analyze(prompts, ArrayLayers(some), config=config),
            "sklearn": lambda: with_sklearn(prompts, some, config),
        }
    )
    figures = (
        Figure("scikit-learn ÷ ours", ratio(seconds, "sklearn", "ours"), "×", at_least=5.0),
        Figure(f"ours, all {n_layers} layers", statistics.median(whole), "s", at_most=3.0),
        Figure(
            "largest difference from scikit-learn",
            largest_difference(found["ours"], found["sklearn"]),
            "",
            at_most=5e-3,
        ),
    )
    details: dict[str, Any] = {
        "prompts": len(prompts),
        "layers_compared": [int(layer) for layer in chosen],
        "seconds": seconds,
        "seconds_all_layers": whole,
    }
    return Report("analysis", figures, details)
