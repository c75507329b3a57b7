"""Toy labelers that say the truth of scenes, or one chosen lie; workers import this file by `scene_labels:Name`.

The truth is rendered, cropped by Pillow and encoded here by itself: nothing of `fourmill.evaluate` is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from fourmill.labelers.base import Labeler, LabelerConfig
from fourmill.pipeline import masks
from fourmill.pipeline.component import Batch
from fourmill.pipeline.geometry import Crop
from fourmill.pipeline.shards import Spec
from fourmill.scenes import CLASSES, SHAPES, Scene, render

MADE = ("depth", "normal", "semseg", "panoptic", "instance", "sam_instance", "det")


class SceneLabelsConfig(LabelerConfig):
    """`lies`: what is said wrong. `size`: side of the crops. `convention`: of depth."""

    lies: tuple[str, ...] = ()
    size: int = 64
    convention: str = "metric"


class SceneCaptions(Labeler):
    """Texts of a scene."""

    Config = SceneLabelsConfig
    config: SceneLabelsConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("source",)

    @property
    def makes(self) -> tuple[str, ...]:
        return ("caption", "captions")

    def spec(self, modality: str) -> Spec:
        return Spec()

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        origins = [source["metadata"]["scene"] for source in batch.views["source"]]
        scenes = [render(o["seed"], o["index"], o["size"]) for o in origins]
        alt = {"text": "nothing to see", "source": "alt_text", "style": "short"}
        return {
            "caption": ["a red zebra" if "zebra" in self.config.lies else s.summary for s in scenes],
            "captions": [[alt, {"text": s.caption, "source": "toy", "style": "dense"}] for s in scenes],
        }


class SceneLabels(Labeler):
    """Every label of a crop of a scene."""

    Config = SceneLabelsConfig
    config: SceneLabelsConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("source", "crop_settings")

    @property
    def makes(self) -> tuple[str, ...]:
        return MADE

    def spec(self, modality: str) -> Spec:
        if modality == "depth":
            return Spec(convention=self.config.convention)
        if modality == "normal":
            return Spec(convention="opencv")
        names = CLASSES if "classes shifted" not in self.config.lies else (*CLASSES[1:], CLASSES[0])
        return Spec(classes=names) if modality in ("semseg", "panoptic") else Spec()

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        rows = zip(batch.views["source"], batch.views["crop_settings"], strict=True)
        found = [self._labels(source["metadata"]["scene"], Crop(*map(int, crop))) for source, crop in rows]
        return {name: [labels[name] for labels in found] for name in MADE}

    def _labels(self, origin: dict[str, int], crop: Crop) -> dict[str, Any]:
        scene = render(origin["seed"], origin["index"], origin["size"])
        semseg = self._nearest(scene.semantic, crop)
        objects = list(self._objects(scene, crop))
        segments = [o | {"is_thing": True} for o in objects]
        for number in (0, 1):
            if (semseg == number).any():
                segments.append(_segment(CLASSES[number], semseg == number) | {"is_thing": False})
        boxes = [{**o, "box": self._box(int(o["index"]), scene, crop)} for o in objects]
        objects = [{k: v for k, v in o.items() if k != "index"} for o in objects]
        segments = [{k: v for k, v in s.items() if k != "index"} for s in segments]
        segments.sort(key=lambda segment: -int(segment["area"]))
        return {
            "depth": self._depth(scene, crop),
            "normal": self._normal(scene, crop),
            "semseg": semseg,
            "panoptic": segments[1:] if "first segment missing" in self.config.lies else segments,
            "instance": objects,
            "sam_instance": [{**o, "stability": 1.0, "point": [0.5, 0.5]} for o in objects],
            "det": [{k: b[k] for k in ("class_name", "score", "box")} for b in boxes],
        }

    def _nearest(self, array: np.ndarray, crop: Crop) -> np.ndarray:
        size = (self.config.size, self.config.size)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        found = np.asarray(Image.fromarray(array).resize(size, Image.Resampling.NEAREST, box=box))
        return found[:, ::-1] if crop.flip else found

    def _depth(self, scene: Scene, crop: Crop) -> np.ndarray:
        depth = self._nearest(scene.depth, crop)
        if "disparity" in self.config.lies:
            return 3.0 / depth + 0.5
        return depth * 2.0 if "double depth" in self.config.lies else depth

    def _normal(self, scene: Scene, crop: Crop) -> np.ndarray:
        planes = [self._nearest(np.ascontiguousarray(scene.normals[..., i]), crop) for i in range(3)]
        normal = np.stack(planes)
        if crop.flip and "flip without x" not in self.config.lies:
            normal[0] *= -1
        return -normal if "normals away" in self.config.lies else normal

    def _objects(self, scene: Scene, crop: Crop) -> Iterable[dict[str, Any]]:
        instances = self._nearest(scene.instances, crop)
        for index, thing in enumerate(scene.objects):
            mask = instances == thing.instance
            if mask.any():
                mask = np.roll(mask, 24, axis=1) if "masks moved" in self.config.lies else mask
                yield _segment(thing.class_name, mask) | {"index": index}

    def _box(self, index: int, scene: Scene, crop: Crop) -> list[float]:
        x0, y0, x1, y1 = (float(v) for v in scene.objects[index].box)
        x0, x1 = (min(max((x - crop.left) / crop.width, 0.0), 1.0) for x in (x0, x1))
        y0, y1 = (min(max((y - crop.top) / crop.height, 0.0), 1.0) for y in (y0, y1))
        if crop.flip:
            x0, x1 = 1.0 - x1, 1.0 - x0
        return [x0, y0, x1 - x0, y1 - y0] if "xywh" in self.config.lies else [x0, y0, x1, y1]


def _segment(name: str, mask: np.ndarray) -> dict[str, Any]:
    assert name in SHAPES or name in CLASSES
    found = {"class_name": name, "score": 1.0, "area": int(mask.sum())}
    return {**found, "box": masks.box_of(mask), "mask": masks.encode(mask)}
