"""What a label must look like: the checks at the seam, each broken on purpose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fourmill.modalities import modality
from fourmill.pipeline import masks
from fourmill.pipeline.conventions import ConventionError, check, valid_mask
from fourmill.pipeline.shards import Spec
from fourmill.scenes import render

SCENE = render(5, 3, 64)
METRIC = Spec(convention="metric")
CLASSES = Spec(classes=("floor", "wall", "sphere", "box", "cylinder", "cone"))


def normals() -> np.ndarray:
    return np.ascontiguousarray(SCENE.normals.transpose(2, 0, 1))


def segments() -> list[dict[str, Any]]:
    """The scene's objects as panoptic segments, the largest first."""
    found = []
    for thing in sorted(SCENE.objects, key=lambda t: -t.area):
        mask = SCENE.instances == thing.instance
        found.append(
            {"class_name": thing.class_name, "is_thing": True, "score": 1.0, "box": masks.box_of(mask)}
            | {"area": int(mask.sum()), "mask": masks.encode(mask)}
        )
    return found


def person(**changed: Any) -> dict[str, Any]:
    """Somebody who stands upright."""
    identity = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    body = {"orientation": identity, "pose": identity * 23, "camera": [0.9, 0.0, 0.1], "shape": [0.0] * 10}
    return {"box": [0.1, 0.2, 0.3, 0.9], **body, **changed}


def edges() -> np.ndarray:
    found = np.zeros((16, 16), np.uint8)
    found[:, 7] = 255
    return found


def broken(name: str, spec: Spec, value: Any) -> str:
    with pytest.raises(ConventionError) as caught:
        check(modality(name), spec, value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "spec", "value"),
    [
        ("depth", METRIC, SCENE.depth),
        ("depth", Spec(convention="inverse"), -SCENE.depth),
        ("normal", Spec(), normals()),
        ("semseg", CLASSES, SCENE.semantic),
        ("semseg", CLASSES, np.full((8, 8), 255, np.uint8)),
        ("panoptic", Spec(), segments()),
        ("instance", Spec(), segments()),
        ("instance", Spec(), []),
        ("det", Spec(), [{"box": [0.1, 0.2, 0.3, 0.9], "class_name": "box", "score": 0.5}]),
        ("clip", Spec(), np.arange(12, dtype=np.float32).reshape(3, 2, 2)),
        ("caption", Spec(), "a red box"),
        ("dinov2_global", Spec(), np.arange(4, dtype=np.float32)),
        ("canny_edge", Spec(), edges()),
        ("canny_edge", Spec(), np.zeros((16, 16), np.uint8)),
        ("color_palette", Spec(), {"1": [[0, 128, 255]]}),
        ("color_palette", Spec(), {str(n): [[n, n, n]] * n for n in range(1, 8)}),
        ("human_poses", Spec(), [person(), person()]),
        ("human_poses", Spec(), []),
        ("metadata", Spec(), {"original_width": 640, "objectness": 1.0, "aesthetic_score": 5.5, "entropy": 7}),
    ],
)
def test_truth_passes(name: str, spec: Spec, value: Any) -> None:
    check(modality(name), spec, value)


def test_scene_objects_have_the_boxes_of_their_masks() -> None:
    for thing, segment in zip(sorted(SCENE.objects, key=lambda t: -t.area), segments(), strict=True):
        assert np.allclose(np.array(thing.box) / 64, segment["box"], atol=1e-6)


def test_maps_that_are_not_finite_or_constant_are_refused() -> None:
    nan = SCENE.depth.copy()
    nan[0, :32] = np.nan
    assert broken("depth", METRIC, nan) == "not finite: 0.8% of the values are NaN or infinite"
    assert broken("depth", METRIC, np.full((4, 4), 2.5)) == "constant output: every value is 2.5"
    assert broken("clip", Spec(), np.zeros((4, 2, 2))) == "constant output: every value is 0"


def test_depth_of_the_wrong_sign_or_shape_is_refused() -> None:
    assert broken("depth", METRIC, -SCENE.depth).startswith("negative depth: down to -")
    assert broken("depth", METRIC, SCENE.depth[None]) == "wrong shape: depth must be (S, S), not (1, 64, 64)"


def test_normals_in_another_frame_are_refused() -> None:
    away = normals()
    assert broken("normal", Spec(), -away).startswith("wrong frame: 100% of the normals point away from the camera")
    assert broken("normal", Spec(), away * [[[1]], [[-1]], [[-1]]]).startswith("wrong frame: ")  # OpenGL's axes
    assert broken("normal", Spec(), (away + 1) / 2).startswith("not unit: ")  # a colour code
    assert broken("normal", Spec(), SCENE.normals).startswith("wrong shape: normals must be (3, S, S)")


def test_class_ids_without_a_name_are_refused() -> None:
    assert broken("semseg", CLASSES, np.array([[0, 6]])) == (
        "unknown class: id 6, the classes are 0..5 and 255 for void"
    )


