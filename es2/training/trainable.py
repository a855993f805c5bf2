"""The trained weights of a fine-tune, an adapter or blocks of the model, and their files.

Neither the embedding matrix nor the LM head is trained: they are often one, and the KL takes the head for frozen.
Trained weights are float32 whatever the model runs in: steps of a thousandth of a weight vanish in bfloat16.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

from es2.core.errors import InputError
from es2.core.files import give_usual_mode, write_json
from es2.models.adapter_files import ADAPTER_CONFIG
from es2.models.batching import is_verified
from es2.models.forward import FinetuneForward
from es2.models.tensors import disk_refused, save_tensors
from es2.training.config import FinetuneConfig
from es2.training.terms import LEARNING_RATES, parse_objective

PEFT_REFUSES = dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("out_proj", "conv1d"))
"""Names of modules that peft 0.21 does not adapt, by architecture: fused kernels read their weights directly."""

_ALL_WEIGHTS = 1 / 16  # of LoRA's learning rate, where all weights of a block are trained
_SIZE = 0.01642  # of the weights of Qwen2.5-Coder-0.5B
_GROWTH = 2 / 3  # the power of the weights' size as which the rate grows


def automatic_learning_rate(network: FinetuneForward, config: FinetuneConfig) -> float:
    """The peak learning rate where none is given, from the matrices of the trained blocks before an adapter goes in.

    A step of Adam changes every trained weight by about the learning rate, whatever the gradient's length. What that
    does to a block depends on the weights it is added to, whose median root mean square differs tenfold between models
    (0.189 for SmolLM2-135M, 0.0164 for Qwen2.5-Coder-0.5B). Between these two the rate that serves grows a little more
    slowly than the weights: in the same proportion it would break the first tokens of SmolLM2's replies.
    """
    from peft.utils.integrations import dequantize_module_weight

    sizes = []
    for block in config.blocks:
        for module in network.blocks[block].modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim < 2:
                    continue
                matrix = dequantize_module_weight(module) if name == "weight" else weight
                mean = matrix.detach().float().square().mean()
                sizes.append(mean.full_tensor() if isinstance(mean, DTensor) else mean)
    typical = torch.stack([size.to("cpu") for size in sizes]).sqrt().median().item()
    part = min(LEARNING_RATES[term.name] for term in parse_objective(config.objective))
    rate = part * _SIZE * (typical / _SIZE) ** _GROWTH
    return rate * (_ALL_WEIGHTS if config.method == "full" else 1.0)


def make_trainable(
    network: FinetuneForward, config: FinetuneConfig, location: str
) -> tuple[dict[str, torch.nn.Parameter], Callable[[Path], None]]:
    """Put an adapter that names `location` as its base into the frozen model, or unfreeze blocks.

    Returns:
        The trained weights by name, and a function that writes them as they are to `adapter/` (a folder) or
        `weights.safetensors` (a file), atomically; it raises `MachineError`.

    Raises:
        InputError: when nothing in the blocks can be adapted, or there are no experts to train.
    """
    model = network.model
    if config.method == "full":
        for block in config.blocks:
            network.blocks[block].float().requires_grad_(True)
        changed = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        return changed, lambda output: save_tensors(output, changed, {"base": location})

    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    experts = find_experts(network) if config.method == "experts" else {}
    wanted = [name for block, names in experts.items() if block in config.blocks for name in names]
    if config.method == "experts" and not wanted:
        raise InputError(
            f"The {model.config.model_type!r} model has no experts in blocks {config.blocks[0]} to "
            f"{config.blocks[-1]} that an adapter can change; use --method lora."
        )
    maps = find_maps(network)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        **_targets(network, config, maps),
        target_parameters=wanted or None,
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
            give_usual_mode(*temporary.glob("*.safetensors"))
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


def describe_trained(
    network: FinetuneForward, config: FinetuneConfig, trained: Mapping[str, torch.nn.Parameter]
) -> dict[str, Any]:
    """What a fine-tune trains, as JSON values: modules, the blocks' share of all weights, what of experts, a sentence.

    Args:
        network: before or after `make_trainable`.
        trained: what that returned.
    """
    held = {weight for block in network.blocks for part in _expert_modules(block) for weight in part.parameters()}
    # A fused weight's adapter is a part of the experts' module, as is one on a linear map in there.
    moved = any(weight in held for weight in trained.values())
    experts = "none" if not held else "trained" if moved else "frozen"
    modules = sorted({_leaf(name.partition(".lora_")[0].replace(".base_layer", "")) for name in trained})
    total = sum(weight.numel() for weight in network.model.parameters())
    share = sum(weight.numel() for weight in trained.values()) / total
    where = (
        f"blocks {config.blocks[0]} to {config.blocks[-1]}" if len(config.blocks) > 1 else f"block {config.blocks[0]}"
    )
    what = f"All weights of {where}" if config.method == "full" else f"LoRA on {', '.join(modules)} of {where}"
    way = " (--method experts)" if find_experts(network) else ""
    of_experts = {
        "none": "",
        "frozen": f"; the experts are not trained{way}",
        "trained": ", experts included",
    }
    sentence = f"{what} ({100 * share:.2g} % of the weights){of_experts[experts]}."
    return {"modules": modules, "share": share, "experts": experts, "sentence": sentence}


def find_maps(network: FinetuneForward) -> dict[str, torch.nn.Module]:
    """The linear maps of all blocks that an adapter can change, by their full names; `InputError` if there are none.

    Left out are those that peft refuses or renames to the experts of every block; those whose weights several blocks
    share, since an adapter changes one of them and merging all; and those whose weights a block reads without calling
    them, since an adapter would have no effect, and one when merged.
    """
    from transformers.pytorch_utils import Conv1D

    model, blocks = network.model, set(network.blocks.modules())
    shared = _shared_weights(network)
    maps: dict[str, torch.nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if module in blocks and isinstance(module, (torch.nn.Linear, Conv1D)) and module.weight not in shared
    }
    if is_verified(model):
        return maps
    left_out = {*PEFT_REFUSES.get(model.config.model_type, ()), *_renamed_by_peft(model)}
    called = _called(network, maps)
    usable = {name: module for name, module in maps.items() if _pattern(name) in called and _leaf(name) not in left_out}
    if not usable:
        raise InputError(
            f"The blocks of the {model.config.model_type!r} model have no linear maps that an adapter can change; "
            "use --method full."
        )
    return usable


def find_experts(network: FinetuneForward) -> dict[int, list[str]]:
    """The fused experts' weights `[expert, …, …]` by block, by their full names."""
    numbers = {block: number for number, block in enumerate(network.blocks)}
    fused = {
        weight
        for block in numbers
        for part in _expert_modules(block)
        for weight in part.parameters(recurse=False)
        if weight.ndim == 3
    }
    names = {weight: name for name, weight in network.model.named_parameters() if weight in fused}
    return {
        number: own
        for block, number in numbers.items()
        if (own := [names[w] for w in block.parameters() if w in fused])
    }


