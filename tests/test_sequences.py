"""Structured labels as text and back: palettes, metadata, outlines of objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sequences import BINS, build, instance, iou, square, star, write_vocabulary

from fourmill.pipeline import masks
from fourmill.tokenizers.sequences import metadata, palettes, polygons


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("words"))


# Palettes.

PALETTE = {"1": [[255, 0, 7]], "2": [[255, 0, 7], [1, 2, 3]], "3": [[9, 9, 9], [8, 8, 8], [7, 7, 7]]}


def test_palette_is_its_length_and_its_bytes() -> None:
    assert palettes.serialise(PALETTE, BINS, colors=2) == ["v1=2 v0=255 v0=0 v0=7 v0=1 v0=2 v0=3"]
    assert palettes.serialise(PALETTE, BINS, colors=7) == palettes.serialise(PALETTE, BINS, colors=3)
    assert palettes.serialise(PALETTE, BINS, colors=3, max_tokens=9) == palettes.serialise(PALETTE, BINS, colors=2)
    assert palettes.serialise({}, BINS) == []


def test_varied_palettes_have_every_length_and_always_the_same_one() -> None:
    many = [{str(n): [[i % 256, i // 256, n]] * n for n in range(1, 8)} for i in range(400)]
    lengths = [palettes.serialise(p, BINS)[0].split()[0] for p in many]
    assert {word: lengths.count(word) > 30 for word in set(lengths)} == {f"v1={n}": True for n in range(1, 8)}
    assert lengths == [palettes.serialise(p, BINS)[0].split()[0] for p in many]


def test_broken_palettes_are_named_and_the_whole_ones_kept() -> None:
    text = "v0=3 v1=1 v0=1 v0=2 v0=3 v1=2 v0=1 v0=2 v1=8 v1=1 v0=0 v0=0 v0=256 v1=1 v0=5 v0=5 v0=5 v1=1 v0=1 v2=2 v0=3"
    assert palettes.parse(text, BINS) == (
        {"1": [[1, 2, 3]]},
        [
            "'v0=3': no number of colours v1=1 to v1=7",
            "'v1=2 v0=1 v0=2': not 2 colours of three v0 each",
            "'v1=8': no number of colours v1=1 to v1=7",
            "'v1=1 v0=0 v0=0 v0=256': colour value 256 is above 255",
            "'v1=1 v0=5 v0=5 v0=5': a second palette of as many colours",
            "'v1=1 v0=1 v2=2 v0=3': not 1 colours of three v0 each",
        ],
    )


@pytest.mark.parametrize(
    ("palette", "message"),
    [
        ({"1": [[0, 0, 256]]}, r"bad colour \[0, 0, 256\]"),
        ({"1": [[0, 0]]}, "bad colour"),
        ({"2": [[0, 0, 0]]}, "bad palette 2: it holds 1 colours"),
    ],
)
def test_what_is_no_palette_is_refused(palette: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        palettes.serialise(palette, BINS)


@given(st.lists(st.lists(st.integers(0, 255), min_size=3, max_size=3), min_size=1, max_size=7))
@settings(max_examples=100, deadline=None)
def test_any_palette_comes_back_exactly_from_256_bins_and_within_half_a_bin_from_100(colors: list[list[int]]) -> None:
    palette = {str(len(colors)): colors}
    for bins in (1000, 256, 100):
        found, problems = palettes.parse(" ".join(palettes.serialise(palette, bins)), bins)
        away = np.abs(np.subtract(found[str(len(colors))], colors)).max()
        assert problems == []
        assert away <= (0 if bins >= 256 else 255 / 99 / 2 + 0.5)  # a byte is rounded once more on its way back


def test_palettes_as_tokens_of_the_demo_vocabulary() -> None:
    tokenizer = build("tok_color_palette", "demo:text", colors=2)
    row = tokenizer.encode([PALETTE, {}])
    assert [len(r) for r in row] == [7, 0]
    assert tokenizer.decode(row) == [{"2": [[255, 0, 8], [0, 3, 3]]}, {}]  # 100 bins: steps of 2.6


# Metadata.

FACTS = {
    "original_width": 1023,  # 31.97 steps of 32
    "original_height": 40_000,
    "caption_n_chars": 7,
    "n_humans": 1200,
    "colorfulness": 149.9,
    "brightness": 255,
    "contrast": -3.0,
    "entropy": 7.5,
    "geometric_complexity": 0.375,
    "watermark_score": 0.5,
    "aesthetic_score": 5.49,
}


def test_facts_have_the_ids_bins_and_clamps_of_4m_in_the_order_of_their_ids() -> None:
    shuffled = dict(sorted(FACTS.items()))
    assert metadata.serialise(shuffled, BINS) == [
        "v1=0 v0=31",
        "v1=1 v0=999",  # 1250 steps
        "v1=2 v0=7",
        "v1=5 v0=999",
        "v1=9 v0=48",  # 149.9 / 150 x 49 = 48.97, cut off
        "v1=10 v0=49",
        "v1=11 v0=0",
        "v1=13 v0=36",  # 0.75 x 49 = 36.75
        "v1=17 v0=24",
        "v1=19 v0=1",
        "v1=20 v0=1",
    ]


def test_all_facts_are_42_tokens_two_more_than_4m_reads(vocabulary: Path) -> None:
    row = build("tok_metadata", vocabulary).encode([dict.fromkeys(metadata.NAMES, 1)])[0]
    assert len(row) == 42
    assert len(build("tok_metadata", vocabulary, max_tokens=41).encode([dict.fromkeys(metadata.NAMES, 1)])[0]) == 40


def test_values_come_back_as_the_middle_of_their_bin() -> None:
    found, problems = metadata.parse(" ".join(metadata.serialise(FACTS, BINS)), BINS)
    assert problems == []
    assert found["original_width"] == 31 * 32 + 16
    assert found["caption_n_chars"] == 7
    assert found["colorfulness"] == pytest.approx(48.5 / 49 * 150)
    assert found["brightness"] == 255
    assert found["watermark_score"] == 0.75
    assert found["aesthetic_score"] == 5.0


def test_broken_facts_are_named_and_the_whole_ones_kept() -> None:
    text = "v0=1 v1=2 v0=7 v1=21 v0=1 v1=9 v0=50 v1=19 v0=2 v1=2 v0=8 v1=3 v1=4 v0=1 v0=2 cone"
    assert metadata.parse(text, BINS) == (
        {"caption_n_chars": 7},
        [
            "'v0=1': not a pair v1 v0",
            "'v1=21 v0=1': no fact has the id 21",
            "'v1=9 v0=50': colorfulness has no bin 50",
            "'v1=19 v0=2': watermark_score has no bin 2",
            "'v1=2 v0=8': caption_n_chars for the second time",
            "'v1=3': not a pair v1 v0",
            "'v1=4 v0=1 v0=2 cone': not a pair v1 v0",
        ],
    )


@pytest.mark.parametrize(
    ("facts", "bins", "message"),
    [
        ({"entropi": 1}, BINS, "unknown fact 'entropi'; did you mean 'entropy'"),
        ({"entropy": float("nan")}, BINS, "bad entropy nan"),
        ({"entropy": None}, BINS, "bad entropy None"),
        ({"n_humans": True}, BINS, "bad n_humans True"),
        ({"entropy": 1}, 49, "metadata needs 50 values of v0; the vocabulary has 49"),
    ],
)
def test_what_is_no_fact_is_refused(facts: dict[str, Any], bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metadata.serialise(facts, bins)


@given(st.dictionaries(st.sampled_from(metadata.NAMES), st.integers(0, 31_000) | st.floats(0, 300)), st.just(BINS))
@settings(max_examples=100, deadline=None)
def test_any_facts_come_back_within_half_a_bin(facts: dict[str, Any], bins: int) -> None:
    phrases = metadata.serialise(facts, bins)
    found, problems = metadata.parse(" ".join(phrases), bins)
    assert problems == []
    assert list(found) == [name for name in metadata.NAMES if name in facts]
    assert metadata.serialise(found, bins) == phrases  # in the same bins again
    for name, (low, high) in metadata.RANGES.items():
        if name in facts:
            assert abs(found[name] - min(max(facts[name], low), high)) <= (high - low) / 49 / 2 + 1e-9
    assert all(abs(found[name] - facts[name]) <= 16 for name in metadata.SIZES if name in facts)


# Outlines.


def test_outline_of_a_square_is_its_name_and_its_four_corners() -> None:
    # 8 of 32 pixels from the corner: 0.25 x 32 bins; the outline cuts the corners of pixels, less than the tolerance.
    found = polygons.serialise([instance("wine glass", square(8, 8, 16))], bins=33, tolerance=0.03)
    words = found[0].split()
    assert words[:2] == ["wine", "glass"]
    assert sorted(zip(words[2::2], words[3::2], strict=True)) == sorted(
        [("v0=8", "v1=8"), ("v0=24", "v1=8"), ("v0=24", "v1=24"), ("v0=8", "v1=24")]
    )


def test_pieces_of_an_object_are_marked_and_the_longest_written() -> None:
    parts = square(2, 2, 4) | square(10, 10, 12) | square(2, 20, 6)
    found = polygons.serialise([instance("cone", parts)], bins=33, tolerance=0.03)[0]
    assert found.count("polygon") == 2
    cut = polygons.serialise([instance("cone", parts)], bins=33, tolerance=0.03, max_outlines=2)[0]
    objects, problems = polygons.parse(cut, 33, size=32)
    assert problems == []
    assert iou(masks.decode(objects[0]["mask"]), square(10, 10, 12) | square(2, 20, 6)) > 0.95


def test_simplification_keeps_corners_and_stays_within_the_tolerance() -> None:
    line = np.array([(0.0, 0.0), (0.5, 0.01), (1.0, 0.0), (1.0, 1.0), (0.5, 0.98), (0.0, 1.0)])
    assert polygons.simplify(line, 0.015).tolist() == [[0, 0], [1, 0], [1, 1], [0.5, 0.98], [0, 1]]
    assert polygons.simplify(line, 0.0).tolist() == line.tolist()


def test_an_object_of_one_pixel_is_not_lost() -> None:
    found = polygons.serialise([instance("cone", square(31, 0, 1))], bins=5)
    assert found == ["cone v0=0 v1=4 v0=0 v1=4 v0=0 v1=4 v0=0 v1=4"]
    (item,), problems = polygons.parse(found[0], 5, size=32)
    assert problems == []
    assert np.argwhere(masks.decode(item["mask"])).tolist() == [[31, 0]]


def test_broken_outlines_are_named_and_the_whole_ones_kept() -> None:
    ring = "v0=1 v1=1 v0=3 v1=1 v0=3 v1=3"
    text = (
        f"v0=1 polygon {ring} cone {ring} polygon v0=1 v1=1 v0=9 v1=1 v0=1 v1=1 box v0=1 v1=2 v0=3 cone box {ring} red"
    )
    objects, problems = polygons.parse(text, 5, size=16)
    assert [o["class_name"] for o in objects] == ["cone", "cone box"]
    assert objects[0]["mask"] == objects[1]["mask"]
    assert objects[0]["area"] == int(masks.decode(objects[0]["mask"]).sum())
    assert problems == [
        "'v0=1': not three or more pairs v0 v1",
        "'polygon v0=1 v1=1 v0=3 v1=1 v0=3 v1=3': an outline without a class name",
        "'polygon v0=1 v1=1 v0=9 v1=1 v0=1 v1=1': coordinate 9 is not below 5",
        "'box v0=1 v1=2 v0=3': not three or more pairs v0 v1",
        "'red': not three or more pairs v0 v1",
    ]


def test_a_class_called_polygon_is_refused() -> None:
    with pytest.raises(ValueError, match="the word marks a further outline"):
        polygons.serialise([instance("Polygon", square(1, 1, 4))], BINS)


def test_instances_are_cut_between_objects_in_the_configured_order(vocabulary: Path) -> None:
    objects = [instance("cone", square(16, 16, 8), 0.9), instance("wine glass", square(0, 0, 8), 0.7)]
    tokenizer = build("tok_instance", vocabulary, tolerance=0.03, size=32)
    row = tokenizer.encode([objects])[0]
    assert [len(row), tokenizer.text(row).split()[0]] == [18, "wine"]
    assert build("tok_instance", vocabulary, order="score", tolerance=0.03).text(row)[:4] == "wine"
    short = build("tok_instance", vocabulary, order="score", tolerance=0.03, max_tokens=17, size=32)
    (kept,) = short.decode(short.encode([objects]))
    assert [o["class_name"] for o in kept] == ["cone"]
    assert iou(masks.decode(kept[0]["mask"]), square(16, 16, 8)) > 0.9  # 32 x 0.03 is a pixel: corners are cut


@given(st.lists(st.floats(0.15, 0.45), min_size=5, max_size=12), st.sampled_from([0.0, 0.005, 0.02]))
@settings(max_examples=60, deadline=None)
def test_any_outline_comes_back_but_for_pixels_near_it(radii: list[float], tolerance: float) -> None:
    mask = star(radii, 64)
    phrases = polygons.serialise([instance("cone", mask)], BINS, tolerance, max_outlines=100)
    objects, problems = polygons.parse(" ".join(phrases), BINS, size=64)
    assert problems == []
    assert [o["class_name"] for o in objects] == ["cone"]
    wrong = np.argwhere(masks.decode(objects[0]["mask"]) != mask)
    inside, outside = np.argwhere(mask), np.argwhere(~mask)
    for pixel in wrong:  # each lies near a pixel of the other side: on the border
        other = outside if mask[tuple(pixel)] else inside
        assert np.sqrt(np.square(other - pixel).sum(axis=1).min()) <= 64 * (tolerance + 0.5 / 999) + 1.5
