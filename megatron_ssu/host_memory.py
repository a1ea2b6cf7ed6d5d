"""How a process takes memory for large CPU tensors from the system."""

from __future__ import annotations

import ctypes
import os
import platform

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 8 << 20


def configure_host_memory() -> None:
    """Map tensors of 8 MiB and more by themselves, in huge pages where the system has them.

    glibc raises its own threshold to 32 MiB as tensors are freed and keeps what is smaller in a heap that moments,
    allocated between activations, split up: it then hardly shrinks. To be called before torch
    allocates: it reads its variable once.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
