"""Fine-tunes applied to their base model: peft adapters of any origin, and blocks that a full fine-tune changed.

peft allocates what an adapter's configuration states before it opens the weights, so both are compared first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from es2.core.errors import InputError, MachineError
from es2.core.files import read_json
from es2.models.device import is_out_of_memory
from es2.models.model_files import first_line
from es2.models.tensors import load_tensors

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA")
"""What peft merges from these two files alone. Other kinds name models or tokenizers to be fetched."""


def adapter_files(finetune: Path) -> list[Path]:
    """The files of a fine-tune: peft's two (`InputError` if one is missing), or the one of the changed blocks."""
    files = [finetune / ADAPTER_CONFIG, finetune / ADAPTER_WEIGHTS]
    try:
        if finetune.is_file():
            return [finetune]
        missing = [file.name for file in files if not file.is_file()]
    except OSError as error:  # a name that no file can have
        raise InputError(
            f"{str(finetune)[:200]!r} holds no peft adapter ({error.strerror}); check the path."
        ) from error
    if missing:
        raise InputError(
            f"{str(finetune)!r} holds no peft adapter: it has no {missing[0]}; save the adapter again with peft's "
            "save_pretrained, which writes safetensors. Nothing else is read."
        )
    return files


def check_adapter(folder: Path) -> None:
    """Refuse a folder that holds no adapter, or whose weights contradict its configuration (`InputError`)."""
    from safetensors import SafetensorError, safe_open

    adapter_files(folder)
    config = read_json(folder / ADAPTER_CONFIG)
    if config is None or not isinstance(config.get("peft_type"), str):
        raise InputError(f"{str(folder)!r} holds no peft adapter: it needs a readable {ADAPTER_CONFIG}.")
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


def apply_finetune(model: Any, finetune: Path, *, merge: bool = False) -> None:
    """Make a base model the tuned one, in place.

    Args:
        model: from `es2.models.loading.load_model`.
        finetune: the folder of an adapter, or the file of the blocks that a full fine-tune changed.
        merge: whether an adapter is merged into the weights, as hooks and exports need it, or keeps layers of its own.

    Raises:
        InputError: when the fine-tune is none, is damaged, or does not fit the model.
        MachineError: when memory runs out, the fine-tune cannot be read, or the model lies partly on the disk.
    """
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise MachineError(
            f"The model {Path(model.name_or_path).name!r} lies partly on the disk, where no fine-tune can be merged "
            "into it; export it merged (`es2 export --merged`) where there is memory enough, and capture that folder."
        )
    if finetune.is_file():
        _copy_blocks(model, finetune)
        return
    from peft import PeftModel

    check_adapter(finetune)
    try:
        adapted: Any = PeftModel.from_pretrained(model, str(finetune)).eval()
        if merge:
            adapted.merge_and_unload()
    except Exception as error:  # peft has no exceptions of its own: a wrong configuration fails wherever it is used
        if is_out_of_memory(error):
            raise MachineError(f"The memory is too small for the adapter {str(finetune)!r}.") from error
        raise InputError(
            f"The adapter {str(finetune)!r} does not fit the model ({first_line(error)}); "
            "give the model it was trained on."
        ) from error


def _copy_blocks(model: Any, weights: Path) -> None:
    import torch

    tensors, _ = load_tensors(weights)
    own = dict(model.named_parameters())
    unknown = [name for name, tensor in tensors.items() if name not in own or own[name].shape != tensor.shape]
    if unknown:
        raise InputError(f"The weights {str(weights)!r} do not fit this model (the first: {unknown[0]}).")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
