"""What every label must look like, checked where labels leave a component: a label that breaks its convention is
quarantined with a reason, never stored.

A mislabelled convention is the commonest bug of pseudo-labels: nothing crashes, and a model learns a flipped axis. The
conventions themselves are stated in the catalogue and in docs/labels.md.

    depth          (S, S), not negative; 0 marks a pixel without depth
    normal         (3, S, S), unit length, towards the camera; (0, 0, 0) marks a pixel without normal
    semseg         (S, S) ids below the number of classes, or 255 for void
    panoptic, instance, sam_instance    objects whose box is the extent of their mask, whose area is its pixels
    det            boxes x0 < x1, y0 < y1 in 0..1
    human_poses    boxes as det; rotations are rotation matrices, row by row
    canny_edge     (S, S), 255 on an edge and 0 elsewhere, so mostly dark
    color_palette  for each n of 1 to 7, or fewer, n colours of three whole numbers 0..255
    metadata       4M's names; counts are whole, shares 0..1
    features       finite
    text           not blank

Maps and features that are the same number everywhere are outputs of a network that has died, not labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fourmill.modalities import Kind, Modality
from fourmill.pipeline import masks
from fourmill.pipeline.shards import Spec
from fourmill.tokenizers.sequences.metadata import NAMES as FACTS

VOID = 255
_UNIT = 0.01  # how far from 1 the length of a normal may be
_ROUNDING = 2e-6  # boxes are stored with six digits
_PALETTES = 7
_BODY = {"orientation": 9, "pose": 207, "camera": 3, "shape": 10}  # numbers of SMPL: 1 and 23 rotations, camera, betas
_ROTATIONS = ("orientation", "pose")
_SHARES = ("walkability", "objectness", "geometric_complexity", "occlusion_score", "watermark_score")
_COUNTS = ("n_", "original_", "caption_n_", "coco_instance_diversity", "semantic_diversity")  # beginnings of names


class ConventionError(ValueError):
    """A value that is not what its modality promises; the message begins with a short kind and a colon."""


def check(entry: Modality, spec: Spec, value: Any) -> None:
    """ConventionError if `value` is not what its modality promises."""
    found = _CHECKS.get(entry.name) or _KINDS.get(entry.kind)
    if found is not None:
        found(value, spec)


def valid_mask(entry: Modality, value: np.ndarray) -> np.ndarray:
    """bool (S, S): the pixels of a depth, normal or class map that hold a label."""
    if entry.name == "normal":
        return np.asarray((value != 0).any(axis=0))
    if entry.kind is Kind.CLASSES:
        return np.asarray(value != VOID)
    if entry.name == "depth":
        return np.asarray(value > 0)
    raise ValueError(f"{entry.name} has no valid mask; depth, normal and class maps do")


def _map(value: Any, spec: Spec) -> np.ndarray:
    array = np.asarray(value)
    if not np.isfinite(array).all():
        share = 1 - np.isfinite(array).mean()
        raise ConventionError(f"not finite: {share:.1%} of the values are NaN or infinite")
    if array.size > 1 and array.min() == array.max():
        raise ConventionError(f"constant output: every value is {array.flat[0]:g}")
    return array


def _depth(value: Any, spec: Spec) -> None:
    array = _map(value, spec)
    if array.ndim != 2:
        raise ConventionError(f"wrong shape: depth must be (S, S), not {array.shape}")
    if spec.convention in ("metric", "relative") and array.min() < 0:
        raise ConventionError(f"negative depth: down to {array.min():g}, in a map that is called {spec.convention}")


def _normal(value: Any, spec: Spec) -> None:
    array = _map(value, spec)
    if array.ndim != 3 or len(array) != 3:
        raise ConventionError(f"wrong shape: normals must be (3, S, S), not {array.shape}")
    lengths = np.linalg.norm(array, axis=0)
    known = lengths > 0
    if not known.any():
        raise ConventionError("constant output: no pixel has a normal")
    if np.abs(lengths[known] - 1).max() > _UNIT:
        raise ConventionError(
            f"not unit: normals have lengths {lengths[known].min():.3f} to {lengths[known].max():.3f}"
        )
    # A surface that is seen faces the eye. Rays at the picture's edge lean, so a few normals may have z > 0; in a map
    # of the wrong sign nearly all have.
    away = float((array[2][known] > 0).mean())
    if away > 0.5:
        raise ConventionError(f"wrong frame: {away:.0%} of the normals point away from the camera (z < 0 faces it)")


def _classes(value: Any, spec: Spec) -> None:
    array = np.asarray(value)
    if array.ndim != 2:
        raise ConventionError(f"wrong shape: a class map must be (S, S), not {array.shape}")
    limit = len(spec.classes) if spec.classes else VOID + 1
    wrong = array[(array != VOID) & ((array < 0) | (array >= limit))]
    if wrong.size:
        raise ConventionError(
            f"unknown class: id {int(wrong.flat[0])}, the classes are 0..{limit - 1} and {VOID} for void"
        )


def _objects(value: Any, spec: Spec) -> None:
    for item in _sorted(value):
        mask = masks.decode(item["mask"])
        if int(mask.sum()) != item["area"]:
            raise ConventionError(f"wrong area: {item['area']} for a mask of {int(mask.sum())} pixels")
        expected = masks.box_of(mask)
        if np.abs(np.subtract(item["box"], expected)).max() > _ROUNDING:
            raise ConventionError(f"wrong box: {item['box']} for a mask that reaches over {expected}")


def _panoptic(value: Any, spec: Spec) -> None:
    _objects([{**item, "score": 0.0} for item in value], spec)  # segments come by size
    _descending([item["area"] for item in value], "area")
    covered = sum((masks.decode(item["mask"]).astype(np.int32) for item in value), np.int32(0))
    if value and np.max(covered) > 1:
        raise ConventionError(f"overlap: a pixel belongs to {int(np.max(covered))} panoptic segments")


def _boxes(value: Any, spec: Spec) -> None:
    for item in _sorted(value):
        _box(item["box"])


def _box(box: Sequence[float]) -> None:
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ConventionError(f"bad box: {box} is not x0 < x1, y0 < y1 in 0..1")


def _people(value: Any, spec: Spec) -> None:
    if not isinstance(value, (list, tuple)):
        raise ConventionError(f"wrong type: people are a list, not {type(value).__name__}")
    for person in value:
        _box(person["box"])
        for name, count in _BODY.items():
            numbers = np.asarray(person[name], dtype=np.float64)
            if numbers.shape != (count,):
                raise ConventionError(f"wrong shape: {name} must be ({count},), not {numbers.shape}")
            if not np.isfinite(numbers).all():
                raise ConventionError(f"not finite: {name} holds NaN or infinite values")
            if name in _ROTATIONS:
                _rotations(name, numbers.reshape(-1, 3, 3))


def _rotations(name: str, matrices_N33: np.ndarray) -> None:
    error = np.abs(matrices_N33 @ matrices_N33.transpose(0, 2, 1) - np.eye(3)).max()
    if error > _UNIT:
        raise ConventionError(f"not a rotation: {name} has a matrix that is {error:.2f} off from orthonormal")
    if np.linalg.det(matrices_N33).min() < 0:
        raise ConventionError(f"not a rotation: {name} has a matrix that mirrors")


def _edges(value: Any, spec: Spec) -> None:
    array = np.asarray(value)
    if array.ndim != 2:
        raise ConventionError(f"wrong shape: edges must be (S, S), not {array.shape}")
    if array.max(initial=0) == 1:
        raise ConventionError("wrong range: edges are 255 and the rest 0, not 1 and 0")
    # Lines of one pixel with a gap beside them cover less than half of any picture, 3 to 20 % of most.
    if array.size and array.mean() > VOID / 2:
        raise ConventionError(f"inverted edges: {(array > VOID / 2).mean():.0%} of the pixels are edges")


def _palette(value: Any, spec: Spec) -> None:
    lengths = [str(n + 1) for n in range(len(value))] if isinstance(value, dict) else []
    if not 1 <= len(lengths) <= _PALETTES or set(value) != set(lengths):
        found = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ConventionError(f"wrong palettes: {found}; they are named 1, 2, … up to {_PALETTES}")
    for name, colours in value.items():
        if len(colours) != int(name):
            raise ConventionError(f"wrong palettes: {name} holds {len(colours)} colours")
        for colour in colours:
            if len(colour) != 3 or not all(type(v) is int and 0 <= v <= 255 for v in colour):
                raise ConventionError(f"bad colour: {colour} is not three whole numbers 0..255")


def _facts(value: Any, spec: Spec) -> None:
    if not isinstance(value, dict) or not value:
        raise ConventionError(f"wrong type: metadata are a table of names and numbers, not {value!r}")
    for name, number in value.items():
        if name not in FACTS:
            raise ConventionError(f"unknown fact: {name!r} is none of 4M's metadata")
        if type(number) not in (int, float) or not np.isfinite(number):
            raise ConventionError(f"not a number: {name} is {number!r}")
        if name.startswith(_COUNTS) and (type(number) is not int or number < 0):
            raise ConventionError(f"not a count: {name} is {number!r}")
        if name in _SHARES and not 0 <= number <= 1:
            raise ConventionError(f"not a share: {name} is {number:g}, outside of 0..1")


def _sorted(value: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, (list, tuple)):
        raise ConventionError(f"wrong type: objects are a list, not {type(value).__name__}")
    scores = [float(item["score"]) for item in value]
    if not np.isfinite(scores).all():
        raise ConventionError("not finite: a score is NaN or infinite")
    _descending(scores, "score")
    return value


def _descending(values: Sequence[float], what: str) -> None:
    if any(later > earlier for earlier, later in pairwise(values)):
        raise ConventionError(f"wrong order: objects must come by falling {what}")


def _text(value: Any, spec: Spec) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ConventionError(f"blank text: {value!r}")


def _features(value: Any, spec: Spec) -> None:
    _map(value, spec)


_CHECKS: dict[str, Callable[[Any, Spec], None]] = {
    "depth": _depth,
    "normal": _normal,
    "panoptic": _panoptic,
    "instance": _objects,
    "sam_instance": _objects,
    "det": _boxes,
    "human_poses": _people,
    "color_palette": _palette,
    "metadata": _facts,
}
_KINDS: dict[Kind, Callable[[Any, Spec], None]] = {
    Kind.CLASSES: _classes,
    Kind.EDGES: _edges,
    Kind.FEATURES: _features,
    Kind.TEXT: _text,
}
