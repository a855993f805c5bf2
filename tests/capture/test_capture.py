"""Captured embeddings are those of the plain transformers model, prompt by prompt, whatever the batch."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from es2.capture import capture as capture_module
from es2.capture import residuals as residuals_module
from es2.capture.capture import _fits_half, capture
from es2.capture.residuals import _shared_tokens, _ways, capture_residuals
from es2.core.errors import InputError, MachineError
from es2.core.files import user_cache
from es2.core.progress import Cancelled
from es2.core.rendering import Rendering
from es2.models import batching
from es2.models.batching import batches_by_length, cache_before, cache_of, keys_and_values, pack_shared_prefixes
from es2.models.catalogue import DEFAULT_MODEL, resolve
from es2.models.chat_template import PINNED_DATE, Rendered, render
from es2.models.folders import model_folder
from es2.models.loading import load_bridge, load_tokenizer
from es2.prompts.loading import load_prompts
from es2.store.sources import POSITIONS
from es2.store.store import Store
from es2.workflow.derived import find_activations
from tests.builders import (
    ARCHITECTURES,
    CONTEXT_LENGTH,
    D_MODEL,
    N_LAYERS,
    TEXTS,
    save_tiny_adapter,
    save_tiny_model,
    tiny_prompts,
    tiny_tokenizer,
)

BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of an architecture, saved once."""
    root = tmp_path_factory.mktemp("models")

    def folder(architecture: str) -> Path:
        path = root / architecture
        return path if path.exists() else save_tiny_model(path, architecture)

    return folder


@pytest.fixture
def llama(folder_of: Callable[[str], Path]) -> Path:
    return folder_of("llama")


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ES2_HOME", str(tmp_path / "home"))


def plain_embeddings(folder: Path, rendered: Rendered, adapter: Path | None = None) -> dict[str, np.ndarray]:
    """The same embeddings from the plain transformers model: one prompt at a time, no padding, no TransformerLens.

    By forward hooks on the blocks, because `hidden_states[-1]` is taken after the final norm.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    blocks = model.get_submodule(BLOCKS.get(model.config.model_type, "model.layers"))
    if adapter is not None:
        PeftModel.from_pretrained(model, str(adapter))
    outputs: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[0])

    for block in blocks:
        block.register_forward_hook(keep)
    prompts = []
    for tokens in rendered.token_ids:
        outputs.clear()
        with torch.no_grad():
            states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        assert len(outputs) == len(blocks)
        for layer in range(len(blocks) - 1):  # the reference agrees with transformers' own account of the same
            assert torch.equal(outputs[layer], states[layer + 1][0])
        prompts.append(torch.stack(outputs).numpy())
    return {
        position: np.stack(
            [states[:, column] for states, column in zip(prompts, rendered.columns(position), strict=True)], axis=1
        )
        for position in POSITIONS
    }


def largest_error(captured: np.ndarray, plain: np.ndarray) -> float:
    """The largest distance between two embeddings, in units of the embedding's own length."""
    assert captured.shape == plain.shape
    return float((np.linalg.norm(captured - plain, axis=-1) / np.linalg.norm(plain, axis=-1)).max())


# -------------------------------------------------------------------------------------------------------------- render


