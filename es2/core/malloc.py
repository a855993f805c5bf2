"""A setting of the C library: freed memory stays with the process.

By default glibc returns large pieces and the upper end of the heap to the kernel, and the next layer or batch, which
needs as much again, gets every page anew, zeroed.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
_KEPT = 2**28  # bytes
_LARGEST = 2**25  # bytes; of a piece that comes from the heap, the most that glibc takes


def keep_freed_memory() -> None:
    """Keep up to 256 MiB of freed memory in this process; does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _LARGEST)
