"""The whole evaluation on a tiny model: its numbers, its log, its resume, its judge, its command."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from es2.cli import main as cli
from es2.core.errors import InputError
from es2.core.files import with_checksum, write_json
from es2.core.progress import Cancelled
from es2.evaluation import suites
from es2.evaluation.config import EvaluateConfig
from es2.evaluation.judge import Judge, JudgeError, classifier_judge, endpoint_judge, judge_replies
from es2.evaluation.reply_log import ReplyLog, read_replies
from es2.evaluation.results import find_evaluations, read_evaluation, run_ability, run_behaviour
from es2.evaluation.suites import choose_prompts, held_out
from es2.jobs.job import Job
from es2.jobs.queue import create_job, list_jobs
from es2.jobs.running import run_job
from es2.models import replies
from es2.prompts.loading import load_prompts
from es2.prompts.prompt_set import HARMFUL, PromptSet
from es2.store.store import Store
from es2.training.config import FinetuneConfig
from es2.workflow import evaluate as evaluating
from es2.workflow.evaluate import evaluate, unfinished_job
from es2.workflow.evaluation_plan import known_shares, replied_by_base
from es2.workflow.job_kinds import JOBS
from es2.workflow.prepare import prepare
from es2.workflow.runs import tuned_weights, weights_digest
from tests.builders import save_tiny_adapter, save_tiny_model, tiny_prompts, tiny_tokenizer, write_prompts

SMALL: dict[str, Any] = {
    "limit": 4,
    "new_tokens": 5,
    "kl_tokens": 4,
    "steering_limit": 2,
    "budgets": (0.5,),
    "p0s": (0.5,),
    "directions": ("scav", "random"),
    "soft_budgets": (),  # tests/evaluation/test_soft_prompt.py
    "question_limit": 3,
    "device": "cpu",
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return save_tiny_adapter(tmp_path_factory.mktemp("adapters") / "adapter", model)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "locks.csv", tiny_prompts(60))


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Activation sets and analyses, computed once."""
    return Store(tmp_path_factory.mktemp("home") / "cached_activations")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "home"


def other_prompts() -> PromptSet:
    """Prompts that no run was tuned on."""
    plain = tiny_prompts(60, name="others")
    texts = tuple(text.replace("lock", "window") for text in plain.texts)
    return replace(plain, texts=texts)


@pytest.fixture
def run(model: Path, adapter: Path, source: Path) -> Job:
    """A run that left an adapter."""
    return run_with(adapter, model, source)


def run_with(adapter: Path, model: Path, source: Path) -> Job:
    config = FinetuneConfig(layers=(0, 1), model=str(model))
    job = create_job("finetune", config.to_dict() | {"prompts": str(source)})
    adapter_copy = job.path / "adapter"
    adapter_copy.mkdir()
    for file in adapter.iterdir():
        if file.is_file():
            (adapter_copy / file.name).write_bytes(file.read_bytes())
    return job


def test_an_evaluation_of_weights_that_were_made_again_does_not_count(
    model: Path, run: Job, tmp_path: Path, shared_store: Store
) -> None:
    config = EvaluateConfig(model=str(model), run=run.id, **SMALL | {"suite": "refusal"})

    def again() -> dict[str, Any]:
        return evaluate(config, other_prompts(), tmp_path / "job", run=run, store=shared_store)

    digest = weights_digest(tuned_weights(run))
    assert again()["weights"] == digest, "the run has no result, as while it replies at its end"
    assert run_behaviour(run).name == run_behaviour(run, digest).name == "unchanged"
    assert run_behaviour(run, "0" * 24).name is None, "its fine-tune was made again"
    run_job(run.path, {"finetune": lambda *_: {"verdict": "separated", "weights": digest}})
    assert run_behaviour(run).name == "unchanged"
    (kept,) = find_evaluations(run)
    document = read_evaluation(kept)
    for stated, counts in ((None, False), ("0" * 24, False), (digest, True)):
        changed = {name: value for name, value in document.items() if name != "digest"} | {"weights": stated}
        write_json(kept, with_checksum(changed))
        assert (run_behaviour(run).name is not None) == counts, "nothing says that these are the weights that replied"
        assert again()["weights"] == digest
        assert again()["generated"]["replies"] == 0, "the log has them"
        assert run_behaviour(run).name == "unchanged"


def without_times(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in ("seconds", "generated", "path", "created")}


def logs_of(run: Job) -> list[Path]:
    """The run's own log, and those of bases in its home."""
    return [run.path / "evaluation" / "replies.jsonl", *(run.path.parents[1] / "base_replies").glob("*")]


def keys_of(*logs: Path) -> list[str]:
    return [json.loads(line)["key"] for log in logs for line in log.read_text().splitlines() if line]