def test_the_rendered_prompt_is_the_templates(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    rendered = render(tokenizer, TEXTS)
    assert rendered.templated
    for text, tokens in zip(TEXTS, rendered.token_ids, strict=True):
        assert tokenizer.decode(tokens) == (
            f"<|im_start|>system\nYou help. Today is 26 Jul 2024.<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


def test_a_template_without_a_date_is_rendered_as_transformers_does(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'today'")
    expected = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in TEXTS
    ]
    assert [list(tokens) for tokens in render(tokenizer, TEXTS).token_ids] == expected


@pytest.mark.parametrize(
    "text",
    [
        "a",  # stands in the template's own words as well
        "user",
        "How do I bake bread?",
        "Ends in an emoji 🍞",  # four tokens of one character
        "naïve — “quoted”",
        "two\nlines",
        "<|im_end|>\n<|im_start|>assistant\n is what it says",
        "Why? (the user's text)",
    ],
)
@pytest.mark.parametrize("templated", [True, False])
def test_the_last_instruction_token_is_the_last_of_the_users_text(text: str, templated: bool) -> None:
    tokenizer = tiny_tokenizer()
    if not templated:
        tokenizer.chat_template = None
    rendered = render(tokenizer, [text, "another"])
    tokens, index = rendered.token_ids[0], rendered.last_instruction[0]
    assert tokenizer.decode(tokens[: index + 1]).endswith(text)
    assert not tokenizer.decode(tokens[:index]).endswith(text)
    assert rendered.columns("last")[0] == len(tokens) - 1
    assert rendered.columns("last_instruction") == list(rendered.last_instruction)
    assert rendered.templated is templated
    if not templated:
        assert index == len(tokens) - 1


def test_plain_text_is_tokenised_as_the_tokenizer_does() -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    assert [list(tokens) for tokens in render(tokenizer, TEXTS).token_ids] == tokenizer(list(TEXTS))["input_ids"]


@pytest.mark.parametrize(
    "wanted", ["%d %b %Y", "%Y-%m-%d", "%A, %B %d at %H:%M", "%y%j", "%-d/%-m", "%F %T", "%B %e", "%D %R"]
)
def test_templates_are_told_the_pinned_date_in_their_own_format(wanted: str) -> None:
    template = "{{ strftime_now('" + wanted + "') }} {{ date_string }}: {{ messages[0]['content'] }}"
    tokenizer = tiny_tokenizer(chat_template=template)
    tokens = render(tokenizer, ["Hello"]).token_ids[0]
    assert tokenizer.decode(tokens) == f"{PINNED_DATE.strftime(wanted)} : Hello", "no date where it has none"
    assert datetime(2024, 7, 26) == PINNED_DATE


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "exactly once"),
        ("Hello!", "exactly once"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        render(tiny_tokenizer(chat_template=template), ["Hello"])


def test_a_template_that_swallows_one_text_names_it() -> None:
    template = "{{ messages[0]['content'] | replace('bread', '') }}."
    with pytest.raises(InputError, match="'bread'"):
        render(tiny_tokenizer(chat_template=template), ["Tell me a joke", "bread"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (" | replace('\n\n', '\n')", "One line.\n\nAnother line."),
        (".split('</think>')[-1]", "What does </think> mean?"),
        (" | lower", "Tell me a joke"),
    ],
)
def test_a_template_that_rewrites_a_text_is_refused(change: str, text: str) -> None:
    tokenizer = tiny_tokenizer(chat_template="<user>{{ messages[0]['content']" + change + " }}</user>")
    render(tokenizer, ["why?"])
    with pytest.raises(InputError, match="rewrites the prompt"):
        render(tokenizer, ["why?", text])


def test_a_template_may_trim_a_text() -> None:
    tokenizer = tiny_tokenizer(chat_template="<user>{{ messages[0]['content'] | trim }}</user>")
    assert tokenizer.decode(render(tokenizer, [" why? "]).token_ids[0]) == "<user>why?</user>"


def test_a_template_that_wants_a_list_of_parts_gets_one() -> None:
    parts = "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template="<user>" + parts + "</user>")
    assert tokenizer.decode(render(tokenizer, ["Hello"]).token_ids[0]) == "<user>Hello</user>"


def test_templates_without_a_default_are_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"chat": "{{ messages[0]['content'] }}", "rag": "{{ messages[0]['content'] }}."}
    with pytest.raises(InputError, match="'chat', 'rag' and none called 'default'"):
        render(tokenizer, ["Hello"])


def test_a_refusal_quotes_no_prompt_that_nobody_wrote() -> None:
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('no users here') }}")
    with pytest.raises(InputError) as refused:
        render(tokenizer, ["Hello"])
    assert "the user's text" not in str(refused.value)


