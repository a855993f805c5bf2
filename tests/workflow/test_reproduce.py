"""The protocol from end to end on a tiny model: its table, its config files, and going on after an interruption."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from es2.cli import main as cli
from es2.core.errors import InputError
from es2.core.progress import silent
from es2.evaluation import suites
from es2.jobs.queue import create_job, list_jobs
from es2.jobs.running import run_job
from es2.models import loading as models
from es2.models.catalogue import CATALOGUE
from es2.training import workload
from es2.training.config import FinetuneConfig
from es2.training.terms import DEFAULT_OBJECTIVE
from es2.workflow import reproduce as module
from es2.workflow.reproduce import SHIPPED, protocol_for, read_protocol, table_rows
from tests.builders import save_tiny_model, tiny_prompts, write_prompts

Es2 = Callable[..., tuple[int, dict[str, Any]]]

pytestmark = pytest.mark.usefixtures("one_thread", "places")

CONFIG = """
models = ["some-model"]
tuned_on = {prompts}
evaluated_on = [{prompts}, {harmful}]

[finetune]
steps = 4
pairs_per_step = 4
validate_every = 2
validation_prompts = 4
reply_tokens = 4

[evaluate]
limit = 4
new_tokens = 5
kl_tokens = 4
steering_limit = 3
directions = ["repe", "scav"]
budgets = [0.2]
p0s = [0.01]
soft_lengths = [2]
soft_budgets = [3.0]
question_limit = 3
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "tiny-llama")
    prompts = tiny_prompts(60)
    write_prompts(folder / "locks.csv", prompts)
    write_prompts(folder / "harmful.csv", prompts.select(prompts.labels == 1))
    text = CONFIG.replace("{prompts}", f"'{folder / 'locks.csv'}'").replace("{harmful}", f"'{folder / 'harmful.csv'}'")
    (folder / "short.toml").write_text(text)
    return folder


@pytest.fixture
def reproduce(es2: Es2, home: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    def run(*arguments: str | Path, config: str | Path = home / "short.toml") -> tuple[int, dict[str, Any]]:
        return es2("reproduce", "--model", home / "tiny-llama", "--config", config, "--device", "cpu", *arguments)

    return run


def kinds() -> list[str]:
    return sorted(job.kind for job in list_jobs())


@pytest.mark.long
def test_end_to_end_through_every_interruption(
    reproduce: Es2, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Power goes out in the fine-tune and in an evaluation; the same command goes on, and repeats nothing."""
    validations: list[int] = []
    watch, judge_reply = workload.Workload.validate, suites.judge_reply

    def dark(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the power went out")

    def watch_until(last: int) -> Any:
        def watch_or_die(self: Any, step: int) -> Any:
            validations.append(step)
            return watch(self, step) if step <= last else dark()

        return watch_or_die

    monkeypatch.setattr(workload.Workload, "validate", watch_until(2))
    code, document = reproduce()
    assert (code, kinds()) == (1, ["finetune"])
    assert "power" in document["error"]

    monkeypatch.setattr(workload.Workload, "validate", watch_until(99))
    monkeypatch.setattr(suites, "judge_reply", dark)
    code, document = reproduce()
    assert (code, kinds()) == (1, ["evaluate", "finetune"])
    assert validations == [2, 4, 4], "the fine-tune went on from its checkpoint, which is of step 2"

    monkeypatch.setattr(suites, "judge_reply", judge_reply)
    code, document = reproduce()
    assert code == 0, document
    assert kinds() == ["evaluate", "evaluate", "finetune"]
    assert validations == [2, 4, 4]
    assert document["objective"] == DEFAULT_OBJECTIVE
    assert len(document["target_layers"]) == 2
    assert document["verdict_reason"]

    both, harmful = document["evaluations"]
    assert both["n_prompts"] == {"harmful": 4, "harmless": 4}
    assert both["n_steered"] == 3
    assert both["problems"] == []
    base, tuned = both["table"]
    assert (base["row"], tuned["row"]) == ("base", "ES2")
    for row in (base, tuned):
        for number in ("dsr", "degenerate"):
            assert list(row[number]) == [
                "direct",
                "RepE 0.2",
                "SCAV 0.2",
                "SCAV to p₀ 0.01",
                "Soft prompt 3, 2 vectors",
                "Random vectors (control) 3, 2 vectors",
            ]
            assert all(0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1 for cell in row[number].values())
        assert row["perplexity"]["value"] > 1
    assert base["kl_reply"] is None
    assert tuned["kl_reply"]["value"] > 0
    assert tuned["agreement"]["value"] <= 1
    assert all(0 <= row["accuracy"]["value"] <= 1 for row in (base, tuned))
    assert any("p₀ = 0.01" in sentence for sentence in both["findings"])

    # Harmful requests alone can only be asked directly.
    assert harmful["n_prompts"] == {"harmful": 4, "harmless": 0}
    assert list(harmful["table"][1]["dsr"]) == ["direct"]
    assert harmful["table"][1]["perplexity"] is None
    assert len(harmful["problems"]) == 2

    # What is complete is read: no model, no job.
    for name in ("load_model", "load_bridge"):
        monkeypatch.setattr(models, name, dark)
    monkeypatch.setattr(suites, "load_model", dark)
    assert reproduce() == (0, document)
    assert kinds() == ["evaluate", "evaluate", "finetune"]

    # For people, the same table.
    monkeypatch.setattr(
        "sys.argv", ["es2", "reproduce", "--model", str(home / "tiny-llama"), "--config", str(home / "short.toml"),
                     "--device", "cpu"],
    )  # fmt: skip
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    out = capsys.readouterr().out
    assert "SCAV to p₀ 0.01" in out
    assert f"{tuned['perplexity']['value']:.3f}" in out
    assert harmful["problems"][0] in out.replace("\n", " ")


def test_other_prompts_under_the_same_name_are_another_run(
    reproduce: Es2, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was tuned on what the file held before must not be judged by what it holds now."""
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))
    prompts = tmp_path / "locks.csv"
    config = tmp_path / "short.toml"
    text = (home / "short.toml").read_text().replace(str(home / "locks.csv"), str(prompts))
    text = text.replace(f", '{home / 'harmful.csv'}'", "").replace("soft_budgets = [3.0]", "soft_budgets = []")
    config.write_text(text)
    write_prompts(prompts, tiny_prompts(60))
    code, first = reproduce(config=config)
    assert code == 0
    plain = tiny_prompts(60).texts
    tune_only = next(text for text, split in zip(plain, tiny_prompts(60).splits, strict=True) if split == "tune")
    prompts.write_text(prompts.read_text().replace(tune_only, tune_only + " Now!"))
    code, second = reproduce(config=config)
    assert code == 0
    assert second["run"] != first["run"]
    assert second["evaluations"][0]["path"] != first["evaluations"][0]["path"]


