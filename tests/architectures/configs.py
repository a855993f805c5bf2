"""Tiny random models of many decoder architectures, from configurations in code.

What makes an architecture special is kept small enough to matter: windows are shorter than the prompts, hybrids have
both kinds of layer among the trained blocks, experts outnumber those that a token takes, states decay slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

N_LAYERS = 4
WINDOW = 24  # shorter than every prompt
CHAT_TEMPLATE = (
    "{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_HEAD = {"head_dim": 8}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_group": 2, "topk_group": 1,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16,
}  # fmt: skip
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32,
    "num_position_embeddings": 16, "patch_size": 14,
}  # fmt: skip
_GEMMA4 = {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8, "global_head_dim": 16}
_LLAMA4 = {
    "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1,
    "attention_chunk_size": WINDOW, "no_rope_layer_interval": 2,
}  # fmt: skip
_QWEN_IDS = {"image_token_id": 310, "video_token_id": 311, "vision_start_token_id": 312, "vision_end_token_id": 313}
_ROPE_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Architecture:
    """How a tiny model is made.

    Attributes:
        model_type: transformers' name.
        settings: its configuration, over the sizes that all share; of a wrapper, everything.
        wrapper: whether it is a multimodal model around a language model.
    """

    model_type: str
    settings: dict[str, Any]
    wrapper: bool = False


def _of(model_type: str, *parts: dict[str, Any], **settings: Any) -> Architecture:
    merged: dict[str, Any] = {}
    for part in (*parts, settings):
        merged |= part
    return Architecture(model_type, merged)


def _wrapper(model_type: str, text: dict[str, Any], vision: dict[str, Any], **settings: Any) -> Architecture:
    return Architecture(model_type, settings | {"text_config": _BASE | text, "vision_config": vision}, True)


ARCHITECTURES: dict[str, Architecture] = {
    # Dense decoders.
    "apertus": _of("apertus"),
    "arcee": _of("arcee"),
    "biogpt": _of("biogpt"),
    "bitnet": _of("bitnet"),
    "bloom": _of("bloom", n_layer=4, n_head=4),
    "codegen": _of("codegen", n_embd=32, n_layer=4, n_head=4, n_positions=256, n_ctx=256, rotary_dim=4),
    "cohere": _of("cohere", tie_word_embeddings=True),
    "cohere2": _of("cohere2", _SLIDING, tie_word_embeddings=True),
    "ctrl": _of("ctrl", n_embd=32, n_layer=4, n_head=4, dff=64, n_positions=256),
    "cwm": _of("cwm", _HEAD, _SLIDING, bos_token_id=1),
    "diffllama": _of("diffllama"),
    "doge": _of("doge"),
    "ernie4_5": _of("ernie4_5", _HEAD, tie_word_embeddings=True),
    "exaone4": _of("exaone4", _SLIDING, sliding_window_pattern=2),
    "falcon": _of("falcon"),
    "falcon, ALiBi": _of("falcon", alibi=True),
    "falcon, new decoder": _of("falcon", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=2),
    "gemma": _of("gemma", _HEAD, tie_word_embeddings=True),
    "gemma2": _of("gemma2", _HEAD, _SLIDING, tie_word_embeddings=True, query_pre_attn_scalar=8),
    "gemma3_text": _of("gemma3_text", _HEAD, _SLIDING, tie_word_embeddings=True, query_pre_attn_scalar=8),
    "gemma3n_text": _of(
        "gemma3n_text", _HEAD, _SLIDING, tie_word_embeddings=True, vocab_size_per_layer_input=320,
        hidden_size_per_layer_input=8, altup_num_inputs=2, laurel_rank=8, num_kv_shared_layers=1,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4_text": _of("gemma4_text", _HEAD, _SLIDING, _GEMMA4, tie_word_embeddings=True),
    "glm": _of("glm", _HEAD),
    "glm4": _of("glm4", _HEAD),
    "gpt2": _of("gpt2", n_embd=32, n_layer=4, n_head=4, n_positions=256, tie_word_embeddings=True),
    "gpt_bigcode": _of("gpt_bigcode", n_embd=32, n_layer=4, n_head=4, n_positions=256, tie_word_embeddings=True),
    "gpt_neo": _of(
        "gpt_neo", num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=WINDOW,
        tie_word_embeddings=True,
    ),
    "gpt_neox": _of("gpt_neox"),
    "gptj": _of("gptj", n_embd=32, n_layer=4, n_head=4, n_positions=256, rotary_dim=4),
    "granite": _of(
        "granite", embedding_multiplier=2.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2
    ),
    "helium": _of("helium", _HEAD),
    "hunyuan_v1_dense": _of("hunyuan_v1_dense", _HEAD),
    "hyperclovax": _of("hyperclovax", _HEAD),
    "jais2": _of("jais2"),
    "llama": _of("llama"),
    "llama, tied": _of("llama", tie_word_embeddings=True),
    "minicpm3": _of("minicpm3", _LATENT, scale_emb=2, scale_depth=1.4, dim_model_base=16),
    "ministral": _of("ministral", _HEAD, _SLIDING),
    "ministral3": _of("ministral3", _HEAD),
    "mistral": _of("mistral", sliding_window=WINDOW),
    "modernbert-decoder": _of(
        "modernbert-decoder", _SLIDING, local_attention=WINDOW, tie_word_embeddings=True, bos_token_id=1,
        cls_token_id=1, sep_token_id=1,
    ),
    "mpt": _of("mpt", d_model=32, n_heads=4, n_layers=4, max_seq_len=256, tie_word_embeddings=True),
    "nanochat": _of("nanochat"),
    "nemotron": _of("nemotron", _HEAD),
    "olmo": _of("olmo", clip_qkv=4.0),
    "olmo2": _of("olmo2"),
    "olmo3": _of("olmo3", _SLIDING),
    "openai-gpt": _of("openai-gpt", n_embd=32, n_layer=4, n_head=4, n_positions=256, tie_word_embeddings=True),
    "opt": _of("opt", ffn_dim=64, word_embed_proj_dim=32, tie_word_embeddings=True),
    "opt, projected": _of(
        "opt", ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False, tie_word_embeddings=True
    ),
    "persimmon": _of("persimmon"),
    "phi": _of("phi"),
    "phi3": _of("phi3", sliding_window=WINDOW),
    "qwen2": _of("qwen2"),
    "qwen3": _of("qwen3", _HEAD),
    "seed_oss": _of("seed_oss", _HEAD),
    "smollm3": _of("smollm3", no_rope_layer_interval=2, tie_word_embeddings=True),
    "stablelm": _of("stablelm", use_qkv_bias=True),
    "starcoder2": _of("starcoder2", sliding_window=WINDOW, tie_word_embeddings=True),
    "vaultgemma": _of("vaultgemma", _HEAD, _SLIDING, tie_word_embeddings=True, query_pre_attn_scalar=8),
    "xglm": _of("xglm", d_model=32, ffn_dim=64, num_layers=4, attention_heads=4, tie_word_embeddings=True),
    "youtu": _of("youtu", _LATENT),
    # Mixtures of experts.
    "afmoe": _of("afmoe", _HEAD, _EXPERTS, _SLIDING, num_shared_experts=1, num_dense_layers=1),
    "dbrx": _of(
        "dbrx", d_model=32, n_heads=4, n_layers=4, max_seq_len=256,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "deepseek_v2": _of("deepseek_v2", _LATENT, _ROUTED, first_k_dense_replace=1),
    "deepseek_v3": _of("deepseek_v3", _LATENT, _ROUTED, first_k_dense_replace=1),
    "dots1": _of("dots1", _HEAD, _ROUTED, _SLIDING, first_k_dense_replace=1, num_key_value_heads=4),
    "ernie4_5_moe": _of(
        "ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1,
        tie_word_embeddings=True,
    ),
    "flex_olmo": _of("flex_olmo", _EXPERTS),
    "glm4_moe": _of("glm4_moe", _HEAD, _ROUTED, first_k_dense_replace=1),
    "gpt_oss": _of("gpt_oss", _HEAD, _LOCAL, _SLIDING),
    "granitemoe": _of("granitemoe", _LOCAL, attention_multiplier=0.2),
    "granitemoeshared": _of("granitemoeshared", _LOCAL, attention_multiplier=0.2, shared_intermediate_size=32),
    "hunyuan_v1_moe": _of("hunyuan_v1_moe", _HEAD, num_experts=4, moe_topk=2),
    "jetmoe": _of("jetmoe", _LOCAL, kv_channels=8, tie_word_embeddings=True),
    "llama4_text": _of("llama4_text", _HEAD, _LOCAL, _LLAMA4),
    "longcat_flash": _of(
        "longcat_flash", _HEAD, _LATENT, num_layers=4, num_hidden_layers=8, ffn_hidden_size=64, n_routed_experts=4,
        expert_ffn_hidden_size=16, zero_expert_num=2, moe_topk=2,
    ),
    "minimax_m2": _of("minimax_m2", _HEAD, _LOCAL),
    "mixtral": _of("mixtral", _LOCAL),
    "olmoe": _of("olmoe", _EXPERTS),
    "phimoe": _of("phimoe", _LOCAL),
    "qwen2_moe": _of("qwen2_moe", _EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_moe": _of("qwen3_moe", _HEAD, _EXPERTS),
    "solar_open": _of("solar_open", _HEAD, _ROUTED),
    # Recurrent states, and hybrids of them with attention.
    "bamba": _of("bamba", _MAMBA, attn_layer_indices=[1, 3]),
    "falcon_h1": _of("falcon_h1", _MAMBA, mamba_d_ssm=64),
    "falcon_mamba": _of("falcon_mamba", state_size=8, time_step_rank=4, tie_word_embeddings=True),
    "granitemoehybrid": _of(
        "granitemoehybrid", _MAMBA, _LOCAL, shared_intermediate_size=32, layer_types=["mamba", "attention"] * 2
    ),
    "granitemoehybrid, attention": _of(
        "granitemoehybrid", _MAMBA, _LOCAL, shared_intermediate_size=32, layer_types=["attention"] * 4
    ),
    "granitemoehybrid, rope": _of(
        "granitemoehybrid", _MAMBA, _LOCAL, shared_intermediate_size=32, layer_types=["mamba", "attention"] * 2,
        position_embedding_type="rope",
    ),
    "jamba": _of(
        "jamba", num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=0, use_mamba_kernels=False, mamba_d_state=8, mamba_dt_rank=4,
    ),
    "kimi_linear": _of(
        "kimi_linear", _LATENT, _LOCAL, n_shared_experts=1, moe_intermediate_size=16, linear_head_dim=8,
        linear_num_heads=4, layer_types=["linear_attention", "full_attention"] * 2,
    ),
    "lfm2": _of(
        "lfm2", layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False, tie_word_embeddings=True
    ),
    "lfm2_moe": _of(
        "lfm2_moe", _EXPERTS, layer_types=["conv", "full_attention"] * 2, num_dense_layers=1, tie_word_embeddings=True
    ),
    "mamba": _of("mamba", state_size=8, time_step_rank=4, tie_word_embeddings=True),
    "mamba2": _of("mamba2", num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=16),
    "minimax": _of("minimax", _LOCAL, layer_types=["linear_attention", "full_attention"] * 2, block_size=16),
    "nemotron_h": _of(
        "nemotron_h", _HEAD, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16, layers_block_type=["mamba", "attention", "moe", "mlp"],
        ssm_state_size=8, mamba_num_heads=8, mamba_head_dim=8, n_groups=2, chunk_size=16, use_mamba_kernels=False,
    ),
    "olmo_hybrid": _of("olmo_hybrid", _LINEAR, num_key_value_heads=4),
    "qwen3_5_moe_text": _of(
        "qwen3_5_moe_text", _HEAD, _EXPERTS, _LINEAR, shared_expert_intermediate_size=16
    ),
    "qwen3_5_text": _of("qwen3_5_text", _HEAD, _LINEAR),
    "qwen3_next": _of("qwen3_next", _HEAD, _EXPERTS, _LINEAR, shared_expert_intermediate_size=16),
    "recurrent_gemma": _of(
        "recurrent_gemma", block_types=("recurrent", "attention"), lru_width=32, attention_window_size=WINDOW,
        tie_word_embeddings=True,
    ),
    "rwkv": _of("rwkv", attention_hidden_size=32, context_length=256),
    "xlstm": _of("xlstm", hidden_size=64, num_blocks=4, num_heads=2, chunk_size=16),
    "zamba": _of(
        "zamba", n_mamba_heads=2, layers_block_type=["mamba", "hybrid"] * 2, use_mamba_kernels=False, mamba_d_state=8,
        mamba_dt_rank=4, num_key_value_heads=4, tie_word_embeddings=True,
    ),
    "zamba2": _of(
        "zamba2", layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8, n_mamba_heads=8, chunk_size=16,
        num_key_value_heads=4, adapter_rank=4, use_mamba_kernels=False, tie_word_embeddings=True,
    ),
    # Language models inside multimodal wrappers.
    "gemma3": _wrapper(
        "gemma3", _HEAD | _SLIDING, _VISION, mm_tokens_per_image=4, boi_token_index=310, eoi_token_index=311,
        image_token_index=312,
    ),
    "gemma4": _wrapper(
        "gemma4", _HEAD | _SLIDING | _GEMMA4,
        _VISION | _HEAD | {"num_key_value_heads": 4, "position_embedding_size": 16},
        boi_token_id=310, eoi_token_id=311, image_token_id=312, audio_config=None,
    ),
    "llama4": _wrapper(
        "llama4", _HEAD | _LOCAL | _LLAMA4, _VISION | {"vision_output_dim": 32, "projector_input_dim": 32,
        "projector_output_dim": 32}, boi_token_index=310, eoi_token_index=311, image_token_index=312,
    ),
    "llava": _wrapper(
        "llava", {"model_type": "llama"}, _VISION | {"model_type": "clip_vision_model"}, image_token_index=312
    ),
    "mistral3": _wrapper(
        "mistral3", _HEAD | {"model_type": "mistral"}, _VISION | _HEAD | {"model_type": "pixtral"},
        image_token_index=312, tie_word_embeddings=False,
    ),
    "qwen2_vl": _wrapper("qwen2_vl", {"rope_parameters": _ROPE_SECTIONS}, _QWEN_VISION, **_QWEN_IDS),
    "qwen3_5": _wrapper("qwen3_5", _HEAD | _LINEAR, _QWEN_VISION, **_QWEN_IDS),
    "qwen3_vl": _wrapper(
        "qwen3_vl", _HEAD | {"rope_parameters": _ROPE_SECTIONS}, _QWEN_VISION | {"deepstack_visual_indexes": [0, 1]},
        **_QWEN_IDS,
    ),
}  # fmt: skip
"""By the name of its row."""


def save_architecture(folder: Path, architecture: Architecture, seed: int = 0) -> Path:
    """Save a random model of an architecture and the tiny tokenizer as a model folder; returns the folder."""
    from tests.builders import tiny_tokenizer

    build(architecture, seed).save_pretrained(folder)
    tiny_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


def build(architecture: Architecture, seed: int = 0) -> Any:
    """A random model in float32 whose weights are large enough that a wrong mask, position or state shows."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    kind = CONFIG_MAPPING[architecture.model_type]
    known = {} if architecture.wrapper else {name: value for name, value in _BASE.items() if _knows(kind, name)}
    config = kind(**known | architecture.settings)
    torch.manual_seed(seed)
    auto = AutoModelForImageTextToText if architecture.wrapper else AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn_like(parameter)
            if name.endswith("A_log"):
                parameter.copy_(noise * 0.1 - 3)  # a state that decays within a few tokens would hide its loss
            elif parameter.ndim >= 2:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise * 0.1)
    return model


def _knows(kind: Any, name: str) -> bool:
    return hasattr(kind, name) or name in kind.attribute_map
