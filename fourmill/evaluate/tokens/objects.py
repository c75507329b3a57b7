"""Reconstructed objects against their labels: boxes, polygons, masks, people.

Each object of the label is paired with at most one reconstructed object, the most overlapping pairs first, from IoU 0.5
on and whatever their classes; the figures say how many were found, how well they fit and whether the class was kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fourmill.evaluate.measure import Figures, normalised, share
from fourmill.evaluate.tokens.measure import Fidelity, Setting
from fourmill.pipeline import masks

_MATCH = 0.5
Objects = Sequence[Mapping[str, Any]]


class ObjectFidelity(Fidelity):
    """Lists of objects with boxes; `by_masks`: with masks."""

    by_masks = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._least = float(getattr(setting.tokenizer.config, "min_score", 0.0))
        shapes = "masks" if self.by_masks else "boxes"
        least = f" of score {self._least:g} or more, which alone are tokenized" if self._least else ""
        self.protocol = f"{shapes} paired from IoU {_MATCH} on, whatever their class; recall of labels{least}"
        self._objects = self._restored = self._matched = self._named = 0
        self._iou = 0.0
        self._classes: dict[str, list[int]] = {}

    def add(self, restored: Objects, label: Objects) -> float:
        there = [o for o in label if float(o.get("score", 1.0)) >= self._least]
        ious = self._ious(restored, there)
        pairs = paired(ious)
        for mine, theirs in pairs:
            same = _class(restored[mine]) == _class(there[theirs])
            self._named += same
            self._iou += float(ious[mine, theirs])
        found = {theirs for _, theirs in pairs}
        for number, item in enumerate(there):
            counts = self._classes.setdefault(str(item.get("class_name", "")), [0, 0])
            counts[0] += 1
            counts[1] += number in found
        self._objects += len(there)
        self._restored += len(restored)
        self._matched += len(pairs)
        return _badness(ious, pairs)

    def _ious(self, restored: Objects, label: Objects) -> np.ndarray:
        if self.by_masks:
            size = mask_size([*label, *restored])
            return mask_ious([at_size(o, size) for o in restored], [at_size(o, size) for o in label])
        return box_ious([o["box"] for o in restored], [o["box"] for o in label])

    def figures(self) -> Figures:
        return {
            "recall": share(self._matched, self._objects),
            "matched_iou": share(self._iou, self._matched),
            "class_agreement": share(self._named, self._matched),
            "precision": share(self._matched, self._restored),
        }

    def per_class(self) -> dict[str, Figures]:
        if set(self._classes) <= {""}:
            return {}
        return {
            name: {"recall": share(found, number), "objects": float(number)}
            for name, (number, found) in sorted(self._classes.items())
        }


class MaskFidelity(ObjectFidelity):
    """Objects with masks and classes."""

    by_masks = True


class SamFidelity(Fidelity):
    """Masks without classes. A tokenizer keeps those under a few points, so labels are not asked to be complete."""

    protocol = "each decoded mask with the label's most overlapping one"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._iou = 0.0
        self._masks = self._kept = self._labels = 0

    def add(self, restored: Objects, label: Objects) -> float:
        size = mask_size([*label, *restored])
        ious = mask_ious([at_size(o, size) for o in restored], [at_size(o, size) for o in label])
        best = ious.max(axis=1) if ious.size else np.zeros(len(restored))
        self._iou += float(best.sum())
        self._masks += len(restored)
        self._kept += int((ious >= _MATCH).any(axis=0).sum()) if ious.size else 0
        self._labels += len(label)
        return 1.0 - float(best.mean()) if len(best) else 0.0

    def figures(self) -> Figures:
        return {"mask_iou": share(self._iou, self._masks), "labels_kept": share(self._kept, self._labels)}


class PoseFidelity(Fidelity):
    """People: boxes paired as objects are; of the pairs, angles between joints' rotations, camera and shape."""

    protocol = f"people paired by boxes from IoU {_MATCH} on; angle between the joints' rotations, degrees"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._people = self._matched = self._joints = 0
        self._iou = self._angle = self._camera = self._shape = 0.0

    def add(self, restored: Objects, label: Objects) -> float:
        ious = box_ious([o["box"] for o in restored], [o["box"] for o in label])
        pairs = paired(ious)
        for mine, theirs in pairs:
            here, there = restored[mine], label[theirs]
            turned = rotation_angles([*here["orientation"], *here["pose"]], [*there["orientation"], *there["pose"]])
            self._iou += float(ious[mine, theirs])
            self._joints += len(turned)
            self._angle += float(turned.sum())
            self._camera += float(np.abs(np.subtract(here["camera"], there["camera"])).mean())
            self._shape += float(np.abs(np.subtract(here["shape"], there["shape"])).mean())
        self._people += len(label)
        self._matched += len(pairs)
        return _badness(ious, pairs)

    def figures(self) -> Figures:
        return {
            "recall": share(self._matched, self._people),
            "joint_angle": share(self._angle, self._joints),
            "matched_iou": share(self._iou, self._matched),
            "camera_error": share(self._camera, self._matched),
            "shape_error": share(self._shape, self._matched),
        }


