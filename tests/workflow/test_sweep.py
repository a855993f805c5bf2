"""A sweep from end to end on a tiny model: what it tries, what it shares, and that it goes on where it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from peft import PeftModel

from es2.core.errors import MachineError
from es2.core.progress import silent
from es2.jobs.queue import list_jobs, open_job
from es2.jobs.running import HEARTBEAT_SECONDS
from es2.models import loading
from es2.models.machine import Machine
from es2.prompts.loading import load_prompts
from es2.training import base as training_base
from es2.training import workload
from es2.training.config import FinetuneConfig
from es2.training.finetune import finetune
from es2.training.sampling import make_schedule
from es2.training.workload import Workload
from es2.workflow import sweep as module
from es2.workflow.runs import config_of
from es2.workflow.study import JOURNAL, _storage
from es2.workflow.sweep_defence import Defence
from es2.workflow.sweep_plan import sweep_seconds
from es2.workflow.sweep_space import SEARCHED, SweepConfig, make_space
from es2.workflow.sweeps import goals, list_sweeps, open_sweep, read_trials, sweep_document, write_trials
from tests.builders import save_tiny_model, tiny_prompts, write_prompts
from tests.builders_sweep import write_sweep

Es2 = Callable[..., tuple[int, dict[str, Any]]]

pytestmark = pytest.mark.usefixtures("one_thread", "places")

SHORT = ("--steps", "2", "--pairs-per-step", "4", "--validate-every", "1", "--validation-prompts", "4")
SHORT += ("--reply-tokens", "4", "--warmup-steps", "0", "--kl-budget", "5", "--device", "cpu")

ALL = ("--layers", "0,1", "--objective", "fisher", "--kl-weight", "1", "--learning-rate", "1e-3", "--rank", "2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "tiny-llama", initializer_range=0.1)
    write_prompts(folder / "locks.csv", tiny_prompts(60))
    return folder


@pytest.fixture
def about(home: Path) -> tuple[str, ...]:
    return ("--model", str(home / "tiny-llama"), "--prompts", str(home / "locks.csv"))


def runs_of(sweep: str) -> list[Any]:
    return [job for job in list_jobs(kind="finetune") if job.config.get("sweep") == sweep]


class TestFromEndToEnd:
    @pytest.fixture(scope="class")
    def counted(self) -> dict[str, int]:
        return {}

    @pytest.fixture
    def made(
        self, es2: Es2, about: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, counted: dict[str, Any]
    ) -> dict[str, Any]:
        """One sweep for all tests of this class, with how often the base was loaded and measured."""
        if "document" not in counted:
            counts = {"measured": 0}
            original = Workload._measure_base

            def measure(*arguments: Any) -> None:
                counts["measured"] += 1
                original(*arguments)

            monkeypatch.setattr(Workload, "_measure_base", measure)
            code, document = es2("sweep", *about, *SHORT, "--trials", "3", "--seed", "1")
            assert code == 0, document
            counted |= {"document": document, **counts}
        return counted["document"]

    def test_every_trial_is_an_ordinary_run(self, made: dict[str, Any], home: Path) -> None:
        assert made["status"] == "done"
        assert [trial["number"] for trial in made["trials"]] == [0, 1, 2]
        for trial in made["trials"]:
            run = open_job(trial["run"])
            assert run.status() in ("done", "stopped")
            assert run.name == f"Trial {trial['number']} of sweep {made['sweep'].rpartition('-')[2]}"
            config = config_of(run)
            assert list(config.layers) == trial["settings"]["layers"]
            assert config.alpha == 2 * config.rank
            for name in ("objective", "kl_weight", "rank"):
                assert getattr(config, name) == trial["settings"][name]
            assert not config.replies
            assert (run.path / "adapter" / "adapter_model.safetensors").is_file()

    def test_the_first_has_the_shipped_defaults(self, made: dict[str, Any]) -> None:
        settings = made["trials"][0]["settings"]
        for name in ("objective", "kl_weight"):
            assert settings[name] == FinetuneConfig.model_fields[name].default
        assert settings["rate_factor"] == 1
        assert config_of(open_job(made["trials"][0]["run"])).learning_rate is None, "automatic, as shipped"
        assert len({str(trial["settings"]) for trial in made["trials"]}) == 3

    def test_learning_rates_are_multiples_of_the_automatic_one(
        self, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        trial = made["trials"][1]
        run = open_job(trial["run"])
        peak = config_of(run).learning_rate
        automatic = []
        monkeypatch.setattr(FinetuneConfig, "learning_rate_at", lambda _, step, peak: automatic.append(peak) or peak)
        config = config_of(run).replace(learning_rate=None, steps=1)
        finetune(config, load_prompts(run.config["prompts"]), tmp_path)
        assert trial["settings"]["rate_factor"] != 1
        assert peak == pytest.approx(trial["settings"]["rate_factor"] * automatic[0], rel=0.006)

    def test_the_base_is_loaded_and_measured_once(self, made: dict[str, Any], counted: dict[str, Any]) -> None:
        assert counted["measured"] == 1

    def test_its_numbers_are_those_of_the_runs(self, made: dict[str, Any]) -> None:
        for trial in made["trials"]:
            numbers, result = trial["numbers"], open_job(trial["run"]).result()
            assert result is not None
            point = next(one for one in result["validations"] if one["step"] == numbers["step"])
            assert numbers["kl"] == max(point["kl_prompt"], point["kl_reply"])
            assert numbers["kept"] == (result["best_step"] == numbers["step"])

    def test_the_front_opens_in_compare(self, made: dict[str, Any], es2: Es2) -> None:
        from es2.workflow.compared import AbsentError, find_comparison

        assert made["front"], "the budget is wide"
        assert made["best"]["number"] in made["front"]
        assert sum(trial["verdict"] is not None for trial in made["trials"]) in (1, 2), "half of them at most"
        for trial in made["trials"]:
            run = open_job(trial["run"])
            prompts = load_prompts(run.config["prompts"]).measured()
            if trial["verdict"] is not None:
                assert find_comparison(run, prompts).run == run.id
            else:
                with pytest.raises(AbsentError, match="was not compared with its base yet; `es2 analyze"):
                    find_comparison(run, prompts)

    def test_one_that_was_left_out_opens_once_it_was_asked_for(
        self, made: dict[str, Any], home: Path, about: tuple[str, ...], es2: Es2, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from es2.workflow.compared import find_comparison

        monkeypatch.setattr(module, "most_compared", lambda _: 0)
        code, document = es2(
            "sweep", *about, *SHORT, "--trials", "1", "--layers", "0,1", "--objective", "fisher", "--rank", "2"
        )
        assert code == 0, document
        (trial,) = document["trials"]
        assert trial["verdict"] is None
        assert es2("runs", "show", trial["run"])[0] == 0
        assert es2("analyze", *about, "--run", trial["run"])[0] == 0
        run = open_job(trial["run"])
        assert find_comparison(run, load_prompts(run.config["prompts"]).measured()).targets == (0, 1)

    def test_a_trial_comes_to_what_it_comes_to_alone(self, made: dict[str, Any], tmp_path: Path) -> None:
        trial = made["trials"][-1]
        run = open_job(trial["run"])
        alone = finetune(config_of(run), load_prompts(run.config["prompts"]), tmp_path)
        losses = [event["loss"] for event in run.events()[0] if event.get("stage") == "finetune"]
        assert losses == pytest.approx(alone.losses, rel=1e-5, abs=1e-6)
        result = run.result()
        assert result is not None
        for point, other in zip(result["validations"], alone.to_dict()["validations"], strict=True):
            for layer, numbers in other["layers"].items():
                assert point["layers"][layer] == pytest.approx(numbers, rel=1e-4, abs=1e-5)

    def test_a_sweep_that_is_done_is_shown_and_not_made_again(self, made: dict[str, Any], es2: Es2) -> None:
        code, document = es2("sweep", "show", made["sweep"])
        assert (code, document["trials"], document["front"]) == (0, made["trials"], made["front"])
        code, document = es2("sweep", "resume", made["sweep"])
        assert code == 2
        assert "is done" in document["error"]
        code, document = es2("sweep", "list")
        assert [row["n_ended"] for row in document["sweeps"] if row["sweep"] == made["sweep"]] == [3]

    def test_the_table_for_people(
        self, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from es2.cli import main as cli

        monkeypatch.setattr(sys, "argv", ["es2", "sweep", "show", made["sweep"]])
        with pytest.raises(SystemExit):
            cli.main()
        out = " ".join(capsys.readouterr().out.split())
        best = made["best"]
        assert f"Most separation within the KL budget of 5: trial {best['number']}, layers " in out
        assert f"Run {best['run']}" in out
        assert out.count("◀") == 1 + len(made["front"])


def test_trials_with_more_that_lost_behaviour_are_named_beside_the_best(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from es2.cli import main as cli

    sweep = write_sweep()
    trials = read_trials(sweep.path)
    trials[0]["numbers"]["lost"] = trials[2]["numbers"]["lost"] = "breaks replies"
    write_trials(sweep.path, trials)
    monkeypatch.setattr(sys, "argv", ["es2", "sweep", "show", sweep.id])
    with pytest.raises(SystemExit):
        cli.main()
    out = " ".join(capsys.readouterr().out.split())
    assert "Most separation within the KL budget of 0.1: trial 1, layers 2,4" in out
    assert "With more, but behaviour of the base lost: trial 0." in out, "2 has less than the best"


def test_as_many_as_usual_take_three_quarters_of_an_hour_at_most(tmp_path: Path) -> None:
    """On the default model and two cores as those that the estimates were measured on; nothing is run."""
    given: dict[str, Any] = {
        name: None if name in (*SEARCHED, "alpha") else field.default
        for name, field in FinetuneConfig.model_fields.items()
    }
    space = make_space(SweepConfig(), given, 30)
    machine = Machine("cpu", 2 * 93e9, 8.0)
    seconds = sweep_seconds(space, SweepConfig().trials, load_prompts("builtin"), machine)
    assert 20 * 60 < seconds <= 45 * 60
    assert sweep_seconds(space, 48, load_prompts("builtin"), machine) > 1.8 * seconds


class TestInterrupted:
    @pytest.fixture
    def sweep(self, es2: Es2, about: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Es2:
        """A sweep of three trials that compares none of them."""
        monkeypatch.setattr(module, "most_compared", lambda _: 0)
        fixed = ("--layers", "0,1", "--objective", "fisher", "--rank", "2", "--trials", "3")
        return lambda *options: es2("sweep", *about, *SHORT, *fixed, *options)

    @pytest.fixture
    def at_trial(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Callable[[], Any]]], None]:
        """Do something at the first validation of a trial, by its number."""

        def at(actions: dict[int, Callable[[], Any]]) -> None:
            original = Workload.validate

            def validate(workload: Workload, step: int) -> Any:
                (run,) = [job for job in list_jobs(kind="finetune") if job.status() == "running"]
                if step == 1 and (action := actions.pop(run.config["trial"], None)) is not None:
                    action()
                return original(workload, step)

            monkeypatch.setattr(Workload, "validate", validate)

        return at

    def test_cancelled_it_goes_on_with_the_trial_that_was_under_way(self, sweep: Es2, at_trial: Any, es2: Es2) -> None:
        at_trial({1: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        code, document = sweep()
        assert code == 1
        assert "was cancelled; `es2 sweep resume" in document["error"]
        id = document["error"].split()[1]
        code, shown = es2("sweep", "show", id)
        assert [trial["status"] for trial in shown["trials"]] == ["done", "interrupted"]
        assert shown["status"] == "cancelled"

        code, document = es2("sweep", "resume", id)
        assert (code, document["status"]) == (0, "done"), document
        assert [trial["status"] for trial in document["trials"]] == ["done"] * 3
        assert document["trials"][0] == shown["trials"][0]
        assert document["trials"][1]["run"] == shown["trials"][1]["run"]
        assert len(runs_of(id)) == 3
        steps = [event["done"] for event in open_job(shown["trials"][1]["run"]).events()[0] if "loss" in event]
        assert steps == [2], "it went on from its checkpoint, which is of step 1"

    def test_a_request_on_disk_reaches_it_too(self, sweep: Es2, at_trial: Any) -> None:
        def cancel() -> None:
            (own,) = [job for job in list_jobs(kind="sweep") if job.status() == "running"]
            (own.path / "cancel").touch()  # as from another host
            time.sleep(2 * HEARTBEAT_SECONDS)

        at_trial({0: cancel})
        code, document = sweep()
        assert code == 1
        assert "was cancelled" in document["error"]

    def test_a_trial_that_is_cancelled_alone_counts(self, sweep: Es2, at_trial: Any) -> None:
        at_trial({1: lambda: list_jobs(kind="finetune")[0].cancel()})
        code, document = sweep()
        assert (code, document["status"]) == (0, "done"), document
        assert [trial["status"] for trial in document["trials"]] == ["done", "cancelled", "done"]
        assert 1 not in document["front"]

    def test_one_failure_counts_and_the_same_twice_ends_it(self, sweep: Es2, at_trial: Any, es2: Es2) -> None:
        def fail() -> None:
            raise MachineError("Memory ran out while tuning.")

        at_trial({0: fail})
        code, document = sweep()
        assert code == 0, document
        assert [trial["status"] for trial in document["trials"]] == ["failed", "done", "done"]
        assert document["trials"][0]["reason"] == "Memory ran out while tuning."
        at_trial({0: fail, 1: fail})
        code, document = sweep()
        assert code == 1
        assert document["error"] == "Two trials in a row failed: Memory ran out while tuning."

    def test_one_far_over_the_budget_is_pruned_and_kept_off_the_front(self, sweep: Es2) -> None:
        code, document = sweep("--kl-budget", "1e-9", "--trials", "1")
        assert code == 0, document
        (trial,) = document["trials"]
        assert (trial["status"], trial["numbers"]["kept"], trial["numbers"]["step"]) == ("pruned", False, 1)
        assert "over 4 budgets" in trial["reason"]
        assert (document["front"], document["best"]) == ([], None)

    def test_trials_that_diverge_do_not_end_it(self, sweep: Es2) -> None:
        code, document = sweep("--learning-rate", "9e18")
        assert code == 0, document
        assert [(trial["status"], trial["numbers"]) for trial in document["trials"]] == [("pruned", None)] * 3
        assert "gave no numbers" in document["trials"][0]["reason"]

    def test_no_trial_begins_once_its_minutes_are_over(self, sweep: Es2) -> None:
        code, document = sweep("--minutes", "1e-6")
        assert (code, document["status"]) == (0, "done"), document
        assert [trial["status"] for trial in document["trials"]] == ["done"], "one at least"

    def test_it_is_deleted_with_its_runs_and_not_while_it_runs(self, sweep: Es2, at_trial: Any, es2: Es2) -> None:
        refused = []

        def delete() -> None:
            (own,) = [job for job in list_jobs(kind="sweep") if job.status() == "running"]
            refused.append(es2("sweep", "delete", own.id))

        at_trial({1: delete})
        _, document = sweep("--trials", "2")
        ((code, refusal),) = refused
        assert code == 2
        assert f"is running; cancel it (`es2 sweep cancel {document['sweep']}`)" in refusal["error"]
        runs = runs_of(document["sweep"])
        assert len(runs) == 2, "nothing was deleted"
        runs[0].rename("mine")
        code, deleted = es2("sweep", "delete", document["sweep"])
        assert (code, deleted) == (0, {"sweep": document["sweep"], "deleted": True, "runs_kept": 1})
        assert [run.name for run in runs_of(document["sweep"])] == ["mine"]
        assert es2("sweep", "show", document["sweep"])[0] == 2

    def test_prompts_that_have_changed_are_refused(self, sweep: Es2, at_trial: Any, es2: Es2, home: Path) -> None:
        at_trial({0: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        _, document = sweep()
        prompts = home / "locks.csv"
        before = prompts.read_text()
        prompts.write_text(before + "Break lock number 99 open.,harmful,pair-99\n")
        code, document = es2("sweep", "resume", document["error"].split()[1])
        prompts.write_text(before)
        assert code == 2
        assert "have changed since sweep" in document["error"]


def attacked_again(run: Any) -> dict[str, Any]:
    """What a trial came to under attack, from its saved adapter alone."""
    config, prompts = config_of(run), load_prompts(run.config["prompts"])
    plan = make_schedule(
        prompts, config.pairs_per_step, config.steps, config.seed, config.validation_prompts, config.kl_prompts
    )
    base = training_base.measure_base(config, prompts, Path(config.model), plan)
    defence = Defence(base, config, prompts, Path(config.model), config.layers, silent)
    PeftModel.from_pretrained(base.network.model, run.path / "adapter")
    return defence.measure(silent)


class TestDefence:
    """Refusals under attack as a third goal, on a tiny model whose longer words count as refusals."""

    @pytest.fixture
    def sweep(self, es2: Es2, about: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Es2:
        monkeypatch.setattr(module, "most_compared", lambda _: 0)
        monkeypatch.setattr(workload, "judge_reply", lambda text: "refusal" if sum(map(ord, text)) % 4 else "answer")
        fixed = ("--layers", "0,1", "--objective", "fisher", "--rank", "2", "--trials", "3", "--seed", "1")
        return lambda *options: es2("sweep", *about, *SHORT, *fixed, "--validation-prompts", "16", *options)

    def test_every_trial_that_kept_a_step_is_attacked_as_base_was(self, sweep: Es2, es2: Es2, capsys: Any) -> None:
        code, document = sweep("--defence")
        assert code == 0, document
        assert document["defended"]
        counted = [trial["numbers"]["defence"] for trial in document["trials"] if trial["numbers"]["kept"]]
        assert counted
        assert all(trial["numbers"]["defence"] is None for trial in document["trials"] if not trial["numbers"]["kept"])
        of_base = ("base_refusals", "base_over_refusals", "n_harmful", "n_harmless", "layers")
        assert len({str([one[name] for name in of_base]) for one in counted}) == 1
        assert counted[0]["layers"] == [0, 1]
        assert counted[0]["n_harmful"] >= 4
        for trial in document["trials"]:
            result = open_job(trial["run"]).result()
            assert result is not None
            assert result.get("defence") == trial["numbers"]["defence"]
            if trial["numbers"]["kept"]:
                assert attacked_again(open_job(trial["run"])) == trial["numbers"]["defence"], "the saved weights alone"
        journal = optuna.load_study(study_name="sweep", storage=_storage(Path(document["path"]) / JOURNAL))
        told = [list(map(float, goals(trial["numbers"]))) for trial in document["trials"]]
        assert [trial.values for trial in journal.trials] == [[one, -minus_kl, last] for one, minus_kl, last in told]

    def test_a_kill_while_replies_are_counted_loses_and_doubles_nothing(
        self, sweep: Es2, es2: Es2, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Killed(BaseException):
            """Ends a process without a word, as nothing that goes on catches it."""

        whole, calls = Defence.measure, []

        def killed(self: Defence, report: Any) -> dict[str, Any]:
            calls.append(1)
            if len(calls) == 2:
                raise Killed
            return whole(self, report)

        monkeypatch.setattr(Defence, "measure", killed)
        with pytest.raises(Killed):
            sweep("--defence")
        id = list_sweeps()[0].id
        _, shown = es2("sweep", "show", id)
        assert [trial["status"] for trial in shown["trials"]][-1] == "interrupted"
        code, document = es2("sweep", "resume", id)
        assert code == 0, document
        assert [trial["number"] for trial in document["trials"]] == [0, 1, 2]
        assert [trial["run"] for trial in document["trials"]][:2] == [trial["run"] for trial in shown["trials"]][:2]
        assert len(runs_of(id)) == 3
        assert all(trial["numbers"]["defence"] for trial in document["trials"] if trial["numbers"]["kept"])

    def test_a_base_that_refuses_too_little_is_refused_before_any_trial(
        self, sweep: Es2, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(workload, "judge_reply", lambda text: "answer")
        before = len(list_jobs(kind="finetune"))
        code, document = sweep("--defence")
        assert code == 2
        assert "The base refuses 0 of " in document["error"]
        assert "sweep without it" in document["error"]
        assert len(list_jobs(kind="finetune")) == before

    def test_too_few_prompts_are_refused_before_anything_is_loaded(
        self, sweep: Es2, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(training_base, "load_model", None)
        code, document = sweep("--defence", "--validation-prompts", "6")
        assert code == 2
        assert "defence asks half of the harmful validation prompts, which are 3 here, and needs 4" in document["error"]

    def test_the_estimate_has_it(self) -> None:
        given: dict[str, Any] = {
            name: None if name in (*SEARCHED, "alpha") else field.default
            for name, field in FinetuneConfig.model_fields.items()
        }
        space, machine = make_space(SweepConfig(), given, 30), Machine("cpu", 2 * 93e9, 8.0)
        without, defended = (
            sweep_seconds(space, 24, load_prompts("builtin"), machine, defended=one) for one in (False, True)
        )
        assert 25 * 3 < defended - without < 25 * 30


class TestBadInput:
    @pytest.fixture(autouse=True)
    def nothing_is_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("the model was loaded")

        monkeypatch.setattr(training_base, "load_model", refuse)
        monkeypatch.setattr(loading, "load_bridge", refuse)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--trials", "0"), "trials must be a whole number of at least 1, not 0"),
            (("--layers", "0,1,2"), "3 target layers"),
            (("--layers", "0,9"), "There is no layer 9"),
            (ALL, "nothing to search"),
            (("--layers", "0,1", "--layer-range", "0,2"), "layers is given, so layer_range"),
            (("--layer-range", "0,3"), "outside of the model, whose layers are 0 to 2"),
            (("--layer-range", "2,1"), "a lower and a higher value"),
            (("--rate-factors", "0,1"), "rate_factors must be positive"),
            (("--rate-factors", "2,1"), "rate_factors must be a lower and a higher value"),
            (("--minutes", "0"), "minutes must be a positive number, not 0"),
            (("--kl-weights", "5"), "kl_weights must be a lower and a higher value"),
            (("--objectives", "fisher,fishy"), "Unknown objective 'fishy'"),
            (("--ranks", "4,0"), "ranks must be whole numbers of at least 1"),
            (("--method", "full", "--ranks", "2,4"), "no rank"),
            (("--pairs-per-step", "1"), "pairs_per_step must be a whole number of at least 2"),
        ],
    )
    def test_is_refused_in_a_sentence(
        self, es2: Es2, about: tuple[str, ...], options: tuple[str, ...], words: str
    ) -> None:
        before = len(list_jobs())
        code, document = es2("sweep", *about, *options)
        assert code == 2, document
        assert words in document["error"]
        assert len(list_jobs()) == before

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("stop",), "Unknown action 'stop'"),
            (("resume",), "Which sweep?"),
            (("delete",), "Which sweep?"),
            (("list", "--minutes", "3"), "leave --minutes out"),
            (("resume", "20260101-000000-000000-sweep-abcdef"), "There is no job"),
            (("start", "some-id"), "takes no id"),
            (("list", "--trials", "3"), "es2 sweep list takes no settings; leave --trials out"),
            (("list", "--kl-weight", "3"), "leave --kl-weight out"),
        ],
    )
    def test_actions(self, es2: Es2, arguments: tuple[str, ...], words: str) -> None:
        code, document = es2("sweep", *arguments)
        assert code == 2, document
        assert words in document["error"]

    def test_several_processes_of_a_launch(
        self, es2: Es2, about: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, document = es2("sweep", *about)
        assert code == 2
        assert "`es2 sweep resume ID`" in document["error"]

    def test_a_run_is_no_sweep(self, es2: Es2) -> None:
        from es2.jobs.queue import create_job

        run = create_job("finetune", {"model": "m", "prompts": "builtin"})
        code, document = es2("sweep", "resume", run.id)
        assert code == 2
        assert "is no sweep" in document["error"]


SWEEP = (sys.executable, "-m", "es2", "sweep")


def started(home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*SWEEP, *arguments], cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def newest_sweep(others: set[str]) -> str | None:
    found = [job.id for job in list_jobs(kind="sweep") if not job.config.get("of") and job.id not in others]
    return found[0] if found else None


@pytest.mark.long
def test_killed_and_helped_no_trial_is_lost_or_doubled(home: Path, about: tuple[str, ...], es2: Es2) -> None:
    others = {job.id for job in list_jobs(kind="sweep")}
    fixed = ("--layers", "0,1", "--objective", "fisher", "--rank", "2")
    first = started(home, *about, *SHORT, *fixed, "--trials", "4", "--steps", "6")
    sweep = open_sweep(wait_for(lambda: newest_sweep(others)))

    def is_under_way() -> bool:
        """In the middle of a trial that is not the first: steps of it were taken."""
        begun = [trial for trial in read_trials(sweep.path) if trial["number"] and trial["status"] == "running"]
        return any(trial["run"] and (open_job(trial["run"]).progress() or {}).get("done") == 3 for trial in begun)

    wait_for(is_under_way)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = sweep_document(sweep)
    assert sweep.status() == "interrupted"
    (hanging,) = [trial for trial in before["trials"] if trial["status"] == "interrupted"]

    own = started(home, "resume", sweep.id)
    wait_for(lambda: sweep.status() == "running")
    helper = started(home, "resume", sweep.id)
    assert own.wait(timeout=600) == 0, own.stderr and own.stderr.read()
    assert helper.wait(timeout=600) == 0, helper.stderr and helper.stderr.read()
    assert sweep.status() == "done"
    document = sweep_document(sweep)
    assert [trial["number"] for trial in document["trials"]] == [0, 1, 2, 3]
    assert {trial["status"] for trial in document["trials"]} <= {"done", "pruned"}
    runs = runs_of(sweep.id)
    assert sorted(run.config["trial"] for run in runs) == [0, 1, 2, 3], "none was begun twice"
    for trial in before["trials"]:
        if trial["status"] not in ("interrupted", "running"):
            now = document["trials"][trial["number"]]
            assert now | {"verdict": None} == trial, "what had ended was not run again"
    again = document["trials"][hanging["number"]]
    assert (again["run"], again["settings"]) == (hanging["run"], hanging["settings"])
    for run in runs:  # every step once, the killed one going on from its checkpoint
        assert sum(event.get("status") == "done" for event in run.events()[0]) == 1
