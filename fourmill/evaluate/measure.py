"""What all measures have in common, and how class names of labels and of truth are brought together.

Invariant: a measure keeps sums, histograms and scalars, never maps: its memory does not grow with the pictures' size.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from fourmill.evaluate.truth import Truth, TruthSource
from fourmill.pipeline.shards import Spec

Figures = dict[str, float]


class IncomparableError(ValueError):
    """Labels that no truth of this source can be compared with, and why."""


class Measure(ABC):
    """One modality's labels against truth, value by value; `size` is the side of the crops in pixels.

    `IncomparableError` at construction: they cannot be compared at all.
    """

    parts: ClassVar[frozenset[str]]
    """Which parts of `Truth` it reads."""
    protocol: str = ""
    """How it is measured, in a sentence, for the table."""

    def __init__(self, spec: Spec, source: TruthSource, size: int) -> None:
        self.spec, self.source, self.size = spec, source, size

    @abstractmethod
    def add(self, label: Any, truth: Truth) -> float | None:
        """Take in one value. Returns how wrong it is (larger is worse, for finding the worst), or None if the truth
        says nothing of this. ValueError: the value cannot be used."""

    @abstractmethod
    def figures(self) -> Figures:
        """The figures over everything taken in, the most telling first; NaN where nothing was there to measure."""

    def per_class(self) -> dict[str, Figures]:
        """The figures of each class that occurred."""
        return {}

    def unmatched(self) -> tuple[list[str], list[str]]:
        """(classes of labels that the truth does not know, classes of the truth that the labels do not know)."""
        return [], []

    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        return []


def normalised(name: str) -> str:
    """'Traffic_Light ' and 'traffic-light' are one class."""
    return re.sub(r"[\s_\-]+", " ", name.strip().lower())


class Vocabulary:
    """Which class of the truth a label's class name means.

    `known`: bool by truth class, whether labels could say it: all, if labels do not state their classes.
    """

    def __init__(self, said: Sequence[str] | None, truth: Sequence[str]) -> None:
        self.truth = tuple(truth)
        self._ids = {normalised(name): number for number, name in enumerate(truth)}
        self.known = np.ones(len(truth), bool)
        self._strangers: Counter[str] = Counter(n for n in said or () if normalised(n) not in self._ids)
        if said is not None:
            heard = {normalised(name) for name in said}
            self.known = np.array([normalised(name) in heard for name in truth], bool)
        if not self.known.any():
            raise IncomparableError(
                f"no class in common: labels say {_some(said or ())}; the truth knows {_some(truth)}"
            )

    def of(self, name: str) -> int | None:
        """The truth's id of a label's class, None if the truth does not know it (which is remembered)."""
        number = self._ids.get(normalised(name))
        if number is None:
            self._strangers[name] += 1
        return number

    def comparable(self, truth_name: str) -> int | None:
        """The id of one of the truth's own classes, None if labels do not know it."""
        number = self._ids.get(normalised(truth_name))
        return number if number is not None and self.known[number] else None

    def unmatched(self) -> tuple[list[str], list[str]]:
        return sorted(self._strangers), [n for n, known in zip(self.truth, self.known, strict=True) if not known]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown}, … ({len(names)})" if len(names) > 5 else shown or "none"


def share(part: float, whole: float) -> float:
    """part / whole, NaN for nothing of nothing."""
    return float(part / whole) if whole else float("nan")


def mean(values: Sequence[float] | np.ndarray) -> float:
    """Of what is not NaN; NaN if there is nothing."""
    array = np.asarray(values, np.float64)
    array = array[~np.isnan(array)]
    return float(array.mean()) if len(array) else float("nan")
