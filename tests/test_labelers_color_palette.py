"""Palettes: pictures of known colours, and what k-means promises."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from fourmill.labelers import LABELERS
from fourmill.labelers.color_palette import Cells, k_means, palettes
from fourmill.pipeline.component import Batch
from fourmill.scenes import render

RED, BLUE, WHITE = (220, 20, 10), (0, 40, 200), (255, 255, 255)


def striped(*stripes: tuple[tuple[int, int, int], int]) -> np.ndarray:
    """uint8 (3, 10, 10): (colour, rows) from top to bottom."""
    rows = np.concatenate([np.tile(np.array(colour, np.uint8), (count, 10, 1)) for colour, count in stripes])
    return rows.transpose(2, 0, 1)


def scene(index: int) -> np.ndarray:
    return np.ascontiguousarray(render(5, index, 96).image.transpose(2, 0, 1))


def misfit(pixels: np.ndarray, colours: list[list[int]]) -> float:
    """Mean squared distance of pixels to the nearest colour."""
    distances = ((pixels.reshape(3, -1, 1).astype(float) - np.array(colours).T[:, None]) ** 2).sum(axis=0)
    return float(distances.min(axis=1).mean())


def test_two_colours_come_back_exactly_the_larger_first() -> None:
    found = palettes(striped((RED, 3), (BLUE, 7)))
    assert found == {"1": [[66, 34, 143]], "2": [list(BLUE), list(RED)]}  # 0.3 red + 0.7 blue


def test_a_picture_of_three_colours_has_three_palettes() -> None:
    found = palettes(striped((WHITE, 6), (RED, 1), (BLUE, 3)))
    assert list(found) == ["1", "2", "3"]
    assert found["3"] == [list(WHITE), list(BLUE), list(RED)]
    assert found["2"] == [list(WHITE), [55, 35, 153]]  # red and blue are nearer to each other than to white


def test_one_colour_has_one_palette() -> None:
    assert palettes(striped((RED, 10))) == {"1": [list(RED)]}


def test_equal_shares_come_in_the_order_of_their_values() -> None:
    assert palettes(striped((RED, 5), (BLUE, 5)))["2"] == palettes(striped((BLUE, 5), (RED, 5)))["2"]


def test_longer_palettes_fit_better() -> None:
    for index in range(4):
        pixels = scene(index)
        found = palettes(pixels)
        assert [len(found[str(n)]) for n in range(1, 8)] == list(range(1, 8))
        errors = [misfit(pixels, found[str(n)]) for n in range(1, 8)]
        assert all(later < earlier for earlier, later in pairwise(errors))
        assert errors[6] < 0.2 * errors[0]


def test_palette_of_one_is_the_mean_rounded() -> None:
    pixels = scene(2)
    assert palettes(pixels)["1"] == [np.floor(pixels.reshape(3, -1).mean(axis=1) + 0.5).astype(int).tolist()]


def test_k_means_ends_where_every_centre_is_the_mean_of_what_is_nearest_to_it() -> None:
    cells = Cells.of(scene(1))
    centres, nearest = k_means(cells, cells.means[[0, len(cells.means) // 2, -1]])
    distances = ((cells.means[:, None] - centres[None]) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(nearest, distances.argmin(axis=1))
    for number in range(3):
        mine = nearest == number
        np.testing.assert_allclose(centres[number], np.average(cells.means[mine], axis=0, weights=cells.counts[mine]))


def test_cells_keep_every_pixel_and_its_value() -> None:
    pixels = scene(3)
    cells = Cells.of(pixels)
    assert cells.counts.sum() == 96 * 96
    np.testing.assert_array_equal(cells.sums.sum(axis=0), pixels.reshape(3, -1).sum(axis=1))


def test_group_that_loses_all_its_cells_ends_the_palettes(monkeypatch: pytest.MonkeyPatch) -> None:
    def merged(cells: Cells, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return centres, np.zeros(len(cells.counts), dtype=np.int64)

    monkeypatch.setattr("fourmill.labelers.color_palette.k_means", merged)
    assert list(palettes(striped((RED, 3), (BLUE, 7)))) == ["1"]


def test_labeler_makes_plain_lists_alike_in_any_batch() -> None:
    made = LABELERS.build("color_palette", {"colors": 3})
    pixels = np.stack([scene(0), scene(1)])
    first, second = made.run(Batch(["a", "b"], pixels))["color_palette"]
    assert list(first) == ["1", "2", "3"]
    assert {type(v) for palette in first.values() for colour in palette for v in colour} == {int}
    assert made.run(Batch(["b"], pixels[1:]))["color_palette"] == [second]


def test_more_colours_than_4m_has_words_for_are_refused() -> None:
    with pytest.raises(ValueError, match="less than or equal to 7"):
        LABELERS.build("color_palette", {"colors": 8})
