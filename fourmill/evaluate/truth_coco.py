"""Truth in COCO's formats: instances_*.json, panoptic_*.json with its PNG files, captions_*.json, in one folder.

A sample is found by its image id (as the COCO reader keeps it) or by its picture's file name. Annotations stand in
memory, some 10 KB a picture; masks are only made for the sample asked for. Invariant: a picture whose shape is not that
of its annotation is refused, since everything would lie in the wrong place.
"""

from __future__ import annotations

import fnmatch
import io
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from fourmill.evaluate.truth import VOID, TrueObject, TrueSegment, Truth, TruthSource
from fourmill.pipeline import masks
from fourmill.pipeline.corpus import stem_of, suffix_of
from fourmill.pipeline.store import ObjectInfo, Store

_MAX_FILE_BYTES = 2 << 30  # instances_train2017.json has 470 MB
_MAX_SIDE = 8192
_KINDS = ("instances", "panoptic", "captions")


def is_annotation(name: str) -> bool:
    """Whether this is what COCO calls an annotation file."""
    return any(fnmatch.fnmatchcase(name.rpartition("/")[2], f"{kind}_*.json") for kind in _KINDS)


@dataclass
class _Picture:
    """What the files say of one picture."""

    height: int
    width: int
    instances: list[dict[str, Any]] | None = None
    panoptic: dict[str, Any] | None = None
    captions: list[str] = field(default_factory=list)


