"""Where a model runs and in which number format, whether it fits, and how torch reports that it does not."""

from __future__ import annotations

from es2.core.errors import InputError, MachineError
from es2.models.model_files import first_line
from es2.models.placement import free_bytes


def choose_device() -> str:
    """`cuda` where there is one, else `mps`, else `cpu`."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_dtype(device: str) -> str:
    """The number format that suits a device: `bfloat16` on CUDA, where it is fast, `float32` elsewhere."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"The device {device[:40]!r} cannot be used ({first_line(error)}); use cpu.") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python means that memory ran out."""
    import torch

    words = ("can't allocate memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def require_memory(needed: float, dtype: str, device: str, name: str) -> None:
    available = free_bytes(device)
    if needed > available:
        raise MachineError(
            f"{too_large(name)} ({needed / 1e9:.1f} GB needed in {dtype} on {device}, {available / 1e9:.1f} GB free)."
        )


def too_large(name: str) -> str:
    return f"The memory is too small for the model {name!r}: use a smaller model, bfloat16, or another device"
