"""Panoptic quality (Kirillov et al., 2019), as COCO's own evaluation counts it.

A segment of the label matches the one of the truth of the same class with which it shares more than half of their
union. What is void in the truth counts for neither; unmatched segments that lie mostly on void or on a crowd of their
class are not held against the label. Missing segments always are, also where the label is empty; torchmetrics 1.9 does
not count those, so that a label without any segment would lose nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fourmill.evaluate.dense import same_shape
from fourmill.evaluate.measure import Figures, IncomparableError, Measure, Vocabulary, mean
from fourmill.evaluate.truth import Truth, TruthSource
from fourmill.pipeline import masks
from fourmill.pipeline.shards import Spec


class PanopticMeasure(Measure):
    """Lists of segments with masks, by class name."""

    parts = frozenset({"panoptic"})
    protocol = "the mean over classes that occur; segments match above IoU 0.5"

    def __init__(self, spec: Spec, source: TruthSource, size: int) -> None:
        super().__init__(spec, source, size)
        self._names = tuple(sorted(source.things | source.stuff))
        if not source.stuff:
            raise IncomparableError(f"{source.kind} have no panoptic segments")
        self._words = Vocabulary(spec.classes, self._names)
        self._overlap = np.zeros(len(self._names))
        self._matched, self._wrong, self._missed = (np.zeros(len(self._names), np.int64) for _ in range(3))

    def add(self, label: Sequence[Mapping[str, Any]], truth: Truth) -> float | None:
        if truth.panoptic is None:
            return None
        segments, classes = self._drawn(label, truth.panoptic.shape)
        found = _Overlaps(segments, self._true_numbers(truth))
        overlap, matched, wrong, missed = self._counted(found, classes, truth)
        self._overlap += overlap
        self._matched += matched
        self._wrong += wrong
        self._missed += missed
        return 1.0 - mean(_quality(overlap, matched, wrong, missed)[0])

    def _drawn(self, label: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> tuple[np.ndarray, dict[int, int]]:
        """A map of segment numbers from 1, 0 where there is none, and the class of each; earlier ones lie on top."""
        drawn = np.zeros(shape, np.int64)
        classes: dict[int, int] = {}
        for number, segment in enumerate(label, 1):
            meant = self._words.of(str(segment["class_name"]))
            if meant is not None:
                mask = masks.decode(segment["mask"])
                same_shape(mask, drawn)
                drawn[mask & (drawn == 0)] = number
                classes[number] = meant
        return drawn, classes

    def _true_numbers(self, truth: Truth) -> np.ndarray:
        """The truth's numbers, 0 also for classes that labels do not know."""
        assert truth.panoptic is not None
        comparable = [s.number for s in truth.segments if self._words.comparable(s.class_name) is not None]
        return np.where(np.isin(truth.panoptic, comparable), truth.panoptic, 0).astype(np.int64)

    def _counted(self, found: _Overlaps, classes: Mapping[int, int], truth: Truth) -> tuple[np.ndarray, ...]:
        """Sum of IoU, matched, wrong and missed segments of one picture by class."""
        overlap = np.zeros(len(self._names))
        matched, wrong, missed = (np.zeros(len(self._names), np.int64) for _ in range(3))
        hit: set[int] = set()
        crowds: dict[int, int] = {}
        for segment in truth.segments:
            number, meant = segment.number, self._words.comparable(segment.class_name)
            if meant is None or number not in found.true_areas:
                continue
            if segment.crowd:
                crowds[meant] = number
                continue
            best = next((s for s in found.touching(number) if classes[s] == meant and found.iou(s, number) > 0.5), None)
            if best is None:
                missed[meant] += 1
            else:
                hit.add(best)
                matched[meant] += 1
                overlap[meant] += found.iou(best, number)
        for number, area in found.areas.items():
            if number not in hit:
                excused = found.both(number, 0) + found.both(number, crowds.get(classes[number], -1))
                wrong[classes[number]] += excused <= area / 2
        return overlap, matched, wrong, missed

    def figures(self) -> Figures:
        quality = _quality(self._overlap, self._matched, self._wrong, self._missed)
        things = np.array([name in self.source.things for name in self._names])
        figures = {name: mean(values) for name, values in zip(("pq", "sq", "rq"), quality, strict=True)}
        for kind, chosen in (("things", things), ("stuff", ~things)):
            figures |= {f"{name}_{kind}": mean(v[chosen]) for name, v in zip(("pq", "sq", "rq"), quality, strict=True)}
        return figures

    def per_class(self) -> dict[str, Figures]:
        rows = zip(self._names, *_quality(self._overlap, self._matched, self._wrong, self._missed), strict=True)
        return {
            name: {"pq": float(pq), "sq": float(sq), "rq": float(rq)} for name, pq, sq, rq in rows if not np.isnan(pq)
        }

    def unmatched(self) -> tuple[list[str], list[str]]:
        return self._words.unmatched()


class _Overlaps:
    """Areas of two maps of segment numbers and of what they share; 0 is void and has no area of its own."""

    def __init__(self, segments: np.ndarray, truth: np.ndarray) -> None:
        pairs, counts = np.unique(np.stack([segments.ravel(), truth.ravel()]), axis=1, return_counts=True)
        self._shared = {(int(s), int(t)): int(n) for (s, t), n in zip(pairs.T, counts, strict=True)}
        self.areas: dict[int, int] = {}
        self.true_areas: dict[int, int] = {}
        for (segment, true), count in self._shared.items():
            if segment:
                self.areas[segment] = self.areas.get(segment, 0) + count
            if true:
                self.true_areas[true] = self.true_areas.get(true, 0) + count

    def both(self, segment: int, true: int) -> int:
        return self._shared.get((segment, true), 0)

    def touching(self, true: int) -> list[int]:
        return [s for s, t in self._shared if t == true and s]

    def iou(self, segment: int, true: int) -> float:
        shared = self.both(segment, true)
        return shared / (self.areas[segment] + self.true_areas[true] - shared - self.both(segment, 0))


def _quality(
    overlap: np.ndarray, matched: np.ndarray, wrong: np.ndarray, missed: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Panoptic, segmentation and recognition quality by class, NaN where neither side has any."""
    segments = matched + (wrong + missed) / 2
    occurs = segments > 0
    return (
        np.where(occurs, overlap / np.where(occurs, segments, 1), np.nan),
        np.where(occurs, overlap / np.maximum(matched, 1), np.nan),
        np.where(occurs, matched / np.where(occurs, segments, 1), np.nan),
    )
