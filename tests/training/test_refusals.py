"""What a fine-tune sees of behaviour on the way: measured again by plain transformers, one prompt at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from es2.core.progress import silent
from es2.models.batching import end_tokens
from es2.models.chat_template import render
from es2.models.forward import FinetuneForward
from es2.models.loading import load_model, load_tokenizer
from es2.models.thinking import ReplyThinking, answer_reader
from es2.prompts.prompt_set import HARMFUL
from es2.training import workload as module
from es2.training.config import FinetuneConfig
from es2.training.finetune import FinetuneResult, finetune
from es2.training.sampling import make_schedule
from es2.training.validation import REFUSAL_OPENING
from es2.training.workload import Workload
from tests.builders import save_tiny_model
from tests.training.test_finetune import PROMPTS, Log, tuned_model

REPLY = 6
VALIDATED = 4  # of each label; half of the harmful ones are replied to


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", initializer_range=0.1)


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))


def tuned(llama: Path, folder: Path, log: Log, **settings: Any) -> FinetuneResult:
    defaults: dict[str, Any] = {
        "steps": 4, "pairs_per_step": 5, "validate_every": 4, "learning_rate": 3e-3, "reply_tokens": REPLY,
        "kl_budget": 1.0, "rank": 4, "device": "cpu", "validation_prompts": VALIDATED,
    }  # fmt: skip
    config = FinetuneConfig(layers=(0, 1), model=str(llama), **defaults | settings)
    return finetune(config, PROMPTS, folder, report=log)


def greedy(model: Any, prompt: tuple[int, ...], n_tokens: int) -> tuple[int, ...]:
    found = model.generate(torch.tensor([prompt]), max_new_tokens=n_tokens, do_sample=False)[0, len(prompt) :]
    return tuple(found.tolist())


def test_refusals_and_first_tokens_are_those_of_the_saved_adapter(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[str] = []

    def judge(text: str) -> str:
        judged.append(text)
        return "refusal"

    monkeypatch.setattr(module, "judge_reply", judge)
    log = Log()
    result = tuned(llama, tmp_path, log)
    assert result.best_step == 4
    tokenizer, base, after = load_tokenizer(llama), load_model(llama, device="cpu"), tuned_model(llama, result)
    plan = make_schedule(PROMPTS, 5, 4, 0, VALIDATED, 4)
    harmful = [row for row in plan.validation_rows if PROMPTS.labels[row] == HARMFUL]
    assert (len(harmful), len(plan.validation_replied)) == (VALIDATED, VALIDATED // 2)
    tokens = dict(zip(harmful, render(tokenizer, [PROMPTS.texts[row] for row in harmful]).token_ids, strict=True))
    replies = {row: greedy(base, tokens[row], REPLY) for row in plan.validation_replied}
    texts = [tokenizer.decode(reply, skip_special_tokens=True) for reply in replies.values()]
    assert set(texts) <= set(judged), "the replies that are judged are the base's own"

    for model, point in ((base, result.validations[0]), (after, result.validations[-1])):
        log_probs, agreed, kept = [], [], []
        for row, reply in replies.items():
            prompt = tokens[row]
            with torch.no_grad():
                logits = model(torch.tensor([(*prompt, *reply[:-1])])).logits[0, len(prompt) - 1 :]
            log_probs += logits.log_softmax(dim=-1).gather(1, torch.tensor(reply)[:, None])[:, 0].tolist()
            agreed += [a == b for a, b in zip(logits.argmax(dim=-1).tolist(), reply, strict=True)]
            kept.append(greedy(model, prompt, REPLY)[:REFUSAL_OPENING] == reply[:REFUSAL_OPENING])
        assert point.n_refusals == len(replies)
        assert point.refusal_log_prob == pytest.approx(sum(log_probs) / len(log_probs), rel=1e-3)
        assert point.refusal_agreement == pytest.approx(sum(agreed) / len(agreed))
        assert point.refusals_kept == pytest.approx(sum(kept) / len(kept))
        firsts = [greedy(model, tokens[row], 1)[0] for row in harmful]
        broken = [
            token in end_tokens(model) or not any(map(str.isalnum, tokenizer.decode([token]))) for token in firsts
        ]
        assert point.broken_first == pytest.approx(sum(broken) / VALIDATED)
    first, last = result.validations[0], result.validations[-1]
    assert (first.refusals_kept, first.refusal_agreement) == (1.0, 1.0), "the base agrees with itself"
    assert first.refusal_log_prob != last.refusal_log_prob

    logged = log.steps()[-1]
    for name in ("refusals_kept", "refusal_agreement", "refusal_log_prob", "broken_first"):
        assert logged[f"validation_{name}"] == getattr(last, name)
    assert logged["validation_base_refusal_log_prob"] == first.refusal_log_prob


def test_a_base_that_refuses_nothing_has_no_refusals_to_keep(llama: Path, tmp_path: Path) -> None:
    log = Log()
    result = tuned(llama, tmp_path, log)
    for point in result.validations:
        assert (point.n_refusals, point.refusals_kept, point.refusal_agreement) == (0, None, None)
        assert point.broken_first is not None
    assert "validation_refusal_log_prob" not in log.steps()[-1]
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_first_thought_is_no_broken_token(llama: Path) -> None:
    tokenizer, model = load_tokenizer(llama), load_model(llama, device="cpu").requires_grad_(False)
    plan = make_schedule(PROMPTS, 5, 4, 0, VALIDATED, 4)
    tokens = dict(zip(plan.rows, render(tokenizer, [PROMPTS.texts[row] for row in plan.rows]).token_ids, strict=True))
    thoughts = answer_reader(tokenizer, ReplyThinking(None, "</think>", opened=True))
    work = Workload(
        FinetuneForward(model, template_prefix=(), layers=(0, 1)), plan, tokens, words=tokenizer.decode,
        answer=thoughts, reply_tokens=1, every_harmless=False, harmful=(), report=silent,
    )  # fmt: skip
    word = next(token for token in range(len(tokenizer)) if tokenizer.decode([token]).isalpha())
    assert thoughts((word,)) == "", "the thinking has not ended"
    assert not work._is_broken(word)
    assert work._is_broken(min(end_tokens(model)))


def test_the_best_step_is_one_that_keeps_refusals(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step separates best; where it gave up the refusals, an earlier one is kept."""
    assert tuned(llama, tmp_path / "free", Log(), validate_every=2).best_step == 4
    whole = Workload._refusal_numbers
    calls: list[int] = []

    def given_up(self: Any, scores: Any) -> dict[str, Any]:
        calls.append(1)
        kept = 0.0 if len(calls) == 3 else 1.0  # the base, step 2, step 4
        return whole(self, scores) | {"n_refusals": 9, "refusals_kept": kept}

    monkeypatch.setattr(Workload, "_refusal_numbers", given_up)
    assert tuned(llama, tmp_path / "held", Log(), validate_every=2).best_step == 2


