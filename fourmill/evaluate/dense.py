"""Depth, normals and semantic classes, pixel by pixel, in the figures of their fields.

Depth: AbsRel, RMSE, log10 and delta (Eigen et al., 2014), the mean over pictures of each picture's figure. Normals: the
angle in degrees over all pixels. Classes: intersection over union over all pixels.
Pixels without truth are left out; pixels with truth and no label are told as `coverage` (classes: as errors).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fourmill.evaluate.measure import Figures, IncomparableError, Measure, Vocabulary, mean, share
from fourmill.evaluate.truth import VOID, Truth, TruthSource
from fourmill.pipeline.shards import Spec

_BINS = 36_000  # of angle: 0.005 degrees each, so that a median of billions of pixels takes 0.3 MB
_MIN_DEPTH = 1e-3  # metres, as in every evaluation on NYUv2


def depth_errors(depth: np.ndarray, truth: np.ndarray) -> Figures:
    """Figures of positive depths (N,) in metres against positive truth (N,), as they are."""
    depth, truth = np.maximum(depth.astype(np.float64), _MIN_DEPTH), truth.astype(np.float64)
    ratio = np.maximum(depth / truth, truth / depth)
    return {
        "absrel": float(np.mean(np.abs(depth - truth) / truth)),
        "rmse": float(np.sqrt(np.mean((depth - truth) ** 2))),
        "log10": float(np.mean(np.abs(np.log10(depth / truth)))),
        **{f"delta{power}": float(np.mean(ratio < 1.25**power)) for power in (1, 2, 3)},
    }


def median_aligned(depth: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """`depth` scaled so that its median is the truth's."""
    return depth * (np.median(truth) / max(float(np.median(depth)), 1e-9))


def disparity_aligned(disparity: np.ndarray, truth: np.ndarray, max_depth: float) -> tuple[np.ndarray, bool]:
    """Metres from inverse depth (N,) of unknown scale and shift, by least squares in 1 / metres; and whether it falls
    where the truth rises.

    MiDaS' protocol (Ranftl et al., 2020): the aligned disparity is cut off at 1 / `max_depth`. Unlike there the scale
    may not be negative, or depth passed off as inverse depth would look fair; what is left then is a constant.
    """
    wanted = 1.0 / truth.astype(np.float64)
    centred = disparity.astype(np.float64) - np.mean(disparity, dtype=np.float64)
    variance = float(np.sum(centred**2))
    scale = float(np.sum(centred * (wanted - wanted.mean()))) / variance if variance > 0 else 0.0
    aligned = wanted.mean() + max(scale, 0.0) * centred
    return 1.0 / np.maximum(aligned, 1.0 / max_depth), scale < 0


