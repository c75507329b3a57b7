"""How labels are drawn, and how pictures stand in a page: exact pixels of small values."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from fourmill.labelers.check import check
from fourmill.pipeline.page import data_uri
from fourmill.pipeline.pictures import (
    box_picture,
    class_colour,
    class_picture,
    depth_picture,
    depth_ramp,
    edge_picture,
    facts_picture,
    palette_picture,
)

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


def test_depth_is_yellow_near_violet_far_and_darker_with_every_step() -> None:
    painted = depth_picture(np.array([[1.0, 2.0, 3.0, 9.0]], np.float32), 1, 3)
    assert painted[0].tolist() == [[253, 231, 36], [32, 144, 140], [68, 1, 84], [68, 1, 84]]  # viridis, from its end
    light = depth_picture(np.linspace(0, 1, 50)[None], 0, 1)[0] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) < 0).all()


def test_scale_beside_depth_has_its_colours() -> None:
    colours = depth_ramp().removeprefix("linear-gradient(90deg, ").removesuffix(")").split(", ")
    ends = depth_picture(np.array([[0.0, 1.0]]), 0, 1)[0]
    assert [colours[0], colours[-1]] == ["#" + bytes(end).hex() for end in ends]


def test_legend_has_the_colours_of_the_class_map() -> None:
    painted = class_picture(np.array([[0, 7, 255]], np.uint8))[0]
    assert [class_colour(i) for i in (0, 7, 255)] == ["#" + bytes(colour).hex() for colour in painted]


def test_boxes_have_names_and_scores_on_plates_that_stay_inside() -> None:
    image = np.full((64, 64, 3), 100, np.uint8)
    certain = {"class_name": "cat", "score": 0.9, "box": [0.0, 0.0, 0.5, 0.5]}
    doubtful = {"class_name": "dog", "score": 0.2, "box": [0.6, 0.6, 0.9, 0.9]}
    plain, named = box_picture(image, [doubtful]), box_picture(image, [certain])
    assert named.shape == (128, 128, 3)
    assert not _plates(plain)
    assert _plates(named) > 200
    assert _plates(box_picture(image, [{**certain, "score": 1.0}])) < _plates(named)  # of truth no score is written
    outside = {**certain, "class_name": "n" * 99, "box": [0.9, 0.95, 1.4, 1.4]}
    assert _plates(box_picture(image, [outside])) > 200


def _plates(picture: np.ndarray) -> int:
    """Pixels in the yellow of a certain box."""
    return int(((picture[..., 0] > 230) & (picture[..., 2] < 90)).sum())


def test_picture_of_few_colours_is_in_the_page_exactly() -> None:
    picture = np.random.default_rng(0).integers(0, 4, (9, 7, 3), np.uint8) * 80
    kind, back = _read(data_uri(picture))
    assert kind == "png"
    assert (back == picture).all()
    assert (_read(data_uri(np.zeros((1, 1, 3), np.uint8)))[1] == 0).all()


def test_photograph_is_in_the_page_as_webp_and_nearly_the_same() -> None:
    y, x = np.mgrid[0:64, 0:64]
    picture = np.stack([x * 4, y * 4, (x + y) * 2], -1).astype(np.uint8)
    kind, back = _read(data_uri(picture))
    assert kind == "webp"
    assert np.abs(back.astype(int) - picture).mean() < 4
    assert len(data_uri(picture)) < 4000


def _read(uri: str) -> tuple[str, np.ndarray]:
    head, _, data = uri.partition(";base64,")
    return head.removeprefix("data:image/"), np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
