"""The best that can be said of every picture alike, fitted on the labels of training samples: what 4M has to beat.

No one constant is best in every figure, so there are several, and each figure of the table is held against the one that
is made for it. They are fitted on what 4M was trained on, the teachers' labels, never on truth, and never on an
evaluated sample.

    depth     AbsRel: per pixel the median weighted by 1 / depth, which minimises it; RMSE: the mean map; delta: per
              pixel the depth with most labels within a factor of 1.25; median aligned figures and the rest: the median
    normal    RMSE: the mean direction per pixel; all others: the direction of least mean distance (Weiszfeld 1937)
    semseg    accuracy: the most frequent class per pixel; mIoU: a map that climbs the expected mIoU from there
    det       boxes that hit most training objects (constant_boxes.py)
    caption   the training caption that shares most phrases, or words, with all the others
    clip      cosine: the mean of unit vectors per cell

Legend: F samples fitted on, P pixels, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourmill.evaluate.tokens.words import words
from fourmill.evaluate.truth import TruthSource
from fourmill.evaluate.words import phrases
from fourmill.pipeline.shards import Spec

FIT_BYTES = 256 << 20
"""Labels of one modality that are in memory while a constant is fitted: 2,700 maps of normals at 128 pixels."""
_STRIP = 2048  # pixels of all labels that are worked on at a time
_TEXTS, _CANDIDATES = 1024, 256  # captions compared with, and tried
_WEISZFELD_STEPS = _CLIMB_STEPS = 20
_FACTOR = 1.25  # of delta1


@dataclass(frozen=True)
class Constant:
    """Values by what they are called; `made_for`: which of them each figure is held against, '' for the others.

    `samples`: how many were fitted on.
    """

    values: dict[str, Any]
    made_for: dict[str, str]
    samples: int

    def name(self, figure: str) -> str:
        """The candidate that a figure is held against."""
        return self.made_for.get(figure, self.made_for[""])


Fit = Callable[[Sequence[Any], Spec, TruthSource], Constant]


def fit_depth(labels: Sequence[np.ndarray], spec: Spec, source: TruthSource) -> Constant:
    """Maps (S, S) from labels (S, S); 0, no depth, counts for nothing."""
    parts = [_depth_strip(np.sort(strip_FP, axis=0)) for strip_FP in _strips(labels, 1)]
    values = {name: np.concatenate([part[name] for part in parts]).reshape(labels[0].shape) for name in parts[0]}
    made_for = {"": "median", "absrel": "1/depth-weighted median", "rmse": "mean", "delta1": "most within 1.25"}
    return Constant(values, made_for, len(labels))


def _strips(labels: Sequence[np.ndarray], channels: int) -> Iterator[np.ndarray]:
    """Pixels of all labels, a strip of the map at a time: float32 (F, P) or, of several channels, (F, channels, P)."""
    flat = [label.reshape(channels, -1) for label in labels]
    for start in range(0, flat[0].shape[1], _STRIP):
        strip = np.stack([one[:, start : start + _STRIP] for one in flat]).astype(np.float32)
        yield strip[:, 0] if channels == 1 else strip


def _depth_strip(sorted_FP: np.ndarray) -> dict[str, np.ndarray]:
    """Each constant's pixels (P,) from sorted depths."""
    known_FP = (sorted_FP > 0).astype(np.float32)
    return {
        "median": _weighted_median(sorted_FP, known_FP),
        "1/depth-weighted median": _weighted_median(sorted_FP, known_FP / np.maximum(sorted_FP, 1e-3)),
        "mean": (sorted_FP * known_FP).sum(axis=0) / np.maximum(known_FP.sum(axis=0), 1),
        "most within 1.25": np.array([_densest(column) for column in sorted_FP.T], np.float32),
    }


def _weighted_median(sorted_FP: np.ndarray, weight_FP: np.ndarray) -> np.ndarray:
    """(P,): where half of the weight is reached in each column of sorted values."""
    reached_FP = np.cumsum(weight_FP, axis=0)
    at_P = (reached_FP >= reached_FP[-1] / 2).argmax(axis=0)
    found: np.ndarray = np.take_along_axis(sorted_FP, at_P[None], axis=0)[0]
    return found


def _densest(values: np.ndarray) -> float:
    """The depth that is within a factor of 1.25 of most of the sorted depths (F,)."""
    known = values[values > 0]
    if not len(known):
        return 0.0
    # Between a depth and 1.25^2 of it lie those that are within 1.25 of the point between.
    last = np.searchsorted(known, known * _FACTOR**2 * (1 - 1e-6), side="right")
    return float(known[np.argmax(last - np.arange(len(known)))] * _FACTOR * (1 - 5e-7))


def fit_normal(labels: Sequence[np.ndarray], spec: Spec, source: TruthSource) -> Constant:
    """Unit maps (3, S, S)."""
    parts = [_normal_strip(strip_F3P) for strip_F3P in _strips(labels, 3)]
    values = {
        name: np.concatenate([part[name] for part in parts], axis=1).reshape(labels[0].shape) for name in parts[0]
    }
    return Constant(values, {"": "median direction", "rmse": "mean direction"}, len(labels))


