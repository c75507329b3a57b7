"""The same boxes for every picture, chosen to be right most often.

Greedy: of boxes that occur in training labels, the one that hits most objects not hit yet, again and again. A box's
score is the share of training pictures in which it hits. For average precision all of them are said; for F1 those with
which F1 on the training labels is highest.

Legend: K candidate boxes, G objects of one class in all training samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fourmill.evaluate.measure import normalised
from fourmill.evaluate.model.constants import Constant
from fourmill.evaluate.model.spread_boxes import SAID
from fourmill.evaluate.truth import TruthSource
from fourmill.pipeline.shards import Spec

_CANDIDATES = 512  # boxes tried of each class
_SAMPLES = 1024  # pictures looked at
_OF_CLASS = 5  # boxes of one class: the later ones hit almost nothing
_IOU = 0.5
Box = dict[str, Any]


def fit_boxes(labels: Sequence[Sequence[Mapping[str, Any]]], spec: Spec, source: TruthSource) -> Constant:
    """A list of boxes as labels are; `score` is 0.5 and more for those that are to be said."""
    labels = [[o for o in label if float(o["score"]) >= SAID] for label in labels[:_SAMPLES]]
    names = sorted({normalised(str(o["class_name"])) for label in labels for o in label})
    found: list[tuple[int, Box]] = []
    for name in names:
        objects = [(i, o) for i, label in enumerate(labels) for o in label if normalised(str(o["class_name"])) == name]
        found += _of_class(name, objects)
    found.sort(key=lambda pair: -pair[0])
    said = _best_prefix([hits for hits, _ in found], len(labels), sum(map(len, labels)))
    ranked = [
        {**box, "score": min(hits / max(len(labels), 1), 1.0) * (1 - SAID) + SAID * (number < said)}
        for number, (hits, box) in enumerate(found)
    ]
    return Constant({"most frequent boxes": ranked}, {"": "most frequent boxes"}, len(labels))


def _of_class(name: str, objects: Sequence[tuple[int, Mapping[str, Any]]]) -> list[tuple[int, Box]]:
    """(pictures in which it newly hits, box) of at most `_OF_CLASS` boxes, the best first."""
    boxes_G4 = np.array([o["box"] for _, o in objects], np.float64)
    sample_G = np.array([i for i, _ in objects])
    step = max(len(objects) // _CANDIDATES, 1)
    hit_KG = ious(boxes_G4[::step], boxes_G4) >= _IOU
    found: list[tuple[int, Box]] = []
    open_G = np.ones(len(objects), bool)
    while len(found) < _OF_CLASS and open_G.any():
        # A box can be right for one object of a picture only.
        counts_K = [len(np.unique(sample_G[row_G & open_G])) for row_G in hit_KG]
        best = int(np.argmax(counts_K))
        if not counts_K[best]:
            break
        found.append((counts_K[best], {"box": boxes_G4[best * step].tolist(), "class_name": name}))
        fresh = np.flatnonzero(hit_KG[best] & open_G)
        open_G[fresh[np.unique(sample_G[fresh], return_index=True)[1]]] = False
    return found


def ious(first_A4: np.ndarray, second_B4: np.ndarray) -> np.ndarray:
    """(A, B) intersection over union of boxes x0, y0, x1, y1."""
    low = np.maximum(first_A4[:, None, :2], second_B4[None, :, :2])
    high = np.minimum(first_A4[:, None, 2:], second_B4[None, :, 2:])
    inter = np.clip(high - low, 0, None).prod(axis=2)
    sizes = [(b[:, 2:] - b[:, :2]).prod(axis=1) for b in (first_A4, second_B4)]
    union: np.ndarray = sizes[0][:, None] + sizes[1][None] - inter
    return np.where(union > 0, inter / np.maximum(union, 1e-12), 0.0)


def _best_prefix(hits: Sequence[int], samples: int, objects: int) -> int:
    """How many of the boxes, the most frequent first, to say for the highest F1; at least one where there is any."""
    if not hits:
        return 0
    counts = np.arange(1, len(hits) + 1)
    return int(np.argmax(2 * np.cumsum(hits) / (counts * samples + objects))) + 1
