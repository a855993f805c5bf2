"""Adapters that peft takes in silence though they are another model's, a part of one, or change two ends at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model

from es2.core.errors import InputError
from es2.models.adapters import apply_finetune, doubts
from es2.models.loading import load_model
from tests.builders import N_LAYERS, save_tiny_adapter, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def renamed(adapter: Path, change: Callable[[str], str | None]) -> Path:
    """The adapter with its weights under other names; those without one are left out."""
    file = adapter / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({new: weights[name] for name in weights if (new := change(name))}, file)
    return adapter


def names_in(adapter: Path) -> list[str]:
    return sorted(safetensors.torch.load_file(adapter / "adapter_model.safetensors"))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("model.model.layers", "model.model.language_model.layers"),
        lambda name: name.replace("base_model.model.model.", "base_model.model."),
        lambda name: name.replace("base_model.model.", "base_model.model.model."),
        lambda name: name.replace("layers.1.", "layers.7."),
        lambda name: name.replace("layers.2.self_attn.q_proj", "layers.2.self_attn.qkv_proj"),
    ],
    ids=["of a wrapper", "a prefix too few", "a prefix too many", "of a deeper model", "of other modules"],
)
def test_every_weight_has_a_home(change: Callable[[str], str], merge: bool, folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, device="cpu")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapter = renamed(save_tiny_adapter(tmp_path / "adapter", folder), change)
    own = names_in(save_tiny_adapter(tmp_path / "own", folder))
    first = next(name for name in names_in(adapter) if name not in own)
    with pytest.raises(InputError, match="have no module there") as refused:
        apply_finetune(model, adapter, merge=merge)
    assert first in str(refused.value)
    assert str(folder) in str(refused.value), "the base that the adapter names"
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_parameters_that_share_a_module_have_a_home(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    moe = save_tiny_model(tmp_path / "moe", "qwen3_moe", num_key_value_heads=2, head_dim=16, **experts)
    settings = LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    get_peft_model(load_model(moe, device="cpu"), settings).save_pretrained(tmp_path / "adapter")
    assert any(".base_layer." in name for name in names_in(tmp_path / "adapter"))
    apply_finetune(load_model(moe, device="cpu"), tmp_path / "adapter", merge=True)


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_an_end_that_is_tied_is_not_merged(end: str, tmp_path: Path) -> None:
    tied = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    settings = LoraConfig(r=2, target_modules=[end], init_lora_weights=False)
    get_peft_model(load_model(tied, device="cpu"), settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=rf"changes .*{end}, whose weights are"):
        apply_finetune(load_model(tied, device="cpu"), tmp_path / "adapter", merge=True)


def test_an_end_of_its_own_is_merged(folder: Path, tmp_path: Path) -> None:
    live: Any = load_model(folder, device="cpu")
    adapted = get_peft_model(live, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(5, 12)[None]
    merged = load_model(folder, device="cpu")
    apply_finetune(merged, tmp_path / "adapter", merge=True)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_part_of_an_adapter_and_another_base_are_doubted(folder: Path, tmp_path: Path) -> None:
    whole = save_tiny_adapter(tmp_path / "whole", folder)
    assert doubts(whole, str(folder), N_LAYERS) == []
    (other,) = doubts(whole, "another-model", N_LAYERS)
    assert "as its base, not 'another-model'" in other

    part = renamed(save_tiny_adapter(tmp_path / "part", folder), lambda name: name if "layers.0." in name else None)
    (sentence,) = doubts(part, str(folder), N_LAYERS)
    assert "weights in layers 0 alone, while its configuration asks for 0, 1, 2" in sentence
    apply_finetune(load_model(folder, device="cpu"), part, merge=True)

    config = json.loads((part / "adapter_config.json").read_text())
    for asked in ({"layers_to_transform": [0]}, {"layers_to_transform": 0}, {"target_modules": "layers.0.self_attn.*"}):
        (part / "adapter_config.json").write_text(json.dumps(config | asked))
        assert doubts(part, str(folder), N_LAYERS) == []
