"""Blocks are found wherever a model keeps them, and hooks on them are those of the model that people run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from es2.capture.capture import capture
from es2.core.errors import InputError
from es2.models.blocks import BlockHooks, decoder_of, find_blocks
from es2.models.chat_template import render
from es2.models.checked import look_at, refuse_untunable
from es2.models.loading import load_bridge, load_model, load_tokenizer
from es2.store.sources import LENS, OWN_HOOKS
from es2.store.store import Store
from tests.architectures.configs import ARCHITECTURES, save_architecture
from tests.builders import save_tiny_model, tiny_model, tiny_prompts, tiny_tokenizer

HYBRID = {
    "num_key_value_heads": 2, "layer_types": ["attention", "mamba", "attention"], "num_local_experts": 0,
    "shared_intermediate_size": 32, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
}  # fmt: skip


def tiny_wrapper() -> Any:
    """A Gemma 3 with a tower for images that has as many blocks as the decoder."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "sliding_window": 64, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, eos_token_id=2, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config).float().eval()


def plain_outputs(model: Any, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """The output of every block at the last token, by hooks of torch on a model that runs one prompt."""
    found: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda block, inputs, output: found.append((output[0] if isinstance(output, tuple) else output)[0, -1])
        )
        for block in find_blocks(model)[1]
    ]
    with torch.no_grad():
        model(torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def check_capture(folder: Path, store: Store) -> str:
    """Compare a capture with `plain_outputs`; returns whose hooks it used."""
    prompts = tiny_prompts()
    captured = capture(str(folder), prompts, device="cpu", store=store).activations
    model = load_model(folder, device="cpu")
    for row, tokens in enumerate(render(load_tokenizer(folder), prompts.texts).token_ids):
        for layer, expected in enumerate(plain_outputs(model, tokens)):
            np.testing.assert_allclose(captured.layer(layer)[row], expected.numpy(), rtol=2e-4, atol=2e-4)
    return captured.hooks


def test_a_wrapper_s_blocks_are_its_decoder_s() -> None:
    model = tiny_wrapper()
    assert decoder_of(model) is model.model.language_model
    assert find_blocks(model)[1] is model.model.language_model.layers


def test_a_decoder_inside_a_decoder() -> None:
    model: Any = tiny_model("opt", word_embed_proj_dim=16, ffn_dim=64)
    assert decoder_of(model) is model.model.decoder


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        (
            "falcon",
            {"alibi": True, "new_decoder_architecture": False},
        ),  # eager attention adds the bias twice
        ("granitemoehybrid", HYBRID),  # without rotary embeddings, which the bridge looks for
        ("persimmon", {}),  # TransformerLens has no bridge
    ],
)
def test_where_no_bridge_fits_the_model_s_own_blocks_are_hooked(
    architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model", architecture, **settings)
    assert check_capture(folder, Store(tmp_path / "store")) == OWN_HOOKS


def test_where_a_bridge_fits_it_serves(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "qwen3", num_key_value_heads=2, head_dim=8)
    assert check_capture(folder, Store(tmp_path / "store")) == LENS


def test_a_wrapper_is_captured_and_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens would install torchvision into this very environment, and another torch with it."""
    monkeypatch.setattr("subprocess.check_call", lambda command, **_: pytest.fail(f"ran {command}"))
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as where there is none
    tiny_wrapper().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    check_capture(tmp_path / "model", Store(tmp_path / "store"))


@pytest.mark.parametrize(
    ("architecture", "sentence"),
    [("gemma3n_text", "4 dimensions"), ("modernbert-decoder", "more than one linear map"), ("longcat_flash", "blocks")],
)
def test_what_cannot_be_tuned_is_known_without_weights(architecture: str, sentence: str, tmp_path: Path) -> None:
    folder = save_architecture(tmp_path / "model", ARCHITECTURES[architecture])
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=sentence):
        look_at(folder)


def test_a_model_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own; the second time the sentence is remembered."""
    monkeypatch.setenv("ES2_CACHE", str(tmp_path / "cache"))
    folder = save_architecture(tmp_path / "model", ARCHITECTURES["modernbert-decoder"])
    (folder / "model.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(InputError, match="more than one linear map"):
            refuse_untunable(folder)
        monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("looked twice"))


def test_what_a_hook_returns_takes_the_output_s_place() -> None:
    hooked = BlockHooks(tiny_model("gpt2"))
    seen: list[torch.Tensor] = []
    handle = hooked.blocks[1].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    with torch.no_grad(), hooked.hooks(fwd_hooks=[("blocks.0.hook_out", lambda activation, hook: 0 * activation)]):
        hooked.original_model(torch.tensor([[5, 6]]))
    with torch.no_grad():
        hooked.original_model(torch.tensor([[5, 6]]))
    handle.remove()
    assert [bool(states.any()) for states in seen] == [False, True]


def test_a_bridge_that_fails_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Unsupported architecture: Nonsense")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", fail)
    assert isinstance(load_bridge(save_tiny_model(tmp_path / "model")), BlockHooks)


def test_experts_are_refused_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no mixture of experts; use --method lora"):
        refuse_untunable(save_tiny_model(tmp_path / "dense"), "experts")
    refuse_untunable(save_architecture(tmp_path / "mixture", ARCHITECTURES["qwen3_moe"]), "experts")
