"""The demo's tokenizers on scenes that nothing was trained or chosen on: bounds a little below the cards' figures.

224 pixels, 14 x 14 tokens, and 128 pixels, 8 x 8 tokens, by the same checkpoints.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import build

from fourmill.checkpoints import DEMO_FOLDER, resolve
from fourmill.labelers import LABELERS
from fourmill.pipeline.component import Batch
from fourmill.scenes import render
from fourmill.tokenizers.published import read_settings
from fourmill.tokenizers.sam_instance import inside
from fourmill.tokenizers.spatial import open_codec

COUNT = 32


@pytest.fixture(scope="module")
def unseen() -> dict[int, list[Any]]:
    """By size; the cards' figures are of 0..511."""
    return {size: [render(9, index, size) for index in range(1000, 1000 + COUNT)] for size in (128, 224)}


def test_demo_tokenizers_are_small() -> None:
    files = [
        f
        for folder in DEMO_FOLDER.iterdir()
        if "tok_" in folder.name or "text" in folder.name
        for f in folder.iterdir()
    ]
    assert sum(f.stat().st_size for f in files) < 15e6


def figures(name: str, values: Any, size: int | None = None, kind: str = "spatial") -> dict[str, float]:
    """Figures of a shipped tokenizer on `values`, and the share of codes that it used."""
    tokenizer = build(name, f"demo:{name}", kind, **({"size": size} if size else {}))
    tokens = tokenizer.encode(values)
    if size:
        assert tokenizer.grid == (size // 16, size // 16)
    used = len(np.unique(np.concatenate(tokens))) / tokenizer.vocabulary
    return {**tokenizer.codec.source.measure(values, tokenizer.decode(tokens)), "used": used}


def images(scenes: list[Any]) -> np.ndarray:
    return np.stack([scene.image.transpose(2, 0, 1) for scene in scenes])


def said(name: str, scenes: list[Any], **options: Any) -> list[np.ndarray]:
    """What a labeler says of the scenes."""
    labeler = LABELERS.build(options.pop("labeler", name), options)
    labeler.load("cpu")
    return labeler.run(Batch([str(i) for i in range(len(scenes))], pixels=images(scenes)))[name]


@pytest.mark.parametrize(("size", "psnr"), [(128, 24.0), (224, 26.0)])
def test_demo_rgb_restores_unseen_pictures(unseen: dict[int, list[Any]], size: int, psnr: float) -> None:
    found = figures("tok_rgb", images(unseen[size]), size)
    assert found["psnr_db"] > psnr
    assert found["used"] > 0.5


@pytest.mark.parametrize("size", [128, 224])
def test_demo_depth_restores_unseen_maps(unseen: dict[int, list[Any]], size: int) -> None:
    assert figures("tok_depth", [scene.depth for scene in unseen[size]], size)["abs_rel"] < 0.03
    labels = said("depth", unseen[size], checkpoint="demo:depth", output="metric")
    found = figures("tok_depth", labels, size)
    assert found["abs_rel"] < 0.03
    assert found["used"] > 0.5


@pytest.mark.parametrize("size", [128, 224])
def test_demo_normal_restores_what_the_teacher_says(unseen: dict[int, list[Any]], size: int) -> None:
    found = figures("tok_normal", said("normal", unseen[size], checkpoint="demo:normal"), size)
    assert found["median_angle_deg"] < 5.0
    assert found["used"] > 0.5


@pytest.mark.parametrize("size", [128, 224])
def test_demo_semseg_restores_unseen_maps(unseen: dict[int, list[Any]], size: int) -> None:
    found = figures("tok_semseg", [scene.semantic for scene in unseen[size]], size)
    assert found["pixel_accuracy"] > 0.96
    assert found["miou"] > 0.85
    assert found["used"] > 0.5


@pytest.mark.parametrize("size", [128, 224])
def test_demo_edges_are_found_again(unseen: dict[int, list[Any]], size: int) -> None:
    found = figures("tok_canny_edge", said("canny_edge", unseen[size]), size)
    assert found["edge_f1_1px"] > 0.5
    assert found["used"] > 0.5


def test_demo_clip_restores_what_the_teacher_says(unseen: dict[int, list[Any]]) -> None:
    found = figures("tok_clip", said("clip", unseen[128], checkpoint="demo:clip"))
    assert found["cosine"] > 0.9
    assert found["used"] > 0.5
    vectors = said("clip_global", unseen[128], labeler="clip", checkpoint="demo:clip")
    found = figures("tok_clip_global", vectors, kind="vector")
    assert found["cosine"] > 0.9


def test_demo_mask_codes_restore_instances(unseen: dict[int, list[Any]]) -> None:
    checkpoint = resolve("demo:tok_sam_instance")
    codec = open_codec(checkpoint, read_settings(checkpoint, "mask"), "cpu")
    found = [scene.instances == number for scene in unseen[128] for number in range(1, scene.instances.max() + 1)]
    masks = [inside(mask, 64) for mask in found if mask.sum() > 32]
    assert len(masks) > 60
    assert codec.source.measure(masks, codec.decode(codec.encode(masks)))["mask_iou"] > 0.95
