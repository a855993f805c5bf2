"""Multiple choice: log-likelihoods against plain transformers and the LM Evaluation Harness, and their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from es2.evaluation.multiple_choice import (
    OPENING,
    accuracy_numbers,
    answers,
    chosen,
    n_characters,
    question_text,
    tokens_of,
)
from es2.models import choices
from es2.models.chat_template import render, template_prefix
from es2.models.choices import score_options
from es2.models.loading import load_model, load_tokenizer
from es2.prompts.questions import Question
from tests.builders import save_tiny_model

QUESTIONS = (
    Question("What is the capital of France?", ("Paris", "Rome", "the town of Lyon", "Lyon"), 0, "places"),
    Question("Why is bread baked?", ("to eat it", "to eat", "for the lock"), 1, "bread"),
    Question("Which?", ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j"), 9, "letters"),
    Question("Is a harbour a place where a map leads to, in a story about two friends?", ("yes", "no"), 0, "places"),
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def plain_scores(model: Any, tokenizer: Any, question: Question, by: str) -> list[float]:
    """The log-likelihood of each option, one at a time, by the model's own forward pass."""
    found = []
    before, whole = tokens_of(tokenizer, [question], by)
    for tokens in whole[0]:
        with torch.no_grad():
            logs = model(torch.tensor([tokens])).logits[0].double().log_softmax(dim=-1)
        places = range(len(before[0]), len(tokens))
        found.append(sum(float(logs[place - 1, tokens[place]]) for place in places))
    return found


@pytest.mark.parametrize("by", ["text", "letter"])
@pytest.mark.parametrize(
    ("architecture", "shares"), [("llama", True), ("llama", False), ("gpt2", True), ("gemma", True), ("mistral", True)]
)
def test_log_likelihoods_are_those_of_the_plain_model(tmp_path: Path, architecture: str, shares: bool, by: str) -> None:
    folder = save_tiny_model(tmp_path / "model", architecture)
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype="float32", device="cpu")
    contexts, tokens = tokens_of(tokenizer, QUESTIONS, by)
    prefix = template_prefix(tokenizer, contexts)
    assert len(prefix) > 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices, "is_verified", lambda model: shares)
        patch.setattr(choices, "usual_tokens", lambda device: 300)
        batches = list(score_options(model, contexts, tokens, prefix=prefix))
    assert len(batches) > 1
    found = {row: scores for batch in batches for row, scores in batch.items()}
    assert sorted(found) == [0, 1, 2, 3]
    for row, question in enumerate(QUESTIONS):
        assert found[row] == pytest.approx(plain_scores(model, tokenizer, question, by), rel=1e-4)


def test_letters_cost_one_pass_and_texts_one_each(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype="float32", device="cpu")
    rows = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for by in ("letter", "text"):
        contexts, tokens = tokens_of(tokenizer, QUESTIONS[:1], by)
        list(score_options(model, contexts, tokens))
    assert rows == [1, 4]


def test_a_question_as_the_model_reads_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tiny_model(tmp_path / "model"))
    assert question_text(QUESTIONS[3], "letter") == f"{QUESTIONS[3].text}\nA. yes\nB. no"
    assert question_text(QUESTIONS[3], "text") == QUESTIONS[3].text
    assert answers(QUESTIONS[2], "letter") == list("ABCDEFGHIJ")
    contexts, tokens = tokens_of(tokenizer, QUESTIONS[3:], "letter")
    asked = tokenizer.decode(contexts[0])
    assert asked.endswith("A. yes\nB. no<|im_end|>\n<|im_start|>assistant\nAnswer:")
    assert [tokenizer.decode(option) for option in tokens[0]] == [f"{asked} A", f"{asked} B"]
    tokenizer.chat_template = None
    assert tokenizer.decode(tokens_of(tokenizer, QUESTIONS[3:], "text")[1][0][1]) == f"{QUESTIONS[3].text}\nAnswer: no"
    assert n_characters(QUESTIONS[3], "text") == 2 * len(QUESTIONS[3].text) + len("yesno")


