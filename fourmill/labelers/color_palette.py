"""The dominant colours of a picture, no network: its palettes of 1 to 7 colours.

4M made them with PyPalette, which is k-means on RGB pixels from random beginnings. Ours has two beginnings, the same
every time, and the better end counts: the palette of n - 1 colours and the colour that it fits worst; and n colours
that lie far apart. Invariants: sums are of whole numbers, so a palette does not depend on the machine; a longer palette
fits the picture at least as well. (Against the best of 20 random beginnings, over 2 to 7 colours of 8 pictures:
1.7 % more misfit in the mean, at most 20 %; the median random beginning has 3.2 %, at most 30 %.)

Pixels are gathered in cells of 8 x 8 x 8 colours first (600 to 2,600 are in use, against 50,000 pixels); a cell
stands for its pixels' mean colour, so colours less than 8 levels apart may count as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from fourmill.labelers.base import Labeler, LabelerConfig
from fourmill.pipeline.component import Batch, ComponentConfig
from fourmill.pipeline.shards import Spec

_CELL = 3  # bits of a channel's value that lie within a cell
_ROUNDS = 64  # of k-means; 5 to 25 are usual


class ColorPaletteConfig(LabelerConfig):
    """Configuration of the palettes."""

    batch_size: int | None = Field(default=16, ge=1)
    colors: int = Field(default=7, ge=1, le=7)
    """Longest palette (4M: 7); all shorter ones are made too."""


class ColorPalette(Labeler):
    """`color_palette`: {"1": [[r, g, b]], "2": [two colours], …}, 0..255, the colour of most pixels first. A picture of
    fewer colours has fewer palettes."""

    Config: ClassVar[type[ComponentConfig]] = ColorPaletteConfig
    config: ColorPaletteConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("rgb",)

    @property
    def makes(self) -> tuple[str, ...]:
        return ("color_palette",)

    def spec(self, modality: str) -> Spec:
        return Spec()

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        assert batch.pixels is not None
        return {"color_palette": [palettes(pixels, self.config.colors) for pixels in batch.pixels]}


@dataclass(frozen=True)
class Cells:
    """The colours of a picture: `counts` (N,) pixels of each cell, `sums` (N, 3) of their values, both int64, and
    `means` (N, 3), float64."""

    counts: np.ndarray
    sums: np.ndarray
    means: np.ndarray

    @classmethod
    def of(cls, pixels_3HW: np.ndarray) -> Cells:
        colours = pixels_3HW.reshape(3, -1).astype(np.int64)
        red, green, blue = colours >> _CELL
        bits = 8 - _CELL
        cell, number = (red << 2 * bits) | (green << bits) | blue, 1 << 3 * bits
        counts = np.bincount(cell, minlength=number)
        sums = np.stack([_totals(cell, channel, number) for channel in colours], axis=1)
        used = counts > 0
        return cls(counts[used], sums[used], np.asfortranarray(sums[used] / counts[used, None]))

    def grouped(self, groups_N: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (K,) and sums of their values (K, 3) of each of `number` groups of cells."""
        sums = [_totals(groups_N, self.sums[:, channel], number) for channel in range(3)]
        return _totals(groups_N, self.counts, number), np.stack(sums, axis=1)

    def centres(self, groups_N: np.ndarray, number: int) -> np.ndarray:
        """The mean colour (K, 3) of each group; infinitely far away for a group without cells."""
        counts, sums = self.grouped(groups_N, number)
        return np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], np.inf)

    def explained(self, groups_N: np.ndarray) -> float:
        """How much of the colours' sum of squares the groups' means account for: what is left is the misfit."""
        counts, sums = self.grouped(groups_N, int(groups_N.max()) + 1)
        groups = zip(counts.tolist(), sums.tolist(), strict=True)
        return sum(sum(total * total for total in totals) / count for count, totals in groups if count)


def _totals(groups_N: np.ndarray, values_N: np.ndarray, number: int) -> np.ndarray:
    """int64 (K,): the sum over each group; exact, since float64 counts to 2^53."""
    return np.bincount(groups_N, weights=values_N, minlength=number).astype(np.int64)


def palettes(pixels_3HW: np.ndarray, longest: int = 7) -> dict[str, list[list[int]]]:
    """The palettes of one picture, uint8 (3, H, W)."""
    cells = Cells.of(pixels_3HW)
    nearest = np.zeros(len(cells.counts), np.int64)
    centres = cells.centres(nearest, 1)
    found = {"1": _ordered(cells, nearest)}
    apart = cells.means[[cells.counts.argmax()]]
    for length in range(2, min(longest, len(cells.counts)) + 1):
        apart = with_worst(cells, apart)
        ends = [k_means(cells, begin) for begin in (with_worst(cells, centres), apart)]
        centres, nearest = max(ends, key=lambda end: cells.explained(end[1]))
        palette = _ordered(cells, nearest)
        if len(palette) < length:  # a group has lost all its cells to the others
            break
        found[str(length)] = palette
    return found


def with_worst(cells: Cells, centres_K3: np.ndarray) -> np.ndarray:
    """The centres (K + 1, 3) with the cell that adds most to their misfit."""
    misfit = cells.counts * squared_distances(cells.means, centres_K3).min(axis=0)
    return np.concatenate([centres_K3, cells.means[[misfit.argmax()]]])


def k_means(cells: Cells, centres_K3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's iteration: the means of the cells nearest to each centre, and which is nearest to each cell (N,)."""
    nearest = squared_distances(cells.means, centres_K3).argmin(axis=0)
    for _ in range(_ROUNDS):
        centres_K3 = cells.centres(nearest, len(centres_K3))
        before, nearest = nearest, squared_distances(cells.means, centres_K3).argmin(axis=0)
        if np.array_equal(before, nearest):
            break
    return centres_K3, nearest


def squared_distances(colours_N3: np.ndarray, centres_K3: np.ndarray) -> np.ndarray:
    """float64 (K, N)."""
    red, green, blue = ((centres_K3[:, [c]] - colours_N3[:, c]) ** 2 for c in range(3))
    return red + green + blue


def _ordered(cells: Cells, nearest_N: np.ndarray) -> list[list[int]]:
    """The mean colour of each group of cells, rounded, the largest group first."""
    counts, sums = cells.grouped(nearest_N, int(nearest_N.max()) + 1)
    groups = [(int(count), totals.tolist()) for count, totals in zip(counts, sums, strict=True) if count]
    colours = [(count, [(2 * total + count) // (2 * count) for total in totals]) for count, totals in groups]
    return [colour for _, colour in sorted(colours, key=lambda pair: (-pair[0], pair[1]))]
