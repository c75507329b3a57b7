"""Boxes that came with the corpus: the annotation of each sample, moved into the crop. No network.

Stands where a detector would for corpora that are annotated already, `fourmill.scenes` among them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from fourmill.labelers.base import Labeler, LabelerConfig
from fourmill.pipeline.component import Batch, ComponentConfig, Failure
from fourmill.pipeline.geometry import Crop
from fourmill.pipeline.shards import Spec


class AnnotatedBoxesConfig(LabelerConfig):
    """Configuration of the annotation reader."""

    field: str = "boxes"
    """Key of the sample's own metadata: a list of {box: [x0, y0, x1, y1] in 0..1, class_name, score (default 1)}."""


class AnnotatedBoxes(Labeler):
    """`det`: the annotated objects that are at least partly in the crop, boxes clipped to it, best score first."""

    Config: ClassVar[type[ComponentConfig]] = AnnotatedBoxesConfig
    config: AnnotatedBoxesConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("source", "crop_settings")

    @property
    def makes(self) -> tuple[str, ...]:
        return ("det",)

    def spec(self, modality: str) -> Spec:
        return Spec()

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        pairs = zip(batch.views["source"], batch.views["crop_settings"], strict=True)
        return {"det": [self._objects(source, Crop(*map(int, crop))) for source, crop in pairs]}

    def _objects(self, source: dict[str, Any], crop: Crop) -> list[dict[str, Any]] | Failure | None:
        found = source.get("metadata", {}).get(self.config.field)
        if found is None:
            return None  # this sample is not annotated
        try:
            boxes = np.array([o["box"] for o in found], dtype=np.float64).reshape(-1, 4)
            names, scores = [str(o["class_name"]) for o in found], [float(o.get("score", 1.0)) for o in found]
        except (KeyError, TypeError, ValueError) as error:
            return Failure(f"bad annotation: {self.config.field} is not a list of {{box, class_name}}: {error}")
        moved, inside = crop.boxes(boxes, source["height"], source["width"])
        rounded = np.round(moved, 6)
        inside &= (rounded[:, 2] > rounded[:, 0]) & (rounded[:, 3] > rounded[:, 1])
        objects = zip(rounded.tolist(), names, scores, inside, strict=True)
        kept = [{"box": b, "class_name": n, "score": s} for b, n, s, keep in objects if keep]
        return sorted(kept, key=lambda item: -item["score"])
