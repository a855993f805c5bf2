"""The projection: every prompt where it belongs, marked by label, split and selection, and named for the mouse."""

from __future__ import annotations

import numpy as np
import pytest

from es2.analysis.projection import View
from es2.charts import projection_chart
from es2.prompts.prompt_set import HARMFUL, PromptSet
from es2.report import palette
from tests.figures import Checked, random_view, six_pairs, traces

projection_chart = Checked(projection_chart)


@pytest.fixture
def prompts() -> PromptSet:
    return six_pairs()


@pytest.fixture
def view() -> View:
    return random_view()


class TestProjection:
    def test_test_prompts_by_label(self, view: View, prompts: PromptSet) -> None:
        shown = traces(projection_chart.projection(view, prompts, margins=view.base[:, 0]))
        assert [data[1] for data in shown["harmful"].customdata] == [0, 2]
        assert [data[1] for data in shown["harmless"].customdata] == [1, 3]
        assert {data[0] for data in shown["harmful"].customdata} == {"base"}
        np.testing.assert_array_equal(shown["harmful"].x, view.base[[0, 2], 0])
        np.testing.assert_array_equal(shown["harmful"].y, view.base[[0, 2], 1])
        assert shown["harmful"].marker.color == palette.COLOURS[HARMFUL]
        assert "harmful, other splits" not in shown

    def test_other_splits_are_hollow(self, view: View, prompts: PromptSet) -> None:
        shown = traces(projection_chart.projection(view, prompts, margins=view.base[:, 0], others=True))
        assert [data[1] for data in shown["harmful, other splits"].customdata] == [4, 6, 8, 10]
        assert shown["harmful, other splits"].marker.symbol == "diamond-open"
        assert shown["harmful"].marker.symbol == "diamond"

    def test_nothing_fades_when_something_is_selected(self, view: View, prompts: PromptSet) -> None:
        for trace in projection_chart.projection(view, prompts, margins=view.base[:, 0], others=True).data:
            if trace.customdata is not None:
                assert trace.unselected.marker.opacity == trace.marker.opacity

    def test_selected_are_ringed_and_joined_to_their_twins(self, view: View, prompts: PromptSet) -> None:
        shown = traces(projection_chart.projection(view, prompts, margins=view.base[:, 0], selected=(2, 4)))
        assert list(shown["selected"].x) == [view.base[2, 0]], "row 4 is of another split and not shown"
        assert list(shown["twins"].x) == [view.base[2, 0], view.base[3, 0], None]

    def test_many_selected_are_not_joined(self, view: View, prompts: PromptSet) -> None:
        many = [0, 1] * projection_chart.MAX_TWINS
        shown = traces(projection_chart.projection(view, prompts, margins=view.base[:, 0], selected=many))
        assert list(shown["twins"].x) == []

    def test_the_boundary_is_drawn_where_it_is(self, view: View, prompts: PromptSet) -> None:
        figure = projection_chart.projection(view, prompts, margins=view.base[:, 0])
        assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(0, 0)]
        low, high = figure.layout.xaxis.range
        assert low == -high
        pca = View("pca", view.base, None, view.axes, (0.4, 0.2))
        figure = projection_chart.projection(pca, prompts, margins=view.base[:, 0])
        assert not figure.layout.shapes
        assert figure.layout.yaxis.scaleanchor == "x"

    def test_hover_tells_what_is_known(self, view: View, prompts: PromptSet) -> None:
        harmful = traces(projection_chart.projection(view, prompts, margins=view.base[:, 0]))["harmful"]
        assert harmful.hovertemplate == "%{hovertext}<br><i>%{text}</i><extra></extra>"
        label = harmful.hovertext[0] + harmful.text[0]
        for part in ("harmful 0", "locks", "test split", "pair-0", f"{view.base[0, 0]:+.4f}"):
            assert part in label
