"""Freed memory that stays in the process: a large block is taken again without new pages from the system."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROBE = """
import ctypes, resource, sys
from fourmill.model.memory import keep_memory
print(keep_memory() if sys.argv[1] == "keep" else None)
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = library.malloc(64 << 20)
    library.memset(block, 1, 64 << 20)
    library.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_block_of_64_mb_costs_its_pages_once_and_not_at_each_use() -> None:
    def faults(mode: str) -> list[str]:
        command = [sys.executable, "-c", PROBE, mode]
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split()

    answer, _, again = faults("leave")
    assert answer == "None"
    assert int(again) >= 30  # 16,384 pages of 4 kB, or 32 of 2 MB where the system gives such
    answer, first, again = faults("keep")
    assert answer == "True"
    assert int(first) >= 30
    assert int(again) < 5
