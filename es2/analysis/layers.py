"""The per-layer table: every number of every layer, before and after, with intervals, and which two layers to target.

Layers are independent, so they are spread over a few processes, each with single-threaded linear algebra, which is
faster on small matrices.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from es2.analysis.geometry import direction_cosine
from es2.analysis.layer_numbers import FittedProbe, layer_numbers, measure, paired_changes
from es2.analysis.probes import Probes
from es2.analysis.resampling import safe_ratio
from es2.analysis.results import Analysis, AnalysisConfig, LayerNumbers
from es2.analysis.setup import AnalysisSetup, count_labels, make_setup
from es2.core.errors import InputError
from es2.core.process_pool import Helpers
from es2.core.progress import Reporter, silent
from es2.prompts.prompt_set import PromptSet
from es2.store.sources import LayerSource, Readers, TestSet

if TYPE_CHECKING:
    from jaxtyping import Float

MAX_PROCESSES = 8
HELP_WORTHWHILE = 4_000_000
"""Layers times squared prompts from which helpers, which take half a second to start, pay."""


@dataclass(frozen=True)
class _Layer:
    base: LayerNumbers
    base_probe: FittedProbe
    tuned: LayerNumbers | None = None
    tuned_probe: FittedProbe | None = None


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


def _analyze_layer(setup: AnalysisSetup, layer: int, of_base: _Embeddings, of_tuned: _Embeddings | None) -> _Layer:
    base = measure(*of_base, setup, None)
    one = np.ones(len(setup.resampled.weights))
    against_itself = {"norm_ratio": one, "orthogonal_std_ratio": one, "direction_cosine": one}
    base_numbers = layer_numbers(layer, base, setup, base.numbers | against_itself)
    if of_tuned is None:
        return _Layer(base_numbers, base.probe)
    tuned = measure(*of_tuned, setup, base)
    against_base = {
        "norm_ratio": safe_ratio(tuned.numbers["mean_norm"], base.numbers["mean_norm"], both_zero=1.0),
        "orthogonal_std_ratio": safe_ratio(
            tuned.numbers["orthogonal_std"], base.numbers["orthogonal_std"], both_zero=1.0
        ),
        "direction_cosine": direction_cosine(of_base[1], of_tuned[1], setup.resampled),
    }
    tuned_numbers = layer_numbers(layer, tuned, setup, tuned.numbers | against_base)
    tuned_numbers = replace(tuned_numbers, change=paired_changes(base.numbers, tuned.numbers, setup))
    return _Layer(base_numbers, base.probe, tuned_numbers, tuned.probe)


def _n_helpers(n_layers: int, n_prompts: int) -> int:
    """The number of helping processes: one for every further processor, where they pay."""
    if n_layers * n_prompts**2 < HELP_WORTHWHILE:
        return 0
    return min(os.cpu_count() or 1, MAX_PROCESSES, n_layers) - 1


def recommend(log_loss: Sequence[float], accuracy: Sequence[float]) -> tuple[tuple[int, ...], int, str]:
    """Two target layers and the best layer, by cross-validation inside `probe`.

    The first target layer has the least log-loss of the middle of the model, 0.2·n ≤ l < 0.8·n (early layers hold words
    rather than meaning, changes in late ones reach nothing); the second the least of those there at least about a tenth
    of the depth away, as neighbours are nearly alike. Two, since the paper found one too few and three too many. All
    layers are considered in models too shallow for that.

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


def _stack(probes: Sequence[FittedProbe]) -> Probes:
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
        base, tuned: embeddings of all `prompts`, in their order.
        test: prompts of another origin, which then give the numbers instead of `test`.
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
        setup = make_setup(prompts, test, config)
        models: dict[str, LayerSource] = {"base": base} | ({"tuned": tuned} if tuned is not None else {})
        tests, n_measured = models, len(prompts)
        if test is not None:
            tests = {"base": test.base} | ({"tuned": test.tuned} if test.tuned is not None else {})
            n_measured = len(test.prompts)
        rows = setup.probe_rows, setup.test_rows
        readers = Readers(models, tests, len(prompts), n_measured, *rows, config.position)
        report("analyse", 0, n_layers)
        # Late layers take longest, so they come first.
        order = range(n_layers - 1, -1, -1)
        with threadpool_limits(1, user_api="blas"):
            for piece, answer in helpers.map_pieces(setup, lambda piece: _read_layer(order[piece], readers), n_layers):
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
        n_prompts={"probe": count_labels(setup.probe_labels), "test": count_labels(setup.resampled.labels)},
        config=config,
    )
