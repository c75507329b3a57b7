"""COCO's average precision of boxes for samples that count several times, and the F1 of boxes without a ranking.

Average precision ranks boxes by score, and a 4M's boxes have none of their own; F1 at IoU 0.5 asks only which boxes are
said (score of 0.5 or more) and is there to be compared between predictors whose scores are of different kinds.

Legend: N samples, R draws, D boxes of a class in all samples by falling score, T the ten IoUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fourmill.evaluate.measure import Measure, Vocabulary, normalised
from fourmill.evaluate.model.spread import Draws, Spread
from fourmill.evaluate.objects import IOUS, match, overlaps
from fourmill.evaluate.truth import Truth

SAID = 0.5  # score from which on a box counts as said, as in the figures of `fourmill evaluate labels`
_MOST = 100  # boxes of one class in a picture that COCO looks at
_RECALLS = np.linspace(0.0, 1.0, 101)


class BoxSpread(Spread):
    """Boxes by class with their scores and which of the ten IoUs they match at; objects by class and sample."""

    def __init__(self, measure: Measure) -> None:
        super().__init__(measure)
        names = tuple(sorted(measure.source.things))
        background = {normalised(name) for name in measure.source.stuff}
        said = measure.spec.classes
        words = None if said is None else [name for name in said if normalised(name) not in background]
        self._words = Vocabulary(words, names)
        self._boxes: list[list[tuple[float, int, np.ndarray]]] = [[] for _ in names]  # score, sample, matched (T,)
        self._objects: list[np.ndarray] = []  # by class, a sample each
        self._counts: list[tuple[int, int, int]] = []  # hits, said, objects at IoU 0.5

    def add(self, value: Sequence[Mapping[str, Any]], truth: Truth) -> None:
        found = [(self._words.of(str(o["class_name"])), o) for o in value]
        there = [(self._words.comparable(o.class_name), o) for o in truth.objects or ()]
        objects = np.zeros(len(self._boxes), np.int64)
        hits = said = 0
        for number in range(len(self._boxes)):
            mine = sorted((o for n, o in found if n == number), key=lambda o: -float(o["score"]))[:_MOST]
            theirs = [o for n, o in there if n == number]
            crowd = np.array([o.crowd for o in theirs], bool)
            ious, _, _ = overlaps(mine, theirs, self.measure.size)
            matched_DT, left_out_DT = match(ious, crowd, crowd)
            for item, flags_T, out_T in zip(mine, matched_DT, left_out_DT, strict=True):
                row_T = np.where(out_T, np.nan, flags_T.astype(np.float32))  # NaN: neither right nor wrong
                self._boxes[number].append((float(item["score"]), len(self._objects), row_T))
                counted = float(item["score"]) >= SAID and not out_T[0]
                hits, said = hits + int(counted and flags_T[0]), said + int(counted)
            objects[number] = (~crowd).sum()
        self._counts.append((hits, said, int(objects.sum())))
        self._objects.append(objects)

    def figures(self, weights_RN: np.ndarray) -> Draws:
        hits_R, said_R, there_R = (weights_RN.astype(np.float64) @ np.array(self._counts, np.float64)).T
        with np.errstate(invalid="ignore", divide="ignore"):
            f1_R = np.where(said_R + there_R > 0, 2 * hits_R / (said_R + there_R), np.nan)
        precision_RCT = np.stack([self._precisions(number, weights_RN) for number in range(len(self._boxes))], axis=1)
        return {
            "ap": _means(precision_RCT.reshape(len(weights_RN), -1)),
            "ap50": _means(precision_RCT[:, :, 0]),
            "f1_50": f1_R,
        }

    def _precisions(self, number: int, weights_RN: np.ndarray) -> np.ndarray:
        """Interpolated average precision of a class, (R, T); NaN where no object of it was drawn."""
        objects_N = np.array([row[number] for row in self._objects], np.float64)
        objects_R = weights_RN.astype(np.float64) @ objects_N
        boxes = sorted(self._boxes[number], key=lambda box: -box[0])  # stable: of equal scores the earlier sample
        samples_D = np.array([sample for _, sample, _ in boxes], np.int64)
        matched_DT = np.stack([row for _, _, row in boxes]) if boxes else np.zeros((0, len(IOUS)), np.float32)
        right_DT, wrong_DT = matched_DT == 1, matched_DT == 0
        rows = [_precision(right_DT, wrong_DT, w_N[samples_D], n) for w_N, n in zip(weights_RN, objects_R, strict=True)]
        return np.stack(rows)


def _precision(right_DT: np.ndarray, wrong_DT: np.ndarray, weight_D: np.ndarray, objects: float) -> np.ndarray:
    """COCO's 101-point precision at each IoU, where each box counts as often as its sample was drawn; (T,)."""
    if not objects:
        return np.full(right_DT.shape[1], np.nan)
    found_T = np.zeros(right_DT.shape[1])
    drawn = weight_D > 0
    weight_D1 = weight_D[drawn, None].astype(np.float64)
    if not len(weight_D1):
        return found_T
    hits_DT, misses_DT = (np.cumsum(flags[drawn] * weight_D1, axis=0) for flags in (right_DT, wrong_DT))
    recall_DT, precision_DT = hits_DT / objects, hits_DT / (hits_DT + misses_DT + np.spacing(1))
    precision_DT = np.maximum.accumulate(precision_DT[::-1], axis=0)[::-1]
    for t in range(len(found_T)):
        at = np.searchsorted(recall_DT[:, t], _RECALLS, side="left")
        found_T[t] = precision_DT[at[at < len(recall_DT)], t].sum() / len(_RECALLS)
    return found_T


def _means(values: np.ndarray) -> np.ndarray:
    """Means over the last axis of what is not NaN; NaN if there is nothing."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(known, values, 0).sum(axis=-1) / known.sum(axis=-1)
    return mean
