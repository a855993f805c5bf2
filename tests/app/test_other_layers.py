"""What is sent ahead of the layers that somebody may go to."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import numpy as np
import pytest

from app.components import other_layers
from app.components.plots import as_text
from es2.analysis.projection import View
from es2.charts import pair_charts
from es2.prompts.prompt_set import PromptSet
from tests.figures import six_pairs


@pytest.fixture
def prompts() -> PromptSet:
    return six_pairs()


def figures_of(layer: int, prompts: PromptSet, arrangement: str, selected: tuple[int, ...] = ()) -> list[dict]:
    base, tuned = np.random.default_rng(layer).normal(size=(2, 12, 2))
    view = View("separation", base, tuned, (f"x of {layer} (no unit)", "y (no unit)"), None)
    margins = (base[:, 0], tuned[:, 0])
    return pair_charts.pair(
        view, prompts, margins=margins, names=("Base", "Tuned"), arrangement=arrangement, selected=selected
    )


@pytest.mark.parametrize("arrangement", ["side", "overlay", "morph"])
def test_what_moves_makes_the_figure_of_another_layer(prompts: PromptSet, arrangement: str) -> None:
    here, there = (figures_of(layer, prompts, arrangement) for layer in (1, 2))
    for shown, other in zip(here, there, strict=True):
        sent = other_layers.moving(other)
        moved = json.loads(as_text(shown["data"]))
        for trace, changed in zip(moved, json.loads(sent["traces"]), strict=True):
            trace.update(changed)
        assert moved == json.loads(as_text(other["data"]))
        assert json.loads(sent["layout"]) == json.loads(as_text(other["layout"]))
        assert len(sent["traces"]) < len(as_text(other["data"])) / 2, "what stays is not sent again"


def test_figures_are_json_whatever_is_half_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", ModuleType("pandas"))  # as another session's thread may leave it
    part = {"x": np.array([0.5, np.nan, np.inf]), "size": np.float64(2), "rows": np.arange(2), "name": "NaN"}
    assert json.loads(as_text(part)) == {"x": [0.5, None, None], "size": 2.0, "rows": [0, 1], "name": "NaN"}
    with pytest.raises(TypeError, match="no JSON"):
        as_text({"x": object()})


@pytest.mark.parametrize("selected", [(), (0, 2), tuple(range(4)) * 5])
def test_a_selection_changes_no_order_of_traces(prompts: PromptSet, selected: tuple[int, ...]) -> None:
    usual, chosen = figures_of(1, prompts, "side"), figures_of(1, prompts, "side", selected)
    for one, other in zip(usual, chosen, strict=True):
        assert [trace["name"] for trace in one["data"]] == [trace["name"] for trace in other["data"]]


def test_the_nearest_come_first_and_large_ones_not_at_all() -> None:
    assert other_layers.nearest(2, 6, 100) == [3, 1, 4, 0, 5]
    assert other_layers.nearest(0, 30, 20_000) == [1, 2, 3]
    assert other_layers.nearest(0, 30, 20_001) == []
    assert other_layers.nearest(0, 1, 100) == []