def rotation_angles(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    """Degrees (N,) between rotations, each nine numbers row by row; those that are not quite rotations are made so."""
    a, b = (_rotations(np.asarray(values, np.float64).reshape(-1, 3, 3)) for values in (first, second))
    trace = np.einsum("nij,nij->n", a, b)
    return np.degrees(np.arccos(np.clip((trace - 1) / 2, -1.0, 1.0)))


def _rotations(matrices: np.ndarray) -> np.ndarray:
    """The nearest rotations, by singular values."""
    u, _, v = np.linalg.svd(matrices)
    u[:, :, 2] *= np.linalg.det(u @ v)[:, None]
    return np.asarray(u @ v)


def paired(ious: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (row, column) of at least IoU 0.5, the best first, each row and column at most once."""
    found: list[tuple[int, int]] = []
    left = ious.copy()
    while left.size and left.max() >= _MATCH:
        row, column = np.unravel_index(int(left.argmax()), left.shape)
        found.append((int(row), int(column)))
        left[row], left[:, column] = -1.0, -1.0
    return found


def _badness(ious: np.ndarray, pairs: Sequence[tuple[int, int]]) -> float:
    """One less the share of objects that are paired, each pair counting by its overlap; 0 where there are none."""
    objects = sum(ious.shape)
    return 1.0 - 2 * sum(float(ious[pair]) for pair in pairs) / objects if objects else 0.0


def box_ious(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> np.ndarray:
    """IoU (D, G) of boxes x0, y0, x1, y1; two equal boxes without area overlap wholly."""
    a, b = (np.array(boxes, np.float64).reshape(-1, 4) for boxes in (first, second))
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = np.maximum(high - low, 0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - inside
    equal = (a[:, None] == b[None]).all(axis=2)
    return np.where(union > 0, inside / np.where(union > 0, union, 1), equal.astype(float))


def mask_ious(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
    """IoU (D, G) of bool masks of one size."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    a, b = (np.stack([mask.ravel() for mask in found]).astype(np.float32) for found in (first, second))
    inside = a @ b.T
    union = a.sum(axis=1)[:, None] + b.sum(axis=1)[None] - inside
    return np.asarray(np.where(union > 0, inside / np.maximum(union, 1), 0.0), np.float64)


def at_size(item: Mapping[str, Any], size: tuple[int, int] | None) -> np.ndarray:
    """An object's mask (H, W), each pixel that of the mask at its centre; decoded masks have a size of their own."""
    mask = masks.decode(item["mask"])
    if size is None or mask.shape == size:
        return mask
    sides = zip(size, mask.shape, strict=True)
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in sides)
    return mask[rows[:, None], columns[None]]


def mask_size(objects: Objects) -> tuple[int, int] | None:
    """(H, W) of the first object's mask."""
    size = next((o["mask"]["size"] for o in objects), None)
    return None if size is None else (int(size[0]), int(size[1]))


def _class(item: Mapping[str, Any]) -> str:
    return normalised(str(item.get("class_name", "")))
