"""The figures: that they show the numbers they were given, mean one thing by one colour, and interpret no prompt."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from es2.analysis.projection import View
from es2.analysis.resampling import Interval
from es2.analysis.results import NUMBERS, CostPoint, LayerNumbers
from es2.charts import canvas, projection_chart
from es2.charts import layer_charts as charts
from es2.prompts.prompt_set import HARMFUL, HARMLESS, PromptSet
from es2.report import palette
from es2.report.glossary import BY_NAME, COMPARED, TERMS
from tests.figures import Checked, random_view, six_pairs, traces

charts = Checked(charts)
projection_chart = Checked(projection_chart)

N_LAYERS = 7


def number(value: float) -> Interval:
    return Interval(value, value - 0.02, value + 0.03)


@pytest.fixture
def layers() -> list[LayerNumbers]:
    rng = np.random.default_rng(0)
    return [
        LayerNumbers(
            layer=layer,
            C=1.0,
            scale=20.0,
            log_loss=0.3,
            cv_accuracy=0.9,
            numbers={name: number(float(rng.uniform(0.4, 0.9))) for name in NUMBERS},
            by_C=(),
        )
        for layer in range(N_LAYERS)
    ]


@pytest.fixture
def prompts() -> PromptSet:
    return six_pairs()


@pytest.fixture
def view() -> View:
    return random_view()


def every_figure(layers: list[LayerNumbers], prompts: PromptSet, view: View) -> list[go.Figure]:
    points = [CostPoint(10.0**power, 0.3, layers[0].numbers) for power in range(-2, 3)]
    margins = view.base[:, 0]
    return [
        charts.accuracy_strip(layers, chosen=2, recommended=(1, 4)),
        charts.margin_strip(layers, chosen=2, recommended=(1, 4)),
        projection_chart.projection(view, prompts, margins=margins, others=True, selected=(0, 5)),
        charts.histogram(margins, prompts.labels),
        charts.cost_curve(points, charts.COST_LINES, chosen=1.0, title="accuracy"),
    ]


class TestEveryFigure:
    def test_only_svg_scatter(self, layers: list[LayerNumbers], prompts: PromptSet, view: View) -> None:
        """WebGL traces select nothing where WebGL is missing."""
        for figure in every_figure(layers, prompts, view):
            assert {trace.type for trace in figure.data} == {"scatter"}

    def test_every_axis_has_a_title_but_the_strip_above_the_other(
        self, layers: list[LayerNumbers], prompts: PromptSet, view: View
    ) -> None:
        for figure in every_figure(layers, prompts, view)[1:]:
            assert figure.layout.xaxis.title.text
            assert figure.layout.yaxis.title.text

    def test_charts_above_each_other_line_up(self, layers: list[LayerNumbers], prompts: PromptSet, view: View) -> None:
        figures = every_figure(layers, prompts, view)
        assert len({(figure.layout.margin.l, figure.layout.margin.r) for figure in figures}) == 1
        for figure in figures:
            assert figure.layout.xaxis.automargin is False
            assert figure.layout.yaxis.automargin is False
        accuracy, margin = figures[:2]
        assert accuracy.layout.xaxis.range == margin.layout.xaxis.range

    def test_colours_stand_out_in_both_themes(self) -> None:
        """Contrast by WCAG 2.2, of which 3 is asked of graphics, to the page's two backgrounds."""
        config = tomllib.loads((Path(__file__).parents[2] / ".streamlit" / "config.toml").read_text())
        backgrounds = [config["theme"][theme]["backgroundColor"] for theme in ("light", "dark")]
        for colour in (*palette.COLOURS.values(), palette.BASE, palette.TUNED, canvas.NEUTRAL):
            for background in backgrounds:
                assert contrast(colour, background) >= 3, (colour, background)

    def test_labels_stay_apart_without_colour(self) -> None:
        assert palette.SYMBOLS[HARMFUL] != palette.SYMBOLS[HARMLESS]


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


