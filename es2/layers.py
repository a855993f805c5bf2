"""The per-layer table: every number of every layer, before and after, with intervals, and which two layers to target.

One function does it all because the honesty of the numbers is a matter of who sees what: probes, frames, costs and the
recommendation come from `probe` alone, every number shown comes from `test` (or from a test set of other origin), and
both models are measured on the same resamples of the same pairs. Layers are independent of each other, so they are
spread over a few processes, each with single-threaded linear algebra, which on small matrices is the faster way round.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from es2.errors import InputError
from es2.geometry import Drawn, Frame, cloud_numbers, direction_cosine, fit_frame
from es2.helpers import Helpers
from es2.jobs import Reporter, silent
from es2.logistic import Products
from es2.probes import (
    Probes,
    accuracy,
    auroc,
    cross_validate,
    fit_each,
    fit_path,
    mean_auroc,
    probe_numbers,
    signed_distances,
    twins_of,
)
from es2.prompts import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet, normalised
from es2.resampling import Replicates, canonical, fold_of, intervals, resample_pairs, safe_ratio, shuffled_labels
from es2.results import (
    ANALYSIS_FORMAT,
    LENGTHS,
    NUMBERS,
    Analysis,
    AnalysisConfig,
    Change,
    CostPoint,
    Interval,
    LayerNumbers,
)
from es2.sources import ArrayLayers, LayerSource, Readers, TestSet

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "ANALYSIS_FORMAT",
    "Analysis",
    "AnalysisConfig",
    "ArrayLayers",
    "LayerNumbers",
    "LayerSource",
    "TestSet",
    "analyze",
    "check_prompts",
    "recommend",
]

MIN_PER_LABEL = 2
MAX_PROCESSES = 8
HELP_WORTHWHILE = 4_000_000
"""Layers times squared prompts from which helpers are started, which takes half a second and more."""


@dataclass(frozen=True)
class _Plan:
    """What all layers and both models share: who is looked at, with which weights, folds and shuffled labels."""

    config: AnalysisConfig
    probe_rows: Int[np.ndarray, "probe"]
    probe_labels: Int[np.ndarray, "probe"]
    probe_folds: Int[np.ndarray, "probe"]
    probe_shuffles: Int[np.ndarray, "shuffle probe"]
    test_rows: Int[np.ndarray, "test"]
    test_shuffles: Int[np.ndarray, "shuffle test"]
    test_twins: Int[np.ndarray, "2 pair"] | None
    drawn: Drawn
    self_folds: Int[np.ndarray, "test"] | None

    def intervals(self, replicates: Mapping[str, Replicates]) -> dict[str, Interval]:
        return intervals(replicates, self.config.confidence)


def check_prompts(prompts: PromptSet, test_prompts: PromptSet | None = None) -> None:
    """Refuse prompts that cannot be analysed, before anything is captured.

    Args:
        prompts: as for `analyze`.
        test_prompts: the prompts of `analyze`'s test set.

    Raises:
        InputError: when a label is missing where both are needed, or a test prompt also stands in `prompts`.
    """
    if test_prompts is not None:
        known = {normalised(text) for text in prompts.texts}
        shared = sum(normalised(text) in known for text in test_prompts.texts)
        if shared:
            raise InputError(
                f"{shared} test prompts of {test_prompts.name!r} also stand in {prompts.name!r}; leave them out."
            )
    _check_labels(prompts.select(prompts.in_split("probe")), f"The `probe` split of {prompts.name!r}", "a probe")
    if test_prompts is None:
        _check_labels(prompts.select(prompts.in_split("test")), f"The `test` split of {prompts.name!r}", "the numbers")
    else:
        _check_labels(test_prompts, f"The test set {test_prompts.name!r}", "the numbers")


def _plan(prompts: PromptSet, test: TestSet | None, config: AnalysisConfig) -> _Plan:
    check_prompts(prompts, None if test is None else test.prompts)
    probe_rows, probe = canonical(prompts, "probe")
    test_rows, measured = canonical(prompts, "test") if test is None else canonical(test.prompts)
    test_shuffles = shuffled_labels(measured, config.n_shuffles, config.seed)
    weights = resample_pairs(measured, config.n_bootstrap, config.seed)
    return _Plan(
        config,
        probe_rows,
        probe.labels,
        fold_of(probe, config.n_folds),
        shuffled_labels(probe, config.n_shuffles, config.seed),
        test_rows,
        test_shuffles,
        twins_of(test_shuffles.T, weights),
        Drawn.of(measured.labels, weights),
        None if test is None else fold_of(measured, config.n_folds),
    )


def _counts(labels: Int[np.ndarray, "prompt"]) -> dict[str, int]:
    return {LABEL_NAMES[label]: int((labels == label).sum()) for label in (HARMFUL, HARMLESS)}


def _check_labels(prompts: PromptSet, whose: str, what: str) -> None:
    counts = _counts(prompts.labels)
    if min(counts.values()) < MIN_PER_LABEL:
        found = " and ".join(f"{number} {label}" for label, number in counts.items())
        raise InputError(
            f"{whose} has {found} prompts, {what} need{'s' if what.startswith('a ') else ''} at least "
            f"{MIN_PER_LABEL} of each label (a few dozen to mean anything); add prompts, or a `split` column."
        )


@dataclass(frozen=True)
class _Probe:
    """One layer's probe in its frame."""

    weights: Float[np.ndarray, "d_model"]
    bias: float
    C: float
    frame: Frame


