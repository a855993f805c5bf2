"""The cheap passes give what the plain transformers model gives, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from es2.core.errors import InputError
from es2.models.batching import batches_by_length, end_tokens
from es2.models.blocks import find_blocks
from es2.models.chat_template import render
from es2.models.forward import BaseReply, FinetuneForward
from es2.models.loading import load_model, load_tokenizer
from tests.builders import ARCHITECTURES, TEXTS, save_tiny_model, tiny_model

LAYERS = (0, 1)
REPLY = 6


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, list[tuple[int, ...]]]]:
    """A fresh tiny model of an architecture and the tokens of all texts."""
    root = tmp_path_factory.mktemp("models")

    def model_and_tokens(architecture: str) -> tuple[Any, list[tuple[int, ...]]]:
        folder = root / architecture
        if not folder.exists():
            save_tiny_model(folder, architecture)
        tokens = render(load_tokenizer(folder), TEXTS).token_ids
        return load_model(folder, device="cpu").requires_grad_(False), list(tokens)

    return model_and_tokens


def head_of(tokens: list[tuple[int, ...]]) -> tuple[int, ...]:
    first, last = min(tokens), max(tokens)
    return first[: next(i for i, token in enumerate(first) if token != last[i])]


def network(model: Any, tokens: list[tuple[int, ...]], **settings: Any) -> FinetuneForward:
    return FinetuneForward(model, template_prefix=head_of(tokens), layers=LAYERS, **settings)


def plain(model: Any, tokens: tuple[int, ...], layers: tuple[int, ...] = LAYERS) -> tuple[Tensor, Tensor]:
    """Embeddings at the last token and all final states, from the model's own hidden states."""
    output = model.base_model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    return torch.stack([output.hidden_states[layer + 1][0, -1] for layer in layers]), output.last_hidden_state[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings_and_replies_are_the_plain_models(architecture: str, load: Callable[[str], Any]) -> None:
    model, tokens = load(architecture)
    passes = network(model, tokens)
    head = len(head_of(tokens))
    assert head > 20
    with torch.no_grad():
        expected = torch.stack([plain(model, prompt)[0] for prompt in tokens])
        found = passes.embed(tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        replies: dict[int, BaseReply] = {}
        for row, reply, embedding in passes.reply(tokens, REPLY, end_tokens(model)):
            replies[row] = reply
            torch.testing.assert_close(embedding, expected[row], rtol=1e-4, atol=1e-4)
        for row, prompt in enumerate(tokens):
            generated = model.generate(torch.tensor([prompt]), max_new_tokens=REPLY, do_sample=False)[0, len(prompt) :]
            assert list(replies[row].reply) == generated.tolist()
            states = plain(model, (*prompt, *replies[row].reply[:-1]))[1][head:]
            torch.testing.assert_close(replies[row].states, states, rtol=1e-4, atol=1e-4)
            assert replies[row].n_prompt == len(prompt) - head
        run = passes.read_harmless(tokens, [replies[row] for row in range(len(tokens))])
        ahead = torch.stack([plain(model, prompt)[1][-1] for prompt in tokens])
        for found in ((run.embeddings, run.ahead), passes.look_ahead(tokens)):
            torch.testing.assert_close(found, (expected, ahead), rtol=1e-4, atol=1e-4)
    assert abs(run.kl_prompt) < 1e-4  # the base diverges from itself by nothing
    assert abs(run.kl_reply) < 1e-4


def test_kl_sums_are_those_of_the_full_logits(load: Callable[[str], Any]) -> None:
    model, tokens = load("llama")
    passes = network(model, tokens, tokens_at_once=70)
    replies = [
        reply for _, reply, _ in sorted(passes.reply(tokens, REPLY, end_tokens(model)), key=lambda item: item[0])
    ]
    sequences = [(*prompt, *reply.reply[:-1]) for prompt, reply in zip(tokens, replies, strict=True)]
    with torch.no_grad():
        base = [model(torch.tensor([sequence])).logits[0].log_softmax(dim=-1) for sequence in sequences]
        for weight in passes.blocks.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        tuned = [model(torch.tensor([sequence])).logits[0].log_softmax(dim=-1) for sequence in sequences]
        run = passes.read_harmless(tokens, replies)
    in_prompt = in_reply = 0.0
    for prompt, before, after in zip(tokens, base, tuned, strict=True):
        divergence = (before.exp() * (before - after)).sum(dim=-1)
        in_prompt += divergence[len(head_of(tokens)) : len(prompt)].sum().item()
        in_reply += divergence[len(prompt) - 1 :].sum().item()
    assert in_prompt > 0.1
    assert run.kl_prompt.item() == pytest.approx(in_prompt, rel=1e-3)
    assert run.kl_reply.item() == pytest.approx(in_reply, rel=1e-3)


def test_scores_of_replies_are_those_of_the_full_logits(load: Callable[[str], Any]) -> None:
    """Of the tuned model in batches, and of the base from the states that its replies were read from."""
    model, tokens = load("llama")
    passes = network(model, tokens, tokens_at_once=70)
    records = {row: record for row, record, _ in passes.reply(tokens, REPLY, end_tokens(model))}
    replies = [records[row].reply[: 1 + row] for row in range(len(tokens))]
    own = [passes.score_base(records[row]) for row in range(len(tokens))]
    assert all(score.agreed == len(score.reply) and score.begins_alike(REPLY) for score in own)
    for weight in passes.blocks.parameters():
        weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    embeddings, scores = passes.score(tokens, replies)
    agreed = []
    for row, (prompt, reply, score) in enumerate(zip(tokens, replies, scores, strict=True)):
        with torch.no_grad():
            log = model(torch.tensor([(*prompt, *reply[:-1])])).logits[0, len(prompt) - 1 :].log_softmax(dim=-1)
            torch.testing.assert_close(embeddings[row], plain(model, prompt)[0], rtol=1e-4, atol=1e-4)
        expected = log.gather(1, torch.tensor(reply)[:, None])[:, 0]
        torch.testing.assert_close(score.log_probs, expected, rtol=1e-3, atol=1e-4)
        assert score.choices == tuple(log.argmax(dim=-1).tolist())
        assert score.agreed == sum(a == b for a, b in zip(score.choices, reply, strict=True))
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=2, do_sample=False)[0, len(prompt) :].tolist()
        assert score.begins_alike(2) == (tuple(greedy) == reply[:2] if len(reply) > 1 else greedy[0] == reply[0])
        agreed.append(score.agreed / len(reply))
    assert 0 < sum(agreed) < len(agreed), "some tokens are still the first choice, and some are not"


def test_a_reply_ends_with_the_token_that_ends_it(load: Callable[[str], Any]) -> None:
    model, tokens = load("llama")
    passes = network(model, tokens)
    whole = {row: reply for row, reply, _ in passes.reply(tokens, REPLY, frozenset())}
    end = whole[0].reply[2]
    first = whole[0].reply.index(end) + 1
    cut = {row: reply for row, reply, _ in passes.reply(tokens, REPLY, frozenset({end}))}
    assert cut[0].reply == whole[0].reply[:first]
    assert len(cut[0].states) == cut[0].n_prompt + first - 1
    torch.testing.assert_close(cut[0].states, whole[0].states[: len(cut[0].states)])


def gradients(passes: FinetuneForward, tokens: list[tuple[int, ...]], replies: list[BaseReply]) -> dict[str, Tensor]:
    """Of something that depends on harmful and on harmless passes and on both KLs."""
    for weight in passes.blocks[:2].parameters():
        weight.requires_grad_(True)
    passes.model.zero_grad()
    shared = passes.run_template_prefix()
    run = passes.read_harmless(tokens[:4], replies[:4], shared)
    (passes.embed(tokens[4:], shared).square().mean() + run.embeddings.sin().mean() + run.kl_prompt).backward()
    return {name: weight.grad.clone() for name, weight in passes.blocks.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "gpt_neox"])
