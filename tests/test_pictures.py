"""How labels without a network are drawn: exact pixels of small values."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fourmill.labelers.check import check
from fourmill.pipeline.pictures import edge_picture, facts_picture, palette_picture

RED, BLUE, WHITE = [220, 20, 10], [0, 40, 200], [255, 255, 255]


def test_edges_are_white_on_black() -> None:
    painted = edge_picture(np.array([[0, 255], [128, 0]], np.uint8))
    assert painted.dtype == np.uint8
    assert painted.tolist() == [[[0, 0, 0], WHITE], [[128, 128, 128], [0, 0, 0]]]


def test_palettes_are_rows_of_swatches_the_shortest_on_top() -> None:
    painted = palette_picture({"2": [RED, BLUE], "1": [BLUE]}, size=8)
    assert painted.shape == (8, 8, 3)
    assert painted[:3].tolist() == [[BLUE] * 8] * 3
    assert painted[4:7].tolist() == [[RED] * 4 + [BLUE] * 4] * 3
    assert painted[[3, 7]].tolist() == [[WHITE] * 8] * 2  # lines between


def test_more_palettes_than_rows_are_drawn_all_the_same() -> None:
    assert palette_picture({str(n): [RED] * n for n in range(1, 8)}, size=4).shape == (4, 4, 3)


def test_facts_have_a_line_each_and_say_how_many_did_not_fit() -> None:
    facts = {f"fact_{n}": n / 3 for n in range(9)}
    whole, cut = facts_picture(facts, size=160), facts_picture(facts, size=64)
    assert (whole.shape, cut.shape) == ((160, 160, 3), (64, 64, 3))
    assert _lines(whole) == 9
    assert _lines(cut) == 4  # three facts, and how many more there are
    assert _lines(facts_picture({}, size=64)) == 0


def _lines(picture: np.ndarray) -> int:
    """Rows of text: runs of pixel rows that are not all white."""
    written = (picture < 250).any(axis=(1, 2)).astype(int)
    return int((np.diff(written, prepend=0) == 1).sum())


def test_check_tells_and_draws_what_needs_no_network(tmp_path: Path) -> None:
    for kind, words in (
        ("canny_edge", "uint8 (64, 64), 0 to 255"),
        ("color_palette", "1 #"),
        ("metadata", "brightness "),
    ):
        found = check(kind, out=str(tmp_path / f"{kind}.png"), size=64, batch=2)
        assert found.problems == {}
        assert found.outputs[kind].startswith(words)
        assert (tmp_path / f"{kind}.png").stat().st_size > 1000