class DepthMeasure(Measure):
    """Depth (S, S) by its convention: metric, relative or inverse."""

    parts = frozenset({"depth"})
    _PROTOCOLS: Mapping[str, str] = {
        "metric": "metres as they are; *_median: each picture's median aligned",
        "relative": "each picture's median aligned",
        "inverse": "each picture's scale and shift fitted in disparity (MiDaS)",
    }

    def __init__(self, spec: Spec, source: TruthSource, size: int) -> None:
        super().__init__(spec, source, size)
        protocol = self._PROTOCOLS.get(spec.convention or "")
        if protocol is None:
            known = ", ".join(self._PROTOCOLS)
            raise IncomparableError(f"depth states the convention {spec.convention!r}; one of {known} is needed")
        self.protocol = protocol
        self._sums: dict[str, float] = {}
        self._pictures = self._falling = self._labelled = self._known = 0

    def add(self, label: np.ndarray, truth: Truth) -> float | None:
        found = self._compared(label, truth)
        if found is None:
            return None
        depth, metres, known = found
        if not len(depth):
            raise ValueError("no depth: no pixel with truth has a label")
        self._known += known
        self._labelled += len(depth)
        self._pictures += 1
        figures = self._errors(depth, metres)
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        return figures["absrel"]

    def _compared(self, label: np.ndarray, truth: Truth) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Labels and truth (N,) where both are known, and how many pixels the truth knows."""
        if truth.depth is None:
            return None
        same_shape(label, truth.depth)
        known = (truth.depth > _MIN_DEPTH) & (truth.depth <= self.source.max_depth)
        if not known.any():
            return None
        both = known & (label != 0)
        return label[both], truth.depth[both], int(known.sum())

    def _errors(self, depth: np.ndarray, metres: np.ndarray) -> Figures:
        if self.spec.convention == "metric":
            aligned = depth_errors(median_aligned(depth, metres), metres)
            return depth_errors(depth, metres) | {f"{name}_median": value for name, value in aligned.items()}
        if self.spec.convention == "relative":
            return depth_errors(median_aligned(depth, metres), metres)
        fitted, falling = disparity_aligned(depth, metres, self.source.max_depth)
        self._falling += falling
        return depth_errors(fitted, metres)

    def aligned(self, label: np.ndarray, truth: Truth) -> np.ndarray | None:
        """The label (S, S) in metres as its figures are taken, 0 where nothing is compared: for pictures."""
        found = self._compared(label, truth)
        if found is None or truth.depth is None:
            return None
        depth, metres, _ = found
        if self.spec.convention == "relative":
            depth = median_aligned(depth, metres)
        if self.spec.convention == "inverse":
            depth, _ = disparity_aligned(depth, metres, self.source.max_depth)
        shown = np.zeros(label.shape, np.float32)
        shown[(truth.depth > _MIN_DEPTH) & (truth.depth <= self.source.max_depth) & (label != 0)] = depth
        return shown

    def figures(self) -> Figures:
        means = {name: share(total, self._pictures) for name, total in self._sums.items()}
        return {**means, "coverage": share(self._labelled, self._known)}

    def notes(self) -> list[str]:
        if not self._falling:
            return []
        return [f"in {self._falling} of {self._pictures} the label falls where inverse depth rises: is it depth?"]


def angles(normal: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Degrees (…) between vectors (3, …) of any length but zero."""
    lengths = np.linalg.norm(normal, axis=0) * np.linalg.norm(truth, axis=0)
    cosine = (normal * truth).sum(axis=0) / np.maximum(lengths, 1e-12)
    return np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))


