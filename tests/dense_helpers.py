"""What the tests of depth, normals and segmentation share: loaded labelers, batches, scenes, networks of truth."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from fourmill.labelers import LABELERS
from fourmill.pipeline.component import Batch
from fourmill.pipeline.geometry import CropConfig, apply_crop, draw_crops
from fourmill.scenes import Scene, render


def labeler(kind: str, folder: Path | str, **options: Any) -> Any:
    made = LABELERS.build(kind, {"checkpoint": str(folder), **options})
    made.load("cpu")
    return made


def mixed_batch(size: int = 40) -> Batch:
    """Crops of pictures of three sizes and shapes, by the recorded geometry, as the worker makes them."""
    pixels = []
    for i, (height, width) in enumerate([(96, 128), (130, 60), (50, 50)]):
        noise = np.random.default_rng(i).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((width, height))
        crop = draw_crops(f"k{i}", height, width, CropConfig(count=2, size=size))[1]
        pixels.append(apply_crop(picture, crop, size).transpose(2, 0, 1))
    return Batch(["a", "b", "c"], np.stack(pixels))


def scenes(count: int, size: int) -> list[Scene]:
    return [render(99, i, size) for i in range(count)]


def pictures_of(found: list[Scene]) -> Batch:
    return Batch([str(i) for i in range(len(found))], np.stack([s.image for s in found]).transpose(0, 3, 1, 2))


class Gives(torch.nn.Module):
    """A network replaced by what it would have to say: `outputs` for every batch, under the real configuration."""

    def __init__(self, config: Any, **outputs: Any) -> None:
        super().__init__()
        self.config, self.outputs = config, outputs

    def forward(self, **inputs: Any) -> Any:
        return SimpleNamespace(**self.outputs)
