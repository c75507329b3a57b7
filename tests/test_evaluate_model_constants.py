"""The constant predictors: each is the best of its kind on what it was fitted on; brute force on small cases."""

from __future__ import annotations

import numpy as np
import pytest

from fourmill.evaluate.model.constant_boxes import fit_boxes, ious
from fourmill.evaluate.model.constants import climb_miou, fit_caption, fit_depth, fit_features, fit_normal, fit_semseg
from fourmill.evaluate.model.spread_boxes import SAID
from fourmill.evaluate.truth_scenes import RenderedScenes
from fourmill.pipeline.shards import Spec

RANDOM = np.random.default_rng(5)
SCENES = RenderedScenes()


def test_depth_constants_of_literal_maps() -> None:
    maps = [np.array([[value, 2.0]], np.float32) for value in (2.0, 4.0, 4.8, 5.0, 8.0)]
    found = fit_depth(maps, Spec(), SCENES)
    values = {name: float(value[0, 0]) for name, value in found.values.items()}
    assert values["median"] == pytest.approx(4.8)
    assert values["1/depth-weighted median"] == pytest.approx(4.0)  # 1/2 + 1/4 pass half of 1.28
    assert values["mean"] == pytest.approx(4.76)
    within = [abs(np.log(values["most within 1.25"] / v)) <= np.log(1.25) for v in (2.0, 4.0, 4.8, 5.0, 8.0)]
    assert within == [False, True, True, True, False]
    assert all(value[0, 1] == pytest.approx(2.0, rel=0.26) for value in found.values.values())
    assert found.samples == 5
    assert [found.name(f) for f in ("absrel", "rmse", "delta1", "log10", "absrel_median")] == [
        "1/depth-weighted median",
        "mean",
        "most within 1.25",
        "median",
        "median",
    ]


def test_no_other_depth_is_better_in_the_figure_that_a_constant_is_made_for() -> None:
    depths = RANDOM.lognormal(1, 0.5, 101).astype(np.float32)
    found = fit_depth([np.full((1, 1), d) for d in depths], Spec(), SCENES)
    errors = {
        "absrel": lambda c: np.mean(np.abs(c - depths) / depths),
        "rmse": lambda c: np.mean((c - depths) ** 2),
        "delta1": lambda c: -np.mean(np.maximum(c / depths, depths / c) < 1.25),
        "": lambda c: np.mean(np.abs(c - depths)),
    }
    for figure, error in errors.items():
        best = min(error(c) for c in np.linspace(0.3, 12, 4000))
        assert error(float(found.values[found.name(figure)][0, 0])) <= best + 1e-4, figure


def test_pixels_without_depth_count_for_nothing() -> None:
    maps = [np.array([[value]], np.float32) for value in (0.0, 0.0, 0.0, 3.0, 5.0)]
    found = fit_depth(maps, Spec(), SCENES)
    assert float(found.values["mean"][0, 0]) == pytest.approx(4.0)
    assert float(found.values["median"][0, 0]) == pytest.approx(3.0)


def test_median_direction_has_the_lower_mean_angle_where_some_normals_are_far_off() -> None:
    normals = np.zeros((3, 100), np.float64)
    normals[2] = -1
    normals[:, 70:] = np.array([[0.995], [0], [-0.0999]])
    normals += RANDOM.normal(scale=0.02, size=normals.shape)
    normals /= np.linalg.norm(normals, axis=0)
    found = fit_normal([n.reshape(3, 1, 1).astype(np.float32) for n in normals.T], Spec(), SCENES).values
    angle = {n: np.degrees(np.arccos(np.clip(v[:, 0, 0] @ normals, -1, 1))) for n, v in found.items()}
    assert angle["median direction"].mean() < angle["mean direction"].mean() - 1
    assert np.sqrt((angle["mean direction"] ** 2).mean()) < np.sqrt((angle["median direction"] ** 2).mean())
    assert all(np.linalg.norm(v[:, 0, 0]) == pytest.approx(1) for v in found.values())