@dataclass(frozen=True)
class _Measured:
    """One layer of one model, before intervals: what a comparison with the other model needs."""

    probe: _Probe
    cost_index: int
    self_cost: float | None
    log_losses: Float[np.ndarray, "cost"] | None
    cv_accuracy: float | None
    numbers: dict[str, Replicates]
    curve: list[dict[str, Replicates]]


def _measure(
    probe_embeddings: Float[np.ndarray, "probe d_model"],
    test_embeddings: Float[np.ndarray, "test d_model"],
    plan: _Plan,
    base: _Measured | None,
) -> _Measured:
    """Everything about one layer of one model; `base` is given for the tuned model, which takes its costs from it."""
    config, labels, weights = plan.config, plan.drawn.labels, plan.drawn.weights
    frame = fit_frame(probe_embeddings, plan.probe_labels)
    features = frame.normalise(probe_embeddings)
    products = Products.of(features)
    log_losses = cv_accuracy = fitted = None
    if base is None:
        held_out = cross_validate(features, plan.probe_labels, plan.probe_folds, config.costs, products, with_path=True)
        fitted = held_out.path
        cost_index, log_losses = held_out.best, held_out.log_loss
        cv_accuracy = float(_held_out_numbers(held_out.logits[cost_index], plan.probe_labels, None)[0][0])
    else:
        cost_index = base.cost_index

    z = frame.normalise(test_embeddings)
    path, intercepts = fitted or fit_path(features, plan.probe_labels, config.costs, products)
    curve = probe_numbers(signed_distances(z, path, intercepts), labels, weights)
    numbers = curve[cost_index] | _control(features, products, z, plan, config.costs[cost_index])
    del z  # as large as the embeddings
    numbers |= cloud_numbers(test_embeddings, frame, plan.drawn)

    self_cost = None
    if plan.self_folds is not None:
        costs = config.costs if base is None or base.self_cost is None else (base.self_cost,)
        numbers["self_accuracy"], numbers["self_auroc"], self_cost = _self_numbers(
            test_embeddings, plan, plan.self_folds, costs
        )
    probe = _Probe(path[cost_index], float(intercepts[cost_index]), config.costs[cost_index], frame)
    return _Measured(probe, cost_index, self_cost, log_losses, cv_accuracy, numbers, curve)


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
    plan: _Plan,
    cost: float,
) -> dict[str, Replicates]:
    """What probes of the same cost reach when the labels of `probe` and of the test prompts are shuffled alike."""
    weights, intercepts = fit_each(features, plan.probe_shuffles, cost, products)
    scores, tested = test_features @ weights.T + intercepts, plan.test_shuffles.T
    return {
        "probe_accuracy_control": accuracy(scores, tested, plan.drawn.weights).mean(axis=1),
        "probe_auroc_control": mean_auroc(scores, tested, plan.drawn.weights, plan.test_twins),
    }


def _self_numbers(
    embeddings: Float[np.ndarray, "test d_model"],
    plan: _Plan,
    folds: Int[np.ndarray, "test"],
    costs: tuple[float, ...],
) -> tuple[Replicates, Replicates, float]:
    """Accuracy and AUROC of probes cross-validated inside the test set, in its own frame, and the cost they used."""
    features = fit_frame(embeddings, plan.drawn.labels).normalise(embeddings)
    held_out = cross_validate(features, plan.drawn.labels, folds, costs, stop_early=True)
    reached = _held_out_numbers(held_out.logits[held_out.best], plan.drawn.labels, plan.drawn.weights)
    return *reached, costs[held_out.best]


