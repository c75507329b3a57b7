"""`fourmill evaluate labels`: each figure on literal maps, moved truth on literal pixels, and the whole path.

Through the whole path, truth said as labels must score perfectly whatever the crop, and each lie must be found out.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
from PIL import Image

from fourmill.config import Config
from fourmill.evaluate import evaluate_labels, open_truth
from fourmill.evaluate.command import run_evaluate_labels
from fourmill.evaluate.dense import DepthMeasure, NormalMeasure, SemsegMeasure
from fourmill.evaluate.measure import IncomparableError, Measure
from fourmill.evaluate.objects import DetMeasure, InstanceMeasure, Precision, SamMeasure, overlaps
from fourmill.evaluate.panoptic import PanopticMeasure
from fourmill.evaluate.results import Evaluation, LabelScore
from fourmill.evaluate.truth import DepthFiles, TrueObject, TrueSegment, Truth, TruthSource
from fourmill.evaluate.truth_nyu import identity
from fourmill.evaluate.words import CaptionMeasure, RetrievalMeasure, phrases
from fourmill.pipeline import masks
from fourmill.pipeline.geometry import Crop
from fourmill.pipeline.ingest import IngestConfig, ingest
from fourmill.pipeline.pictures import error_picture, normal_picture, segments_picture
from fourmill.pipeline.report import write_report
from fourmill.pipeline.runner import run
from fourmill.pipeline.shards import Spec
from fourmill.pipeline.store import open_store
from fourmill.scenes import write_corpus


class Known(TruthSource):
    """A source of nothing but vocabulary."""

    kind = "known words"

    def __init__(self, classes: Sequence[str] = (), things: Sequence[str] = (), max_depth: float = 10.0) -> None:
        super().__init__("literal")
        self.classes, self.things = tuple(classes), frozenset(things)
        self.stuff, self.max_depth = frozenset(classes) - self.things, max_depth

    def find(self, *_: Any) -> Truth | None:
        raise AssertionError("figures of given pairs look nothing up")


def figures(measure: Measure, *pairs: tuple[Any, Truth]) -> dict[str, float]:
    for label, truth in pairs:
        assert measure.add(label, truth) is not None
    return measure.figures()


def array(*rows: Sequence[float]) -> np.ndarray:
    return np.array(rows, np.float32)


# Depth


def test_metric_depth_has_the_figures_worked_out_by_hand() -> None:
    truth = Truth(depth=array([1, 2], [4, 0]))  # 0: unknown
    found = figures(DepthMeasure(Spec(convention="metric"), Known(), 2), (array([1, 3], [4, 9]), truth))
    assert found["absrel"] == pytest.approx((0 + 0.5 + 0) / 3)
    assert found["rmse"] == pytest.approx(np.sqrt(1 / 3))
    assert found["log10"] == pytest.approx(np.log10(1.5) / 3)
    assert (found["delta1"], found["delta2"]) == (pytest.approx(2 / 3), pytest.approx(1))  # 1.5 < 1.25 ** 2
    assert found["absrel_median"] == pytest.approx((1 / 3 + 0 + 1 / 3) / 3)  # scaled by 2 / 3: 2/3, 2, 8/3
    assert found["coverage"] == 1


def test_depth_averages_pictures_and_tells_how_much_of_the_truth_has_a_label() -> None:
    measure = DepthMeasure(Spec(convention="metric"), Known(), 2)
    found = figures(measure, (array([1, 0]), Truth(depth=array([2, 2]))), (array([2, 2]), Truth(depth=array([2, 2]))))
    assert (found["absrel"], found["coverage"]) == (pytest.approx(0.25), pytest.approx(0.75))


def test_truth_beyond_the_sources_range_counts_for_nothing() -> None:
    found = figures(DepthMeasure(Spec(convention="metric"), Known(), 1), (array([1, 1]), Truth(depth=array([1, 20]))))
    assert found["absrel"] == 0


@pytest.mark.parametrize(
    ("convention", "label", "absrel"),
    [
        ("relative", [0.5, 1, 2], 0),
        ("relative", [1, 1 / 2, 1 / 4], (3 + 0 + 3 / 4) / 3),  # disparity: 4, 2, 1 once its median is 2
        ("inverse", [7, 4, 2.5], 0),  # 6 / d + 1
        ("metric", [7, 4, 2.5], (6 + 1 + 0.375) / 3),
    ],
)
def test_depth_is_aligned_as_its_convention_demands(convention: str, label: Sequence[float], absrel: float) -> None:
    measure = DepthMeasure(Spec(convention=convention), Known(), 3)
    found = figures(measure, (array(label), Truth(depth=array([1, 2, 4]))))
    assert found["absrel"] == pytest.approx(absrel, abs=1e-6)


def test_depth_said_to_be_inverse_is_fitted_by_no_negative_scale_and_told() -> None:
    measure = DepthMeasure(Spec(convention="inverse"), Known(), 3)
    found = figures(measure, (array([1, 2, 4]), Truth(depth=array([1, 2, 4]))))
    assert found["absrel"] > 0.4
    assert measure.notes() == ["in 1 of 1 the label falls where inverse depth rises: is it depth?"]


@pytest.mark.parametrize(
    ("measure", "spec", "words"),
    [
        (DepthMeasure, Spec(), "depth states the convention None; one of metric, relative, inverse is needed"),
        (NormalMeasure, Spec(convention="opengl"), "normals state the convention 'opengl'"),
        (SemsegMeasure, Spec(), "semseg states no class names"),
        (SemsegMeasure, Spec(classes=("cat",)), "no class in common: labels say 'cat'; the truth knows 'wall', 'sky'"),
    ],
)
def test_labels_without_what_the_comparison_needs_are_refused_saying_so(measure: Any, spec: Spec, words: str) -> None:
    with pytest.raises(IncomparableError, match=re.escape(words)):
        measure(spec, Known(["wall", "sky"]), 4)


# Normals and classes


def test_normals_have_the_angles_worked_out_by_hand() -> None:
    turned = np.radians([0, 10, 20, 90])
    label = np.stack([np.sin(turned), np.zeros(4), -np.cos(turned)])[:, None].astype(np.float32)
    label = np.concatenate([label, np.zeros((3, 1, 1), np.float32)], axis=2)  # the last has no label
    truth = np.zeros((3, 1, 5), np.float32)
    truth[2] = -1
    found = figures(NormalMeasure(Spec(convention="opencv"), Known(), 5), (label, Truth(normal=truth)))
    assert found["mean"] == pytest.approx(30, abs=1e-3)
    assert found["median"] == pytest.approx(10, abs=0.006)  # a histogram of 0.005 degrees
    assert found["rmse"] == pytest.approx(np.sqrt((100 + 400 + 8100) / 4), abs=1e-3)
    assert (found["below_11.25"], found["below_22.5"], found["coverage"]) == (0.5, 0.75, pytest.approx(0.8))


def test_normals_that_point_away_are_180_degrees_wrong() -> None:
    truth = np.stack([np.zeros((2, 2)), np.zeros((2, 2)), -np.ones((2, 2))]).astype(np.float32)
    found = figures(NormalMeasure(Spec(convention="opencv"), Known(), 2), (-truth, Truth(normal=truth)))
    assert (found["mean"], found["below_30"]) == (pytest.approx(180), 0)


def test_classes_meet_by_name_and_void_and_unknown_classes_are_left_out() -> None:
    source = Known(["wall", "Sky", "zebra"])
    measure = SemsegMeasure(Spec(classes=("cat", "sky", "wall")), source, 3)
    truth = Truth(semseg=np.array([[0, 0, 0], [1, 1, 255], [2, 2, 2]], np.uint8))
    label = np.array([[2, 2, 1], [1, 0, 0], [0, 0, 0]], np.uint8)
    found = figures(measure, (label, truth))
    assert found == {"miou": pytest.approx((2 / 3 + 1 / 3) / 2), "pixel_accuracy": pytest.approx(3 / 5)}
    assert measure.per_class() == {
        "wall": {"iou": pytest.approx(2 / 3), "pixels": 3},
        "Sky": {"iou": pytest.approx(1 / 3), "pixels": 2},
    }
    assert measure.unmatched() == (["cat"], ["zebra"])


# Panoptic quality

STUFF = Known(["sky", "cat", "dog"], things=["cat", "dog"])


def segment(name: str, mask: Any, **fields: Any) -> dict[str, Any]:
    mask = np.asarray(mask, bool)
    return {"class_name": name, "score": 1.0, "box": masks.box_of(mask), "mask": masks.encode(mask), **fields}


def true_panoptic(numbers: Any, *segments: TrueSegment) -> Truth:
    return Truth(panoptic=np.array(numbers, np.int32), segments=segments)


def test_panoptic_quality_is_the_one_worked_out_by_hand() -> None:
    truth = true_panoptic([[1, 1, 2, 2], [1, 1, 2, 2]], TrueSegment(1, "sky"), TrueSegment(2, "cat"))
    sky, cat = np.zeros((2, 4)), np.zeros((2, 4))
    sky[:, :3], cat[0, 3] = 1, 1  # sky: IoU 4 / 6; cat: IoU 1 / 4, which is no match
    measure = PanopticMeasure(Spec(), STUFF, 4)
    found = figures(measure, ([segment("sky", sky), segment("cat", cat)], truth))
    assert found["pq"] == pytest.approx((4 / 6 + 0) / 2)
    assert (found["sq_stuff"], found["rq_stuff"], found["pq_things"]) == (pytest.approx(4 / 6), 1, 0)
    assert measure.per_class()["cat"] == {"pq": 0, "sq": 0, "rq": 0}


def test_panoptic_label_without_segments_loses_everything() -> None:
    truth = true_panoptic([[1, 2]], TrueSegment(1, "sky"), TrueSegment(2, "cat"))
    assert figures(PanopticMeasure(Spec(), STUFF, 2), ([], truth))["pq"] == 0


def test_segments_on_void_and_on_a_crowd_of_their_class_are_not_held_against_the_label() -> None:
    truth = true_panoptic([[1, 0, 0, 3, 3]], TrueSegment(1, "sky"), TrueSegment(3, "dog", crowd=True))
    label = [segment("sky", [[1, 1, 0, 0, 0]]), segment("cat", [[0, 0, 1, 0, 0]]), segment("dog", [[0, 0, 0, 1, 1]])]
    assert figures(PanopticMeasure(Spec(), STUFF, 5), (label, truth))["pq"] == 1
    label = [segment("sky", [[1, 1, 0, 0, 0]]), segment("cat", [[0, 0, 0, 1, 1]])]  # a crowd of another class
    assert figures(PanopticMeasure(Spec(), STUFF, 5), (label, truth))["pq_things"] == 0


def test_panoptic_quality_agrees_with_torchmetrics_where_labels_are_complete() -> None:
    import torch
    from torchmetrics.detection import PanopticQuality

    rng = np.random.default_rng(0)
    names = ("sky", "cat", "dog")
    oracle = PanopticQuality(things={1, 2}, stuffs={0}, return_sq_and_rq=True)
    measure = PanopticMeasure(Spec(), STUFF, 12)
    for _ in range(10):
        blocks = rng.integers(0, 5, (4, 4))
        truth_map = np.kron(blocks, np.ones((3, 3), int))
        label_map = np.where(rng.random((12, 12)) < 0.15, np.roll(truth_map, 3, axis=1), truth_map)
        classes = np.array([0, 1, 1, 2, 2])
        pairs = [torch.tensor(np.stack([classes[m], m], axis=-1))[None] for m in (label_map, truth_map)]
        oracle.update(*pairs)
        label = [segment(names[classes[n]], label_map == n) for n in range(5) if (label_map == n).any()]
        segments = [TrueSegment(n + 1, names[classes[n]]) for n in range(5)]
        measure.add(label, true_panoptic(truth_map + 1, *segments))
    expected = oracle.compute().tolist()
    assert 0.1 < expected[0] < 0.95
    np.testing.assert_allclose([measure.figures()[n] for n in ("pq", "sq", "rq")], expected, atol=1e-6)


# Boxes and masks

CATS = Known(things=["cat", "dog"])


def box(name: str, x0: float, y0: float, x1: float, y1: float, score: float = 1.0) -> dict[str, Any]:
    return {"class_name": name, "box": [x0, y0, x1, y1], "score": score}


def true_boxes(*boxes: dict[str, Any]) -> Truth:
    return Truth(objects=tuple(TrueObject(b["class_name"], tuple(b["box"])) for b in boxes))


def test_average_precision_is_the_one_worked_out_by_hand() -> None:
    cat, dog = box("cat", 0.1, 0.1, 0.5, 0.5, 0.6), box("dog", 0.5, 0.5, 0.9, 0.9)
    false = box("cat", 0.6, 0.0, 0.9, 0.2, 0.9)
    measure = DetMeasure(Spec(), CATS, 100)
    found = figures(measure, ([false, cat, dog], true_boxes(cat, dog)))
    # Cats: precision 1/2 at recall 1, interpolated over all recalls; dogs: 1.
    assert (found["ap50"], found["ap"], found["ar100"]) == (pytest.approx(0.75), pytest.approx(0.75), 1)
    assert measure.per_class()["cat"] == {"ap": pytest.approx(0.5), "ap50": pytest.approx(0.5), "objects": 1}
    assert found["ap_medium"] == pytest.approx(1)  # 40 x 40 pixels; the false one is small


def test_boxes_of_another_class_or_given_as_width_and_height_find_nothing() -> None:
    cat = box("cat", 0.5, 0.5, 0.9, 0.9)
    assert figures(DetMeasure(Spec(), CATS, 100), ([{**cat, "class_name": "dog"}], true_boxes(cat)))["ap"] == 0
    wide = box("cat", 0.2, 0.2, 0.8, 0.7)
    extent = {**wide, "box": [0.2, 0.2, 0.6, 0.5]}  # x, y, width, height
    assert figures(DetMeasure(Spec(), CATS, 100), ([extent], true_boxes(wide)))["ap50"] == 0
    with pytest.raises(ValueError, match="bad box"):
        DetMeasure(Spec(), CATS, 100).add([{**cat, "box": [0.5, 0.5, 0.4, 0.4]}], true_boxes(cat))


def test_classes_that_a_detector_cannot_say_are_left_out_and_listed() -> None:
    cat, dog = box("cat", 0.1, 0.1, 0.5, 0.5), box("dog", 0.5, 0.5, 0.9, 0.9)
    measure = DetMeasure(Spec(classes=("cat", "lamp")), CATS, 100)
    assert figures(measure, ([cat, box("lamp", 0, 0, 1, 1)], true_boxes(cat, dog)))["ap"] == pytest.approx(1)
    assert measure.unmatched() == (["lamp"], ["dog"])


@pytest.mark.parametrize("by_masks", [False, True])
def test_average_precision_equals_pycocotools(by_masks: bool) -> None:
    rng = np.random.default_rng(3)
    pictures = [_random_objects(rng) for _ in range(40)]
    measure = InstanceMeasure(Spec(), CATS, 128) if by_masks else DetMeasure(Spec(), CATS, 128)
    for label, truth in pictures:
        measure.add(label, Truth(objects=truth))
    found = measure.figures()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    expected = _by_pycocotools(pictures, "segm" if by_masks else "bbox")
    assert 0.1 < expected[0] < 0.9
    np.testing.assert_allclose([found[n] for n in names], expected[:6], atol=1e-9)
    assert found["ar100"] == pytest.approx(expected[8])


def _random_objects(rng: np.random.Generator) -> tuple[list[dict[str, Any]], tuple[TrueObject, ...]]:
    """Rectangles of all sizes, some crowds, and findings that are near them, far off or of the other class."""
    truth, label = [], []
    for _ in range(int(rng.integers(0, 6))):
        w, h = rng.integers(4, 126, 2)
        x, y = (int(rng.integers(0, 129 - side)) for side in (w, h))
        name, crowd = str(rng.choice(["cat", "dog"])), bool(rng.random() < 0.15)
        truth.append(_rectangle(name, x, y, w, h, crowd))
        for _ in range(int(rng.integers(0, 3))):
            dx, dy = rng.integers(-6, 7, 2)
            name = name if rng.random() < 0.8 else "dog"
            near = _rectangle(name, max(x + dx, 0), max(y + dy, 0), max(w - 3, 2), h, False)
            # Equal scores occur, as with real detectors.
            label.append({**segment(name, near.mask), "score": float(rng.integers(1, 9)) / 10})
    return sorted(label, key=lambda o: -o["score"]), tuple(truth)


def _rectangle(name: str, x: int, y: int, w: int, h: int, crowd: bool) -> TrueObject:
    mask = np.zeros((128, 128), bool)
    mask[y : y + h, x : x + w] = True
    x0, y0, x1, y1 = masks.box_of(mask)
    return TrueObject(name, (x0, y0, x1, y1), mask, crowd)


def _by_pycocotools(pictures: Sequence[Any], kind: str) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    ids = {"cat": 1, "dog": 2}
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, (label, truth) in enumerate(pictures, 1):
        for o in truth:
            x0, y0, x1, y1 = (128 * v for v in o.box)
            entry: dict[str, Any] = {"image_id": number, "category_id": ids[o.class_name], "iscrowd": int(o.crowd)}
            entry |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            annotations.append({**entry, "id": len(annotations) + 1, "segmentation": masks.encode(o.mask)})
        for o in label:
            x0, y0, x1, y1 = (128 * v for v in o["box"])
            shape = {"segmentation": o["mask"]} if kind == "segm" else {"bbox": [x0, y0, x1 - x0, y1 - y0]}
            results.append({"image_id": number, "category_id": ids[o["class_name"]], "score": o["score"], **shape})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        images = [{"id": n + 1, "height": 128, "width": 128} for n in range(len(pictures))]
        categories = [{"id": n, "name": name} for name, n in ids.items()]
        coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(v) for v in evaluation.stats]


def test_only_the_hundred_best_findings_of_a_picture_count() -> None:
    precision = Precision()
    scores = np.linspace(1, 0.1, 150)
    ious = np.zeros((150, 1))
    ious[120] = 1
    hit = precision.add(scores, np.zeros(1, bool), ious, np.ones(150), np.ones(1))
    assert not hit.any()
    assert precision.recall("all") == 0


def test_sam_masks_are_scored_by_the_best_for_each_object_whatever_its_class() -> None:
    left, right = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    left[:, :4], right[:, 4:] = True, True
    objects = tuple(TrueObject(n, (0, 0, 1, 1), m) for n, m in (("cat", left), ("dog", right)))
    half = left.copy()
    half[:2] = False
    label = [{**segment("", left | right), "score": 0.9}, {**segment("", half), "score": 0.5}]
    found = figures(SamMeasure(Spec(), CATS, 8), (label, Truth(objects=objects)))
    assert found["best_iou"] == pytest.approx((0.75 + 0.5) / 2)
    assert found["ar10"] == pytest.approx((6 + 1) / 20)  # IoU 0.75 passes 6 of 10 bounds, 0.5 one of them
    assert (found["covered"], found["masks_per_picture"]) == (0.5, 2)


def test_hostile_masks_are_unusable_and_of_another_size_too() -> None:
    whole = TrueObject("cat", (0, 0, 1, 1), np.ones((8, 8), bool))
    for mask, words in (({"size": [8, 8], "counts": "zz~"}, "bad mask"), (masks.encode(np.ones((4, 4))), "bad shape")):
        with pytest.raises(ValueError, match=words):
            overlaps([{"mask": mask}], [whole])


# Captions


def test_phrases_count_colours_with_their_shapes() -> None:
    text = "Two small striped red boxes, a large orange cone and a dotted white sphere on a white floor, a cylinder"
    assert phrases(text) == {
        ("red", "box"): 2,
        ("orange", "cone"): 1,
        ("white", "sphere"): 1,
        ("", "cylinder"): 1,
    }


def test_caption_figures_are_those_worked_out_by_hand() -> None:
    source = Known()
    source.closed_captions = True
    truth = Truth(captions=("two red boxes and a blue cone on a gray floor",))
    found = figures(CaptionMeasure(Spec(), source, 8), ("a red box, a blue cone and a green sphere", truth))
    assert found == {
        "phrase_f1": pytest.approx(2 / 3),
        "phrase_precision": pytest.approx(2 / 3),
        "phrase_recall": pytest.approx(2 / 3),
    }


def test_free_captions_are_scored_against_all_references() -> None:
    truth = Truth(captions=("a man rides a horse", "two dogs sleep on the sofa"))
    found = figures(CaptionMeasure(Spec(), Known(), 8), ("two dogs sleep on the sofa", truth))
    assert found == {"bleu4": pytest.approx(1), "rouge_l": pytest.approx(1)}
    found = figures(CaptionMeasure(Spec(), Known(), 8), ("green ideas", truth))
    assert found == {"bleu4": 0, "rouge_l": 0}


def test_own_caption_is_found_among_the_others_and_repeated_captions_are_left_out() -> None:
    directions = {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1]}
    measure = RetrievalMeasure(Spec(), Known(), 8, lambda texts: np.array([directions[t] for t in texts], np.float32))
    pictures = {"a": [2, 0.1, 0], "b": [1, 0.9, 0], "c": [0, 0, 5]}  # b looks more like a
    pairs = [(np.array(pictures[c], np.float32), Truth(captions=(c,))) for c in ("a", "b", "c", "a")]
    found = figures(measure, *pairs)
    assert (found["image_to_text_r1"], found["image_to_text_r5"], found["gallery"]) == (pytest.approx(2 / 3), 1, 3)
    assert found["text_to_image_r1"] == 1


# Moved truth


def test_truth_is_moved_through_crop_and_flip_by_pixel_centres() -> None:
    depth = np.arange(24, dtype=np.float32).reshape(4, 6)
    normal = np.stack([depth + 1, np.full((4, 6), 2.0), np.full((4, 6), -3.0)]).astype(np.float32)
    mask = np.zeros((4, 6), bool)
    mask[1, 3:5] = True
    thing = TrueObject("cat", (3 / 6, 1 / 4, 5 / 6, 2 / 4), mask)
    outside = TrueObject("dog", (0, 0, 1 / 6, 1), np.arange(6)[None].repeat(4, 0) == 0)
    truth = Truth(depth=depth, normal=normal, semseg=depth.astype(np.uint8), objects=(thing, outside))
    moved = truth.moved(Crop(1, 2, 2, 4, 1), 4, 6, 2)  # rows 1 and 2, columns 2 to 5, mirrored, to 2 x 2
    # Centres at columns 3 and 5 from the left, the right of two pixels where a centre lies between them.
    np.testing.assert_array_equal(moved.depth, [[11, 9], [17, 15]])
    np.testing.assert_array_equal(moved.semseg, [[11, 9], [17, 15]])
    assert moved.normal is not None
    np.testing.assert_array_equal(moved.normal[:, 0, 0], [-12, 2, -3])
    assert moved.objects is not None
    (kept,) = moved.objects
    np.testing.assert_allclose(kept.box, (0.25, 0, 0.75, 0.5))
    np.testing.assert_array_equal(kept.mask, [[False, True], [False, False]])


def test_truth_of_another_size_than_the_picture_is_moved_by_shares() -> None:
    truth = Truth(depth=np.arange(16, dtype=np.float32).reshape(4, 4))
    moved = truth.moved(Crop(0, 100, 200, 100, 0), 200, 200, 2)  # the right half
    np.testing.assert_array_equal(moved.depth, [[6, 7], [14, 15]])


# The whole path


def make_dataset(folder: Path, *lies: str, scenes: int = 4, crops: int = 2, **options: Any) -> str:
    """Scenes, ingested and labelled by the toys of `scene_labels`; the corpus lies beside."""
    write_corpus(folder / "corpus", count=scenes, size=80, seed=11, truth=True, shard_size=3)
    dataset = str(folder / "dataset")
    ingest(str(folder / "corpus"), dataset, IngestConfig(shard_size=scenes // 2 + 1))
    fields = {"lies": lies, "batch_size": 4, **options}
    config: dict[str, Any] = {
        "dataset": dataset,
        "crops": {"size": 64, "count": crops, "min_scale": 0.3},
        "labelers": {
            "maps": {"kind": "scene_labels:SceneLabels", **fields},
            "words": {"kind": "scene_labels:SceneCaptions", "lies": lies},
        },
        "stages": {"all": {"labelers": ["maps", "words"]}},
        "ray": {"address": "none"},
        "max_failures": 1.0,
    }
    assert run(Config(**config)).ok
    return dataset


def by_modality(evaluation: Evaluation) -> dict[str, LabelScore]:
    return {score.modality: score for score in evaluation.scores}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    make_dataset(folder, scenes=8, crops=3)
    return folder


PERFECT = {
    "depth": {"absrel": 0, "delta1": 1, "coverage": 1},
    "normal": {"mean": 0, "below_11.25": 1, "coverage": 1},
    "semseg": {"miou": 1, "pixel_accuracy": 1},
    "panoptic": {"pq": 1, "sq": 1, "rq": 1, "pq_things": 1, "pq_stuff": 1},
    "instance": {"ap": 1, "ap50": 1, "ar100": 1},
    "det": {"ap": 1, "ap75": 1, "ar100": 1},
    "sam_instance": {"best_iou": 1, "ar10": 1},
    "caption": {"phrase_f1": 1},
    "captions": {"phrase_f1": 1},
}


@pytest.mark.parametrize("written", [False, True], ids=["rendered again", "read from tars"])
def test_truth_said_as_labels_is_perfect_through_crops_and_flips(honest: Path, written: bool) -> None:
    found = evaluate_labels(str(honest / "dataset"), str(honest / "corpus") if written else None)
    assert (found.samples, found.size, found.ok) == (8, 64, True)
    scores = by_modality(found)
    assert set(scores) == set(PERFECT)
    for name, expected in PERFECT.items():
        values = scores[name].figures
        # Labels are float16: 2^-11 of a metre's value, some hundredths of a degree.
        assert {n: values[n] for n in expected} == pytest.approx(expected, abs=0.02 if name == "normal" else 5e-4), name
        assert scores[name].compared == (8 if name.startswith("caption") else 24)
        assert not scores[name].unusable


@pytest.fixture(scope="module")
def lying(tmp_path_factory: pytest.TempPathFactory) -> str:
    lies = ("double depth", "flip without x", "classes shifted", "masks moved", "zebra")
    return make_dataset(tmp_path_factory.mktemp("lying"), *lies, crops=4)


def test_truth_and_labels_in_object_storage_are_read_by_ranges(honest: Path, s3_uri: str) -> None:
    for part in ("corpus", "dataset"):
        local, remote = open_store(honest / part), open_store(f"{s3_uri}/{part}")
        for info in local.list():
            remote.create(info.name, local.get(info.name))
    there = evaluate_labels(f"{s3_uri}/dataset", f"{s3_uri}/corpus", labels=["normal", "det"])
    here = evaluate_labels(str(honest / "dataset"), str(honest / "corpus"), labels=["normal", "det"])
    assert [s.to_json() for s in there.scores] == [s.to_json() for s in here.scores]
    assert there.samples == 8


@pytest.mark.parametrize(
    ("modality", "figure", "low", "high"),
    [
        ("depth", "absrel", 0.99, 1.01),
        ("depth", "absrel_median", 0, 1e-3),  # a scale is forgiven where medians are aligned, and only there
        ("normal", "mean", 5, 90),
        ("semseg", "miou", 0, 0.1),
        ("instance", "ap50", 0, 0.1),
        ("sam_instance", "best_iou", 0, 0.4),
        ("caption", "phrase_f1", 0, 0),
    ],
)
def test_lie_is_found_out(lying: str, modality: str, figure: str, low: float, high: float) -> None:
    assert low <= by_modality(evaluate_labels(lying, labels=[modality]))[modality].figures[figure] <= high


@pytest.mark.parametrize(
    ("convention", "low", "high"), [("inverse", 0, 2e-3), ("metric", 0.3, 9), ("relative", 0.2, 9)]
)
def test_disparity_is_right_only_when_it_says_so(tmp_path: Path, convention: str, low: float, high: float) -> None:
    dataset = make_dataset(tmp_path, "disparity", convention=convention, scenes=2)
    assert low <= by_modality(evaluate_labels(dataset, labels=["depth"]))["depth"].figures["absrel"] <= high


def test_values_that_cannot_be_compared_are_counted_each_by_its_reason(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "with", "normals away", "first segment missing", crops=1)
    scores = by_modality(evaluate_labels(dataset))
    assert (scores["normal"].compared, scores["normal"].quarantined, scores["depth"].compared) == (0, 4, 4)
    assert scores["panoptic"].figures["pq"] < 0.9
    without = evaluate_labels(dataset, str(tmp_path / "with" / "corpus" / "00001.tar"))  # one tar of two
    assert (without.samples, by_modality(without)["depth"].without_truth) == (1, 3)
    write_corpus(tmp_path / "corpus", count=3, size=64, seed=11)
    refused = evaluate_labels(dataset, str(tmp_path / "corpus"))  # tars without --truth
    assert (refused.samples, refused.ok) == (0, False)
    assert any("was it written with --truth?" in reason for reason in refused.bad_truth)


def test_worst_labels_come_first_and_are_named_with_their_place(lying: str) -> None:
    score = by_modality(evaluate_labels(lying, labels=["normal"], worst=5))["normal"]
    everything = by_modality(evaluate_labels(lying, labels=["normal"], worst=100))["normal"].worst
    assert (len(score.worst), len(everything), score.worst) == (5, 16, everything[:5])
    assert [p.badness for p in score.worst] == sorted((p.badness for p in score.worst), reverse=True)
    assert all(p.crop > 0 for p in score.worst if p.badness > 1)  # crop 0 is never mirrored


def test_memory_does_not_hold_earlier_samples(honest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    from fourmill.evaluate import truth_scenes

    alive: list[weakref.ref[Truth]] = []
    most = 0
    find = truth_scenes.RenderedScenes.find

    def watched(self: Any, *arguments: Any) -> Truth | None:
        nonlocal most
        found = find(self, *arguments)
        assert found is not None
        alive.append(weakref.ref(found))
        most = max(most, sum(r() is not None for r in alive))
        return found

    monkeypatch.setattr(truth_scenes.RenderedScenes, "find", watched)
    evaluate_labels(str(honest / "dataset"))
    assert len(alive) == 8
    assert most <= 2


# The command


def test_command_prints_json_and_says_by_its_exit_code_whether_anything_was_compared(
    honest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_evaluate_labels(str(honest / "dataset"), as_json=True, labels=["semseg", "det"], count=5) == 0
    tree = json.loads(capsys.readouterr().out)
    assert [s["modality"] for s in tree["scores"]] == ["semseg", "det"]
    assert tree["samples"] == 5
    assert tree["scores"][0]["figures"]["miou"] == 1
    assert tree["scores"][1]["figures"]["ap_large"] is None  # no object has 96 x 96 pixels
    (tmp_path / "depth").mkdir()
    (tmp_path / "depth" / "a.png").write_bytes(helpers.encoded(Image.new("I;16", (4, 4))))
    assert run_evaluate_labels(str(honest / "dataset"), str(tmp_path)) == 1
    assert "metres as they are" in capsys.readouterr().out


def test_page_shows_figures_and_the_worst_beside_their_truth(honest: Path, tmp_path: Path) -> None:
    page = tmp_path / "out" / "labels.html"
    assert run_evaluate_labels(str(honest / "dataset"), out=str(page)) == 0
    text = page.read_text()
    assert len(re.findall(r'src="data:image/(?:png|webp);base64,', text)) >= 3 * (4 + 4 + 4 + 3 + 3 + 3 + 3)
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    for words in ("Labels against truth", "AbsRel 0.000", "PQ 1.000", "AP50 1.000", "SceneLabels v1", "by class"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": ["depht"]}, "unknown label modality to evaluate 'depht'; did you mean 'depth'?"),
        ({"truth": "nowhere"}, "does not exist"),
    ],
)
def test_misuse_is_refused_saying_what_would_be_right(honest: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        evaluate_labels(str(honest / "dataset"), **arguments)


def test_folder_without_truth_is_refused_naming_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"looked for tars .* instances_\*\.json.* it holds a\.txt"):
        open_truth(str(tmp_path))


def test_report_pictures_every_label_and_says_how_good_it_is(honest: Path, tmp_path: Path) -> None:
    page, sheet = write_report(str(honest / "dataset"), tmp_path / "report.html", count=2)
    text = page.read_text()
    for words in ("Labels against truth", "SceneLabels v1", "mIoU 1.000", "best-mask IoU 1.000", "phrase F1 1.000"):
        assert words in text
    columns = 1 + 2 * 4 + 3 + 2  # picture; truth and label of maps and panoptic; three kinds of objects; caption
    assert Image.open(sheet).size == (columns * 116 + 4, 22 + 2 * 116)


def test_report_without_truth_has_no_section_of_it(tmp_path: Path) -> None:
    helpers.write_files(tmp_path / "corpus", {"a.jpg": helpers.make_jpeg(40, 50)})
    ingest(str(tmp_path / "corpus"), str(tmp_path / "dataset"), IngestConfig())
    config: dict[str, Any] = {
        "dataset": str(tmp_path / "dataset"),
        "crops": {"size": 16},
        "labelers": {"bright": {"kind": "toys:Brightness"}},
        "stages": {"all": {"labelers": ["bright"]}},
        "ray": {"address": "none"},
    }
    assert run(Config(**config)).ok
    page, _ = write_report(str(tmp_path / "dataset"), tmp_path / "report.html")
    assert "Labels against truth" not in page.read_text()


# Pictures


def test_normals_are_painted_red_to_the_right_green_up_and_blue_towards_the_viewer() -> None:
    right, up, ahead, unknown = (1, 0, 0), (0, -1, 0), (0, 0, -1), (0, 0, 0)
    painted = normal_picture(np.array([[right, up, ahead, unknown]], np.float32).transpose(2, 0, 1))
    assert painted[0].tolist() == [[255, 127, 127], [127, 255, 127], [127, 127, 255], [205, 205, 205]]


def test_segments_of_one_class_share_a_hue_and_the_first_lies_on_top() -> None:
    image = np.full((100, 100, 3), 100, np.uint8)
    left, right, over = np.zeros((3, 100, 100), bool)
    left[:, :40], right[:, 60:], over[40:70, :] = True, True, True
    painted = segments_picture(image, [segment("cat", left), segment("cat", right), segment("dog", over)], zoom=1)
    cats = painted[5, 3].astype(int), painted[5, 97].astype(int)
    assert np.argsort(cats[0]).tolist() == np.argsort(cats[1]).tolist()
    assert (cats[0] != cats[1]).any()  # another shade
    assert painted[45, 3].tolist() == painted[5, 3].tolist()  # a cat before the dog
    assert painted[5, 50].tolist() == [130, 130, 130]  # 0.6 * 100 + 70


def test_errors_are_black_to_yellow_and_grey_where_nothing_is_known() -> None:
    painted = error_picture(np.array([[0, 0.5, 9, 0]]), 0.5, np.array([[True, True, True, False]]))
    assert painted[0, 0].max() < 5
    assert painted[0, 1].tolist() == painted[0, 2].tolist()
    assert painted[0, 2].min() > 100
    assert painted[0, 3].tolist() == [205, 205, 205]


# COCO


def coco_folder(folder: Path) -> Path:
    """Two pictures of 20 x 40 and 30 x 30 with a cat as a polygon, a dog as runs and a crowd of cats."""
    runs = np.zeros((20, 40), bool)
    runs[5:15, 20:30] = True
    flat = np.flatnonzero(np.diff(np.concatenate([[0], runs.T.ravel(), [0]])))
    counts = np.diff(np.concatenate([[0], flat, [800]])).tolist()
    picture = [{"id": 139, "file_name": "000000000139.jpg", "height": 20, "width": 40}]
    other = [{"id": 285, "file_name": "000000000285.jpg", "height": 30, "width": 30}]
    categories = [
        {"id": 17, "name": "cat", "isthing": 1},
        {"id": 18, "name": "dog", "isthing": 1},
        {"id": 187, "name": "sky", "isthing": 0},
    ]
    cat = {"id": 1, "image_id": 139, "category_id": 17, "iscrowd": 0, "bbox": [0, 0, 10, 10]}
    dog = {"id": 2, "image_id": 139, "category_id": 18, "iscrowd": 0, "bbox": [20, 5, 10, 10]}
    crowd = {"id": 3, "image_id": 139, "category_id": 17, "iscrowd": 1, "bbox": [30, 0, 10, 20]}
    crowd_mask = np.zeros((20, 40), bool)
    crowd_mask[:, 30:] = True
    annotations = [
        {**cat, "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]},
        {**dog, "segmentation": {"size": [20, 40], "counts": counts}},
        {**crowd, "segmentation": masks.encode(crowd_mask)},
    ]
    numbers = np.full((20, 40), 300)  # sky
    numbers[:10, :10], numbers[5:15, 20:30], numbers[15:, 35:] = 70_000, 2, 0
    colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], axis=-1).astype(np.uint8)
    segments = [
        {"id": 300, "category_id": 187, "iscrowd": 0},
        {"id": 70_000, "category_id": 17, "iscrowd": 0},
        {"id": 2, "category_id": 18, "iscrowd": 0},
    ]
    panoptic = [{"image_id": 139, "file_name": "000000000139.png", "segments_info": segments}]
    captions = [{"id": n, "image_id": 139, "caption": c} for n, c in enumerate(("a cat and a dog", "two animals"))]
    return helpers.write_files(
        folder,
        {
            "val2017/000000000139.jpg": helpers.make_jpeg(20, 40),
            "val2017/000000000285.jpg": helpers.make_jpeg(30, 30),
            "annotations/captions_val2017.json": {"images": picture + other, "annotations": captions},
            "annotations/instances_val2017.json": {
                "images": picture + other,
                "annotations": annotations,
                "categories": categories[:2],
            },
            "annotations/panoptic_val2017.json": {
                "images": picture,
                "annotations": panoptic,
                "categories": categories,
            },
            "annotations/panoptic_val2017/000000000139.png": helpers.encoded(Image.fromarray(colours)),
        },
    )


ALL = frozenset({"semseg", "panoptic", "objects", "captions"})


def test_coco_annotations_are_found_by_id_or_file_name_and_read_in_all_spellings(tmp_path: Path) -> None:
    source = open_truth(str(coco_folder(tmp_path)))
    by_id = {
        "origin": "annotations/captions_val2017.json:images[0]",
        "metadata": {"id": 139},
        "height": 20,
        "width": 40,
    }
    by_name = {"origin": "val2017/000000000139.jpg", "metadata": {}, "height": 10, "width": 20}  # a smaller copy
    for described in (by_id, by_name):
        truth = source.find("some key", described, ALL)
        assert truth is not None
        assert truth.objects is not None
        assert [(o.class_name, o.crowd) for o in truth.objects] == [("cat", False), ("dog", False), ("cat", True)]
        assert [int(o.mask.sum()) for o in truth.objects if o.mask is not None] == [100, 100, 200]
        assert truth.objects[1].box == (0.5, 0.25, 0.75, 0.75)
        assert truth.semseg is not None
        assert [source.classes[i] for i in truth.semseg[[0, 6, 19], [0, 22, 0]]] == ["cat", "dog", "sky"]
        assert truth.semseg[19, 39] == 255
        assert truth.captions == ("a cat and a dog", "two animals")
    assert source.things == {"cat", "dog"}
    assert source.find("0", {"origin": "x.jpg", "metadata": {}, "height": 20, "width": 40}, ALL) is None


def test_coco_picture_of_another_shape_is_refused(tmp_path: Path) -> None:
    source = open_truth(str(coco_folder(tmp_path)))
    with pytest.raises(ValueError, match="the picture has 40 x 20 pixels, its annotation 20 x 40"):
        source.find("k", {"origin": "000000000139.jpg", "metadata": {}, "height": 40, "width": 20}, ALL)


def test_coco_annotations_said_as_labels_are_perfect(tmp_path: Path) -> None:
    truth = open_truth(str(coco_folder(tmp_path)))
    found = truth.find("k", {"origin": "000000000139.jpg", "metadata": {}, "height": 20, "width": 40}, ALL)
    assert found is not None
    seen = found.moved(Crop(0, 0, 20, 36, 1), 20, 40, 50)
    assert seen.objects is not None
    assert seen.panoptic is not None
    things = [segment(o.class_name, o.mask) | {"score": 0.9} for o in seen.objects if not o.crowd]
    inside = [{**things[0], "box": [0.0, 0.2, 0.1, 0.4], "score": 0.95}]  # a cat in the crowd of cats: no mistake
    segments = [segment(s.class_name, seen.panoptic == s.number) for s in seen.segments]
    assert figures(DetMeasure(Spec(), truth, 50), (inside + things, seen))["ap75"] == pytest.approx(1)
    assert figures(InstanceMeasure(Spec(), truth, 50), (things, seen))["ap"] == pytest.approx(1)
    assert figures(PanopticMeasure(Spec(), truth, 50), (segments, seen))["pq"] == 1


def test_ingested_coco_samples_find_their_annotations(tmp_path: Path) -> None:
    _, dataset = helpers.ingested(coco_folder(tmp_path / "coco"), tmp_path / "dataset")
    source = open_truth(str(tmp_path / "coco" / "annotations"))
    found = {key: source.find(key, described, ALL) for key, described in dataset.values("source").items()}
    objects = {key: [o.class_name for o in t.objects or ()] for key, t in found.items() if t is not None}
    assert objects == {"000000000139": ["cat", "dog", "cat"], "000000000285": []}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("instances_x.json", {"images": [{"id": 1}], "annotations": []}),
        ("panoptic_x.json", {"images": [{"id": 1, "height": 10**9, "width": 4}], "annotations": [], "categories": []}),
        ("captions_x.json", {"images": [], "annotations": [{"image_id": 5, "caption": "x"}]}),
        ("instances_x.json", "[" * 100_000),
    ],
)
def test_broken_coco_files_are_refused_by_name(tmp_path: Path, name: str, content: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} in .* is not in COCO's format"):
        open_truth(str(helpers.write_files(tmp_path, {name: content})))


# NYUv2


@pytest.mark.parametrize(
    ("picture", "depth"),
    [
        ("rgb/0001.jpg", "depth/0001.png"),
        ("bathroom_0001/rgb_00045.jpg", "bathroom_0001/sync_depth_00045.png"),
        ("0001.jpg", "depth/0001.png"),
        ("test/0001_colors.png", "test/0001_depth.png"),
    ],
)
def test_picture_and_depth_of_one_shot_have_the_same_identity(picture: str, depth: str) -> None:
    assert identity(picture) == identity(depth)
    assert identity(picture) != identity(
        depth.replace("1.png", "2.png").replace("5.png", "6.png").replace("1_d", "2_d")
    )


def test_nyu_depth_is_read_in_its_unit_and_only_where_the_eigen_crop_counts(tmp_path: Path) -> None:
    depth = np.full((480, 640), 2500, np.uint16)
    depth[100, 100] = 0
    folder = tmp_path / "nyu"
    (folder / "depth").mkdir(parents=True)
    Image.fromarray(depth).save(folder / "depth" / "0007.png")
    described = {"origin": "rgb/0007.jpg", "metadata": {}, "height": 480, "width": 640}
    found = open_truth(str(folder)).find("k", described, frozenset({"depth"}))
    assert found is not None
    assert found.depth is not None
    assert found.depth[240, 320] == 2.5
    assert found.depth[100, 100] == 0
    assert int((found.depth > 0).sum()) == 426 * 560 - 1
    everything = open_truth(str(folder), DepthFiles(per_metre=5000, eigen_crop=False)).find("k", described, frozenset())
    assert everything is not None
    assert everything.depth is not None
    assert everything.depth[0, 0] == 0.5


def test_ingested_pictures_find_their_depth(tmp_path: Path) -> None:
    for number in (3, 4):
        depth = helpers.encoded(Image.fromarray(np.full((24, 32), 1000 * number, np.uint16)))
        files = {f"rgb/000{number}.jpg": helpers.make_jpeg(), f"depth/000{number}.png": depth}
        helpers.write_files(tmp_path / "nyu", files)
    _, dataset = helpers.ingested(tmp_path / "nyu" / "rgb", tmp_path / "dataset")
    source = open_truth(str(tmp_path / "nyu"))
    truths = [source.find(key, described, frozenset()) for key, described in dataset.values("source").items()]
    assert [float(t.depth[5, 5]) for t in truths if t is not None and t.depth is not None] == [3, 4]


def test_nyu_files_that_are_not_16_bit_grey_are_refused(tmp_path: Path) -> None:
    helpers.write_files(tmp_path, {"depth/1.png": helpers.make_png()})
    with pytest.raises(ValueError, match=r"depth/1\.png is no 16-bit grey picture, but RGB"):
        open_truth(str(tmp_path)).find("1", {"origin": "1.jpg"}, frozenset())
