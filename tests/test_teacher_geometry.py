"""One geometry (invariant 7), through all seven teachers: labels of wide, tall, cropped and mirrored pictures lie on
the grid of their recorded crop.

The demo's teachers label scenes cut to odd aspect ratios, four crops each, half of them mirrored, through the worker.
Each label must fit the scene's truth moved through the same crop, and much better than truth that is mirrored, turned
upside down, or shifted by an eighth of the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import all_records
from PIL import Image

from fourmill.config import Config
from fourmill.labelers import LABELERS as LABELERS_TABLE
from fourmill.pipeline import masks
from fourmill.pipeline.component import Batch
from fourmill.pipeline.geometry import Crop
from fourmill.pipeline.ingest import IngestConfig, ingest
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.runner import run
from fourmill.pipeline.shards import read_shard
from fourmill.pipeline.store import open_store
from fourmill.scenes import render

SIZE, CROPS = 128, 4
WHOLE = 176  # pixels a side of a scene; a quarter is cut away, of its width or of its height
LABELERS: dict[str, Any] = {
    "depth": {"checkpoint": "demo:depth", "output": "metric"},
    "normal": {"checkpoint": "demo:normal"},
    "semantic": {"kind": "segmentation", "checkpoint": "demo:semseg"},
    "panoptic": {"kind": "segmentation", "checkpoint": "demo:panoptic", "outputs": ["panoptic", "instance"]}
    | {"stuff": ["floor", "wall"]},
    "detection": {"checkpoint": "demo:detection"},
    "clip": {"checkpoint": "demo:clip"},
    "sam": {"checkpoint": "demo:sam", "points_per_side": 8, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.6},
    "caption": {"checkpoint": "demo:caption", "max_new_tokens": 40},
}


def cut(array: np.ndarray, index: int) -> np.ndarray:
    """Even scenes become tall, odd ones wide."""
    quarter = WHOLE // 8
    return array[:, quarter:-quarter] if index % 2 == 0 else array[quarter:-quarter]


def moved(truth: np.ndarray, crop: Crop) -> np.ndarray:
    """Truth (H, W) of the cut scene, through the crop, at (SIZE, SIZE): nearest pixel centres, then mirrored."""
    centres = (np.arange(SIZE) + 0.5) / SIZE
    rows = (crop.top + centres * crop.height).astype(int)
    columns = (crop.left + centres * crop.width).astype(int)
    square = truth[rows][:, columns]
    return square[:, ::-1] if crop.flip else square


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One entry for each (sample, crop): truth moved through the crop, and every label."""
    folder = tmp_path_factory.mktemp("geometry")
    scenes = [render(12, index, WHOLE) for index in range(4)]
    (folder / "corpus").mkdir()
    for index, scene in enumerate(scenes):
        Image.fromarray(cut(scene.image, index)).save(folder / "corpus" / f"{index}.png")
        (folder / "corpus" / f"{index}.txt").write_text(scene.caption)
    dataset = str(folder / "dataset")
    ingest(str(folder / "corpus"), dataset, IngestConfig())
    tree = {
        "dataset": dataset,
        "crops": {"size": SIZE, "count": CROPS},
        "labelers": LABELERS,
        "ray": {"address": "none"},
    }
    assert run(Config.model_validate(tree)).ok
    store = open_store(dataset)
    shards = {r.modality: read_shard(store, r.name) for r in all_records(read_manifest(store))}
    found = []
    for row, scene in enumerate(scenes):
        for number in range(CROPS):
            crop = Crop(*map(int, shards["crop_settings"].value(row, number)))
            truth = {
                "depth": moved(cut(scene.depth, row), crop),
                "semantic": moved(cut(scene.semantic, row), crop),
                "instances": moved(cut(scene.instances, row), crop),
                "normals": np.stack([moved(cut(scene.normals[..., c], row), crop) for c in range(3)]),
            }
            if crop.flip:
                truth["normals"][0] *= -1
            truth["image"] = own_crop(cut(scene.image, row), crop)
            labels = {m: s.value(row, number if s.entry.per_crop else 0) for m, s in shards.items()}
            found.append({"truth": truth, "labels": labels, "crop": crop})
    network = LABELERS_TABLE.build("clip", LABELERS["clip"])
    network.load("cpu")
    for item in found:
        item["truth"]["clip"] = network.run(Batch(["k"], item["truth"].pop("image")[None]))["clip"][0]
    return found


