"""Runs from the command line: a real short fine-tune of a tiny model, and what may happen to it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from es2.cli import main as cli
from es2.core.errors import InputError, MachineError
from es2.core.files import home
from es2.evaluation.results import find_evaluations, read_evaluation, run_behaviour
from es2.jobs.job import Job
from es2.jobs.queue import create_job, reopen
from es2.jobs.running import run_job
from es2.models.model_files import save_tokenizer
from es2.prompts.loading import load_prompts
from es2.store.store import Store
from es2.training.config import FinetuneConfig
from es2.workflow.job_kinds import JOBS
from es2.workflow.runs import export, import_adapter, list_runs, open_run, tuned_weights, weights_digest
from tests.builders import N_LAYERS, save_tiny_adapter, save_tiny_model, tiny_prompts, write_prompts
from tests.builders_evaluation import REFUSES_LESS, write_replies

WRAPPED = "language_model.model.layers"  # what a multimodal wrapper's adapter has for a text model's `model.layers`
SHORT = ("--layers", "1,2", "--steps", "4", "--pairs-per-step", "4", "--validate-every", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "locks.csv", tiny_prompts(60))


@pytest.fixture(autouse=True)
def _places(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_HOME", str(home))
    monkeypatch.setenv("ES2_CACHE", str(home / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def done(home: Path, model: Path, prompts: Path) -> dict[str, Any]:
    """One finished run, made by the command line in a process of its own."""
    environment = os.environ | {"ES2_HOME": str(home), "ES2_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "es2", "finetune", "--model", model, "--prompts", prompts, *SHORT, "--json"]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stderr
    document: dict[str, Any] = json.loads(ended.stdout)
    return document


class TestFinetune:
    def test_prints_what_the_contract_says(self, done: dict[str, Any]) -> None:
        assert done["status"] == "done"
        assert done["target_layers"] == [1, 2]
        assert done["steps"] == 4
        assert done["seconds"] > 0
        assert done["kl_harmless_test"].keys() == {"prompt", "reply"}
        assert done["verdict"] in ("separated", "unchanged", "inflated", "contracted", "worse", "collapsed")
        for when in ("before", "after"):
            assert done[when].keys() == {str(layer) for layer in range(N_LAYERS)}
        for numbers in done["after"].values():
            assert {"margin_mean", "fisher_ratio", "orthogonal_std_ratio", "change"} <= numbers.keys()

    def test_leaves_a_run_and_two_activation_sets(self, done: dict[str, Any]) -> None:
        run = open_run(done["run"])
        assert run.status() == "done"
        assert run.result() == done
        store = Store()
        base, tuned = (store.open(done["activations"][name]) for name in ("base", "tuned"))
        assert (base.run, tuned.run) == (None, run.id)
        np.testing.assert_array_equal(base.texts, tuned.texts)
        assert not np.allclose(base.layer(2), tuned.layer(2)), "the adapter was on"

    def test_weights_and_probes_are_as_readable_as_other_files(self, done: dict[str, Any], home: Path) -> None:
        """What safetensors itself makes is the owner's alone, which a shared home cannot use."""
        files = [path for folder in ("runs", "cached_activations") for path in (home / folder).rglob("*.safetensors")]
        assert {path.name for path in files} >= {"adapter_model.safetensors", "probes.safetensors"}
        usual = (open_run(done["run"]).path / "config.json").stat().st_mode
        assert {path for path in files if path.stat().st_mode != usual} == set()

    def test_its_replies_are_an_evaluation_that_is_found_again(
        self, done: dict[str, Any], es2, model: Path, prompts: Path
    ) -> None:
        run = open_run(done["run"])
        (kept,) = find_evaluations(run)
        document = read_evaluation(kept)
        assert document["suite"].keys() == {"refusal"}
        own = load_prompts(str(prompts))
        split_of = dict(zip(own.texts, own.splits, strict=True))
        replied = [row["prompt"] for row in document["rows"]["refusal"]]
        assert len(replied) == int(own.in_split("test").sum()) > 0
        assert {split_of[prompt] for prompt in replied} == {"test"}, "validation chose the step, so it proves nothing"
        assert done["behaviour"] == run_behaviour(run).name is not None
        assert done["outcome"] == f"{done['verdict']}, {run_behaviour(run).words}"
        code, again = es2("evaluate", "--model", model, "--prompts", prompts, "--run", run.id, "--suite", "refusal")
        assert code == 0
        assert (again["path"], again["generated"]["replies"]) == (str(kept), 0)
        assert find_evaluations(run) == [kept]

    def test_numbers_are_those_of_analyze(self, done: dict[str, Any], es2, model: Path, prompts: Path) -> None:
        code, document = es2("analyze", "--model", model, "--prompts", prompts, "--run", done["run"])
        assert code == 0
        assert document["run"] == done["run"]
        for layer in range(N_LAYERS):
            assert document["layers"][layer]["fisher_ratio"] == done["after"][str(layer)]["fisher_ratio"]
            assert document["base_layers"][layer]["fisher_ratio"] == done["before"][str(layer)]["fisher_ratio"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--layers", "1,99"), "no layer 99"),
            (("--layers", "1,x"), "no list of layers"),
            (("--layers", "0,1,2"), "--allow-many-layers"),
            (("--layers", "1,1"), "twice"),
            (("--layers", "1,2", "--steps", "0"), "steps"),
            (("--layers", "1,2", "--objective", "magic"), "magic"),
            (("--layers", "1,2", "--learning-rate", "-1"), "learning_rate"),
        ],
    )
    def test_bad_settings_are_refused_before_a_model_is_loaded(
        self, es2, model: Path, prompts: Path, arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from es2.models import loading as models
        from es2.training import base

        def loaded(*_: object, **__: object) -> None:
            raise AssertionError("a model was loaded")

        for module in (models, base):
            monkeypatch.setattr(module, "load_model", loaded)
        before = len(list_runs())
        code, document = es2("finetune", "--model", model, "--prompts", prompts, *arguments)
        assert code == 2
        assert words in document["error"]
        assert len(list_runs()) == before, "nothing is half written"

    def test_no_tune_prompts(self, es2, model: Path, tmp_path: Path) -> None:
        path = tmp_path / "p.csv"
        rows = [f"thing {i},{'harmful' if i % 2 else 'harmless'},{'probe' if i < 20 else 'test'}" for i in range(40)]
        path.write_text("\n".join(["prompt,label,split", *rows]))
        code, document = es2("finetune", "--model", model, "--prompts", path, *SHORT)
        assert code == 2
        assert "tune split" in document["error"]


def test_cancelled_while_it_replies_it_goes_on_there(model: Path, prompts: Path) -> None:
    config = FinetuneConfig(layers=(1, 2), model=str(model), steps=2, pairs_per_step=4, validate_every=2)
    run = create_job("finetune", config.to_dict() | {"prompts": str(prompts)})

    def stop(stage: str, done: int, total: int, **numbers: float) -> None:
        if stage == "reply tuned" and done:
            os.kill(os.getpid(), signal.SIGTERM)

    assert run_job(run.path, JOBS, stop) == 1
    assert run.status() == "cancelled"
    assert find_evaluations(run) == []
    (log,) = (home() / "base_replies").iterdir()
    before = log.read_bytes().splitlines()
    assert before
    reopen(run)
    stages: list[str] = []
    assert run_job(run.path, JOBS, lambda stage, *_, **__: stages.append(stage)) == 0
    assert "finetune" not in stages, "its steps are in the checkpoint"
    assert log.read_bytes().splitlines()[: len(before)] == before
    lines = log.read_bytes() + (run.path / "evaluation" / "replies.jsonl").read_bytes()
    keys = [json.loads(line)["key"] for line in lines.splitlines() if line]
    assert len(keys) == len(set(keys)) == 2 * len(read_evaluation(find_evaluations(run)[0])["rows"]["refusal"])
    assert (run.result() or {})["behaviour"] is not None


@pytest.mark.long
def test_two_runs_started_at_once_do_not_disturb_each_other(
    done: dict[str, Any], model: Path, prompts: Path, tmp_path: Path
) -> None:
    """Also not where both find nothing captured yet: in an empty home both want the same base."""
    environment = os.environ | {"ES2_HOME": str(tmp_path), "ES2_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "es2", "finetune", "--model", model, "--prompts", prompts, *SHORT, "--json"]
    both = [
        subprocess.Popen([*map(str, command), "--seed", seed], stdout=subprocess.PIPE, text=True, env=environment)
        for seed in ("0", "1")
    ]
    documents = [json.loads(process.communicate(timeout=600)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    first, second = documents
    assert first["run"] != second["run"]
    assert first["activations"]["base"] == second["activations"]["base"]
    assert first["activations"]["tuned"] != second["activations"]["tuned"]
    alone = [point["kl_prompt"] for point in done["validations"]]
    assert [point["kl_prompt"] for point in first["validations"]] == pytest.approx(alone, abs=1e-6)
    assert [point["kl_prompt"] for point in second["validations"]] != pytest.approx(alone, abs=1e-6)


def test_an_adapter_made_elsewhere_is_compared_like_a_run(
    done: dict[str, Any], model: Path, prompts: Path, tmp_path: Path
) -> None:
    run = import_adapter(tuned_weights(open_run(done["run"])), str(model), str(prompts), (1, 2), replies=False)
    assert run_job(run.path, JOBS) == 0
    assert find_evaluations(run) == []
    result = run.result()
    assert result is not None
    assert result["activations"] == done["activations"], "it is the same adapter"
    assert result["after"] == done["after"]
    assert (result["steps"], result["kl_harmless_test"]) == (0, None)
    with pytest.raises(InputError, match="holds no peft adapter"):
        import_adapter(tmp_path, str(model), str(prompts))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="safetensors"):
        import_adapter(tmp_path, str(model), str(prompts))


class TestBeforeAnythingIsFetched:
    def test_a_folder_without_adapter_is_refused_before_a_model_is_fetched(
        self, places: None, es2, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("es2.workflow.foreground.model_folder", lambda *_: pytest.fail("fetched"))
        code, document = es2("import", "--adapter", tmp_path / "none")
        assert (code, "peft adapter" in document["error"]) == (2, True), document

    @pytest.mark.parametrize("command", ["finetune", "sweep"])
    def test_settings_are_refused_before_a_model_is_fetched(
        self, places: None, es2, monkeypatch: pytest.MonkeyPatch, command: str
    ) -> None:
        for module in ("foreground", "sweep"):
            monkeypatch.setattr(f"es2.workflow.{module}.model_folder", lambda *_: pytest.fail("fetched"))
        for option, value, sentence in (("--objective", "none", "Unknown objective"), ("--layers", "1,99", "layer 99")):
            code, document = es2(command, option, value)
            assert (code, sentence in document["error"]) == (2, True), document


class TestImport:
    def test_afterwards_it_is_a_run_like_any_other(
        self, done: dict[str, Any], model: Path, prompts: Path, es2, tmp_path: Path
    ) -> None:
        adapter = tuned_weights(open_run(done["run"]))
        given = ("--model", model, "--prompts", prompts, "--adapter", adapter, "--layers", "1,2", "--name", "from afar")
        code, document = es2("import", *given)
        assert code == 0, document
        assert document["run"] != done["run"]
        assert (document["status"], document["steps"], document["target_layers"]) == ("done", 0, [1, 2])
        assert document["activations"] == done["activations"], "it is the same adapter"
        run = open_run(document["run"])
        assert run.name == "from afar"
        assert run.path.joinpath("adapter", "adapter_model.safetensors").is_file(), "it is copied, not linked"
        assert document["behaviour"] == done["behaviour"], "both reply at its end, too"
        code, document = es2("report", "--run", run.id, "--out", tmp_path / "report.html")
        assert code == 0, document
        assert "from afar" in (tmp_path / "report.html").read_text()

    def test_the_app_compares_it(self, done: dict[str, Any]) -> None:
        from app import artifacts
        from app.state import Choice

        imported = next(run for run in list_runs() if run.name == "from afar")
        config = imported.config
        comparison = artifacts.find_comparison(Choice(model=config["model"], prompts=config["prompts"]))
        assert comparison is not None, "without being asked for: it is the newest of this model and these prompts"
        assert (comparison.run, comparison.targets) == (imported.id, (1, 2))

    def test_doubts_are_said_everywhere(self, model: Path, prompts: Path, es2, tmp_path: Path) -> None:
        """A part of an adapter, saved on a wrapper of another name, in a folder that was not given itself."""
        inside = save_tiny_adapter(tmp_path / "given" / "checkpoint-250", model)
        weights = load_file(inside / "adapter_model.safetensors")
        kept = {n.replace("model.layers", WRAPPED): w for n, w in weights.items() if "layers.1." not in n}
        save_file(kept, inside / "adapter_model.safetensors")
        config = json.loads((inside / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": "owner/<b>wrapper</b>", "init_lora_weights": True}
        (inside / "adapter_config.json").write_text(json.dumps(config))
        given = {file.name: file.read_bytes() for file in inside.iterdir()}

        code, document = es2(
            "import", "--model", model, "--prompts", prompts, "--adapter", tmp_path / "given", "--layers", "1,2"
        )
        assert code == 0, document
        found, changed, part, base = document["warnings"]
        assert "checkpoint-250', the only one in" in found
        assert "language_model.model.layers.0.mlp.down_proj is model.layers.0.mlp.down_proj there" in changed
        assert "weights in layers 0, 2 alone, while its configuration asks for 0, 1, 2" in part
        assert "names 'owner/<b>wrapper</b>' as its base" in base
        assert {file.name: file.read_bytes() for file in inside.iterdir()} == given, "nothing of it is changed"

        run = open_run(document["run"])
        assert set(load_file(tuned_weights(run) / "adapter_model.safetensors")) <= set(weights)
        es2("export", "--run", run.id, "--out", tmp_path / "exported")
        assert load_file(tmp_path / "exported" / "adapter_model.safetensors").keys() <= weights.keys()
        es2("report", "--run", run.id, "--out", tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert page.count('<p class="doubt">') == 4
        assert "<b>wrapper" not in page

        shutil.rmtree(run.path / "adapter")
        (run.path / "result.json").unlink()
        reopen(run)
        assert run_job(run.path, JOBS) == 0, "made again of what was given"
        assert (run.result() or {})["warnings"] == document["warnings"]
        assert (run.result() or {})["weights"] == document["weights"]

    def test_of_the_hub_is_fetched_by_the_job(
        self, model: Path, prompts: Path, es2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from es2.workflow import runs

        given = ("import", "--model", model, "--prompts", prompts, "--adapter", "owner/adapter", "--layers", "1,2")
        adapter = save_tiny_adapter(tmp_path / "adapter", model)
        fetched: list[str] = []
        monkeypatch.setattr(runs, "adapter_folder", lambda hub_id, report: fetched.append(hub_id) or adapter)
        code, document = es2(*given)
        assert (code, fetched, document["warnings"]) == (0, ["owner/adapter"], [])
        assert open_run(document["run"]).config["imported"] == "owner/adapter"

        def offline(hub_id: str, report: object) -> Path:
            raise MachineError("The adapter cannot be fetched.")

        monkeypatch.setattr(runs, "adapter_folder", offline)
        code, document = es2(*given)
        assert (code, document["error"]) == (1, "The adapter cannot be fetched.")

    def test_one_that_does_not_fit_is_refused_before_anything_is_captured(
        self, prompts: Path, es2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own, other = (save_tiny_model(tmp_path / str(size), intermediate_size=size) for size in (48, 96))
        monkeypatch.setattr("es2.capture.capture.load_bridge", None)
        adapter = save_tiny_adapter(tmp_path / "adapter", other)
        code, document = es2("import", "--model", own, "--prompts", prompts, "--adapter", adapter)
        assert code == 2
        assert "lora_A.weight has the shape (2, 96), where the model takes (2, 48)" in document["error"]

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            (("--layers", "1,9"), "no layer 9"),
            (("--layers", "-1"), "no layer -1"),
            (("--name", "two\x1b[31m"), "one line"),
            (("--adapter", "/nowhere"), "holds no peft adapter"),
        ],
    )
    def test_what_cannot_be_leaves_no_run(
        self, done: dict[str, Any], model: Path, prompts: Path, es2, more: tuple[str, str], words: str
    ) -> None:
        before = [run.id for run in list_runs()]
        adapter = tuned_weights(open_run(done["run"]))
        code, document = es2("import", "--model", model, "--prompts", prompts, "--adapter", adapter, *more)
        assert code == 2
        assert words in document["error"]
        assert [run.id for run in list_runs()] == before


class TestRuns:
    def test_list_and_show(self, done: dict[str, Any], es2) -> None:
        code, document = es2("runs")
        assert code == 0
        assert done["run"] in [row["run"] for row in document["runs"]]
        code, document = es2("runs", "show", done["run"])
        assert code == 0
        assert document["result"]["verdict"] == done["verdict"]
        assert document["config"]["objective"] == FinetuneConfig(layers=()).objective

    def test_every_command_says_what_is_known_of_behaviour(
        self, done: dict[str, Any], es2, model: Path, prompts: Path, tmp_path: Path
    ) -> None:
        assert done["outcome"] == f"{done['verdict']}, behaviour unchanged", "babble before and after"
        run, of = open_run(done["run"]), ("--run", done["run"])
        own = tiny_prompts(60)
        others = replace(own, texts=tuple(text.replace("lock", "window") for text in own.texts))
        others = write_prompts(tmp_path / "others.csv", others)
        given = ("--model", model, "--prompts", others, "--device", "cpu", "--limit", "2", "--new-tokens", "2")
        code, document = es2("evaluate", *given, *of, "--suite", "refusal")
        assert code == 0, document
        assert document["outcome"] == f"{done['verdict']}, behaviour unchanged", "babble of two prompts"
        assert read_evaluation(Path(document["path"]))["weights"] == done["weights"]

        path = write_replies(run, "requests", *REFUSES_LESS, weights=done["weights"])
        try:
            for arguments in (
                ("analyze", "--model", model, "--prompts", prompts, *of),
                ("runs", "show", run.id),
                ("export", *of, "--out", tmp_path / "out"),
                ("evaluate", *given, *of, "--suite", "kl"),  # has no replies to judge by
            ):
                code, document = es2(*arguments)
                assert code == 0, document
                assert (document["verdict"], document["behaviour"]) == (done["verdict"], "refuses less")
                assert document["outcome"] == f"{done['verdict']}, refuses less"
                assert document["behaviour_warning"].startswith("Refuses less. ")
            code, document = es2("evaluate", *given, *of, "--suite", "refusal")
            assert document["behaviour"] == "unchanged", "of its own replies"
        finally:
            shutil.rmtree(path.parent)

    def test_people_are_warned_in_the_terminal(
        self, done: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        path = write_replies(open_run(done["run"]), "requests", *REFUSES_LESS)
        try:
            for arguments in (("runs", "show", done["run"]), ("export", "--run", done["run"], "--out", tmp_path / "o")):
                monkeypatch.setattr(sys, "argv", ["es2", *map(str, arguments)])
                with pytest.raises(SystemExit):
                    cli.main()
                said = " ".join(capsys.readouterr().out.split())
                assert f"{done['verdict']}, refuses less." in said
                assert "Warning: Refuses less. The tuned model refuses fewer harmful requests than its base" in said
        finally:
            shutil.rmtree(path.parent)

    @pytest.mark.parametrize("id", ["nope", "../runs", "20200101-000000-000000-finetune-000000"])
    def test_unknown_runs_are_a_sentence(self, es2, id: str, model: Path, prompts: Path, tmp_path: Path) -> None:
        for arguments in (
            ("runs", "show", id),
            ("runs", "delete", id),
            ("export", "--run", id, "--out", tmp_path / "x"),
            ("analyze", "--model", model, "--prompts", prompts, "--run", id),
        ):
            code, document = es2(*arguments)
            assert code == 2
            assert "There is no job" in document["error"]

    def test_a_finished_run_cannot_be_resumed(self, done: dict[str, Any], es2) -> None:
        code, document = es2("runs", "resume", done["run"])
        assert code == 2
        assert "is done" in document["error"]

    def test_a_run_of_another_model_is_refused(self, done: dict[str, Any], es2, prompts: Path, tmp_path: Path) -> None:
        other = save_tiny_model(tmp_path / "other", seed=1)
        code, document = es2("analyze", "--model", other, "--prompts", prompts, "--run", done["run"])
        assert code == 2
        assert "tiny-llama" in document["error"]

    @pytest.mark.long
    def test_killed_resumed_equal(self, home: Path, done: dict[str, Any], es2, model: Path, prompts: Path) -> None:
        """kill −9 in the middle leaves `interrupted`; resumed, it ends as if nothing had happened."""
        long = ("--layers", "1,2", "--steps", "40", "--pairs-per-step", "4", "--validate-every", "2")
        command = [sys.executable, "-m", "es2", "finetune", "--model", model, "--prompts", prompts, *long]
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        run = self.wait_for_step(6, after=done["run"])
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert run.status() == "interrupted"
        with pytest.raises(Exception, match="has left no weights"):
            tuned_weights(run)
        code, _ = es2("runs", "resume", run.id)
        assert code == 0
        self.wait_for_end(run)
        assert run.status() == "done", run.log_tail()
        result = run.result()
        assert result is not None
        assert result["steps"] == 40
        code, whole = es2("finetune", "--model", model, "--prompts", prompts, *long)
        assert code == 0
        for layer in ("1", "2"):
            assert result["after"][layer]["fisher_ratio"] == pytest.approx(
                whole["after"][layer]["fisher_ratio"], rel=1e-3, abs=1e-6
            )
        # Not to the last digit: one ran in a process of its own with one thread, the other in this one.
        for found, expected in zip(result["validations"], whole["validations"], strict=True):
            assert found["step"] == expected["step"]
            assert found["kl_reply"] == pytest.approx(expected["kl_reply"], rel=1e-3, abs=1e-7)
            assert found["layers"]["2"] == pytest.approx(expected["layers"]["2"], rel=1e-3)

    def wait_for_step(self, step: int, after: str) -> Job:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for run in list_runs():
                progress = run.progress()
                if run.id > after and progress and progress["stage"] == "finetune" and progress["done"] >= step:
                    return run
            time.sleep(0.05)
        raise AssertionError("the run did not start")

    def wait_for_end(self, run: Job) -> None:
        deadline = time.monotonic() + 180
        while run.is_active() and time.monotonic() < deadline:
            time.sleep(0.2)


@pytest.mark.long
class TestDamage:
    """What the run trained is changed, or goes, after the run is done."""

    @pytest.fixture
    def own(self, done: dict[str, Any]) -> Iterator[Job]:
        """The finished run, to be put back in order afterwards."""
        run = open_run(done["run"])
        kept = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != "lock"}
        yield run
        for path, content in kept.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    def test_weights_that_cannot_be_listed_are_not_lost(self, own: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        """As for a moment on a network drive."""
        adapter = tuned_weights(own)
        listed = os.scandir

        def refused(folder: Any = ".") -> Any:
            if Path(folder) == adapter:
                raise PermissionError(13, "Permission denied")
            return listed(folder)

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", refused)
            with pytest.raises(MachineError, match=r"Cannot read .*adapter.*Permission denied"):
                tuned_weights(own)
        assert tuned_weights(own) == adapter
        assert own.status() == "done"

    @pytest.mark.parametrize("loss", ["a flipped bit", "a changed setting", "gone"])
    def test_lost_weights_are_made_again(self, own: Job, done: dict[str, Any], loss: str) -> None:
        adapter = tuned_weights(own)
        before = weights_digest(adapter)
        if loss == "gone":
            shutil.rmtree(adapter)
        elif loss == "a changed setting":
            settings = adapter / "adapter_config.json"
            settings.write_text(settings.read_text().replace('"lora_alpha": 32', '"lora_alpha": 33'))
        else:
            weights = adapter / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        with pytest.raises(InputError, match=f"The weights of run {own.id} are .*resume"):
            tuned_weights(own)
        assert own.status() == "failed"
        assert "resume" in str(own.error())
        assert (own.result() or {})["after"] == done["after"], "its numbers are of the sound weights"
        reopen(own)
        again = [sys.executable, "-m", "es2", "job", str(own.path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as the first time, for the same last digits
        subprocess.run(again, env=environment, timeout=300, check=True)
        assert weights_digest(tuned_weights(own)) == before
        assert (own.result() or {})["activations"] == done["activations"]

    def test_a_damaged_checkpoint_costs_time_only(self, own: Job, done: dict[str, Any]) -> None:
        shutil.rmtree(tuned_weights(own))
        checkpoint = own.path / "checkpoint" / "state.safetensors"
        checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
        with pytest.raises(InputError):
            tuned_weights(own)
        reopen(own)
        assert run_job(own.path, JOBS) == 0
        assert (own.result() or {})["steps"] == 4
        for layer in ("1", "2"):  # not to the last digit: the first was made with another number of threads
            found, expected = ((result or {})["after"][layer]["fisher_ratio"] for result in (own.result(), done))
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


class TestExport:
    def test_a_tokenizer_that_finds_the_disk_full(self, tmp_path: Path) -> None:
        class Full:
            def save_pretrained(self, folder: Path) -> None:
                raise Exception("No space left on device (os error 28)")  # as the tokenizers library says it

        with pytest.raises(OSError, match="No space left") as error:
            save_tokenizer(Full(), tmp_path)  # type: ignore[arg-type]
        assert error.value.errno == errno.ENOSPC

    def test_what_a_killed_export_left_is_removed_and_nothing_else(self, done: dict[str, Any], tmp_path: Path) -> None:
        for name in (".tmp-out-999999999", ".tmp-out-mine", f".tmp-out-{os.getppid()}"):
            (tmp_path / name).mkdir()
        export(open_run(done["run"]), tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            ".tmp-out-" + str(os.getppid()),
            ".tmp-out-mine",
            "out",
        ]

    def test_a_full_disk_is_a_sentence(
        self, done: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: object) -> None:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("es2.workflow.runs._write_merged", fail)
        with pytest.raises(MachineError, match="No space is left"):
            export(open_run(done["run"]), tmp_path / "out", merged=True)
        assert list(tmp_path.iterdir()) == []

    def test_an_adapter_that_peft_loads(self, done: dict[str, Any], es2, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out" / "adapter"
        code, document = es2("export", "--run", done["run"], "--out", out)
        assert code == 0
        assert document["path"] == str(out)
        program = (
            "import sys; from transformers import AutoModelForCausalLM; from peft import PeftModel;"
            "m = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]);"
            "print(any('lora_B' in n and p.abs().max() > 0 for n, p in m.named_parameters()))"
        )
        assert self.outside(program, model, out) == "True"

    def test_a_merged_model_that_transformers_loads(
        self, done: dict[str, Any], es2, model: Path, prompts: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "merged"
        code, _ = es2("export", "--run", done["run"], "--out", out, "--merged")
        assert code == 0
        program = (
            "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer;"
            "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1]);"
            "print(len(m.model.layers), t.chat_template is not None)"
        )
        assert self.outside(program, out) == f"{N_LAYERS} True"
        # Its embeddings are the run's, seen through the same hooks.
        code, captured = es2("capture", "--model", out, "--prompts", prompts)
        assert code == 0
        tuned, merged = Store().open(done["activations"]["tuned"]), Store().open(captured["key"])
        rows = [merged.texts.index(text) for text in tuned.texts]
        np.testing.assert_allclose(merged.layer(2)[rows], tuned.layer(2), rtol=1e-4, atol=1e-4)

    def test_a_folder_in_use_is_left_alone(self, done: dict[str, Any], es2, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("precious")
        code, document = es2("export", "--run", done["run"], "--out", tmp_path)
        assert code == 2
        assert "not an empty folder" in document["error"]
        assert (tmp_path / "mine").read_text() == "precious"

    def outside(self, program: str, *arguments: Path) -> str:
        """Run a program that knows nothing of this package."""
        command = [sys.executable, "-c", program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.strip()
