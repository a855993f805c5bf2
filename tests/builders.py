"""Tiny models, a tiny tokenizer and tiny prompt sets, so that tests run real code on real files in a second.

The models are random but not trivial: their weights are drawn large enough that a wrong mask, a wrong position or a
shifted layer changes every embedding by far more than the tests allow. Everything goes through a folder on disk, as a
user's model does, because an in-memory tokenizer or model takes other paths through transformers and TransformerLens.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from es2.prompts.prompt_set import HARMFUL, HARMLESS, LABEL_NAMES, PromptSet, split_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ARCHITECTURES = ("llama", "mistral", "qwen2", "gpt2", "gpt_neox", "gemma")
"""The architectures that the workbench is verified on, by transformers' `model_type`."""

N_LAYERS = 3
D_MODEL = 32
CONTEXT_LENGTH = 256

CHAT_TEMPLATE = (
    "{{ '<|im_start|>system\\nYou help. Today is ' + strftime_now('%d %b %Y') + '.<|im_end|>\\n' }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""A chat template with the two habits that trip a reader up: it trims the user's text, and it tells the date."""

TEXTS = (
    "How do I bake bread?",
    "Explain, step by step and at some length, how a lock is picked without the key that belongs to it.",
    "Why?",
    "Write a story about two friends who find an old map — and the harbour it leads to.",
    "Tell me a joke about bread",
    "What is the capital of France, and why was it moved there?",
    "Hi!",
)
"""Prompts of very different lengths, so that every batch needs padding."""


def tiny_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer of about 300 tokens: any text, emoji included, can be encoded and decoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    wrapped.chat_template = chat_template
    return wrapped


def tiny_model(
    architecture: str = "llama", *, n_layers: int = N_LAYERS, d_model: int = D_MODEL, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """A random causal language model of one of `ARCHITECTURES`, in float32; `config` overrides its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT_LENGTH,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if architecture != "gpt2":
        settings["intermediate_size"] = 2 * d_model
    if architecture in ("llama", "mistral", "qwen2", "gemma"):
        settings["num_key_value_heads"] = 2
    if architecture == "gemma":
        settings["head_dim"] = 16
    if architecture == "mistral":
        settings["sliding_window"] = 24
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **{**settings, **config}))
    return model.to(torch.float32).eval()


def save_tiny_model(
    folder: Path, architecture: str = "llama", *, chat_template: str | None = CHAT_TEMPLATE, **settings: Any
) -> Path:
    """Save `tiny_model(architecture, **settings)` and the tiny tokenizer as a model folder; returns the folder."""
    tiny_model(architecture, **settings).save_pretrained(folder)
    tiny_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder


def write_prompts(path: Path, prompts: PromptSet) -> Path:
    """Write a prompt set as a CSV file with its pairs; returns the path."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "label", "pair"])
        for text, label, pair in zip(prompts.texts, prompts.labels.tolist(), prompts.pairs, strict=True):
            writer.writerow([text, LABEL_NAMES[label], pair])
    return path


def tiny_prompts(n_pairs: int = 4, *, name: str = "tiny") -> PromptSet:
    """`n_pairs` contrast pairs of short requests, both labels alternating, splits by the stable hash."""
    texts, pairs = [], []
    for pair in range(n_pairs):
        texts += [f"Break lock number {pair} open.", f"Oil lock number {pair}, please."]
        pairs += [f"pair-{pair}"] * 2
    return PromptSet(
        name=name,
        texts=tuple(texts),
        labels=np.array([HARMFUL, HARMLESS] * n_pairs, dtype=np.int8),
        categories=("locks",) * (2 * n_pairs),
        pairs=tuple(pairs),
        splits=tuple(split_of(pair) for pair in pairs),
    )


def save_tiny_adapter(folder: Path, model_folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Save a random LoRA adapter, strong enough to be seen, for a tiny model with Llama's module names.

    `settings` are those of peft; what is saved as a whole (`modules_to_save`) is another weight than the base's.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    given = {"target_modules": ["q_proj", "down_proj"]} | settings
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, **given),
    )
    for name, weight in adapted.named_parameters():
        if ".modules_to_save." in name:
            weight.data += weight.std() * torch.randn_like(weight)
    adapted.save_pretrained(folder)
    return folder
