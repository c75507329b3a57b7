"""Normals by networks and by geometry: every frame, every file format, against the truth of rendered scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_helpers import Gives, labeler, mixed_batch, pictures_of, scenes
from midas_network import midas_network
from tiny_dense import NORMAL, save_dpt, save_dpt_of_normals, save_omnidata, save_sapiens2, save_segformer, save_tips

from fourmill.labelers import LABELERS
from fourmill.labelers.loading import process
from fourmill.labelers.normal_from_depth import normals_of, rays
from fourmill.modalities import modality
from fourmill.pipeline import conventions
from fourmill.pipeline.component import Batch, Failure
from fourmill.pipeline.geometry import Crop
from fourmill.pipeline.shards import Spec
from fourmill.scenes import Scene

FRAMES = {"opencv": (1, 1, 1), "opengl": (1, -1, -1), "pytorch3d": (-1, -1, 1), "outward": (-1, -1, -1)}


def options(family: str) -> dict[str, str]:
    return {"frame": "opengl"} if family == "sapiens2" else {}


def truth_of(found: list[Scene]) -> np.ndarray:
    """(B, 3, S, S), OpenCV's frame, towards the camera."""
    return np.stack([s.normals for s in found]).transpose(0, 3, 1, 2)


def degrees(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Angles (..., S, S) between normals (..., 3, S, S)."""
    halves = np.linalg.norm(one.astype(np.float64) - other, axis=-3) / 2  # an arc cosine is blind near zero
    return np.degrees(2 * np.arcsin(np.clip(halves, 0, 1)))


@pytest.mark.parametrize("family", NORMAL)
def test_every_family_gives_unit_normals_for_a_batch_of_mixed_sizes(tmp_path: Path, family: str) -> None:
    made = labeler("normal", NORMAL[family](tmp_path / family), **options(family))
    normals = made.run(mixed_batch())["normal"]
    assert [(n.shape, n.dtype) for n in normals] == [((3, 40, 40), np.dtype(np.float32))] * 3
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    assert np.ptp(np.stack(normals)) > 0.01
    assert made.spec("normal").convention == "opencv"


@pytest.mark.parametrize("family", NORMAL)
def test_half_precision_turns_normals_by_little(tmp_path: Path, family: str) -> None:
    folder, batch = NORMAL[family](tmp_path / family), mixed_batch()
    exact, half = (
        np.stack(labeler("normal", folder, precision=p, **options(family)).run(batch)["normal"])
        for p in ("float32", "bfloat16")
    )
    assert half.dtype == np.float32
    assert (half != exact).any()
    assert np.median(degrees(half, exact)) < 5


@pytest.mark.parametrize("family", ["tips", "tips_dense", "sapiens2"])
def test_directions_are_those_of_the_processor_but_for_the_axes(tmp_path: Path, family: str) -> None:
    """Sapiens2's processor also cuts off the border that it padded a square picture with."""
    made, batch = labeler("normal", NORMAL[family](tmp_path / family), **options(family)), mixed_batch()
    with torch.inference_mode():
        outputs = made.model(**process(made.processor, made.on_device(batch)))
    sizes = {"source_sizes": [(40, 40)] * 3} if family == "sapiens2" else {}
    expected = made.processor.post_process_normal_estimation(outputs, target_sizes=[(40, 40)] * 3, **sizes)
    signs = np.array(FRAMES[made.frame])[:, None, None]
    for normal, its in zip(made.run(batch)["normal"], expected, strict=True):
        direction = torch.nn.functional.normalize(its["normals"], dim=0).numpy() * signs
        np.testing.assert_allclose(normal, direction, atol=1e-5)


@pytest.mark.parametrize("frame", FRAMES)
def test_truth_in_any_frame_comes_back_in_the_labels_frame(tmp_path: Path, frame: str) -> None:
    found = scenes(2, 48)
    truth = truth_of(found)
    made = labeler("normal", save_tips(tmp_path / "tips"), frame=frame)
    emitted = torch.from_numpy(truth * np.array(FRAMES[frame], dtype=np.float32)[:, None, None])
    made.model = Gives(made.model.config, normals=emitted * 3.7)  # networks do not give unit length
    labels = made.run(pictures_of(found))["normal"]
    np.testing.assert_allclose(np.stack(labels), truth, atol=1e-6)
    for label in labels:
        conventions.check(modality("normal"), made.spec("normal"), label)


def test_families_known_frames_tips_outward_omnidata_colour_code(tmp_path: Path) -> None:
    found = scenes(2, 48)
    truth = truth_of(found)
    tips = labeler("normal", save_tips(tmp_path / "tips"))
    tips.model = Gives(tips.model.config, normals=torch.from_numpy(-truth))
    np.testing.assert_allclose(np.stack(tips.run(pictures_of(found))["normal"]), truth, atol=1e-6)
    for save in (save_dpt_of_normals, save_omnidata):
        coded = labeler("normal", save(tmp_path / save.__name__))
        coded.model = Gives(coded.model.config, predicted_depth=torch.from_numpy((truth + 1) / 2))
        np.testing.assert_allclose(np.stack(coded.run(pictures_of(found))["normal"]), truth, atol=1e-6)


@pytest.mark.parametrize(
    ("surface", "colour", "normal"),
    [
        ("floor", (0.5, 0.0, 0.5), (0, -1, 0)),
        ("ceiling", (0.5, 1.0, 0.5), (0, 1, 0)),
        ("wall on the left", (1.0, 0.5, 0.5), (1, 0, 0)),
        ("wall on the right", (0.0, 0.5, 0.5), (-1, 0, 0)),
        ("wall in front", (0.5, 0.5, 0.0), (0, 0, -1)),
    ],
)
def test_omnidatas_published_colours_mean_these_directions(
    tmp_path: Path, surface: str, colour: tuple[float, ...], normal: tuple[float, ...]
) -> None:
    """The colours are those of the surfaces in the pictures that Omnidata shows of its network's output."""
    made = labeler("normal", save_omnidata(tmp_path / "omnidata"))
    code = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    made.model = Gives(made.model.config, predicted_depth=code)
    found = made.run(pictures_of(scenes(1, 32)))["normal"][0]
    np.testing.assert_allclose(found, np.broadcast_to(np.array(normal).reshape(3, 1, 1), found.shape), atol=1e-6)


def test_a_wrong_frame_is_caught_before_it_is_stored(tmp_path: Path) -> None:
    found = scenes(1, 48)
    made = labeler("normal", save_tips(tmp_path / "tips"), frame="opengl")
    made.model = Gives(made.model.config, normals=torch.from_numpy(truth_of(found)))
    label = made.run(pictures_of(found))["normal"][0]
    with pytest.raises(ValueError, match=r"wrong frame: .* point away from the camera"):
        conventions.check(modality("normal"), made.spec("normal"), label)


def test_a_family_of_unknown_axes_asks_for_them(tmp_path: Path) -> None:
    folder = save_sapiens2(tmp_path / "sapiens2")
    with pytest.raises(ValueError, match=r"axes of sapiens2 normals are not known .* set `frame` to one of opencv"):
        labeler("normal", folder)
    assert labeler("normal", folder, frame="opengl").frame == "opengl"


def test_a_checkpoint_may_state_its_own_axes(tmp_path: Path) -> None:
    stated = save_tips(tmp_path / "stated", normal_frame="opencv")
    assert labeler("normal", stated).frame == "opencv"
    assert labeler("normal", stated, frame="outward").frame == "outward"
    with pytest.raises(ValueError, match="not known \\('sideways'\\)"):
        labeler("normal", save_tips(tmp_path / "odd", normal_frame="sideways"))


def test_no_direction_stays_no_direction(tmp_path: Path) -> None:
    made = labeler("normal", save_tips(tmp_path / "tips"))
    vectors = torch.zeros(1, 3, 32, 32)
    vectors[:, 2, 8:] = 1.0
    made.model = Gives(made.model.config, normals=vectors)
    found = made.run(pictures_of(scenes(1, 32)))["normal"][0]
    assert (found[:, :8] == 0).all()
    assert (found[2, 8:] == -1).all()


# Omnidata's published files.


def test_omnidatas_file_runs_as_its_own_network_does(tmp_path: Path) -> None:
    made = labeler("normal", save_omnidata(tmp_path / "omnidata"))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.inference_mode():
        code = midas_network()(pixels.float() / 255).clamp(0, 1)  # fed 0..1, as for normals
        fed = made.model(**process(made.processor, pixels)).predicted_depth
    assert code.std() > 1e-3
    np.testing.assert_allclose(fed.clamp(0, 1).numpy(), code.numpy(), atol=1e-5)
    expected = torch.nn.functional.normalize(code * 2 - 1, dim=1).numpy()
    np.testing.assert_allclose(np.stack(made.run(Batch(["a", "b"], pixels.numpy()))["normal"]), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["omnidata_normal_dpt_hybrid.pth", "weights.pt"])
def test_a_bare_state_dict_without_prefix_loads_as_well(tmp_path: Path, name: str) -> None:
    folder = save_omnidata(tmp_path / "prefixed")
    torch.save(midas_network().state_dict(), tmp_path / name)
    (tmp_path / "bare").mkdir()
    (tmp_path / name).rename(tmp_path / "bare" / name)
    batch = mixed_batch()
    one, other = (labeler("normal", f).run(batch)["normal"] for f in (folder, tmp_path / "bare"))
    np.testing.assert_array_equal(np.stack(one), np.stack(other))


@pytest.mark.parametrize(
    ("lost", "its_name"),
    [
        ("model.scratch.refinenet4.resConfUnit1.conv2.bias", "neck.fusion_stage.layers.0.residual_layer1.convolution2"),
        ("model.pretrained.model.blocks.7.attn.qkv.weight", "dpt.encoder.layer.7.attention.attention.key.weight"),
        ("model.pretrained.act_postprocess4.4.weight", "neck.reassemble_stage.layers.3.resize.weight"),
    ],
)
def test_missing_weights_of_omnidatas_file_are_fatal_by_name(tmp_path: Path, lost: str, its_name: str) -> None:
    file = save_omnidata(tmp_path / "omnidata") / "omnidata_dpt_normal_v2.ckpt"
    held = torch.load(file, weights_only=True)
    held["state_dict"].pop(lost)
    torch.save(held, file)
    with pytest.raises(ValueError, match=rf"lacks \d weights? of DPT-hybrid: .*{its_name}|lacks 3 weights.*{its_name}"):
        labeler("normal", tmp_path / "omnidata")


class Dropped:
    """Stands for an object that a training checkpoint drags along; reading it would run code of the file's choice."""

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path(self.path), "run"))

    def __init__(self, path: str) -> None:
        self.path = path


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    folder = save_omnidata(tmp_path / "omnidata", callbacks=Dropped(str(witness)))
    with pytest.raises(ValueError, match=r"holds more than tensors, .* save its 'state_dict' alone"):
        labeler("normal", folder)
    assert not witness.exists()


