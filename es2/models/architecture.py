"""The class of a model by its configuration, and models of it without weights, on the meta device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError
from es2.models.model_files import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a text model, or the wrapper around one that also reads images."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    wraps = type(config) not in AutoModelForCausalLM._model_mapping and (
        type(config) in AutoModelForImageTextToText._model_mapping
    )
    return AutoModelForImageTextToText if wraps else AutoModelForCausalLM


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of a folder without weights, on the meta device; `InputError` when it is none that transformers has."""
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(config)
    except Exception as error:  # a configuration may make a model raise anything
        raise InputError(
            f"The model folder {str(folder)!r} cannot be loaded as a causal language model ({first_line(error)}); "
            "fetch it again, or use another model."
        ) from error
    return model


def emptied(model: Any) -> PreTrainedModel:
    """A model of the same class and configuration without weights, on the meta device."""
    import torch

    with torch.device("meta"):
        empty: PreTrainedModel = type(model)(copy.deepcopy(model.config))
    return empty


def shared_weights(model: Any) -> dict[str, str]:
    """The modules of a model that have a weight together with another one, which is given for each."""
    model.tie_weights()
    owners: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), []).append(name.rpartition(".")[0])
    return {name: other for names in owners.values() for name in names for other in names if other != name}
