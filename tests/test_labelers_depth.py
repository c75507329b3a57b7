"""The depth labeler on small checkpoints of every family, and on networks replaced by the truth of rendered scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_helpers import Gives, labeler, mixed_batch, pictures_of, scenes
from midas_network import midas_network
from tiny_dense import DEPTH, save_dpt, save_dpt_of_normals, save_omnidata, save_segformer, save_zoedepth

from fourmill.labelers import LABELERS
from fourmill.labelers.loading import process
from fourmill.pipeline.component import Batch
from fourmill.pipeline.measures import absrel


@pytest.mark.parametrize("family", DEPTH)
def test_every_family_gives_its_own_processors_maps_for_a_batch_of_mixed_sizes(tmp_path: Path, family: str) -> None:
    save, kind = DEPTH[family]
    made, batch = labeler("depth", save(tmp_path / family), output=kind), mixed_batch()
    depths = made.run(batch)["depth"]
    with torch.inference_mode():
        outputs = made.model(**process(made.processor, made.on_device(batch)))
    sizes = {"source_sizes": [(40, 40)] * 3} if family == "zoedepth" else {}
    expected = made.processor.post_process_depth_estimation(outputs, target_sizes=[(40, 40)] * 3, **sizes)
    for depth, its in zip(depths, expected, strict=True):
        want = its["predicted_depth"].numpy()
        assert (depth.shape, depth.dtype) == ((40, 40), np.dtype(np.float32))
        assert np.ptp(depth) > 1e-3
        np.testing.assert_allclose(depth, want if kind == "inverse" else want.clip(min=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["dpt", "depth_pro", "glpn", "zoedepth"])
def test_a_label_does_not_depend_on_the_batch_it_was_made_in(tmp_path: Path, family: str) -> None:
    save, kind = DEPTH[family]
    made, batch = labeler("depth", save(tmp_path / family), output=kind), mixed_batch()
    together = made.run(batch)["depth"]
    alone = [made.run(batch.select([i]))["depth"][0] for i in range(3)]
    np.testing.assert_allclose(np.stack(together), np.stack(alone), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "asked", "gives"),
    [
        ("depth_anything", "metric", "inverse"),
        ("depth_anything_metric", "inverse", "metric"),
        ("glpn", "relative", "metric"),
        ("zoedepth", "inverse", "metric"),
        ("depth_pro", "inverse", "metric"),
        ("depth_pro_without_fov", "metric", "relative"),
        ("tips_dense", "inverse", "metric"),
    ],
)
def test_configuration_that_contradicts_the_checkpoint_is_refused(
    tmp_path: Path, family: str, asked: str, gives: str
) -> None:
    folder = DEPTH[family][0](tmp_path / family)
    with pytest.raises(ValueError, match=f"gives {gives} depth; output says '{asked}'"):
        labeler("depth", folder, output=asked)


def test_output_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output"):
        LABELERS.build("depth", {"checkpoint": str(save_dpt(tmp_path / "dpt"))})


def test_the_record_carries_the_convention(tmp_path: Path) -> None:
    folder = str(save_dpt(tmp_path / "dpt"))
    assert LABELERS.build("depth", {"checkpoint": folder, "output": "relative"}).spec("depth").convention == "relative"


def test_networks_of_other_outputs_are_sent_to_their_labeler(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'normal' one of three"):
        labeler("depth", save_dpt_of_normals(tmp_path / "normals"), output="inverse")
    with pytest.raises(ValueError, match="gives 3 maps where 1 are wanted; the labeler 'normal' takes it"):
        labeler("depth", save_omnidata(tmp_path / "omnidata"), output="relative")
    with pytest.raises(ValueError, match=r"holds SegformerForSemanticSegmentation, .*'segmentation' takes it"):
        labeler("depth", save_segformer(tmp_path / "segformer"), output="metric")


def test_omnidatas_depth_file_runs_as_its_own_network_does(tmp_path: Path) -> None:
    made = labeler("depth", save_omnidata(tmp_path / "omnidata", channels=1), output="relative")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pixels = (images * 255).to(torch.uint8)
    depths = made.run(Batch(["a", "b"], pixels.numpy()))["depth"]
    with torch.inference_mode():
        expected = midas_network(channels=1)(pixels.float() / 127.5 - 1)[:, 0]  # fed -1..1, as for depth
    assert expected.std() > 1e-3
    np.testing.assert_allclose(np.stack(depths), expected.numpy(), atol=1e-5)


def test_truth_in_a_networks_own_units_comes_back_as_metres(tmp_path: Path) -> None:
    found = scenes(2, 48)
    truth = np.stack([s.depth for s in found])
    for family in ("glpn", "depth_anything_metric", "tips_dense"):
        made = labeler("depth", DEPTH[family][0](tmp_path / family), output="metric")
        made.model = Gives(made.model.config, predicted_depth=torch.from_numpy(truth))
        np.testing.assert_allclose(np.stack(made.run(pictures_of(found))["depth"]), truth, rtol=1e-6)


def test_depth_pros_field_of_view_scales_its_inverse_depth(tmp_path: Path) -> None:
    """Seen through a lens of half the picture's width, a wall at 2 m has canonical inverse depth f / (w Z) = 0.25."""
    found = scenes(2, 48)
    truth = torch.from_numpy(np.stack([s.depth for s in found]))
    degrees = torch.tensor([60.0, 90.0])
    focal_over_width = 0.5 / torch.tan(torch.deg2rad(degrees) / 2)
    made = labeler("depth", DEPTH["depth_pro"][0](tmp_path / "pro"), output="metric")
    canonical = focal_over_width.view(2, 1, 1) / truth
    made.model = Gives(made.model.config, predicted_depth=canonical, field_of_view=degrees)
    np.testing.assert_allclose(np.stack(made.run(pictures_of(found))["depth"]), truth.numpy(), rtol=1e-5)
    wall = torch.full((1, 48, 48), 0.25)
    made.model = Gives(made.model.config, predicted_depth=wall, field_of_view=degrees[1:])
    np.testing.assert_allclose(made.run(pictures_of(found[:1]))["depth"][0], 2.0, rtol=1e-5)


