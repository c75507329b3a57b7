"""Facts about pictures: numbers worked out by hand, what is left out, and a run from pictures to shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from PIL import Image

from fourmill.config import Config, ConfigError
from fourmill.labelers import LABELERS
from fourmill.labelers.metadata import colorfulness, normal_facts, picture_facts, text_facts
from fourmill.pipeline.component import Batch, Failure
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.plan import make_plan
from fourmill.pipeline.runner import run
from fourmill.pipeline.shards import read_shard
from fourmill.pipeline.store import open_store
from fourmill.scenes import render

FROM_PIXELS = {"colorfulness", "brightness", "contrast", "saturation", "entropy"}


def halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> np.ndarray:
    """uint8 (3, 8, 8)."""
    picture = np.empty((8, 8, 3), np.uint8)
    picture[:, :4], picture[:, 4:] = left, right
    return picture.transpose(2, 0, 1)


def facts_of(view: dict[str, Any], **options: Any) -> Any:
    """The facts of one picture, half red and half blue, with these other modalities."""
    made = LABELERS.build("metadata", {"reads": list(view), **options})
    return made.run(Batch(["a"], halves((255, 0, 0), (0, 0, 255))[None], {m: [v] for m, v in view.items()}))[
        "metadata"
    ][0]


def without_pixels(view: dict[str, Any], **options: Any) -> dict[str, float]:
    return {name: value for name, value in facts_of(view, **options).items() if name not in FROM_PIXELS}


def thing(class_name: str, score: float = 1.0) -> dict[str, Any]:
    return {"class_name": class_name, "score": score, "box": [0.0, 0.0, 0.5, 0.5]}


def segment(class_name: str, area: int, is_thing: bool = False) -> dict[str, Any]:
    return {"class_name": class_name, "area": area, "is_thing": is_thing}


def test_red_and_blue_have_the_facts_worked_out_by_hand() -> None:
    # R - G is 255 or 0: mean 127.5, deviation 127.5. (R + G) / 2 - B is 127.5 or -255: mean -63.75, deviation 191.25.
    expected = (127.5**2 + 191.25**2) ** 0.5 + 0.3 * (127.5**2 + 63.75**2) ** 0.5
    assert picture_facts(halves((255, 0, 0), (0, 0, 255))) == {
        "colorfulness": pytest.approx(expected, abs=1e-4),
        "brightness": 52.5,  # luma 76 and 29
        "contrast": 23.5,
        "saturation": 255,
        # Of all values of all channels, a third are green's zeros, a sixth each of red's and blue's two values.
        "entropy": pytest.approx(4 / 6 * np.log2(6) + 1 / 3 * np.log2(3), abs=1e-4),
    }


def test_grey_pictures_have_no_colour() -> None:
    facts = picture_facts(halves((0, 0, 0), (200, 200, 200)))
    assert (facts["colorfulness"], facts["saturation"]) == (0, 0)
    assert (facts["brightness"], facts["contrast"]) == (100, 100)
    assert facts["entropy"] == pytest.approx(np.log2(6), abs=1e-4)  # two values in each of three channels


def test_even_picture_has_no_contrast() -> None:
    facts = picture_facts(halves((10, 10, 10), (10, 10, 10)))
    entropy = pytest.approx(np.log2(3), abs=1e-4)  # which channel a value is of
    assert facts == {"colorfulness": 0, "brightness": 10, "contrast": 0, "saturation": 0, "entropy": entropy}


def test_statistics_are_those_of_pillow_and_numpy() -> None:
    image = render(5, 2, 64).image
    facts = picture_facts(image.transpose(2, 0, 1))
    grey, hsv = np.asarray(Image.fromarray(image).convert("L"), float), Image.fromarray(image).convert("HSV")
    assert facts["brightness"] == pytest.approx(grey.mean(), abs=1e-4)
    assert facts["contrast"] == pytest.approx(grey.std(), abs=1e-4)
    assert facts["saturation"] == pytest.approx(np.asarray(hsv)[..., 1].mean(), abs=1e-4)
    red, green, blue = image.astype(float).transpose(2, 0, 1)
    rg, yb = red - green, (red + green) / 2 - blue
    expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
    assert colorfulness(image.transpose(2, 0, 1)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("a red box", (9, 3, 1)),
        (" Two boxes. One is red!  Which? \n", (30, 6, 3)),
        ("3.5 metres, e.g. wide", (21, 4, 2)),  # an abbreviation before a space is taken for an end
        ("你好。世界。", (6, 1, 2)),
    ],
)
def test_texts_are_counted(text: str, counts: tuple[int, int, int]) -> None:
    names = ("caption_n_chars", "caption_n_words", "caption_n_sentences")
    assert text_facts(text) == dict(zip(names, counts, strict=True))


def test_first_text_listed_counts_and_the_next_where_it_is_missing() -> None:
    both = {"caption": "a longer one", "alt_text": "short"}
    assert without_pixels(both)["caption_n_words"] == 3
    assert without_pixels({"alt_text": "short", "caption": "a longer one"})["caption_n_words"] == 1
    assert without_pixels({"alt_text": None, "caption": "a longer one"})["caption_n_words"] == 3


def test_missing_inputs_leave_their_facts_out() -> None:
    absent = dict.fromkeys(("source", "alt_text", "det", "sam_instance", "human_poses", "panoptic", "normal"))
    assert set(facts_of(absent)) == FROM_PIXELS
    assert without_pixels({"alt_text": " \n"}) == {}
    assert without_pixels({"normal": np.zeros((3, 8, 8), np.float32)}) == {}


def test_nothing_found_is_counted_as_none() -> None:
    assert without_pixels({"det": [], "sam_instance": [], "human_poses": [], "panoptic": []}) == {
        "n_coco_instances": 0,
        "coco_instance_diversity": 0,
        "n_sam_instances": 0,
        "n_humans": 0,
        "objectness": 0,
        "semantic_diversity": 0,
    }


def test_sure_objects_and_their_classes_are_counted() -> None:
    found = [thing("dog", 0.9), thing("dog", 0.6), thing("cat", 0.59)]
    assert without_pixels({"det": found}) == {"n_coco_instances": 2, "coco_instance_diversity": 1}
    assert without_pixels({"instance": found}, min_score=0.5) == {"n_coco_instances": 3, "coco_instance_diversity": 2}
    both = {"instance": found[:1], "det": found}
    assert without_pixels(both)["n_coco_instances"] == 1


def test_masks_people_and_size_are_counted() -> None:
    view = {"source": {"width": 640, "height": 480}, "sam_instance": [{}, {}, {}], "human_poses": [{}]}
    expected = {"original_width": 640, "original_height": 480, "n_sam_instances": 3, "n_humans": 1}
    assert without_pixels(view) == expected


def test_segments_tell_things_classes_and_where_one_can_walk() -> None:
    segments = [segment("road", 32), segment("sky", 8), segment("car", 8, True), segment("car", 4, True)]
    facts = {"objectness": 0.1875, "semantic_diversity": 3}  # 12 of 64 pixels
    assert without_pixels({"panoptic": segments}) == facts
    walkable = without_pixels({"panoptic": segments}, walkable=["road", "grass"])
    assert walkable == {**facts, "walkability": 0.5}


def test_plane_is_simple_and_a_corner_is_not() -> None:
    plane = np.zeros((3, 4, 4), np.float32)
    plane[2] = -1
    corner = plane.copy()
    corner[:, :, 2:] = np.array([-1, 0, 0], np.float32)[:, None, None]
    assert normal_facts(plane) == {"geometric_complexity": 0}
    assert normal_facts(corner) == {"geometric_complexity": 0.2929}  # 1 - |(-1, 0, -1) / 2|
    corner[:, :, 2:] = 0  # unknown
    assert normal_facts(corner) == {"geometric_complexity": 0}


def test_scores_of_the_corpus_are_taken_over() -> None:
    source = {"width": 8, "height": 8, "metadata": {"watermark_score": 0.25, "aesthetic_score_laion_v2": 5.5}}
    keys = {"watermark_score": "watermark_score", "aesthetic_score": "aesthetic_score_laion_v2"}
    facts = without_pixels({"source": source}, from_corpus=keys)
    assert (facts["watermark_score"], facts["aesthetic_score"]) == (0.25, 5.5)
    assert "aesthetic_score" not in facts_of({"source": {"metadata": {"watermark_score": 0.25}}}, from_corpus=keys)
    found = facts_of({"source": {"metadata": {"watermark_score": "high"}}}, from_corpus=keys)
    assert found == Failure("bad metadata: watermark_score of the sample is 'high', not a number")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"from_corpus": {"watermark": "w"}}, "unknown fact 'watermark'; did you mean 'watermark_score'"),
        ({"from_corpus": {"watermark_score": "w"}, "reads": ["alt_text"]}, "from_corpus needs source among reads"),
        ({"walkable": ["road"]}, "walkable needs panoptic among reads: source, alt_text"),
        ({"reads": ["depth"]}, "depth"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LABELERS.build("metadata", options)


def run_config(dataset: str, reads: list[str], count: int = 2) -> Config:
    labelers = {
        "boxes": {"kind": "annotated_boxes"},
        "facts": {"kind": "metadata", "reads": reads},
        "canny_edge": {},
        "color_palette": {},
    }
    found = toys.config(dataset, stages={"all": {"labelers": list(labelers)}})
    return Config(**{**found, "labelers": labelers, "crops": {"size": 16, "count": count}})


def test_a_run_stores_edges_palettes_and_facts_that_pass_their_conventions(tmp_path: Path) -> None:
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "dataset"), count=7)
    assert run(run_config(dataset, ["source", "alt_text", "det"])).ok
    store = open_store(dataset)
    manifest = read_manifest(store)
    shards = {m: read_shard(store, next(manifest.records(m)).name) for m in ("metadata", "canny_edge", "color_palette")}
    assert {m: len(s.spec.classes or ()) for m, s in shards.items()} == dict.fromkeys(shards, 0)
    assert {m: s.spec.crops for m, s in shards.items()} == {"metadata": 1, "canny_edge": 2, "color_palette": 2}
    assert all(not s.quarantine for s in shards.values())
    facts = shards["metadata"].value(3)
    counted = {name: value for name, value in facts.items() if name not in FROM_PIXELS}
    assert counted == {
        "original_width": 40,
        "original_height": 32,
        "caption_n_chars": 8,  # "number 3"
        "caption_n_words": 2,
        "caption_n_sentences": 1,
        "n_coco_instances": 1,
        "coco_instance_diversity": 1,
    }
    edges = shards["canny_edge"].value(3, 1)
    assert edges.shape == (16, 16)
    assert set(np.unique(edges)) <= {0, 255}
    assert list(shards["color_palette"].value(3, 0)) == ["1", "2", "3", "4", "5", "6", "7"]


def test_what_is_read_decides_what_is_stale(tmp_path: Path) -> None:
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "dataset"), count=6)
    run(run_config(dataset, ["source", "alt_text"]))
    store = open_store(dataset)
    same, other = (
        make_plan(store, read_manifest(store), run_config(dataset, reads))
        for reads in (["source", "alt_text"], ["source"])
    )
    assert not same.num_units
    assert [list(unit.makes) for unit in other.units()] == [["metadata"]]


def test_reading_what_nothing_makes_is_refused(tmp_path: Path) -> None:
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "dataset"), count=6)
    with pytest.raises(ConfigError, match="reads 'panoptic', but nothing makes it"):
        run(run_config(dataset, ["source", "panoptic"]))
