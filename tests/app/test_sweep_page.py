"""The page of sweeps without a browser: what it shows of a sweep, what its form starts, and what its buttons do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from app.views import sweep as view
from es2.core.errors import MachineError
from es2.jobs.job import Job
from es2.jobs.queue import create_job, list_jobs
from es2.workflow.sweeps import list_sweeps
from tests.builders import save_tiny_model, tiny_prompts, write_prompts
from tests.builders_sweep import write_sweep
from tests.figures import charts_of

PAGE = """
from app import artifacts, state
from app.text import sentences
from app.views import sweep

state.open_link(artifacts.existing)
with sentences():
    sweep.page()
state.mirror()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", n_layers=6)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "locks.csv", tiny_prompts(60))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    # One cache for all tests: the machine is measured once.
    monkeypatch.setenv("ES2_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def open_sweeps(model: Path, prompts: Path) -> Callable[..., AppTest]:
    def open_sweeps(**link: str) -> AppTest:
        at = AppTest.from_string(PAGE, default_timeout=120)
        for name, value in {"model": str(model), "prompts": str(prompts), **link}.items():
            at.query_params[name] = value
        at.run()
        assert not at.exception
        return at

    return open_sweeps


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were started, which are only laid down, and count as on their way."""
    found: list[Job] = []
    for module in ("app.sweep_form", "app.views.sweep"):
        monkeypatch.setattr(f"{module}.start", found.append)
    return found


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pages that were turned to; there is but one here."""
    found: list[str] = []
    monkeypatch.setattr("app.state.go", found.append)
    return found


def shown(at: AppTest) -> str:
    """Everything the page says, without the escapes of Markdown."""
    elements = [*at.markdown, *at.caption, *at.header, *at.subheader, *at.error]
    return "\n".join(element.value for element in elements).replace("\\", "")


def test_an_empty_home_explains_and_starts_what_the_command_line_would(
    open_sweeps: Callable[..., AppTest], started: list[Job], model: Path, prompts: Path
) -> None:
    at = open_sweeps()
    assert "Which layers, and at what price?" in shown(at)
    assert "At most" in shown(at), "the estimate"
    at.number_input(key="sweep_trials").set_value(3).run()
    at.checkbox(key="sweep_defence").check().run()
    at.button(key="start_sweep").click().run()
    assert not at.exception
    (job,) = started
    assert (job.config["sweep"]["trials"], job.config["sweep"]["defence"]) == (3, True)
    space = job.config["space"]
    assert list(space["searched"]) == ["layers", "objective", "kl_weight", "rate_factor", "rank"]
    assert (job.config["prompts"], space["fixed"]["model"]) == (str(prompts), str(model))
    assert space["fixed"]["alpha"] is None, "twice the rank"
    assert len(list_sweeps()) == 1


def test_what_is_not_searched_is_the_same_in_every_trial(
    open_sweeps: Callable[..., AppTest], started: list[Job]
) -> None:
    at = open_sweeps()
    at.session_state["sweep_settings"] = {"free": ["kl_weight"]}
    at.run()
    at.text_input(key="sweep_fixed_layers").set_value("1,2").run()
    at.text_input(key="sweep_kl_weights").set_value("2,20").run()
    at.button(key="start_sweep").click().run()
    (job,) = started
    space = job.config["space"]
    assert space["searched"] == {"kl_weight": [2.0, 20.0], "rate_factor": [1.0]}, "the rate is the automatic one"
    assert (space["fixed"]["layers"], space["fixed"]["rank"]) == ([1, 2], 16)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sweep_trials", 0, "trials must be a whole number"),
        ("sweep_layer_range", "0,9", "layers are 0 to 5"),
        ("sweep_kl_weights", "5", "a lower and a higher value"),
        ("sweep_objectives", "fishy", "Unknown objective"),
    ],
)
def test_what_is_wrong_stands_beside_a_closed_button(
    open_sweeps: Callable[..., AppTest], key: str, value: Any, words: str
) -> None:
    at = open_sweeps()
    next(one for one in [*at.number_input, *at.text_input] if one.key == key).set_value(value).run()
    assert words in shown(at)
    assert at.button(key="start_sweep").disabled
    assert not list_jobs()