def test_refusals_of_tune_prompts_can_be_asked_for_too(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "judge_reply", lambda text: "refusal")
    tokenizer, model = load_tokenizer(llama), load_model(llama, device="cpu").requires_grad_(False)
    plan = make_schedule(PROMPTS, 5, 4, 0, VALIDATED, 4)
    tokens = dict(zip(plan.rows, render(tokenizer, [PROMPTS.texts[row] for row in plan.rows]).token_ids, strict=True))
    wanted = {*plan.batches[0].harmful[:2], plan.validation_replied[0]}
    network = FinetuneForward(model, template_prefix=(), layers=(0, 1))
    work = Workload(
        network, plan, tokens, words=tokenizer.decode, answer=tokenizer.decode, reply_tokens=REPLY,
        every_harmless=False, harmful=wanted, report=silent,
    )  # fmt: skip
    found = work.base_refusals(plan.rows)
    assert found.keys() == wanted
    for row, record in found.items():
        assert record.reply == greedy(model, tokens[row], REPLY)
        assert len(record.states) == len(tokens[row]) + len(record.reply) - 1, "what a KL over the refusal needs"


def test_the_refusal_term_makes_harmful_prompts_alone_begin_as_refusals_do(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_schedule(PROMPTS, 5, 8, 0, VALIDATED, 4)
    rows = sorted({row for batch in plan.batches for row in (*batch.harmful, *batch.harmless)})
    tokens = render(load_tokenizer(llama), [PROMPTS.texts[row] for row in rows]).token_ids
    harmful = torch.tensor([PROMPTS.labels[row] == HARMFUL for row in rows])
    found: dict[str, list[str]] = {}
    openings: list[torch.Tensor] = []

    def judge(text: str) -> str:
        said = found.setdefault("texts", [])
        said.append(text)
        return "refusal" if text[:1] == said[0][:1] else "answer"

    def gap(model: Any) -> float:
        passes = FinetuneForward(model, template_prefix=(), layers=(0, 1))
        with torch.no_grad():
            _, ahead = passes.look_ahead(tokens)
            odds = passes.head.log_odds(ahead, openings[0])
        return float(odds[harmful].mean() - odds[~harmful].mean())

    measure = Workload._find_openings

    def kept(self: Workload, *rows: Any) -> None:
        measure(self, *rows)
        openings.append(self.refusal_openings)

    monkeypatch.setattr(Workload, "_find_openings", kept)
    monkeypatch.setattr(module, "judge_reply", judge)
    settings = {"steps": 8, "validate_every": 8, "learning_rate": 1e-2}
    log, apart = Log(), Log()
    result = tuned(llama, tmp_path / "one", log, objective="margin+5*refusal", **settings)
    assert 0 < int(openings[0].sum()) < len(openings[0]) / 2
    parts = tuned(llama, tmp_path / "parts", apart, objective="margin+5*refusal", accumulate=3, **settings)
    assert parts.losses == pytest.approx(result.losses, rel=1e-4)
    base = load_model(llama, device="cpu")
    before, after = gap(base), gap(tuned_model(llama, result))
    assert after > before + 0.5

    monkeypatch.setattr(module, "judge_reply", lambda text: "answer")
    with_term = tuned(llama, tmp_path / "with", Log(), objective="margin+5*refusal", steps=2, validate_every=2)
    without = tuned(llama, tmp_path / "without", Log(), objective="margin", steps=2, validate_every=2)
    assert with_term.losses == without.losses, "a base that refuses nothing leaves the separation alone"
