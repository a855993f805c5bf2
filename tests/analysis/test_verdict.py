"""The verdict table, row by row, and its order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from es2.analysis.layers import analyze
from es2.analysis.resampling import Interval
from es2.analysis.results import AnalysisConfig, Change, LayerNumbers
from es2.analysis.verdict import VERDICTS, layer_verdict, rule, run_verdict
from es2.store.sources import ArrayLayers
from tests.clouds import clouds, paired_prompts

NAMES = ("centroid_distance", "relative_distance", "fisher_ratio", "effective_rank", "probe_accuracy")
NAMES += ("margin_mean", "mean_difference_margin")


def near(value: float, half: float = 0.05) -> Interval:
    return Interval(value, value - half, value + half)


def layer(
    *,
    orthogonal_std_ratio: float = 1.0,
    accuracy: float = 0.0,
    accuracy_half: float = 0.01,
    margins: float = 0.0,
    **ratios: float,
) -> LayerNumbers:
    """A tuned layer whose numbers are base's, but for the ratios given."""
    change = {name: Change(near(margins), near(ratios.get(name, 1.0))) for name in NAMES}
    change["probe_accuracy"] = Change(near(accuracy, accuracy_half), None)
    numbers = {"orthogonal_std_ratio": near(orthogonal_std_ratio)}
    return LayerNumbers(7, 1.0, 1.0, None, None, numbers, (), change)


ROWS: list[tuple[str, dict[str, Any]]] = [
    ("unchanged", {}),
    ("unchanged", {"fisher_ratio": 1.04, "relative_distance": 1.04}),  # higher, but not beyond chance
    ("unchanged", {"fisher_ratio": 2.0, "relative_distance": 2.0, "accuracy": -0.031, "accuracy_half": 0.05}),
    ("inflated", {"centroid_distance": 7.8}),
    ("unchanged", {"centroid_distance": 7.8, "margins": 0.06}),
    ("unchanged", {"centroid_distance": 1.19}),
    ("separated", {"fisher_ratio": 3.0, "relative_distance": 2.0}),
    ("separated", {"fisher_ratio": 3.0, "relative_distance": 2.0, "accuracy": -0.009}),
    ("contracted", {"fisher_ratio": 3.0}),
    ("contracted", {"fisher_ratio": 3.0, "relative_distance": 2.0, "orthogonal_std_ratio": 0.49}),
    ("worse", {"fisher_ratio": 3.0, "accuracy": -0.02}),
    ("collapsed", {"fisher_ratio": 3.0, "relative_distance": 2.0, "effective_rank": 0.5, "accuracy": -0.2}),
]


@pytest.mark.parametrize(("expected", "changes"), ROWS)
def test_each_row(expected: str, changes: dict[str, Any]) -> None:
    verdict = layer_verdict(layer(**changes))
    assert verdict.name == expected
    assert verdict.reason.startswith("Layer 7: ")


@pytest.mark.parametrize(("above", "expected"), [(5e-7, "inflated"), (5e-6, "separated")])
def test_rounding_is_no_change(above: float, expected: str) -> None:
    least = 1.05 + above  # whose interval begins at 1 + above
    assert layer_verdict(layer(fisher_ratio=least, relative_distance=least, centroid_distance=5.0)).name == expected


def test_a_broken_budget_is_a_collapse_only_beyond_four_times() -> None:
    tuned = layer(fisher_ratio=3.0, relative_distance=2.0)
    assert layer_verdict(tuned, {"prompt": 0.05, "reply": 0.40}).name == "separated"
    assert layer_verdict(tuned, {"prompt": 0.05, "reply": 0.41}).name == "collapsed"


def test_the_budget_is_the_runs_own() -> None:
    tuned = layer(fisher_ratio=3.0, relative_distance=2.0)
    assert layer_verdict(tuned, {"prompt": 0.05, "reply": 0.45}, 0.5).name == "separated"
    collapsed = layer_verdict(tuned, {"prompt": 0.05, "reply": 2.01}, 0.5)
    assert collapsed.name == "collapsed"
    assert collapsed.reason.endswith("moved by 2.01 nats, the budget is 0.5.")
    assert "4 budgets of 0.5 nats" in rule(0.5)["collapsed"]
    assert "4 budgets of 0.1 nats" in rule()["collapsed"]


def test_base_has_no_verdict() -> None:
    base = LayerNumbers(0, 1.0, 1.0, 0.5, 0.7, {}, (), None)
    with pytest.raises(ValueError, match="compared with base"):
        layer_verdict(base)


def test_a_run_has_the_gravest_verdict_of_its_target_layers() -> None:
    """Real clouds: layer 0 moves apart, layer 1 is only made longer, layer 2 stays."""
    prompts = paired_prompts(160)
    base = clouds(prompts, [1.5, 1.5, 1.5], 12, seed=1)
    apart = clouds(prompts, [5.0, 1.5, 1.5], 12, seed=1)
    apart[1] *= 5
    analysis = analyze(prompts, ArrayLayers(base), ArrayLayers(apart), config=AnalysisConfig(n_bootstrap=200))
    assert [layer_verdict(numbers).name for numbers in analysis.tuned_layers] == ["separated", "inflated", "unchanged"]
    assert run_verdict(analysis, [0]).name == "separated"
    assert run_verdict(analysis, [0], {"prompt": 0.45, "reply": 0.0}).name == "collapsed"
    assert run_verdict(analysis, [0], {"prompt": 0.45, "reply": 0.0}, 0.5).name == "separated"
    assert run_verdict(analysis, [0, 1]).name == "inflated"
    assert run_verdict(analysis, [0, 2]).name == "unchanged"
    assert set(VERDICTS) >= {"separated", "inflated", "unchanged"}
    assert np.isfinite(analysis.tuned_layers[0].numbers["fisher_ratio"].value)