def test_pixels_without_any_normal_look_at_the_camera() -> None:
    found = fit_normal([np.zeros((3, 1, 1), np.float32)] * 2, Spec(), SCENES).values
    assert all(value[:, 0, 0].tolist() == [0, 0, -1] for value in found.values())


def test_most_frequent_class_of_literal_maps_and_void_is_none() -> None:
    maps = [np.array([row], np.uint8) for row in ([0, 1, 255], [0, 1, 2], [1, 1, 255])]
    found = fit_semseg(maps, Spec(classes=("floor", "wall", "box")), SCENES)
    assert found.values["most frequent class"].tolist() == [[0, 1, 2]]
    assert (found.name("pixel_accuracy"), found.name("miou")) == ("most frequent class", "best mIoU")


def test_climbing_reaches_the_best_miou_of_all_maps_of_a_small_case() -> None:
    # A class that is nowhere the most frequent one is still worth a pixel to the mean over classes.
    share_CP = np.array([[0.9, 0.6, 0.55, 0.9], [0.1, 0.4, 0.45, 0.1]])

    def miou(map_P: np.ndarray) -> float:
        said_CP = np.arange(2)[:, None] == map_P
        inter_C = (share_CP * said_CP).sum(1)
        return float((inter_C / (share_CP.sum(1) + said_CP.sum(1) - inter_C)).mean())

    frequent_P = share_CP.argmax(0)
    best = max(miou(np.array(np.unravel_index(n, (2,) * 4))) for n in range(16))
    found = miou(climb_miou(share_CP, frequent_P))
    assert miou(frequent_P) < found
    assert found == pytest.approx(best)


def thing(name: str, low: float, score: float = 0.9) -> dict[str, object]:
    return {"class_name": name, "box": [low, low, low + 0.2, low + 0.2], "score": score}


def test_boxes_that_hit_most_are_said_and_the_rest_only_ranked() -> None:
    labels = [[thing("box", 0.1)]] * 8 + [[thing("box", 0.1), thing("cone", 0.7)]] + [[thing("cone", 0.5, score=0.3)]]
    found = fit_boxes(labels, Spec(), SCENES)
    (boxes,) = found.values.values()
    assert [(b["class_name"], b["box"][0]) for b in boxes] == [("box", 0.1), ("cone", 0.7)]  # unsure ones are no labels
    # The box alone: 2 * 9 / (10 + 10); with the cone 2 * 10 / (20 + 10).
    assert [b["score"] >= SAID for b in boxes] == [True, False]
    assert boxes[0]["score"] == pytest.approx(0.9 * (1 - SAID) + SAID)
    assert found.samples == 10


def test_a_box_hits_one_object_of_a_picture_only() -> None:
    labels = [[thing("box", 0.1), thing("box", 0.1)], [thing("box", 0.6)], [thing("box", 0.6)]]
    (boxes,) = fit_boxes(labels, Spec(), SCENES).values.values()
    assert boxes[0]["box"][0] == 0.6


def test_iou_of_literal_boxes() -> None:
    first, second = np.array([[0, 0, 0.5, 0.5]]), np.array([[0, 0, 0.5, 0.4], [0.5, 0.5, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_allclose(ious(first, second), [[0.8, 0, 0]])


def test_most_typical_caption_shares_most_with_the_others() -> None:
    texts = ["a red box", "a red box and a blue cone", "a blue cone", "a green sphere"]
    found = fit_caption(texts, Spec(), SCENES)
    assert found.values == {"most typical caption": "a red box and a blue cone"}


def test_mean_features_do_not_weigh_by_length() -> None:
    found = fit_features([np.array([[[100.0]], [[0.0]]]), np.array([[[0.0]], [[1.0]]])], Spec(), SCENES)
    assert found.values["mean features"].ravel().tolist() == [0.5, 0.5]
