"""Reconstructed maps against their labels: depth, normals, classes, features, edges.

Depth: AbsRel and delta1 over the pixels that have a label, as they are and after each map's scale and shift are fitted,
since a tokenizer of relative depth keeps neither. Features: cosine, since tokenizers drop the length of vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from fourmill.evaluate.dense import NormalMeasure, SemsegMeasure, depth_errors
from fourmill.evaluate.measure import Figures, share
from fourmill.evaluate.tokens.measure import Fidelity, Setting, same_shape
from fourmill.evaluate.truth import VOID, Truth, TruthSource
from fourmill.pipeline.shards import Spec

_BINS = 4000  # of cosine: 0.0005 each
_EDGE = 128  # of 0..255: an edge from here on


class Labels(TruthSource):
    """Labels in the place of truth."""

    kind = "labels"

    def __init__(self, classes: tuple[str, ...] = ()) -> None:
        super().__init__("labels")
        self.classes = classes

    def find(self, key: str, source: Mapping[str, Any], parts: Set[str]) -> Truth | None:
        raise TypeError("labels are given to a measure, not looked up")


class DepthFidelity(Fidelity):
    """float (S, S): the mean over maps of each map's figure."""

    protocol = "per map, in the label's unit; *_fitted: scale and shift fitted by least squares"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._sums: dict[str, float] = {}
        self._maps = self._negative = 0

    def add(self, restored: np.ndarray, label: np.ndarray) -> float:
        same_shape(restored, label)
        known = label > 0
        if not known.any():
            raise ValueError("no depth: the label is 0 everywhere")
        here, there = restored[known].astype(np.float64), label[known].astype(np.float64)
        plain, fitted = depth_errors(here, there), depth_errors(fitted_to(here, there), there)
        self._negative += bool((here <= 0).mean() > 0.01)  # standardised depth: a half of each map
        self._maps += 1
        values = {n: plain[n] for n in ("absrel", "delta1")}
        values |= {f"{n}_fitted": fitted[n] for n in ("absrel", "delta1")}
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        return fitted["absrel"]

    def figures(self) -> Figures:
        return {name: share(total, self._maps) for name, total in self._sums.items()}

    def notes(self) -> list[str]:
        if not self._negative:
            return []
        return [
            f"{self._negative} of {self._maps} decoded maps hold depths of 0 or less: where the tokenizer knows depth "
            "only up to scale and shift, read the fitted figures"
        ]


def fitted_to(depth: np.ndarray, label: np.ndarray) -> np.ndarray:
    """`depth` (N,) with the scale (not negative) and shift that bring it nearest to `label` (N,), by least squares."""
    centred = depth - depth.mean()
    variance = float((centred**2).sum())
    scale = float((centred * (label - label.mean())).sum()) / variance if variance > 0 else 0.0
    return max(scale, 0.0) * centred + label.mean()


class NormalFidelity(Fidelity):
    """float (3, S, S): the angle over all pixels that have a label."""

    protocol = "angle over all pixels, degrees"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._measure = NormalMeasure(Spec(convention="opencv"), Labels(), 0)

    def add(self, restored: np.ndarray, label: np.ndarray) -> float:
        same_shape(restored, label)
        badness = self._measure.add(restored, Truth(normal=label))
        if badness is None:
            raise ValueError("no normals: the label is zero everywhere")
        return badness

    def figures(self) -> Figures:
        found = self._measure.figures()
        return {name: found[name] for name in ("mean", "median", "below_11.25", "below_30")}


class ClassFidelity(Fidelity):
    """uint8 (S, S): pixels of all maps; void in the label counts for nothing."""

    protocol = "pixels of all maps"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        names = setting.spec.classes or tuple(str(number) for number in range(VOID))
        self._measure = SemsegMeasure(Spec(classes=names), Labels(names), 0)

    def add(self, restored: np.ndarray, label: np.ndarray) -> float:
        same_shape(restored, label)
        badness = self._measure.add(restored, Truth(semseg=label))
        if badness is None:
            raise ValueError("no classes: the label is void everywhere")
        return badness

    def figures(self) -> Figures:
        return self._measure.figures()

    def per_class(self) -> dict[str, Figures]:
        return self._measure.per_class()


class FeatureFidelity(Fidelity):
    """float (C, h, w) or (C,): cosine of cells."""

    protocol = "cosine over all cells; p5: of the worst twentieth of them"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._histogram = np.zeros(_BINS, np.int64)
        self._sum = 0.0

    def add(self, restored: np.ndarray, label: np.ndarray) -> float:
        same_shape(restored, label)
        lengths = np.linalg.norm(restored, axis=0) * np.linalg.norm(label, axis=0)
        cosines = np.atleast_1d((restored * label).sum(axis=0, dtype=np.float64) / np.maximum(lengths, 1e-9)).ravel()
        bins = np.clip(((cosines + 1) / 2 * _BINS).astype(np.int64), 0, _BINS - 1)
        self._histogram += np.bincount(bins, minlength=_BINS)
        self._sum += float(cosines.sum())
        return 1.0 - float(cosines.mean())

    def figures(self) -> Figures:
        cells = int(self._histogram.sum())
        if not cells:
            return {"cosine": float("nan"), "cosine_p5": float("nan")}
        worst = int(np.searchsorted(np.cumsum(self._histogram), cells / 20))
        return {"cosine": self._sum / cells, "cosine_p5": (worst + 0.5) / _BINS * 2 - 1}


class EdgeFidelity(Fidelity):
    """uint8 (S, S), 0 or 255: pixels of all maps that are edges in both."""

    protocol = "edges: values from 128 on, pixels of all maps; F1 at 1 px: an edge beside the right pixel is right"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._both = self._here = self._there = 0
        self._near_here = self._near_there = 0

    def add(self, restored: np.ndarray, label: np.ndarray) -> float:
        same_shape(restored, label)
        here, there = restored >= _EDGE, label >= _EDGE
        both = int((here & there).sum())
        self._both += both
        self._here += int(here.sum())
        self._there += int(there.sum())
        self._near_here += int((here & _grown(there)).sum())
        self._near_there += int((there & _grown(here)).sum())
        edges = int(here.sum() + there.sum())
        return 1.0 - 2 * both / edges if edges else 0.0

    def figures(self) -> Figures:
        precision, recall = share(self._near_here, self._here), share(self._near_there, self._there)
        return {
            "f1": share(2 * self._both, self._here + self._there),
            "iou": share(self._both, self._here + self._there - self._both),
            "f1_at_1px": share(2 * precision * recall, precision + recall),
        }


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its eight neighbours."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
