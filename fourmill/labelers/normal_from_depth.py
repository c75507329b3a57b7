"""Surface normals from a depth map: geometry alone, no network.

With depth Z along the optical axis and a pinhole camera whose rays are (x, y, 1), the points of a plane satisfy
n . (x, y, 1) Z = d, so 1/Z is an affine function of x and y, and its gradient (p, q) gives the normal without error:
(p, q, 1/Z - x p - y q) up to length, negated so that it points towards the camera. Depth up to a factor does as well;
inverse depth up to a shift does not, and is refused.

Derivatives are taken from whichever of three stencils (behind, across, ahead) is straightest, so that surfaces do not
bleed into one another at the edges of objects. The rays follow from the picture's focal length and the recorded crop:
a crop moves the principal point, a flip mirrors it.

Shape legend: S side of the crop.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from fourmill.labelers.base import Labeler, LabelerConfig
from fourmill.pipeline.component import Batch, ComponentConfig, Failure
from fourmill.pipeline.geometry import Crop
from fourmill.pipeline.shards import Spec


class NormalFromDepthConfig(LabelerConfig):
    """Configuration of the geometry; one of the three ways to say the lens."""

    convention: Literal["metric", "relative"]
    """What the depth labels are. A component sees values only, not their records, so it must be told; wrong here means
    wrong normals. 'relative' is up to a factor; 'inverse', and depth with an unknown shift as Omnidata's, are not."""
    focal: float | None = Field(default=None, gt=0)
    """Focal length in widths of the whole upright picture (0.87 is a field of view of 60 degrees)."""
    field_of_view: float | None = Field(default=None, gt=0, lt=180)
    """Horizontal field of view of the whole upright picture, degrees."""
    focal_field: str | None = None
    """Key of the sample's own metadata that holds its focal length, in pixels of the upright picture."""
    step: int = Field(default=3, ge=1, le=64)
    """Distance in pixels between the samples of a difference. Stored depth has 11 bits: with 1 normals are off by
    1.6 degrees (median, 224 pixels) for rounding alone, with 3 by 0.6; larger is smoother, and loses surfaces narrower
    than twice the step."""

    @field_validator("convention", mode="before")
    @classmethod
    def _refuse_inverse(cls, value: Any) -> Any:
        if value == "inverse":
            raise ValueError(
                "inverse depth is known up to scale and shift, and normals depend on the shift; take depth that is "
                "'metric' or 'relative', or a network of normals"
            )
        return value

    @model_validator(mode="after")
    def _one_lens(self) -> NormalFromDepthConfig:
        ways = ("focal", "field_of_view", "focal_field")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(ways)}; given: {', '.join(given) or 'none'}")
        return self


class NormalFromDepth(Labeler):
    """`normal`: float32 (3, S, S), OpenCV's frame, towards the camera; (0, 0, 0) where there is no depth."""

    Config: ClassVar[type[ComponentConfig]] = NormalFromDepthConfig
    config: NormalFromDepthConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("depth", "crop_settings", "source")

    @property
    def makes(self) -> tuple[str, ...]:
        return ("normal",)

    def spec(self, modality: str) -> Spec:
        return Spec(convention="opencv")

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        rows = zip(*(batch.views[name] for name in self.reads), strict=True)
        return {"normal": [self._one(*row) for row in rows]}

    def _one(self, depth: np.ndarray, crop: Any, source: dict[str, Any]) -> np.ndarray | Failure:
        focal = self._focal(source)
        if isinstance(focal, Failure):
            return focal
        x, y = rays(Crop(*map(int, crop)), depth.shape[0], source["width"], source["height"], focal)
        return normals_of(np.asarray(depth), x, y, self.config.step)

    def _focal(self, source: dict[str, Any]) -> float | Failure:
        """In pixels of the upright picture."""
        config, width = self.config, source["width"]
        if config.focal is not None:
            return config.focal * width
        if config.field_of_view is not None:
            return 0.5 * width / math.tan(math.radians(config.field_of_view) / 2)
        assert config.focal_field is not None
        found = source.get("metadata", {}).get(config.focal_field)
        if isinstance(found, (int, float)) and math.isfinite(found) and found > 0:
            return float(found)
        return Failure(f"no focal length: metadata {config.focal_field!r} is {found!r}, not a number of pixels")


def rays(crop: Crop, size: int, width: int, height: int, focal: float) -> tuple[np.ndarray, np.ndarray]:
    """x and y (S,) of the rays (x, y, 1) through the pixel centres of a crop's columns and rows.

    `focal` in pixels of the upright picture of `width` x `height`, whose principal point is its centre. A flipped crop
    shows what a mirrored camera would see, so its x runs the other way.
    """
    centres = (np.arange(size, dtype=np.float64) + 0.5) / size
    x = (crop.left + centres * crop.width - width / 2) / focal
    y = (crop.top + centres * crop.height - height / 2) / focal
    return (-x[::-1] if crop.flip else x), y


def normals_of(depth_SS: np.ndarray, x_S: np.ndarray, y_S: np.ndarray, step: int) -> np.ndarray:
    """float32 (3, S, S) unit normals of a map of depth along the optical axis."""
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(depth_SS > 0, 1.0 / depth_SS.astype(np.float64), np.nan)
        p = _slope(inverse, step) / (x_S[1] - x_S[0])
        q = _slope(inverse.T, step).T / (y_S[1] - y_S[0])
        normals = -np.stack([p, q, inverse - x_S[None, :] * p - y_S[:, None] * q])
        normals /= np.linalg.norm(normals, axis=0)
    return np.nan_to_num(normals, nan=0.0).astype(np.float32)


def _slope(values_SS: np.ndarray, step: int) -> np.ndarray:
    """d/dcolumn (S, S) per pixel, from the straightest of three stencils; NaN where none is complete."""
    padded = np.pad(values_SS, ((0, 0), (2 * step, 2 * step)), constant_values=np.nan)
    size = values_SS.shape[1]
    far_left, left, here, right, far_right = (padded[:, k * step : k * step + size] for k in range(5))
    slopes = np.stack([
        (right - left) / 2,
        (3 * here - 4 * left + far_left) / 2,
        (-3 * here + 4 * right - far_right) / 2,
    ]) / step  # fmt: skip
    bends = np.stack([left - 2 * here + right, here - 2 * left + far_left, here - 2 * right + far_right])
    straightest = np.where(np.isnan(bends), np.inf, np.abs(bends)).argmin(axis=0)
    return np.take_along_axis(slopes, straightest[None], axis=0)[0]