def test_everything_of_a_run_against_its_base(model: Path, run: Job, tmp_path: Path, shared_store: Store) -> None:
    config = EvaluateConfig(model=str(model), run=run.id, **SMALL)
    document = evaluate(config, other_prompts(), tmp_path / "job", run=run, store=shared_store)
    suite = document["suite"]
    json.dumps(document, allow_nan=False)

    refusal = suite["refusal"]
    assert refusal["n_prompts"] == {"harmful": 4, "harmless": 4}
    for name in ("base", "tuned"):
        assert sum(refusal[name]["counts"]["harmful"].values()) == 4
        assert 0 <= refusal[name]["dsr"]["low"] <= refusal[name]["dsr"]["value"] <= refusal[name]["dsr"]["high"] <= 1
    assert refusal["change"]["dsr"]["value"] == refusal["tuned"]["dsr"]["value"] - refusal["base"]["dsr"]["value"]

    ability = suite["kl"]
    assert ability["kl_reply"]["value"] > 0.01
    assert ability["agreement"]["value"] < 1
    assert ability["perplexity"]["ratio"]["value"] > 1

    attack = suite["perturbation"]
    assert attack["layers"] == [0, 1]  # the run's targets
    assert [point["direction"] for point in attack["curve"]] == ["none", "scav", "random", "scav"]
    for name in ("base", "tuned"):
        assert attack["curve"][-1][name]["largest_error"] < 1e-4
        assert attack["curve"][1][name]["relative_length"]["value"] == pytest.approx(0.5, rel=1e-4)
    assert {record["layer"] for record in attack["needed"]} == {0, 1, 2}
    assert all(record["change"]["relative_ratio"]["value"] > 0 for record in attack["needed"])

    # Kept beside the run, with the replies.
    (path,) = find_evaluations(run)
    assert str(path) == document["path"]
    kept = read_evaluation(path)
    assert kept["suite"] == suite
    assert len(kept["rows"]["refusal"]) == 8
    assert {"verdict", "text"} <= kept["rows"]["refusal"][0]["tuned"].keys()
    assert len(kept["rows"]["perturbation"]) == 4 * 2
    assert all(len(row["base"]["text"]) <= 200 for row in kept["rows"]["perturbation"])
    assert any(row["base"]["text"] != row["tuned"]["text"] for row in kept["rows"]["refusal"])

    # Once more: the same numbers, and nothing generated.
    again = evaluate(config, other_prompts(), tmp_path / "job", run=run, store=shared_store)
    assert without_times(again) == without_times(document)
    assert again["generated"]["replies"] == 0
    assert document["generated"]["tokens_per_second"] > 0


