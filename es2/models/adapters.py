"""Fine-tunes applied to their base model: peft adapters of any origin, and blocks that a full fine-tune changed.

peft allocates what an adapter's configuration states before it opens the weights, so both are compared first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from es2.core.errors import InputError, MachineError
from es2.core.files import read_json
from es2.models.device import is_out_of_memory
from es2.models.model_files import first_line
from es2.models.tensors import load_tensors

_NUMBER = re.compile(r"\.(\d+)\.")  # of a block, in a weight's name

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
    _check_homes(model, finetune, merge)
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


def _check_homes(model: Any, folder: Path, merge: bool) -> None:
    """Refuse an adapter with weights that no module of the model takes, which peft passes over, or cannot merge."""
    modules = dict(model.named_modules())
    names = _weight_names(folder)
    homes = {name: home for name in names if (home := _home(name, modules)) is not None}
    homeless = [name for name in names if name not in homes and not name.startswith("base_model.vera_")]
    if homeless:
        base = (read_json(folder / ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
        made_for = f" It names {str(base)[:100]!r} as its base." if base else ""
        raise InputError(
            f"The adapter {str(folder)!r} does not fit the model: {len(homeless)} of its {len(names)} weights have no "
            f"module there (the first: {homeless[0]}); give the model it was trained on.{made_for}"
        )
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if merge and None not in ends and ends[0].weight is ends[1].weight:
        tied = next((home for name, home in homes.items() if "lora_" in name and modules[home] in ends), None)
        if tied is not None:
            raise InputError(
                f"The adapter {str(folder)!r} changes {tied}, whose weights are the model's input embeddings and its "
                "LM head at once, so merging it would change both; train it without, or untie the embeddings first."
            )


def _home(name: str, modules: Mapping[str, Any]) -> str | None:
    """The module that a weight of an adapter belongs to: `….q_proj` of `base_model.model.….q_proj.lora_A.weight`."""
    # Several adapted parameters of one module (fused experts) are wrappers in each other.
    parts = [part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer"]
    return next((home for cut in (1, 2) if (home := ".".join(parts[:-cut])) and home in modules), None)


def _weight_names(folder: Path) -> list[str]:
    """The names of an adapter's weights, layers in their order."""
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as weights:
        names = list(weights.keys())
    return sorted(names, key=lambda name: (int(found[1]) if (found := _NUMBER.search(name)) else -1, name))


def doubts(folder: Path, model: str, n_layers: int) -> list[str]:
    """Sentences on an adapter that fits a model of `n_layers` blocks and may still be another one, or a part of one."""
    config = read_json(folder / ADAPTER_CONFIG) or {}
    found = []
    own = sorted({int(number) for name in _weight_names(folder) for number in _NUMBER.findall(name)[:1]})
    asked = config.get("layers_to_transform")
    wanted = list(range(n_layers)) if asked is None else sorted({asked} if isinstance(asked, int) else {*asked})
    names_layers = any(character.isdigit() for character in str(config.get("target_modules")))
    if own and own != wanted and not names_layers:
        have, want = (", ".join(map(str, layers)) for layers in (own, wanted))
        found.append(
            f"The adapter has weights in layers {have} alone, while its configuration asks for {want}: it may be a "
            "part of one."
        )
    base = str(config.get("base_model_name_or_path") or "").rstrip("/")
    if base and Path(base).name.lower() != Path(model).name.lower():
        found.append(f"The adapter names {base[:100]!r} as its base, not {model[:100]!r}.")
    return found


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
