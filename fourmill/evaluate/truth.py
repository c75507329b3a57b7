"""What is known to be right about a picture, and how it is moved into a crop exactly as the picture was.

Invariant (one geometry): a pixel of moved truth is the truth at the centre of that pixel of the crop, never a blend;
boxes and masks are clipped to the crop; under a flip the x of normals changes its sign.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fourmill.pipeline.corpus import locate, suffix_of
from fourmill.pipeline.geometry import Crop

VOID = 255
PARTS = ("depth", "normal", "semseg", "panoptic", "objects", "captions")


@dataclass(frozen=True)
class TrueObject:
    """One thing. `box`: x0, y0, x1, y1 in 0..1; `mask`: bool (H, W) where it is known; `crowd`: a group, as in COCO:
    what is found inside is neither right nor wrong."""

    class_name: str
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None
    crowd: bool = False


@dataclass(frozen=True)
class TrueSegment:
    """One segment of a panoptic map: its number there, its class, and whether it is a group of things."""

    number: int
    class_name: str
    crowd: bool = False


@dataclass(frozen=True)
class Truth:
    """What is known of one picture, or, once moved, of one crop. None: nothing is known of that.

    depth (H, W) float32 metres along the optical axis, 0 unknown. normal (3, H, W) float32, OpenCV camera frame, zeros
    unknown. semseg (H, W) uint8: index into the source's `classes`, 255 void. panoptic (H, W) int32: segment numbers, 0
    void. The maps may be of other sizes than the picture, as long as they show the same.
    """

    depth: np.ndarray | None = None
    normal: np.ndarray | None = None
    semseg: np.ndarray | None = None
    panoptic: np.ndarray | None = None
    segments: tuple[TrueSegment, ...] = ()
    objects: tuple[TrueObject, ...] | None = None
    captions: tuple[str, ...] = ()

    def moved(self, crop: Crop, height: int, width: int, size: int) -> Truth:
        """As seen in a crop of a picture of (height, width), at `size` x `size`."""

        def move(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else moved_map(array, crop, height, width, size)

        normal = move(self.normal)
        if normal is not None and crop.flip:
            normal = normal * np.array([-1, 1, 1], np.float32)[:, None, None]
        objects = None
        if self.objects is not None:
            objects = tuple(o for o in (_moved_object(o, crop, height, width, size) for o in self.objects) if o)
        depth, semseg, panoptic = move(self.depth), move(self.semseg), move(self.panoptic)
        return replace(self, depth=depth, normal=normal, semseg=semseg, panoptic=panoptic, objects=objects)


def moved_map(array: np.ndarray, crop: Crop, height: int, width: int, size: int) -> np.ndarray:
    """Nearest-neighbour crop of (…, H, W), a map over a picture of (height, width), to (…, size, size)."""
    rows = (crop.top + (np.arange(size) + 0.5) * crop.height / size) * array.shape[-2] / height
    columns = (crop.left + (np.arange(size) + 0.5) * crop.width / size) * array.shape[-1] / width
    columns = columns[::-1] if crop.flip else columns
    return array[..., rows.astype(int)[:, None], columns.astype(int)[None, :]]


def _moved_object(thing: TrueObject, crop: Crop, height: int, width: int, size: int) -> TrueObject | None:
    """What is left of an object in the crop; None if nothing."""
    boxes, inside = crop.boxes(np.array([thing.box], np.float64), height, width)
    mask = None if thing.mask is None else moved_map(thing.mask, crop, height, width, size)
    if not inside[0] or (mask is not None and not mask.any()):
        return None
    x0, y0, x1, y1 = boxes[0].tolist()
    return replace(thing, box=(x0, y0, x1, y1), mask=mask)


class TruthSource(ABC):
    """Where truth comes from. `find` reads one sample at a time; nothing of earlier samples is kept."""

    kind: ClassVar[str]
    classes: tuple[str, ...] = ()
    """Names by id in `Truth.semseg`."""
    things: frozenset[str] = frozenset()
    """Classes of countable objects."""
    stuff: frozenset[str] = frozenset()
    """Classes of background, in panoptic truth."""
    max_depth: float = 1000.0
    """Metres. Truth beyond is left out, and aligned inverse depth is cut off there, as in MiDaS' protocol."""
    closed_captions: bool = False
    """Whether captions name every object by colour and shape, in the vocabulary of scenes."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def find(self, key: str, source: Mapping[str, Any], parts: Set[str]) -> Truth | None:
        """The truth of the sample with this `source` record, at least the `parts` asked for; None if there is none.

        ValueError says what is wrong with the truth of this sample.
        """


@dataclass(frozen=True)
class DepthFiles:
    """How depth pictures of an NYUv2 folder are read."""

    per_metre: float = 1000.0
    """Units of a 16-bit value in one metre: 1000 where they are millimetres; 5000 and 256 are in use too."""
    eigen_crop: bool = True
    """Whether only rows 45..471 and columns 41..601 of 480 x 640 count (Eigen et al., 2014)."""


def open_truth(src: str | None, depth_files: DepthFiles | None = None) -> TruthSource:
    """The truth at `src`; None: scenes are rendered again from what their samples' metadata say.

    ValueError says what was looked for.
    """
    from fourmill.evaluate.truth_coco import CocoTruth, is_annotation
    from fourmill.evaluate.truth_nyu import NyuTruth, depth_maps
    from fourmill.evaluate.truth_scenes import RenderedScenes, SceneTars

    if src is None:
        return RenderedScenes()
    store, objects = locate(src)
    if any(suffix_of(o.name) == "tar" for o in objects):
        return SceneTars(src, store, objects)
    if any(is_annotation(o.name) for o in objects):
        return CocoTruth(src, store, objects)
    if depth_maps(objects):
        return NyuTruth(src, store, objects, depth_files or DepthFiles())
    looked = (
        "tars of `fourmill scenes --truth`, instances_*.json, panoptic_*.json or captions_*.json of COCO, or a folder "
        "`depth` of 16-bit PNG files as of NYUv2"
    )
    raise ValueError(f"no truth at {src!r}: looked for {looked}; it holds {', '.join(o.name for o in objects[:5])}")
