"""Memory of runs on a CPU: kept for the next tensor instead of given back to the system."""

from __future__ import annotations

import ctypes
import os
import platform

# Of malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**30  # bytes of a block that is kept


def keep_freed_memory() -> bool:
    """Let glibc keep blocks of up to 1 GiB when they are freed; whether it does.

    By default it maps blocks above 32 MB anew each time and unmaps them when they are freed, so that each page of each
    large activation is a fault: three training steps of `experiment=cifar10_patches_local`, batch 64, took two cores
    22.4 s, 12.6 of them in the kernel, and take 15.3; their peak memory grew from 5.2 to 5.7 GB. Elsewhere, or where
    the environment sets anything of malloc's (`MALLOC_…_`, `GLIBC_TUNABLES`), nothing changes.
    """
    told = any(name == "GLIBC_TUNABLES" or (name.startswith("MALLOC_") and name.endswith("_")) for name in os.environ)
    if platform.libc_ver()[0] != "glibc" or told:
        return False
    libc = ctypes.CDLL(None)
    # Older versions refuse a threshold above 32 MB: then memory must not be kept either, it would only lie about
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
