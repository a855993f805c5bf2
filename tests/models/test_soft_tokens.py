"""Vectors among tokens: a token's own embedding is read as that token, by every way that models are run here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from es2.core.errors import InputError
from es2.models.chat_template import render
from es2.models.forward import FinetuneForward
from es2.models.replies import greedy_replies
from es2.models.soft_tokens import SoftTokens, embeddings_of, mean_embedding_norm, refuse_other_readers
from tests.builders import TEXTS, tiny_model, tiny_tokenizer

HEADS = {"num_key_value_heads": 2, "head_dim": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": {},
    "gemma": {},  # scales its embeddings after the layer that makes them
    "gemma3_text": HEADS | {"tie_word_embeddings": False},  # in that layer; tied, it repeats its last token
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 64},  # embeds narrower than its residual stream
    "mamba": {"state_size": 8},  # replies in batches
    "mistral": {"sliding_window": 6},
}
PREFIX = tuple(range(5, 12))
PROMPTS = [(*PREFIX, *((7 * place * (row + 3) + row) % 300 + 3 for place in range(3 + row))) for row in range(5)]
START = len(PREFIX)

pytestmark = pytest.mark.usefixtures("one_thread")


def replies(model: Any, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    for batch in greedy_replies(model, prompts, 6, frozenset(), prefix=PREFIX):
        found |= dict(zip(batch.rows, batch.replies, strict=True))
    return [found[row] for row in range(len(prompts))]


def inserted(prompts: list[tuple[int, ...]], tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(*prompt[:START], *tokens, *prompt[START:]) for prompt in prompts]


@pytest.mark.parametrize("architecture", SETTINGS)
def test_embeddings_of_tokens_are_read_as_these_tokens(architecture: str) -> None:
    model = tiny_model(architecture, **SETTINGS[architecture])
    before, real = replies(model, PROMPTS), (250, 40)
    refuse_other_readers(model)
    with SoftTokens(model, embeddings_of(model, real)) as soft:
        found = replies(model, inserted(PROMPTS, (soft.first, soft.first + 1)))
        swapped = replies(model, inserted(PROMPTS, (soft.first + 1, soft.first)))
        assert replies(model, PROMPTS) == before, "prompts without vectors"
    assert found == replies(model, inserted(PROMPTS, real))
    assert swapped == replies(model, inserted(PROMPTS, real[::-1]))
    assert found != before
    assert found != swapped
    assert replies(model, PROMPTS) == before, "and hooks are gone"


def test_logits_without_vectors_are_the_same_bit_for_bit() -> None:
    model = tiny_model("qwen2")
    tokens = torch.tensor([PROMPTS[3]])
    with torch.no_grad():
        expected = model(tokens).logits
        with SoftTokens(model, torch.ones(2, 32)):
            assert torch.equal(model(tokens).logits, expected)
        assert torch.equal(model(tokens).logits, expected)


def test_a_pass_that_failed_leaves_nothing_for_the_next() -> None:
    model = tiny_model("llama")
    tokens = torch.tensor([PROMPTS[3]])
    with torch.no_grad(), SoftTokens(model, torch.ones(1, 32)) as soft:
        expected = model(tokens).logits
        broken = model.get_input_embeddings().register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            model(torch.tensor([[*PROMPTS[3][:-1], soft.first]]))
        broken.remove()
        assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_gradients_reach_the_vectors_through_a_prefix_that_is_run_once(architecture: str) -> None:
    """Of the embeddings and of a reply's log-probability, as a whole pass over embeddings gives them."""
    model = tiny_model(architecture, **SETTINGS[architecture]).requires_grad_(False)
    forward = FinetuneForward(model, template_prefix=PREFIX, layers=(1,))
    vectors = embeddings_of(model, [7, 9]).clone().requires_grad_()
    reply = (30, 31, 32)
    with SoftTokens(model, vectors) as soft:
        given = inserted(PROMPTS, (soft.first, soft.first + 1))
        embedded, states = forward.read_replies(given, [reply] * len(given))
        shallow = forward.embed(given)
    torch.testing.assert_close(embedded, shallow, rtol=1e-4, atol=1e-5)
    logs = [forward.head.logits(one).log_softmax(-1)[range(3), reply].sum() for one in states]
    (found,) = torch.autograd.grad(sum(logs) + embedded.sum(), vectors)

    plain = embeddings_of(model, [7, 9]).clone().requires_grad_()
    total = torch.zeros(())
    for prompt in PROMPTS:
        own = embeddings_of(model, (*prompt, *reply[:-1]))
        whole = torch.cat([own[:START], plain, own[START:]])[None]
        output = model(inputs_embeds=whole, output_hidden_states=True)
        last = len(prompt) + 1
        total = total + output.logits[0, last : last + 3].log_softmax(-1)[range(3), reply].sum()
        total = total + output.hidden_states[2][0, last].sum()
    (expected,) = torch.autograd.grad(total, plain)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_mean_length_of_embeddings() -> None:
    model = tiny_model("llama")
    expected = model.model.embed_tokens.weight.detach().norm(dim=1).mean()
    assert mean_embedding_norm(model) == pytest.approx(float(expected), rel=1e-6)
    scaled = tiny_model("gemma3_text", **HEADS)
    expected = scaled.model.embed_tokens.weight.detach().norm(dim=1).mean() * 32**0.5
    assert mean_embedding_norm(scaled) == pytest.approx(float(expected), rel=1e-6)


def test_a_model_that_reads_its_tokens_elsewhere_too_is_refused() -> None:
    model = tiny_model("llama")
    refuse_other_readers(model)

    def per_layer(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        tokens = args[0] if args else kwargs["input_ids"]
        output.last_hidden_state = output.last_hidden_state + tokens[..., None] / 100
        return output

    model.model.register_forward_hook(per_layer, with_kwargs=True)
    with pytest.raises(InputError, match="not through its embedding layer alone"):
        refuse_other_readers(model)


def test_an_architecture_with_embeddings_of_every_layer_is_refused() -> None:
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320, "laurel_rank": 4}
    more = HEADS | per_layer | {"layer_types": ["full_attention"] * 3, "num_kv_shared_layers": 0, "altup_num_inputs": 2}
    model = tiny_model("gemma3n_text", **more, activation_sparsity_pattern=[0.0] * 3)
    for block in model.model.layers:  # a new model's is 0, so that it does not read them
        block.altup.correct_output_scale.data.fill_(1.0)
    with pytest.raises(InputError, match="'gemma3n_text' model reads its prompts not through"):
        refuse_other_readers(model)


def test_the_first_token_of_the_users_own_text() -> None:
    tokenizer = tiny_tokenizer()
    texts = (*TEXTS, "  spaces around  ", "😀 first")
    found = render(tokenizer, texts)
    for text, tokens, start in zip(texts, found.token_ids, found.first_instruction, strict=True):
        before, after = (tokenizer.decode(list(part)) for part in (tokens[:start], tokens[start:]))
        assert before.endswith("<|im_start|>user\n")
        assert after.startswith(text.strip())
    assert found.select([1, 0]).first_instruction == found.first_instruction[1::-1]
    plain = render(tiny_tokenizer(chat_template=None), TEXTS)
    assert set(plain.first_instruction) == {0}