def test_a_folder_that_is_no_such_checkpoint_says_what_is_wrong(tmp_path: Path) -> None:
    folder = save_omnidata(tmp_path / "two")
    torch.save({}, folder / "another.pth")
    with pytest.raises(ValueError, match=r"must hold one file of weights .*, not another.pth, omnidata_dpt_normal_v2"):
        labeler("normal", folder)
    other = tmp_path / "other"
    other.mkdir()
    torch.save({"layer.weight": torch.zeros(2)}, other / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet.pth is not a DPT-hybrid of MiDaS or Omnidata: no scratch.output_con"):
        labeler("normal", other)


def test_networks_of_other_outputs_are_sent_to_their_labeler(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'depth' takes a DPT of one map"):
        labeler("normal", save_dpt(tmp_path / "dpt"))
    with pytest.raises(ValueError, match="gives 1 maps where 3 are wanted; the labeler 'depth' takes it"):
        labeler("normal", save_omnidata(tmp_path / "omnidata", channels=1))
    with pytest.raises(ValueError, match="the labeler 'segmentation' takes it"):
        labeler("normal", save_segformer(tmp_path / "segformer"))


# Normals from depth.


def geometry(**options: Any) -> Any:
    return LABELERS.build("normal_from_depth", {"convention": "metric", **options})


def depth_batch(depths: list[np.ndarray], crops: list[Crop], sides: list[tuple[int, int]], **metadata: Any) -> Batch:
    """`sides`: height and width of each upright picture."""
    sources = [{"height": h, "width": w, "metadata": metadata} for h, w in sides]
    views: dict[str, Any] = {
        "depth": depths,
        "crop_settings": [np.array(c, np.int32) for c in crops],
        "source": sources,
    }
    return Batch([str(i) for i in range(len(depths))], None, views)


def interior(scene: Scene, around: int = 2) -> np.ndarray:
    """bool (S, S): pixels farther than `around` from any change of object, class or plane."""
    size = len(scene.depth)
    code = np.concatenate([scene.normals.round(1), scene.instances[..., None], scene.semantic[..., None]], axis=-1)
    edge = np.zeros((size, size), bool)
    for axis in (0, 1):
        change = np.abs(np.diff(code, axis=axis)).max(axis=-1) > 0.15
        edge |= np.pad(change, [(0, 1), (0, 0)] if axis == 0 else [(0, 0), (0, 1)])
        edge |= np.pad(change, [(1, 0), (0, 0)] if axis == 0 else [(0, 0), (1, 0)])
    near = edge.copy()
    for dy in range(-around, around + 1):
        for dx in range(-around, around + 1):
            near |= np.roll(edge, (dy, dx), axis=(0, 1))
    return ~near


@pytest.mark.parametrize(("step", "stored", "median"), [(1, False, 0.005), (3, False, 0.005), (3, True, 0.8)])
def test_geometry_agrees_with_the_true_normals_of_scenes(step: int, stored: bool, median: float) -> None:
    """`stored`: rounded to the 11 bits that depth labels keep. The rounding is what is left of the error."""
    found = scenes(4, 160)
    depths = [s.depth.astype(np.float16).astype(np.float32) if stored else s.depth for s in found]
    made = geometry(focal=found[0].camera.focal / 160, step=step)
    labels = made.run(depth_batch(depths, [Crop(0, 0, 160, 160, 0)] * 4, [(160, 160)] * 4))["normal"]
    errors = np.concatenate(
        [degrees(n, s.normals.transpose(2, 0, 1))[interior(s)] for n, s in zip(labels, found, strict=True)]
    )
    assert np.median(errors) < median
    assert np.percentile(errors, 90) < max(10 * median, 0.2)


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("crop", [(0, 0), (10, 57), (64, 3)])
def test_a_crop_moves_the_principal_point_and_a_flip_mirrors_it(crop: tuple[int, int], flip: int) -> None:
    """The picture is 128 rows of a square scene of 160 columns, cut evenly above and below, so its centre stays."""
    scene, (top, left) = scenes(1, 160)[0], crop
    rows, columns = slice(16 + top, 16 + top + 64), slice(left, left + 64)
    depth, truth = scene.depth[rows, columns], scene.normals[rows, columns].transpose(2, 0, 1)
    inside = interior(scene)[rows, columns]
    if flip:
        depth, inside = depth[:, ::-1], inside[:, ::-1]
        truth = truth[:, :, ::-1] * np.array([-1, 1, 1])[:, None, None]
    made = geometry(focal=scene.camera.focal / 160, step=1)
    batch = depth_batch([np.ascontiguousarray(depth)], [Crop(top, left, 64, 64, flip)], [(128, 160)])
    errors = degrees(made.run(batch)["normal"][0], truth)[inside]
    assert np.median(errors) < 0.01
    assert np.percentile(errors, 90) < 0.2


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("flip", [0, 1])
def test_a_plane_is_exact_everywhere_even_in_a_stretched_crop(flip: int, step: int) -> None:
    normal = np.array([0.3, -0.6, -0.74])
    normal /= np.linalg.norm(normal)
    x, y = rays(Crop(20, 60, 100, 50, flip), 32, width=200, height=150, focal=170.0)
    depth = -2.5 / (normal[0] * x[None] + normal[1] * y[:, None] + normal[2])
    assert (depth > 0).all()
    for scale in (1.0, 7.3):  # depth up to a factor has the same normals
        found = normals_of(depth * scale, x, y, step)
        np.testing.assert_allclose(found, np.broadcast_to(normal[:, None, None], found.shape), atol=1e-6)


def test_rays_of_the_whole_picture_and_its_mirror_image() -> None:
    x, y = rays(Crop(0, 0, 4, 8, 0), 4, width=8, height=4, focal=4.0)
    np.testing.assert_allclose(x, [-0.75, -0.25, 0.25, 0.75])
    np.testing.assert_allclose(y, [-0.375, -0.125, 0.125, 0.375])
    moved, _ = rays(Crop(0, 4, 4, 4, 0), 4, width=8, height=4, focal=4.0)
    mirrored, _ = rays(Crop(0, 4, 4, 4, 1), 4, width=8, height=4, focal=4.0)
    np.testing.assert_allclose(moved, [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(mirrored, [-0.875, -0.625, -0.375, -0.125])


def test_the_three_ways_to_say_the_lens_agree() -> None:
    scene = scenes(1, 96)[0]
    batch = depth_batch([scene.depth], [Crop(0, 0, 96, 96, 0)], [(96, 96)], focal_px=scene.camera.focal)
    width_share = scene.camera.focal / 96
    ways: list[dict[str, Any]] = [{"focal": width_share}, {"field_of_view": 60.0}, {"focal_field": "focal_px"}]
    found = [geometry(**way).run(batch)["normal"][0] for way in ways]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("value", [None, "wide", 0, -3, float("nan")])
def test_a_sample_without_focal_length_fails_alone(value: Any) -> None:
    scene = scenes(1, 32)[0]
    batch = depth_batch([scene.depth] * 2, [Crop(0, 0, 32, 32, 0)] * 2, [(32, 32)] * 2)
    batch.views["source"][0]["metadata"] = {"f": 28.0}
    batch.views["source"][1]["metadata"] = {"f": value}
    first, second = geometry(focal_field="f").run(batch)["normal"]
    assert isinstance(first, np.ndarray)
    assert isinstance(second, Failure)
    assert second.reason.startswith("no focal length: metadata 'f' is")


def test_pixels_without_depth_have_no_normal_and_spoil_no_other() -> None:
    scene = scenes(1, 96)[0]
    depth, x = scene.depth.copy(), rays(Crop(0, 0, 96, 96, 0), 96, 96, 96, scene.camera.focal)
    depth[40:50, 40:50] = 0
    found = normals_of(depth, *x, step=1)
    assert (found[:, 40:50, 40:50] == 0).all()
    assert (np.linalg.norm(found, axis=0) > 0.999).sum() == 96 * 96 - 100
    conventions.check(modality("normal"), Spec(convention="opencv"), found)
    outside = interior(scene) & (scene.depth == depth)
    assert np.median(degrees(found, scene.normals.transpose(2, 0, 1))[outside]) < 0.01
    assert (normals_of(np.zeros((8, 8), np.float32), x[0][:8], x[1][:8], 1) == 0).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"convention": "inverse", "focal": 1}, "inverse depth is known up to scale and shift"),
        ({}, "give exactly one of focal, field_of_view, focal_field; given: none"),
        ({"focal": 1, "field_of_view": 60}, "given: focal, field_of_view"),
        ({"field_of_view": 180}, "field_of_view"),
    ],
)
def test_geometry_that_cannot_be_right_is_refused_when_it_is_configured(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geometry(**bad)


# Demo weights, and published sizes.


def test_demo_normals_resemble_the_truth() -> None:
    found = scenes(12, 128)
    labels = labeler("normal", "demo:normal").run(pictures_of(found))["normal"]
    for label in labels:
        conventions.check(modality("normal"), Spec(convention="opencv"), label)
    assert np.median(degrees(np.stack(labels), truth_of(found))) < 15


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_omnidatas_architecture_runs_at_full_size(tmp_path: Path) -> None:
    import timm
    from midas_network import Midas

    torch.manual_seed(0)
    vit = timm.create_model("vit_base_r50_s16_384")
    network = Midas(vit, stages=(256, 512), width=768, features=256, channels=3).eval()
    torch.save({"state_dict": {f"model.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "omnidata.ckpt")
    made = labeler("normal", tmp_path)
    assert sum(p.numel() for p in made.model.parameters()) == pytest.approx(122.2e6, rel=0.01)
    pixels = torch.randint(0, 256, (1, 3, 384, 384), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.inference_mode():
        expected = network(pixels.float() / 255)
        fed = made.model(**process(made.processor, pixels)).predicted_depth
    np.testing.assert_allclose(fed.numpy(), expected.numpy(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tipsv2_of_published_size_runs(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.Tipsv2DptForNormalEstimation(transformers.Tipsv2DptConfig())
    model.save_pretrained(tmp_path)
    transformers.Tipsv2DptImageProcessor().save_pretrained(tmp_path)
    found = labeler("normal", tmp_path).run(pictures_of(scenes(1, 224)))["normal"][0]
    assert found.shape == (3, 224, 224)
    assert json.loads((tmp_path / "config.json").read_text())["backbone_config"]["hidden_size"] == 768
