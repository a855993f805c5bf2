"""Kinds of adapter as peft makes them, on tiny models: merged by the workbench to what peft computes, or refused.

Each is made by peft beside a live model, whose weights are then moved as training would, and saved. What the workbench
loads from the two folders must give that live model's block outputs and logits.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from es2.core.errors import InputError
from es2.models.adapter_files import ADAPTER_WEIGHTS
from es2.models.loading import load_model, load_tuned
from tests.builders import save_tiny_model

EQUAL = 1e-4
"""The largest relative difference of float32 that counts as equal."""

_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_TASK = {"task_type": "CAUSAL_LM"}
_QV = ["q_proj", "v_proj"]
_WRAPPER = "model.language_model"
_IN_WRAPPER = r".*language_model.*\.(q|v)_proj"
_GEMMA3: dict[str, Any] = {
    "text_config": {
        "vocab_size": 320,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 64,
        "initializer_range": 0.3,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
    },
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 8,
    },
    "mm_tokens_per_image": 4,
}
_TOKENS = torch.tensor([[5, 9, 33, 7, 100, 250, 3, 18]])


@dataclass(frozen=True)
class Row:
    """What became of one kind of adapter.

    Attributes:
        name: of the kind.
        what: the settings that make it, in short.
        outcome: `equal`, `refused`, or, which must not be, `wrong` or `traceback`.
        difference: the largest relative difference of a block's output or the logits from the live ones, if loaded.
        sentence: of the refusal or the error.
    """

    name: str
    what: str
    outcome: str
    difference: float | None = None
    sentence: str | None = None


@dataclass(frozen=True)
class Kind:
    """How an adapter is made: peft's settings, the model that it is for, and what its weights are called afterwards."""

    name: str
    what: str
    config: Callable[[], PeftConfig]
    architecture: str = "llama"
    model: Mapping[str, Any] = field(default_factory=dict)
    saved: tuple[str, str] = ("", "")


def _lora(
    name: str,
    what: str,
    architecture: str = "llama",
    model: Mapping[str, Any] | None = None,
    saved: tuple[str, str] = ("", ""),
    **more: Any,
) -> Kind:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": [*_QV, "down_proj"], **_TASK, **more}
    return Kind(name, what, lambda: LoraConfig(**settings), architecture, model or {}, saved)


def _other(name: str, config: type[PeftConfig], **settings: Any) -> Kind:
    what = ", ".join(f"`{setting}`" for setting in settings)
    return Kind(name, what, lambda: config(**{"target_modules": _QV, **_TASK, **settings}))


_TIED = {"tie_word_embeddings": True}
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