def test_the_beginning_of_a_reply_moves_no_position(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tiny_model(tmp_path / "model"))
    plain, begun = render(tokenizer, ["Hi!"]), render(tokenizer, ["Hi!"], replies=[OPENING])
    assert begun.last_instruction == plain.last_instruction
    assert begun.token_ids[0][: len(plain.token_ids[0])] == plain.token_ids[0]


def test_texts_are_compared_per_character_and_letters_as_they_are() -> None:
    question = Question("?", ("four", "a longer one"), 1, "")
    assert chosen(question, (-5.0, -9.0), "text") == 1
    assert chosen(question, (-5.0, -9.0), "letter") == 0


class TestNumbers:
    def test_accuracy_change_and_subjects(self) -> None:
        asked = [Question(str(n), ("a", "b", "c", "d"), n % 4, "even" if n % 2 == 0 else "odd") for n in range(100)]
        base = [one.answer if n < 60 else (one.answer + 1) % 4 for n, one in enumerate(asked)]
        tuned = [one.answer if n < 50 else (one.answer + 1) % 4 for n, one in enumerate(asked)]
        found = accuracy_numbers(asked, {"base": base, "tuned": tuned}, 0)
        assert found["chance"] == 0.25
        assert found["base"]["accuracy"]["value"] == 0.6
        assert found["tuned"]["subjects"] == {
            "even": {"questions": 50, "right": 25},
            "odd": {"questions": 50, "right": 25},
        }
        half = 1.96 * np.sqrt(0.6 * 0.4 / 100)
        assert found["base"]["accuracy"]["low"] == pytest.approx(0.6 - half, abs=0.02)
        change = found["change"]["accuracy"]
        assert change["value"] == pytest.approx(-0.1)
        half = 1.96 * np.sqrt(0.1 * 0.9 / 100)  # paired: ten of the hundred changed, all for the worse
        assert (change["low"], change["high"]) == pytest.approx((-0.1 - half, -0.1 + half), abs=0.02)

    def test_where_all_are_right_the_interval_is_not_a_point(self) -> None:
        asked = [Question(str(n), ("a", "b"), 0, "") for n in range(20)]
        found = accuracy_numbers(asked, {"base": [0] * 20}, 0)
        assert found["base"]["accuracy"]["value"] == 1
        assert 0.8 < found["base"]["accuracy"]["low"] < 0.9
        assert (found["tuned"], found["change"]) == (None, None)


@pytest.mark.parametrize("by", ["text", "letter"])
def test_it_agrees_with_the_lm_evaluation_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """The same choices and differences of log-likelihoods as `lm_eval` on a task of its own format."""
    pytest.importorskip("lm_eval")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = save_tiny_model(tmp_path / "model")
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype="float32", device="cpu")
    tokenizer.chat_template = TEMPLATE
    rows = [{"text": question_text(one, by), "choices": answers(one, by), "gold": one.answer} for one in QUESTIONS]
    (tmp_path / "toy.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = ConfigurableTask(
        config={
            "task": "toy",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "toy.jsonl")},
                "cache_dir": str(tmp_path / "datasets"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "gen_prefix": OPENING,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )
    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),  # or it reads every task that it ships
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    contexts, tokens = tokens_of(tokenizer, QUESTIONS, by)
    ours = {row: scores for batch in score_options(model, contexts, tokens) for row, scores in batch.items()}
    samples = {sample["doc_id"]: sample for sample in theirs["samples"]["toy"]}
    for row in range(len(QUESTIONS)):
        expected = [response[0] for response in samples[row]["filtered_resps"]]
        assert ours[row] == pytest.approx(list(map(float, expected)), rel=1e-4)
    right = [chosen(one, ours[row], by) == one.answer for row, one in enumerate(QUESTIONS)]
    assert theirs["results"]["toy"]["acc_norm,none" if by == "text" else "acc,none"] == np.mean(right)
