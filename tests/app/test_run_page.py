"""The page of runs without a browser: what it shows for which runs, and what its buttons do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from app import launch, state
from es2.cli import main as cli
from es2.jobs.job import Job
from es2.jobs.queue import create_job, list_jobs, open_job
from es2.jobs.running import run_job
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.store.film import FILM, write_frame
from es2.store.sources import CHAT_TEMPLATE, PLAIN_TEXT
from es2.training.config import FinetuneConfig
from es2.workflow.runs import list_runs
from tests.builders import save_tiny_model, tiny_prompts, write_prompts
from tests.builders_evaluation import REFUSES_LESS, write_replies
from tests.figures import charts_of, checked

PAGE = """
import streamlit as st
from app import artifacts, state
from app.text import sentences
from app.views import runs

state.open_link(artifacts.existing)
with sentences():
    runs.page()
state.mirror()
"""
VALIDATED = {"validation_fisher_ratio": 1.5, "validation_mean_difference_margin": 0.2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", n_layers=6)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "locks.csv", tiny_prompts(60))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    # One cache for all tests: the machine is measured once.
    monkeypatch.setenv("ES2_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return tmp_path


@pytest.fixture
def open_runs(model: Path, prompts: Path) -> Callable[[], AppTest]:
    def open_runs() -> AppTest:
        at = AppTest.from_string(PAGE, default_timeout=60)
        at.query_params["model"] = str(model)
        at.query_params["prompts"] = str(prompts)
        at.run()
        assert not at.exception
        return at

    return open_runs


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What was started, which is only laid down, and counts as on its way."""
    found: list[tuple[str, dict[str, Any]]] = []

    def launch(kind: str, config: dict[str, Any]) -> Job:
        found.append((kind, dict(config)))
        return create_job(kind, config)

    monkeypatch.setattr("app.jobs_panel.launch", launch)
    return found


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pages that were turned to; there is but one here."""
    found: list[str] = []
    monkeypatch.setattr("app.state.go", found.append)
    return found


def ended(
    model: Path,
    prompts: Path,
    outcome: Callable[..., dict[str, Any]] | Exception,
    of: dict[str, Any] | None = None,
    **changes: Any,
) -> Job:
    """A run (`of` some sweep) that has ended, by the real machinery with a stand-in for the work."""
    config = FinetuneConfig(layers=(1, 3), model=str(model), steps=4, **changes)
    job = create_job("finetune", config.to_dict() | {"prompts": str(prompts)} | (of or {}))

    def task(settings: dict[str, Any], report: Any, folder: Path) -> dict[str, Any]:
        for step in range(1, 5):
            numbers = {"loss": 1.0 / step, "separation": -1.0 / step, "kl_prompt": 0.01 * step, "kl_reply": 0.02 * step}
            report("finetune", step, 4, **numbers, **(VALIDATED if step % 2 == 0 else {}))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome(folder)

    run_job(job.path, {"finetune": task})
    return job


def result(verdict: str = "separated", **changes: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: (
        {
            "run": folder.name,
            "status": "done",
            "verdict": verdict,
            "verdict_reason": "Layer 1: the clouds stand *further* apart.",
            "steps": 4,
            "target_layers": [1, 3],
            "kl_harmless_test": {"prompt": 0.0123, "reply": 0.0456},
            "activations": {"base": "a" * 24, "tuned": "b" * 24},
        }
        | changes
    )


def film(job: Job, prompts: PromptSet, steps: Sequence[int] = (0, 2, 4)) -> None:
    """A film of the `validation` prompts, as the fine-tune of the run would have left it."""
    held_out = prompts.select(prompts.in_split("validation"))
    for step in steps:
        embeddings = np.random.default_rng(step).normal(size=(2, len(held_out), 8)).astype(np.float32)
        about = {
            "layers": (1, 3),
            "labels": held_out.labels,
            "texts": held_out.texts,
            "numbers": {"mean_difference_margin": 0.1},
        }
        write_frame(job.path / FILM, step, embeddings, **about)


def shown(at: AppTest) -> str:
    """Everything the page says, without the escapes of Markdown."""
    elements = [*at.markdown, *at.caption, *at.subheader, *at.warning, *at.error]
    return "\n".join(element.value for element in elements).replace("\\", "")


def keys(at: AppTest) -> set[str]:
    return {button.key for button in at.button}


def clicked(layer: int) -> dict[str, Any]:
    """What the strip reports for a click on a layer."""
    return {"picked": ["target", layer]}


class TestForm:
    def test_an_empty_home_explains_and_offers_to_start(self, open_runs: Callable[[], AppTest]) -> None:
        at = open_runs()
        assert "Nothing was tuned yet" in shown(at)
        assert not at.button(key="start_finetune").disabled
        assert at.multiselect(key="targets").value == [2, 4], "a guess by depth, and the page says so"
        assert "not analysed" in shown(at)

    def test_starting_lays_down_what_the_command_line_would(
        self, open_runs: Callable[[], AppTest], launched: list, turned: list[str], model: Path, prompts: Path
    ) -> None:
        at = open_runs()
        at.number_input(key="launch_steps").set_value(7).run()
        at.number_input(key="launch_learning_rate").set_value(1e-3).run()
        at.segmented_control(key="launch_method").set_value("full").run()
        at.checkbox(key="launch_replies").uncheck().run()
        at.multiselect(key="targets").set_value([1, 3]).run()
        typed = {"objective": "1.0*margin+0.5*fisher"}  # AppTest chooses, but does not type
        at.session_state["launch_settings"] = at.session_state["launch_settings"] | typed
        at.run()
        at.button(key="start_finetune").click().run()
        expected = FinetuneConfig(
            layers=(1, 3),
            model=str(model),
            steps=7,
            learning_rate=1e-3,
            method="full",
            objective="1.0*margin+0.5*fisher",
            replies=False,
        )
        assert launched == [("finetune", expected.to_dict() | {"prompts": str(prompts)})]
        assert turned == ["runs"]

    def test_a_second_click_starts_nothing(
        self, open_runs: Callable[[], AppTest], launched: list, turned: list[str]
    ) -> None:
        first, second = open_runs(), open_runs()
        first.button(key="start_finetune").click().run()
        second.button(key="start_finetune").click().run()
        assert len(launched) == 1
        assert len(list_jobs()) == 1

    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            ("launch_steps", 0, "steps must be a whole number"),
            ("launch_learning_rate", -1.0, "learning_rate must be a positive number"),
            ("targets", [], "No target layer is given"),
        ],
    )
    def test_what_is_wrong_stands_beside_a_closed_button(
        self, open_runs: Callable[[], AppTest], key: str, value: Any, words: str
    ) -> None:
        at = open_runs()
        widgets = [*at.number_input, *at.selectbox, *at.multiselect]
        next(widget for widget in widgets if widget.key == key).set_value(value).run()
        assert words in shown(at)
        assert at.button(key="start_finetune").disabled

    def test_three_layers_have_to_be_meant(
        self, open_runs: Callable[[], AppTest], launched: list, turned: list
    ) -> None:
        at = open_runs()
        at.multiselect(key="targets").set_value([1, 2, 3]).run()
        assert "collapse" in at.warning[0].value
        assert at.button(key="start_finetune").disabled
        at.checkbox(key="launch_allow_many_layers").check().run()
        assert not at.button(key="start_finetune").disabled
        at.button(key="start_finetune").click().run()
        assert launched[0][1]["allow_many_layers"] is True
        assert launched[0][1]["layers"] == [1, 2, 3]

    def test_two_layers_again_take_the_permission_back(
        self, open_runs: Callable[[], AppTest], launched: list, turned: list
    ) -> None:
        at = open_runs()
        at.multiselect(key="targets").set_value([1, 2, 3]).run()
        at.checkbox(key="launch_allow_many_layers").check().run()
        at.multiselect(key="targets").set_value([1, 2]).run()
        at.button(key="start_finetune").click().run()
        assert launched[0][1]["allow_many_layers"] is False

    def test_the_estimate_and_what_does_not_fit(
        self, open_runs: Callable[[], AppTest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from es2.models.machine import Machine

        assert "of memory" in shown(open_runs())
        monkeypatch.setattr("es2.workflow.plan.this_machine", lambda device=None: Machine("cpu", 1e9, 0.5))
        at = open_runs()
        assert "0.5 GB are free" in at.warning[0].value
        assert not at.button(key="start_finetune").disabled, "it is the person's machine"

    def test_settings_survive_a_closed_form(self, open_runs: Callable[[], AppTest], model: Path, prompts: Path) -> None:
        ended(model, prompts, result())
        at = open_runs()
        assert "start_finetune" not in keys(at), "with runs there, the form is one click away"
        at.button(key="new_run").click().run()
        at.number_input(key="launch_steps").set_value(9).run()
        at.button(key="new_run").click().run()
        at.button(key="new_run").click().run()
        assert at.number_input(key="launch_steps").value == 9


class TestTargets:
    @pytest.fixture
    def session(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        found: dict[str, Any] = {}
        monkeypatch.setattr("app.state.st.session_state", found)
        return found

    def test_a_click_takes_a_layer_in_and_a_second_one_out(self, session: dict[str, Any]) -> None:
        for layer, expected in ((5, (2, 4, 5)), (2, (4, 5)), (5, (4,)), (0, (0, 4))):
            session["strip"] = clicked(layer)
            state.toggle_target("strip", "m", (2, 4))
            assert state.targets("m", (2, 4)) == expected

    def test_a_redrawn_strip_reports_nothing_and_changes_nothing(self, session: dict[str, Any]) -> None:
        session["strip"] = {"picked": None}
        state.toggle_target("strip", "m", (2, 4))
        assert state.targets("m", (2, 4)) == (2, 4)

    def test_another_model_has_its_own(self, session: dict[str, Any]) -> None:
        state.take_targets("m", [3, 1])
        assert state.targets("m", (0,)) == (1, 3)
        assert state.targets("other", (0,)) == (0,)

    def test_the_strip_marks_them(self) -> None:
        figure = checked(launch.target_strip)(6, (1, 3), (2, 4), None)
        by_name = {trace.name: trace for trace in figure.data}
        assert list(by_name["target layers"].x) == [1, 3]
        assert list(by_name["preset"].x) == [2, 4]
        assert [tuple(data) for data in figure.data[-1].customdata] == [("target", layer) for layer in range(6)]
        assert "take it out" in figure.data[-1].hovertext[1]
        assert "take it in" in figure.data[-1].hovertext[2]
        assert [shape.x0 < layer < shape.x1 for shape, layer in zip(figure.layout.shapes, (1, 3), strict=True)]


class TestList:
    def test_a_finished_run(self, open_runs: Callable[[], AppTest], model: Path, prompts: Path) -> None:
        job = ended(model, prompts, result(), objective="margin")
        at = open_runs()
        page = shown(at)
        for words in ("margin at 1, 3", "tiny-llama", "locks.csv", "4 of 4 steps", "0.012 / 0.046"):
            assert words in page
        assert {f"open_{job.id}", f"against_{job.id}", f"rename_{job.id}", f"delete_{job.id}"} <= keys(at)
        assert f"resume_{job.id}" not in keys(at)

    def test_what_became_of_behaviour(self, open_runs: Callable[[], AppTest], model: Path, prompts: Path) -> None:
        job = ended(model, prompts, result())
        at = open_runs()
        badges = [one.value for one in at.markdown if "badge[" in one.value]
        assert any("separated" in one and "green" in one for one in badges)
        assert "behaviour not measured" in shown(at)
        assert not at.warning
        write_replies(job, "requests", *REFUSES_LESS)
        at = open_runs()
        badges = [one.value for one in at.markdown if "badge[" in one.value]
        assert any("refuses less" in one and "red" in one for one in badges)
        assert not any("green" in one for one in badges), "no part of it looks like a success"
        assert "Refuses less. The tuned model refuses fewer" in at.warning[0].value.replace("\\", "")
        at.button(key=f"curves_{job.id}").click().run()
        assert "**Separated, refuses less.**" in shown(at)
        assert len(at.warning) == 2, "in the list and in the dialog"

    def test_open_turns_to_its_comparison(
        self, open_runs: Callable[[], AppTest], model: Path, prompts: Path, turned: list[str]
    ) -> None:
        job = ended(model, prompts, result())
        at = open_runs()
        at.button(key=f"open_{job.id}").click().run()
        assert at.session_state["choice"].run == job.id
        assert at.session_state["choice"].against is None
        assert turned == ["compare"]

    def test_a_failure_is_its_sentence(self, open_runs: Callable[[], AppTest], model: Path, prompts: Path) -> None:
        from es2.core.errors import MachineError

        job = ended(model, prompts, MachineError("The *lock* is stuck; oil it."))
        at = open_runs()
        assert "The *lock* is stuck; oil it." in shown(at)
        assert f"open_{job.id}" not in keys(at)
        assert f"resume_{job.id}" in keys(at)

    def test_a_stopped_run_has_its_reason_and_its_comparison(
        self, open_runs: Callable[[], AppTest], model: Path, prompts: Path
    ) -> None:
        job = ended(model, prompts, result("collapsed", status="stopped", reason="The KL was too large."))
        at = open_runs()
        assert "The KL was too large." in shown(at)
        assert f"open_{job.id}" in keys(at)
        assert f"resume_{job.id}" not in keys(at), "it would stop at once again"

    def test_resume(
        self, open_runs: Callable[[], AppTest], model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from es2.core.errors import MachineError

        job = ended(model, prompts, MachineError("No memory."))
        started: list[str] = []
        monkeypatch.setattr("app.views.runs.start", lambda job: started.append(job.id))
        open_runs().button(key=f"resume_{job.id}").click().run()
        assert started == [job.id]
        assert not (job.path / "result.json").exists(), "its end was taken back"

    def test_rename(self, open_runs: Callable[[], AppTest], model: Path, prompts: Path) -> None:
        job = ended(model, prompts, result())
        at = open_runs()
        at.button(key=f"rename_{job.id}").click().run()
        at.text_input(key=f"name_{job.id}").set_value("**the** first")
        at.button(key="rename_confirm").click().run()
        assert open_job(job.id).name == "**the** first"
        assert "**the** first" in shown(at)
        assert "rename_confirm" not in keys(at), "the dialog is closed"

    def test_a_name_that_cannot_be_is_a_sentence(
        self, open_runs: Callable[[], AppTest], model: Path, prompts: Path
    ) -> None:
        job = ended(model, prompts, result())
        at = open_runs()
        at.button(key=f"rename_{job.id}").click().run()
        at.text_input(key=f"name_{job.id}").set_value("x" * 100)
        at.button(key="rename_confirm").click().run()
        assert "at most 80 characters" in shown(at)
        assert open_job(job.id).name == ""

    def test_a_run_of_a_model_without_a_chat_template(
        self, open_runs: Callable[[], AppTest], model: Path, prompts: Path
    ) -> None:
        ended(model, prompts, result(given_as=CHAT_TEMPLATE))
        assert "plain text" not in shown(open_runs())
        ended(model, prompts, result(given_as=PLAIN_TEXT))
        assert "plain text" in shown(open_runs())

    def test_the_command_line_says_it_too(
        self, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        job = ended(model, prompts, result())

        def es2(*arguments: str) -> tuple[str, str]:
            capsys.readouterr()
            monkeypatch.setattr(sys, "argv", ["es2", *arguments])
            with pytest.raises(SystemExit) as end:
                cli.main()
            assert not end.value.code
            return capsys.readouterr()

        row = json.loads(es2("runs", "--json")[0])["runs"][0]
        assert (row["verdict"], row["behaviour"], row["behaviour_warning"]) == ("separated", None, None)
        assert row["outcome"] == "separated, behaviour not measured"
        write_replies(job, "requests", *REFUSES_LESS)
        (row,) = json.loads(es2("runs", "--json")[0])["runs"]
        one = json.loads(es2("runs", "show", job.id, "--json")[0])
        for document in (row, one):
            assert (document["verdict"], document["behaviour"]) == ("separated", "refuses less")
            assert document["outcome"] == "separated, refuses less"
            assert document["behaviour_warning"].startswith("Refuses less. ")
        said = " ".join(es2("runs")[0].split())
        assert f"{job.id}: Refuses less. The tuned model refuses fewer" in said

    def test_the_command_line_renames_too(
        self, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        job = ended(model, prompts, result())

        def es2(*arguments: str) -> tuple[int, dict[str, Any]]:
            capsys.readouterr()
            monkeypatch.setattr(sys, "argv", ["es2", "runs", *arguments, "--json"])
            with pytest.raises(SystemExit) as end:
                cli.main()
            return int(end.value.code or 0), json.loads(capsys.readouterr().out)

        code, document = es2("rename", job.id, "the first")
        assert (code, document["name"], open_job(job.id).name) == (0, "the first", "the first")
        assert es2()[1]["runs"][0]["name"] == "the first"
        for arguments in (("rename", job.id), ("show", job.id, "surplus")):
            code, document = es2(*arguments)
            assert code == 2
            assert "es2 runs rename ID NAME" in document["error"]
        assert es2("rename", job.id, "")[0] == 0
        assert open_job(job.id).name == ""

    def test_delete_asks_first(self, open_runs: Callable[[], AppTest], model: Path, prompts: Path) -> None:
        job, kept = (ended(model, prompts, result()) for _ in range(2))
        at = open_runs()
        at.button(key=f"delete_{job.id}").click().run()
        assert len(list_runs()) == 2
        at.button(key="delete_refuse").click().run()
        assert len(list_runs()) == 2
        at.button(key=f"delete_{job.id}").click().run()
        at.button(key="delete_confirm").click().run()
        assert [run.id for run in list_runs()] == [kept.id]
        assert f"open_{job.id}" not in keys(at)

    def test_two_runs_are_compared_after_a_job(
        self, open_runs: Callable[[], AppTest], model: Path, prompts: Path, launched: list, turned: list[str]
    ) -> None:
        first, second = (ended(model, prompts, result(), seed=seed) for seed in (0, 1))
        at = open_runs()
        at.button(key=f"against_{second.id}").click().run()
        assert at.selectbox(key="against_other").options[0].startswith(f"{FinetuneConfig(layers=()).objective} at 1, 3")
        at.button(key="against_confirm").click().run()
        expected = {"model": str(model), "prompts": str(prompts), "position": "last"}
        assert launched == [("prepare", expected | {"run": second.id, "against": first.id})]
        assert (at.session_state["choice"].run, at.session_state["choice"].against) == (second.id, first.id)
        assert turned == ["compare"]

    def test_a_run_alone_has_nothing_to_be_compared_with(
        self, open_runs: Callable[[], AppTest], model: Path, prompts: Path, tmp_path: Path
    ) -> None:
        job = ended(model, prompts, result())
        ended(model, write_prompts(tmp_path / "other.csv", tiny_prompts(61)), result())
        at = open_runs()
        at.button(key=f"against_{job.id}").click().run()
        assert "no other finished run" in shown(at)
        assert "against_confirm" not in keys(at)

    def test_lost_prompts_are_said(self, open_runs: Callable[[], AppTest], model: Path, tmp_path: Path) -> None:
        gone = write_prompts(tmp_path / "gone.csv", tiny_prompts(60))
        ended(model, gone, result())
        gone.unlink()
        assert "no longer at" in shown(open_runs())

    def test_the_curves_of_a_former_run(self, open_runs: Callable[[], AppTest], model: Path, prompts: Path) -> None:
        job = ended(model, prompts, result())
        at = open_runs()
        assert not charts_of(at)
        at.button(key=f"curves_{job.id}").click().run()
        assert len(charts_of(at)) == 4
        assert "further* apart" in shown(at)

    def test_the_film_of_a_former_run(self, open_runs: Callable[[], AppTest], model: Path, prompts: Path) -> None:
        job = ended(model, prompts, result(best_step=4))
        film(job, load_prompts(str(prompts)))
        at = open_runs()
        at.button(key=f"curves_{job.id}").click().run()
        assert len(charts_of(at)) == 5
        (figure,) = charts_of(at)["film_former_figure"]
        assert [frame["name"] for frame in figure["frames"]] == ["0", "2", "4"]
        (cloud, _) = [trace for trace in figure["data"] if trace["name"] == "harmful"]
        assert cloud["hovertext"][0].startswith("Break lock number")
        assert "The weights of step 4 were kept" in shown(at)
        assert [one.proto.label for one in at.get("download_button")] == ["Save the film"]
        at.toggle(key="film_former_raw").set_value(True).run()
        assert "own units" in charts_of(at)["film_former_figure"][0]["layout"]["xaxis"]["title"]["text"]

    def test_a_film_without_its_prompts_is_shown_all_the_same(
        self, open_runs: Callable[[], AppTest], model: Path, prompts: Path, tmp_path: Path
    ) -> None:
        gone = write_prompts(tmp_path / "gone.csv", tiny_prompts(60))
        job = ended(model, gone, result())
        film(job, load_prompts(str(gone)))
        gone.unlink()
        at = open_runs()
        at.button(key=f"curves_{job.id}").click().run()
        (figure,) = charts_of(at)["film_former_figure"]
        (cloud, _) = [trace for trace in figure["data"] if trace["name"] == "harmful"]
        assert set(cloud["hovertext"]) == {"a prompt that the prompt set does not hold any more"}

    def test_its_curves_show_what_became_of_refusals(
        self, open_runs: Callable[[], AppTest], model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(VALIDATED, "validation_refusals_kept", 0.25)
        monkeypatch.setitem(VALIDATED, "validation_broken_first", 0.125)
        job = ended(model, prompts, result())
        at = open_runs()
        at.button(key=f"curves_{job.id}").click().run()
        assert len(charts_of(at)) == 6
        assert "the base's refusals" in shown(at)

    def test_many_runs_come_in_portions(self, open_runs: Callable[[], AppTest], model: Path, prompts: Path) -> None:
        for seed in range(23):
            ended(model, prompts, result(), seed=seed)
        at = open_runs()
        assert len([key for key in keys(at) if key.startswith("open_")]) == 20
        at.button(key="more_runs").click().run()
        assert len([key for key in keys(at) if key.startswith("open_")]) == 23


class TestLive:
    @pytest.fixture
    def of(self) -> dict[str, Any]:
        """The sweep of the run, and its trial; none here."""
        return {}

    @pytest.fixture
    def running(self, model: Path, prompts: Path, of: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Job:
        """A run whose process is in the middle of its steps."""
        job = ended(model, prompts, result(), of)
        end = (job.path / "result.json").rename(job.path / "kept.json")
        assert end.exists()
        status = Job.status
        monkeypatch.setattr(
            Job, "status", lambda one: status(one) if (one.path / "result.json").exists() else "running"
        )
        return job

    def test_progress_curves_and_cancel(self, open_runs: Callable[[], AppTest], running: Job) -> None:
        at = open_runs()
        assert len(charts_of(at)) == 4
        texts = [element.proto.text.replace("\\", "") for element in at.get("progress")]
        assert any("Fine-tuning, 4 of 4 steps" in words for words in texts)
        assert "**Fine-tune**" in shown(at)
        at.button(key=f"cancel_page_{running.id}").click().run()
        assert (running.path / "cancel").exists()

    def test_its_film_so_far_from_its_end(self, open_runs: Callable[[], AppTest], running: Job, prompts: Path) -> None:
        film(running, load_prompts(str(prompts)), steps=(0,))
        assert "begins with the first look" in shown(open_runs())
        film(running, load_prompts(str(prompts)))
        (figure,) = charts_of(open_runs())[f"{running.id.rpartition('-')[2]}_figure"]
        assert figure["layout"]["sliders"][0]["active"] == 2

    def test_its_end_opens_the_comparison_for_those_who_watch(
        self, open_runs: Callable[[], AppTest], running: Job, turned: list[str]
    ) -> None:
        watching, elsewhere = open_runs(), open_runs()
        elsewhere.button(key="new_run").click().run()
        assert turned == []
        (running.path / "kept.json").rename(running.path / "result.json")
        elsewhere.run()
        assert turned == [], "who fills in the form is left alone"
        watching.run()
        assert turned == ["compare"]
        assert watching.session_state["choice"].run == running.id
        open_runs()
        assert turned == ["compare"], "and nobody else is taken there"

    @pytest.mark.parametrize("of", [{"sweep": "20260101-000000-000000-sweep-abcdef", "trial": 3}])
    def test_the_end_of_a_sweeps_trial_opens_nothing(
        self, open_runs: Callable[[], AppTest], running: Job, turned: list[str]
    ) -> None:
        watching = open_runs()
        (running.path / "kept.json").rename(running.path / "result.json")
        watching.run()
        assert turned == [], "the next trial begins"

    def test_a_run_that_is_under_way_is_not_in_the_list(self, open_runs: Callable[[], AppTest], running: Job) -> None:
        assert f"delete_{running.id}" not in keys(open_runs())
