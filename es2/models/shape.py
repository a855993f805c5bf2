"""A model's sizes, from its configuration alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from es2.core.errors import InputError
from es2.models.catalogue import CATALOGUE, resolve
from es2.models.folders import is_cached, model_folder
from es2.models.model_files import TIED, read_config

_UNGATED = ("gpt2", "gpt_neox", "gptj", "gpt_neo", "opt", "phi", "bloom", "falcon", "gpt_bigcode", "starcoder2", "mpt")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide how long it computes.

    Attributes:
        d_ff: width inside a block's MLP.
        block_parameters: number of weights of one block.
        head_parameters: of the LM head, vocabulary × d_model.
        parameters: of the whole model.
        d_kv: width of a block's keys, and of its values.
    """

    n_layers: int
    d_model: int
    d_ff: int
    block_parameters: int
    head_parameters: int
    parameters: int
    d_kv: int = 0

    @classmethod
    def of_folder(cls, folder: Path) -> Shape:
        """From a model folder's configuration, without biases and norms; `InputError` when that lacks a size."""
        whole = read_config(folder / "config.json")
        config = whole.get("text_config") or whole
        size = partial(_first_size, config)
        n_layers = count_layers(folder)
        d_model, vocabulary = size("hidden_size", "n_embd", "d_model"), size("vocab_size")
        if d_model is None or vocabulary is None:
            raise InputError(f"The model in {str(folder)!r} does not say how wide it is; its time cannot be estimated.")
        heads = size("num_attention_heads", "n_head") or 1
        d_head = size("head_dim") or d_model // heads
        d_ff = size("intermediate_size", "n_inner", "ffn_dim") or 4 * d_model
        family = str(config.get("model_type"))
        d_kv = d_head * (size("num_key_value_heads") or heads)
        attention = 2 * d_model * (d_head * heads + d_kv)
        block = attention + (2 if family in _UNGATED else 3) * d_model * d_ff
        head = vocabulary * d_model
        tied = whole.get("tie_word_embeddings", config.get("tie_word_embeddings", family in TIED))
        return cls(n_layers, d_model, d_ff, block, head, n_layers * block + (1 if tied else 2) * head, d_kv)

    @classmethod
    def of_model(cls, model: str) -> Shape:
        """From the model's folder, else, roughly, from the catalogue; `InputError` when it is in neither."""
        if (folder := local_folder(model)) is not None:
            return cls.of_folder(folder)
        spec = resolve(model)
        entry = next((entry for entry in CATALOGUE if entry.name == spec.name), None)
        if entry is None:
            raise InputError(
                f"The model {spec.name!r} is not on this machine yet, so its size is unknown; "
                f"fetch it with `es2 capture --model {spec.name}`."
            )
        n_heads = 1 if entry.tied else 2
        block = (entry.parameters - n_heads * entry.vocabulary * entry.d_model) // entry.n_layers
        head = (entry.parameters - entry.n_layers * block) // n_heads
        return cls(entry.n_layers, entry.d_model, 3 * entry.d_model, block, head, entry.parameters, entry.d_model)


def local_folder(model: str) -> Path | None:
    """The folder of a model on this machine; None for one yet to be fetched, `InputError` when it names none."""
    spec = resolve(model)
    return model_folder(spec) if is_cached(spec) else None


def context_length(folder: Path) -> int | None:
    """The longest prompt in tokens that the model's configuration allows, `None` where it names no limit."""
    config = read_config(folder / "config.json")
    text_config = config.get("text_config") or config
    return _first_size(text_config, "max_position_embeddings", "n_positions", "max_seq_len")


def count_layers(folder: Path) -> int:
    """The number of blocks of the model in a folder; `InputError` when its configuration lacks it."""
    config = read_config(folder / "config.json")
    own = config.get("text_config") or config
    n_layers = _first_size(own, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    kinds = own.get("layers_block_type") or own.get("hybrid_override_pattern")
    if n_layers is None and isinstance(kinds, (list, str)):
        n_layers = len(kinds)
    if n_layers is None:
        raise InputError(f"The model in {str(folder)!r} does not say how many layers it has; use another model.")
    return n_layers


def _first_size(config: Mapping[str, Any], *names: str) -> int | None:
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), None)
