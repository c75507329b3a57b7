"""What differs between the modalities that a spatial tokenizer can learn: input, loss, value, figure of merit.

Invariant: `prepare` refuses a value of another shape or range by name, so that nothing is resized or wrapped silently;
`restore(prepare(value))` is the value, up to what its normalisation drops on purpose (scale of relative depth, length
of vectors).

Shapes: B batch, C channels of a value, S side in pixels (or cells), K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional

from fourmill.tokenizers.config import CheckpointConfig


class Source(ABC):
    """One modality's side of the tokenizer; made by `source_of`. `size`: side of its values, pixels or cells."""

    def __init__(self, config: CheckpointConfig, size: int | None = None) -> None:
        self.config = config
        self.size = config.network.size if size is None else size

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one value."""
        return (self.config.channels, self.size, self.size)

    def stack(self, values: Any) -> np.ndarray:
        """B values as one array (B, *shape); ValueError for a value of another shape."""
        for value in values:
            if np.shape(value) != self.shape:
                raise ValueError(
                    f"a {self.config.source} value of shape {np.shape(value)}; this tokenizer takes {self.shape}. "
                    f"Set the tokenizer's `size` to the side of the labels"
                )
        return np.stack([np.asarray(value) for value in values])

    def resize(self, inputs: Tensor, size: int) -> Tensor:
        """Prepared values (B, C, S, S) at another side: averaged over areas."""
        if inputs.shape[-1] == size:
            return inputs
        return functional.interpolate(inputs, size=(size, size), mode="area")

    @abstractmethod
    def prepare(self, values: Any) -> Tensor:
        """B values -> what the network is given: float32 (B, C, S, S); for semseg int64 (B, S, S), class rows."""

    @abstractmethod
    def loss(self, outputs_BCSS: Tensor, inputs: Tensor) -> Tensor:
        """Scalar; `inputs` as `prepare` made them."""

    @abstractmethod
    def restore(self, outputs_BCSS: Tensor) -> list[np.ndarray]:
        """B values of the modality."""

    @abstractmethod
    def measure(self, truth: Sequence[Any], restored: Sequence[Any]) -> dict[str, float]:
        """Figures of merit of reconstructions, by name."""
