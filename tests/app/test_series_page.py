"""The page of a series without a browser: what it offers and refuses, and its figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import plotly.graph_objects as go
import pytest
from streamlit.testing.v1 import AppTest

from app.state import Choice, read_link
from app.views.series import names_of
from es2.analysis.series import Member, series_view
from es2.charts import series_charts
from es2.jobs.queue import create_job, list_jobs
from es2.workflow.series import analyse_members, open_members
from tests.builders_artifacts import TUNED_DISTANCES, Artifacts
from tests.builders_series import Series, write_series, write_set
from tests.figures import charts_of

PAGE = """
from app import artifacts, state
from app.text import sentences
from app.views import series

state.open_link(artifacts.existing)
with sentences():
    series.page()
state.mirror()
"""


@pytest.fixture(scope="module")
def made(home: Path) -> Iterator[Series]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ES2_HOME", str(home))
        yield write_series(home, 60)


@pytest.fixture
def artifacts(made: Series, places: None) -> Artifacts:
    return made.artifacts


@pytest.fixture(scope="module")
def members(made: Series) -> list[Member]:
    """Base, a run of 40 steps, and two checkpoints, in a home of their own numbers."""
    base, prompts = made.artifacts.activations, made.artifacts.prompts
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ES2_HOME", str(made.artifacts.home))
        found = analyse_members(base, open_members((made.compared.run.id,), base, "last"), prompts, "last")
    later = replace(found[1], name="sft, step 100", training="/sft", step=100, kl=None)
    return [*found, replace(later, name="sft, step 50", step=50), later]


def opened(artifacts: Artifacts, **link: str) -> AppTest:
    at = AppTest.from_string(PAGE, default_timeout=60)
    for name, value in artifacts.link(**link).items():
        at.query_params[name] = value
    at.run()
    assert not at.exception
    return at


def said(at: AppTest) -> str:
    return "\n".join(one.value for one in [*at.markdown, *at.caption, *at.info]).replace("\\", "")


def test_what_has_no_numbers_is_offered_to_be_computed(
    artifacts: Artifacts, made: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.jobs_panel.launch", create_job)
    at = opened(artifacts)
    assert "without numbers yet: sft, step 50, sft, step 100." in said(at)
    assert len(charts_of(at)["series_panels"]) == 2
    at.button(key="compute_series").click().run()
    (job,) = list_jobs(kind="series")
    assert job.config["sets"] == [one.key for one in made.checkpoints]


def test_a_links_set_that_does_not_fit_is_refused_by_its_reason(artifacts: Artifacts, made: Series) -> None:
    other = write_set(artifacts.home, artifacts, TUNED_DISTANCES, model="/x/checkpoint-9", base="another-model")
    at = opened(artifacts, series=f"{other.key},{made.compared.tuned.key}")
    assert "/x/checkpoint-9 cannot be set beside toy-model: it is of another base (another-model)" in said(at)
    assert at.multiselect(key="series_sets").value == [made.compared.tuned.key]


def test_a_link_holds_keys_and_not_too_many() -> None:
    choice = Choice(series=("a" * 24, "b" * 24))
    assert read_link(choice.to_link()) == (choice, [])
    for broken in ("../x", ",".join(f"{number:024x}" for number in range(12))):
        choice, notes = read_link({"series": broken})
        assert choice.series == ()
        assert len(notes) == 1


def test_no_two_models_are_called_alike_nor_as_a_column(members: list[Member]) -> None:
    alike = [replace(member, name=name) for member, name in zip(members, ("Base", "label", "a", "a"), strict=True)]
    assert names_of(alike) == ["Base", "label (2)", "a", "a (2)"]


class TestFigures:
    def test_panels_have_one_frame_and_the_selected_prompt_in_each(
        self, artifacts: Artifacts, members: list[Member]
    ) -> None:
        view = series_view(members, artifacts.prompts, 2)
        row = int(artifacts.prompts.in_split("test").nonzero()[0][0])
        margins = [one[:, 0] for one in view.points]
        names = [member.name for member in members]
        found = series_charts.panels(view, names, artifacts.prompts, margins, selected=[row])
        for figure, points in zip(map(go.Figure, found), view.points, strict=True):
            assert figure.layout.xaxis.range == go.Figure(found[0]).layout.xaxis.range
            assert figure.layout.yaxis.range == go.Figure(found[0]).layout.yaxis.range
            assert figure.data[-1].x[0] == pytest.approx(points[row, 0], abs=1e-4)

    def test_each_training_has_a_line_from_base(self, members: list[Member]) -> None:
        names = [member.name for member in members]
        lines = go.Figure(series_charts.by_step(members, names, 2, "fisher_ratio")).data
        assert [list(line.x) for line in lines] == [[0, 40], [0, 50, 100]]
        kl = series_charts.kl_by_step(members, names)
        assert kl is not None
        assert [list(line.y) for line in go.Figure(kl).data] == [[0, 0.021], [0, 0.034]]

    def test_without_steps_the_models_are_in_order(self, members: list[Member]) -> None:
        unknown = [*members[:2], replace(members[2], step=None)]
        figure = go.Figure(series_charts.by_step(unknown, ["Base", "a", "b"], 2, "fisher_ratio"))
        assert list(figure.layout.xaxis.ticktext) == ["Base", "a", "b"]
        assert series_charts.kl_by_step([replace(one, kl=None) for one in members], ["", "", "", ""]) is None

    def test_a_click_on_the_strip_picks_a_layer(self, members: list[Member]) -> None:
        figure = go.Figure(
            series_charts.strip(members, [member.name for member in members], "probe_accuracy", chosen=2)
        )
        assert [list(one) for one in figure.data[-1].customdata] == [["layer", layer] for layer in range(6)]