class CocoTruth(TruthSource):
    """Annotations in COCO's formats."""

    kind = "COCO annotations"

    def __init__(self, src: str, store: Store, objects: Sequence[ObjectInfo]) -> None:
        super().__init__(src)
        self.store = store
        self._pictures: dict[int, _Picture] = {}
        self._by_stem: dict[str, int] = {}
        self._names: dict[int, str] = {}  # of categories
        self._pngs = {o.name.rpartition("/")[2]: o.name for o in objects if suffix_of(o.name) == "png"}
        is_thing: dict[str, bool] = {}
        for info in objects:
            if is_annotation(info.name):
                is_thing |= self._read(info)
        self.things = frozenset(n for n, thing in is_thing.items() if thing)
        self.stuff = frozenset(n for n, thing in is_thing.items() if not thing)
        self.classes = tuple(is_thing)
        if len(self.classes) > VOID:
            raise ValueError(f"{src!r} has {len(self.classes)} categories; at most {VOID} are compared")
        self._class_ids = {name: number for number, name in enumerate(self.classes)}

    def _read(self, info: ObjectInfo) -> dict[str, bool]:
        """Take in one file; returns whether each of its categories is a thing."""
        where = f"{info.name} in {self.store.uri}"
        if info.num_bytes > _MAX_FILE_BYTES:
            raise ValueError(f"{where} has {info.num_bytes} bytes; at most {_MAX_FILE_BYTES} are read")
        kind = info.name.rpartition("/")[2].partition("_")[0]
        try:
            root = json.loads(self.store.get(info.name))
            for image in root["images"]:
                number = int(image["id"])
                shape = int(image["height"]), int(image["width"])
                picture = self._pictures.setdefault(number, _Picture(*shape))
                if not (min(shape) > 0 and max(shape) <= _MAX_SIDE) or shape != (picture.height, picture.width):
                    raise ValueError(f"image {number} is said to have {shape} pixels")
                if kind == "instances":
                    picture.instances = picture.instances or []
                if image.get("file_name"):
                    self._by_stem[stem_of(str(image["file_name"]).rpartition("/")[2])] = number
            for annotation in root["annotations"]:
                self._add(kind, annotation)
            categories = [(int(c["id"]), str(c["name"]), c.get("isthing", 1)) for c in root.get("categories", [])]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{where} is not in COCO's format for {kind}: {error!r}") from error
        self._names |= {number: name for number, name, _ in categories}
        return {name: bool(thing) for _, name, thing in categories}

    def _add(self, kind: str, annotation: dict[str, Any]) -> None:
        picture = self._pictures[int(annotation["image_id"])]
        if kind == "captions":
            picture.captions.append(str(annotation["caption"]))
        elif kind == "panoptic":
            picture.panoptic = annotation
        elif picture.instances is not None:
            picture.instances.append(annotation)

    def find(self, key: str, source: Mapping[str, Any], parts: Set[str]) -> Truth | None:
        picture = self._picture(key, source)
        if picture is None:
            return None
        height, width = int(source["height"]), int(source["width"])
        # Resized pictures are welcome; 2 % allow for rounded sides.
        if abs(np.log((height / width) / (picture.height / picture.width))) > 0.02:
            raise ValueError(
                f"the picture has {height} x {width} pixels, its annotation {picture.height} x {picture.width}"
            )
        panoptic: np.ndarray | None = None
        segments: tuple[TrueSegment, ...] = ()
        if picture.panoptic is not None and {"panoptic", "semseg"} & parts:
            panoptic, segments = self._panoptic(picture.panoptic)
        objects = None
        if picture.instances is not None and "objects" in parts:
            objects = tuple(self._object(a, picture) for a in picture.instances)
        return Truth(
            semseg=None if panoptic is None else self._semantic(panoptic, segments),
            panoptic=panoptic,
            segments=segments,
            objects=objects,
            captions=tuple(picture.captions),
        )

    def _picture(self, key: str, source: Mapping[str, Any]) -> _Picture | None:
        """By the name of the picture's file, which is an id in COCO; else by the id that the COCO reader keeps."""
        metadata = source.get("metadata")
        metadata = metadata if isinstance(metadata, Mapping) else {}
        names = [metadata.get("file_name"), str(source.get("origin", "")).rpartition(":")[2], key]
        for name in names:
            number = self._by_stem.get(stem_of(str(name or "").rpartition("/")[2]))
            if number is not None:
                return self._pictures[number]
        return self._pictures.get(metadata["id"]) if isinstance(metadata.get("id"), int) else None

    def _object(self, annotation: Mapping[str, Any], picture: _Picture) -> TrueObject:
        try:
            x, y, width, height = (float(v) for v in annotation["bbox"])
            box = (x / picture.width, y / picture.height, (x + width) / picture.width, (y + height) / picture.height)
            mask = _mask(annotation.get("segmentation"), picture.height, picture.width)
            name = self._names[int(annotation["category_id"])]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"bad annotation {annotation.get('id')!r}: {error!r}") from error
        return TrueObject(name, box, mask, bool(annotation.get("iscrowd", 0)))

    def _panoptic(self, annotation: Mapping[str, Any]) -> tuple[np.ndarray, tuple[TrueSegment, ...]]:
        """Numbers are COCO's own, red + 256 green + 65536 blue."""
        name = str(annotation["file_name"])
        stored = self._pngs.get(name.rpartition("/")[2])
        if stored is None:
            raise ValueError(f"{name!r} of the panoptic annotations is not below {self.store.uri}")
        with Image.open(io.BytesIO(self.store.get(stored)), formats=["PNG"]) as image:
            if max(image.size) > _MAX_SIDE:
                raise ValueError(f"{name!r} has {image.size} pixels; at most {_MAX_SIDE} a side are read")
            colours = np.asarray(image.convert("RGB"), dtype=np.int32)
        numbers = colours @ np.array([1, 256, 65536], np.int32)
        found = annotation["segments_info"]
        segments = [
            TrueSegment(int(s["id"]), self._names[int(s["category_id"])], bool(s.get("iscrowd", 0))) for s in found
        ]
        return numbers, tuple(segments)

    def _semantic(self, panoptic: np.ndarray, segments: Sequence[TrueSegment]) -> np.ndarray:
        classes = np.full(panoptic.shape, VOID, np.uint8)
        for segment in segments:
            classes[panoptic == segment.number] = self._class_ids[segment.class_name]
        return classes


def _mask(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """COCO's three spellings: polygons in pixels, run lengths as a list, or as a compressed string."""
    if segmentation is None:
        return None
    if isinstance(segmentation, Mapping):
        if list(segmentation.get("size", ())) != [height, width]:
            raise ValueError(f"a mask of {segmentation.get('size')} for a picture of {height} x {width}")
        counts = segmentation.get("counts")
        return masks.decode(segmentation) if isinstance(counts, str) else _from_runs(counts, height, width)
    if not segmentation:
        return None
    from pycocotools import mask as coco

    polygons = [[float(v) for v in polygon] for polygon in segmentation]
    if any(len(p) < 6 or len(p) % 2 or not all(-_MAX_SIDE <= v <= 2 * _MAX_SIDE for v in p) for p in polygons):
        raise ValueError("a polygon needs three or more points x, y near the picture")
    return np.asarray(coco.decode(coco.merge(coco.frPyObjects(polygons, height, width)))).astype(bool)


def _from_runs(counts: Any, height: int, width: int) -> np.ndarray:
    """Run lengths down the columns, background first."""
    runs = np.asarray(counts, dtype=np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"runs that do not fill {height} x {width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
