"""Batched replies are those of one prompt at a time, and the numbers are those of the full logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from es2.analysis.resampling import canonical, resample_pairs
from es2.core.errors import InputError
from es2.evaluation.behaviour import ability_numbers, compare_exchange, rate_interval, refusal_numbers
from es2.models.adapters import apply_finetune
from es2.models.batching import end_tokens
from es2.models.chat_template import render, template_prefix
from es2.models.kl import read_lm_head, tuned_lm_head
from es2.models.loading import load_bridge, load_model, load_tokenizer, load_tuned
from es2.models.replies import exchange_states, greedy_replies
from tests.builders import ARCHITECTURES, TEXTS, save_tiny_adapter, save_tiny_model, tiny_prompts

REPLY = 6
Loader = Callable[..., tuple[Path, Any, list[tuple[int, ...]], tuple[int, ...]]]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """The folder, the model, the tokens of all texts and the template's head, of an architecture."""
    root = tmp_path_factory.mktemp("models")

    def loaded(architecture: str = "llama") -> tuple[Path, Any, list[tuple[int, ...]], tuple[int, ...]]:
        folder = root / architecture
        if not folder.exists():
            save_tiny_model(folder, architecture)
        tokenizer = load_tokenizer(folder)
        tokens = list(render(tokenizer, TEXTS).token_ids)
        return folder, load_model(folder, device="cpu"), tokens, template_prefix(tokenizer, tokens)

    return loaded


def all_replies(model: Any, tokens: list[tuple[int, ...]], **settings: Any) -> list[tuple[int, ...]]:
    replies: dict[int, tuple[int, ...]] = {}
    for batch in greedy_replies(model, tokens, REPLY, end_tokens(model), **settings):
        replies.update(zip(batch.rows, batch.replies, strict=True))
    return [replies[row] for row in range(len(tokens))]


