"""Crops are a function of seed, key and index, stay inside the picture, and carry boxes with the pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fourmill.pipeline.geometry import Crop, CropConfig, apply_crop, draw_crops

SIDES = st.integers(1, 3000)


def config(**fields: object) -> CropConfig:
    return CropConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("height", "width", "crop"),
    [
        (480, 640, (0, 80, 480, 480, 0)),
        (640, 480, (80, 0, 480, 480, 0)),
        (7, 4, (1, 0, 4, 4, 0)),
        (1, 1, (0, 0, 1, 1, 0)),
    ],
)
def test_crop_0_is_the_largest_centred_square(height: int, width: int, crop: tuple[int, ...]) -> None:
    assert draw_crops("any", height, width, config(count=3))[0] == crop


def test_crops_of_one_key_are_always_these() -> None:
    # Written down: a change of numpy's generator or of ours would silently move every crop of a dataset.
    crops = draw_crops("000000123", 480, 640, config(count=3, seed=7))
    assert crops == [(0, 80, 480, 480, 0), (21, 5, 440, 587, 0), (0, 80, 480, 480, 1)]


def test_crops_depend_on_seed_key_and_index_and_on_nothing_else() -> None:
    def drawn(key: str, **fields: object) -> list[Crop]:
        return draw_crops(key, 480, 640, config(**{"count": 4, **fields}))

    assert drawn("a") == drawn("a")
    assert drawn("a", count=8)[:4] == drawn("a")  # more crops leave the earlier ones
    assert drawn("a", size=512) == drawn("a")
    assert drawn("a")[1:] != drawn("b")[1:]
    assert drawn("a")[1:] != drawn("a", seed=1)[1:]
    assert len(set(drawn("a"))) == 4


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=20), SIDES, SIDES, st.integers(0, 2**40), st.floats(0.01, 1.0))
def test_every_crop_lies_inside_the_picture(key: str, height: int, width: int, seed: int, min_scale: float) -> None:
    for crop in draw_crops(key, height, width, config(count=4, seed=seed, min_scale=min_scale)):
        assert crop.top >= 0
        assert crop.left >= 0
        assert crop.height >= 1
        assert crop.width >= 1
        assert crop.top + crop.height <= height
        assert crop.left + crop.width <= width
        assert crop.flip in (0, 1)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20), st.integers(200, 2000), st.integers(200, 2000))
def test_random_crops_keep_to_the_stated_area_and_aspect(key: str, height: int, width: int) -> None:
    for crop in draw_crops(key, height, width, config(count=4))[1:]:
        if crop.height == crop.width == min(height, width):
            continue  # the fallback of pictures too elongated for any draw
        assert 0.79 <= crop.height * crop.width / (height * width) <= 1.0
        assert math.log(0.74) <= math.log(crop.width / crop.height) <= math.log(1.36)


def test_half_of_the_random_crops_are_mirrored_and_none_if_told_so() -> None:
    flips = [draw_crops(f"{i}", 100, 100, config(count=2))[1].flip for i in range(400)]
    assert 160 <= sum(flips) <= 240  # four standard deviations
    assert not any(draw_crops(f"{i}", 100, 100, config(count=2, flip=False))[1].flip for i in range(50))


def test_apply_crop_takes_exactly_the_pixels_and_mirrors_them() -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    picture = Image.fromarray(pixels)
    np.testing.assert_array_equal(apply_crop(picture, Crop(1, 2, 3, 3, 0), 3), pixels[1:4, 2:5])
    np.testing.assert_array_equal(apply_crop(picture, Crop(1, 2, 3, 3, 1), 3), pixels[1:4, 2:5][:, ::-1])


def test_apply_crop_resizes_to_the_asked_square() -> None:
    flat = apply_crop(Image.new("RGB", (50, 30), (10, 20, 30)), Crop(0, 0, 30, 50, 0), 224)
    assert (flat.shape, flat.dtype) == ((224, 224, 3), np.uint8)
    assert (flat == (10, 20, 30)).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_box_moves_with_its_pixels(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(40, 90)), data.draw(st.integers(40, 90))
    top, left = data.draw(st.integers(0, height - 12)), data.draw(st.integers(0, width - 12))
    bottom, right = data.draw(st.integers(top + 8, height)), data.draw(st.integers(left + 8, width))
    crop = data.draw(st.sampled_from(draw_crops(data.draw(st.text(max_size=5)), height, width, config(count=5))))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    box = np.array([[left / width, top / height, right / width, bottom / height]])

    size = 400  # a pixel of the picture becomes four or more, so half of one is 2 to 5 of these
    moved, kept = crop.boxes(box, height, width)
    lit = apply_crop(Image.fromarray(pixels), crop, size)[..., 0] > 127
    assert bool(kept[0]) == bool(lit.any())
    if lit.any():
        ys, xs = np.nonzero(lit)
        found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(found - moved[0] * size).max() <= 2.0 + size / min(crop.height, crop.width) / 2


def test_boxes_are_clipped_mirrored_and_told_apart_from_those_left_outside() -> None:
    boxes = np.array([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.25, 1.0]])
    moved, kept = Crop(0, 50, 100, 50, 0).boxes(boxes, 100, 100)  # the right half
    assert kept.tolist() == [False, True, False]
    np.testing.assert_allclose(moved[1], [0.0, 0.5, 1.0, 1.0])
    moved, kept = Crop(0, 0, 100, 50, 1).boxes(boxes, 100, 100)  # the left half, mirrored
    assert kept.tolist() == [True, False, True]
    np.testing.assert_allclose(moved[[0, 2]], [[0.0, 0.0, 1.0, 0.5], [0.5, 0.0, 1.0, 1.0]])


def test_no_boxes_stay_no_boxes() -> None:
    moved, kept = Crop(0, 0, 5, 5, 1).boxes(np.empty((0, 4)), 10, 10)
    assert (moved.shape, kept.shape) == ((0, 4), (0,))


@pytest.mark.parametrize("fields", [{"size": 8}, {"count": 0}, {"min_scale": 0}, {"min_scale": 1.5}, {"sise": 224}])
def test_impossible_settings_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        config(**fields)