def test_gradients_are_the_same_with_shared_head_small_batches_and_checkpointing(
    architecture: str, load: Callable[[str], Any]
) -> None:
    model, tokens = load(architecture)
    found = sorted(network(model, tokens).reply(tokens, REPLY, end_tokens(model)), key=lambda item: item[0])
    # States that are not this model's, so that the KL has a gradient.
    replies = [BaseReply(reply.reply, reply.states.flip(-1)) for _, reply, _ in found]
    alone = network(model, tokens)
    alone._n_shared = 0
    expected = gradients(alone, tokens, replies)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    ways: list[dict[str, Any]] = [{}, {"tokens_at_once": 1}, {"gradient_checkpointing": True}]
    for settings in ways:
        for name, gradient in gradients(network(model, tokens, **settings), tokens, replies).items():
            error = (gradient - expected[name]).norm() / (expected[name].norm() + 1e-6)
            assert error < 1e-3, (settings, name)


def test_harmful_prompts_stop_at_the_last_target_layer_without_the_head(load: Callable[[str], Any]) -> None:
    model, tokens = load("llama")
    passes = network(model, tokens)
    ran: list[str] = []
    for name, module in (("last block", passes.blocks[2]), ("head", model.lm_head)):
        module.register_forward_hook(lambda module, inputs, output, name=name: ran.append(name))
    passes.embed(tokens, shared=passes.run_template_prefix())
    assert ran == ["last block"]  # once, for the template's head, whose keys and values harmless prompts need
    assert len(model.base_model.layers) == 3  # the view that stops early leaves the model as it is


