"""The geometry of every sample, decided once and recorded: the first thing that a run makes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from fourmill.labelers.base import Labeler, LabelerConfig
from fourmill.pipeline.component import Batch, ComponentConfig
from fourmill.pipeline.geometry import CropConfig, draw_crops
from fourmill.pipeline.shards import Spec


class CropSettingsConfig(LabelerConfig):
    """Filled in from the configuration's `crops` section."""

    crops: CropConfig
    batch_size: int | None = 1024


class CropSettings(Labeler):
    """Draws the crops of each sample from its key and its picture's size; reads no pixels."""

    Config: ClassVar[type[ComponentConfig]] = CropSettingsConfig
    config: CropSettingsConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("source",)

    @property
    def makes(self) -> tuple[str, ...]:
        return ("crop_settings",)

    def spec(self, modality: str) -> Spec:
        return Spec()

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        return {
            "crop_settings": [
                self._crop(k, s, batch.crop_index) for k, s in zip(batch.keys, batch.views["source"], strict=True)
            ]
        }

    def _crop(self, key: str, source: dict[str, Any], index: int) -> np.ndarray | None:
        if not source.get("width"):
            return None  # ingest quarantined the picture and said why
        crops = draw_crops(key, source["height"], source["width"], self.config.crops)
        return np.array(crops[index], dtype=np.int32)
