"""What one picture costs a teacher: floating-point operations and memory, counted while it runs.

FLOPs are torch.utils.flop_counter's: 2 for each multiply-add of matrix products, convolutions and attention, nothing
for the rest. Memory is the largest sum of tensors alive at once, weights not included: what a larger batch multiplies.
Both are counted with plain attention in float32; fused attention and half precision need less memory.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """FLOPs and peak bytes of activations of one call, and its seconds (counting included: an upper bound)."""

    flops: int
    peak_bytes: int
    seconds: float


def measure(run: Callable[[], Any]) -> Cost:
    """The cost of `run()`, which computes with torch in this thread."""
    start = time.perf_counter()
    # Transformer layers' fused inference path is one operation that the counter does not know.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # The fused attention of CPUs is not counted either; the plain one is, and costs the same products.
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            _PeakMemory() as memory,
            FlopCounterMode(display=False) as f,
        ):
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return Cost(f.get_total_flops(), memory.peak, time.perf_counter() - start)


class _PeakMemory(TorchDispatchMode):
    """Follows the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_place(t) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor) and _place(tensor) not in given | self.alive.keys():
                self._follow(tensor.untyped_storage())
        return made

    def _follow(self, storage: Any) -> None:
        place = storage._cdata
        self.alive[place] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, place)

    def _freed(self, place: int) -> None:
        self.now -= self.alive.pop(place, 0)


def _place(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