class TestStrips:
    def test_accuracy_shows_numbers_intervals_control_and_chance(self, layers: list[LayerNumbers]) -> None:
        shown = traces(charts.accuracy_strip(layers, chosen=2, recommended=(1, 4)))
        accuracy = [layer.numbers["probe_accuracy"] for layer in layers]
        assert list(shown["probe accuracy, 95 % interval"].y) == [each.value for each in accuracy]
        band = shown["probe_accuracy interval"].y
        assert list(band[:N_LAYERS]) == [each.high for each in accuracy]
        assert list(band[N_LAYERS:])[::-1] == [each.low for each in accuracy]
        control = [layer.numbers["probe_accuracy_control"].value for layer in layers]
        assert list(shown["shuffled labels"].y) == control
        assert set(shown["chance"].y) == {0.5}

    def test_margins_show_both(self, layers: list[LayerNumbers]) -> None:
        shown = traces(charts.margin_strip(layers, chosen=2, recommended=(1, 4)))
        for title, name in (
            ("margin of the probe", "margin_mean"),
            ("mean-difference margin", "mean_difference_margin"),
        ):
            assert list(shown[title].y) == [layer.numbers[name].value for layer in layers]

    @pytest.mark.parametrize("draw", [charts.accuracy_strip, charts.margin_strip])
    def test_a_click_means_a_layer(self, draw, layers: list[LayerNumbers]) -> None:
        """One trace answers the mouse, with a marker for each layer; the others are skipped."""
        figure = draw(layers, chosen=2, recommended=(1, 4))
        answering = [trace for trace in figure.data if trace.hoverinfo != "skip"]
        assert len(answering) == 1
        assert [list(data) for data in answering[0].customdata] == [["layer", layer] for layer in range(N_LAYERS)]
        assert "markers" in answering[0].mode
        assert answering[0].hoverinfo == "text"
        assert all(f"layer {layer}" in hover for layer, hover in enumerate(answering[0].hovertext))

    @pytest.mark.parametrize("draw", [charts.accuracy_strip, charts.margin_strip])
    def test_chosen_and_recommended_are_marked(self, draw, layers: list[LayerNumbers]) -> None:
        figure = draw(layers, chosen=2, recommended=(1, 4))
        assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(2, 2)]
        assert list(traces(figure)["recommended targets"].x) == [1, 4]

    def test_every_interval_is_inside_the_axis(self, layers: list[LayerNumbers]) -> None:
        for draw in (charts.accuracy_strip, charts.margin_strip):
            figure = draw(layers, chosen=0, recommended=())
            low, high = figure.layout.yaxis.range
            values = [value for trace in figure.data if trace.y is not None for value in trace.y]
            assert low <= min(values)
            assert max(values) <= high


class TestHistogram:
    def test_every_prompt_is_counted_once(self) -> None:
        rng = np.random.default_rng(2)
        labels = (rng.random(300) < 0.4).astype(np.int8)
        margins = rng.normal(size=300) + labels
        figure = charts.histogram(margins, labels)
        for label, name in ((HARMFUL, "harmful"), (HARMLESS, "harmless")):
            trace = traces(figure)[name]
            assert sum(trace.y[:-1]) == (labels == label).sum()
            edges = np.array(trace.x)
            assert np.isclose(edges, 0).any(), "an edge lies on the boundary"
            right = np.array(trace.y[:-1])[edges[:-1] >= -1e-12]
            assert right.sum() == ((labels == label) & (margins >= 0)).sum()

    @pytest.mark.parametrize("margins", [[], [0.0], [0.0, 0.0, 0.0], [1e-12]])
    def test_degenerate(self, margins: list[float]) -> None:
        charts.histogram(np.array(margins), np.zeros(len(margins), dtype=np.int8))


class TestCostCurve:
    def test_numbers_over_c(self, layers: list[LayerNumbers]) -> None:
        points = [CostPoint(10.0**power, 0.3, layers[power].numbers) for power in range(3)]
        figure = charts.cost_curve(points, charts.COST_MARGINS, chosen=10.0, title="margin")
        assert list(traces(figure)["margin"].y) == [point.numbers["margin_mean"].value for point in points]
        assert list(traces(figure)["margin"].error_y.array) == pytest.approx([0.03] * 3)
        assert figure.layout.xaxis.type == "log"
        assert figure.layout.shapes[0].x0 == 10.0


def test_rounded_keeps_five_digits_of_the_largest() -> None:
    points = np.array([[123.4567891, -0.000123], [0.5, -99.0]])
    assert canvas.rounded(points).tolist() == [[123.457, -0.0], [0.5, -99.0]]
    assert canvas.rounded(points / 1e6).tolist() == [[0.000123457, -0.0], [5e-07, -9.9e-05]]
    assert canvas.rounded(np.zeros((2, 2))).tolist() == [[0, 0], [0, 0]]


@given(st.floats(min_value=1e-9, max_value=1e9))
def test_nice_limit_covers_and_wastes_little(value: float) -> None:
    assert value <= canvas.nice_limit(value) * (1 + 1e-6)
    assert canvas.nice_limit(value) <= 1.7 * value


@given(st.floats(min_value=0.01, max_value=100), st.floats(min_value=0.99, max_value=1.01))
def test_nice_limit_moves_rarely(value: float, change: float) -> None:
    steps = {canvas.nice_limit(value * factor) for factor in np.linspace(1, change, 20)}
    assert len(steps) <= 2


def test_every_number_is_explained_once() -> None:
    assert len(BY_NAME) == len(TERMS) + len(COMPARED)
    assert set(BY_NAME) <= set(NUMBERS)
    unexplained = set(NUMBERS) - set(BY_NAME)
    of_other_test_sets = {"in_domain_accuracy", "in_domain_auroc"}
    behind_others = {"mean_norm", "orthogonal_std", "probe_auroc_control"}
    assert unexplained == of_other_test_sets | behind_others


def test_rounded_zero_has_no_sign() -> None:
    assert BY_NAME["margin_mean"].value(Interval(-0.00001, -0.2, 0.1)) == "0.0000"
    assert BY_NAME["margin_mean"].range(Interval(0.0, -0.2, 1234.5)) == "−0.2000 to 1,234.5000"
