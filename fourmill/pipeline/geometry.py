"""One geometry: the crop, resize and flip of each (sample, crop index), decided once and applied by everyone.

A crop is five integers in pixels of the upright picture (after EXIF orientation): top, left, height, width, flip,
the layout of ml-4m's `crop_settings`. Crop 0 is the largest centred square; the others are drawn from a generator
seeded by (seed, key, crop index), so they do not depend on the order in which samples are processed.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class CropConfig(BaseModel):
    """How samples are cropped before any teacher sees them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(default=224, ge=16, le=4096)
    """Side of the square that every teacher is given, in pixels."""
    count: int = Field(default=1, ge=1, le=64)
    """Crops per sample; 4M uses up to 10. The first is always the centre square."""
    min_scale: float = Field(default=0.8, gt=0, le=1)
    """Smallest area of a random crop, as a share of the picture's (4M: 0.8)."""
    flip: bool = True
    """Whether random crops are mirrored half of the time."""
    seed: int = 0
    """Random crops are a function of this, the key and the crop index."""


class Crop(NamedTuple):
    """Top, left, height, width in pixels of the upright picture; flip is 0 or 1."""

    top: int
    left: int
    height: int
    width: int
    flip: int

    def boxes(self, boxes: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (N, 4) of x0, y0, x1, y1 in 0..1 of the picture -> of the crop, clipped, and which are left (N,)."""
        scale = np.array([width, height, width, height], dtype=np.float64)
        shift = np.array([self.left, self.top, self.left, self.top], dtype=np.float64)
        size = np.array([self.width, self.height, self.width, self.height], dtype=np.float64)
        moved = np.clip((boxes.reshape(-1, 4) * scale - shift) / size, 0.0, 1.0)
        if self.flip:
            moved[:, [0, 2]] = 1.0 - moved[:, [2, 0]]
        return moved, (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])


def draw_crops(key: str, height: int, width: int, config: CropConfig) -> list[Crop]:
    """The crops of one sample, `config.count` of them."""
    side = min(height, width)
    crops = [Crop((height - side) // 2, (width - side) // 2, side, side, 0)]
    for index in range(1, config.count):
        seed = hashlib.sha256(f"{config.seed}/{index}/{key}".encode()).digest()
        crops.append(_random_crop(np.random.default_rng(list(seed)), height, width, config))
    return crops


def _random_crop(rng: np.random.Generator, height: int, width: int, config: CropConfig) -> Crop:
    """Area uniform in [min_scale, 1] of the picture, aspect log-uniform in [3/4, 4/3], as RandomResizedCrop."""
    flip = int(config.flip and rng.random() < 0.5)
    for _ in range(10):
        area = height * width * rng.uniform(config.min_scale, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w, flip)
    side = min(height, width)
    return Crop((height - side) // 2, (width - side) // 2, side, side, flip)


def apply_crop(image: Any, crop: Crop, size: int) -> np.ndarray:
    """A PIL picture -> uint8 (size, size, 3): cropped, resized bicubically with antialiasing, mirrored."""
    from PIL import Image

    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(square)
    return np.ascontiguousarray(pixels[:, ::-1]) if crop.flip else pixels