def single_replies(model: Any, tokens: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What transformers generates, one prompt at a time."""
    return [
        tuple(model.generate(torch.tensor([prompt]), max_new_tokens=REPLY, do_sample=False)[0, len(prompt) :].tolist())
        for prompt in tokens
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_replies_are_the_single_ones(architecture: str, load: Loader) -> None:
    _, model, tokens, head = load(architecture)
    assert len(head) > 20
    expected = single_replies(model, tokens)
    assert len(set(expected)) > 3
    assert all_replies(model, tokens, prefix=head) == expected
    assert all_replies(model, tokens) == expected
    assert all_replies(model, tokens, prefix=head, rows_at_once=1) == expected


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_bridges_model_replies_alike(architecture: str, load: Loader) -> None:
    folder, model, tokens, head = load(architecture)
    bridge = load_bridge(folder, device="cpu")
    assert all_replies(bridge.original_model, tokens, prefix=head) == single_replies(model, tokens)


def test_an_architecture_that_was_not_verified_replies_without_padding(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, tokens, head = load("llama")
    expected = single_replies(model, tokens)
    monkeypatch.setattr("es2.models.batching.SHARING_VERIFIED", ())
    assert all_replies(model, tokens, prefix=head) == expected


def test_a_reply_ends_with_the_token_that_ends_it(load: Loader) -> None:
    _, model, tokens, head = load("llama")
    whole = all_replies(model, tokens, prefix=head)
    end = whole[0][2]
    model.generation_config.eos_token_id = end
    for cut, full in zip(all_replies(model, tokens, prefix=head), whole, strict=True):
        assert cut == (full[: full.index(end) + 1] if end in full else full)


def test_done_prompts_are_left_out_and_progress_can_stop(load: Loader) -> None:
    _, model, tokens, head = load("llama")
    batches = list(greedy_replies(model, tokens, REPLY, frozenset(), prefix=head, done={0, 2}))
    assert sorted(row for batch in batches for row in batch.rows) == [1, 3, 4, 5, 6]
    told: list[tuple[int, int]] = []

    def report(stage: str, done: int, total: int, **numbers: float) -> None:
        told.append((done, total))
        if done > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(greedy_replies(model, tokens, REPLY, frozenset(), prefix=head, report=report))
    assert told[0] == (0, REPLY * len(tokens))


def test_memory_that_runs_out_halves_the_batch(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, tokens, head = load("llama")
    expected = all_replies(model, tokens, prefix=head)
    whole = type(model).forward

    def small(self: Any, input_ids: Any, **inputs: Any) -> Any:
        if len(input_ids) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return whole(self, input_ids, **inputs)

    monkeypatch.setattr(type(model), "forward", small)
    assert all_replies(model, tokens, prefix=head) == expected


def test_putting_the_adapter_on_makes_the_tuned_model(load: Loader, tmp_path: Path) -> None:
    folder, model, tokens, head = load("llama")
    before = all_replies(model, tokens, prefix=head)
    adapter = save_tiny_adapter(tmp_path / "adapter", folder)
    apply_finetune(model, adapter)
    after = all_replies(model, tokens, prefix=head)
    assert after != before
    assert after == single_replies(load_tuned(folder, adapter, device="cpu"), tokens)
    with pytest.raises(InputError, match="does not fit"):
        apply_finetune(load_model(save_tiny_model(tmp_path / "wide", d_model=48), device="cpu"), adapter)


@pytest.mark.parametrize("on", [{}, {"target_modules": ["lm_head", "q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_ability_is_that_of_the_full_logits(on: dict[str, Any], load: Loader, tmp_path: Path) -> None:
    folder, model, tokens, head = load("llama")
    tokens = tokens[:4]
    replies = all_replies(model, tokens, prefix=head)
    head_layer = read_lm_head(model)
    sequences = [(*prompt, *reply[:-1]) for prompt, reply in zip(tokens, replies, strict=True)]
    with torch.no_grad():
        before = [model(torch.tensor([sequence])).logits[0].log_softmax(-1).double() for sequence in sequences]
    base = exchange_states(model, tokens, replies, len(head))
    apply_finetune(model, save_tiny_adapter(tmp_path / "adapter", folder, **on))
    tuned_layer = tuned_lm_head(model, head_layer)
    assert (tuned_layer is head_layer) == (not on)
    with torch.no_grad():
        after = [model(torch.tensor([sequence])).logits[0].log_softmax(-1).double() for sequence in sequences]
    tuned = exchange_states(model, tokens, replies, len(head))
    for row, (prompt, reply) in enumerate(zip(tokens, replies, strict=True)):
        found = compare_exchange(head_layer, base[row], tuned[row], reply, tuned_layer)
        kl = (before[row].exp() * (before[row] - after[row])).sum(-1)
        said = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(reply)), torch.tensor(reply)
        assert found.n_prompt == len(prompt) - len(head)
        assert found.kl_prompt == pytest.approx(kl[len(head) : len(prompt)].sum().item(), rel=1e-3)
        assert found.kl_reply == pytest.approx(kl[len(prompt) - 1 :].sum().item(), rel=1e-3)
        assert found.nll_base == pytest.approx(-before[row][said].sum().item(), rel=1e-3)
        assert found.nll_tuned == pytest.approx(-after[row][said].sum().item(), rel=1e-3)
        assert found.agreed == (after[row][said[0]].argmax(-1) == said[1]).sum().item()
        itself = compare_exchange(head_layer, base[row], base[row], reply)
        assert itself.agreed == len(reply)
        assert itself.kl_reply == pytest.approx(0, abs=1e-5)


def test_ability_of_base_alone_is_its_perplexity(load: Loader) -> None:
    _, model, tokens, head = load("llama")
    replies = all_replies(model, tokens, prefix=head)
    states = exchange_states(model, tokens, replies, len(head))
    head_layer = read_lm_head(model)
    exchanges = [compare_exchange(head_layer, s, s, reply) for s, reply in zip(states, replies, strict=True)]
    weights = np.ones((11, len(tokens)))
    numbers = ability_numbers(exchanges, weights, compared=False)
    total = sum(exchange.nll_base for exchange in exchanges) / sum(map(len, replies))
    assert numbers["kl_reply"] is None
    assert numbers["perplexity"]["base"]["value"] == pytest.approx(np.exp(total))
    assert ability_numbers(exchanges, weights, compared=True)["agreement"]["value"] == 1.0


class TestRates:
    def test_rates_and_their_paired_difference(self) -> None:
        _, prompts = canonical(tiny_prompts(10))
        weights = resample_pairs(prompts, 500, 0)
        harmful = prompts.labels == 1
        base = np.where(harmful, "answer", "answer").astype(object)
        tuned = base.copy()
        rows = np.flatnonzero(harmful)
        base[rows[:2]] = "refusal"
        tuned[rows[:6]] = "refusal"
        tuned[rows[9]] = "degenerate"
        tuned[np.flatnonzero(~harmful)[0]] = "refusal"
        numbers = refusal_numbers(prompts, {"base": list(base), "tuned": list(tuned)}, weights)
        assert numbers["base"]["dsr"]["value"] == pytest.approx(0.2)
        assert numbers["tuned"]["dsr"]["value"] == pytest.approx(0.6)
        assert numbers["tuned"]["harmful_degenerate"]["value"] == pytest.approx(0.1)
        assert numbers["tuned"]["over_refusal"]["value"] == pytest.approx(0.1)
        assert numbers["change"]["dsr"]["value"] == pytest.approx(0.4)
        assert numbers["base"]["dsr"]["low"] < 0.2 < numbers["base"]["dsr"]["high"]
        # Paired: narrower than two independent intervals would make it.
        width = numbers["change"]["dsr"]["high"] - numbers["change"]["dsr"]["low"]
        assert 0.3 < width < 0.7
        counts = numbers["tuned"]["counts"]["harmful"]
        assert counts == {"refusal": 6, "answer": 3, "empty": 0, "degenerate": 1, "unfinished": 0}

    def test_a_degenerate_reply_is_no_defence(self) -> None:
        _, prompts = canonical(tiny_prompts(5))
        numbers = refusal_numbers(prompts, {"base": ["degenerate"] * 10}, resample_pairs(prompts, 50, 0))
        assert numbers["base"]["dsr"]["value"] == 0
        assert numbers["base"]["harmful_degenerate"]["value"] == 1
        assert numbers["change"] is None

    def test_none_out_of_a_few_is_not_certainty(self) -> None:
        found = rate_interval(np.zeros(10), np.ones((50, 10)))
        assert (found.value, found.low) == (0, 0)
        assert 0.2 < found.high < 0.35
        change = rate_interval(np.zeros(10), np.ones((50, 10)), lowest=-1)
        assert change.low == -change.high < 0

    def test_a_set_of_one_label_has_no_rate_of_the_other(self) -> None:
        _, prompts = canonical(tiny_prompts(5))
        harmless = prompts.select(prompts.labels == 0)
        numbers = refusal_numbers(harmless, {"base": ["answer"] * 5}, resample_pairs(harmless, 20, 0))
        assert numbers["base"]["dsr"] is None
        assert numbers["base"]["over_refusal"]["value"] == 0
