"""The figures of a sweep: each point is the trial that it stands for, and what was not tried is empty."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from es2.charts import sweep_charts
from es2.report import palette
from es2.workflow.sweeps import sweep_document
from tests.builders_sweep import write_sweep
from tests.figures import Checked, traces

sweep_charts = Checked(sweep_charts)


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    return sweep_document(write_sweep(refusals=(0.25, 1.0, None, None, None)))


def test_the_front_is_joined_and_the_others_are_marked(document: dict[str, Any]) -> None:
    found = traces(sweep_charts.front(document, 2))
    front = found["on the front"]
    assert list(zip(front.x, front.y, strict=True)) == [(0.002, 0.4), (0.05, 1.2)], "by KL"
    assert front.line.shape == "hv", "a step: what lies below it is beaten"
    assert [list(data) for data in front.customdata] == [["trial", 1], ["trial", 0]]
    assert [list(data) for data in found["kept"].customdata] == [["trial", 2]]
    assert [list(data) for data in found["pruned"].customdata] == [["trial", 3]]
    assert (found["shown"].x, found["shown"].y) == ((0.03,), (0.3,))
    drawn = [data[1] for trace in found.values() if trace.customdata is not None for data in trace.customdata]
    assert sorted(drawn) == [0, 1, 2, 3], "the failed one has no numbers, and no point"
    assert "fisher ratio ×3.3" in front.hovertext[1]
    assert "λ 10" in front.hovertext[1]


def test_paler_is_fewer_refusals_kept(document: dict[str, Any]) -> None:
    all_kept, few_kept = traces(sweep_charts.front(document, None))["on the front"].marker.color
    assert depth(few_kept) < depth(all_kept) == 1


def depth(colour: str) -> float:
    return float(colour.rstrip(")").split(",")[-1])


def test_of_a_sweep_with_defence_paler_is_fewer_refusals_under_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    document = sweep_document(write_sweep(refusals=(1.0, 1.0, 0.0, None, None), defended=True))
    front = traces(sweep_charts.front(document, None))["on the front"]
    assert [data[1] for data in front.customdata] == [1, 2, 0], "the one with most refusals is beaten by none"
    assert front.mode == "markers", "no line joins the points of a surface"
    few, most, some = map(depth, front.marker.color)
    assert few < some < most < 1
    assert "refuses 12 of 16 under attack (base 3)" in front.hovertext[1]
    assert "refuses 2 of 16 harmless (base 1)" in front.hovertext[1]
    figure = sweep_charts.parallel(document, None)
    assert figure.layout.xaxis.ticktext[-1] == "refused<br>under attack"
    lines = {name: trace.y[-1] for name, trace in traces(figure).items() if name and name.startswith("trial")}
    assert lines == {"trial 0": 0.2, "trial 1": 0.0, "trial 2": 1.0, "trial 3": None, "trial 4": None}


def test_a_logarithmic_axis_holds_every_point_and_the_budget(document: dict[str, Any]) -> None:
    document["trials"][1]["numbers"]["kl"] = 0.0
    figure = sweep_charts.front(document, None)
    low, high = figure.layout.xaxis.range
    points = [x for trace in figure.data for x in trace.x if x is not None]
    assert all(low < math.log10(x) < high for x in [*points, document["kl_budget"]])
    assert figure.layout.shapes[0].x0 == document["kl_budget"]


def test_lines_run_through_settings_to_what_they_came_to(document: dict[str, Any]) -> None:
    figure = sweep_charts.parallel(document, 1)
    axes = list(figure.layout.xaxis.ticktext)
    assert axes == ["lower layer", "upper layer", "objective", "λ", "rate ×", "rank", "KL", "separation"]
    lines = {name: trace for name, trace in traces(figure).items() if name and name.startswith("trial")}
    assert len(lines) == 5
    assert lines["trial 4"].y[-2:] == (None, None), "it failed, so its line ends with its settings"
    for name in ("lower layer", "KL", "separation"):
        at = axes.index(name)
        places = {number: lines[f"trial {number}"].y[at] for number in range(4)}
        value = {
            "lower layer": lambda trial: trial["settings"]["layers"][0],
            "KL": lambda trial: trial["numbers"]["kl"],
            "separation": lambda trial: trial["numbers"]["separation"],
        }[name]
        expected = sorted(range(4), key=lambda number: value(document["trials"][number]))
        assert sorted(range(4), key=places.__getitem__) == expected
    assert all(0 <= y <= 1 for trace in lines.values() for y in trace.y if y is not None)
    assert lines["trial 0"].line.color == palette.TUNED == lines["trial 1"].line.color
    assert figure.data[4].name == "trial 1", "the shown one is in front"


def test_a_pair_shows_its_best_trial_and_one_that_was_not_tried_is_empty(document: dict[str, Any]) -> None:
    figure = sweep_charts.pairs(document, 0)
    squares, best, nothing = figure.data
    cells = {
        (x, y): squares.z[row][column]
        for row, y in enumerate(squares.y)
        for column, x in enumerate(squares.x)
        if squares.z[row][column] is not None
    }
    assert cells == {(1, 3): 1.2, (2, 4): 0.4}, "of two trials of 2 and 4 the better one; no zeros"
    assert [list(data) for data in best.customdata] == [["trial", 0], ["trial", 1]]
    assert set(zip(nothing.x, nothing.y, strict=True)) == {(3, 4), (1, 2)}
    (frame,) = figure.layout.shapes
    assert (frame.x0, frame.y0) == (0.5, 2.5)


def test_without_searched_layers_there_is_no_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    document = sweep_document(write_sweep(layers=(1, 3)))
    assert sweep_charts.pairs(document, 0) is None
    assert "lower layer" not in sweep_charts.parallel(document, 0).layout.xaxis.ticktext


def test_before_the_first_trial_has_ended(document: dict[str, Any]) -> None:
    document["trials"] = [document["trials"][4] | {"status": "running"}]
    document |= {"front": [], "best": None}
    assert not traces(sweep_charts.front(document, 0))["on the front"].x
    assert "KL" not in sweep_charts.parallel(document, 0).layout.xaxis.ticktext
    assert sweep_charts.pairs(document, 0) is not None
