"""The table of source modalities: how values that went through tokens are measured, drawn and written.

Adding a modality is a line here. A source without a line is written as it is and counted as not measured.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourmill.evaluate.tokens.dense import (
    ClassFidelity,
    DepthFidelity,
    EdgeFidelity,
    FeatureFidelity,
    NormalFidelity,
    fitted_to,
)
from fourmill.evaluate.tokens.measure import Fidelity
from fourmill.evaluate.tokens.objects import MaskFidelity, ObjectFidelity, PoseFidelity, SamFidelity, at_size
from fourmill.evaluate.tokens.rgb import RgbFidelity
from fourmill.evaluate.tokens.words import MetadataFidelity, PaletteFidelity, TextFidelity
from fourmill.modalities import Kind, modality
from fourmill.pipeline import masks
from fourmill.pipeline.pictures import (
    FeaturePainter,
    box_picture,
    class_picture,
    depth_picture,
    edge_picture,
    facts_picture,
    normal_picture,
    palette_picture,
    segments_picture,
)


@dataclass(frozen=True)
class Backdrop:
    """What a value is drawn on: the picture (S, S, 3) uint8, and what fixes its colours (see `reference_of`), so that a
    label and its reconstruction look alike where they are."""

    image: np.ndarray
    reference: Any = None


Draw = Callable[[Any, Backdrop], np.ndarray]


@dataclass(frozen=True)
class SourceKind:
    """`measure`: reconstructions against labels. `draw`: a value as a picture; None for what has none."""

    measure: type[Fidelity]
    draw: Draw | None = None


def _rgb(value: np.ndarray, on: Backdrop) -> np.ndarray:
    return value


def _depth(value: np.ndarray, on: Backdrop) -> np.ndarray:
    """In the reference's range; depth that is known only up to scale and shift is brought into it first."""
    reference = value if on.reference is None else np.asarray(on.reference)
    if (value <= 0).mean() > 0.01 and (reference > 0).all() and value.shape == reference.shape:
        value = fitted_to(value.ravel().astype(np.float64), reference.ravel()).reshape(value.shape)
    low, high = np.percentile(reference, [1, 99])
    return depth_picture(value, float(low), float(high))


def _normal(value: np.ndarray, on: Backdrop) -> np.ndarray:
    return normal_picture(value)


def _classes(value: np.ndarray, on: Backdrop) -> np.ndarray:
    return class_picture(value)


def _features(value: np.ndarray, on: Backdrop) -> np.ndarray:
    painter = on.reference if isinstance(on.reference, FeaturePainter) else FeaturePainter([value])
    return painter.paint(value, len(on.image))


def _boxes(value: Any, on: Backdrop) -> np.ndarray:
    return box_picture(on.image, value)


def _people(value: Any, on: Backdrop) -> np.ndarray:
    return box_picture(on.image, [{"box": person["box"], "class_name": "person"} for person in value])


def _segments(value: Any, on: Backdrop) -> np.ndarray:
    size = (on.image.shape[0], on.image.shape[1])
    return segments_picture(on.image, [{**o, "mask": masks.encode(at_size(o, size))} for o in value])


def _edges(value: np.ndarray, on: Backdrop) -> np.ndarray:
    return edge_picture(value)


def _palette(value: Any, on: Backdrop) -> np.ndarray:
    return palette_picture(value)


def _facts(value: Any, on: Backdrop) -> np.ndarray:
    return facts_picture(value)


_TEXT = SourceKind(TextFidelity)
_MAP_FEATURES = SourceKind(FeatureFidelity, _features)
_VECTOR = SourceKind(FeatureFidelity)
SOURCES: Mapping[str, SourceKind] = {
    "rgb": SourceKind(RgbFidelity, _rgb),
    "depth": SourceKind(DepthFidelity, _depth),
    "normal": SourceKind(NormalFidelity, _normal),
    "semseg": SourceKind(ClassFidelity, _classes),
    "canny_edge": SourceKind(EdgeFidelity, _edges),
    "clip": _MAP_FEATURES,
    "dinov2": _MAP_FEATURES,
    "imagebind": _MAP_FEATURES,
    "clip_global": _VECTOR,
    "dinov2_global": _VECTOR,
    "imagebind_global": _VECTOR,
    "det": SourceKind(ObjectFidelity, _boxes),
    "instance": SourceKind(MaskFidelity, _segments),
    "sam_instance": SourceKind(SamFidelity, _segments),
    "human_poses": SourceKind(PoseFidelity, _people),
    "color_palette": SourceKind(PaletteFidelity, _palette),
    "metadata": SourceKind(MetadataFidelity, _facts),
    "caption": _TEXT,
    "alt_text": _TEXT,
}


def painted(source: str, value: Any, on: Backdrop) -> np.ndarray | None:
    """A value of a modality as a picture; None if it has none."""
    kind = SOURCES.get(modality(source).name)
    return kind.draw(value, on) if kind is not None and kind.draw is not None else None


def written(value: Any) -> tuple[str, bytes]:
    """(suffix, bytes) of a value as a file that says all of it: .txt, .npy or .json."""
    if isinstance(value, str):
        return "txt", (value + "\n").encode()
    if isinstance(value, np.ndarray):
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        return "npy", file.getvalue()
    return "json", (json.dumps(value, indent=1, ensure_ascii=False, default=_plain) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON")


def reference_of(source: str, values: Sequence[Any]) -> Any:
    """What fixes the colours of several values of a modality, the first of them foremost, in `Backdrop`."""
    if not values or modality(source).kind is not Kind.FEATURES:
        return values[0] if values else None
    maps = [value for value in values if np.ndim(value) == 3]
    return FeaturePainter(maps) if maps else None
