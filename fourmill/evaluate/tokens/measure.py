"""What measures of reconstructions have in common: a value that went through tokens, against the label it came from.

Invariant, as for labels against truth: sums, histograms and scalars are kept, never values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourmill.evaluate.measure import Figures
from fourmill.pipeline.shards import Spec
from fourmill.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Setting:
    """What a measure may know: the labels' spec, the tokenizer, and the local folders of networks for pictures."""

    spec: Spec
    tokenizer: Tokenizer
    rfid_network: str | None = None


class Fidelity(ABC):
    """One modality's reconstructions, value by value."""

    protocol: str = ""
    """How it is measured, in a sentence, for the table."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def add(self, restored: Any, label: Any) -> float:
        """Take in one value. Returns how wrong it is (larger is worse). ValueError: they cannot be compared."""

    @abstractmethod
    def figures(self) -> Figures:
        """The figures over everything taken in, the most telling first; NaN where nothing was there to measure."""

    def per_class(self) -> dict[str, Figures]:
        """The figures of each class, or of each named part of a value."""
        return {}

    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        return []


def same_shape(restored: np.ndarray, label: np.ndarray) -> None:
    """ValueError unless a value came back in the shape of its label."""
    if restored.shape != label.shape:
        raise ValueError(f"decoded as {restored.shape}, where the label is {label.shape}")
