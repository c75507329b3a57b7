"""Boxes and masks of objects: COCO's average precision and recall, taken in one picture at a time.

The matching and the interpolation are those of pycocotools (the tests compare), which holds a whole data set in memory;
here each finding leaves its score and 10 bits, match or not at each IoU from 0.50 to 0.95, for each range of areas.
Areas are in pixels of the crop: small below 32 x 32, large from 96 x 96.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fourmill.evaluate.measure import Figures, IncomparableError, Measure, Vocabulary, mean, normalised, share
from fourmill.evaluate.truth import TrueObject, Truth, TruthSource
from fourmill.pipeline import masks
from fourmill.pipeline.shards import Spec

IOUS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
_AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
_MOST = 100  # findings per picture and class that count, as COCO has it


class Precision:
    """Average precision of one class: what `add` takes in are the findings and objects of one picture."""

    def __init__(self) -> None:
        self._scores = array("d")
        self._bits = {name: (array("H"), array("H")) for name in _AREAS}  # matched, to be left out
        self.objects = dict.fromkeys(_AREAS, 0)

    def add(
        self, scores: np.ndarray, crowd: np.ndarray, ious: np.ndarray, areas: np.ndarray, true_areas: np.ndarray
    ) -> np.ndarray:
        """scores, areas (D,), ious (D, G), true_areas, crowd (G,). Returns which findings match at IoU 0.5 (D,)."""
        order = np.argsort(-scores, kind="stable")[:_MOST]
        ious, areas = ious[order], areas[order]
        self._scores.extend(scores[order].tolist())
        first = np.zeros(len(scores), bool)
        for name, (low, high) in _AREAS.items():
            ignored = crowd | (true_areas < low) | (true_areas > high)
            matched, left_out = match(ious, ignored, crowd)
            left_out |= ~matched & ((areas < low) | (areas > high))[:, None]
            for column, flags in zip(self._bits[name], (matched, left_out), strict=True):
                column.extend((flags @ (1 << np.arange(len(IOUS)))).tolist())
            self.objects[name] += int((~ignored).sum())
            if name == "all":
                first[order] = matched[:, 0]
        return first

    def curve(self, area: str) -> np.ndarray:
        """Interpolated precision (10 IoUs, 101 recalls); NaN without objects."""
        if not self.objects[area]:
            return np.full((len(IOUS), len(_RECALLS)), np.nan)
        order = np.argsort(-np.array(self._scores), kind="stable")
        matched, left_out = (_unpacked(column)[order] for column in self._bits[area])
        hits = np.cumsum(matched & ~left_out, axis=0, dtype=float)
        misses = np.cumsum(~matched & ~left_out, axis=0, dtype=float)
        recall, precision = hits / self.objects[area], hits / (hits + misses + np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        found = np.zeros((len(IOUS), len(_RECALLS)))
        for t in range(len(IOUS)):
            at = np.searchsorted(recall[:, t], _RECALLS, side="left")
            reached = at < len(recall)
            found[t, reached] = precision[at[reached], t]
        return found

    def recall(self, area: str) -> float:
        """Mean over the IoUs of the share of objects found."""
        if not self.objects[area]:
            return float("nan")
        matched, left_out = (_unpacked(column) for column in self._bits[area])
        return float((matched & ~left_out).sum(axis=0).mean() / self.objects[area])


def match(ious: np.ndarray, ignored: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Greedy matching of findings, best first, to objects, by `ious` (D, G): (matched, matched to an ignored one), both
    bool (D, 10). A finding prefers objects that count; a crowd takes any number of findings."""
    order = np.argsort(ignored, kind="stable")
    matched = np.zeros((len(ious), len(IOUS)), bool)
    left_out = matched.copy()
    for t, threshold in enumerate(IOUS):
        taken = np.zeros(len(ignored), bool)
        for d in range(len(ious)):
            best, best_iou = -1, min(threshold, 1 - 1e-10)
            for g in order:
                if taken[g] and not crowd[g]:
                    continue
                if best >= 0 and not ignored[best] and ignored[g]:
                    break
                if ious[d, g] >= best_iou:
                    best, best_iou = g, ious[d, g]
            if best >= 0:
                taken[best] = matched[d, t] = True
                left_out[d, t] = ignored[best]
    return matched, left_out


def _unpacked(column: array[int]) -> np.ndarray:
    return (np.array(column, np.uint16)[:, None] >> np.arange(len(IOUS))) & 1 == 1


