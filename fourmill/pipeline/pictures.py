"""Pictures of labels as people expect them: depth in false colour, normals in their usual colour code, classes in a
palette, edges as white lines, features by their principal axes, boxes and masks drawn on the image, colour palettes as
swatches, facts as a table. All return uint8 (H, W, 3)."""

from __future__ import annotations

import colorsys
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fourmill.pipeline import masks

_NAMED = 0.3  # score of boxes from which on they are likely meant
_LONGEST_NAME = 24  # letters of a class's name on a picture
_BLANK = 205  # grey of pixels of which nothing is known


def depth_picture(depth: np.ndarray, low: float, high: float) -> np.ndarray:
    """Depth (H, W) between `low` (near, yellow) and `high` (far, violet) in matplotlib's 'viridis': equal steps look
    equal, also to the colour-blind and in print."""
    return _viridis(1.0 - np.clip((depth - low) / max(high - low, 1e-9), 0, 1))


def depth_ramp() -> str:
    """The colours of `depth_picture` from low to high, as a CSS gradient."""
    stops = _viridis(1.0 - np.linspace(0, 1, 7))
    return f"linear-gradient(90deg, {', '.join('#' + bytes(stop).hex() for stop in stops)})"


def _viridis(level: np.ndarray) -> np.ndarray:
    from matplotlib import colormaps

    return (colormaps["viridis"](level)[..., :3] * 255).astype(np.uint8)


def normal_picture(normal: np.ndarray) -> np.ndarray:
    """Unit normals (3, H, W), x right, y down, z forward, in the colour code of normal maps: (n + 1) / 2 with red to
    the right, green up and blue towards the viewer; a floor is green, a wall ahead light blue. Unknown is grey."""
    x, y, z = normal
    colours = (np.stack([x, -y, -z], axis=-1) + 1) / 2
    colours[~normal.any(axis=0)] = _BLANK / 255
    return (np.clip(colours, 0, 1) * 255).astype(np.uint8)


def error_picture(error: np.ndarray, high: float, known: np.ndarray) -> np.ndarray:
    """An error (H, W) from 0 (black) to `high` (yellow) in matplotlib's 'inferno'; grey where nothing is `known`."""
    from matplotlib import colormaps

    colours = (colormaps["inferno"](np.clip(error / high, 0, 1))[..., :3] * 255).astype(np.uint8)
    colours[~known] = _BLANK
    return colours


def class_picture(ids: np.ndarray) -> np.ndarray:
    """Class ids (H, W) in well separated colours, the same id the same colour everywhere; void (255) is black."""
    return _PALETTE[ids]


def _palette() -> np.ndarray:
    """Hues a golden-ratio turn apart, so that neighbouring ids differ; floor and wall first, in greys."""
    colours = [(0.45, 0.42, 0.40), (0.78, 0.76, 0.72)]
    colours += [colorsys.hsv_to_rgb((0.02 + 0.618034 * i) % 1, 0.75, 0.92) for i in range(253)]
    return (np.array([*colours, (0, 0, 0)]) * 255).astype(np.uint8)


_PALETTE = _palette()


def edge_picture(edges: np.ndarray) -> np.ndarray:
    """Edges (H, W), 0..255, as white lines on black."""
    return np.repeat(np.asarray(edges, dtype=np.uint8)[..., None], 3, axis=-1)


