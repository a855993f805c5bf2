"""A peft adapter from anywhere, looked at before it is loaded.

peft believes the configuration: it makes matrices of the rank that is stated there, and copies of layers that are asked
for, before it opens the file of weights. Adapters are handed round, so what they state is held against the header of
the weights first, and whatever peft makes of the rest ends in a sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError, MachineError
from es2.core.files import read_json
from es2.models.device import is_out_of_memory
from es2.models.model_files import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


from typing import TYPE_CHECKING

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA")
"""What peft merges into weights from these two files alone. Other kinds name models or tokenizers to be fetched."""


def check_adapter(folder: Path) -> None:
    """Refuse a folder that holds no adapter, or one that states what its weights do not bear out.

    Raises:
        InputError: with what is wrong.
        MachineError: when it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    config = read_json(folder / ADAPTER_CONFIG)
    if config is None or not isinstance(config.get("peft_type"), str):
        raise InputError(f"{str(folder)!r} holds no peft adapter: it needs a readable {ADAPTER_CONFIG}.")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(
            f"{str(folder)!r} has no {ADAPTER_WEIGHTS}; save the adapter again with peft's save_pretrained, which "
            "writes safetensors. Nothing else is read."
        )
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"The weights of the adapter {str(folder)!r} are damaged ({first_line(error)}).") from error
    if config["peft_type"] not in KINDS:
        kind = config["peft_type"][:40]
        raise InputError(f"The adapter {str(folder)!r} is of the kind {kind!r}, and only {', '.join(KINDS)} are read.")
    largest = max((side for shape in shapes for side in shape), default=0)
    pattern = config.get("rank_pattern") or {}
    ranks = [config.get("r", 1), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    if not all(isinstance(rank, int) and 1 <= rank <= largest for rank in ranks):
        raise InputError(f"The adapter {str(folder)!r} states a rank that its weights do not have; save it again.")
    if config.get("layer_replication"):
        raise InputError(f"The adapter {str(folder)!r} repeats layers of its model, which is not read here.")
    if config.get("megatron_config"):
        raise InputError(f"The adapter {str(folder)!r} names a Python module to be imported, which is not done here.")


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with a checked adapter merged into its weights.

    Raises:
        InputError: when the adapter is none or does not fit the model.
        MachineError: when memory runs out, or the folder cannot be read.
    """
    from peft import PeftModel

    check_adapter(folder)
    try:
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except Exception as error:  # peft has no exceptions of its own: a wrong configuration fails wherever it is used
        if is_out_of_memory(error):
            raise MachineError(f"The memory is too small for the adapter {str(folder)!r}.") from error
        raise InputError(
            f"The adapter {str(folder)!r} does not fit the model ({first_line(error)}); "
            "give the model it was trained on."
        ) from error
    loaded: PreTrainedModel = merged
    return loaded
