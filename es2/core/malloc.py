"""What the C library does with memory that was freed.

By itself it hands large pieces and the upper end of the heap back to the kernel, and the next layer or batch, which
needs as much again, gets every page anew, zeroed.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
_KEPT = 2**28  # bytes
_LARGEST = 2**25  # bytes; of a piece that comes from the heap, the most that glibc takes


def keep_freed_memory() -> None:
    """Let this process keep what it frees, up to 256 MiB of it; does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _LARGEST)
