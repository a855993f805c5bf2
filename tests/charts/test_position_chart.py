"""The map of layers and positions: each square is the number it stands for, and a click on it means that cell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest

from es2.analysis.results import Analysis
from es2.charts import canvas, layer_charts, position_chart
from es2.report import palette
from tests.builders_artifacts import write_comparison
from tests.figures import Checked, traces

position_chart = Checked(position_chart)

LAYERS = 6


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return write_comparison(tmp_path_factory.mktemp("home"), 40).analysis


@pytest.fixture(scope="module")
def base(both: Analysis) -> Analysis:
    return replace(both, tuned_layers=None)


def of_base(base: Analysis, chosen: tuple[int, str] = (3, "last-1")) -> go.Figure:
    analyses = {"last": base, "last-1": base, "last_instruction": None, "mean": base}
    return position_chart.position_map(analyses, ["<b>"], chosen=chosen, marked=(1, 4), marked_as="targets")


def test_a_square_for_every_layer_and_analysed_position(base: Analysis) -> None:
    squares = traces(of_base(base))["<b>"]
    assert list(zip(squares.x, squares.y, strict=True)) == [
        (layer, row) for row in (0, 1, 3) for layer in range(LAYERS)
    ]
    kinds = {0: "cell", 1: "layer", 3: "cell"}
    assert [tuple(data) for data in squares.customdata] == [
        (kinds[row], layer, row) for row in (0, 1, 3) for layer in range(LAYERS)
    ]
    accuracy = base.layers[2].numbers["probe_accuracy"]
    assert squares.hovertext[2].startswith("<b>layer 2</b>, last token<br>")
    assert f"{accuracy.value:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f})" in squares.hovertext[2]
    assert "mean over the request" in squares.hovertext[-1]


def test_fuller_is_higher_and_the_legend_has_both_ends(base: Analysis) -> None:
    figure = of_base(base)
    values = [max(0.5, layer.numbers["probe_accuracy"].value) for layer in base.layers]
    colours = traces(figure)["<b>"].marker.color[:LAYERS]
    depths = [float(colour.split(",")[-1].rstrip(")")) for colour in colours]
    np.testing.assert_array_equal(np.argsort(depths, kind="stable"), np.argsort(values, kind="stable"))
    assert colours[0].startswith(canvas.translucent(palette.BASE, 0).rsplit(",", 1)[0])
    pale, full, *others = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert pale == "accuracy ≤ 0.5"
    assert max(values) <= float(full) < max(values) + 0.05
    assert others == ["not analysed", "targets"]


def test_what_is_not_analysed_has_dots_that_choose_nothing(base: Analysis) -> None:
    dots = traces(of_base(base))["not analysed"]
    assert set(dots.y) == {2}
    assert {data[0] for data in dots.customdata} == {"none"}
    assert "captured, not analysed" in dots.hovertext[0]


def test_the_chosen_cell_is_framed_and_targets_are_marked(base: Analysis) -> None:
    figure = of_base(base)
    (frame,) = figure.layout.shapes
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (2.5, 3.5, 0.5, 1.5)
    assert list(traces(figure)["targets"].x) == [1, 4]
    low, high = figure.layout.yaxis.range
    assert low < traces(figure)["targets"].y[0] < -0.5
    assert high == 3.5


def test_positions_stand_in_the_order_of_the_prompt(base: Analysis) -> None:
    axis = of_base(base).layout.yaxis
    assert list(axis.ticktext) == ["last", "last−1", "request end", "mean"]
    assert list(axis.tickvals) == [0, 1, 2, 3]


def test_it_lines_up_with_the_strips(base: Analysis) -> None:
    strip = layer_charts.margin_strip(base.layers, chosen=3, recommended=(1, 4))["layout"]
    drawn = of_base(base).layout
    assert (drawn.margin.l, drawn.margin.r) == (strip["margin"]["l"], strip["margin"]["r"])
    assert list(drawn.xaxis.range) == strip["xaxis"]["range"]


def test_base_is_above_tuned_in_the_row_of_a_position(both: Analysis) -> None:
    figure = position_chart.position_map(
        {"last": both, "mean": both}, ("Base", "<i>Tuned"), chosen=(3, "last"), marked=(2,), marked_as="targets"
    )
    base, tuned = (traces(figure)[name] for name in ("Base", "<i>Tuned"))
    assert all(low < high and round(low) == round(high) for low, high in zip(tuned.y, base.y, strict=True))
    assert [list(data) for data in base.customdata] == [list(data) for data in tuned.customdata]
    before, after = (layers[3].numbers["probe_accuracy"].value for layers in (both.base_layers, both.layers))
    assert f"{before:.3f} → {after:.3f} (" in base.hovertext[3] == tuned.hovertext[3]
    legend = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert [legend[0], legend[2], legend[4]] == ["accuracy, Base ≤ 0.5", "&lt;i&gt;Tuned ≤ 0.5", "targets"]
    assert legend[1] == legend[3]


@pytest.mark.parametrize(
    ("position", "words"),
    [
        ("last", "Last token"),
        ("last-3", "3 before last"),
        ("last_instruction", "Last token of the request"),
        ("mean", "Mean over the request"),
    ],
)
def test_positions_in_words(position: str, words: str) -> None:
    assert position_chart.position_words(position) == words
