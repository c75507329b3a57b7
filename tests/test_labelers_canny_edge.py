"""Edges: literal pictures, the definition pixel by pixel, and scikit-image's detector."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from skimage.feature import canny as skimage_canny
from skimage.measure import label

from fourmill.labelers import LABELERS
from fourmill.labelers.canny_edge import canny, connected, grey_levels, is_crest, smoothed, sobel
from fourmill.modalities import modality
from fourmill.pipeline import codecs
from fourmill.pipeline.component import Batch
from fourmill.scenes import render


def noise(count: int, size: int) -> np.ndarray:
    """int32 (count, size, size): blotches and noise, so that there are lines of every direction and length."""
    rng = np.random.default_rng(11)
    blotches = [Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)) for _ in range(count)]
    smooth = np.stack([np.asarray(b.resize((size, size), Image.Resampling.BICUBIC), dtype=np.int32) for b in blotches])
    return np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.int32)


def drawn(edges: np.ndarray) -> list[str]:
    return ["".join(".#"[int(v)] for v in row) for row in edges]


def test_square_is_outlined_once() -> None:
    grey = np.zeros((1, 10, 10), dtype=np.int32)
    grey[0, 3:8, 3:8] = 200
    assert drawn(canny(grey, 100, 200)[0]) == [
        "..........",
        "..........",
        "....###...",
        "...#...#..",
        "..#....#..",
        "..#....#..",
        "..#....#..",
        "...#####..",
        "..........",
        "..........",
    ]


def test_slanted_step_is_a_slanted_line() -> None:
    grey = np.tril(np.full((8, 8), 200, dtype=np.int32))
    rising, falling = canny(np.stack([grey[:, ::-1], grey]), 100, 200)
    assert drawn(falling)[2:6] == ["..##....", "...##...", "....##..", ".....##."]
    assert drawn(rising)[2:6] == ["....##..", "...##...", "..##....", ".##....."]


def test_thresholds_are_four_times_the_step() -> None:
    grey = np.zeros((1, 8, 8), dtype=np.int32)
    grey[:, :, 4:] = 50
    assert canny(grey, 199, 199).sum() == 8
    assert canny(grey, 100, 200).sum() == 0  # nothing is above 200, so no line begins


def test_weak_line_stays_where_a_strong_one_goes_on_and_alone_vanishes() -> None:
    grey = np.zeros((2, 12, 8), dtype=np.int32)
    grey[0, :, 4:] = np.linspace(80, 10, 12).astype(np.int32)[:, None]  # |dx| from 320 to 40, 140 in row 7
    grey[1, :, 4:] = 35  # |dx| of 140 everywhere
    fading, weak = canny(grey, 100, 200)
    assert drawn(fading) == ["....#..."] * 10 + ["........"] * 2
    assert not weak.any()


def test_lines_do_not_cross_from_one_picture_into_the_next() -> None:
    seeds, allowed = np.zeros((3, 4, 4), dtype=bool), np.zeros((3, 4, 4), dtype=bool)
    allowed[0, 3], allowed[1], allowed[2, 0] = True, True, True
    seeds[1, 3, 3] = True
    assert connected(seeds, allowed).sum(axis=(1, 2)).tolist() == [0, 16, 0]


def test_grey_is_what_pillow_makes() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        grey_levels(picture.transpose(2, 0, 1)[None])[0], Image.fromarray(picture).convert("L")
    )


def test_crests_are_those_of_the_definition() -> None:
    grey = noise(2, 24)
    dx, dy = sobel(grey)
    magnitude = np.abs(dx) + np.abs(dy)
    np.testing.assert_array_equal(
        is_crest(magnitude, dx, dy), np.stack([_crests(*g) for g in zip(dx, dy, strict=True)])
    )


def _crests(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """By angles, one pixel after the other."""
    height, width = dx.shape
    magnitude = np.pad(np.abs(dx) + np.abs(dy), 1)
    found = np.zeros((height, width), dtype=bool)
    for y in range(height):
        for x in range(width):
            sector = round(math.degrees(math.atan2(dy[y, x], dx[y, x])) / 45) % 4
            down, right = [(0, 1), (1, 1), (1, 0), (1, -1)][sector]
            here = magnitude[y + 1, x + 1]
            before, after = magnitude[y + 1 - down, x + 1 - right], magnitude[y + 1 + down, x + 1 + right]
            found[y, x] = here > before and (here > after or (here == after and sector in (0, 2)))
    return found


def test_connected_pixels_are_the_components_that_hold_a_seed() -> None:
    for strength in noise(3, 60):
        seeds, allowed = strength > 170, strength > 120
        components = label(allowed, connectivity=2)  # the 8 neighbours
        expected = allowed & np.isin(components, components[seeds])
        assert 0 < seeds.sum() < expected.sum() < allowed.sum()
        np.testing.assert_array_equal(connected(seeds[None], allowed[None])[0], expected)


def test_scikit_images_edges_are_found_beside_ours() -> None:
    """It measures the gradient by its length, which is smaller than |dx| + |dy|: ours are more."""
    grey = noise(1, 96)
    ours = canny(grey, 20, 40, sigma=1.5)[0]
    theirs = skimage_canny(grey[0].astype(float), sigma=1.5, low_threshold=20, high_threshold=40)
    near = [np.roll(ours, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    around = np.logical_or.reduce(near)
    assert theirs.sum() > 300
    assert around[theirs].mean() > 0.97


def test_gaussian_keeps_an_even_grey_and_spreads_a_point() -> None:
    assert (smoothed(np.full((1, 9, 9), 137), 1.3) == 137).all()
    point = np.zeros((1, 21, 21), dtype=np.int32)
    point[0, 10, 10] = 255
    assert smoothed(point, 1.0)[0, 10, 8:13].tolist() == [5, 25, 41, 25, 5]  # 255 / (2 pi) exp(-d^2 / 2)


def test_labeler_gives_each_picture_the_same_edges_in_any_batch() -> None:
    made = LABELERS.build("canny_edge", {})
    pixels = np.stack([render(5, i, 64).image.transpose(2, 0, 1) for i in range(4)])
    together = made.run(Batch(list("abcd"), pixels))["canny_edge"]
    assert [(e.dtype, e.shape) for e in together] == [(np.uint8, (64, 64))] * 4
    assert set(np.unique(together)) == {0, 255}
    for index, edges in enumerate(together):
        np.testing.assert_array_equal(made.run(Batch(["x"], pixels[index : index + 1]))["canny_edge"][0], edges)


def test_edges_are_stored_without_loss_and_values_beyond_bytes_are_refused() -> None:
    entry, edges = modality("canny_edge"), (noise(1, 32)[0] > 128).astype(np.uint8) * 255
    stored = codecs.encode(entry, edges)
    np.testing.assert_array_equal(codecs.decode(entry, stored), edges)
    assert stored[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"canny_edge must be \(H, W\) with values 0..255, not \(1, 1\) up to 510"):
        codecs.settle(entry, np.array([[510]]))


def test_even_picture_has_no_edges() -> None:
    made = LABELERS.build("canny_edge", {"low": 0, "high": 0})
    assert not made.run(Batch(["a"], np.full((1, 3, 16, 16), 90, dtype=np.uint8)))["canny_edge"][0].any()


def test_thresholds_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValueError, match="low 200 is above high 100: a line would end before it begins"):
        LABELERS.build("canny_edge", {"low": 200, "high": 100})