@pytest.mark.parametrize("replies", [True, False])
def test_whether_a_run_made_replies_of_its_own_is_all_the_same(
    replies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that `es2 finetune` made is taken, and one that is made here leaves them to the evaluations."""
    monkeypatch.setenv("ES2_HOME", str(tmp_path))
    config, prompts = FinetuneConfig(layers=(1, 2), replies=replies), tiny_prompts(60)
    run = create_job("finetune", config.to_dict() | {"prompts": "locks.csv"})
    run_job(run.path, {"finetune": lambda *_: {"activations": {"base": "a" * 24}}})
    monkeypatch.setattr(module, "run_here", lambda kind, config, *_: config)
    wanted = config.replace(replies=not replies)
    assert module._tune(wanted, "locks.csv", prompts, "a" * 24, silent) == run.result()
    assert module._tune(wanted, "other.csv", prompts, "a" * 24, silent)["replies"] is False


class TestConfig:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("models = [", "no TOML"),
            ("model = 'x'", "did you mean 'models'"),
            ("name = 'x'", "has no setting 'name'"),
            ("evaluated_on = 'builtin'", "evaluated_on cannot be 'builtin'"),
            ("evaluated_on = []", "nothing in evaluated_on"),
            ("evaluated_on = ['nowhere.csv']", "nowhere.csv"),
            ("finetune = 3", "[finetune]"),
            ("[finetune]\nstepz = 3", "did you mean 'steps'"),
            ("[finetune]\nsteps = '3'", "steps cannot be '3'"),
            ("[finetune]\nsteps = true", "steps cannot be True"),
            ("[finetune]\nsteps = 0", "steps must be"),
            ("[finetune]\nobjective = 'magic'", "magic"),
            ("[finetune]\nmodel = 'x'", "has no setting 'model'"),
            ("[finetune]\nlayers = [1, 99]", "no layer 99"),
            ("[finetune]\nlayers = [0.5]", "layers cannot be [0.5]"),
            ("[evaluate]\nsuite = 'kl'", "has no setting 'suite'"),
            ("[evaluate]\nprompts = 'builtin'", "has no setting 'prompts'"),
            ("[evaluate]\nbudgets = [-1]", "A budget"),
            ("[evaluate]\nquestions = 'gone.csv'", "no question file"),
            ("[evaluate]\ndirections = ['up']", "Unknown direction"),
        ],
    )
    def test_a_bad_one_is_a_sentence_before_anything_is_done(
        self, text: str, words: str, reproduce: Es2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))
        path = tmp_path / "own.toml"
        path.write_text(text)
        code, document = reproduce(config=path)
        assert code == 2
        assert words in document["error"]
        assert document["error"].count("\n") == 0
        assert not (tmp_path / "home").exists()

    def test_a_file_that_is_not_there(self, reproduce: Es2) -> None:
        code, document = reproduce(config="elsewhere.toml")
        assert code == 2
        assert "elsewhere.toml" in document["error"]
        assert "paper, reduced" in document["error"]

    def test_the_shipped_ones_are_sound_and_are_chosen_by_the_model(self) -> None:
        papers = [entry.name for entry in CATALOGUE if entry.paper]
        assert list(read_protocol("paper").sources.models) == papers
        for name in papers:
            assert protocol_for(name).name == "paper"
        assert protocol_for("smollm2-135m-instruct").name == "reduced"
        with pytest.raises(InputError, match="--config paper or --config reduced"):
            protocol_for("qwen2.5-0.5b-instruct")

    @pytest.mark.parametrize("name", SHIPPED)
    def test_every_setting_of_a_shipped_one_arrives(self, name: str) -> None:
        text = (resources.files("es2") / "data" / f"reproduce-{name}.toml").read_text(encoding="utf-8")
        document, protocol = tomllib.loads(text), read_protocol(name)
        for table, config in (("finetune", protocol.finetune), ("evaluate", protocol.evaluate)):
            given = document.pop(table, {})
            assert {key: config.to_dict()[key] for key in given} == given
        sources = protocol.sources
        found = {
            "models": list(sources.models),
            "tuned_on": sources.tuned_on,
            "evaluated_on": list(sources.evaluated_on),
        }
        assert document == found


def test_a_table_without_an_attack() -> None:
    base, tuned = table_rows({})
    assert base["dsr"] == tuned["degenerate"] == {"direct": None}
    assert tuned["kl_reply"] is None
