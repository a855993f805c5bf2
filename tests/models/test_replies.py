"""Replies in rows that are filled again: the tokens of plain greedy decoding, whatever the architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from es2.models import replies as replying
from es2.models.batching import end_tokens, may_pad, may_share
from es2.models.catalogue import DEFAULT_MODEL, resolve
from es2.models.chat_template import render, template_prefix
from es2.models.folders import model_folder
from es2.models.loading import load_model, load_tokenizer
from es2.models.replies import _rows_are_exact, greedy_replies
from es2.models.row_cache import Rows
from es2.prompts.loading import load_prompts
from tests.builders import tiny_model

PREFIX = tuple(range(5, 17))
PROMPTS = [
    (*PREFIX, *((7 * place * (row + 3) + row) % 300 + 3 for place in range(1 + row % 5 * 3 + row % 2)))
    for row in range(14)
]
N_TOKENS = 9
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
NEWER: dict[str, dict[str, Any]] = {
    "qwen3": HEADS,
    "gemma3_text": HEADS | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "gpt_oss": HEADS | EXPERTS | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3_moe": HEADS | EXPERTS,
}
"""Architectures that no list names, with sliding windows shorter than every prompt."""

pytestmark = pytest.mark.usefixtures("one_thread")


def newer(architecture: str) -> Any:
    n_layers = 4 if "layer_types" in NEWER.get(architecture, {}) else 3
    return tiny_model(architecture, n_layers=n_layers, **NEWER.get(architecture, {}))


def alone(model: Any, prompt: tuple[int, ...], ends: frozenset[int] = frozenset()) -> tuple[int, ...]:
    """Plain greedy decoding: every token from a pass over the whole sequence, without a cache."""
    reply: list[int] = []
    with torch.no_grad():
        while len(reply) < N_TOKENS and not (reply and reply[-1] in ends):
            logits = model(torch.tensor([[*prompt, *reply]]), use_cache=False).logits
            reply.append(int(logits[0, -1].argmax()))
    return tuple(reply)


def together(model: Any, prompts: list[tuple[int, ...]], **settings: Any) -> list[tuple[int, ...]]:
    ends = settings.pop("ends", frozenset())
    found: dict[int, tuple[int, ...]] = {}
    for batch in greedy_replies(model, prompts, N_TOKENS, ends, prefix=PREFIX, **settings):
        assert not found.keys() & set(batch.rows), "every prompt once"
        found |= dict(zip(batch.rows, batch.replies, strict=True))
    return [found[row] for row in range(len(prompts))]


@pytest.mark.parametrize("rows", [1, 3, None])
def test_a_row_that_ended_is_taken_by_the_next_prompt(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    whole = [alone(model, prompt) for prompt in PROMPTS]
    ends = frozenset({whole[2][2], whole[5][0], whole[9][4]})  # some replies end early, one at once
    expected = [alone(model, prompt, ends) for prompt in PROMPTS]
    assert len({len(reply) for reply in expected}) > 2
    sizes: list[int] = []
    step = Rows.step

    def counted(self: Rows) -> Any:
        sizes.append(len(self.indices))
        return step(self)

    monkeypatch.setattr(Rows, "step", counted)
    assert together(model, PROMPTS, ends=ends, rows_at_once=rows) == expected
    assert max(sizes) == (rows or len(PROMPTS))
    assert sum(sizes) == sum(map(len, expected)), "a token of a reply costs a row of a pass, and nothing else does"


def test_variants_of_a_prompt_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    read: list[tuple[int, ...]] = []
    own = Rows._read

    def noted(self: Rows, prompts: Any) -> Any:
        read.extend(prompts)
        return own(self, prompts)

    monkeypatch.setattr(Rows, "_read", noted)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    assert together(model, PROMPTS * 5, rows_at_once=16) == expected * 5
    assert set(read) == set(PROMPTS)
    assert len(read) <= len(PROMPTS) + 5, "but for those whose variants are cut by a refill"


@pytest.mark.parametrize("architecture", NEWER)
def test_an_architecture_that_no_list_names_replies_in_rows(architecture: str) -> None:
    model = newer(architecture)
    assert may_share(model)
    assert _rows_are_exact(model, [PROMPTS[4], PROMPTS[0]], PREFIX)
    assert together(model, PROMPTS, rows_at_once=6) == [alone(model, prompt) for prompt in PROMPTS]


def test_a_window_that_prompts_outgrow_is_kept() -> None:
    model = tiny_model("mistral", sliding_window=6)
    assert together(model, PROMPTS) == [alone(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("architecture", ["mamba", "jamba"])
def test_a_recurrent_state_is_left_out(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = {"num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
    settings: dict[str, dict[str, Any]] = {"mamba": {"state_size": 8}, "jamba": attention}
    model = tiny_model(architecture, **settings[architecture])
    assert not _rows_are_exact(model, [PROMPTS[4], PROMPTS[0]], PREFIX)
    monkeypatch.setattr(replying, "_reply_in_rows", lambda *given: pytest.fail("in rows"))
    assert together(model, PROMPTS) == [alone(model, prompt) for prompt in PROMPTS]


def test_a_window_under_another_name_is_found_by_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    types = [[["global", "local"], 2]]
    model = tiny_model("gpt_neo", n_layers=4, num_layers=4, num_heads=4, window_size=28, attention_types=types)
    longest = max(map(len, PROMPTS))
    assert longest < 28 < longest + N_TOKENS, "replies alone leave the window of some prompts"
    assert not may_pad(model, longest + N_TOKENS)
    monkeypatch.setattr(replying, "_reply_in_rows", lambda *given: pytest.fail("in rows"))
    assert together(model, PROMPTS) == [alone(model, prompt) for prompt in PROMPTS]


def test_a_kind_of_layer_that_has_no_mask_here_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = newer("gemma3_text")
    expected = [alone(model, prompt) for prompt in PROMPTS]
    masks = Rows._masks
    monkeypatch.setattr(Rows, "_masks", lambda self, end: {"full_attention": masks(self, end)["full_attention"]})
    assert together(model, PROMPTS) == expected


@pytest.mark.real
@pytest.mark.long
def test_the_default_model_replies_as_it_does_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ES2_CACHE", raising=False)  # where it lies, once fetched
    folder = model_folder(resolve(DEFAULT_MODEL))
    model, tokenizer = load_model(folder, device="cpu"), load_tokenizer(folder)
    tokens = list(render(tokenizer, load_prompts("builtin").texts[:24]).token_ids)
    n_tokens, ends = 25, end_tokens(model)
    found: dict[int, tuple[int, ...]] = {}
    for batch in greedy_replies(model, tokens, n_tokens, ends, prefix=template_prefix(tokenizer, tokens)):
        found |= dict(zip(batch.rows, batch.replies, strict=True))
    ties = 0
    for row, prompt in enumerate(tokens):
        with torch.no_grad():
            alone = model.generate(torch.tensor([prompt]), max_new_tokens=n_tokens, do_sample=False)[0, len(prompt) :]
        expected = tuple(alone.tolist())
        if found[row] == expected:
            continue
        ties += 1
        place = next(i for i, (one, other) in enumerate(zip(found[row], expected, strict=False)) if one != other)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *expected[:place]]]), use_cache=False).logits[0, -1]
        gap = logits[expected[place]] - logits[found[row][place]]
        assert gap <= 1e-4 * logits.abs().max(), f"prompt {row} parts at token {place} beyond rounding"
    n_replied = sum(map(len, found.values()))
    assert ties <= n_replied / 2000, f"{ties} of {n_replied} tokens were ties"


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("rwkv", {"attention_hidden_size": 32, "context_length": 256}),  # its cache is called state
        ("recurrent_gemma", {"block_types": ("recurrent", "attention"), "lru_width": 32, "num_key_value_heads": 1}),
        ("mamba", {"state_size": 8}),
        ("openai-gpt", {}),  # keeps no cache, and its blocks return lists
    ],
)
def test_replies_of_models_whose_cache_is_their_own(architecture: str, settings: dict[str, Any]) -> None:
    """Token for token those of passes over the whole, also in a fine-tune, whatever a model keeps between passes."""
    from es2.models.forward import FinetuneForward

    model = tiny_model(architecture, **settings)
    prefix = tuple(range(5, 15))
    prompts = [(*prefix, *range(20, 20 + length)) for length in (3, 9, 3, 30)]
    found = {}
    for batch in greedy_replies(model, prompts, 6, frozenset(), prefix=prefix):
        found |= dict(zip(batch.rows, batch.replies, strict=True))
    for row, prompt in enumerate(prompts):
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert found[row] == tuple(tokens[len(prompt) :])
    network = FinetuneForward(model, template_prefix=prefix, layers=(1, 2))
    assert {row: reply.reply for row, reply, _ in network.reply(prompts, 6, frozenset())} == found
