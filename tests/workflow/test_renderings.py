"""A rendering through the workflow: a run keeps it, both models are read under it, and replies are judged by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from es2.analysis.results import AnalysisConfig
from es2.core.errors import InputError
from es2.core.files import with_checksum, write_json
from es2.core.rendering import Rendering
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.results import read_evaluation
from es2.jobs.job import Job
from es2.jobs.queue import create_job
from es2.models.loading import load_tokenizer
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import PromptSet
from es2.training.config import FinetuneConfig
from es2.workflow.compared import AbsentError, find_comparison
from es2.workflow.evaluate import evaluate, find_evaluation
from es2.workflow.prepare import common_rendering, prepare
from es2.workflow.runs import rendering_of
from tests.builders import CHAT_TEMPLATE, save_tiny_adapter, save_tiny_model, tiny_prompts, write_prompts

BRIEF = Rendering(system_prompt="Be brief.")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny-llama")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "locks.csv", tiny_prompts(60))


@pytest.fixture
def make_run(model: Path, source: Path, tmp_path: Path) -> Callable[[Rendering], Job]:
    """Runs that left an adapter and were tuned under a rendering."""

    def make(rendering: Rendering) -> Job:
        config = FinetuneConfig(layers=(0, 1), model=str(model), **dict(rendering))
        job = create_job("finetune", config.to_dict() | {"prompts": str(source)})
        save_tiny_adapter(job.path / "adapter", model)
        return job

    return make


def test_a_runs_rendering_is_that_of_base_and_tuned(
    make_run: Callable[[Rendering], Job], model: Path, source: Path
) -> None:
    run, prompts = make_run(BRIEF), load_prompts(str(source))
    assert rendering_of(run) == BRIEF
    prepared = prepare(str(model), prompts, run=run, device="cpu")
    assert prepared.tuned is not None
    assert prepared.activations.renderings == prepared.tuned.renderings == (BRIEF.to_dict(),)
    plain = prepare(str(model), prompts, device="cpu").activations
    assert plain.key != prepared.activations.key
    over = prepare(str(model), prompts, run=run, rendering=Rendering(system_prompt="default"), device="cpu")
    assert over.activations.key == plain.key


def test_runs_of_two_renderings_are_not_compared_under_either(
    make_run: Callable[[Rendering], Job], source: Path
) -> None:
    first, second, prompts = make_run(BRIEF), make_run(Rendering()), load_prompts(str(source))
    with pytest.raises(InputError, match="tuned under different renderings"):
        common_rendering(prompts, Rendering(), first, second)
    assert common_rendering(prompts, Rendering(system_prompt="default"), first, second).settled == Rendering()


def test_a_comparison_at_another_position_finds_sets_of_its_own(
    make_run: Callable[[Rendering], Job], model: Path, source: Path
) -> None:
    run, prompts = make_run(BRIEF), load_prompts(str(source))
    usual = prepare(str(model), prompts, run=run, device="cpu")
    assert usual.tuned is not None
    keys = {"base": usual.activations.key, "tuned": usual.tuned.key}
    write_json(
        run.path / "result.json",
        with_checksum({"status": "done", "result": {"target_layers": [0, 1], "activations": keys}}),
    )
    with pytest.raises(AbsentError, match=r"at position last-1 are not here.*--position last-1"):
        find_comparison(run, prompts.measured(), "last-1")
    other = prepare(str(model), prompts, run=run, config=AnalysisConfig(position="last-1"), device="cpu")
    assert other.tuned is not None
    assert other.activations.positions == other.tuned.positions == ("last-1",)
    assert other.activations.renderings == (BRIEF.to_dict(),)
    found = find_comparison(run, prompts.measured(), "last-1")
    assert (found.base.key, found.tuned and found.tuned.key) == (other.activations.key, other.tuned.key)


def test_an_evaluation_is_under_the_runs_rendering(
    make_run: Callable[[Rendering], Job], model: Path, tmp_path: Path
) -> None:
    run, prompts = make_run(BRIEF), _others()
    config = EvaluateConfig(model=str(model), run=run.id, suite="refusal", limit=2, new_tokens=3, device="cpu")
    result = evaluate(config, prompts, tmp_path, run=run)
    assert result["rendering"]["settings"] == BRIEF.to_dict()
    assert result["rendering"]["system_prompt"] == "Be brief."
    assert evaluate(config, prompts, tmp_path, run=run)["path"] == result["path"]
    assert (find_evaluation(config, prompts, run) or {})["path"] == result["path"]
    plain = evaluate(config.replace(system_prompt="default"), prompts, tmp_path, run=run)
    assert plain["rendering"]["settings"] == {}
    assert plain["path"] != result["path"]


def test_a_reply_that_thinks_to_its_end_is_unfinished(tmp_path: Path) -> None:
    """A random model never closes the block that its template opens."""
    opened = "{% if think is not defined or think %}{{ '<think>' }}{% else %}{{ '<think></think>' }}{% endif %}"
    model = save_tiny_model(tmp_path / "thinks", chat_template=CHAT_TEMPLATE + opened)
    settings: dict[str, Any] = {"model": str(model), "suite": "refusal", "limit": 2, "new_tokens": 4, "device": "cpu"}
    config = EvaluateConfig(**settings, thinking_tokens=5)
    result = evaluate(config, _others(), tmp_path)
    rates = result["suite"]["refusal"]["base"]
    assert rates["harmful_unfinished"]["value"] == rates["harmless_unfinished"]["value"] == 1
    assert rates["counts"]["harmful"]["unfinished"] == 2
    assert result["thinks"]
    rows = read_evaluation(Path(result["path"]))["rows"]["refusal"]
    tokenizer = load_tokenizer(model)
    assert all(len(tokenizer(row["base"]["thinking"])["input_ids"]) >= 5 for row in rows)
    assert {row["base"]["text"] for row in rows} == {""}
    closed = evaluate(config.replace(thinking="off"), _others(), tmp_path)
    assert closed["suite"]["refusal"]["base"]["counts"]["harmful"]["unfinished"] == 0
    assert not closed["thinks"]
    assert closed["rendering"]["last"] == "after an empty thinking block, before the answer"


def _others() -> PromptSet:
    """Prompts that no run was tuned on."""
    plain = tiny_prompts(12, name="others")
    texts = tuple(text.replace("lock", "window") for text in plain.texts)
    return PromptSet("others", texts, plain.labels, plain.categories, plain.pairs, plain.splits)
