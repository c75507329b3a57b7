"""SAM's masks as text tokens, as 4M-21 has them: what lies at a few points of the picture (see `points`).

4M draws the points anew at every reading; a stored row stays the same, so the label's own content decides them. A mask
is resized to its network's side (4M: 64) inside its box, and coded. Masks that no point hits are not in the row; one
that two points hit is there twice and comes back once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from fourmill.pipeline import masks
from fourmill.pipeline.component import ComponentConfig
from fourmill.tokenizers.coded import CodedTokenizer
from fourmill.tokenizers.sequences import points
from fourmill.tokenizers.sequences.bins import draws
from fourmill.tokenizers.sequences.boxes import box_of
from fourmill.tokenizers.sequences.points import SIDE, CodedMask, Query
from fourmill.tokenizers.text import SequenceTokenizerConfig


class SamInstanceTokenizerConfig(SequenceTokenizerConfig):
    """Configuration of the tokenizer of `sam_instance`."""

    max_tokens: int = Field(default=289, ge=1)
    """Longest row stored, in ids; what does not fit is left out mask by mask (4M: 290 with the end marker)."""
    masks: str
    """Checkpoint of the network that codes a mask, as `checkpoint` names the vocabulary's."""
    points: int = Field(default=7, ge=1, le=1024)
    """Points asked about (4M: 7)."""
    query: Literal["random", "instances"] = "random"
    """'random': anywhere (4M). 'instances': first one in each mask, so that as many masks as can be are in the row."""
    max_instances: int = Field(default=20, ge=1)
    """Masks used, best first (4M: 20, drawn)."""
    min_area: float = Field(default=0.0005, ge=0, lt=1)
    """Masks whose box is a smaller share of the picture are left out (4M: 0.0005)."""
    size: int = Field(default=224, ge=1, le=4096)
    """Side of the masks that decoding gives back, in pixels. Tokens do not depend on it."""


class SamInstanceTokenizer(CodedTokenizer):
    """Rows of points with their masks; values are lists of {box, mask, …}."""

    Config: ClassVar[type[ComponentConfig]] = SamInstanceTokenizerConfig
    version = 1
    setting, part, code_length = "masks", "mask", points.CODE
    config: SamInstanceTokenizerConfig  # type: ignore[assignment]

    def lineage(self) -> dict[str, Any]:
        lineage = super().lineage()
        lineage["config"].pop("size")
        return lineage

    def encode(self, values: Any) -> list[np.ndarray]:
        """B lists of masks -> B arrays (n,), n <= max_tokens."""
        asked = [self._ask(value) for value in values]
        hit = [{i for _, _, found in queries for i in found} for _, queries in asked]
        inner = [
            (b, i, inside(asked[b][0][i], self.settings.network.size))
            for b, numbers in enumerate(hit)
            for i in sorted(numbers)
        ]
        codes = self.code([cells for _, _, cells in inner])
        coded = {
            (b, i): CodedMask(grid_box(masks.box_of(asked[b][0][i])), ids)
            for (b, i, _), ids in zip(inner, codes, strict=True)
        }
        rows = [
            [Query(x, y, [coded[b, i] for i in found]) for x, y, found in queries]
            for b, (_, queries) in enumerate(asked)
        ]
        return self.rows([points.serialise(queries, self.bins) for queries in rows])

    def _ask(self, objects: Sequence[dict[str, Any]]) -> tuple[list[np.ndarray], list[tuple[int, int, list[int]]]]:
        """The masks that count, and the points x, y with the numbers of the masks they lie in."""
        large = [item for item in objects if _share(grid_box(box_of(item))) >= self.config.min_area]
        kept = [masks.decode(item["mask"]) for item in large[: self.config.max_instances]]
        drawn = draws([item["box"] for item in objects], 2 * self.config.points, SIDE)
        places = list(zip(drawn[::2], drawn[1::2], strict=True))
        if self.config.query == "instances":
            places = [*map(_inner_point, kept), *places][: self.config.points]
        return kept, [(x, y, [i for i, mask in enumerate(kept) if _at(mask, x, y)]) for x, y in places]

    def decode(self, tokens: Sequence[np.ndarray]) -> list[Any]:
        """B arrays of ids -> B lists of {score: 1, stability: 1, point, box, area, mask}, in the order of the row."""
        return [objects for objects, _ in self._read(tokens)]

    def parse(self, tokens: np.ndarray) -> tuple[list[dict[str, Any]], list[str]]:
        """The masks of a row of ids, and what of it was none; never fails for ids of the vocabulary."""
        return self._read([tokens])[0]

    def _read(self, tokens: Sequence[np.ndarray]) -> list[tuple[list[dict[str, Any]], list[str]]]:
        parsed = [points.parse(self.text(row), self.bins, self.settings.network.vocabulary) for row in tokens]
        unique = [_first_points(queries) for queries, _ in parsed]
        cells = iter(self.decoded([mask.ids for found in unique for mask in found]))
        return [
            self._objects(found, problems, [next(cells) for _ in found])
            for found, (_, problems) in zip(unique, parsed, strict=True)
        ]

    def _objects(
        self, found: dict[CodedMask, Query], problems: list[str], cells: Sequence[np.ndarray]
    ) -> tuple[list[dict[str, Any]], list[str]]:
        objects: list[dict[str, Any]] = []
        problems = list(problems)
        for (coded, query), inner in zip(found.items(), cells, strict=True):
            mask = placed(inner, coded.box, self.config.size)
            if not mask.any():
                problems.append(f"mask {coded.ids} in the box {coded.box} is empty")
                continue
            item = {"box": masks.box_of(mask), "area": int(mask.sum()), "mask": masks.encode(mask)}
            point = [round((v + 0.5) / SIDE, 6) for v in (query.x, query.y)]
            objects.append({"score": 1.0, "stability": 1.0, "point": point, **item})
        return objects, problems