def palette_picture(palettes: Mapping[str, Sequence[Sequence[int]]], size: int = 144) -> np.ndarray:
    """Colour palettes {n: n colours} from top to bottom, the shortest first: one row of swatches each."""
    picture = np.full((size, size, 3), 255, np.uint8)
    for row, number in enumerate(sorted(palettes, key=int)):
        top, bottom = (size * (row + i) // len(palettes) for i in (0, 1))
        for column, colour in enumerate(palettes[number]):
            left, right = (size * (column + i) // len(palettes[number]) for i in (0, 1))
            picture[top : max(bottom - 1, top + 1), left:right] = colour
    return picture


def facts_picture(facts: Mapping[str, float], size: int = 224) -> np.ndarray:
    """Names and numbers as a table, in their order; what does not fit is left out, and said to be."""
    picture = Image.new("RGB", (size, size), (255, 255, 255))
    draw, line = ImageDraw.Draw(picture), 13  # pixels; the built-in font is 11 high
    lines = [(name, f"{value:g}") for name, value in facts.items()]
    fitting = (size - 8) // line
    if len(lines) > fitting:
        lines = [*lines[: fitting - 1], (f"… {len(lines) - fitting + 1} more", "")]
    for row, (name, value) in enumerate(lines):
        draw.text((4, 4 + row * line), name.replace("_", " "), fill=(90, 90, 90))
        draw.text((size - 4, 4 + row * line), value, fill=(20, 20, 20), anchor="ra")
    return np.asarray(picture)


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


def class_colour(index: int) -> str:
    """The colour of a class id in `class_picture`, for a legend."""
    return "#" + bytes(_PALETTE[index]).hex()


def box_picture(image: np.ndarray, objects: Sequence[dict[str, Any]], zoom: int = 2) -> np.ndarray:
    """The image, dimmed, with each object's box, fainter the lower its score; names and scores of those above 0.3."""
    height, width = image.shape[:2]
    pale = (image.astype(np.float32) * 0.55 + 40).astype(np.uint8)
    canvas = Image.fromarray(pale).resize((width * zoom, height * zoom), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    for item in sorted(objects, key=lambda o: float(o.get("score", 1.0))):  # the best on top
        score = float(item.get("score", 1.0))
        x0, y0, x1, y1 = (v * s * zoom for v, s in zip(item["box"], (width, height, width, height), strict=True))
        x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
        strength = min(max(score, 0.0), 1.0)
        colour = tuple(round(strength * c + (1 - strength) * 130) for c in (255, 220, 40))
        draw.rectangle([x0, y0, x1, y1], outline=colour, width=2 if score > _NAMED else 1)
        if score > _NAMED:
            _tag(draw, (x0, y0), canvas.size, _name_and_score(item), colour)
    return np.asarray(canvas)


def _name_and_score(item: Mapping[str, Any]) -> str:
    name = str(item["class_name"])[:_LONGEST_NAME]
    return f"{name} {float(item['score']):.2f}" if "score" in item and float(item["score"]) < 1 else name


def _tag(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], size: tuple[int, int], text: str, colour: tuple[int, ...]
) -> None:
    """A line of dark text on a plate in the box's colour, inside of the picture."""
    font = _font(size[0])
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x, y = max(0, min(at[0], size[0] - width)), max(0, min(at[1], size[1] - height))
    draw.rectangle([x, y, x + width, y + height], fill=colour)
    draw.text((x + 2 - left, y + 2 - top), text, fill=(20, 20, 20), font=font)


def _font(side: int) -> Any:
    """Letters that can still be read where a picture is shown at half its size."""
    return ImageFont.load_default(max(10, min(side // 15, 24)))


def segments_picture(image: np.ndarray, segments: Sequence[Mapping[str, Any]], zoom: int = 2) -> np.ndarray:
    """The image, grey, under the masks of segments: a colour for each class, shaded apart where a class comes again,
    with its name; masks without classes each in a colour of their own. Earlier segments lie on top."""
    grey = np.repeat(image.mean(axis=2, keepdims=True) * 0.6 + 70, 3, axis=2)
    canvas = grey.copy()
    again: dict[str, int] = {}
    layers = []
    for number, segment in enumerate(segments):
        name = str(segment.get("class_name", ""))
        again[name] = again.get(name, 0) + 1
        layers.append((masks.decode(segment["mask"]), _segment_colour(name, number if not name else again[name] - 1)))
    for mask, colour in reversed(layers):
        canvas[mask] = 0.35 * grey[mask] + 0.65 * colour
        canvas[mask & ~_eroded(mask)] = 0.25 * colour
    height, width = image.shape[:2]
    picture = Image.fromarray(canvas.astype(np.uint8)).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for segment, (mask, _) in zip(segments, layers, strict=True):
        if segment.get("class_name") and mask.mean() > 0.01:
            draw.text(
                _inside(mask, zoom),
                str(segment["class_name"])[:_LONGEST_NAME],
                fill=(255, 255, 255),
                anchor="mm",
                stroke_width=2,
                stroke_fill=(0, 0, 0),
                font=_font(picture.width),
            )
    return np.asarray(picture)


def _segment_colour(name: str, number: int) -> np.ndarray:
    """A hue from the name (the same everywhere) and a brightness from the number; without a name a hue from it."""
    hue = zlib.crc32(name.encode()) / 2**32 if name else 0.02 + 0.618034 * number
    value = 0.95 - 0.22 * (number % 3) if name else 0.92
    return np.array(colorsys.hsv_to_rgb(hue % 1, 0.75, value)) * 255


def _inside(mask: np.ndarray, zoom: int) -> tuple[int, int]:
    """x, y of the pixel of the mask that is nearest to its middle."""
    rows, columns = np.nonzero(mask)
    nearest = int(np.argmin((rows - np.median(rows)) ** 2 + (columns - np.median(columns)) ** 2))
    return int(columns[nearest]) * zoom, int(rows[nearest]) * zoom


def _eroded(mask: np.ndarray) -> np.ndarray:
    """The mask without its border of one pixel."""
    inner = np.pad(mask, 1, mode="edge")
    return mask & inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]


def text_picture(text: str, size: int = 144) -> np.ndarray:
    """A few words on white, wrapped; what does not fit is cut off with dots."""
    picture = Image.new("RGB", (size, size), (255, 255, 255))
    lines = textwrap.wrap(text, max(size // 6, 8), max_lines=size // 15, placeholder=" …")
    ImageDraw.Draw(picture).text((6, 6), "\n".join(lines), fill=(30, 30, 30), spacing=5)
    return np.asarray(picture)


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
