"""The trained weights of a fine-tune, an adapter or blocks of the model, and their files.

Neither the embedding matrix nor the LM head is trained: they are often one, and the KL takes the head for frozen.
Trained weights are float32 whatever the model runs in: steps of a thousandth of a weight vanish in bfloat16.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from es2.core.files import write_json
from es2.models.adapters import ADAPTER_CONFIG
from es2.models.forward import FinetuneForward
from es2.models.tensors import disk_refused, save_tensors
from es2.training.config import FinetuneConfig


def make_trainable(
    network: FinetuneForward, config: FinetuneConfig, location: str
) -> tuple[dict[str, torch.nn.Parameter], Callable[[Path], None]]:
    """Put an adapter that names `location` as its base into the frozen model, or unfreeze blocks.

    Returns:
        The trained weights by name, and a function that writes them as they are to `adapter/` (a folder) or
        `weights.safetensors` (a file), atomically; it raises `MachineError`.
    """
    model = network.model
    if config.method == "full":
        for block in config.blocks:
            network.blocks[block].float().requires_grad_(True)
        changed = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        return changed, lambda output: save_tensors(output, changed, {"base": location})

    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    maps = {
        name.rpartition(".")[2]: module
        for name, module in network.blocks.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=sorted(maps),
        layers_to_transform=list(config.blocks),
        layers_pattern=[network.list_name],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in maps.values()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls a name that transformers deprecated
        torch.manual_seed(config.seed)
        adapted = get_peft_model(model, settings)
    adapted.peft_config["default"].base_model_name_or_path = location
    adapted.eval()  # no dropout: two passes over one prompt have to agree

    def write(output: Path) -> None:
        temporary = output.with_name(f".tmp-{output.name}")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            # "auto" would ask the Hub whether the vocabulary was resized.
            adapted.save_pretrained(str(temporary), save_embedding_layers=False)
            # peft keeps the names in a set, whose order differs between processes.
            kept = json.loads((temporary / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            write_json(temporary / ADAPTER_CONFIG, kept | {"target_modules": sorted(kept["target_modules"])})
            shutil.rmtree(output, ignore_errors=True)
            temporary.rename(output)
        except (OSError, SafetensorError) as error:
            raise disk_refused(error, output) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    return {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}, write
