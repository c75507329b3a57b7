"""The figures of the demo teachers: small cases whose values can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fourmill.demo.teacher_figures import (
    box_figures,
    caption_figures,
    depth_figures,
    grid_points,
    mask_figures,
    normal_figures,
    panoptic_figures,
    retrieval_figures,
    semseg_figures,
    stability,
)
from fourmill.demo.teacher_truth import boxes, segments

# A 4 x 6 picture: wall above, floor below, a box (class 3) on the left and a cone (class 5) on the right.
SEMANTIC = np.array(
    [[1, 1, 1, 1, 1, 1], [1, 3, 3, 1, 5, 1], [0, 3, 3, 0, 5, 0], [0, 0, 0, 0, 0, 0]],
    dtype=np.uint8,
)
INSTANCES = np.array(
    [[0, 0, 0, 0, 0, 0], [0, 2, 2, 0, 1, 0], [0, 2, 2, 0, 1, 0], [0, 0, 0, 0, 0, 0]],
    dtype=np.uint8,
)


def test_segments_are_the_objects_by_number_then_floor_and_wall() -> None:
    masks, classes = segments(SEMANTIC, INSTANCES)
    assert classes == [5, 3, 0, 1]
    assert masks.sum(axis=(1, 2)).tolist() == [2, 4, 9, 9]
    assert (masks.sum(axis=0) == 1).all()  # every pixel in exactly one


def test_boxes_are_half_open_extents_with_shape_numbers() -> None:
    corners, shapes = boxes(SEMANTIC, INSTANCES)
    assert corners.tolist() == [[4, 1, 5, 3], [1, 1, 3, 3]]
    assert shapes == [3, 1]  # cone, box


def test_perfect_and_scaled_depth() -> None:
    truth = np.random.default_rng(0).uniform(1, 8, (2, 8, 8))
    figures = depth_figures(2 * truth, truth)
    assert figures["absrel"] == pytest.approx(1.0)
    assert figures["aligned_absrel"] == pytest.approx(0.0, abs=1e-9)
    assert (figures["delta1"], figures["aligned_delta1"]) == (0.0, 1.0)


def test_normals_of_any_length_turned_by_known_angles() -> None:
    truth = np.zeros((1, 1, 4, 3))
    truth[..., 2] = -1
    angles = np.radians([0, 20, 25, 90])
    said = 3 * np.stack([np.sin(angles), np.zeros(4), -np.cos(angles)], axis=-1).reshape(1, 1, 4, 3)
    figures = normal_figures(said, truth)
    assert figures["median_deg"] == pytest.approx(22.5)
    assert figures["mean_deg"] == pytest.approx(135 / 4)
    assert (figures["within_11.25"], figures["within_22.5"], figures["within_30"]) == (0.25, 0.5, 0.75)


def test_opposite_normals_are_180_degrees_off() -> None:
    truth = np.full((1, 2, 2, 3), 1.0)
    assert normal_figures(-truth, truth)["median_deg"] == pytest.approx(180, abs=0.1)


def test_class_maps_half_right() -> None:
    truth = np.repeat(np.arange(6, dtype=np.uint8), 4).reshape(1, 4, 6)
    wrong = truth.copy()
    wrong[0, :, :] = 0
    assert semseg_figures(truth, truth)["miou"] == 1.0
    assert semseg_figures(wrong, truth)["pixel_accuracy"] == pytest.approx(4 / 24)


def _said(segmentation: np.ndarray, classes: dict[int, int]) -> dict[str, object]:
    info = [{"id": number, "label_id": label} for number, label in classes.items()]
    return {"segmentation": torch.from_numpy(segmentation.astype(np.int64)), "segments_info": info}


def test_panoptic_quality_of_the_truth_is_one_for_the_classes_that_are_there() -> None:
    numbers = INSTANCES + 2 * (INSTANCES == 0) * (SEMANTIC == 0) * 2 + 3 * (INSTANCES == 0) * (SEMANTIC == 1)
    said = _said(numbers, {1: 5, 2: 3, 4: 0, 3: 1})
    figures = panoptic_figures([said], [segments(SEMANTIC, INSTANCES)])
    assert [figures[f"pq_{name}"] for name in ("floor", "wall", "box", "cone")] == [1, 1, 1, 1]
    assert figures["pq_sphere"] == 0
    assert figures["pq"] == pytest.approx(4 / 6)


def test_panoptic_quality_counts_a_class_error_twice_and_a_loose_mask_by_its_iou() -> None:
    # The cone is called a sphere: a false positive and a false negative. The box covers 4 of its 5 pixels' union.
    masks, classes = segments(SEMANTIC, INSTANCES)
    segmentation = np.where(masks[0], 1, np.where(masks[1], 2, 0))
    segmentation[1, 3] = 2
    figures = panoptic_figures([_said(segmentation, {1: 2, 2: 3})], [(masks, classes)])
    assert figures["pq_box"] == pytest.approx(0.8)
    assert (figures["pq_cone"], figures["pq_sphere"], figures["pq_floor"]) == (0, 0, 0)


def test_panoptic_segment_of_half_the_union_is_no_match() -> None:
    masks, classes = segments(SEMANTIC, INSTANCES)
    segmentation = np.where(masks[1], 2, 0)
    segmentation[1:3, 3:5] = 2  # twice as large as the box: IoU exactly one half
    figures = panoptic_figures([_said(segmentation, {2: 3})], [(masks, classes)])
    assert figures["pq_box"] == 0


def _boxes(*found: tuple[float, int, list[float]]) -> dict[str, torch.Tensor]:
    scores, labels, corners = zip(*found, strict=True)
    return {"scores": torch.tensor(scores), "labels": torch.tensor(labels), "boxes": torch.tensor(corners)}


def test_average_precision_of_exact_boxes_is_one_and_of_wrong_classes_zero() -> None:
    truth = [(np.array([[4.0, 1, 50, 30], [60, 20, 90, 70]]), [3, 1])]
    right = [_boxes((0.9, 3, [4, 1, 50, 30]), (0.8, 1, [60, 20, 90, 70]))]
    wrong = [_boxes((0.9, 1, [4, 1, 50, 30]), (0.8, 3, [60, 20, 90, 70]))]
    assert box_figures(right, truth)["ap50"] == pytest.approx(1.0)
    assert box_figures(right, truth)["ap"] == pytest.approx(1.0)
    assert box_figures(wrong, truth)["ap50"] == 0.0


def test_average_precision_falls_when_a_false_box_ranks_first() -> None:
    truth = [(np.array([[0.0, 0, 40, 40]]), [0])]
    found = [_boxes((0.9, 0, [60, 60, 100, 100]), (0.5, 0, [0, 0, 40, 40]))]
    assert box_figures(found, truth)["ap50_sphere"] == pytest.approx(0.5)  # precision 1/2 at every recall


def test_box_of_60_percent_overlap_counts_at_one_half_but_not_at_three_quarters() -> None:
    truth = [(np.array([[0.0, 0, 40, 40]]), [2])]
    figures = box_figures([_boxes((0.9, 2, [0, 0, 40, 24]))], truth)
    assert figures["ap50"] == pytest.approx(1.0)
    assert figures["ap"] == pytest.approx(0.3)  # at 0.50, 0.55 and 0.60 of ten thresholds


def test_no_detection_at_all_scores_zero() -> None:
    truth = [(np.array([[0.0, 0, 40, 40]]), [2])]
    nothing = {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    assert box_figures([nothing], truth)["ap50"] == 0.0


def test_best_mask_is_taken_per_object_and_kept_masks_need_score_and_stability() -> None:
    sure, unsure = 9.0, 0.5
    box, cone = INSTANCES == 2, INSTANCES == 1
    half = box.copy()
    half[2] = False  # two of the box's four pixels
    logits = np.stack([np.where(box, sure, -sure), np.where(half, sure, -sure), np.where(cone, unsure, -unsure)])
    figures = mask_figures([logits], [np.array([0.5, 0.9, 0.9])], INSTANCES[None])
    assert figures["best_iou"] == pytest.approx(1.0)  # the exact box, and the exact cone
    # The exact box expects too little of itself, and the cone's mask is empty at a logit of one.
    assert figures["kept_best_iou"] == pytest.approx((0.5 + 0) / 2)
    assert figures["kept_share"] == pytest.approx(1 / 3)
    assert (figures["demo_best_iou"], figures["demo_share"]) == (figures["kept_best_iou"], figures["kept_share"])
    assert figures["score_error"] == pytest.approx((0.5 + 0.1) / 2)


def test_stability_is_the_overlap_of_the_masks_at_plus_and_minus_one() -> None:
    logits = np.array([[[2.0, 2, 0, -2]], [[2, 2, 2, 2]], [[-2, -2, -2, -2]]])
    assert stability(logits).tolist() == pytest.approx([2 / 3, 1, 0])


def test_grid_points_are_cell_middles_row_by_row() -> None:
    assert grid_points(2, 128).view(-1, 2).tolist() == [[32, 32], [96, 32], [32, 96], [96, 96]]


def test_retrieval_of_identical_and_of_shifted_features() -> None:
    features = torch.eye(6)
    assert retrieval_figures(features, features)["image_to_text_r1"] == 1.0
    assert retrieval_figures(features, features.roll(1, dims=0))["text_to_image_r1"] == 0.0


def test_caption_phrases_count_as_a_multiset() -> None:
    figures = caption_figures(["a red box and a red box"], ["a red box and a blue cone"])
    assert figures["phrase_f1"] == 0.5
    assert caption_figures(["a red box"], ["a red box"])["exact"] == 1.0