def own_crop(image: np.ndarray, crop: Crop) -> np.ndarray:
    """uint8 (3, SIZE, SIZE): the crop as this test cuts it, by slicing."""
    square = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    square = square[:, ::-1] if crop.flip else square
    return np.asarray(Image.fromarray(square).resize((SIZE, SIZE), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def depth_fit(label: np.ndarray, truth: dict[str, np.ndarray]) -> float:
    return correlation(np.log(label), np.log(truth["depth"]))


def normal_fit(label: np.ndarray, truth: dict[str, np.ndarray]) -> float:
    return float((label * truth["normals"]).sum(axis=0).mean())


def class_fit(label: np.ndarray, truth: dict[str, np.ndarray]) -> float:
    return iou(label >= 2, truth["semantic"] >= 2)  # 0 and 1 are floor and wall


def segment_fit(label: list[dict[str, Any]], truth: dict[str, np.ndarray]) -> float:
    """Mean over the scene's objects of the best mask's IoU."""
    found = [masks.decode(item["mask"]) for item in label]
    wanted = [truth["instances"] == number for number in np.unique(truth["instances"]) if number]
    return float(np.mean([max((iou(w, f) for f in found), default=0.0) for w in wanted if w.sum() > 100]))


def box_fit(label: list[dict[str, Any]], truth: dict[str, np.ndarray]) -> float:
    boxes = [{"mask": masks.encode(filled(item["box"]))} for item in label if item["score"] > 0.3]
    solid = np.zeros_like(truth["instances"])
    for number in np.unique(truth["instances"])[1:]:
        mask = truth["instances"] == number
        if mask.sum() > 100:
            solid[filled(masks.box_of(mask)) & (solid == 0)] = number
    return segment_fit(boxes, {"instances": solid})


def filled(box: list[float]) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    x0, y0, x1, y1 = (round(edge * SIZE) for edge in box)
    mask[y0:y1, x0:x1] = True
    return mask


def feature_fit(label: np.ndarray, truth: dict[str, np.ndarray]) -> float:
    """Features have no truth but the network's on the test's own crop; what all cells have in common says nothing."""
    return correlation(*(f - f.mean(axis=(1, 2), keepdims=True) for f in (label, truth["clip"])))


# modality -> how well a label fits truth, the least it must be on average, and by how much more than misplaced truth
FITS: dict[str, tuple[Callable[[Any, dict[str, np.ndarray]], float], float, float]] = {
    "depth": (depth_fit, 0.9, 0.1),  # the floor alone looks alike in a mirror
    "normal": (normal_fit, 0.85, 0.1),
    "semseg": (class_fit, 0.7, 0.3),
    "panoptic": (segment_fit, 0.5, 0.25),
    "instance": (segment_fit, 0.5, 0.25),
    "sam_instance": (segment_fit, 0.5, 0.25),
    "det": (box_fit, 0.5, 0.25),
    "clip": (feature_fit, 0.9, 0.5),
}


def misplaced(truth: dict[str, np.ndarray], how: str) -> dict[str, np.ndarray]:
    change: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "mirrored": lambda a: a[..., ::-1],
        "upside down": lambda a: a[..., ::-1, :],
        "shifted": lambda a: np.roll(a, a.shape[-1] // 8, axis=-1),
    }
    return {name: change[how](array) for name, array in truth.items()}


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("flip", [0, 1])
def test_labels_lie_on_the_grid_of_their_crop(labelled: list[dict[str, Any]], name: str, flip: int) -> None:
    fit, least, margin = FITS[name]
    chosen = [c for c in labelled if c["crop"].flip == flip]
    assert len(chosen) >= 4
    aligned = np.mean([fit(c["labels"][name], c["truth"]) for c in chosen])
    assert aligned >= least
    for how in ("mirrored", "upside down", "shifted"):
        wrong = np.mean([fit(c["labels"][name], misplaced(c["truth"], how)) for c in chosen])
        allowed = margin if how != "shifted" else margin / 4  # large objects still overlap themselves
        assert wrong <= aligned - allowed, (how, wrong, aligned)


def test_captions_are_of_the_picture_not_of_its_last_crop(labelled: list[dict[str, Any]]) -> None:
    assert all(isinstance(c["labels"]["caption"], str) for c in labelled)
    by_sample = [{c["labels"]["caption"] for c in labelled[i : i + CROPS]} for i in range(0, len(labelled), CROPS)]
    assert all(len(found) == 1 for found in by_sample)
    assert len(set().union(*by_sample)) > 1