def _first_points(queries: Sequence[Query]) -> dict[CodedMask, Query]:
    """Each mask once, with the first point that it lies at."""
    found: dict[CodedMask, Query] = {}
    for query in queries:
        for mask in query.masks:
            found.setdefault(mask, query)
    return found


def grid_box(box: Sequence[float]) -> tuple[int, int, int, int]:
    """A box in 0..1 as edges on 4M's grid, at least one pixel wide and high."""
    x0, y0, x1, y1 = (round(SIDE * value) for value in box)
    x0, y0 = min(x0, SIDE - 1), min(y0, SIDE - 1)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def _share(box: tuple[int, int, int, int]) -> float:
    x0, y0, x1, y1 = box
    return (x1 - x0) * (y1 - y0) / SIDE**2


def _at(mask: np.ndarray, x: int, y: int) -> bool:
    """Whether the middle of a pixel of the grid lies in the mask."""
    height, width = mask.shape
    return bool(mask[int((y + 0.5) * height / SIDE), int((x + 0.5) * width / SIDE)])


def _inner_point(mask: np.ndarray) -> tuple[int, int]:
    """The pixel of the grid at the mask's pixel nearest to its centre of mass."""
    pixels = np.argwhere(mask)
    y, x = pixels[np.square(pixels - pixels.mean(axis=0)).sum(axis=1).argmin()] + 0.5
    return int(x * SIDE / mask.shape[1]), int(y * SIDE / mask.shape[0])


def inside(mask: np.ndarray, side: int) -> np.ndarray:
    """A bool (H, W) mask within its own box as uint8 (side, side) of 0 and 1: a cell is in it by half of its area."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    resized = Image.fromarray(part.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)
    return (np.asarray(resized) >= 128).astype(np.uint8)


def placed(cells: np.ndarray, box: Sequence[float], size: int) -> np.ndarray:
    """uint8 (n, n) of 0 and 1 back in its box on the grid: a bool (size, size) mask, smooth between cells."""
    x0, y0, x1, y1 = (round(value * size / SIDE) for value in box)
    x0, y0 = min(x0, size - 1), min(y0, size - 1)
    width, height = max(x1 - x0, 1), max(y1 - y0, 1)
    resized = Image.fromarray(cells.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    mask = np.zeros((size, size), dtype=bool)
    mask[y0 : y0 + height, x0 : x0 + width] = np.asarray(resized) >= 128
    return mask
