"""Watching a training run: its losses, the codes it uses, and the wish to stop it."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourmill.tokenizers.config import NetworkConfig
from fourmill.tokenizers.training.config import TrainTokenizerConfig
from fourmill.tokenizers.training.health import CodebookHealth, health_of
from fourmill.tokenizers.training.workers import Workers


class Meter:
    """Losses and gradient norms of the steps since the last report, and how often each code was used, (H, K).

    Figures stay on the device until they are asked for: reading one waits for the step to end.
    """

    def __init__(self, network: NetworkConfig, workers: Workers) -> None:
        self.workers = workers
        self.books = network.num_codebooks
        self.counts = torch.zeros(self.books * network.vocabulary, dtype=torch.int64, device=workers.device)
        self.clear()

    def clear(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._step: Tensor | None = None
        self.counts.zero_()

    def add(self, loss: Tensor, ids: Tensor | None) -> None:
        """One part of a step; `ids` (B, h, w) or, of several codebooks, (B, H, h, w)."""
        self._step = loss if self._step is None else self._step + loss
        if ids is None:
            return
        if self.books > 1:
            offsets = torch.arange(self.books, device=ids.device) * (len(self.counts) // self.books)
            ids = ids + offsets.view(1, -1, 1, 1)
        ones = torch.ones(1, dtype=torch.int64, device=ids.device).expand(ids.numel())
        self.counts.scatter_add_(0, ids.flatten().to(self.counts.device), ones)

    def end_step(self, norm: Tensor) -> None:
        assert self._step is not None
        self._losses.append(self._step)
        self._norms.append(norm.detach())
        self._step = None

    def check(self, step: int, config: TrainTokenizerConfig) -> list[float]:
        """The losses since the last report, the last one of step `step`; FloatingPointError if one is no number."""
        if not self._losses:
            return []
        losses = self.workers.total(torch.stack([loss.float() for loss in self._losses])) / self.workers.count
        self._losses = list(losses)
        found: list[float] = losses.tolist()
        bad = [i for i, loss in enumerate(found) if not math.isfinite(loss)]
        if bad:
            raise FloatingPointError(
                f"the loss of {config.modality} is {found[bad[0]]} at step {step - len(found) + bad[0] + 1}; lower "
                f"lr ({config.lr:g}) or clip ({config.clip:g})"
            )
        return found

    def drain(self, step: int, config: TrainTokenizerConfig) -> tuple[list[float], list[float], CodebookHealth | None]:
        """Losses, gradient norms and the codebook's health since the last report, of all processes; begins anew."""
        losses, norms = self.check(step, config), torch.stack(self._norms).tolist()
        counts = self.workers.total(self.counts).cpu().numpy()
        health = health_of(counts.reshape(self.books, -1)) if counts.any() else None
        self.clear()
        return losses, norms, health

    def state_dict(self) -> list[Any]:
        """Of all processes together."""
        counts = self.workers.total(self.counts.clone())
        return [[float(x) for x in self._losses], [float(x) for x in self._norms], counts.tolist()]

    def load_state_dict(self, state: list[Any], first: bool) -> None:
        """`first`: whether this process takes the counts, which are of all."""
        losses, norms, counts = state
        device = self.counts.device
        self._losses = [torch.tensor(x, device=device) for x in losses]
        self._norms = [torch.tensor(x, device=device) for x in norms]
        self.counts.copy_(torch.tensor(counts if first else np.zeros(len(counts), dtype=np.int64), device=device))


class Interruption:
    """Within, the first SIGTERM or Ctrl-C only sets `asked`; the next one does what it did before."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, *error: object) -> None:
        self._put_back()
