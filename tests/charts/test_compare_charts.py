"""Figures of two models: one frame for both, the numbers they were given, and nothing interpreted."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest

from es2.analysis.projection import View
from es2.analysis.resampling import Interval
from es2.analysis.results import Analysis
from es2.charts import canvas, compare_charts, pair_charts, projection_chart
from es2.prompts.prompt_set import HARMFUL, PromptSet
from es2.report import palette
from tests.builders_artifacts import INFLATED_LAYER, TARGETS, Compared, write_comparison
from tests.figures import Checked, six_pairs, traces

compare_charts = Checked(compare_charts)
pair_charts = Checked(pair_charts)

NAMES = ("Base", "<b>Tuned</b>")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return write_comparison(tmp_path_factory.mktemp("home"), 60)


@pytest.fixture
def analysis(compared: Compared) -> Analysis:
    return compared.analysis


@pytest.fixture
def prompts() -> PromptSet:
    return six_pairs()


@pytest.fixture
def view() -> View:
    points = np.round(np.random.default_rng(1).normal(size=(2, 12, 2)), 3)  # as figures have them (`canvas.rounded`)
    return View("separation", points[0], 3 * points[1], ("x (no unit)", "y (no unit)"), None)


@pytest.fixture
def margins(view: View) -> pair_charts.Margins:
    assert view.tuned is not None
    return view.base[:, 0], view.tuned[:, 0]


def drawn(view: View, prompts: PromptSet, **settings: object) -> list[go.Figure]:
    assert view.tuned is not None
    margins = (view.base[:, 0], view.tuned[:, 0])
    return [
        go.Figure(one)  # which refuses what plotly does not know
        for one in pair_charts.pair(view, prompts, margins=margins, names=NAMES, **settings)  # type: ignore[arg-type]
    ]


def places(figure: go.Figure) -> dict[int, tuple[float, float]]:
    """Where each row is drawn."""
    return {
        data[1]: (x, y)
        for trace in figure.data
        if trace.customdata is not None
        for data, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
    }


class TestPair:
    def test_each_side_shows_its_model_in_the_same_frame(self, view: View, prompts: PromptSet) -> None:
        left, right = drawn(view, prompts)
        assert view.tuned is not None
        test = np.flatnonzero(prompts.in_split("test"))
        for figure, points in ((left, view.base), (right, view.tuned)):
            found = places(figure)
            assert sorted(found) == test.tolist()
            np.testing.assert_allclose([found[row] for row in test], points[test])
        for axis in ("xaxis", "yaxis"):
            assert left.layout[axis].range == right.layout[axis].range
        low, high = left.layout.yaxis.range
        shown = np.concatenate([view.base[test], view.tuned[test]])
        assert low < shown[:, 1].min() < shown[:, 1].max() < high
        assert left.layout.xaxis.range[1] >= np.abs(shown[:, 0]).max()

    def test_the_frame_does_not_depend_on_the_arrangement(self, view: View, prompts: PromptSet) -> None:
        ranges = {
            (figure.layout.xaxis.range, figure.layout.yaxis.range)
            for arrangement in ("side", "overlay", "morph")
            for figure in drawn(view, prompts, arrangement=arrangement)
        }
        assert len(ranges) == 1

    def test_pca_has_equal_units_on_both_axes(self, view: View, prompts: PromptSet) -> None:
        pca = View("pca", view.base, view.tuned, view.axes, (0.4, 0.2))
        for figure in drawn(pca, prompts):
            assert figure.layout.yaxis.scaleanchor == "x"
            assert not figure.layout.shapes

    def test_overlay_joins_where_each_prompt_was_to_where_it_is(self, view: View, prompts: PromptSet) -> None:
        (figure,) = drawn(view, prompts, arrangement="overlay")
        assert view.tuned is not None
        rows = np.flatnonzero(prompts.in_split("test") & (prompts.labels == HARMFUL))
        ways = traces(figure)["ways harmful"]
        assert list(ways.x) == [x for row in rows for x in (view.base[row, 0], view.tuned[row, 0], None)]
        models = {data[0] for trace in figure.data if trace.customdata is not None for data in trace.customdata}
        assert models == {"base", "tuned"}

    def test_morph_says_where_each_point_goes(self, view: View, prompts: PromptSet) -> None:
        (figure,) = drawn(view, prompts, arrangement="morph", selected=(0, 1))
        assert view.tuned is not None
        for trace in figure.data:
            assert len(trace.meta["to"]["x"]) == len(trace.x)
            if trace.customdata is not None:
                rows = [row for _, row in trace.customdata]
                np.testing.assert_allclose(trace.x, view.base[rows, 0])
                np.testing.assert_allclose(trace.meta["to"]["y"], view.tuned[rows, 1])

    def test_selected_are_ringed_on_both_sides(self, view: View, prompts: PromptSet) -> None:
        probe = int(np.flatnonzero(~prompts.in_split("test"))[0])
        for figure, points in zip(drawn(view, prompts, selected=(0, 2, probe)), (view.base, view.tuned), strict=True):
            assert points is not None
            np.testing.assert_allclose(traces(figure)["selected"].x, points[[0, 2], 0])

    def test_other_splits_are_hollow(self, view: View, prompts: PromptSet) -> None:
        left, _ = drawn(view, prompts, others=True)
        assert set(places(left)) == set(range(len(prompts)))
        assert traces(left)["harmful, other splits"].marker.symbol == "diamond-open"

    def test_hover_has_both_margins_and_names_are_text(
        self, view: View, prompts: PromptSet, margins: pair_charts.Margins
    ) -> None:
        _, right = drawn(view, prompts)
        trace = traces(right)["harmful"]
        row = trace.customdata[0][1]
        assert f"margin {margins[0][row]:+.4f} → {margins[1][row]:+.4f}" == trace.text[0]
        assert "&lt;b&gt;Tuned" in right.layout.title.text


class TestAllLayers:
    def test_strips_show_both_models_and_mark_targets(self, analysis: Analysis) -> None:
        for draw, name, kept in (
            (compare_charts.accuracy_strip, "probe_accuracy", "{}"),
            (compare_charts.margin_strip, "margin_mean", "margin, {}"),
        ):
            figure = draw(analysis, ("Base", "Tuned"), chosen=4, targets=TARGETS)
            assert figure.layout.shapes[0].x0 == 4
            assert list(traces(figure)["target layers"].x) == list(TARGETS)
            for title, layers in (("Base", analysis.base_layers), ("Tuned", analysis.layers)):
                line = traces(figure)[kept.format(title)]
                assert list(line.y) == [layer.numbers[name].value for layer in layers]
            answering = [trace for trace in figure.data if trace.customdata is not None]
            assert len(answering) == 1, "a click means one thing"

    def test_overview_tells_change_from_chance(self, analysis: Analysis) -> None:
        words = {layer: "inflated" if layer == INFLATED_LAYER else "separated" for layer in range(6)}
        figure = compare_charts.overview(analysis, words, chosen=3, targets=TARGETS, names=("Base", "Tuned"))
        cells = traces(figure)["changes"]
        rows = list(figure.layout.yaxis.ticktext)
        symbols = {(y, x): symbol for x, y, symbol in zip(cells.x, cells.y, cells.marker.symbol, strict=True)}
        colours = {(y, x): colour for x, y, colour in zip(cells.x, cells.y, cells.marker.color, strict=True)}
        length, rank, fisher = (-rows.index(name) for name in ("Length ratio", "Effective rank", "Fisher ratio"))
        assert symbols[length, INFLATED_LAYER] == "square"
        assert symbols[fisher, INFLATED_LAYER] == "circle", "longer is not further apart"
        assert symbols[rank, 0] == "circle"
        assert colours[fisher, TARGETS[0]] == canvas.translucent(palette.TUNED, 1.0), "more than twice is full"
        assert list(traces(figure)["inflated"].x) == [INFLATED_LAYER]

    def test_what_compares_by_itself_changes_from_one(self, analysis: Analysis) -> None:
        layer = analysis.layers[INFLATED_LAYER]
        change = compare_charts.change_of(layer, "norm_ratio")
        assert change.ratio == layer.numbers["norm_ratio"]
        assert change.difference.value == pytest.approx(2.0, abs=0.01)
        assert compare_charts.is_change(change)
        assert compare_charts.change_of(layer, "direction_cosine").ratio is None

    @pytest.mark.parametrize(
        ("interval", "expected"),
        [(Interval(1.2, 1.1, 1.3), True), (Interval(0.8, 0.7, 0.9), True), (Interval(1.1, 0.9, 1.2), False)],
    )
    def test_a_ratio_changes_when_its_interval_leaves_out_one(self, interval: Interval, expected: bool) -> None:
        change = compare_charts.Change(Interval(0.1, -0.1, 0.3), interval)
        assert compare_charts.is_change(change) is expected


class TestHistograms:
    def test_every_prompt_once_in_each_row_on_one_scale(self, prompts: PromptSet, margins: pair_charts.Margins) -> None:
        figure = pair_charts.histograms(margins, prompts.labels, NAMES, selected=(1, 4))
        assert figure.layout.yaxis.range == figure.layout.yaxis2.range
        low, high = figure.layout.xaxis.range
        assert low == -high
        assert high >= max(np.abs(one).max() for one in margins)
        for axis, name in (("y2", "selected 0"), ("y", "selected 1")):
            bars = [trace for trace in figure.data if trace.yaxis == axis and trace.fill == "tozeroy"]
            assert sum(sum(trace.y[:-1]) for trace in bars) == len(prompts)
            assert list(traces(figure)[name].x) == [margins[axis == "y"][row] for row in (1, 4)]


def test_colours_mean_the_same_everywhere(view: View, prompts: PromptSet) -> None:
    for figure in drawn(view, prompts):
        assert traces(figure)["harmful"].marker.color == palette.COLOURS[HARMFUL]
    assert compare_charts.MODEL_COLOURS == (palette.BASE, palette.TUNED)
    assert len({symbol for symbol, _ in compare_charts.VERDICT_MARKS.values()}) == len(compare_charts.VERDICT_MARKS)


def test_few_selected_are_joined_to_their_twins(view: View, prompts: PromptSet) -> None:
    left, _ = drawn(view, prompts, selected=(0,))
    assert list(traces(left)["twins"].x) == [view.base[0, 0], view.base[1, 0], None]
    many = range(len(prompts))
    assert len(prompts) <= projection_chart.MAX_TWINS
    assert len(traces(drawn(view, prompts, selected=tuple(many))[0])["twins"].x) > 0