def test_a_template_in_a_processors_file_is_applied(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", chat_template=None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "<user>{{ messages[0]['content'] }}"}))
    tokenizer = load_tokenizer(folder)
    rendered = render(tokenizer, ["Hello"])
    assert rendered.templated
    assert tokenizer.decode(rendered.token_ids[0]) == "<user>Hello"
    (folder / "chat_template.json").write_text("{}")
    with pytest.raises(InputError, match="holds no chat template"):
        load_tokenizer(folder)


def test_the_digest_tells_tokens_and_positions_apart() -> None:
    rendered = render(tiny_tokenizer(), TEXTS)
    assert rendered.digest == render(tiny_tokenizer(), TEXTS).digest
    assert rendered.digest != render(tiny_tokenizer(), TEXTS[:-1]).digest
    assert rendered.digest != replace(rendered, last_instruction=rendered.columns("last")).digest


# ---------------------------------------------------------------------------------------------------------------- read


@pytest.mark.parametrize(("padding", "sharing"), [("right", True), ("right", False), ("left", False)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_plain_transformers(
    architecture: str,
    padding: Any,
    sharing: bool,
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert architecture in batching.SHARING_VERIFIED
    if not sharing:
        monkeypatch.setattr(batching, "SHARING_VERIFIED", ())
    folder = folder_of(architecture)
    rendered = render(load_tokenizer(folder), TEXTS)
    bridge = load_bridge(folder, dtype="float32", device="cpu")
    captured = capture_residuals(bridge, rendered, padding=padding, max_tokens_per_batch=300)
    plain = plain_embeddings(folder, rendered)
    for position in POSITIONS:
        assert captured[position].shape == (N_LAYERS, len(TEXTS), D_MODEL)
        assert captured[position].dtype == np.float32
        assert largest_error(captured[position], plain[position]) < 1e-5


def test_equal_to_plain_transformers_without_a_template(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "gpt2", chat_template=None)
    rendered = render(load_tokenizer(folder), TEXTS)
    captured = capture_residuals(load_bridge(folder), rendered)
    plain = plain_embeddings(folder, rendered)
    assert max(largest_error(captured[position], plain[position]) for position in POSITIONS) < 1e-5


def test_one_position_alone_is_the_same(llama: Path) -> None:
    rendered = render(load_tokenizer(llama), TEXTS)
    bridge = load_bridge(llama)
    both = capture_residuals(bridge, rendered)
    one = capture_residuals(bridge, rendered, ["last_instruction"])
    assert list(one) == ["last_instruction"]
    found, expected = one["last_instruction"], both["last_instruction"]
    np.testing.assert_array_equal(found[:-1], expected[:-1])
    assert largest_error(found[-1:], expected[-1:]) < 1e-5  # the last MLP sees another number of tokens, so it rounds


def test_the_embeddings_come_from_the_hooks(llama: Path) -> None:
    """What another hook does to block 0's output is seen at layer 0 and downstream: these are the bridge's hooks."""
    rendered = render(load_tokenizer(llama), TEXTS)
    bridge = load_bridge(llama)
    before = capture_residuals(bridge, rendered)["last"]
    fired: list[str] = []

    def double(activation: Any, hook: Any) -> Any:
        fired.append(hook.name)
        return 2 * activation

    with bridge.hooks(fwd_hooks=[("blocks.0.hook_out", double)]):
        after = capture_residuals(bridge, rendered)["last"]
    assert set(fired) == {"blocks.0.hook_out"}
    np.testing.assert_allclose(after[0], 2 * before[0], rtol=1e-6)
    assert largest_error(after[1], before[1]) > 0.1


def test_hooks_that_do_not_fire_are_an_error(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = render(load_tokenizer(llama), TEXTS)
    bridge = load_bridge(llama)
    all_hooks = bridge.hooks

    @contextmanager
    def all_but_the_last(fwd_hooks: list[Any]) -> Any:
        with all_hooks(fwd_hooks=fwd_hooks[:-1]):
            yield

    monkeypatch.setattr(bridge, "hooks", all_but_the_last)
    with pytest.raises(InputError, match=r"did not fire for blocks\.2\.hook_out \(1 of 3\)"):
        capture_residuals(bridge, rendered)
    monkeypatch.setattr(bridge, "hooks", lambda fwd_hooks: nullcontext())
    with pytest.raises(InputError, match="3 of 3"):
        capture_residuals(bridge, rendered)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_mlp_sees_only_the_tokens_asked_for(architecture: str, folder_of: Callable[[str], Path]) -> None:
    rendered = render(load_tokenizer(folder_of(architecture)), TEXTS)
    bridge = load_bridge(folder_of(architecture))
    sizes: list[int] = []

    def count(module: Any, inputs: Any) -> None:
        sizes.append(inputs[0].numel() // D_MODEL)

    for layer in (0, N_LAYERS - 1):
        bridge.blocks[layer].mlp.original_component.register_forward_pre_hook(count)
    capture_residuals(bridge, rendered)
    first, last = sizes[-2:]
    assert first > len(TEXTS) * len(POSITIONS)
    assert last == len(TEXTS) * len(POSITIONS)


def test_the_inside_of_blocks_stays_bridged_where_somebody_listens(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = render(load_tokenizer(llama), TEXTS)
    bridge = load_bridge(llama)
    modules = list(bridge.original_model.modules())
    alone = capture_residuals(bridge, rendered)
    assert list(bridge.original_model.modules()) == modules
    attention = bridge.original_model.config._attn_implementation
    fired: list[str] = []
    with bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda _, hook: fired.append(hook.name))]):
        heard = capture_residuals(bridge, rendered)
    assert fired
    assert max(largest_error(alone[position], heard[position]) for position in POSITIONS) < 1e-5

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(bridge.blocks[1].original_component, "forward", fail)
    with pytest.raises(ZeroDivisionError):
        capture_residuals(bridge, rendered.select([0]))
    assert list(bridge.original_model.modules()) == modules
    assert bridge.original_model.config._attn_implementation == attention == "eager"


def test_memory_that_runs_out_is_one_sentence(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    bridge = load_bridge(llama)
    monkeypatch.setattr(bridge.original_model.base_model, "forward", fail)
    with pytest.raises(MachineError, match=r"Memory ran out on a single prompt of \d+ tokens"):
        capture_residuals(bridge, render(load_tokenizer(llama), TEXTS))


@pytest.mark.parametrize("architecture", ["llama", "mistral"])  # rows of many prompts, and rows of one
def test_batches_are_halved_when_memory_runs_out(
    architecture: str,
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bridge = load_bridge(folder_of(architecture))
    rendered = render(load_tokenizer(folder_of(architecture)), TEXTS)
    expected = capture_residuals(bridge, rendered)
    body = bridge.original_model.base_model
    forward, sizes = body.forward, []

    def small(*args: Any, **inputs: Any) -> Any:
        if args:
            return forward(*args, **inputs)  # what all prompts begin with
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > 70:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(**inputs)

    monkeypatch.setattr(body, "forward", small)
    found = capture_residuals(bridge, rendered)
    assert max(largest_error(found[position], expected[position]) for position in POSITIONS) < 1e-5
    assert sizes[0] > 140
    assert max(sizes[-3:]) <= 70
    assert "Memory ran out; capture goes on with batches of" in caplog.text


def test_embeddings_in_a_file_are_the_same(llama: Path, tmp_path: Path) -> None:
    rendered = render(load_tokenizer(llama), TEXTS)
    bridge = load_bridge(llama)
    kept = capture_residuals(bridge, rendered, into=tmp_path / "a.safetensors", max_tokens_per_batch=60)
    held = capture_residuals(bridge, rendered, max_tokens_per_batch=60)
    for position in POSITIONS:
        assert isinstance(kept[position], np.memmap)
        np.testing.assert_array_equal(kept[position], held[position])
        with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
            np.testing.assert_array_equal(file.get_tensor(position), held[position])


def test_a_disk_without_room_for_the_embeddings_is_one_sentence(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("es2.store.embeddings.os.posix_fallocate", full, raising=False)
    with pytest.raises(MachineError, match="No space is left"):
        capture_residuals(load_bridge(llama), render(load_tokenizer(llama), TEXTS), into=tmp_path / "a.safetensors")


def test_common_beginnings_are_run_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ("How do I pick the lock of a door?", "How do I pick the lock of a safe?", "How do I pick apples?", "Why?")
    rendered = render(load_tokenizer(llama), texts)
    bridge = load_bridge(llama)
    apart = [capture_residuals(bridge, rendered.select([row])) for row in range(len(texts))]
    sizes: list[int] = []
    body = bridge.original_model.base_model
    forward = body.forward

    def count(*args: Any, **inputs: Any) -> Any:
        sizes.append((args[0] if args else inputs["input_ids"]).numel())
        return forward(*args, **inputs)

    monkeypatch.setattr(body, "forward", count)
    together = capture_residuals(bridge, rendered)
    assert sum(sizes) == len({tokens[: n + 1] for tokens in rendered.token_ids for n in range(len(tokens))})
    for position in POSITIONS:
        assert largest_error(together[position], np.concatenate([one[position] for one in apart], axis=1)) < 1e-5


@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=20),
    width=st.integers(1, 30),
)
def test_every_planted_prompt_can_be_read_off_its_branch(prompts: list[list[int]], width: int) -> None:
    trees = pack_shared_prefixes(prompts, width)
    assert sorted(index for tree in trees for index in tree.slots) == list(range(len(prompts)))
    for tree in trees:
        assert len(tree.tokens) <= width or len(tree.slots) == 1
        for index, slots in tree.slots.items():
            assert [tree.tokens[slot] for slot in slots] == prompts[index]
            assert [tree.parents[slot] for slot in slots] == [-1, *slots[:-1]]
            assert [tree.depths[slot] for slot in slots] == list(range(len(slots)))


def test_rows_are_divided_where_nothing_is_shared_and_filled_with_what_fits() -> None:
    """Filled one after the other, the first row would end between the twins that begin with 4, 5."""
    trees = pack_shared_prefixes([[1, 2, 3], [4, 5, 6], [4, 5, 7], [8, 8]], 6)
    assert sorted(sorted(tree.slots) for tree in trees) == [[0], [1, 2, 3]]
    assert sorted(len(tree.tokens) for tree in trees) == [3, 6]


def test_a_single_pass_keeps_nothing_of_what_follows(llama: Path) -> None:
    """Keys and values of all blocks would be most of what a batch holds."""
    rendered = render(load_tokenizer(llama), TEXTS)
    model: Any = load_bridge(llama).original_model
    with torch.inference_mode():
        shared = keys_and_values(model.base_model, rendered.token_ids[0][:20], model.device)
        cache, growing = cache_before(shared), cache_of(shared, 3)
        for layer in range(len(shared)):
            own = torch.randn(2, 3, shared[layer][0].shape[1], 5, shared[layer][0].shape[3])
            given, expected = cache.update(own[0], own[1], layer), growing.update(own[0], own[1], layer)
            assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))
    assert [cache.get_seq_length(layer) for layer in range(len(shared))] == [20] * len(shared)
    held = [(layer.keys, layer.values) for layer in cache.layers]
    assert all(one is other for pair in zip(held, shared, strict=True) for one, other in zip(*pair, strict=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="Only glibc is told what to do with freed memory.")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_kept_for_the_next_batch(kept: bool) -> None:
    """Of 100 MB in pieces of 4 MB, next to nothing goes back to the kernel; by itself nearly all of it does."""
    script = (
        "import sys, numpy as np, psutil\n"
        "from es2.core.malloc import keep_freed_memory\n"
        "if sys.argv[1:]: keep_freed_memory()\n"
        "def held(): return psutil.Process().memory_info().rss\n"
        "pieces = [np.ones(500_000) for _ in range(25)]; before = held()\n"
        "del pieces; print(before - held())\n"
    )
    command = [sys.executable, "-c", script, *["keep"] * kept]
    given_back = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert given_back < 5e6 if kept else given_back > 9e7


def user_tokens(tokenizer: Any, tokens: Sequence[int], text: str) -> tuple[int, int]:
    """The shortest stretch of a prompt's tokens whose text is the user's."""
    pairs = [(first, last) for first in range(len(tokens)) for last in range(first, len(tokens))]
    fitting = [(a, b) for a, b in pairs if tokenizer.decode(tokens[a : b + 1]).strip() == text.strip()]
    return min(fitting, key=lambda pair: pair[1] - pair[0])


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_position_equals_plain_hidden_states(
    architecture: str, sharing: bool, padding: Any, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    if not sharing:
        monkeypatch.setattr(batching, "SHARING_VERIFIED", ())
    folder = folder_of(architecture)
    tokenizer = load_tokenizer(folder)
    texts = ("How do I bake bread?", "How do I bake bread at home?", " Why? \n", "Größe 🍞?")
    rendered = render(tokenizer, texts)
    spans = [user_tokens(tokenizer, tokens, text) for tokens, text in zip(rendered.token_ids, texts, strict=True)]
    assert rendered.spans("mean") == spans
    positions = ["last", "last-1", "last-3", "last_instruction", "mean"]
    bridge = load_bridge(folder, dtype="float32", device="cpu")
    captured = capture_residuals(bridge, rendered, positions, padding=padding, max_tokens_per_batch=300)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row, tokens in enumerate(rendered.token_ids):
        with torch.no_grad():
            states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        plain = torch.stack(states[1:-1])[:, 0].numpy()  # the last of them is normalised
        first, last = spans[row]
        expected = {f"last-{k}": plain[:, -1 - k] for k in (1, 3)} | {"last": plain[:, -1]}
        expected |= {"last_instruction": plain[:, last], "mean": plain[:, first : last + 1].mean(axis=1)}
        for position in positions:
            assert largest_error(captured[position][:-1, row], expected[position]) < 1e-5, position


def test_a_position_has_to_lie_after_the_text(llama: Path) -> None:
    rendered = render(load_tokenizer(llama), TEXTS)
    n_after = len(rendered.token_ids[0]) - 1 - rendered.last_instruction[0]
    furthest = rendered.columns(f"last-{n_after - 1}")
    assert furthest == [place + 1 for place in rendered.last_instruction]
    with pytest.raises(InputError, match=rf"no token after the user's text: of the {n_after} there, last to last-"):
        capture(str(llama), tiny_prompts(), positions=[f"last-{n_after}"])
    plain = render(tiny_tokenizer(chat_template=None), TEXTS)
    assert plain.columns("last") == plain.columns("last_instruction")
    with pytest.raises(InputError, match="no token after"):
        plain.spans("last-1")


def test_a_set_of_more_positions_serves_an_analysis(llama: Path) -> None:
    prompts = tiny_prompts()
    wide = capture(str(llama), prompts, positions=["mean", "last-1", "last"]).activations
    assert wide.positions == ("last", "last-1", "mean")
    assert capture(str(llama), prompts, positions=["mean"], or_more=True).activations == wide
    alone = capture(str(llama), prompts, positions=["mean"])
    assert alone.computed
    np.testing.assert_array_equal(alone.activations.layer(1, "mean"), wide.layer(1, "mean"))
    usual = capture(str(llama), prompts).activations
    for position, expected in (
        ("last", usual),
        ("last_instruction", usual),
        ("mean", alone.activations),
        ("last-1", wide),
    ):
        assert find_activations(wide.model, prompts, position) == expected


def test_an_architecture_nobody_looked_at_is_tried_out(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = render(load_tokenizer(llama), TEXTS)
    bridge = load_bridge(llama)
    columns = np.array([rendered.spans("last_instruction")]).transpose(1, 0, 2)
    known = _ways(bridge, rendered, columns)
    assert known[0] > 20
    assert known[1]
    expected = capture_residuals(bridge, rendered)
    monkeypatch.setattr(batching, "SHARING_VERIFIED", ())
    assert _ways(bridge, rendered, columns) == known
    body = bridge.original_model.base_model
    forward = body.forward

    def forgetful(*args: Any, **inputs: Any) -> Any:
        """As a recurrent state would: what came before in the cache is not seen."""
        if not args and inputs.get("past_key_values") is not None:
            inputs["attention_mask"][..., : inputs["past_key_values"].get_seq_length()] = torch.finfo(torch.float32).min
        return forward(*args, **inputs)

    monkeypatch.setattr(body, "forward", forgetful)
    assert _ways(bridge, rendered, columns) == (0, False)
    found = capture_residuals(bridge, rendered)
    assert max(largest_error(found[position], expected[position]) for position in POSITIONS) < 1e-5


def test_progress_counts_tokens_and_can_cancel(llama: Path) -> None:
    rendered = render(load_tokenizer(llama), TEXTS)
    bridge = load_bridge(llama)
    seen: list[tuple[str, int, int]] = []
    capture_residuals(bridge, rendered, max_tokens_per_batch=1, report=lambda *step, **_: seen.append(step))
    own_tokens = rendered.n_tokens - len(TEXTS) * _shared_tokens(rendered, np.array([rendered.last_instruction]))
    assert seen[0] == ("capture", 0, own_tokens)
    assert seen[-1] == ("capture", own_tokens, own_tokens)
    assert len(seen) == len(TEXTS) + 1

    def stop(stage: str, done: int, total: int, **_: float) -> None:
        if done:
            raise Cancelled

    with pytest.raises(Cancelled):
        capture_residuals(bridge, rendered, max_tokens_per_batch=1, report=stop)


def test_shared_tokens_end_before_the_first_wanted_one() -> None:
    def shared(*prompts: tuple[int, ...], wanted: int) -> int:
        return _shared_tokens(Rendered(prompts, (), True), np.array([[wanted]]))

    assert shared((1, 2, 3, 4), (1, 2, 5), (1, 2, 3, 9), wanted=3) == 2
    assert shared((1, 2, 3), (1, 2, 3), wanted=2) == 2
    assert shared((1, 2, 3), wanted=1) == 1
    assert shared((1, 2), (1, 2, 3), wanted=1) == 1
    assert shared((1, 2), (3, 2), wanted=1) == 0


def test_the_shared_tokens_are_run_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = render(load_tokenizer(llama), TEXTS)
    bridge = load_bridge(llama)
    widths: list[int] = []
    body = bridge.original_model.base_model
    forward = body.forward

    def count(*args: Any, **inputs: Any) -> Any:
        widths.append((args[0] if args else inputs["input_ids"]).shape[1])
        return forward(*args, **inputs)

    monkeypatch.setattr(body, "forward", count)
    shared = capture_residuals(bridge, rendered, max_tokens_per_batch=1)
    head = _shared_tokens(rendered, np.array([rendered.last_instruction]))
    assert head > 20
    assert widths[0] == head
    assert max(widths[1:]) == max(map(len, rendered.token_ids)) - head
    monkeypatch.setattr(residuals_module, "_ways", lambda *_: (0, False))
    apart = capture_residuals(bridge, rendered, max_tokens_per_batch=1)
    assert max(largest_error(shared[position], apart[position]) for position in POSITIONS) < 1e-5
    assert max(widths) == max(map(len, rendered.token_ids))


@given(lengths=st.lists(st.integers(1, 60), max_size=40), budget=st.integers(1, 200))
def test_batches_hold_every_prompt_once_and_keep_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(batches_by_length(lengths, budget))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget
    in_order = [lengths[row] for batch in batches for row in batch]
    assert in_order == sorted(lengths, reverse=True)


# ------------------------------------------------------------------------------------------------------------- capture


def test_a_capture_is_kept_and_found_again(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tiny_prompts()
    first = capture(str(llama), prompts)
    assert first.computed
    activations = first.activations
    assert (activations.model, activations.run, activations.texts) == (str(llama), None, prompts.texts)
    assert (activations.n_layers, activations.n_prompts, activations.d_model) == (N_LAYERS, len(prompts), D_MODEL)
    assert activations.positions == POSITIONS
    assert activations.meta["templated"] is True
    assert activations.meta["dtype"] == "float32"
    rendered = render(load_tokenizer(llama), prompts.texts)
    assert first.tokens == activations.meta["tokens"] == rendered.n_tokens
    plain = plain_embeddings(llama, rendered)
    for position in POSITIONS:
        stored = np.stack([activations.layer(layer, position) for layer in range(N_LAYERS)])
        assert largest_error(stored, plain[position]) < 1e-5

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("A hit must load nothing.")

    monkeypatch.setattr(capture_module, "load_bridge", never)
    monkeypatch.setattr(capture_module, "load_tokenizer", never)
    second = capture(str(llama), prompts)
    assert not second.computed
    assert second.activations.key == activations.key
    assert second.tokens == first.tokens
    document = second.to_dict()
    assert document["path"] == str(activations.path)
    assert json.loads(json.dumps(document)) == document
    relabelled = replace(prompts, labels=1 - prompts.labels, name="other")
    assert not capture(str(llama), relabelled).computed


def test_a_hit_imports_no_torch(llama: Path, tmp_path: Path) -> None:
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,label\nBreak a lock,harmful\nOil a lock,harmless\n")
    first = capture(str(llama), load_prompts(str(table)))
    assert first.computed
    program = (
        "import sys; from es2.capture.capture import capture; from es2.prompts.loading import load_prompts\n"
        f"result = capture({str(llama)!r}, load_prompts({str(table)!r}))\n"
        "heavy = {'torch', 'transformers', 'transformer_lens'} & set(sys.modules)\n"
        "print(result.activations.key, result.computed, sorted(heavy))"
    )
    again = subprocess.run(
        [sys.executable, "-c", program], env=os.environ.copy(), capture_output=True, text=True, check=True
    )
    assert again.stdout.strip() == f"{first.activations.key} False []"


def test_what_decides_the_numbers_decides_the_key(llama: Path, tmp_path: Path) -> None:
    prompts = tiny_prompts()
    other_weights = save_tiny_model(tmp_path / "other", seed=1)
    other_template = save_tiny_model(tmp_path / "template", chat_template="{{ messages[0]['content'] }}")
    adapter = save_tiny_adapter(tmp_path / "adapter", llama)
    keys = [
        capture(str(llama), prompts).activations.key,
        capture(str(llama), prompts.select(np.arange(len(prompts)) > 0)).activations.key,
        capture(str(llama), prompts, positions=["last"]).activations.key,
        capture(str(llama), prompts, dtype="bfloat16").activations.key,
        capture(str(llama), prompts, adapter=adapter).activations.key,
        capture(str(other_weights), prompts).activations.key,
        capture(str(other_template), prompts).activations.key,
    ]
    assert len(set(keys)) == len(keys)
    assert capture(str(llama), prompts, positions=POSITIONS[::-1]).activations.key == keys[0]
    assert capture(str(llama), prompts, dtype="float32", device="cpu").activations.key == keys[0]
    same_elsewhere = save_tiny_model(tmp_path / "copy")
    assert capture(str(same_elsewhere), prompts).activations.key == keys[0]


def test_a_rendering_decides_the_key_and_is_told(llama: Path) -> None:
    prompts = tiny_prompts()
    plain = capture(str(llama), prompts).activations
    asked = Rendering(system_prompt="Be brief.")
    given = capture(str(llama), prompts, rendering=asked).activations
    assert given.key != plain.key
    assert (plain.renderings, given.renderings) == (({},), (asked.to_dict(),))
    assert given.rendering["system_prompt"] == "Be brief."
    assert given.rendering["last"] == "at the end of the generation prompt, before the reply"
    assert not capture(str(llama), prompts, rendering=asked).computed
    for found, rendering in ((plain, Rendering()), (given, asked)):
        assert find_activations(plain.model, prompts, "last", rendering=rendering) == found
    assert find_activations(plain.model, prompts, "last", rendering=Rendering(system_prompt="Other")) is None


def test_another_way_to_ask_for_the_same_tokens_finds_the_same_set(llama: Path) -> None:
    prompts = tiny_prompts()
    plain = capture(str(llama), prompts).activations
    asked = Rendering(system_prompt="default", thinking="default")
    assert capture(str(llama), prompts, rendering=asked).activations == plain
    switch = "{% if loud %}{{ '!' }}{% endif %}"
    folder = save_tiny_model(llama.parent / "switch", chat_template="<{{ messages[0].content }}>" + switch)
    first = capture(str(folder), prompts)
    quiet = Rendering(template_arg=("loud=false",))
    second = capture(str(folder), prompts, rendering=quiet)
    assert (second.activations.key, second.computed) == (first.activations.key, False)
    assert find_activations(first.activations.model, prompts, "last", rendering=quiet) is not None


def test_a_removed_set_is_computed_again(llama: Path) -> None:
    prompts = tiny_prompts()
    first = capture(str(llama), prompts)
    (memo,) = (user_cache() / "requests").iterdir()
    memo.write_text('{"key": "../elsewhere"}')
    assert not capture(str(llama), prompts).computed
    for file in first.activations.path.iterdir():
        file.unlink()
    first.activations.path.rmdir()
    assert capture(str(llama), prompts).computed


def test_a_memo_that_cannot_be_written_costs_only_time(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "file" / "below"))
    assert capture(str(llama), tiny_prompts()).computed
    assert "the next capture tokenises again" in caplog.text
    assert not capture(str(llama), tiny_prompts()).computed


def test_a_model_without_a_template_is_recorded_as_such(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "plain", chat_template=None)
    assert capture(str(folder), tiny_prompts()).activations.meta["templated"] is False


def test_an_adapter_is_merged_in(llama: Path, tmp_path: Path) -> None:
    prompts = tiny_prompts()
    adapter = save_tiny_adapter(tmp_path / "adapter", llama)
    tuned = capture(str(llama), prompts, adapter=adapter, run="a-run").activations
    assert tuned.run == "a-run"
    rendered = render(load_tokenizer(llama), prompts.texts)
    stored = np.stack([tuned.layer(layer) for layer in range(N_LAYERS)])
    assert largest_error(stored, plain_embeddings(llama, rendered, adapter)["last"]) < 1e-5
    assert largest_error(stored, plain_embeddings(llama, rendered)["last"]) > 0.01


def test_half_precision_is_stored_in_half(llama: Path) -> None:
    exact = capture(str(llama), tiny_prompts(), dtype="float32").activations
    half = capture(str(llama), tiny_prompts(), dtype="bfloat16").activations
    assert half.meta["dtype"] == "float16"
    assert half.layer(1).dtype == np.float32
    assert 1e-6 < largest_error(half.layer(1), exact.layer(1)) < 0.1  # bfloat16 has eight bits
    errors = [
        np.linalg.norm(half.layer(layer, position) - exact.layer(layer, position), axis=-1)
        / np.linalg.norm(exact.layer(layer, position), axis=-1)
        for layer in range(N_LAYERS)
        for position in POSITIONS
    ]
    assert half.meta["rounding"] == pytest.approx(np.mean(errors), rel=0.3)  # of some prompts, before float16
    assert "rounding" not in exact.meta


def test_float16_only_where_every_value_fits() -> None:
    small = {"last": np.full((1, 2, 3), 2.9e4, dtype=np.float32)}
    large = {"last": np.full((1, 2, 3), -3.1e4, dtype=np.float32)}
    assert _fits_half(small, "bfloat16")
    assert not _fits_half(large, "bfloat16")
    assert not _fits_half(small, "float32")
    for wrong in (np.inf, np.nan):
        large["last"] = np.ones((2, 2, 3), dtype=np.float32)
        large["last"][1, 0, 0] = wrong
        with pytest.raises(InputError, match="not finite in float16"):
            _fits_half(large, "float16")


def test_a_prompt_longer_than_the_context_is_named(llama: Path) -> None:
    prompts = tiny_prompts()
    texts = (*prompts.texts[:-1], "An endless request " + "z" * CONTEXT_LENGTH)
    with pytest.raises(InputError, match=rf"Prompt 8 has .* at most {CONTEXT_LENGTH}: 'An endless request"):
        capture(str(llama), replace(prompts, texts=texts))
    assert not Store().list()


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", vocab_size=200)
    with pytest.raises(InputError, match="not this model's: it has more than 200 tokens"):
        capture(str(folder), tiny_prompts())


@pytest.mark.parametrize("positions", [["first"], [], ["last", "x"]])
def test_an_unknown_position_is_refused(positions: list[str]) -> None:
    with pytest.raises(InputError, match="must be one of last, last_instruction"):
        capture("smollm2-135m-instruct", tiny_prompts(), positions=positions)


def test_a_cancelled_capture_leaves_nothing(llama: Path) -> None:
    def stop(stage: str, done: int, total: int, **_: float) -> None:
        if stage == "capture":
            raise Cancelled

    with pytest.raises(Cancelled):
        capture(str(llama), tiny_prompts(), report=stop)
    assert not Store().list()
    assert capture(str(llama), tiny_prompts()).computed


# ------------------------------------------------------------------------------------------------------ the real model


@pytest.mark.real
def test_the_real_model_equals_plain_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ES2_CACHE")  # where the converted model lies
    folder = model_folder(resolve(DEFAULT_MODEL))
    rendered = render(load_tokenizer(folder), TEXTS)
    assert rendered.templated
    bridge = load_bridge(folder, dtype="float32", device="cpu")
    plain = plain_embeddings(folder, rendered)
    for padding in ("right", "left"):
        captured = capture_residuals(bridge, rendered, padding=padding)
        for position in POSITIONS:
            assert captured[position].shape == (30, len(TEXTS), 576)
            assert largest_error(captured[position], plain[position]) < 1e-5


def test_a_part_of_what_was_captured_is_taken_from_it(llama: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    whole = tiny_prompts(12)
    first = capture(str(llama), whole, store=store)
    part = whole.select(np.arange(len(whole)) % 3 == 1)
    taken = capture(str(llama), part, store=store)
    assert taken.computed
    assert taken.activations.meta["from"] == first.activations.key
    elsewhere = capture(str(llama), part, store=Store(tmp_path / "other"))
    assert "from" not in elsewhere.activations.meta
    assert elsewhere.activations.key == taken.activations.key
    for layer in range(taken.activations.n_layers):
        found, expected = (result.activations.layer(layer) for result in (taken, elsewhere))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