def test_zoedepths_border_is_cut_off_again(tmp_path: Path) -> None:
    found = scenes(1, 48)
    pad = int(np.sqrt(48 / 2) * 3)
    framed = np.pad(found[0].depth, pad, constant_values=99.0)
    made = labeler("depth", save_zoedepth(tmp_path / "zoe"), output="metric")
    made.model = Gives(made.model.config, predicted_depth=torch.from_numpy(framed)[None])
    np.testing.assert_allclose(made.run(pictures_of(found))["depth"][0], found[0].depth, rtol=1e-6)


def test_resizing_never_makes_metric_depth_negative(tmp_path: Path) -> None:
    edge = torch.zeros(1, 32, 32)
    edge[:, :, 16:] = 8.0  # bicubic interpolation undershoots beside it
    for output, lowest in (("metric", 0.0), ("inverse", -0.75)):
        made = labeler("depth", save_dpt(tmp_path / output), output=output)
        made.model = Gives(made.model.config, predicted_depth=edge)
        depth = made.run(pictures_of(scenes(1, 48)))["depth"][0]
        assert depth.min() == pytest.approx(lowest, abs=1e-3)
        assert depth.max() > 8


@pytest.mark.parametrize("family", DEPTH)
def test_half_precision_stays_close_and_is_stored_as_float32(tmp_path: Path, family: str) -> None:
    save, kind = DEPTH[family]
    folder, batch = save(tmp_path / family), mixed_batch()
    exact, half = (
        np.stack(labeler("depth", folder, output=kind, precision=p).run(batch)["depth"])
        for p in ("float32", "bfloat16")
    )
    assert half.dtype == np.float32
    assert (half != exact).any()
    assert np.median(np.abs(half - exact) / (np.abs(exact) + 1e-3)) < 0.1


def test_demo_depth_resembles_the_truth_in_metres() -> None:
    """Geometry and units together: any flip, shift or unit mistake fails this by far."""
    found = scenes(12, 128)
    depths = labeler("depth", "demo:depth", output="metric").run(pictures_of(found))["depth"]
    assert np.mean([absrel(d, s.depth)[0] for d, s in zip(depths, found, strict=True)]) < 0.15
    ratios = [np.median(d) / np.median(s.depth) for d, s in zip(depths, found, strict=True)]
    assert np.mean(ratios) == pytest.approx(1, abs=0.15)


def full_dpt_hybrid(t: Any) -> tuple[Any, Any, str]:
    config = t.DPTConfig(
        is_hybrid=True, backbone_out_indices=[0, 1, 8, 11], neck_hidden_sizes=[256, 512, 768, 768],
        reassemble_factors=[1, 1, 1, 0.5], use_auxiliary_head=False,
    )  # fmt: skip
    return t.DPTForDepthEstimation(config), t.DPTImageProcessor(size={"height": 384, "width": 384}), "inverse"


def full_dpt_large(t: Any) -> tuple[Any, Any, str]:
    config = t.DPTConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        backbone_out_indices=[5, 11, 17, 23], neck_hidden_sizes=[256, 512, 1024, 1024], use_auxiliary_head=False,
    )  # fmt: skip
    return t.DPTForDepthEstimation(config), t.DPTImageProcessor(size={"height": 384, "width": 384}), "inverse"


def full_depth_anything_v2_small(t: Any) -> tuple[Any, Any, str]:
    backbone = t.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, out_indices=[3, 6, 9, 12],
        apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = t.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=384, neck_hidden_sizes=[48, 96, 192, 384],
        fusion_hidden_size=64,
    )  # fmt: skip
    size = {"height": 518, "width": 518}
    processor = t.DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14)
    return t.DepthAnythingForDepthEstimation(config), processor, "inverse"


def full_glpn_nyu(t: Any) -> tuple[Any, Any, str]:
    return t.GLPNForDepthEstimation(t.GLPNConfig()), t.GLPNImageProcessor(), "metric"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("full", [full_dpt_hybrid, full_dpt_large, full_depth_anything_v2_small, full_glpn_nyu])
def test_published_architectures_run_at_full_size(tmp_path: Path, full: Any) -> None:
    import transformers

    torch.manual_seed(0)
    model, processor, output = full(transformers)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    del model
    depth = labeler("depth", tmp_path, output=output).run(pictures_of(scenes(1, 224)))["depth"][0]
    assert depth.shape == (224, 224)
    assert np.isfinite(depth).all()
