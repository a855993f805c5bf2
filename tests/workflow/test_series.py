"""Which sets can stand beside a base and why others cannot; one frame for all; the numbers by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from es2.analysis.projection import pca_view, separation_view
from es2.analysis.series import Member, series_view
from es2.core.errors import InputError
from es2.jobs.queue import create_job
from es2.workflow.job_kinds import JOBS
from es2.workflow.runs import run_title
from es2.workflow.series import analyse_members, find_members, open_members, refusal, series_document
from tests.builders_artifacts import MODEL, TUNED_DISTANCES, Artifacts
from tests.builders_series import TRAINING, Series, write_series, write_set

Es2 = Callable[..., tuple[int, dict[str, Any]]]
LAYER = 2


@pytest.fixture(scope="module")
def made(home: Path) -> Iterator[Series]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ES2_HOME", str(home))
        yield write_series(home)


@pytest.fixture
def artifacts(made: Series, places: None) -> Artifacts:
    return made.artifacts


@pytest.fixture
def members(artifacts: Artifacts, made: Series) -> list[Member]:
    names = (made.compared.run.id, *(one.key for one in made.checkpoints))
    found = open_members(names, artifacts.activations, "last")
    return analyse_members(artifacts.activations, found, artifacts.prompts, "last")


class TestWhatFits:
    def test_runs_and_checkpoints_are_found_by_training_and_step(self, made: Series, artifacts: Artifacts) -> None:
        found = find_members(artifacts.activations, "last")
        run = made.compared.run
        assert [(one.name, one.step) for one in found] == [
            (run_title(run), 40),
            ("sft, step 50", 50),
            ("sft, step 100", 100),
        ]
        assert [one.training for one in found] == [run.id, TRAINING, TRAINING]
        assert [one.kl for one in found] == [{"prompt": 0.021, "reply": 0.034}, None, None]

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"model": "other-model"}, r"it is of another base \(other-model\)"),
            ({"base": "other-model", "model": "/x/checkpoint-1"}, r"it is of another base \(other-model\)"),
            ({"positions": ("mean",)}, "it was captured at mean, not at last"),
            ({"distances": TUNED_DISTANCES[:4]}, "it has 4 layers of 24 dimensions, and the base 6 of 24"),
            ({"prompts": slice(0, 20)}, "it holds other prompts"),
            ({"rendering": {"settings": {"thinking": "on"}}}, "it was given the prompts in other words"),
        ],
    )
    def test_what_does_not_fit_is_left_out_and_refused_by_its_reason(
        self, artifacts: Artifacts, changes: dict[str, Any], reason: str
    ) -> None:
        if "prompts" in changes:
            changes = {"prompts": artifacts.prompts.take(range(20))}
        other = write_set(artifacts.home, artifacts, **{"run": "elsewhere", **changes})
        assert other.key not in {one.activations.key for one in find_members(artifacts.activations, "last")}
        with pytest.raises(InputError, match=reason):
            open_members([other.key], artifacts.activations, "last")

    def test_the_base_does_not_stand_beside_itself(self, artifacts: Artifacts) -> None:
        base = artifacts.activations
        assert "it is the base itself" in refusal(base, base, "last")

    def test_a_checkpoint_is_known_by_the_digest_of_what_its_training_began_with(self, artifacts: Artifacts) -> None:
        decides = {"decides": {"weights": "w", "adapter": None, "tokens": "t"}}
        base = write_set(artifacts.home, artifacts, model="by-a-name", **decides)
        other = {"decides": {"weights": "x", "adapter": None, "tokens": "t"}}
        tuned = write_set(
            artifacts.home, artifacts, TUNED_DISTANCES, model="/y/checkpoint-7", base_weights="w", **other
        )
        assert [one.activations.key for one in find_members(base, "last")] == [tuned.key]

    def test_names_are_ids_of_runs_folders_and_keys(self, made: Series, artifacts: Artifacts) -> None:
        names = (f"{TRAINING}/checkpoint-100", made.checkpoints[0].key, made.compared.run.id)
        found = open_members(names, artifacts.activations, "last")
        assert [one.step for one in found] == [40, 50, 100], "in the order of the trainings, however they are named"
        with pytest.raises(InputError, match="There is no activation set of 'nothing'"):
            open_members(["nothing"], artifacts.activations, "last")

    def test_an_adapter_that_was_imported_from_a_checkpoint_is_a_step_of_its_training(
        self, artifacts: Artifacts
    ) -> None:
        config = {"model": MODEL, "imported": "/elsewhere/dpo/checkpoint-30", "layers": [2], "objective": "imported"}
        run = create_job("finetune", config)
        tuned = write_set(artifacts.home, artifacts, TUNED_DISTANCES, run=run.id)
        (member,) = open_members([run.id], artifacts.activations, "last")
        assert member.activations.key == tuned.key
        assert (member.name, member.training, member.step) == ("dpo, step 30", "/elsewhere/dpo", 30)
        run.rename("their DPO")
        assert open_members([run.id], artifacts.activations, "last")[0].name == "their DPO"

    def test_a_base_alone_says_what_could_be_set_beside_it(self, artifacts: Artifacts) -> None:
        base = write_set(artifacts.home, artifacts, model="nobody-tuned")
        with pytest.raises(InputError, match="There is nothing to set beside nobody-tuned yet"):
            open_members((), base, "last")


class TestOneFrame:
    @pytest.mark.parametrize("kind", ["separation", "pca"])
    @pytest.mark.parametrize("raw", [False, True])
    def test_of_two_it_is_the_frame_of_a_comparison(
        self, artifacts: Artifacts, members: list[Member], kind: str, raw: bool
    ) -> None:
        pair = [members[0], members[1]]
        found = series_view(pair, artifacts.prompts, LAYER, kind, raw=raw)
        base, tuned = (one.activations.layer(LAYER) for one in pair)
        expected = {"separation": separation_view, "pca": pca_view}[kind](
            base,
            pair[0].probes,
            LAYER,
            tuned=tuned,
            tuned_probes=pair[1].probes,
            fit=artifacts.prompts.in_split("test"),
            raw=raw,
        )
        assert expected.tuned is not None
        np.testing.assert_allclose(found.points[0], expected.base)
        np.testing.assert_allclose(found.points[1], expected.tuned)
        assert found.axes == expected.axes

    def test_fitted_on_base_no_further_model_moves_a_point(self, artifacts: Artifacts, members: list[Member]) -> None:
        few, all_ = (series_view(some, artifacts.prompts, LAYER, "pca").points for some in (members[:2], members))
        for one, same in zip(few, all_, strict=False):
            np.testing.assert_allclose(one, same)
        both = series_view(members, artifacts.prompts, LAYER, "pca", fit_on="both").points
        assert not np.allclose(both[0], all_[0])

    def test_in_the_frame_the_clouds_move_apart_step_by_step(self, artifacts: Artifacts, members: list[Member]) -> None:
        points = series_view(members, artifacts.prompts, LAYER).points
        shown = artifacts.prompts.in_split("test")
        harmful = artifacts.prompts.labels == 1
        gaps = [one[shown & harmful, 0].mean() - one[shown & ~harmful, 0].mean() for one in points]
        base, run, fifty, hundred = gaps
        assert base < fifty < hundred < run


class TestNumbers:
    def test_an_analysis_that_is_there_is_taken(self, made: Series, members: list[Member]) -> None:
        assert members[1].layers == made.compared.analysis.layers
        assert all(len(one.layers) == 6 for one in members)
        assert members[3].layers[LAYER].change is not None, "against base"

    def test_other_prompts_than_were_captured_are_refused(self, artifacts: Artifacts) -> None:
        changed = replace(artifacts.prompts, texts=("another", *artifacts.prompts.texts[1:]))
        with pytest.raises(InputError, match="have changed since they were captured"):
            analyse_members(artifacts.activations, [], changed, "last")

    def test_the_document_has_the_numbers_of_a_layer(self, members: list[Member]) -> None:
        document = series_document(members, LAYER)
        assert [one["step"] for one in document["sets"]] == [40, 50, 100]
        ratios = [one["layers"][0]["fisher_ratio"]["value"] for one in (document["base"], *document["sets"][1:])]
        assert ratios == sorted(ratios)
        assert document["sets"][0]["layers"][0]["layer"] == LAYER

    def test_the_command_prints_it(self, es2: Es2, artifacts: Artifacts, made: Series) -> None:
        about = ("--model", MODEL, "--prompts", artifacts.source)
        code, document = es2("series", *about, "--layer", "2", made.checkpoints[1].key)
        assert code == 0
        assert [(one["name"], one["step"]) for one in document["sets"]] == [("sft, step 100", 100)]
        assert es2("series", *about, "--layer", "9") == (
            2,
            {"error": f"Layer 9 is out of range: {MODEL} has layers 0 to 5.", "exit_code": 2},
        )
        code, document = es2("series", *about, "--position", "mean")
        assert code == 2
        assert "is not captured at mean" in document["error"] or "There is no model" in document["error"]

    def test_the_job_makes_what_is_missing(self, artifacts: Artifacts, made: Series) -> None:
        tuned = write_set(artifacts.home, artifacts, TUNED_DISTANCES, model="/z/checkpoint-3", base=MODEL)
        sets = [made.checkpoints[0].key, tuned.key]
        config = {"base": artifacts.activations.key, "prompts": str(artifacts.source), "position": "last", "sets": sets}
        result = JOBS["series"](config, lambda *_, **__: None, artifacts.home)
        assert result == {"activations": [artifacts.activations.key, *sets]}
        assert len(list((tuned.path / "derived").glob("*/analysis.json"))) == 1
