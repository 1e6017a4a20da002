"""A setting of glibc's allocator for programs that train on the CPU."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Let malloc reuse large blocks instead of returning each to the system, for the whole process.

    By default glibc maps every block above 32 MiB anew and unmaps it when it is freed. The temporaries of a training
    step are such blocks, and faulting their pages in again costs time in every step; kept blocks that do not fit the
    next request cost peak memory in return. `python -m benchmarks.training_step` measures both.

    For programs to call at their start: a library has no business changing its host's allocator. Other C libraries
    have no such setting, and are left alone.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
