"""Links reopen a view, whatever else they hold, and plotly's events become rows and layers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import state
from app.state import ARRANGEMENTS, FITS, VIEWS, Choice, picked, read_link
from es2.core.rendering import Rendering
from es2.prompts.benchmarks import absolute_source
from es2.store.sources import POSITIONS, check_position

names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=60)


@given(
    st.builds(
        Choice,
        model=names,
        prompts=names.map(lambda name: f"/{name}.csv".replace("//", "/")),
        position=st.sampled_from((*POSITIONS, "last-3", "mean")),
        layer=st.none() | st.integers(0, 99),
        view=st.sampled_from(VIEWS),
        others=st.booleans(),
        arrangement=st.sampled_from(ARRANGEMENTS),
        fit_on=st.sampled_from(FITS),
        raw=st.booleans(),
        rendering=st.builds(
            Rendering,
            system_prompt=st.none() | names | st.just("Two\nlines & more"),
            thinking=st.sampled_from([None, "on", "off"]),
            template_arg=st.sampled_from([(), ("effort=low", "budget=512"), ('tools=[{"a": "b, c"}]',)]),
        ),
    )
)
def test_a_link_reopens_the_choice(choice: Choice) -> None:
    read, notes = read_link(choice.to_link())
    assert notes == []
    assert read == choice


@given(st.dictionaries(st.sampled_from(["model", "prompts", "position", "layer", "view", "splits"]), st.text()))
def test_a_damaged_link_falls_back_and_says_so(link: dict[str, str]) -> None:
    choice, notes = read_link(link)
    assert choice.position == check_position(choice.position)
    assert choice.view in VIEWS
    assert choice.layer is None or choice.layer >= 0
    for name in ("position", "view"):
        if name in link and link[name] != getattr(choice, name):
            assert any(name in note for note in notes)
    if "layer" in link and choice.layer is None:
        assert any("layer" in note for note in notes)
    assert len(notes) <= len(link)


def test_an_empty_link_is_the_usual_choice() -> None:
    assert read_link({}) == (Choice(), [])


@pytest.mark.parametrize("layer", ["-1", "1.5", "²", "1e3", "", "99999999999999999999", "７"])
def test_a_layer_is_a_plain_number(layer: str) -> None:
    choice, notes = read_link({"layer": layer})
    assert choice.layer is None
    assert len(notes) == 1


@pytest.mark.parametrize(
    "link", [{"thinking": "maybe"}, {"template_arg": "x"}, {"template_arg": "[1]"}, {"system_prompt": "x" * 9000}]
)
def test_a_rendering_that_cannot_be_is_noted(link: dict[str, str]) -> None:
    choice, notes = read_link(link)
    assert choice == Choice()
    assert len(notes) == 1


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_source("mine.csv") == str(tmp_path / "mine.csv")
    assert absolute_source("builtin") == "builtin"
    assert absolute_source("hf:owner/name:test") == "hf:owner/name:test"


class TestPicked:
    @pytest.mark.parametrize(
        ("reported", "expected"),
        [({"picked": ["layer", 2]}, 2), ({"picked": ["target", 2]}, None), ({"picked": None}, None), ({}, None)],
    )
    def test_the_number_of_a_point_of_its_kind(
        self, reported: dict[str, object], expected: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.state.st.session_state", {"strip": reported})
        assert picked("strip", "layer") == expected


class TestPickingACell:
    @pytest.mark.parametrize(
        ("clicked", "expected"),
        [
            (["layer", 2, 0], ("last", 2, None)),
            (["cell", 2, 1], ("mean", 2, "run-1")),
            (["none", 2, 1], ("last", 5, None)),
            (None, ("last", 5, None)),
        ],
    )
    def test_both_are_chosen(
        self, clicked: list[object] | None, expected: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session = {"choice": Choice(layer=5), "choice_notes": [], "map": {"picked": clicked}}
        monkeypatch.setattr("app.state.st.session_state", session)
        state.pick_cell("map", ["last", "mean"], run="run-1")
        choice = state.current()
        assert (choice.position, choice.layer, choice.run) == expected