def test_directions_of_base_and_tuned(
    model: Path, run: Job, tmp_path: Path, shared_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SMALL | {"suite": "direction", "limit": 2, "controls": 1, "new_tokens": 3}
    config = EvaluateConfig(model=str(model), run=run.id, **settings)
    seen: list[tuple[str, int, int]] = []

    def report(stage: str, done: int, total: int, **numbers: float) -> None:
        seen.append((stage, done, total))

    document = evaluate(config, other_prompts(), tmp_path / "job", run=run, store=shared_store, report=report)
    json.dumps(document, allow_nan=False)
    part = document["suite"]["direction"]
    assert [record["layer"] for record in part["layers"]] == [0, 1], "the run's targets"
    for record in part["layers"]:
        assert record["base"]["length"] != record["tuned"]["length"], "each model has a direction of its own"
        assert {"refused", "answered", "broken", "n_prompts"} == record["tuned"]["add"].keys()
    assert document["generated"]["replies"] == 2 * (4 + 2 * 2 * 2 * (1 + 1))
    for name in ("base", "tuned"):
        done = [done for stage, done, _ in seen if stage == f"direction {name}"]
        totals = {total for stage, _, total in seen if stage == f"direction {name}"}
        assert done == sorted(done)
        assert totals == {done[-1]} == {3 * (4 + 2 * 2 * 2 * (1 + 1))}
    shown = importlib.import_module("es2.cli.evaluate")
    shown._show(document | {"warnings": []})
    printed = " ".join(capsys.readouterr().out.split())
    assert "beside random directions of its length (1)" in printed
    assert "Tuned, layer 1: not measured enough. Removed," in printed


def test_an_adapter_without_target_layers_is_attacked_at_the_recommended_ones(
    model: Path, run: Job, tmp_path: Path, shared_store: Store
) -> None:
    imported = replace(run, config=run.config | {"layers": []})
    config = EvaluateConfig(model=str(model), run=run.id, suite="perturbation", **SMALL)
    document = evaluate(config, other_prompts(), tmp_path / "job", run=imported, store=shared_store)
    recommended = prepare(str(model), other_prompts(), device="cpu", store=shared_store).analysis.recommended
    assert document["suite"]["perturbation"]["layers"] == list(recommended)


@pytest.mark.long
def test_killed_and_resumed_generates_nothing_twice_and_ends_alike(
    model: Path, run: Job, tmp_path: Path, own_home: Path, shared_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "rows_that_fit", lambda device, bytes_per_row: 3)
    config = EvaluateConfig(model=str(model), run=run.id, **SMALL)
    whole = evaluate(config, other_prompts(), tmp_path / "job", run=run, store=shared_store)
    expected = sorted(keys_of(*logs_of(run)))
    assert len(expected) == len(set(expected)) == 2 * 8 + 2 * 4 * 2 + 2 * 3
    (run.path / "evaluation").rename(run.path / "first")
    (own_home / "base_replies").rename(tmp_path / "first")

    def stop_after(calls: int) -> Any:
        left = [calls]

        def report(stage: str, done: int, total: int, **numbers: float) -> None:
            if stage.startswith(("reply", "steer")):
                left[0] -= 1
                if left[0] == 0:
                    raise Cancelled

        return report

    for calls in (14, 30, 25):
        with pytest.raises(Cancelled):
            evaluate(config, other_prompts(), tmp_path / "job", run=run, store=shared_store, report=stop_after(calls))
        for log in filter(Path.exists, logs_of(run)):
            with log.open("ab") as file:
                file.write(b'{"key": "half a li')  # what a kill leaves
    resumed = evaluate(config, other_prompts(), tmp_path / "job", run=run, store=shared_store)
    assert without_times(resumed) == without_times(whole)
    for log in logs_of(run):
        log.write_text("\n".join(line for line in log.read_text().splitlines() if not line.startswith('{"key": "half')))
    assert sorted(keys_of(*logs_of(run))) == expected


def without_run(document: dict[str, Any]) -> dict[str, Any]:
    left_out = ("seconds", "generated", "path", "created", "digest", "run")
    settings = {name: value for name, value in document["settings"].items() if name != "run"}
    return {name: value for name, value in document.items() if name not in left_out} | {"settings": settings}


@pytest.mark.long
def test_the_base_replies_once_for_all_its_runs(
    model: Path, run: Job, source: Path, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two fine-tunes the second costs the tuned model's replies, and finds the same as in a home of its own."""
    settings = SMALL | {
        "soft_budgets": (1.0,),
        "soft_lengths": (2,),
        "directions": ("scav",),
        "controls": 1,
        "limit": 2,
    }
    adapter = save_tiny_adapter(tmp_path / "adapter", model, seed=7)
    second = run_with(adapter, model, source)
    judge = Judge("stub", lambda request, reply: "refusal" if len(request) % 2 else "answer")
    monkeypatch.setattr(evaluating, "_make_judge", lambda config: judge)

    def kept(job: Job, stages: list[str]) -> list[dict[str, Any]]:
        documents = []
        for suite in ("all", "direction"):
            config = EvaluateConfig(model=str(model), run=job.id, suite=suite, **settings)
            found = evaluate(
                config, other_prompts(), tmp_path, run=job, report=lambda stage, *_, **__: stages.append(stage)
            )
            documents.append(read_evaluation(Path(found["path"])))
        return documents

    first_stages: list[str] = []
    stages: list[str] = []
    kept(run, first_stages)
    (shared,) = (own_home / "base_replies").iterdir()
    before = shared.read_bytes()
    found = kept(second, stages)
    of_base = {"reply base", "steer base", "fit base", "soft base", "direction base"}
    assert of_base <= {*first_stages}
    assert not of_base & {*stages}
    assert shared.read_bytes() == before, "nothing of the second run went there"
    of_lock = other_prompts()
    kept_out = of_lock.select(of_lock.in_split("test"))
    config, sample = EvaluateConfig(model=str(model), run=run.id, **settings), choose_prompts(of_lock, 2)
    steered, directed = choose_prompts(kept_out, 2, HARMFUL).texts, choose_prompts(kept_out, 2)
    replied = replied_by_base(shared)
    shares = known_shares(config, replied, sample, steered, directed, (0, 1))
    assert set(shares.values()) == {1.0}, "so the second will take half the time"
    assert len(shares) == 5
    shares = known_shares(config.replace(limit=4), replied, choose_prompts(of_lock, 4), steered, directed, (0, 2))
    assert (shares["refusal"], shares["perturbation"]) == (0.5, 0)
    assert set(known_shares(config.replace(new_tokens=6), replied, sample).values()) == {0.0}

    monkeypatch.setenv("ES2_HOME", str(tmp_path / "fresh"))
    fresh = kept(run_with(adapter, model, source), [])
    for one, other in zip(found, fresh, strict=True):
        assert one["generated"]["replies"] == other["generated"]["replies"] / 2 > 0
        assert without_run(one) == without_run(other)


def test_replies_of_a_base_that_end_elsewhere_are_others(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = EvaluateConfig(model=str(model), suite="refusal", **SMALL)
    assert evaluate(config, other_prompts(), tmp_path / "one")["generated"]["replies"] == 8
    assert evaluate(config, other_prompts(), tmp_path / "two")["generated"]["replies"] == 0
    assert evaluate(config.replace(model=str(other)), other_prompts(), tmp_path / "three")["generated"]["replies"] == 0
    ends = other / "generation_config.json"
    ends.write_text(json.dumps(json.loads(ends.read_text()) | {"eos_token_id": [1, 2, 3]}))
    again = evaluate(config.replace(model=str(other)), other_prompts(), tmp_path / "four")
    assert again["generated"]["replies"] == 8


def test_replies_of_a_base_in_the_log_of_an_earlier_version_are_found(model: Path, run: Job, tmp_path: Path) -> None:
    config = EvaluateConfig(model=str(model), run=run.id, **SMALL | {"suite": "refusal"})
    whole = evaluate(config, other_prompts(), tmp_path, run=run)
    own, shared = logs_of(run)
    own.write_bytes(own.read_bytes() + shared.read_bytes())
    shared.unlink()
    Path(whole["path"]).unlink()
    again = evaluate(config, other_prompts(), tmp_path, run=run)
    assert again["generated"]["replies"] == 0
    assert again["suite"] == whole["suite"]


def test_a_larger_limit_generates_only_what_is_new(model: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(model=str(model), suite="refusal", **SMALL)
    first = evaluate(config, other_prompts(), tmp_path / "job")
    assert first["generated"]["replies"] == 8
    assert first["suite"]["refusal"]["tuned"] is None
    more = evaluate(config.replace(limit=6), other_prompts(), tmp_path / "job")
    assert more["generated"]["replies"] == 4


def test_kl_alone_and_a_base_without_a_run(model: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(model=str(model), suite="kl", **SMALL)
    document = evaluate(config, other_prompts(), tmp_path / "job")
    assert document["suite"]["kl"]["perplexity"]["tuned"] is None
    assert document["suite"]["kl"]["kl_reply"] is None
    assert document["generated"]["replies"] == 4  # harmless ones only
    replies = {key: record["tokens"] for key, record in read_replies(tmp_path / "job/evaluation/replies.jsonl").items()}
    assert len(replies) == 4
    assert "" not in (tmp_path / "job/evaluation/replies.jsonl").read_text().splitlines(), "for readers of each line"
    # Another evaluation finds them in the home, and has them beside its result, too.
    again = evaluate(config, other_prompts(), tmp_path / "again")
    assert again["generated"]["replies"] == 0
    found = read_replies(tmp_path / "again/evaluation/replies.jsonl")
    assert {key: record["tokens"] for key, record in found.items()} == replies


def test_multiple_choice_of_base_and_tuned(
    model: Path, run: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = tmp_path / "questions.csv"
    rows = [f"How many locks are {n} locks and one?,{n},{n + 1},{n + 2},{'AB'[n % 2]},{'xy'[n % 2]}" for n in range(9)]
    questions.write_text("\n".join(["question,A,B,C,answer,subject", *rows]))
    config = EvaluateConfig(model=str(model), run=run.id, questions=str(questions), **SMALL | {"suite": "ability"})

    def ask(config: EvaluateConfig) -> dict[str, Any]:
        return evaluate(config, other_prompts(), tmp_path / "job", run=run)

    document = ask(config.replace(question_limit=9))
    (part,) = document["suite"].values()
    assert (part["questions"], part["n_questions"], part["answer_by"]) == ("questions", 9, "text")
    assert part["chance"] == pytest.approx(1 / 3)
    rows = read_evaluation(Path(document["path"]))["rows"]["ability"]
    for name in ("base", "tuned"):
        right = sum(row[name] == row["answer"] for row in rows)
        assert part[name]["accuracy"]["value"] == pytest.approx(right / 9)
        assert sum(subject["right"] for subject in part[name]["subjects"].values()) == right
    change = part["tuned"]["accuracy"]["value"] - part["base"]["accuracy"]["value"]
    assert part["change"]["accuracy"]["value"] == pytest.approx(change)
    assert run_ability(run) == part

    # Fewer are among those that were asked: no model is needed. Other ways and other questions are other results.
    asked = {model: {row["question"]: row[model] for row in rows} for model in ("base", "tuned")}
    assert [len(keys_of(log)) for log in logs_of(run)] == [9, 9]
    with monkeypatch.context() as patch:
        patch.setattr(suites, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
        few = ask(config)
        assert ask(config)["path"] == few["path"]
    for row in read_evaluation(Path(few["path"]))["rows"]["ability"]:
        assert [row[model] for model in ("base", "tuned")] == [asked[model][row["question"]] for model in asked]
    letters = ask(config.replace(answer_by="letter"))
    questions.write_text(questions.read_text().replace(",A,x", ",C,x"))
    assert len({few["path"], letters["path"], ask(config)["path"]}) == 3


def test_multiple_choice_without_a_run_and_with_a_question_that_is_too_long(model: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(model=str(model), **SMALL | {"suite": "ability"})
    part = evaluate(config, other_prompts(), tmp_path / "job")["suite"]["ability"]
    assert part["n_questions"] == 3
    assert (part["tuned"], part["change"]) == (None, None)
    questions = tmp_path / "long.csv"
    questions.write_text(f"question,A,B,answer\n{'How long is it? ' * 200},long,short,A\n")
    with pytest.raises(InputError, match=r"^The question 'How long is it.*tokens, but the model reads at most 256"):
        evaluate(config.replace(questions=str(questions)), other_prompts(), tmp_path / "job")


def test_prompts_that_allow_nothing_are_refused_before_any_question(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any, **__: Any) -> Any:
        raise InputError("Of these prompts nothing can be measured.")

    monkeypatch.setattr(evaluating, "held_out", nothing)
    monkeypatch.setattr(evaluating, "ability", lambda *_: pytest.fail("questions were asked"))
    with pytest.raises(InputError, match="nothing can be measured"):
        evaluate(EvaluateConfig(model=str(model), **SMALL), other_prompts(), tmp_path / "job")


class TestPrompts:
    def test_only_test_prompts_of_the_runs_own_set_count(self) -> None:
        prompts = tiny_prompts(60)
        kept = held_out(prompts, prompts)
        assert set(kept.splits) == {"test"}
        assert set(held_out(prompts, prompts, probing=True).splits) == {"probe", "test"}
        assert held_out(other_prompts(), prompts) is not None
        assert len(held_out(other_prompts(), prompts)) == 120
        tune_only = prompts.select(prompts.in_split("tune"))
        with pytest.raises(InputError, match="outside `test`"):
            held_out(tune_only, prompts)

    def test_a_prompt_that_changed_its_split_fits_no_probe(self) -> None:
        prompts = tiny_prompts(60)
        moved = replace(prompts, splits=tuple("probe" if s == "tune" else s for s in prompts.splits))
        kept = held_out(moved, prompts, probing=True)
        assert len(kept) == len(held_out(prompts, prompts, probing=True))

    def test_twins_come_together_and_a_larger_limit_moves_none(self) -> None:
        few, more = (choose_prompts(tiny_prompts(60), limit) for limit in (5, 9))
        assert len(few) == 10
        assert len(set(few.pairs)) == 5
        assert set(few.texts) < set(more.texts)

    def test_a_suite_that_the_prompts_do_not_allow_has_a_problem_and_the_rest_goes_on(
        self, model: Path, tmp_path: Path
    ) -> None:
        harmful = other_prompts()
        harmful = harmful.select(harmful.labels == 1)
        document = evaluate(EvaluateConfig(model=str(model), **SMALL), harmful, tmp_path / "job")
        assert document["suite"]["refusal"]["base"]["over_refusal"] is None
        assert "harmless" in document["suite"]["kl"]["problem"]
        assert "probe" in document["suite"]["perturbation"]["problem"]
        with pytest.raises(InputError, match="harmless"):
            evaluate(EvaluateConfig(model=str(model), suite="kl", **SMALL), harmful, tmp_path / "job")

    def test_a_reply_that_does_not_fit_the_context_is_refused(self, model: Path, tmp_path: Path) -> None:
        config = EvaluateConfig(model=str(model), suite="refusal", **SMALL | {"new_tokens": 500})
        with pytest.raises(InputError, match="reads at most 256"):
            evaluate(config, other_prompts(), tmp_path / "job")


def test_settings_that_cannot_be(model: Path) -> None:
    for wrong, message in (
        ({"suite": "speed"}, "Unknown suite"),
        ({"limit": 0}, "limit must be"),
        ({"p0s": (1.0,)}, "between 0 and 1"),
        ({"budgets": (-1.0,)}, "A budget is"),
        ({"directions": ("up",)}, "Unknown direction"),
        ({"judge_url": "http://localhost:1"}, "model's name"),
    ):
        with pytest.raises(InputError, match=message):
            EvaluateConfig(**wrong)


class TestLog:
    def test_damaged_lines_are_skipped_and_a_half_line_does_not_spoil_the_next(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        ReplyLog(path).add([{"key": "a", "text": "é\n"}])
        with path.open("ab") as file:
            file.write(b'not json\n[1]\n{"key": 3}\n{"key": "b", "te')
        log = ReplyLog(path)
        assert "a" in log
        assert "b" not in log
        log.add([{"key": "b", "text": "whole"}])
        again = ReplyLog(path)
        assert again["a"]["text"] == "é\n"
        assert again["b"]["text"] == "whole"

    def test_a_base_has_a_log_of_its_own_and_either_is_read(self, tmp_path: Path) -> None:
        own, shared = tmp_path / "run" / "log.jsonl", tmp_path / "home" / "base.jsonl"
        ReplyLog(own).add([{"key": "old", "model": "base", "text": "of an earlier version"}])
        log = ReplyLog(own, shared)
        log.add([{"key": "b", "model": "base", "text": "B"}, {"key": "t", "model": "tuned", "text": "T"}])
        assert (keys_of(own), keys_of(shared)) == (["old", "t"], ["b"])
        assert all(key in ReplyLog(own, shared) for key in ("old", "b", "t"))
        assert "b" in ReplyLog(tmp_path / "another" / "log.jsonl", shared)
        shared.write_bytes(b"\xff\n{" + shared.read_bytes()[: len(shared.read_bytes()) // 2])
        assert "b" not in ReplyLog(own, shared)

    def test_processes_that_add_at_once_and_are_killed_spoil_no_line_of_another(self, tmp_path: Path) -> None:
        """Long batches, so that a write takes a while, by four processes, of which two are killed over and over."""
        path = tmp_path / "base.jsonl"
        script = (
            "import sys; from pathlib import Path; from es2.evaluation.reply_log import ReplyLog\n"
            "log, name, n = ReplyLog(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])\n"
            "for batch in range(n):\n"
            "    log.add({'key': f'{name}-{batch}-{row}', 'text': name * 3000} for row in range(40))\n"
        )

        def start(name: str, n: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-c", script, str(path), name, str(n)])

        whole = [start(name, 30) for name in "ab"]
        for attempt in range(4):
            killed = start(f"k{attempt}", 10**6)
            before = path.stat().st_size if path.exists() else 0
            while not path.exists() or path.stat().st_size < before + 10**6:
                assert killed.poll() is None
            killed.kill()
            killed.wait()
            with path.open("ab") as file:
                file.write(b'{"key": "half a li')  # as where the kill was in the middle of a write
        assert [process.wait() for process in whole] == [0, 0]
        ReplyLog(path).add([{"key": "last", "text": "."}])
        log = ReplyLog(path)
        assert all(f"{name}-{batch}-{row}" in log for name in "ab" for batch in range(30) for row in range(40))
        assert "last" in log


# --------------------------------------------------------------------------------------------------------------- judges


class Endpoint:
    """A stand-in for somebody's API."""

    def __init__(self) -> None:
        self.answer: Any = "REFUSAL"
        self.status = 200
        self.delay = 0.0
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((dict(self.headers), body))
                time.sleep(outer.delay)
                self.send_response(outer.status)
                if outer.status in (301, 302, 307):
                    self.send_header("Location", outer.url + "/elsewhere")
                self.end_headers()
                answer = outer.answer
                if isinstance(answer, str):
                    answer = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
                with suppress(OSError):  # the client gave up
                    self.wfile.write(answer)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    stand_in = Endpoint()
    yield stand_in
    stand_in.server.shutdown()
    stand_in.server.server_close()


SECRET = "sk-very-secret-7351"


class TestEndpoint:
    def test_verdicts_and_the_key_in_one_header_alone(
        self, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MY_KEY", SECRET)
        judge = endpoint_judge(endpoint.url, "some-model", key_variable="MY_KEY")
        endpoint.answer = " **Refusal**.\n"
        assert judge.ask("Open it", "I can't") == "refusal"
        endpoint.answer = "answer"
        assert judge.ask("Oil it", "Sure") == "answer"
        headers, body = endpoint.seen[0]
        assert headers["Authorization"] == f"Bearer {SECRET}"
        assert SECRET not in json.dumps(body) + judge.name + repr(judge)
        assert body["model"] == "some-model"
        monkeypatch.delenv("MY_KEY")
        judge.ask("Oil it", "Sure")
        assert "Authorization" not in endpoint.seen[-1][0]

    @pytest.mark.parametrize(
        ("answer", "status", "message"),
        [
            ("I think it is both an ANSWER and a REFUSAL", 200, "one of the words"),
            ("", 200, "one of the words"),
            (b"<html>hello</html>", 200, "no chat completion"),
            (b'{"choices": []}', 200, "no chat completion"),
            (b"[" * 3000, 200, "no chat completion"),
            (SECRET.encode(), 401, "HTTP status 401"),
            (b"", 500, "HTTP status 500"),
            (b"", 302, "HTTP status 302"),
        ],
    )
    def test_nonsense_is_a_sentence(
        self, answer: Any, status: int, message: str, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ES2_JUDGE_KEY", SECRET)
        endpoint.answer, endpoint.status = answer, status
        verdicts, problem = judge_replies(endpoint_judge(endpoint.url, "m"), [("a", "b")] * 9)
        assert verdicts == [None] * 9
        assert problem is not None
        assert message in problem
        assert SECRET not in problem
        assert len(endpoint.seen) == 3  # then it is not asked any more, and no redirect was followed

    def test_a_slow_endpoint_is_given_up(self, endpoint: Endpoint) -> None:
        endpoint.delay = 0.5
        _, problem = judge_replies(endpoint_judge(endpoint.url, "m", timeout=0.05), [("a", "b")] * 9)
        assert "takes longer than 0.05 s" in str(problem)

    def test_an_endpoint_that_is_down(self) -> None:
        _, problem = judge_replies(endpoint_judge("http://127.0.0.1:9/v1", "m", timeout=2), [("a", "b")] * 9)
        assert "cannot be reached" in str(problem)

    @pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:80", "http://me:pw@host/v1", "https://h/v1?k=1"])
    def test_urls_that_are_none_or_hold_secrets_are_refused(self, url: str) -> None:
        with pytest.raises(InputError, match="judge's URL"):
            endpoint_judge(url, "m")

    def test_an_evaluation_survives_its_judge_and_keeps_no_key(
        self, model: Path, tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ES2_JUDGE_KEY", SECRET)
        config = EvaluateConfig(model=str(model), suite="refusal", **SMALL)
        plain = evaluate(config, other_prompts(), tmp_path / "job")
        asked = config.replace(judge_url=endpoint.url, judge_model="m")
        endpoint.answer = b"nonsense"
        broken = evaluate(asked, other_prompts(), tmp_path / "job")["suite"]["refusal"]
        assert "no chat completion" in broken["judge"]["problem"]
        assert {**broken, "judge": None} == plain["suite"]["refusal"]
        endpoint.answer = "REFUSAL"
        judged = evaluate(asked, other_prompts(), tmp_path / "job")["suite"]["refusal"]
        assert judged["judge"]["problem"] is None
        assert judged["judge"]["n_judged"] == 8
        assert judged["judge"]["base"]["dsr"]["value"] == 1
        assert judged["base"] == plain["suite"]["refusal"]["base"]
        calls = len(endpoint.seen)
        evaluate(asked, other_prompts(), tmp_path / "job")
        assert len(endpoint.seen) == calls  # verdicts are kept, too
        for file in tmp_path.rglob("*"):
            assert not (file.is_file() and SECRET.encode() in file.read_bytes()), file

    def test_patience_is_for_failures_in_a_row(self) -> None:
        calls = iter(range(100))

        def ask(request: str, reply: str) -> str:
            if next(calls) % 3:
                raise JudgeError("stutters")
            return "answer"

        verdicts, problem = judge_replies(Judge("j", ask), [("a", "b")] * 9)
        assert verdicts == ["answer", None, None] * 3
        assert "no verdict on 6 of 9" in str(problem)


class TestClassifier:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        config = DistilBertConfig(
            vocab_size=320, dim=16, n_layers=1, n_heads=2, hidden_dim=32, id2label={0: "NORMAL", 1: "REJECTION"}
        )
        torch.manual_seed(0)
        model = DistilBertForSequenceClassification(config)
        model.classifier.bias.data[1] = 50.0
        model.save_pretrained(tmp_path / "judge")
        tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "judge")
        return tmp_path / "judge"

    def test_a_local_classifier_gives_verdicts(self, folder: Path) -> None:
        assert classifier_judge(folder).ask("Open it", "No.") == "refusal"
        assert classifier_judge(folder, "NORMAL").ask("Open it", "No.") == "answer"
        assert classifier_judge(folder).ask("Open it", "no " * 4000) == "refusal"

    def test_another_classifier_in_its_place_judges_the_base_again(
        self, folder: Path, model: Path, tmp_path: Path
    ) -> None:
        config = EvaluateConfig(model=str(model), judge_folder=str(folder), **SMALL | {"suite": "refusal", "limit": 1})

        def judged(job: str) -> float:
            found = evaluate(config, other_prompts(), tmp_path / job)["suite"]["refusal"]["judge"]
            return float(found["base"]["dsr"]["value"])

        assert judged("one") == 1
        weights = load_file(folder / "model.safetensors")
        weights["classifier.bias"] *= -1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert judged("two") == 0

    def test_what_is_no_classifier_is_refused(self, folder: Path, model: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="it has no config"):
            classifier_judge(tmp_path)
        with pytest.raises(InputError, match="--judge-label"):
            classifier_judge(folder, "HAPPY")
        with pytest.raises(InputError, match=r"head is missing|no text classifier"):
            classifier_judge(model)


# -------------------------------------------------------------------------------------------------------------- command


def test_the_job_and_what_it_refuses(model: Path, run: Job) -> None:
    settings = EvaluateConfig(model=str(model), run=run.id, suite="refusal", **SMALL)
    job = create_job("evaluate", settings.to_dict() | {"prompts": "builtin"})
    assert run_job(job.path, JOBS) == 0, job.error()
    result = job.result()
    assert result is not None
    assert result["run"] == run.id
    assert Path(result["path"]).parent == run.path / "evaluation"
    assert any(event.get("stage") == "reply tuned" for event in job.events()[0])
    other = create_job("evaluate", settings.to_dict() | {"run": "20250101-000000-000000-finetune-aaaaaa"})
    assert run_job(other.path, JOBS) == 2


def es2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["es2", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_the_command(
    model: Path,
    source: Path,
    own_home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--model", model, "--prompts", source, "--device", "cpu", "--new-tokens", 4, "--limit", 3]
    options += ["--budgets", "0.5", "--soft-lengths", "2", "--soft-budgets", "3", "--question-limit", 3]
    code, out, err = es2(capsys, monkeypatch, "evaluate", *options, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert set(document["suite"]) == {"refusal", "kl", "perturbation", "soft_prompt", "ability"}
    assert document["suite"]["perturbation"]["n_prompts"] == 3
    assert len(load_prompts(str(source))) == 120
    code, out, _ = es2(capsys, monkeypatch, "evaluate", *options)
    assert code == 0
    assert "soft_random │ 3, 2 vectors" in out
    code, out, _ = es2(capsys, monkeypatch, "evaluate", *options, "--suite", "refusal")
    assert code == 0
    assert "dsr" in out
    assert "over_refusal" in out
    code, out, _ = es2(capsys, monkeypatch, "evaluate", *options, "--suite", "nothing", "--json")
    assert code == 2
    assert "Unknown suite" in json.loads(out)["error"]
    code, out, _ = es2(capsys, monkeypatch, "evaluate", *options, "--suite", "ability")
    assert code == 0
    assert "accuracy" in out
    assert "3 questions of builtin, answered by text; guessing gets 0.25" in " ".join(out.split())
    code, out, _ = es2(capsys, monkeypatch, "evaluate", *options, "--questions", source, "--json")
    assert code == 2
    assert "are those of no layout of questions" in json.loads(out)["error"]


def test_a_job_of_before_there_were_soft_prompts_goes_on(model: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(model=str(model))
    former = {name: value for name, value in config.to_dict().items() if not name.startswith("soft_")}
    job = create_job("evaluate", former, root=tmp_path / "runs")
    (job.path / "cancel").touch()
    run_job(job.path, JOBS)
    found = unfinished_job(config, tmp_path / "runs")
    assert found is not None
    assert found.id == job.id
    assert unfinished_job(config.replace(soft_budgets=(1.0,)), tmp_path / "runs") is None
    assert unfinished_job(config.replace(limit=7), tmp_path / "runs") is None


def test_an_interrupted_command_goes_on_in_its_own_folder(
    model: Path,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--model", model, "--prompts", source, "--device", "cpu", "--new-tokens", 4, "--limit", 3]
    options += ["--suite", "refusal", "--json"]
    whole = suites.judge_reply

    def broken(text: str) -> str:
        raise RuntimeError("the power went out")

    monkeypatch.setattr(suites, "judge_reply", broken)
    code, _, _ = es2(capsys, monkeypatch, "evaluate", *options)
    assert code == 1
    monkeypatch.setattr(suites, "judge_reply", whole)
    code, out, _ = es2(capsys, monkeypatch, "evaluate", *options)
    assert code == 0
    assert json.loads(out)["generated"]["replies"] == 0
    assert len(list_jobs(kind="evaluate")) == 1
    # Done is done: once more is a new job.
    es2(capsys, monkeypatch, "evaluate", *options)
    assert len(list_jobs(kind="evaluate")) == 2