def _layer_numbers(layer: int, measured: _Measured, plan: _Plan, numbers: Mapping[str, Replicates]) -> LayerNumbers:
    losses = measured.log_losses
    return LayerNumbers(
        layer=layer,
        C=measured.probe.C,
        scale=measured.probe.frame.scale,
        log_loss=None if losses is None else float(losses[measured.cost_index]),
        cv_accuracy=measured.cv_accuracy,
        numbers=plan.intervals({name: numbers[name] for name in NUMBERS if name in numbers}),
        by_cost=tuple(
            CostPoint(
                cost,
                None if losses is None else float(losses[index]),
                plan.intervals(measured.curve[index]),
            )
            for index, cost in enumerate(plan.config.costs)
        ),
    )


def _changes(base: Mapping[str, Replicates], tuned: Mapping[str, Replicates], plan: _Plan) -> dict[str, Change]:
    shared = [name for name in NUMBERS if name in base and name in tuned]
    differences = plan.intervals({name: tuned[name] - base[name] for name in shared})
    ratios = plan.intervals(
        {name: safe_ratio(tuned[name], base[name], both_zero=1.0) for name in shared if name in LENGTHS}
    )
    return {name: Change(differences[name], ratios.get(name)) for name in shared}


@dataclass(frozen=True)
class _Layer:
    """One layer of both models, done."""

    base: LayerNumbers
    base_probe: _Probe
    tuned: LayerNumbers | None = None
    tuned_probe: _Probe | None = None


_Embeddings: TypeAlias = 'tuple[Float[np.ndarray, "probe d_model"], Float[np.ndarray, "test d_model"]]'
"""Of one layer under one model: what `Readers.read` gives."""


def _read_layer(layer: int, readers: Readers) -> tuple[int, _Embeddings, _Embeddings | None]:
    """What `_analyze_layer` takes."""
    base = readers.read("base", layer)
    if "tuned" not in readers.models:
        return layer, base, None
    tuned = readers.read("tuned", layer)
    if tuned[0].shape[1] != base[0].shape[1]:
        raise InputError(
            f"Base has {base[0].shape[1]} dimensions and tuned {tuned[0].shape[1]}; they are not the same model."
        )
    return layer, base, tuned


def _analyze_layer(plan: _Plan, layer: int, of_base: _Embeddings, of_tuned: _Embeddings | None) -> _Layer:
    base = _measure(*of_base, plan, None)
    one = np.ones(len(plan.drawn.weights))
    against_itself = {"norm_ratio": one, "rest_ratio": one, "direction_cosine": one}
    base_numbers = _layer_numbers(layer, base, plan, base.numbers | against_itself)
    if of_tuned is None:
        return _Layer(base_numbers, base.probe)
    tuned = _measure(*of_tuned, plan, base)
    against_base = {
        "norm_ratio": safe_ratio(tuned.numbers["mean_norm"], base.numbers["mean_norm"], both_zero=1.0),
        "rest_ratio": safe_ratio(tuned.numbers["rest_deviation"], base.numbers["rest_deviation"], both_zero=1.0),
        "direction_cosine": direction_cosine(of_base[1], of_tuned[1], plan.drawn),
    }
    tuned_numbers = _layer_numbers(layer, tuned, plan, tuned.numbers | against_base)
    tuned_numbers = replace(tuned_numbers, change=_changes(base.numbers, tuned.numbers, plan))
    return _Layer(base_numbers, base.probe, tuned_numbers, tuned.probe)


def _n_helpers(n_layers: int, n_prompts: int) -> int:
    """How many processes help with an analysis: one for every further processor, where it pays to start them."""
    if n_layers * n_prompts**2 < HELP_WORTHWHILE:
        return 0
    return min(os.cpu_count() or 1, MAX_PROCESSES, n_layers) - 1


def recommend(log_loss: Sequence[float], accuracy: Sequence[float]) -> tuple[tuple[int, ...], int, str]:
    """Two target layers and the best layer, from what cross-validation inside `probe` says of each layer.

    The first target layer is the best read one of the middle of the model, 0.2·n ≤ l < 0.8·n (early layers hold words
    rather than meaning, changes in late ones reach nothing); the second the best read one there that stands at least
    about a tenth of the depth away, as neighbours hold nearly the same. Two, since the paper found one too few and
    three too many. Models too shallow for that have all their layers considered.

    Args:
        log_loss: cross-validated log-loss of each layer, in nats.
        accuracy: balanced accuracy of the same held-out prompts, for the words.

    Returns:
        The target layers in ascending order (one, if there is but one layer), the best layer of all, and why.
    """
    n_layers = len(log_loss)
    best_layer = int(np.argmin(log_loss))

    def figures(layer: int) -> str:
        return f"log-loss {log_loss[layer]:.3f} nats, balanced accuracy {accuracy[layer]:.3f}"

    if n_layers == 1:
        return (0,), 0, f"The model has a single layer, so only layer 0 can be a target ({figures(0)})."
    apart = max(1, round(n_layers / 10))
    middle = [layer for layer in range(n_layers) if 0.2 * n_layers <= layer < 0.8 * n_layers]
    if middle[-1] - middle[0] < apart:
        middle = list(range(n_layers))
    ranked = sorted(middle, key=lambda layer: (log_loss[layer], layer))
    first = ranked[0]
    second = next(layer for layer in ranked if abs(layer - first) >= apart)
    where = f"layers {middle[0]} to {middle[-1]}" + ("" if len(middle) == n_layers else f" of 0 to {n_layers - 1}")
    reason = (
        f"Cross-validated inside the probe split, layer {first} is read best among {where} ({figures(first)}), and "
        f"layer {second} is the best at least {apart} layer{'s' * (apart > 1)} away from it ({figures(second)})."
    )
    if best_layer != first:
        reason += f" Over all layers, layer {best_layer} is read best ({figures(best_layer)})."
    return (min(first, second), max(first, second)), best_layer, reason