def test_frozen_blocks_below_the_first_trained_one_record_no_graph(load: Callable[[str], Any]) -> None:
    model, tokens = load("llama")
    passes = network(model, tokens)
    passes.blocks[1].requires_grad_(True)
    recorded: dict[int, bool] = {}

    def record(layer: int) -> Any:
        def hook(block: Any, inputs: Any, output: Tensor) -> None:
            recorded[layer] = output.requires_grad

        return hook

    for layer, block in enumerate(passes.blocks[:2]):
        block.register_forward_hook(record(layer))
    passes.embed(tokens)
    assert recorded == {0: False, 1: True}


def test_a_model_that_runs_in_bfloat16(load: Callable[[str], Any]) -> None:
    model, tokens = load("llama")
    exact = network(model, tokens)
    with torch.no_grad():
        expected = exact.embed(tokens)
        model.to(torch.bfloat16)
        passes = network(model, tokens)
        found = passes.embed(tokens)
        replies = [reply for _, reply, _ in sorted(passes.reply(tokens, REPLY, end_tokens(model)))]
        run = passes.read_harmless(tokens, replies)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert run.kl_reply.dtype == torch.float32


def test_batches_by_length_hold_everybody_once_and_keep_the_budget() -> None:
    lengths = [3, 9, 1, 4, 4, 20, 2]
    batches = list(batches_by_length(lengths, 12))
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= 12 for batch in batches)


def test_a_model_without_a_list_of_blocks_is_refused(load: Callable[[str], Any]) -> None:
    model, _ = load("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(InputError, match="blocks"):
        find_blocks(model)


def test_no_prompts_at_all(load: Callable[[str], Any]) -> None:
    model, tokens = load("llama")
    passes = network(model, tokens)
    assert passes.embed([]).shape == (0, 2, 32)
    assert [found.shape for found in passes.look_ahead([])] == [(0, 2, 32), (0, 32)]
    run = passes.read_harmless([], [])
    assert run.embeddings.shape == (0, 2, 32)
    assert run.kl_prompt == 0


def test_a_bridge_sees_the_same_layers(load: Callable[[str], Any], tmp_path: Path) -> None:
    """Layer l here is `blocks.{l}.hook_out` there: what is steered apart is what is measured."""
    from es2.capture.residuals import capture_residuals
    from es2.models.loading import load_bridge

    folder = save_tiny_model(tmp_path / "model", "llama")
    rendered = render(load_tokenizer(folder), TEXTS)
    captured = capture_residuals(load_bridge(folder, device="cpu"), rendered, ["last"])["last"]
    passes = FinetuneForward(load_model(folder, device="cpu"), template_prefix=(), layers=(0, 2))
    with torch.no_grad():
        found = passes.embed(rendered.token_ids)
    for index, layer in enumerate((0, 2)):
        torch.testing.assert_close(found[:, index], torch.from_numpy(captured[layer]), rtol=1e-4, atol=1e-4)


def test_a_hybrid_replies_by_a_cache_of_its_own_kinds() -> None:
    attention = {"num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
    model = tiny_model("jamba", n_layers=4, **attention)
    prompts = [tuple(range(5, 5 + length)) for length in (9, 9, 14)]
    passes = FinetuneForward(model, template_prefix=(), layers=(1, 2))
    with torch.no_grad():
        for row, reply, embedding in passes.reply(prompts, REPLY, frozenset()):
            expected = model.generate(torch.tensor([prompts[row]]), max_new_tokens=REPLY, do_sample=False)
            assert list(reply.reply) == expected[0, len(prompts[row]) :].tolist()
            torch.testing.assert_close(embedding, plain(model, prompts[row], (1, 2))[0], rtol=1e-4, atol=1e-4)
