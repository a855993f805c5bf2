"""This machine's speed of multiplication and free memory; the speed is measured once an hour at most."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from es2.core.errors import InputError
from es2.core.files import content_key, read_json, user_cache, write_json, writing
from es2.models.device import choose_dtype

_ASSUMED_FLOPS = 1e14  # of a GPU that is elsewhere: between a card of 24 GB and one of 80
ASSUMED_CPU_FLOPS = 1e11  # of the cores beside a GPU, which do the analysis

_MEASURED_SECONDS = 0.3
_REMEMBERED_SECONDS = 3600.0
_MOST_CORES = 16  # products of this size gain little from more


@dataclass(frozen=True)
class Machine:
    """Where a fine-tune would run.

    Attributes:
        device: `cpu`, or the torch device that was measured.
        flops: multiplications and additions per second in large matrix products, of one device.
        free_gb: memory that is free now on one device, in GB (10⁹ bytes); None where it is not known.
        n_devices: how many of them there are.
        assumed: whether `flops` was stated, not measured.
    """

    device: str
    flops: float
    free_gb: float | None
    n_devices: int = 1
    assumed: bool = False

    @classmethod
    def elsewhere(cls, gpus: str) -> Machine:
        """GPUs that are not here: `24` for one of 24 GB, `8x80` for eight of 80 GB; else `InputError`."""
        found = re.fullmatch(r"(?:(\d{1,3})x)?(\d{1,4})", gpus.strip().lower())
        if not found or not int(found[1] or 1) or not int(found[2]):
            raise InputError(f"--gpus {gpus[:40]!r} is not understood; write 24 for one GPU of 24 GB, 8x80 for eight.")
        return cls("cuda", _ASSUMED_FLOPS, float(found[2]), int(found[1] or 1), assumed=True)


def this_machine(device: str | None = None) -> Machine:
    """This machine's speed, remembered by host, number of cores and device.

    The fastest measurement is kept: a busy machine seems slower than it is.

    Args:
        device: `cpu` is measured with numpy, any other with torch. By default what is known of a `cuda` device here,
            else the CPU, so that no torch is imported.

    Raises:
        InputError: for a device that cannot be used.
        MachineError: when the measurement cannot be remembered.
    """
    if device is None:
        device = "cuda" if _memo("cuda").exists() else "cpu"
    memo = _memo(device)
    remembered = (read_json(memo) or {}).get("flops")
    known = float(remembered) if isinstance(remembered, (int, float)) and remembered > 0 else 0.0
    if not known or time.time() - memo.stat().st_mtime > _REMEMBERED_SECONDS:
        known = max(known, _measure_cpu() if device == "cpu" else _measure_torch(device))
        with writing(memo):
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(memo, {"flops": known, "device": device})
    if device == "cpu":
        return Machine(device, known, psutil.virtual_memory().available / 1e9)
    free = _free_on_gpus() if device.startswith("cuda") else []
    return Machine(device.partition(":")[0], known, min(free, default=None), 1 if ":" in device else max(1, len(free)))


def _free_on_gpus() -> list[float]:
    """Free memory of every visible GPU in GB, from the driver's own tool; empty without it."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return [int(line) * 2**20 / 1e9 for line in output.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def _memo(device: str) -> Path:
    key = content_key({"host": socket.gethostname(), "cores": os.cpu_count(), "device": device})
    return user_cache() / "speed" / f"{key}.json"


def _measure_cpu() -> float:
    """Float32 operations per second: the best of many small products on one core, times the cores.

    Threads that wait for each other on a busy machine would measure its scheduler, and so would a clock on the wall.
    """
    from threadpoolctl import threadpool_limits

    size = 512
    left, right = np.random.default_rng(0).random((2, size, size), dtype=np.float32)
    best, begun = math.inf, time.perf_counter()
    with threadpool_limits(1):
        while time.perf_counter() - begun < _MEASURED_SECONDS:
            started = time.thread_time()
            left @ right
            best = min(best, time.thread_time() - started)
    return 2 * size**3 / best * _cores()


def _cores() -> int:
    """Cores that a process here may use, hyper-threads counted once."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or usable, usable, _MOST_CORES)


def _measure_torch(device: str) -> float:
    import torch

    size = 4096
    try:
        matrix = torch.ones(size, size, device=device, dtype=getattr(torch, choose_dtype(device)))
        (matrix @ matrix).sum().item()  # waits until it is done
        started = time.perf_counter()
        for _ in range(10):
            product = matrix @ matrix
        product.sum().item()
        return 10 * 2 * size**3 / (time.perf_counter() - started)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"The device {device[:40]!r} cannot be used ({str(error)[:100]}); use cpu.") from error