def _stack(probes: Sequence[_Probe]) -> Probes:
    return Probes(
        weights=np.stack([probe.weights for probe in probes]),
        bias=np.array([probe.bias for probe in probes]),
        centre=np.stack([probe.frame.centre for probe in probes]),
        scale=np.array([probe.frame.scale for probe in probes]),
        C=np.array([probe.C for probe in probes]),
        direction=np.stack([probe.frame.direction for probe in probes]),
    )


def analyze(
    prompts: PromptSet,
    base: LayerSource,
    tuned: LayerSource | None = None,
    *,
    test: TestSet | None = None,
    config: AnalysisConfig | None = None,
    report: Reporter = silent,
) -> Analysis:
    """Every number of every layer, with intervals and controls, and the layers to target.

    Args:
        prompts: the prompt set. Its `probe` split fits probes, frames and the recommendation; its `test` split gives
            the numbers. The order of the prompts changes nothing.
        base: embeddings of all `prompts`, in their order, under the base model.
        tuned: the same under the tuned model.
        test: prompts of another origin, which then give the numbers instead of `test`.
        config: settings; the shipped ones if not given.
        report: called as `report("analyse", layers done, layers)`; may raise to stop.

    Raises:
        InputError: when `probe` or the test prompts hold fewer than two prompts of a label, or embeddings are missing,
            not finite, or not of the same model.
    """
    n_layers = base.n_layers
    n_tests = int(prompts.in_split("test").sum()) if test is None else len(test.prompts)
    n_helpers = _n_helpers(n_layers, int(prompts.in_split("probe").sum()) + n_tests)
    done: dict[int, _Layer] = {}
    with Helpers(n_helpers, _analyze_layer) as helpers:
        import scipy.linalg  # noqa: F401  brings its own BLAS, which must be loaded before threads are limited
        from threadpoolctl import threadpool_limits

        config = config or AnalysisConfig()
        plan = _plan(prompts, test, config)
        models: dict[str, LayerSource] = {"base": base} | ({"tuned": tuned} if tuned is not None else {})
        tests = models
        if test is not None:
            tests = {"base": test.base} | ({"tuned": test.tuned} if test.tuned is not None else {})
        readers = Readers(
            models,
            tests,
            len(prompts),
            len(prompts if test is None else test.prompts),
            plan.probe_rows,
            plan.test_rows,
            config.position,
        )
        report("analyse", 0, n_layers)
        # Late layers take longest, so they come first: at the end nobody waits long for another.
        order = range(n_layers - 1, -1, -1)
        with threadpool_limits(1, user_api="blas"):
            for piece, answer in helpers.spread(plan, lambda piece: _read_layer(order[piece], readers), n_layers):
                done[order[piece]] = answer
                report("analyse", len(done), n_layers)
    layers = [done[layer] for layer in range(n_layers)]
    base_layers = tuple(layer.base for layer in layers)
    recommended, best_layer, reason = recommend(
        [layer.log_loss for layer in base_layers if layer.log_loss is not None],
        [layer.cv_accuracy for layer in base_layers if layer.cv_accuracy is not None],
    )
    return Analysis(
        base_layers=base_layers,
        tuned_layers=None if tuned is None else tuple(layer.tuned for layer in layers if layer.tuned),
        recommended=recommended,
        best_layer=best_layer,
        reason=reason,
        base_probes=_stack([layer.base_probe for layer in layers]),
        tuned_probes=None if tuned is None else _stack([layer.tuned_probe for layer in layers if layer.tuned_probe]),
        test_name=prompts.name if test is None else test.prompts.name,
        n_prompts={"probe": _counts(plan.probe_labels), "test": _counts(plan.drawn.labels)},
        config=config,
    )
