"""Reading many short pieces of memory at once: the rows of a batch, each in another memory-mapped shard.

A batch of 256 samples touches hundreds of shards in each modality; one numpy call for each of them takes longer than
copying the values. So rows are addressed by where they lie in the process's memory, in one call for a modality. Nothing
here can check an address: whoever computes one has checked the shard's buffers and holds on to them meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

_FIRST = 64  # numpy takes address 0 for "no memory"
_LAST = 1 << 48  # what a process can address on ARM; half of it on x86-64


class _Everything:
    """All of memory as an array of overlapping values of some width, one at each byte."""

    def __init__(self, width: int) -> None:
        interface: dict[str, Any] = {"version": 3, "data": (_FIRST, True), "strides": (1,)}
        self.__array_interface__ = {**interface, "shape": (_LAST - _FIRST - width,), "typestr": f"|V{width}"}


@functools.lru_cache(maxsize=2048)
def _memory(width: int) -> np.ndarray:
    return np.asarray(_Everything(width))


def gather(address_B: np.ndarray, count: int, dtype: Any) -> np.ndarray:
    """(B, count) values of `dtype` from these addresses: a copy."""
    values_B = _memory(count * np.dtype(dtype).itemsize)[address_B - _FIRST]
    return np.asarray(values_B.view(dtype).reshape(len(address_B), count))


def texts(address_B: np.ndarray, bytes_B: np.ndarray) -> list[str]:
    """UTF-8 bytes as strings. Keys are mostly of one length and ASCII: those are taken in one piece."""
    width = int(bytes_B[0]) if len(bytes_B) else 0
    if width and (bytes_B == width).all() and (together := gather(address_B, width, np.uint8).tobytes()).isascii():
        text = together.decode()
        return [text[at : at + width] for at in range(0, len(text), width)]
    pairs = zip(address_B.tolist(), bytes_B.tolist(), strict=True)
    return [ctypes.string_at(address, num_bytes).decode() for address, num_bytes in pairs]
