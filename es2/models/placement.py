"""Where a model's weights lie when one device does not hold them: over several devices, or in shards over processes.

For capture accelerate lays the blocks over all GPUs, or over memory and disk. For a fine-tune torch's FSDP2 shards the
frozen blocks; the adapter is whole in every process, so steps and checkpoints know nothing of shards.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from es2.core.errors import Es2Error, InputError, MachineError
from es2.core.files import user_cache, writing
from es2.models.costs import LEFT_FREE

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from torch import nn


AUTO = "auto"
"""The device to ask for when a model shall be laid over all GPUs, or over memory and disk."""


T = TypeVar("T")


def is_sharded_launch() -> bool:
    """Whether this process was launched with `accelerate launch --use_fsdp`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def processes_of_launch(device: str | None, **settings: Any) -> PartialState:
    """The processes of this launch, joined over gloo on CPUs and NCCL on GPUs; `settings` of `init_process_group`."""
    import torch
    from accelerate import PartialState

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return PartialState(cpu=device == "cpu", **settings)
    # Imported once the group exists, it keeps the group in its functions' defaults, and with it threads that outlive
    # the interpreter: now and then the process then aborts at its end (torch 2.13).
    import torch.distributed.nn

    # Left to itself accelerate takes processes without a GPU for processes that are alone.
    processes = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), **settings)
    atexit.register(processes.destroy_process_group)
    return processes


def free_bytes(device: str) -> int:
    """Free memory of a CUDA device; for any other, of the machine."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def map_to_devices(needed: float, name: str) -> dict[str, Any]:
    """Arguments with which `from_pretrained` lays a model over all GPUs; where there are none, over memory and disk.

    GPUs and memory are not mixed: TransformerLens cannot hook a model that lies in both. `needed` is in bytes.

    Raises:
        MachineError: when all GPUs together are too small, or the disk refuses.
    """
    import torch

    n_gpus = torch.cuda.device_count()
    if n_gpus:
        of_gpus = {index: int(free_bytes(f"cuda:{index}") * (1 - LEFT_FREE)) for index in range(n_gpus)}
        if sum(of_gpus.values()) < needed:
            raise MachineError(
                f"The model {name!r} needs {needed / 1e9:.1f} GB, and its {n_gpus} GPU(s) have "
                f"{sum(of_gpus.values()) / 1e9:.1f} GB free; use more GPUs, a smaller model, or --device cpu."
            )
        return {"device_map": AUTO, "max_memory": of_gpus}
    offload = user_cache() / "offload"
    with writing(offload):
        offload.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(dir=offload)
    free = int(free_bytes("cpu") * (1 - LEFT_FREE))
    return {"device_map": AUTO, "max_memory": {"cpu": free}, "offload_folder": folder}


def quantized(device: str, dtype: str) -> dict[str, Any]:
    """Arguments with which `from_pretrained` loads NF4 weights; `InputError` without CUDA or bitsandbytes."""
    from importlib.util import find_spec

    import torch

    if not (device.startswith("cuda") and torch.cuda.is_available()):
        raise InputError("Weights of four bits need a CUDA device; leave --quantize out, or run where there is one.")
    if find_spec("bitsandbytes") is None:
        raise InputError("Weights of four bits need bitsandbytes; install it with `pip install 'es2[quantize]'`.")
    from transformers import BitsAndBytesConfig

    compute_dtype = getattr(torch, dtype)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)
    return {"device_map": {"": device}, "quantization_config": settings}


def shard(model: Any, blocks: nn.ModuleList, device: torch.device) -> None:
    """Split the blocks of a model over the processes, and copy its other weights to each.

    Args:
        model: in the first process the whole model on the CPU; in the others its shape, without weights.
        blocks: the model's list of blocks; each becomes an FSDP2 module of its own.
        device: this process's.
    """
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    first = torch.distributed.get_rank() == 0
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    of_blocks = {id(weight) for weight in blocks.parameters()}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in of_blocks:
                whole = weight.detach().to(device) if first else torch.empty_like(weight, device=device)
                torch.distributed.broadcast(whole, src=0)
                setattr(module, name, torch.nn.Parameter(whole, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for block in blocks:
        weights = block.state_dict() if first else {}
        buffers = dict(block.named_buffers())
        block.to("meta")
        fully_shard(block, mesh=mesh, reshard_after_forward=True)  # left to itself, each would stay whole as a root
        block.to_empty(device=device)
        for name, buffer in buffers.items():
            block.get_buffer(name).copy_(buffer)
        set_model_state_dict(block, weights, options=options)


def all_or_none(action: Callable[[], T]) -> T:
    """The result of `action` in every process of a launch; where it fails in one, all raise that one's sentence."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    processes = PartialState()
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    sentence = str(error) if isinstance(error, Es2Error) else f"{type(error).__name__} {error}".strip()
    mine = None if error is None else (processes.process_index, sentence, isinstance(error, InputError))
    try:
        failures = [failure for failure in gather_object([mine]) if failure is not None]
    except RuntimeError as lost:
        raise MachineError(
            "Another process of this launch ended without a word (killed, or out of memory); nothing was written."
        ) from (error or lost)
    if error is not None:
        raise error
    if failures:
        index, sentence, of_input = failures[0]
        what = f"Process {index} of {processes.num_processes} failed: {sentence}"
        raise InputError(what) if of_input else MachineError(what)
    return result
