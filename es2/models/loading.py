"""Models loaded from local folders of safetensors, configuration and tokenizer.

Code in a model folder is never run, and missing weights, which transformers replaces by random ones, are an error.
Imports no torch before a model is loaded.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError, MachineError
from es2.models.adapter_files import ADAPTER_CONFIG
from es2.models.adapter_fit import fit_adapter
from es2.models.adapters import apply_finetune
from es2.models.architecture import auto_class, empty_model
from es2.models.batching import is_verified, rounding_of, trial_tokens
from es2.models.blocks import BlockHooks, find_blocks
from es2.models.costs import DTYPES, FOUR_BIT_BYTES, WORKING_SHARE
from es2.models.device import check_device, choose_device, choose_dtype, is_out_of_memory, require_memory, too_large
from es2.models.model_files import PROCESSOR_FILES, first_line, read_config
from es2.models.placement import AUTO, all_or_none, free_bytes, map_to_devices, quantized, shard
from es2.models.weight_checks import check_loaded, count_parameters

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A model folder's tokenizer, without running the folder's code; `InputError` when it has no readable one."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        return _with_template(tokenizer, folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"The model folder {str(folder)!r} has no tokenizer that can be read ({first_line(error)}); "
            "add its tokenizer.json and tokenizer_config.json."
        ) from error


def _with_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer with the chat template of a processor's file, which transformers reads for processors alone."""
    for file in (folder / name for name in PROCESSOR_FILES):
        if tokenizer.chat_template is None and file.is_file():
            template = read_config(file).get("chat_template")
            if not isinstance(template, str) and (template is not None or file.name == "chat_template.json"):
                raise InputError(f"{str(file)!r} holds no chat template; fetch the model again.")
            tokenizer.chat_template = template
    return tokenizer


