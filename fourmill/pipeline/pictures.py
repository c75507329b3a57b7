"""Pictures of labels as people expect them: depth in false colour, classes in a palette, features by their principal
axes, boxes drawn on the image. All return uint8 (H, W, 3)."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw


def depth_picture(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    """Depth (H, W) in matplotlib's 'turbo' between `low` (near, red) and `high` (far, blue)."""
    from matplotlib import colormaps

    level = np.clip((depth - low) / max(high - low, 1e-9), 0, 1)
    return (colormaps["turbo"](1.0 - level)[..., :3] * 255).astype(np.uint8)


def class_picture(ids: np.ndarray) -> np.ndarray:
    """Class ids (H, W) in well separated colours, the same id the same colour everywhere; void (255) is black."""
    return _PALETTE[ids]


def _palette() -> np.ndarray:
    """Hues a golden-ratio turn apart, so that neighbouring ids differ; floor and wall first, in greys."""
    colours = [(0.45, 0.42, 0.40), (0.78, 0.76, 0.72)]
    colours += [colorsys.hsv_to_rgb((0.02 + 0.618034 * i) % 1, 0.75, 0.92) for i in range(253)]
    return (np.array([*colours, (0, 0, 0)]) * 255).astype(np.uint8)


_PALETTE = _palette()


class FeaturePainter:
    """Features (C, h, w) as colours along the three principal axes of a reference set, the same for all pictures."""

    def __init__(self, reference: Sequence[np.ndarray]) -> None:
        cells = np.concatenate([_unit(f).reshape(len(f), -1).T for f in reference])
        self.mean = cells.mean(axis=0)
        _, _, axes = np.linalg.svd(cells - self.mean, full_matrices=False)
        self.axes = axes[:3]
        projected = (cells - self.mean) @ self.axes.T
        self.low, self.high = np.percentile(projected, [2, 98], axis=0)

    def paint(self, features: np.ndarray, size: int) -> np.ndarray:
        cells = _unit(features).reshape(len(features), -1).T
        level = ((cells - self.mean) @ self.axes.T - self.low) / np.maximum(self.high - self.low, 1e-9)
        colours = (np.clip(level, 0, 1) * 255).astype(np.uint8).reshape(*features.shape[1:], 3)
        return np.asarray(Image.fromarray(colours).resize((size, size), Image.Resampling.NEAREST))


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=0, keepdims=True), 1e-9)


def box_picture(image: np.ndarray, objects: Sequence[dict[str, Any]], zoom: int = 2) -> np.ndarray:
    """The image, dimmed, with each object's box and class name."""
    height, width = image.shape[:2]
    pale = (image.astype(np.float32) * 0.55 + 40).astype(np.uint8)
    canvas = Image.fromarray(pale).resize((width * zoom, height * zoom), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    for item in objects:
        x0, y0, x1, y1 = (v * s * zoom for v, s in zip(item["box"], (width, height, width, height), strict=True))
        x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
        draw.rectangle([x0, y0, x1, y1], outline=(255, 220, 40), width=2)
        draw.text((x0 + 3, y0 + 1), str(item["class_name"]), fill=(255, 255, 255))
    return np.asarray(canvas)


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], headings: Sequence[str], cell: int = 112) -> Image.Image:
    """One row of pictures a sample under a line of headings."""
    margin, top = 4, 22
    columns = len(headings)
    sheet = Image.new("RGB", (columns * (cell + margin) + margin, top + len(rows) * (cell + margin)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        draw.text((margin + column * (cell + margin) + 2, 5), heading, fill=(20, 20, 20))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((cell, cell), Image.Resampling.BILINEAR)
            sheet.paste(tile, (margin + x * (cell + margin), top + y * (cell + margin)))
    return sheet
