"""What a fine-tune trains, an adapter or blocks of the model, and the form in which it leaves them behind.

Only blocks up to the last target layer are trained, since nothing above can move its embeddings; never the embedding
matrix or the head, which are often one and the same and which the KL takes for frozen. An adapter is written by peft
itself, so that anything that reads adapters reads it. Trained weights are float32 whatever the model runs in: steps of
a thousandth of a weight vanish in bfloat16.
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


def make_trainable(
    network: FinetuneForward, method: str, blocks: range, *, rank: int, alpha: int, seed: int, location: str
) -> tuple[dict[str, torch.nn.Parameter], Callable[[Path], None]]:
    """Put an adapter into the model, or thaw its blocks.

    Args:
        network: the frozen model; its passes run with the adapter from now on.
        method: `lora` or `full`.
        blocks: which blocks are trained.
        rank: of the adapter's matrices.
        alpha: of the adapter.
        seed: of the adapter's first weights, the only draw there is.
        location: what the adapter shall name as its base model.

    Returns:
        The trained weights by name, and a function that writes them as they are to `adapter/` (a folder) or
        `weights.safetensors` (a file), atomically; it raises `MachineError`.
    """
    model = network.model
    if method == "full":
        for block in blocks:
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
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(maps),
        layers_to_transform=list(blocks),
        layers_pattern=[network.list_name],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in maps.values()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's call of a name that transformers gave up
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings)
    adapted.peft_config["default"].base_model_name_or_path = location
    adapted.eval()  # no dropout: two passes over one prompt have to agree

    def write(output: Path) -> None:
        temporary = output.with_name(f".tmp-{output.name}")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            # "auto" would ask the Hub whether the vocabulary was resized.
            adapted.save_pretrained(str(temporary), save_embedding_layers=False)
            # peft holds the names in a set, whose order is another one in every process.
            kept = json.loads((temporary / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            write_json(temporary / ADAPTER_CONFIG, kept | {"target_modules": sorted(kept["target_modules"])})
            shutil.rmtree(output, ignore_errors=True)
            temporary.rename(output)
        except (OSError, SafetensorError) as error:
            raise disk_refused(error, output) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    return {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}, write
