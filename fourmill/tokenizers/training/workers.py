"""The processes that train one tokenizer together: one, or as many as torchrun has started.

Invariants: every process ends each step with the same weights and the same codebook; which examples a step learns from
does not depend on the number of processes. Gradients are averaged by DistributedDataParallel, the codebook's statistics
are summed by vector-quantize-pytorch, and only the first process (`is_first`) writes anything.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """This process among the others."""

    device: str
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, rows: Sequence[T], part: int, parts: int) -> Sequence[T]:
        """This process's rows of one of the parts of a step; together all are the step's, each once."""
        size = len(rows) // (parts * self.count)
        start = (part * self.count + self.rank) * size
        return rows[start : start + size]

    def wrap(self, module: nn.Module, find_unused: bool) -> nn.Module:
        """The module, its gradients averaged over the processes by the end of each backward pass. `find_unused`:
        whether some parameters have no part in some steps."""
        if self.count == 1:
            return module
        from torch.nn.parallel import DistributedDataParallel

        with warnings.catch_warnings():  # the argument that replaces broadcast_buffers is not in torch 2.9
            warnings.simplefilter("ignore", FutureWarning)
            # No broadcast: the codebooks agree by themselves.
            return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=find_unused)

    def only_here(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Backward passes within do not average gradients yet: another part of the step follows."""
        return module.no_sync() if self.count > 1 else contextlib.nullcontext()  # type: ignore[union-attr, operator]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def agree(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.count == 1:
            return flag
        return bool(self.total(torch.tensor(int(flag), device=self.device)).item())

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order."""
        found: list[Any] = [value]
        if self.count > 1:
            found = [None] * self.count
            distributed.all_gather_object(found, value)
        return found


def join_workers(device: str, batch_size: int, parts: int) -> Workers:
    """This process's place, from torchrun's environment; joins the others if there are any.

    ValueError if a step's samples cannot be shared out evenly.
    """
    count, local = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("LOCAL_RANK", "0")
    if batch_size % (count * parts):
        raise ValueError(f"batch_size {batch_size} is not a multiple of {count} processes x accumulate {parts}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if count == 1:
        return Workers(device)
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    elif device != "cpu":
        raise ValueError(f"device {device!r} is one device, for {count} processes; set 'cuda', 'cpu' or 'auto'")
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Workers(device, distributed.get_rank(), count)