class ObjectMeasure(Measure):
    """Lists of scored objects of classes, compared by boxes, or by masks (`by_masks`)."""

    parts = frozenset({"objects"})
    by_masks = False

    def __init__(self, spec: Spec, source: TruthSource, size: int) -> None:
        super().__init__(spec, source, size)
        if not source.things:
            raise IncomparableError(f"{source.kind} have no objects")
        self.protocol = f"COCO AP of {'masks' if self.by_masks else 'boxes'}, mean over classes that occur"
        self._names = tuple(sorted(source.things))
        background = {normalised(name) for name in source.stuff}
        said = None if spec.classes is None else [n for n in spec.classes if normalised(n) not in background]
        self._words = Vocabulary(said, self._names)
        self._classes = [Precision() for _ in self._names]

    def add(self, label: Sequence[Mapping[str, Any]], truth: Truth) -> float | None:
        if truth.objects is None or (self.by_masks and any(o.mask is None for o in truth.objects)):
            return None
        found = [(self._words.of(str(o["class_name"])), o) for o in label]
        there = [(self._words.comparable(o.class_name), o) for o in truth.objects]
        hits = said = objects = 0
        ready = []
        for number in {n for n, _ in found if n is not None} | {n for n, _ in there if n is not None}:
            mine = [o for n, o in found if n == number]
            theirs = [o for n, o in there if n == number]
            scores, crowd = np.array([float(o["score"]) for o in mine]), np.array([o.crowd for o in theirs], bool)
            ready.append((number, scores, crowd, overlaps(mine, theirs, None if self.by_masks else self.size)))
        for number, scores, crowd, (ious, *areas) in ready:  # only once all of it is known to be usable
            hit, sure = self._classes[number].add(scores, crowd, ious, *areas), scores >= 0.5
            hits, said, objects = hits + int((hit & sure).sum()), said + int(sure.sum()), objects + int((~crowd).sum())
        return 1.0 - (2 * hits / (said + objects) if said + objects else 1.0)

    def figures(self) -> Figures:
        curves = {area: np.stack([c.curve(area) for c in self._classes]) for area in _AREAS}
        return {
            "ap": mean(curves["all"].ravel()),
            "ap50": mean(curves["all"][:, 0].ravel()),
            "ap75": mean(curves["all"][:, 5].ravel()),
            **{f"ap_{area}": mean(curves[area].ravel()) for area in _AREAS if area != "all"},
            f"ar{_MOST}": mean([c.recall("all") for c in self._classes]),
        }

    def per_class(self) -> dict[str, Figures]:
        found = {}
        for name, precision in zip(self._names, self._classes, strict=True):
            if precision.objects["all"]:
                curve = precision.curve("all")
                objects = float(precision.objects["all"])
                found[name] = {"ap": mean(curve.ravel()), "ap50": mean(curve[0]), "objects": objects}
        return found

    def unmatched(self) -> tuple[list[str], list[str]]:
        return self._words.unmatched()


class DetMeasure(ObjectMeasure):
    """`det`: boxes."""


class InstanceMeasure(ObjectMeasure):
    """`instance`: masks."""

    by_masks = True


class SamMeasure(Measure):
    """`sam_instance`: masks without classes. The IoU of the best mask of each object, and the recall of the first k."""

    parts = frozenset({"objects"})
    protocol = "every object's best mask; AR@k: recall of the k best-scored masks, mean over IoU 0.50 to 0.95"
    _MOST = (10, 100, 1000)

    def __init__(self, spec: Spec, source: TruthSource, size: int) -> None:
        super().__init__(spec, source, size)
        if not source.things:
            raise IncomparableError(f"{source.kind} have no objects")
        self._best = self._covered = 0.0
        self._objects = self._masks = self._pictures = 0
        self._recalled = dict.fromkeys(self._MOST, 0.0)

    def add(self, label: Sequence[Mapping[str, Any]], truth: Truth) -> float | None:
        objects = [o for o in truth.objects or () if not o.crowd]
        if truth.objects is None or any(o.mask is None for o in objects) or not objects:
            return None
        ordered = sorted(label, key=lambda o: -float(o["score"]))
        ious, _, _ = overlaps(ordered, objects)
        best = ious.max(axis=0) if len(ious) else np.zeros(len(objects))
        nothing = np.zeros(len(objects), bool)
        matched, _ = match(ious[: max(self._MOST)], nothing, nothing)
        for most in self._MOST:
            self._recalled[most] += float(matched[:most].sum(axis=0).mean())
        self._best += float(best.sum())
        self._covered += float((best > 0.5).sum())
        self._objects += len(objects)
        self._masks += len(label)
        self._pictures += 1
        return 1.0 - float(best.mean())

    def figures(self) -> Figures:
        return {
            "best_iou": share(self._best, self._objects),
            "covered": share(self._covered, self._objects),
            **{f"ar{most}": share(total, self._objects) for most, total in self._recalled.items()},
            "masks_per_picture": share(self._masks, self._pictures),
        }


def overlaps(
    found: Sequence[Mapping[str, Any]], truth: Sequence[TrueObject], box_scale: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IoU (D, G) of findings with true objects (with crowds: the share of the finding inside), areas (D,) and (G,).

    By masks, or, with `box_scale` pixels a side, by boxes.
    """
    from pycocotools import mask as coco

    crowd = [int(o.crowd) for o in truth]
    mine: Any
    theirs: Any
    if box_scale is None:
        # What `decode` has read whole may go to pycocotools' C code, which trusts its counts.
        mine = [masks.encode(masks.decode(o["mask"])) for o in found]
        theirs = [masks.encode(o.mask) for o in truth if o.mask is not None]
        areas, true_areas = (np.asarray(coco.area(m), np.float64).reshape(-1) for m in (mine, theirs))
        sizes = {tuple(m["size"]) for m in [*mine, *theirs]}
        if len(sizes) > 1:
            raise ValueError(f"bad shape: masks of {sorted(sizes)}")
    else:
        mine, theirs = (_extents(b, box_scale) for b in ([o["box"] for o in found], [o.box for o in truth]))
        areas, true_areas = mine[:, 2] * mine[:, 3], theirs[:, 2] * theirs[:, 3]
    if not len(mine) or not len(theirs):
        return np.zeros((len(mine), len(theirs))), areas, true_areas
    return np.asarray(coco.iou(mine, theirs, crowd)).reshape(len(mine), len(theirs)), areas, true_areas


def _extents(boxes: Sequence[Sequence[float]], scale: int) -> np.ndarray:
    """x, y, width, height (N, 4) in pixels. ValueError for boxes that are not x0 < x1, y0 < y1 numbers."""
    found = np.array([[float(v) for v in box] for box in boxes], np.float64).reshape(-1, 4)
    if not np.isfinite(found).all() or (found[:, 2:] < found[:, :2]).any():
        raise ValueError("bad box: x0, y0, x1, y1 with x0 <= x1 and y0 <= y1 are needed")
    found[:, 2:] -= found[:, :2]
    return found * scale