def test_a_model_that_is_not_here_is_not_fetched_by_the_page(open_sweeps: Callable[..., AppTest]) -> None:
    at = open_sweeps(model="somebody/else")
    assert "not on this machine yet" in shown(at)


class TestShown:
    @pytest.fixture
    def sweep(self, model: Path, prompts: Path) -> Job:
        return write_sweep(str(model), str(prompts))

    def test_the_best_trial_is_shown_first_and_a_click_shows_another(
        self, sweep: Job, open_sweeps: Callable[..., AppTest]
    ) -> None:
        at = open_sweeps()
        assert set(charts_of(at)) >= {"sweep_front", "sweep_parallel", "sweep_pairs"}
        assert at.selectbox(key="sweep_trial_number").value == 0
        assert "Separation **+1.20** (fisher ratio ×3.3)" in shown(at)
        assert "without a point: trial 4 (failed)" in shown(at)
        at.selectbox(key="sweep_trial_number").set_value(4).run()
        assert "Memory ran out while tuning." in shown(at)

    def test_a_click_means_the_trial_of_the_point(self, sweep: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        changes: list[dict[str, Any]] = []
        session: dict[str, Any] = {"sweep_front": {"picked": ["trial", 3]}}
        monkeypatch.setattr("streamlit.session_state", session)
        monkeypatch.setattr("app.state.update", lambda **changed: changes.append(changed))
        view._pick(sweep.id, "sweep_front")
        session["sweep_front"] = {"picked": None}
        view._pick(sweep.id, "sweep_front")
        assert changes == [{"sweep": sweep.id, "trial": 3}], "a click beside the points changes nothing"

    def test_the_shown_trial_is_in_the_address(
        self, sweep: Job, open_sweeps: Callable[..., AppTest], model: Path, prompts: Path
    ) -> None:
        at = open_sweeps()
        assert "trial" not in at.query_params, "the best, whichever it will be"
        at.selectbox(key="sweep_trial_number").set_value(2).run()
        assert (at.query_params["sweep"], at.query_params["trial"]) == (sweep.id, "2")
        write_sweep(str(model), str(prompts))
        at = open_sweeps(sweep=sweep.id, trial="2")
        assert (at.selectbox(key="sweep_chosen").value, at.selectbox(key="sweep_trial_number").value) == (sweep.id, 2)
        other = next(job.id for job in list_sweeps() if job.id != sweep.id)
        at.selectbox(key="sweep_chosen").set_value(other).run()
        assert "trial" not in at.query_params, "the other sweep's own best is shown"
        assert at.selectbox(key="sweep_trial_number").value == 0

    @pytest.mark.parametrize(
        ("trial", "words"),
        [("9", "The sweep has no trial 9; trial 0 is shown."), ("x", "asks for trial 'x', which is no number")],
    )
    def test_a_trial_that_is_not_there_is_said(
        self, sweep: Job, open_sweeps: Callable[..., AppTest], trial: str, words: str
    ) -> None:
        at = open_sweeps(trial=trial)
        assert words in shown(at)
        assert at.selectbox(key="sweep_trial_number").value == 0

    def test_refusals_under_attack_are_shown_and_decide_which_is_best(
        self, open_sweeps: Callable[..., AppTest], model: Path, prompts: Path
    ) -> None:
        sweep = write_sweep(str(model), str(prompts), defended=True)
        at = open_sweeps()
        assert at.selectbox(key="sweep_trial_number").value == 2
        assert "Refuses 12 of 16 under attack (base 3) and 2 of 16 harmless (base 1)" in shown(at)
        assert "the fewer harmful prompts it refuses under attack at layers 2, 3." in shown(at)
        frame = view.take_away(sweep)[1]["Trials"]
        assert list(frame["refused under attack"])[:3] == [4, 2, 12]

    def test_its_settings_are_taken_into_the_form_of_a_fine_tune(
        self, sweep: Job, open_sweeps: Callable[..., AppTest], turned: list[str], model: Path
    ) -> None:
        at = open_sweeps()
        at.selectbox(key="sweep_trial_number").set_value(1).run()
        at.button(key="sweep_take").click().run()
        taken = at.session_state["launch_settings"]
        assert (taken["objective"], taken["kl_weight"], taken["rank"], taken["alpha"]) == ("fisher", 1.0, 8, 16)
        assert taken["steps"] == 8
        assert "replies" not in taken, "the run that is started now makes them, unlike a trial"
        assert at.session_state["launch_targets"] == {str(model): (2, 4)}
        assert turned == ["runs"]

    def test_one_opens_in_compare(self, sweep: Job, open_sweeps: Callable[..., AppTest], turned: list[str]) -> None:
        at = open_sweeps()
        at.button(key="sweep_compare").click().run()
        run = next(job for job in list_jobs(kind="finetune") if job.config["trial"] == 0)
        assert at.session_state["choice"].run == run.id
        assert turned == ["compare"]
        at.selectbox(key="sweep_trial_number").set_value(1).run()
        assert "Compare offers to do that" in shown(at), "it was not captured"

    def test_it_is_deleted_with_its_runs(self, sweep: Job, open_sweeps: Callable[..., AppTest]) -> None:
        at = open_sweeps()
        at.button(key="sweep_delete_confirm").click().run()
        assert not at.exception
        assert not list_jobs()
        assert "Which layers, and at what price?" in shown(at)

    def test_the_table_has_every_trial(self, sweep: Job) -> None:
        charts, tables = view.take_away(sweep)
        assert len(charts) == 3
        frame = tables["Trials"]
        assert list(frame["front"]) == [True, True, False, False, False]
        assert list(frame["layers"])[:2] == ["1, 3", "2, 4"]
        assert "refusals kept" not in frame, "the base refuses nothing"

    def test_the_table_has_the_refusals_of_a_base_that_refuses(self, model: Path, prompts: Path) -> None:
        _, tables = view.take_away(write_sweep(str(model), str(prompts), refusals=(0.25, 1.0, None, None, None)))
        assert list(tables["Trials"]["refusals kept"])[:2] == [0.25, 1.0]


def test_the_newest_is_shown_and_another_by_its_link(
    open_sweeps: Callable[..., AppTest], model: Path, prompts: Path
) -> None:
    older, newer = (write_sweep(str(model), str(prompts)) for _ in range(2))
    assert open_sweeps().selectbox(key="sweep_chosen").value == newer.id
    at = open_sweeps(sweep=older.id)
    assert at.selectbox(key="sweep_chosen").value == older.id
    assert older.id in at.query_params["sweep"], "and stays in the address"
    at = open_sweeps(sweep="20260101-000000-000000-sweep-abcdef")
    assert "There is no sweep 20260101" in shown(at)


def test_a_failed_one_says_why_and_goes_on(
    open_sweeps: Callable[..., AppTest], started: list[Job], model: Path, prompts: Path
) -> None:
    sweep = write_sweep(str(model), str(prompts), outcome=MachineError("The disk is full."))
    at = open_sweeps()
    assert "The disk is full." in shown(at)
    at.button(key="sweep_resume").click().run()
    assert started == [sweep]
    assert sweep.ending() is None, "its end was removed"


def test_one_that_runs_is_shown_live_and_cancelled(
    open_sweeps: Callable[..., AppTest], model: Path, prompts: Path
) -> None:
    sweep = write_sweep(str(model), str(prompts), outcome=MachineError("The disk is full."))
    (sweep.path / "result.json").unlink()
    (sweep.path / "heartbeat.json").unlink()  # as one that was created and waits for its turn
    helper = create_job("sweep", {"of": sweep.id, "model": str(model), "prompts": str(prompts)})
    at = open_sweeps()
    assert not [button for button in at.button if button.key in ("sweep_resume", "sweep_delete_confirm")]
    at.button(key=f"cancel_page_{sweep.id}").click().run()
    assert (sweep.path / "cancel").exists()
    assert (helper.path / "cancel").exists()
