"""What a fine-tune trains, in architectures whose blocks hold more than plain linear maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from es2.core.errors import InputError
from es2.models.adapters import apply_finetune
from es2.models.forward import FinetuneForward
from es2.training.config import FinetuneConfig
from es2.training.trainable import automatic_learning_rate, describe_trained, find_maps, make_trainable
from tests.builders import tiny_model
from tests.models.test_blocks import tiny_wrapper

MIXTURES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    },
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},
    "granitemoe": {"num_local_experts": 4, "num_key_value_heads": 2},
}  # fmt: skip
"""Settings of mixtures of experts; `deepseek_v3` has a dense first block and a shared expert beside the others."""


def trained_in(model: Any, method: str = "lora") -> tuple[dict[str, torch.nn.Parameter], dict[str, Any], Any]:
    """What a fine-tune of blocks 1 and 2 trains, its description, and the function that writes it."""
    network = FinetuneForward(model, template_prefix=(), layers=(1, 2))
    config = FinetuneConfig(layers=(1, 2), first_block=1, method=method, rank=2)
    trained, write = make_trainable(network, config, "somewhere")
    return trained, describe_trained(network, config, trained), write


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_stay_unless_they_are_asked_for(architecture: str) -> None:
    trained, described, _ = trained_in(tiny_model(architecture, **MIXTURES[architecture]))
    assert described["experts"] == "frozen"
    assert "the experts are not trained" in described["sentence"]
    assert any("_proj" in name for name in trained)
    assert not [name for name in trained if ".experts." in name or "_linear" in name]


@pytest.mark.parametrize("architecture", MIXTURES)
def test_only_experts_of_the_chosen_blocks(architecture: str, tmp_path: Path) -> None:
    """The written adapter, loaded into the base, is the tuned model; block 0 is the base's."""
    model: Any = tiny_model(architecture, **MIXTURES[architecture])
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        base = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    trained, described, write = trained_in(model, "experts")
    assert described["experts"] == "trained"
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trained.values():
            weight += 0.3 * torch.randn_like(weight)
        tuned = model(tokens, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(tuned.hidden_states[1], base[1])
    assert not torch.allclose(tuned.hidden_states[2], base[2], atol=1e-2)
    write(tmp_path / "adapter")
    for merge in (False, True):
        fresh: Any = tiny_model(architecture, **MIXTURES[architecture])
        apply_finetune(fresh, tmp_path / "adapter", merge=merge)
        with torch.no_grad():
            torch.testing.assert_close(fresh(tokens, use_cache=False).logits, tuned.logits, rtol=1e-3, atol=1e-3)


def test_a_model_without_experts_has_none_to_train() -> None:
    with pytest.raises(InputError, match="has no experts in blocks 1 to 2"):
        trained_in(tiny_model("llama"), "experts")


def test_an_adapter_of_a_wrapper_leaves_its_tower_alone() -> None:
    trained, described, _ = trained_in(tiny_wrapper())
    assert described["modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert {name.split(".layers.")[0] for name in trained} == {"base_model.model.model.language_model"}
    assert {name.split(".layers.")[1][0] for name in trained} == {"1", "2"}


@pytest.mark.parametrize("architecture", ["mamba", "mamba2"])
def test_maps_that_no_adapter_can_change_are_left_out(architecture: str) -> None:
    """Kernels read `dt_proj.weight` themselves, and peft refuses `out_proj`."""
    settings = {"state_size": 8} | ({"num_heads": 8, "head_dim": 8, "n_groups": 1} if architecture == "mamba2" else {})
    model = tiny_model(architecture, **settings)
    names = {name.rpartition(".")[2] for name in find_maps(FinetuneForward(model, template_prefix=(), layers=(1, 2)))}
    assert names == ({"in_proj", "x_proj"} if architecture == "mamba" else {"in_proj"})
    trained, _, _ = trained_in(model)
    loss = model(torch.arange(5, 25)[None], use_cache=False).logits.square().sum()
    loss.backward()
    updates = [weight for name, weight in trained.items() if "lora_B" in name]
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in updates)


def test_names_stay_short_where_they_mean_the_trained_blocks_alone(tmp_path: Path) -> None:
    _, _, write = trained_in(tiny_model("llama"))
    write(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert written["layers_to_transform"] == [1, 2]


@pytest.mark.parametrize("method", ["lora", "full", "experts"])
def test_the_learning_rate_follows_the_weights_of_the_trained_blocks(method: str) -> None:
    def rate(scale: float, blocks: tuple[int, ...]) -> float:
        network = FinetuneForward(tiny_model("mixtral", **MIXTURES["mixtral"]), template_prefix=(), layers=(1, 2))
        with torch.no_grad():
            for block in blocks:
                for weight in network.blocks[block].parameters():
                    weight.mul_(scale)
        return automatic_learning_rate(network, FinetuneConfig(layers=(1, 2), first_block=1, method=method))

    assert rate(10.0, (1, 2)) == pytest.approx(10 ** (2 / 3) * rate(1.0, ()))
    assert rate(10.0, (0,)) == pytest.approx(rate(1.0, ()))
    # One wild matrix does not decide.
    network = FinetuneForward(tiny_model("llama"), template_prefix=(), layers=(1, 2))
    config = FinetuneConfig(layers=(1, 2), first_block=1, method=method)
    before = automatic_learning_rate(network, config)
    with torch.no_grad():
        network.blocks[1].mlp.up_proj.weight.mul_(1000)
    assert automatic_learning_rate(network, config) == pytest.approx(before, rel=0.2)
