"""Masks of objects: COCO's compressed run lengths, the boxes and polygons that belong to them.

Invariants: `decode(encode(mask))` is the mask; `decode` is total on untrusted input: it gives the mask or a ValueError,
and allocates nothing before the sizes are known to agree.

A mask is bool (H, W). Run lengths go down the columns and begin with background, as in COCO's annotations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_MAX_SIDE = 8192  # a mask of more than 8,192 pixels a side is none of ours


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A bool or uint8 (H, W) mask -> {"size": [H, W], "counts": str}, by pycocotools."""
    from pycocotools import mask as coco

    if mask.ndim != 2:
        raise ValueError(f"a mask must be (H, W), not {mask.shape}")
    found = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in found["size"]], "counts": found["counts"].decode("ascii")}


def decode(rle: Mapping[str, Any]) -> np.ndarray:
    """The bool (H, W) mask of `encode`. ValueError for anything whose runs do not fill its size exactly.

    Not by pycocotools: its C code trusts the counts.
    """
    height, width = _size(rle)
    runs = _runs(str(rle.get("counts", "")), height * width)
    if sum(runs) != height * width:
        raise ValueError(f"bad mask: its runs fill {sum(runs)} of {height} x {width} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _size(rle: Mapping[str, Any]) -> tuple[int, int]:
    size = rle.get("size")
    if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(s, int) for s in size):
        raise ValueError(f"bad mask: size {size!r} is not [height, width]")
    height, width = size
    if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE):
        raise ValueError(f"bad mask: size {size!r} is outside 1..{_MAX_SIDE}")
    return height, width


def _runs(text: str, limit: int) -> list[int]:
    """COCO's counts: little-endian groups of five bits, sign-extended; from the fourth on, differences to the run
    before last."""
    runs: list[int] = []
    at = 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more:
            if at >= len(text) or shift > 30:
                raise ValueError(f"bad mask: counts are cut off or too long at character {at}")
            group = ord(text[at]) - 48
            if not 0 <= group < 64:
                raise ValueError(f"bad mask: character {text[at]!r} at {at} is not a COCO count")
            value |= (group & 0x1F) << shift
            more = bool(group & 0x20)
            at, shift = at + 1, shift + 5
            if not more and group & 0x10:
                value |= -1 << shift
        if len(runs) > 2:
            value += runs[-2]
        if not 0 <= value <= limit:
            raise ValueError(f"bad mask: a run of {value} pixels in a mask of {limit}")
        runs.append(value)
    return runs


def box_of(mask: np.ndarray) -> list[float]:
    """[x0, y0, x1, y1] in 0..1: the mask's extent, half-open pixel edges. ValueError for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        raise ValueError("an empty mask has no box")
    height, width = mask.shape
    edges = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
    return [round(float(edge), 6) for edge in edges]


def polygons(mask: np.ndarray) -> list[list[float]]:
    """Outlines as [x, y, x, y, …] in 0..1, the longest first; holes are dropped, as in COCO's polygons.

    Contours pass half a pixel outside the pixel centres of the mask, so that filling them gives the mask back but for
    corners.
    """
    import contourpy

    height, width = mask.shape
    padded = np.pad(mask.astype(np.float32), 1)
    lines = contourpy.contour_generator(z=padded, line_type="Separate").lines(0.5)
    # Pixel centre (0, 0) stands at (1, 1) of the padded grid and at (0.5, 0.5) of the picture.
    outer = [line - 0.5 for line in lines if _signed_area(line) > 0]
    outer.sort(key=lambda line: -abs(_signed_area(line)))
    return [np.round(line[:-1] / (width, height), 6).ravel().tolist() for line in outer]


def _signed_area(line: np.ndarray) -> float:
    """Positive for outlines, negative for holes: contourpy keeps the higher side on the left."""
    x, y = line[:, 0], line[:, 1]
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]) / 2)


def from_polygons(outlines: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """The bool (H, W) mask that the polygons, [x, y, x, y, …] in 0..1, fill together."""
    from PIL import Image, ImageDraw

    height, width = size
    scale = 4  # corners of a polygon fall between pixels: a pixel belongs to it by the larger part of its area
    canvas = Image.new("L", (width * scale, height * scale))
    draw = ImageDraw.Draw(canvas)
    for outline in outlines:
        if len(outline) < 6 or len(outline) % 2:
            raise ValueError(f"a polygon needs three or more points x, y, not {len(outline)} numbers")
        points = np.asarray(outline, dtype=np.float64).reshape(-1, 2) * (width * scale, height * scale) - 0.5
        draw.polygon([tuple(p) for p in points.tolist()], fill=1)
    shares = np.asarray(canvas, dtype=np.uint16).reshape(height, scale, width, scale).sum(axis=(1, 3))
    return shares * 2 > scale * scale
