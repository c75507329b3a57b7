"""A moving average of a network's weights while it trains (EMA), often better than the last weights.

Parameters are averaged; codebooks and other buffers are not: they are averages already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of the parameters that are learned. With `decay` None there is none, and every call does nothing."""

    def __init__(self, network: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.learned = [p for p in network.parameters() if p.requires_grad] if decay is not None else []
        self.means = [p.detach().clone() for p in self.learned]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after `step` steps."""
        if self.decay is not None:
            # The first weights would weigh for 1 / (1 - decay) steps: shorter averages until then.
            decay = min(self.decay, step / (step + 9))
            torch._foreach_lerp_(self.means, self.learned, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the network has the averaged weights."""
        kept = [p.detach().clone() for p in self.learned]
        _copy(self.means, self.learned)
        try:
            yield
        finally:
            _copy(kept, self.learned)

    def state_dict(self) -> list[Tensor]:
        return self.means

    def load_state_dict(self, means: list[Tensor]) -> None:
        _copy(means, self.means)


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
