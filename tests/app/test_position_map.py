"""The map on the pages: where it stands, what leads to it, and what is said of positions that are not analysed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from es2.analysis.layers import analyze
from es2.analysis.results import AnalysisConfig
from es2.core.files import content_key
from es2.store.activation_set import ActivationSet
from es2.store.store import Store
from es2.workflow.derived import analysis_key
from tests.app.test_app import captions, figures, has_button, open_app
from tests.app.test_compare import open_compare
from tests.builders_artifacts import BEST_LAYER, MODEL, TARGETS, Compared, write_comparison
from tests.figures import charts_of

N_PAIRS = 40


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compared:
    """Both positions are captured under base and tuned, `last` is analysed."""
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    return write_comparison(tmp_path, N_PAIRS)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("app.jobs_panel.launch", lambda kind, config: found.append((kind, dict(config))))
    return found


def analyse(made: Compared, tuned: ActivationSet | None = None, position: str = "last_instruction") -> None:
    base, prompts = made.artifacts.activations, made.artifacts.prompts
    config = AnalysisConfig(position=position, n_bootstrap=50, n_shuffles=1)
    with (tuned or base).write_derived(analysis_key(base, prompts, config, tuned=tuned)) as folder:
        analyze(prompts, base, tuned, config=config).save(folder)


def capture_mean(made: Compared) -> None:
    """Embeddings at a position that lies in a set of its own."""
    base, prompts = made.artifacts.activations, made.artifacts.prompts
    meta = {"model": MODEL, "run": None, "texts_digest": prompts.texts_digest}
    arrays = {"mean": base.layer(0)[None].repeat(base.n_layers, 0)}
    Store(made.artifacts.home / "cached_activations").write(content_key(meta), meta, prompts.texts, arrays)


def framed(at: AppTest) -> tuple[float, float]:
    """The layer and the row of the chosen cell."""
    (frame,) = figures(at)["position_map"]["layout"]["shapes"]
    return frame["x0"] + 0.5, frame["y0"] + 0.5


def test_with_one_position_analysed_the_strip_stays_and_the_other_is_offered(
    made: Compared, launched: list[tuple[str, dict[str, Any]]]
) -> None:
    at = open_app(made.artifacts.link())
    assert list(figures(at))[:2] == ["accuracy_strip", "margin_strip"]
    assert "Captured and not analysed: last token of the request." in captions(at)
    at.button(key="analyse_positions").click().run()
    config = {"model": MODEL, "prompts": str(made.artifacts.source), "position": "last_instruction"}
    assert launched == [("prepare", config)]


def test_with_two_the_map_takes_the_place_of_the_accuracy_strip(made: Compared) -> None:
    analyse(made)
    at = open_app(made.artifacts.link())
    assert list(figures(at))[:2] == ["position_map", "margin_strip"]
    assert framed(at) == (BEST_LAYER, 0)
    assert not has_button(at, "analyse_positions")
    shown = next(one for one in at.button_group if one.key == "accuracy_as")
    shown.set_value("curve").run()
    assert list(figures(at))[:2] == ["accuracy_strip", "margin_strip"]
    other = open_app(made.artifacts.link(position="last_instruction", layer="1"))
    assert framed(other) == (1, 1)


def test_a_position_in_a_set_of_its_own_belongs_to_the_map(made: Compared) -> None:
    analyse(made)
    capture_mean(made)
    at = open_app(made.artifacts.link())
    assert figures(at)["position_map"]["layout"]["yaxis"]["ticktext"] == ["last", "request end", "mean"]
    assert "Captured and not analysed: mean over the request." in captions(at)


def test_a_newer_twin_under_another_name_takes_nothing_away(made: Compared) -> None:
    """The same weights lie in two places, and the page was opened under the name of one of them."""
    analyse(made)
    base, prompts = made.artifacts.activations, made.artifacts.prompts
    store = Store(made.artifacts.home / "cached_activations")
    store.add_name(base, "/models/toy")
    meta = {"model": MODEL, "run": None, "texts_digest": prompts.texts_digest}
    arrays = {position: base.layer(0, position)[None] for position in base.positions}
    twin = {position: one.repeat(base.n_layers, 0) for position, one in arrays.items()}
    store.write(content_key(meta | {"twin": True}), meta, prompts.texts, twin)
    at = open_app(made.artifacts.link(model="/models/toy"))
    assert framed(at) == (BEST_LAYER, 0)
    assert not has_button(at, "analyse_positions")


def test_the_comparison_has_the_positions_of_both_models(
    made: Compared, launched: list[tuple[str, dict[str, Any]]]
) -> None:
    capture_mean(made)  # under base alone
    at = open_compare(made.link())
    assert "accuracy_strip" in charts_of(at)
    assert "Captured and not analysed: last token of the request." in captions(at)
    at.button(key="analyse_positions").click().run()
    of_run = {"model": MODEL, "prompts": str(made.artifacts.source), "run": made.run.id}
    assert launched == [("prepare", of_run | {"position": "last_instruction"})]
    analyse(made, made.tuned)
    at = open_compare(made.link(position="last_instruction", layer="2"))
    drawn = figures(at)["position_map"]
    assert drawn["layout"]["yaxis"]["ticktext"] == ["last", "request end"]
    assert framed(at) == (2, 1)
    assert next(trace for trace in drawn["data"] if trace["name"] == "target layers")["x"] == list(TARGETS)
    assert "accuracy_strip" not in charts_of(at)
