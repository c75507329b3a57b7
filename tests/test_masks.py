"""Run lengths, boxes and polygons of masks: exact on small cases, total on hostile input."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fourmill.pipeline import masks
from fourmill.scenes import render


def test_runs_go_down_the_columns_and_begin_with_background() -> None:
    mask = np.array([[0, 1, 1], [0, 1, 0]], dtype=bool)
    # Columns: 00 11 10 -> 2 off, 3 on, 1 off; as characters 48 + count.
    assert masks.encode(mask) == {"size": [2, 3], "counts": "231"}
    assert masks.decode({"size": [2, 3], "counts": "231"}).tolist() == mask.tolist()


@settings(max_examples=100, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_masks_come_back(mask: np.ndarray) -> None:
    assert np.array_equal(masks.decode(masks.encode(mask)), mask)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30), st.integers(-2, 10**6), st.integers(-2, 10**6))
def test_any_text_is_a_mask_or_a_clear_error(counts: str, height: int, width: int) -> None:
    with contextlib.suppress(ValueError):  # and nothing else: no crash, no other kind of error
        assert masks.decode({"size": [height, width], "counts": counts}).shape == (height, width)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [2, 3], "counts": "23"}, "its runs fill 5 of 2 x 3 pixels"),
        ({"size": [2, 3], "counts": "2310000009"}, "a run of"),
        ({"size": [2, 3], "counts": "2P"}, "counts are cut off"),
        ({"size": [2, 3], "counts": "2\n"}, "is not a COCO count"),
        ({"size": [100000, 100000], "counts": "0"}, "is outside 1..8192"),
        ({"size": "23", "counts": "0"}, "is not \\[height, width\\]"),
        ({"counts": "0"}, "size None"),
    ],
)
def test_bad_masks_are_named(rle: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masks.decode(rle)


def test_box_is_the_half_open_extent() -> None:
    mask = np.zeros((4, 8), dtype=bool)
    mask[1, 2] = mask[2, 5] = True
    assert masks.box_of(mask) == [0.25, 0.25, 0.75, 0.75]
    with pytest.raises(ValueError, match="an empty mask has no box"):
        masks.box_of(np.zeros((4, 4), dtype=bool))


def test_polygons_of_a_rectangle_pass_half_a_pixel_outside_its_centres() -> None:
    mask = np.zeros((10, 10), dtype=bool)
    mask[2:5, 3:8] = True
    (outline,) = masks.polygons(mask)
    x, y = outline[::2], outline[1::2]
    assert (min(x), max(x), min(y), max(y)) == (0.3, 0.8, 0.2, 0.5)


def test_polygons_fill_to_the_mask_again_and_drop_holes() -> None:
    for index in range(6):
        scene = render(6, index, 96)
        for thing in scene.objects:
            mask = scene.instances == thing.instance
            again = masks.from_polygons(masks.polygons(mask), mask.shape)
            assert (again & mask).sum() >= 0.97 * (again | mask).sum()
    ring = np.ones((12, 12), dtype=bool)
    ring[4:8, 4:8] = False
    assert masks.from_polygons(masks.polygons(ring), (12, 12)).sum() > ring.sum()  # filled


def test_polygons_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="three or more points x, y, not 4 numbers"):
        masks.from_polygons([[0, 0, 1, 1]], (8, 8))