def _normal_strip(normal_F3P: np.ndarray) -> dict[str, np.ndarray]:
    """Each constant's pixels (3, P)."""
    known_FP = normal_F3P.any(axis=1)
    mean_3P = median_3P = _unit(normal_F3P.sum(axis=0))
    for _ in range(_WEISZFELD_STEPS):
        distance_FP = np.sqrt(np.maximum(2 - 2 * np.einsum("fcp,cp->fp", normal_F3P, median_3P), 1e-4))
        median_3P = _unit(np.einsum("fcp,fp->cp", normal_F3P, known_FP / distance_FP))
    return {"mean direction": mean_3P, "median direction": median_3P}


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (3, …) of length 1; without a direction: towards the camera."""
    length = np.linalg.norm(vectors, axis=0)
    ahead = np.array([0, 0, -1], np.float32).reshape(3, *[1] * (vectors.ndim - 1))
    unit: np.ndarray = np.where(length > 1e-6, vectors / np.maximum(length, 1e-6), ahead).astype(np.float32)
    return unit


def fit_semseg(labels: Sequence[np.ndarray], spec: Spec, source: TruthSource) -> Constant:
    """Class ids (S, S)."""
    classes = len(spec.classes or ())
    share_CP = np.zeros((classes, labels[0].size), np.float64)
    for label in labels:
        flat = label.ravel()
        known = np.flatnonzero(flat < classes)
        share_CP[flat[known], known] += 1 / len(labels)
    frequent_P = share_CP.argmax(axis=0)
    values = {"most frequent class": frequent_P, "best mIoU": climb_miou(share_CP, frequent_P)}
    shaped = {name: value.astype(np.uint8).reshape(labels[0].shape) for name, value in values.items()}
    return Constant(shaped, {"": "most frequent class", "miou": "best mIoU"}, len(labels))


def climb_miou(share_CP: np.ndarray, start_P: np.ndarray) -> np.ndarray:
    """The class map (P,) of the highest mIoU against classes of these shares that is met in climbing from `start_P`.

    Giving a pixel to class c adds p to its intersection I and 1 - p to its union U; by the derivative of I / U that is
    worth (p U - I (1 - p)) / U^2.
    """
    best_P, best = start_P, _miou(share_CP, start_P)[0]
    for _ in range(_CLIMB_STEPS):
        _, inter_C, union_C = _miou(share_CP, best_P)
        union_C = np.maximum(union_C, 1e-9)
        there_C = share_CP.any(axis=1)
        worth_CP = (share_CP * union_C[:, None] - inter_C[:, None] * (1 - share_CP)) / union_C[:, None] ** 2
        worth_CP[~there_C] = -np.inf
        next_P = worth_CP.argmax(axis=0)
        found = _miou(share_CP, next_P)[0]
        if found <= best:
            return best_P
        best_P, best = next_P, found
    return best_P


def _miou(share_CP: np.ndarray, map_P: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """(mean IoU over classes that occur, intersections (C,), unions (C,))."""
    said_CP = np.arange(len(share_CP))[:, None] == map_P
    inter_C = (share_CP * said_CP).sum(axis=1)
    union_C = share_CP.sum(axis=1) + said_CP.sum(axis=1) - inter_C
    there_C = share_CP.any(axis=1)
    return float((inter_C[there_C] / union_C[there_C]).mean()), inter_C, union_C


def fit_caption(labels: Sequence[str], spec: Spec, source: TruthSource) -> Constant:
    """One of the captions."""
    pieces = phrases if source.closed_captions else _word_counts
    bags = [pieces(text) for text in labels[:_TEXTS]]
    best = max(range(min(len(bags), _CANDIDATES)), key=lambda i: _shared(bags[i], bags))
    return Constant({"most typical caption": labels[best]}, {"": "most typical caption"}, len(bags))


def _word_counts(text: str) -> Counter[str]:
    return Counter(words(text))


def _shared(one: Counter[Any], others: Iterable[Counter[Any]]) -> float:
    """F1 of the pieces of one text against those of others, pooled."""
    right = there = total = 0
    for other in others:
        right, there, total = right + (one & other).total(), there + other.total(), total + 1
    return 2 * right / max(one.total() * total + there, 1)


def fit_features(labels: Sequence[np.ndarray], spec: Spec, source: TruthSource) -> Constant:
    """The mean of unit cells, (C, h, w) or (C,)."""
    total = np.zeros(labels[0].shape, np.float64)
    for label in labels:
        value = label.astype(np.float64)
        total += value / np.maximum(np.linalg.norm(value, axis=0), 1e-9)
    return Constant({"mean features": (total / len(labels)).astype(np.float32)}, {"": "mean features"}, len(labels))


def fits() -> dict[str, Fit]:
    """How the constant of a modality is fitted; those that are not here have none."""
    from fourmill.evaluate.model.constant_boxes import fit_boxes

    return {
        "depth": fit_depth,
        "normal": fit_normal,
        "semseg": fit_semseg,
        "det": fit_boxes,
        "caption": fit_caption,
        "clip": fit_features,
        "clip_global": fit_features,
    }