class NormalMeasure(Measure):
    """Normals (3, S, S): mean, median and root mean square angle, and the shares below 11.25, 22.5 and 30 degrees."""

    parts = frozenset({"normal"})
    protocol = "angle over all pixels, degrees"

    def __init__(self, spec: Spec, source: TruthSource, size: int) -> None:
        super().__init__(spec, source, size)
        if spec.convention != "opencv":
            raise IncomparableError(f"normals state the convention {spec.convention!r}; 'opencv' is needed")
        self._histogram = np.zeros(_BINS, np.int64)
        self._sum = self._squares = 0.0
        self._below = dict.fromkeys((11.25, 22.5, 30.0), 0)
        self._labelled = self._known = 0

    def add(self, label: np.ndarray, truth: Truth) -> float | None:
        if truth.normal is None:
            return None
        same_shape(label, truth.normal)
        known = np.any(truth.normal != 0, axis=0)
        both = known & np.any(label != 0, axis=0)
        if not known.any():
            return None
        if not both.any():
            raise ValueError("no normals: no pixel with truth has a label")
        angle = angles(label[:, both].astype(np.float64), truth.normal[:, both].astype(np.float64))
        self._known += int(known.sum())
        self._labelled += len(angle)
        self._sum += float(angle.sum())
        self._squares += float((angle**2).sum())
        bins = np.minimum((angle / 180.0 * _BINS).astype(np.int64), _BINS - 1)
        self._histogram += np.bincount(bins, minlength=_BINS)
        for bound in self._below:
            self._below[bound] += int((angle < bound).sum())
        return float(angle.mean())

    def figures(self) -> Figures:
        return {
            "mean": share(self._sum, self._labelled),
            "median": self._median(),
            "rmse": float(np.sqrt(share(self._squares, self._labelled))),
            **{f"below_{bound:g}": share(count, self._labelled) for bound, count in self._below.items()},
            "coverage": share(self._labelled, self._known),
        }

    def _median(self) -> float:
        """The middle of the bin in which the half of the pixels is reached."""
        if not self._labelled:
            return float("nan")
        reached = int(np.searchsorted(np.cumsum(self._histogram), (self._labelled + 1) // 2))
        return (reached + 0.5) * 180.0 / _BINS


class SemsegMeasure(Measure):
    """Class ids (S, S) by name: mIoU over the classes that occur in the truth, and the share of correct pixels."""

    parts = frozenset({"semseg"})
    protocol = "pixels of all pictures; classes by name"

    def __init__(self, spec: Spec, source: TruthSource, size: int) -> None:
        super().__init__(spec, source, size)
        if not spec.classes:
            raise IncomparableError("semseg states no class names")
        if not source.classes:
            raise IncomparableError(f"{source.kind} have no semantic classes")
        self._words = Vocabulary(spec.classes, source.classes)
        self._counts = np.zeros((len(source.classes), len(source.classes) + 1), np.int64)  # last column: anything else
        other = len(source.classes)
        self._meaning = np.full(256, other, np.int64)
        for number, name in enumerate(spec.classes[:VOID]):
            meant = self._words.of(name)
            self._meaning[number] = other if meant is None else meant

    def add(self, label: np.ndarray, truth: Truth) -> float | None:
        if truth.semseg is None:
            return None
        same_shape(label, truth.semseg)
        keep = self._keep(truth.semseg)
        if not keep.any():
            return None
        counts = confusion(self._meaning[label[keep]], truth.semseg[keep], len(self._counts))
        self._counts += counts
        return 1.0 - mean(class_iou(counts))

    def _keep(self, truth: np.ndarray) -> np.ndarray:
        """Pixels of a class that labels can say."""
        sayable = np.zeros(256, bool)
        sayable[: len(self._words.known)] = self._words.known
        return sayable[truth]

    def translated(self, label: np.ndarray) -> np.ndarray:
        """The label's ids as those of the truth, void where the truth has no such class: for pictures."""
        meant = self._meaning[label]
        return np.where(meant == len(self._counts), VOID, meant).astype(np.uint8)

    def wrong(self, label: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """bool (S, S): wrong pixels, and those that count: for pictures."""
        return self._meaning[label] != truth, self._keep(truth)

    def figures(self) -> Figures:
        hits, total = np.trace(self._counts), self._counts.sum()
        return {"miou": mean(class_iou(self._counts)), "pixel_accuracy": share(hits, total)}

    def per_class(self) -> dict[str, Figures]:
        found = class_iou(self._counts)
        sizes = self._counts.sum(axis=1)
        rows = zip(self.source.classes, found, sizes, strict=True)
        return {name: {"iou": float(iou), "pixels": float(size)} for name, iou, size in rows if size}

    def unmatched(self) -> tuple[list[str], list[str]]:
        return self._words.unmatched()


def confusion(ids: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes + 1) counts of pixels, rows by truth; ids (N,) of `classes` are any other class."""
    pairs = truth.astype(np.int64) * (classes + 1) + ids
    return np.bincount(pairs, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def class_iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, NaN for those that do not occur in the truth."""
    hits = np.diagonal(counts).astype(float)
    sizes = counts.sum(axis=1)
    union = sizes + counts.sum(axis=0)[: len(counts)] - hits
    return np.where(sizes > 0, hits / np.maximum(union, 1), np.nan)


def same_shape(label: np.ndarray, truth: np.ndarray) -> None:
    """ValueError unless the label has the shape of the moved truth."""
    if label.shape != truth.shape:
        raise ValueError(f"bad shape: {label.shape}, where the truth has {truth.shape}")
