"""Edges by Canny's method (1986), no network: where brightness changes most, thinned to lines.

The steps are those of OpenCV's `Canny` with its default gradient, since 4M made its edges with OpenCV (its thresholds
are not published): grey levels, Sobel derivatives, |dx| + |dy|, suppression along one of four directions, hysteresis.
Invariant: whole numbers throughout, so that an edge does not depend on the machine or on the batch.

Shape legend: B pictures, H x W pixels.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from fourmill.labelers.base import Labeler, LabelerConfig
from fourmill.pipeline.component import Batch, ComponentConfig
from fourmill.pipeline.shards import Spec

_STEEP = math.sqrt(2) - 1  # tan 22.5 degrees: the borders between the four directions
_UNIT = 1 << 14  # weights of the Gaussian are multiples of 1/16,384


class CannyEdgeConfig(LabelerConfig):
    """Configuration of the edge detector. Thresholds are in units of |dx| + |dy| of the Sobel operator: an upright step
    of 25 grey levels of 255 makes 100."""

    batch_size: int | None = Field(default=16, ge=1)
    low: float = Field(default=100.0, ge=0)
    """Above it a line that has begun goes on."""
    high: float = Field(default=200.0, ge=0)
    """Above it a line begins."""
    sigma: float = Field(default=0.0, ge=0, le=10)
    """Width of the Gaussian before it, pixels; 0: none, as OpenCV's `Canny`. Crops are downscaled with antialiasing
    already; 1 and half the thresholds suit noisy pictures."""

    @model_validator(mode="after")
    def _ordered(self) -> CannyEdgeConfig:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}: a line would end before it begins")
        return self


class CannyEdge(Labeler):
    """`canny_edge`: uint8 (H, W), 255 on an edge, else 0."""

    Config: ClassVar[type[ComponentConfig]] = CannyEdgeConfig
    config: CannyEdgeConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("rgb",)

    @property
    def makes(self) -> tuple[str, ...]:
        return ("canny_edge",)

    def spec(self, modality: str) -> Spec:
        return Spec()

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        assert batch.pixels is not None
        found = canny(grey_levels(batch.pixels), self.config.low, self.config.high, self.config.sigma)
        return {"canny_edge": list(found.astype(np.uint8) * 255)}


def grey_levels(pixels_B3HW: np.ndarray) -> np.ndarray:
    """int32 (B, H, W) in 0..255: luma by ITU-R BT.601, rounded, the same as Pillow's mode L."""
    red, green, blue = (pixels_B3HW[:, channel].astype(np.int32) for channel in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16


def canny(grey_BHW: np.ndarray, low: float, high: float, sigma: float = 0.0) -> np.ndarray:
    """bool (B, H, W): the edges of grey levels in 0..255."""
    dx_BHW, dy_BHW = sobel(smoothed(grey_BHW, sigma) if sigma else grey_BHW)
    magnitude_BHW = np.abs(dx_BHW) + np.abs(dy_BHW)
    crest_BHW = is_crest(magnitude_BHW, dx_BHW, dy_BHW)
    return connected(crest_BHW & (magnitude_BHW > high), crest_BHW & (magnitude_BHW > low))


def smoothed(grey_BHW: np.ndarray, sigma: float) -> np.ndarray:
    """int32 (B, H, W): grey levels after a Gaussian of `sigma` pixels, rounded; the picture's edge goes on outside."""
    reach = math.ceil(4 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    whole = np.round(weights / weights.sum() * _UNIT).astype(np.int64)
    whole[reach] += _UNIT - whole.sum()  # an even grey stays what it is
    height, width = grey_BHW.shape[1:]
    padded = np.pad(grey_BHW.astype(np.int64), ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    rows = sum(w * padded[:, i : i + height] for i, w in enumerate(whole))
    both = sum(w * rows[:, :, i : i + width] for i, w in enumerate(whole))
    return ((both + _UNIT * _UNIT // 2) // (_UNIT * _UNIT)).astype(np.int32)


def sobel(grey_BHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d/dx and d/dy, int32 (B, H, W): to the right and down, in eighths of grey levels a pixel."""
    padded = np.pad(grey_BHW.astype(np.int32), ((0, 0), (1, 1), (1, 1)), mode="edge")
    down = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    across = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return down[:, :, 2:] - down[:, :, :-2], across[:, 2:] - across[:, :-2]


def is_crest(magnitude_BHW: np.ndarray, dx_BHW: np.ndarray, dy_BHW: np.ndarray) -> np.ndarray:
    """bool (B, H, W): pixels of which both neighbours along the gradient change less. Of two equal ones that lie side
    by side or one above the other the first counts; outside the picture nothing changes."""
    padded = np.pad(magnitude_BHW, ((0, 0), (1, 1), (1, 1)))
    height, width = magnitude_BHW.shape[1:]

    def beyond(down: int, right: int) -> np.ndarray:
        return padded[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    ax, ay = np.abs(dx_BHW), np.abs(dy_BHW)
    here = magnitude_BHW
    across = (here > beyond(0, -1)) & (here >= beyond(0, 1))
    upright = (here > beyond(-1, 0)) & (here >= beyond(1, 0))
    falling = (here > beyond(-1, -1)) & (here > beyond(1, 1))
    rising = (here > beyond(-1, 1)) & (here > beyond(1, -1))
    slanted = np.where((dx_BHW < 0) == (dy_BHW < 0), falling, rising)
    return np.where(ay < _STEEP * ax, across, np.where(ay > ax / _STEEP, upright, slanted))


def connected(seeds_BHW: np.ndarray, allowed_BHW: np.ndarray) -> np.ndarray:
    """bool (B, H, W): the allowed pixels from which steps to one of the 8 neighbours lead to a seed."""
    margin = ((0, 0), (1, 1), (1, 1))  # nothing is allowed there, so no step leaves its picture
    open_N = np.pad(allowed_BHW, margin).ravel()
    width = allowed_BHW.shape[2] + 2
    steps = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    found_N = np.zeros_like(open_N)
    front = np.flatnonzero(np.pad(seeds_BHW & allowed_BHW, margin))
    while front.size:
        found_N[front] = True
        open_N[front] = False
        near = (front[:, None] + steps).ravel()
        front = np.unique(near[open_N[near]])
    batch, height = allowed_BHW.shape[:2]
    return found_N.reshape(batch, height + 2, width)[:, 1:-1, 1:-1]