def load_model(
    folder: Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    may_spread: bool = False,
    quantize: str | None = None,
) -> PreTrainedModel:
    """The plain transformers model of a folder, in evaluation mode.

    Args:
        folder: what `model_folder` returned.
        dtype: one of `DTYPES`; by default what suits the device.
        device: a torch device; by default the best there is.
        may_spread: whether it may lie on several devices: where the one GPU is too small, or with the device `auto`.
        quantize: `4bit` for weights of four bits (bitsandbytes, on CUDA only).

    Raises:
        InputError: when the folder is no causal language model, is damaged or incomplete, or needs code of its own.
        MachineError: when the device is missing or the memory too small.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    dtype = dtype or choose_dtype(choose_device() if device in (None, AUTO) else device)
    if dtype not in DTYPES:
        raise InputError(f"Unknown dtype {dtype[:40]!r}; one of {', '.join(DTYPES)}.")
    if (folder / ADAPTER_CONFIG).exists():  # transformers would load the model that the adapter names instead
        raise InputError(
            f"The model folder {str(folder)!r} also holds an adapter, so it is unclear which model is meant; move its "
            f"{ADAPTER_CONFIG} elsewhere, and import the adapter as a run if it is to be compared."
        )
    parameters = count_parameters(folder)
    needed = parameters * (FOUR_BIT_BYTES if quantize else DTYPES[dtype]) * WORKING_SHARE
    placed: dict[str, Any] = {}
    if device == AUTO and not may_spread:
        raise InputError("The device auto is for capture; give cuda or cpu here.")
    one_gpu = device in (None, "cuda") and choose_device() == "cuda"
    if device == AUTO or (may_spread and one_gpu and needed > free_bytes("cuda") and torch.cuda.device_count() > 1):
        placed = map_to_devices(needed, folder.name)
    else:
        device = device or choose_device()
        check_device(device)
        require_memory(needed, dtype, device, folder.name)
    if quantize is not None:
        placed = quantized(str(device), dtype)
    offload = placed.pop("offload_folder", None)
    disable_progress_bar()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # all processes but one would get no weights
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        loaded: Any = auto_class(config).from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below, where transformers names them in its log alone
            **placed | ({} if offload is None else {"offload_folder": offload.name}),
        )
        model, loading = loaded
        model = model if placed else model.to(device)
        if offload is not None:
            model.offload_folder = offload  # which lives as long as the model
    except (
        MemoryError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        if is_out_of_memory(error):
            raise MachineError(f"{too_large(folder.name)}.") from error
        raise InputError(
            f"The model folder {str(folder)!r} cannot be loaded as a causal language model ({first_line(error)}); "
            "fetch it again, or use another model."
        ) from error
    check_loaded(model, loading, f"The model folder {str(folder)!r}")
    return model.eval()


def load_sharded(folder: Path, dtype: str | None, device: str) -> PreTrainedModel:
    """A model whose blocks are split over the processes of an FSDP launch; each process calls it with its device.

    The first process reads the weights into the machine's memory and distributes them block by block.

    Raises:
        InputError, MachineError: as `load_model`, in every process.
    """
    import torch
    from accelerate import PartialState, init_empty_weights
    from transformers import AutoConfig

    dtype = dtype or choose_dtype(device)

    def load() -> Any:
        if PartialState().is_main_process:
            return load_model(folder, dtype=dtype, device="cpu")
        with init_empty_weights(include_buffers=False):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return auto_class(config).from_config(config, dtype=getattr(torch, dtype))

    model = all_or_none(load).requires_grad_(False)
    shard(model, find_blocks(model)[1], torch.device(device))
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_bridge(
    folder: Path,
    *,
    adapter: Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    may_spread: bool = False,
) -> TransformerBridge | BlockHooks:
    """A TransformerLens bridge over the model of a folder, its adapter merged into its weights.

    The bridge computes what transformers computes (no weight processing), with eager attention. An architecture without
    tests is tried out: where TransformerLens has no bridge for it, or one that fails or computes another model, hooks
    on the model's own blocks serve instead. With `may_spread` blocks, and so the outputs of hooks, may lie on several
    devices.

    Raises:
        InputError, MachineError: as `load_model`; also when the adapter does not fit the model, and when its blocks
            cannot be found.
    """
    # Merged before the bridge: once wrapped, a model takes no adapter any more.
    load = partial(load_tuned, folder, adapter, dtype=dtype, device=device, may_spread=may_spread)
    model: Any = load()
    expected = None if is_verified(model) else _block_outputs(BlockHooks(model))
    bridge, reason = _boot(folder, model, expected)
    if bridge is None:
        del model  # before it is loaded again: a bridge that failed leaves it changed
        logger.info("%s Hooks on the model's own blocks are used.", reason)
        return BlockHooks(load())
    bridge.eval()
    return bridge


def _boot(folder: Path, model: Any, expected: list[torch.Tensor] | None) -> tuple[Any, str]:
    """A bridge whose blocks give the `expected` outputs; without one, None and a sentence that says why."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources.transformers import helpers

    # For a multimodal model it would install torchvision with pip, and with it another torch; texts need neither.
    helpers._ensure_torchvision = lambda: False
    kind = model.config.model_type
    try:
        bridge = TransformerBridge.boot_transformers(
            str(folder),
            hf_model=model,
            tokenizer=load_tokenizer(folder),
            dtype=model.dtype,
            device=str(model.device),
        )
        found = None if expected is None else _block_outputs(bridge)
    except Exception as error:  # a bridge without tests may fail with anything, and own hooks need none
        if is_out_of_memory(error):
            raise MachineError(f"{too_large(folder.name)}.") from error
        return None, f"TransformerLens cannot hook the {kind!r} model ({first_line(error)})."
    if found is not None and expected is not None:
        if len(found) != len(expected):
            return None, f"{len(found)} of {len(expected)} hooks of TransformerLens fired for the {kind!r} model."
        limit = rounding_of(model)
        apart = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
        if not apart <= limit:
            return None, f"The {kind!r} model through TransformerLens is another one (apart by {apart:.2g})."
    return bridge, ""


def _block_outputs(hooked: Any) -> list[torch.Tensor]:
    """The output of every block for a few tokens, under hooks."""
    import torch

    model = hooked.original_model
    tokens = torch.tensor([trial_tokens(model, 16)], device=model.device)
    found: list[torch.Tensor] = []
    names = [f"blocks.{layer}.hook_out" for layer in range(hooked.cfg.n_layers)]

    def keep(activation: torch.Tensor, hook: Any) -> None:
        found.append(activation[0].float().cpu().clone())

    with torch.inference_mode(), hooked.hooks(fwd_hooks=[(name, keep) for name in names]):
        model(tokens, use_cache=False)
    return found


def load_tuned(
    folder: Path,
    adapter: Path | None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    may_spread: bool = False,
) -> PreTrainedModel:
    """The model of a folder with a peft adapter or changed blocks merged into its weights; raises as `load_bridge`."""
    if adapter is not None and not adapter.is_file():
        fit_adapter(adapter, partial(empty_model, folder))  # before memory is spent
    model = load_model(folder, dtype=dtype, device=device, may_spread=may_spread)
    if adapter is not None:
        apply_finetune(model, adapter, merge=True)
    return model