KINDS: tuple[Kind, ...] = (
    _lora("LoRA", "linear maps of attention and MLP"),
    _lora("LoRA, all linear maps", "`target_modules='all-linear'`", target_modules="all-linear"),
    _lora(
        "LoRA on Conv1D", "GPT-2, `fan_in_fan_out`", "gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    ),
    _lora("rsLoRA", "`use_rslora`", use_rslora=True),
    _lora("DoRA", "`use_dora`", use_dora=True),
    _lora(
        "ranks by module",
        "`rank_pattern`, `alpha_pattern`",
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 3},
    ),
    _lora("some layers", "`layers_to_transform`", layers_to_transform=[0, 2]),
    _lora("biases of all", "`bias='all'`, Qwen2", "qwen2", bias="all"),
    _lora("biases of the tuned", "`bias='lora_only'`, Qwen2", "qwen2", bias="lora_only"),
    _lora("bias of the update", "`lora_bias`, maps with a bias", "qwen2", lora_bias=True, target_modules=_QV),
    _lora("bias of the update, none in the map", "`lora_bias`, maps without", lora_bias=True),
    _lora("PiSSA", "`init_lora_weights='pissa'`", init_lora_weights="pissa"),
    _lora("fast PiSSA", "`init_lora_weights='pissa_niter_4'`", init_lora_weights="pissa_niter_4"),
    _lora("OLoRA", "`init_lora_weights='olora'`", init_lora_weights="olora"),
    _lora("EVA", "`init_lora_weights='eva'`", init_lora_weights="eva"),
    _lora("LoRA-GA", "`init_lora_weights='lora_ga'`", init_lora_weights="lora_ga"),
    _lora("MiCA", "`init_lora_weights='mica'`", init_lora_weights="mica"),
    _lora("orthogonal", "`init_lora_weights='orthogonal'`", init_lora_weights="orthogonal"),
    _lora("KaSA", "`kasa_config`", kasa_config={}),
    _lora("VeLoRA", "`velora_config`", velora_config={}),
    _lora("MonteCLoRA", "`monteclora_config`", monteclora_config={}),
    _lora("aLoRA", "`alora_invocation_tokens`", alora_invocation_tokens=[100, 250]),
    _lora("LM head saved", "`modules_to_save=['lm_head']`", modules_to_save=["lm_head"]),
    _lora("tied LM head saved", "the same, tied", model=_TIED, modules_to_save=["lm_head"]),
    _lora("both ends saved, tied", "`modules_to_save`", model=_TIED, modules_to_save=["lm_head", "embed_tokens"]),
    _lora("norms saved", "`modules_to_save=['norm']`", modules_to_save=["norm"]),
    _lora("embeddings tuned", "LoRA on `embed_tokens`", target_modules=["embed_tokens", "q_proj"]),
    _lora("LM head tuned", "LoRA on `lm_head`", target_modules=["lm_head", "q_proj"]),
    _lora("tied LM head tuned", "the same, tied", model=_TIED, target_modules=["lm_head", "q_proj"]),
    _lora(
        "both ends tuned as one",
        "`ensure_weight_tying`, tied",
        model=_TIED,
        target_modules=["embed_tokens", "lm_head"],
        ensure_weight_tying=True,
    ),
    _lora("some tokens", "`trainable_token_indices`", trainable_token_indices=[5, 9]),
    _lora("some tokens, tied", "the same, tied", model=_TIED, trainable_token_indices=[5, 9]),
    _lora("mixture, attention", "Qwen3-MoE", "qwen3_moe", _MOE, target_modules=_QV),
    _lora("mixture, fused experts", "`target_parameters`", "qwen3_moe", _MOE, target_parameters=_EXPERTS),
    _lora("mixture, router", "LoRA on `gate`", "qwen3_moe", _MOE, target_modules=["gate"]),
    _lora("Mamba, input maps", "`in_proj`, `x_proj`", "mamba", {"state_size": 4}, target_modules=["in_proj", "x_proj"]),
    _lora("Mamba, time steps", "`dt_proj`", "mamba", {"state_size": 4}, target_modules=["dt_proj"]),
    _lora("saved on a wrapper", "`model.language_model.` before blocks", saved=("model.layers", f"{_WRAPPER}.layers")),
    _lora("a prefix too many", "`model.model.`", saved=("base_model.model.", "base_model.model.model.")),
    _lora("a prefix too few", "no `model.`", saved=("base_model.model.model.", "base_model.model.")),
    _lora("saved compiled", "`_orig_mod.`", saved=("base_model.model.", "base_model.model._orig_mod.")),
    _lora("of a deeper model", "blocks that the model lacks", saved=("layers.2.", "layers.7.")),
    _lora("in a wrapper", "Gemma 3, multimodal", "gemma3", _GEMMA3, target_modules=_IN_WRAPPER),
    _lora(
        "of a text model, in a wrapper", "Gemma 3", "gemma3", _GEMMA3, (_WRAPPER, "model"), target_modules=_IN_WRAPPER
    ),
    _other("AdaLoRA", AdaLoraConfig, total_step=10, init_r=4, target_r=2),
    _other("IA³", IA3Config, target_modules=[*_QV, "down_proj"], feedforward_modules=["down_proj"]),
    _other("LoHa", LoHaConfig, r=4, alpha=8),
    _other("LoKr", LoKrConfig, r=4, alpha=8),
    _other("OFT", OFTConfig, oft_block_size=8),
    _other("BOFT", BOFTConfig, boft_block_size=4),
    _other("VeRA", VeraConfig, r=8, target_modules=["q_proj", "o_proj"]),
    Kind("prompt tuning", "vectors before the prompt", lambda: PromptTuningConfig(num_virtual_tokens=4, **_TASK)),
    Kind("P-tuning", "vectors before the prompt", lambda: PromptEncoderConfig(num_virtual_tokens=4, **_TASK)),
    Kind("prefix tuning", "keys and values before", lambda: PrefixTuningConfig(num_virtual_tokens=4, **_TASK)),
    Kind(
        "adaption prompt",
        "vectors to attend to",
        lambda: AdaptionPromptConfig(adapter_len=4, adapter_layers=2, **_TASK),
    ),
)


def rows() -> list[Row]:
    """What became of every kind."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [_row(kind, Path(folder) / str(number)) for number, kind in enumerate(KINDS)]


def _row(kind: Kind, folder: Path) -> Row:
    base = save_tiny_model(folder / "base", kind.architecture, **kind.model)
    live = _save_live(kind, base, folder / "adapter")
    try:
        found = _outputs(load_tuned(base, folder / "adapter", dtype="float32", device="cpu"))
    except InputError as refused:
        return Row(kind.name, kind.what, "refused", sentence=str(refused).replace(f"{folder}/", ""))
    except Exception as error:  # which is what a row is to tell
        return Row(kind.name, kind.what, "traceback", sentence=f"{type(error).__name__}: {error}")
    expected = _outputs(live)
    differences = [float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)]
    return Row(kind.name, kind.what, "equal" if max(differences) < EQUAL else "wrong", max(differences))


def _save_live(kind: Kind, base: Path, folder: Path) -> Any:
    """A live adapter whose trained weights are no longer what they began as, saved as peft saves it."""
    torch.manual_seed(1)
    live: Any = get_peft_model(load_model(base, dtype="float32", device="cpu"), kind.config())
    with torch.no_grad():
        for weight in live.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight)
    live.eval().save_pretrained(folder)
    weights = load_file(folder / ADAPTER_WEIGHTS)
    save_file({name.replace(*kind.saved, 1): weight for name, weight in weights.items()}, folder / ADAPTER_WEIGHTS)
    return live


def _outputs(model: Any) -> list[torch.Tensor]:
    """The outputs of every block, and the logits."""
    count = model.config.get_text_config().num_hidden_layers
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    found: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).double())

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        with torch.no_grad():
            logits = model(input_ids=_TOKENS).logits.double()
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, logits]