def test_objects_that_contradict_their_masks_are_refused() -> None:
    found = segments()
    xywh = [found[0]["box"][0], found[0]["box"][1], 0.25, 0.25]
    assert broken("instance", Spec(), [{**found[0], "box": xywh}]).startswith("wrong box: ")
    assert broken("instance", Spec(), [{**found[0], "area": 3}]).startswith("wrong area: 3 for a mask of ")
    assert broken("panoptic", Spec(), [found[0], found[0]]) == "overlap: a pixel belongs to 2 panoptic segments"
    assert broken("sam_instance", Spec(), [{**found[0], "score": 0.2}, {**found[0], "score": 0.4}]) == (
        "wrong order: objects must come by falling score"
    )


@pytest.mark.parametrize("box", [[0.3, 0.2, 0.1, 0.9], [0.1, 0.2, 12.0, 0.9], [0.1, 0.2, 0.1, 0.9]])
def test_boxes_that_are_no_boxes_are_refused(box: list[float]) -> None:
    found = broken("det", Spec(), [{"box": box, "class_name": "box", "score": 0.5}])
    assert found == f"bad box: {box} is not x0 < x1, y0 < y1 in 0..1"


def test_blank_captions_are_refused() -> None:
    assert broken("caption", Spec(), " \n") == "blank text: ' \\n'"


def test_edges_that_are_no_lines_are_refused() -> None:
    assert broken("canny_edge", Spec(), 255 - edges()) == "inverted edges: 94% of the pixels are edges"
    assert broken("canny_edge", Spec(), edges() // 255) == "wrong range: edges are 255 and the rest 0, not 1 and 0"
    assert broken("canny_edge", Spec(), edges()[None]) == "wrong shape: edges must be (S, S), not (1, 16, 16)"


@pytest.mark.parametrize(
    ("palettes", "reason"),
    [
        ({}, "wrong palettes: ; they are named 1, 2, … up to 7"),
        ([[[0, 0, 0]]], "wrong palettes: list; they are named 1, 2, … up to 7"),
        ({"2": [[0, 0, 0], [9, 9, 9]]}, "wrong palettes: 2; they are named 1, 2, … up to 7"),
        (
            {str(n): [[0, 0, 0]] * n for n in range(1, 9)},
            "wrong palettes: 1, 2, 3, 4, 5, 6, 7, 8; they are named 1, 2,",
        ),
        ({"1": [[0, 0, 0], [9, 9, 9]]}, "wrong palettes: 1 holds 2 colours"),
        ({"1": [[0, 0, 256]]}, "bad colour: [0, 0, 256] is not three whole numbers 0..255"),
        ({"1": [[0.5, 0.5, 1.0]]}, "bad colour: [0.5, 0.5, 1.0] is not three whole numbers 0..255"),
        ({"1": [[0, 0, 0, 255]]}, "bad colour: [0, 0, 0, 255] is not three whole numbers 0..255"),
    ],
)
def test_palettes_that_are_none_are_refused(palettes: Any, reason: str) -> None:
    assert broken("color_palette", Spec(), palettes).startswith(reason)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, "wrong type: metadata are a table of names and numbers, not {}"),
        ({"brightnes": 3.0}, "unknown fact: 'brightnes' is none of 4M's metadata"),
        ({"brightness": "3"}, "not a number: brightness is '3'"),
        ({"brightness": True}, "not a number: brightness is True"),
        ({"entropy": float("nan")}, "not a number: entropy is nan"),
        ({"n_humans": 1.5}, "not a count: n_humans is 1.5"),
        ({"original_width": -1}, "not a count: original_width is -1"),
        ({"objectness": 45}, "not a share: objectness is 45, outside of 0..1"),
    ],
)
def test_facts_that_are_none_are_refused(facts: dict[str, Any], reason: str) -> None:
    assert broken("metadata", Spec(), facts).startswith(reason)


def test_people_who_are_none_are_refused() -> None:
    axis_angles, zeros = [0.0] * 69, [0.0] * 207
    mirrored = [-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert broken("human_poses", Spec(), [person(pose=axis_angles)]) == "wrong shape: pose must be (207,), not (69,)"
    assert broken("human_poses", Spec(), [person(pose=zeros)]) == (
        "not a rotation: pose has a matrix that is 1.00 off from orthonormal"
    )
    assert broken("human_poses", Spec(), [person(orientation=mirrored)]) == (
        "not a rotation: orientation has a matrix that mirrors"
    )
    assert broken("human_poses", Spec(), [person(camera=[0.0, float("inf"), 0.0])]) == (
        "not finite: camera holds NaN or infinite values"
    )
    assert broken("human_poses", Spec(), [person(), person(box=[10, 20, 30, 90])]).startswith(
        "bad box: [10, 20, 30, 90]"
    )
    assert broken("human_poses", Spec(), person()) == "wrong type: people are a list, not dict"


def test_valid_masks_leave_out_what_has_no_label() -> None:
    depth, normal, classes = np.array([[0, 1.5]]), np.zeros((3, 1, 2)), np.array([[255, 3]])
    normal[:, 0, 1] = (0, 0, -1)
    for name, value in (("depth", depth), ("normal", normal), ("semseg", classes)):
        assert valid_mask(modality(name), value).tolist() == [[False, True]]
