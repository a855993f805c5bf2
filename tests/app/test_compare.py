"""The page of the comparison without a browser: what it says and draws for which artifacts, links and jobs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from app import artifacts as reading
from app import state
from app.components.exports import report
from es2.analysis.layers import analyze
from es2.analysis.projection import UmapCoordinates
from es2.analysis.results import AnalysisConfig
from es2.analysis.verdict import Behaviour
from es2.store.activation_set import ActivationSet
from es2.store.sources import OWN_HOOKS, PLAIN_TEXT
from es2.workflow.derived import analysis_key, umap_key
from tests.app.test_app import MAIN, captions, has_button
from tests.builders_artifacts import (
    DISTANCES,
    INFLATED_LAYER,
    MODEL,
    TARGETS,
    Compared,
    write_artifacts,
    write_comparison,
)
from tests.builders_evaluation import REFUSES_LESS, write_replies
from tests.figures import charts_of
from tests.report.test_report import Page


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return write_comparison(tmp_path_factory.mktemp("home"))


@pytest.fixture
def home(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ES2_HOME", str(compared.artifacts.home))
    return compared.artifacts.home


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("app.jobs_panel.launch", lambda kind, config: found.append((kind, dict(config))))
    return found


def open_compare(link: Mapping[str, str] | None = None) -> AppTest:
    at = AppTest.from_file(MAIN, default_timeout=60)
    for name, value in (link or {}).items():
        at.query_params[name] = value
    at.run()
    assert not at.exception
    return at


def pair(at: AppTest) -> list[dict[str, Any]]:
    """The figures of the linked pair."""
    return charts_of(at)["linked_pair"]


def points(figure: dict[str, Any]) -> dict[int, tuple[float, float]]:
    """Where each row is drawn."""
    return {
        data[1]: (x, y)
        for trace in figure["data"]
        for data, x, y in zip(trace.get("customdata", ()), trace["x"], trace["y"], strict=False)
    }


def words(at: AppTest) -> str:
    return "\n".join(element.value for element in at.markdown).replace("\\", "")


class TestComparison:
    def test_the_verdict_comes_first(self, home: Path, compared: Compared) -> None:
        at = open_compare(compared.link())
        result = compared.run.result() or {}
        assert result["verdict"] == "separated"
        assert f"**Separated, behaviour not measured.** **{result['verdict_reason']}**" in words(at)
        assert "No evaluation says what this run replies to harmful requests that it never saw" in words(at)
        assert "0.021 on the prompt, 0.034 on the reply; budget 0.1 each" in captions(at)
        at.slider(key="layer").set_value(INFLATED_LAYER).run()
        assert "**Separated, behaviour not measured.**" in words(at)
        assert "This layer: **inflated**. Layer 5" in words(at)

    def test_a_separated_run_that_refuses_less_is_warned_of(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = write_comparison(tmp_path, 40)
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        choice = state.Choice(run=made.run.id)
        for _ in range(2):  # the second time it is remembered, until an evaluation comes
            found = reading.find_comparison(choice)
            assert found is not None
            assert found.outcome == "separated, behaviour not measured"
        assert not open_compare(made.link()).warning
        write_replies(made.run, "requests", *REFUSES_LESS)
        at = open_compare(made.link())
        assert "**Separated, refuses less.**" in words(at)
        (warning,) = at.warning
        said = warning.value.replace("\\", "")
        assert said.startswith("Refuses less. The tuned model refuses fewer harmful requests than its base")
        assert "On 8 harmful requests of requests: DSR 1.00 → 0.25" in said
        own = AppTest.from_file(MAIN, default_timeout=60)
        own._page_hash = calc_hash("own")
        for name, value in made.link().items():
            own.query_params[name] = value
        assert [one.value for one in own.run().warning] == [warning.value], "the same words on every page"
        newer = reading.find_comparison(choice)
        assert newer is not None
        assert said in Page(report(newer).decode()).text.replace("\n", " ")

    def test_two_runs_are_not_judged_by_the_replies_of_one(self, home: Path, compared: Compared) -> None:
        found = reading._comparison(compared.run, None, "last")
        assert found is not None
        other = replace(found.base, meta=found.base.meta | {"run": "another"})
        bad, good = Behaviour("broken", "Because."), Behaviour("defends better", "Because.")
        two = replace(found, base=other, names=("First", "Second"), behaviours=(bad, good))
        assert two.is_of_two_runs
        assert two.outcome == "separated"
        assert two.warnings == [f"First: {bad.warning}"]

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [("given_as", PLAIN_TEXT, "plain text"), ("hooks", OWN_HOOKS, "by hooks on the model's own blocks")],
    )
    def test_an_unusual_way_of_reading_is_said(
        self, name: str, value: str, said: str, home: Path, compared: Compared, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pages = (compared.link(), compared.artifacts.link())
        assert not any(said in captions(open_compare(link)) for link in pages)
        monkeypatch.setattr(ActivationSet, name, property(lambda self: value))
        assert all(said in captions(open_compare(link)) for link in pages)

    def test_the_budget_is_the_runs_own(self, home: Path, compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
        found = reading._comparison(compared.run, None, "last")
        assert found is not None
        result = {**found.result, "kl_harmless_test": {"prompt": 0.45, "reply": 0.2}}
        for budget, word, kl in ((0.5, "Separated", "budget 0.5 each"), (0.1, "Collapsed", "over the budget of 0.1")):
            changed = replace(found, result=result, config={**found.config, "kl_budget": budget})
            monkeypatch.setattr(reading, "find_comparison", lambda choice, changed=changed: changed)
            at = open_compare(compared.link())
            assert f"**{word}, behaviour not measured.**" in words(at)
            assert f"This layer: **{word.lower()}**" in words(at)
            assert kl in captions(at)
            assert f"4 budgets of {budget:g} nats" in words(at)

    def test_doubts_on_an_imported_adapter_stand_above_the_verdict(
        self, home: Path, compared: Compared, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = reading._comparison(compared.run, None, "last")
        assert found is not None
        assert not open_compare(compared.link()).warning
        doubts = ["The adapter names '*another*' as its base.", "It may be a part of one."]
        changed = replace(found, result={**found.result, "warnings": doubts})
        monkeypatch.setattr(reading, "find_comparison", lambda choice: changed)
        (warning,) = open_compare(compared.link()).warning
        assert warning.value.replace("\\", "") == "\n\n".join(doubts)
        assert r"\*another\*" in warning.value

    def test_an_analysis_with_other_settings_is_shown(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = write_comparison(tmp_path, 40)
        base, prompts = made.artifacts.activations, made.artifacts.prompts
        shutil.rmtree(made.tuned.path / "derived")
        config = AnalysisConfig(n_bootstrap=200)
        with made.tuned.write_derived(analysis_key(base, prompts, config, tuned=made.tuned)) as folder:
            analyze(prompts, base, made.tuned, config=config).save(folder)
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        found = reading.find_comparison(state.Choice(run=made.run.id))
        assert found is not None
        assert found.analysis.config == config
        assert len(pair(open_compare(made.link(layer="2")))) == 2

    def test_is_read_once_until_one_of_its_files_changes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = write_comparison(tmp_path, 40)
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        choice = state.Choice(run=made.run.id)
        reading.find_comparison(choice)  # what is remembered lay still while it was read
        first = reading.find_comparison(choice)
        assert first is not None
        assert reading.find_comparison(choice) is first

        base, prompts = made.artifacts.activations, made.artifacts.prompts
        config = AnalysisConfig(n_bootstrap=200)
        with made.tuned.write_derived(analysis_key(base, prompts, config, tuned=made.tuned)) as folder:
            analyze(prompts, base, made.tuned, config=config).save(folder)
        newer = reading.find_comparison(choice)
        assert newer is not None
        assert newer.analysis.config == config

        result = made.run.path / "result.json"
        result.unlink()
        assert reading.find_comparison(choice) is None

    def test_opens_at_a_target_layer_and_a_link_reopens_another(self, home: Path, compared: Compared) -> None:
        at = open_compare(compared.link())
        assert at.slider(key="layer").value == TARGETS[-1]
        assert at.query_params["run"] == compared.run.id
        at = open_compare(compared.link(layer="1", arrange="overlay"))
        assert at.slider(key="layer").value == 1
        assert len(pair(at)) == 1

    def test_both_models_are_drawn_in_one_frame(self, home: Path, compared: Compared) -> None:
        at = open_compare(compared.link(layer="2"))
        left, right = pair(at)
        prompts = compared.artifacts.prompts
        for figure, source, probes in (
            (left, compared.artifacts.activations, compared.analysis.base_probes),
            (right, compared.tuned, compared.analysis.tuned_probes),
        ):
            assert probes is not None
            margins = probes.margin(source.layer(2), 2)
            found = points(figure)
            assert set(found) == set(np.flatnonzero(prompts.in_split("test")))
            assert [x for x, _ in found.values()] == pytest.approx(margins[list(found)], abs=1e-5)
        assert left["layout"]["xaxis"]["range"] == right["layout"]["xaxis"]["range"]

    def test_raw_lengths_and_axes_of_both(self, home: Path, compared: Compared) -> None:
        at = open_compare(compared.link(layer=str(INFLATED_LAYER), view="pca"))
        before = [points(figure) for figure in pair(at)]
        at.toggle(key="raw").set_value(True).run()
        raw = [points(figure) for figure in pair(at)]
        assert at.query_params["lengths"] == "raw"

        def length(found: dict[int, tuple[float, float]]) -> float:
            return float(np.std(list(found.values())))

        assert length(raw[1]) / length(raw[0]) > 2 * length(before[1]) / length(before[0])
        at.toggle(key="raw").set_value(False).run()
        at.slider(key="layer").set_value(TARGETS[0]).run()
        before = [points(figure) for figure in pair(at)]
        at.toggle(key="fit_on").set_value(True).run()
        assert at.query_params["fit"] == "both"
        moved = np.array([points(pair(at)[0])[row] for row in before[0]]) - list(before[0].values())
        assert np.abs(moved).max() > 1e-3, "axes of both models are others than those of base"

    def test_a_selection_is_in_every_place_and_survives_another_layer(self, home: Path, compared: Compared) -> None:
        at = open_compare(compared.link())
        prompts = compared.artifacts.prompts
        at.session_state["choice_selection"] = (prompts.texts_digest, (0, 1, 5))
        at.run()
        for _ in range(2):
            test = [row for row in (0, 1, 5) if prompts.splits[row] == "test"]
            for figure in pair(at):
                (rings,) = (trace for trace in figure["data"] if trace["name"] == "selected")
                assert len(rings["x"]) == len(test)
            assert set(at.dataframe[0].value["prompt"]) == {prompts.texts[row] for row in (0, 1, 5)}
            histograms = charts_of(at)["histograms"][0]
            ticks = [trace for trace in histograms["data"] if trace["name"].startswith("selected")]
            assert [len(trace["x"]) for trace in ticks] == [len(test), len(test)]
            at.button(key="previous_layer").click().run()

    def test_lists_of_what_stands_out(self, home: Path, compared: Compared) -> None:
        at = open_compare(compared.link(layer="2"))
        prompts = compared.artifacts.prompts
        signs = np.where(prompts.labels == 1, 1.0, -1.0)
        assert compared.analysis.tuned_probes is not None
        before = signs * compared.analysis.base_probes.margin(compared.artifacts.activations.layer(2), 2)
        after = signs * compared.analysis.tuned_probes.margin(compared.tuned.layer(2), 2)
        test = prompts.in_split("test")
        movers = at.dataframe[1].value
        assert list(movers["moved"]) == sorted(movers["moved"], reverse=True)
        assert movers["moved"].iloc[0] == pytest.approx((after - before)[test].max())
        for choice, expected in ((2, test & (after <= 0)), (3, test & ((after > 0) != (before > 0)))):
            at.session_state["choice_habits"] = {"listing": choice}
            at.run()
            assert set(at.dataframe[1].value["prompt"]) == {prompts.texts[row] for row in np.flatnonzero(expected)}

    def test_numbers_before_and_after(self, home: Path, compared: Compared) -> None:
        (table,) = (
            element.proto.body
            for element in open_compare(compared.link(layer="2")).get("html")
            if "before-after" in element.proto.body and "<table" in element.proto.body
        )
        base, tuned = compared.analysis.base_layers[2], compared.analysis.layers[2]
        assert tuned.change is not None
        for name in ("fisher_ratio", "effective_rank", "probe_accuracy"):
            for layer in (base, tuned):
                assert reading_of(name, layer.numbers[name].value) in table
        ratio = tuned.change["fisher_ratio"].ratio
        assert ratio is not None
        assert f"×{ratio.value:.2f}" in table
        assert table.index("Margin") < table.index("Fisher ratio") < table.index("Centroid distance")

    def test_umap_of_both_from_disk_or_offered(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: list[tuple[str, dict[str, Any]]]
    ) -> None:
        made = write_comparison(tmp_path, 40)
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        at = open_compare(made.link(view="umap", layer="2"))
        at.button(key="compute_umap").click().run()
        config = {"model": MODEL, "prompts": str(made.artifacts.source), "position": "last", "run": made.run.id}
        assert launched == [("project", config)]
        prompts = made.artifacts.prompts
        coordinates = np.random.default_rng(0).normal(size=(len(DISTANCES), 2, len(prompts), 2)).astype(np.float32)
        key = umap_key(made.artifacts.activations, prompts, "last", made.tuned)
        with made.tuned.write_derived(key) as folder:
            UmapCoordinates(coordinates, "umap", "both").save(folder)
        _, right = pair(open_compare(made.link(view="umap", layer="2")))
        for row, place in points(right).items():
            assert place == pytest.approx(coordinates[2, 1, row], abs=1e-5)

    def test_a_part_of_the_prompts_is_called_one(
        self, home: Path, compared: Compared, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = reading.find_comparison(state.Choice(run=compared.run.id))
        assert found is not None
        n_test = sum(compared.analysis.n_prompts["test"].values())
        assert f"all {n_test} test prompts" in captions(open_compare(compared.link()))
        more = {**compared.analysis.n_prompts, "test": {"harmful": 500, "harmless": 500}}
        part = replace(found, analysis=replace(compared.analysis, n_prompts=more))
        monkeypatch.setattr("app.artifacts.find_comparison", lambda choice: part)
        assert f"numbers are of all 1,000 test prompts; {n_test} of them are drawn" in captions(open_compare())

    def test_two_runs_beside_each_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: list[tuple[str, dict[str, Any]]]
    ) -> None:
        first = write_comparison(tmp_path, 40)
        second = write_comparison(tmp_path, 40, distances=(0.0, 0.5, 2.0, 5.0, 2.0, 1.0))
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        at = open_compare(second.link(against=first.run.id))
        assert not charts_of(at), "the two were never analysed together"
        at.button(key="prepare_comparison").click().run()
        assert launched[0][0] == "prepare"
        assert (launched[0][1]["run"], launched[0][1]["against"]) == (second.run.id, first.run.id)


class TestNothingToCompare:
    def test_without_runs_it_says_what_will_be_here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = write_artifacts(tmp_path, 40)
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        turned: list[str] = []
        monkeypatch.setattr("app.state.go", turned.append)
        at = open_compare(made.link())
        assert not charts_of(at)
        at.button(key="to_runs").click().run()
        at.button(key="to_layers").click().run()
        assert turned == ["runs", "layers"]

    def test_a_run_that_does_not_exist_is_one_sentence(self, home: Path, compared: Compared) -> None:
        at = open_compare(compared.link(run="20200101-000000-000000-finetune-abcdef"))
        assert len(at.error) == 1
        assert "There is no job" in at.error[0].value

    def test_another_position_is_offered(
        self, home: Path, compared: Compared, launched: list[tuple[str, dict[str, Any]]]
    ) -> None:
        at = open_compare(compared.link(position="last_instruction"))
        assert not has_button(at, "next_layer")
        at.button(key="prepare_comparison").click().run()
        assert launched[0][1]["position"] == "last_instruction"
        assert launched[0][1]["run"] == compared.run.id

    def test_changed_prompts_are_offered(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = write_comparison(tmp_path, 40)
        monkeypatch.setenv("ES2_HOME", str(tmp_path))
        source = made.artifacts.source
        source.write_text(source.read_text(encoding="utf-8").replace("oil", "grease"), encoding="utf-8")
        assert has_button(open_compare(made.link()), "prepare_comparison")
        source.unlink()
        at = open_compare({"model": MODEL, "run": made.run.id})
        assert "prompts" in at.error[0].value
        assert not has_button(at, "prepare_comparison")


def reading_of(name: str, value: float) -> str:
    """A number as the page writes it."""
    from es2.report.glossary import BY_NAME

    return f"{value:,.{BY_NAME[name].digits}f}"


def test_a_click_on_either_side_selects(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the component reports becomes the selection; an empty report leaves it."""
    kept: dict[str, Any] = {"linked_pair": {"selected": [3, 1]}}
    monkeypatch.setattr("streamlit.session_state", kept)
    state.pick_prompts("linked_pair", "digest")
    assert state.selection("digest") == (3, 1)
    kept["linked_pair"] = {"selected": None}
    state.pick_prompts("linked_pair", "digest")
    assert state.selection("digest") == (3, 1)
    assert state.selection("another") == ()