def _expert_modules(block: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of a block that hold experts, by the names that architectures give to paths and classes."""
    return [
        part
        for name, part in block.named_modules()
        if ".experts" in f".{name}" or "Experts" in type(part).__name__ or "ExpertGLU" in type(part).__name__
    ]


def _targets(network: FinetuneForward, config: FinetuneConfig, maps: Mapping[str, torch.nn.Module]) -> dict[str, Any]:
    """peft's settings for the maps of the trained blocks: by short names if these mean no other modules."""
    chosen = {module for block in config.blocks for module in network.blocks[block].modules()}
    wanted = {name for name, module in maps.items() if module in chosen}
    short = sorted({_leaf(name) for name in maps})
    place = re.compile(rf"(?:^|.*?\.){network.list_name}\.(\d+)\.")  # where peft finds a block's number
    meant = {
        name
        for name, _ in network.model.named_modules()
        if _leaf(name) in short and (found := place.match(name)) and int(found[1]) in config.blocks
    }
    if meant != wanted:
        return {"target_modules": sorted(wanted)}
    return {
        "target_modules": short,
        "layers_to_transform": list(config.blocks),
        "layers_pattern": [network.list_name],
    }


def _shared_weights(network: FinetuneForward) -> set[torch.nn.Parameter]:
    """The weights that several blocks have."""
    seen: set[torch.nn.Parameter] = set()
    shared: set[torch.nn.Parameter] = set()
    for block in network.blocks:
        own = set(block.parameters())
        shared |= own & seen
        seen |= own
    return shared


def _called(network: FinetuneForward, maps: Mapping[str, torch.nn.Module]) -> set[str]:
    """The `_pattern`s of the maps that a forward pass calls in any block, and that return one tensor."""
    called: set[str] = set()

    def note(name: str, module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):  # some routers are linear maps by class, and return more
            called.add(_pattern(name))

    handles = [module.register_forward_hook(partial(note, name)) for name, module in maps.items()]
    try:
        with torch.no_grad():
            network.model(torch.arange(8, device=network.device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return called


def _renamed_by_peft(model: Any) -> set[str]:
    """The names that peft takes for those of fused experts in this architecture, in every block at once."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    renamed = set()
    for names in (["gate"], ["gate_proj", "up_proj"], ["down_proj"], ["w1", "w3"], ["w2"]):
        settings = LoraConfig(target_modules=names)
        convert_peft_config_for_transformers(settings, model, None)
        renamed |= set(names) - set(settings.target_modules or ())
    return renamed


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _pattern(name: str) -> str:
    """A name without the numbers in its path: the same in every block, and for every expert."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)
