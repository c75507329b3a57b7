"""The teachers' labelers on small checkpoints of the real classes, loaded from local folders as any user's would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fourmill.checkpoints import resolve
from fourmill.labelers import LABELERS
from fourmill.pipeline.component import Batch, Component

SIZE = 64


def batch(count: int = 3, size: int = SIZE) -> Batch:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return Batch([f"k{i}" for i in range(count)], pixels)


def labeler(name: str, **options: Any) -> Component:
    component = LABELERS.build(name, options)
    component.load("cpu")
    return component


def save_dpt(folder: Path) -> Path:
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
        reassemble_factors=[4, 2, 1, 0.5],
        is_hybrid=False,
    )
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}, keep_aspect_ratio=True).save_pretrained(folder)
    return folder


def save_segformer(folder: Path) -> Path:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        id2label={0: "floor", 1: "wall", 2: "sphere"},
        label2id={"floor": 0, "wall": 1, "sphere": 2},
    )
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def save_mask2former(folder: Path) -> Path:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=2, decoder_layers=3, num_attention_heads=2, num_queries=5,
        id2label={0: "cat", 1: "dog", 2: "sky", 3: "sea"},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, num_labels=4).save_pretrained(folder)
    return folder


def test_depth_comes_back_at_the_crops_size_even_if_the_processor_would_keep_aspect_ratios(tmp_path: Path) -> None:
    made = labeler("depth", checkpoint=str(save_dpt(tmp_path / "dpt")), output="inverse")
    depths = made.run(batch(size=48))["depth"]
    assert [(d.shape, d.dtype) for d in depths] == [((48, 48), np.dtype(np.float32))] * 3
    assert made.spec("depth").convention == "inverse"


@pytest.mark.parametrize(("save", "names"), [(save_segformer, 3), (save_mask2former, 4)])
def test_semantic_and_universal_networks_both_give_class_maps(tmp_path: Path, save: Any, names: int) -> None:
    made = labeler("semseg", checkpoint=str(save(tmp_path / "net")))
    maps = made.run(batch())["semseg"]
    assert [(m.shape, m.dtype) for m in maps] == [((SIZE, SIZE), np.dtype(np.uint8))] * 3
    assert all(m.max() < names for m in maps)
    assert len(made.spec("semseg").classes or ()) == names


def test_checkpoint_of_another_family_is_refused_by_name(tmp_path: Path) -> None:
    folder = str(save_dpt(tmp_path / "dpt"))
    with pytest.raises(
        ValueError, match="holds DPTForDepthEstimation, which is not one for AutoModelForUniversalSegmentation or"
    ):
        labeler("semseg", checkpoint=folder)


def test_missing_weights_are_fatal_not_random(tmp_path: Path) -> None:
    folder = save_segformer(tmp_path / "net")
    weights = load_file(folder / "model.safetensors")
    weights.pop("decode_head.classifier.bias")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .*decode_head.classifier.bias"):
        labeler("semseg", checkpoint=str(folder))


def test_half_precision_checkpoint_runs_in_float32(tmp_path: Path) -> None:
    folder = save_segformer(tmp_path / "net")
    weights = {k: v.half() if v.is_floating_point() else v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    made: Any = labeler("semseg", checkpoint=str(folder))
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}


def test_changed_weights_change_the_lineage_and_moving_them_does_not(tmp_path: Path) -> None:
    folder = save_segformer(tmp_path / "net")
    before = LABELERS.build("semseg", {"checkpoint": str(folder)}).lineage()["checkpoint"]["digest"]
    folder.rename(tmp_path / "moved")
    moved = LABELERS.build("semseg", {"checkpoint": str(tmp_path / "moved")}).lineage()["checkpoint"]["digest"]
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    weights["decode_head.classifier.bias"] += 1e-3
    save_file(weights, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    changed = LABELERS.build("semseg", {"checkpoint": str(tmp_path / "moved")}).lineage()["checkpoint"]["digest"]
    assert before == moved != changed


def test_clip_dense_map_is_every_token_normed_and_projected() -> None:
    made: Any = labeler("clip", checkpoint="demo:clip")
    pixels = batch(2, 128)
    found = made.run(pixels)
    visual = made.model.visual
    with torch.inference_mode():
        tokens = visual.ln_post(visual.transformer(visual._embeds(made._prepared(pixels.pixels)))) @ visual.proj
        embedding = made.model.encode_image(made._prepared(pixels.pixels))
    grid = tokens[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2).numpy()  # 128 pixels in patches of 16
    np.testing.assert_allclose(np.stack(found["clip"]), grid, atol=1e-4)
    np.testing.assert_allclose(np.stack(found["clip_global"]), embedding.numpy(), atol=1e-4)


def test_caption_is_text_without_special_tokens() -> None:
    captions = labeler("caption", checkpoint="demo:caption", max_new_tokens=12).run(batch(2, 128))["caption"]
    assert all(isinstance(c, str) and c and "[" not in c for c in captions)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("demo:dept", "no checkpoint 'demo:dept': .* beside it: .*depth"),
        ("./nowhere", "not a folder"),
        ("nowhere", "not a folder, and a hub id would be 'owner/name'"),
    ],
)
def test_unknown_checkpoint_is_refused_saying_what_was_looked_for(reference: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(reference)


def test_labels_of_the_demo_teachers_resemble_the_truth_on_the_same_grid() -> None:
    """Geometry and conventions together: any flip, shift or unit mistake fails this by far."""
    from fourmill.pipeline.measures import absrel, confusion, mean_iou
    from fourmill.scenes import render

    scenes = [render(99, i, 128) for i in range(12)]
    pictures = Batch([str(i) for i in range(12)], np.stack([s.image for s in scenes]).transpose(0, 3, 1, 2))
    depths = labeler("depth", checkpoint="demo:depth", output="metric").run(pictures)["depth"]
    maps = labeler("semseg", checkpoint="demo:semseg").run(pictures)["semseg"]
    assert np.mean([absrel(d, s.depth)[0] for d, s in zip(depths, scenes, strict=True)]) < 0.15
    assert np.mean([np.median(d) / np.median(s.depth) for d, s in zip(depths, scenes, strict=True)]) == pytest.approx(
        1, abs=0.15
    )
    assert mean_iou(np.sum([confusion(m, s.semantic) for m, s in zip(maps, scenes, strict=True)], axis=0)) > 0.65
