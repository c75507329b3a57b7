"""CLIP features: 4M's dense map from either library, exact preprocessing, and never with the wrong GELU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_words import (
    PATCH,
    SIDE,
    save_clip_vision,
    save_open_clip,
    save_open_clip_resnet,
    save_siglip,
    save_transformers_clip,
)

from fourmill.labelers import LABELERS
from fourmill.pipeline.component import Batch
from fourmill.pipeline.geometry import CropConfig, apply_crop, draw_crops

CROP = 48  # the crop's side, not the network's


def pictures(count: int = 3, side: int = CROP) -> Batch:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    return Batch([f"k{i}" for i in range(count)], pixels)


def as_images(batch: Batch) -> list[Image.Image]:
    assert batch.pixels is not None
    return [Image.fromarray(p.transpose(1, 2, 0)) for p in batch.pixels]


def clip(folder: Path | str, **options: Any) -> Any:
    component = LABELERS.build("clip", {"checkpoint": str(folder), **options})
    component.load("cpu")
    return component


def stacked(values: list[np.ndarray]) -> np.ndarray:
    assert all(v.dtype == np.float32 for v in values)
    return np.stack(values)


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change model_cfg of an open_clip checkpoint."""
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"] |= changes
    path.write_text(json.dumps(config))
    return folder


def to_transformers(open_clip_folder: Path, folder: Path, act: str) -> Path:
    """The same image tower as a checkpoint of transformers, with the same preprocessing."""
    given = load_file(open_clip_folder / "open_clip_model.safetensors")
    weights = {
        "vision_model.embeddings.class_embedding": given["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": given["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": given["visual.positional_embedding"],
        "visual_projection.weight": given["visual.proj"].T,
    }
    layer = "visual.transformer.resblocks.{i}."
    names = {"visual.ln_pre": "pre_layrnorm", "visual.ln_post": "post_layernorm"}
    for i in range(2):
        there = f"encoder.layers.{i}."
        parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        parts["attn.out_proj"] = "self_attn.out_proj"
        names |= {layer.format(i=i) + mine: there + its for mine, its in parts.items()}
        for kind in ("weight", "bias"):
            joined = given[layer.format(i=i) + f"attn.in_proj_{kind}"]
            for name, part in zip("qkv", joined.chunk(3), strict=True):
                weights[f"vision_model.{there}self_attn.{name}_proj.{kind}"] = part
    for mine, its in names.items():
        weights |= {f"vision_model.{its}.{kind}": given[f"{mine}.{kind}"] for kind in ("weight", "bias")}
    save_clip_vision(folder)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    for name, change in (
        ("config.json", {"hidden_act": act}),
        ("preprocessor_config.json", {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}),
    ):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | change))
    return folder


# What the features are


def test_dense_map_is_every_patch_token_normed_and_projected(tmp_path: Path) -> None:
    made = clip(save_open_clip(tmp_path / "clip"))
    found = made.run(pictures())
    images = made.tower.prepare(torch.from_numpy(pictures().pixels))
    visual = made.tower.visual
    with torch.inference_mode():
        tokens = visual.ln_post(visual.transformer(visual._embeds(images))) @ visual.proj
    grid = tokens[:, 1:].unflatten(1, (SIDE // PATCH, SIDE // PATCH)).permute(0, 3, 1, 2)
    assert stacked(found["clip"]).shape == (3, 24, 4, 4)
    np.testing.assert_allclose(stacked(found["clip"]), grid.numpy(), atol=1e-5)
    np.testing.assert_allclose(stacked(found["clip_global"]), tokens[:, 0].numpy(), atol=1e-5)


def test_embedding_is_that_of_open_clips_own_model_and_transform(tmp_path: Path) -> None:
    import open_clip

    folder = save_open_clip(tmp_path / "clip")
    found = stacked(clip(folder).run(pictures(side=SIDE))["clip_global"])
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.inference_mode():
        expected = model.eval().encode_image(
            torch.stack([transform(image) for image in as_images(pictures(side=SIDE))])
        )
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [SIDE, 20, 48, 100])
def test_pictures_are_prepared_as_open_clip_would(tmp_path: Path, side: int, interpolation: str) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    folder = save_open_clip(tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= {"interpolation": interpolation, "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    made = clip(folder)
    batch = pictures(4, side)
    theirs = image_transform_v2(PreprocessCfg(**made.tower.visual.preprocess_cfg), is_train=False)
    expected = torch.stack([theirs(image) for image in as_images(batch)])
    difference = (made.tower.prepare(torch.from_numpy(batch.pixels)) - expected).abs()
    assert difference.max() < 1.01 / 255 / 0.26  # PIL and torch round some resized values to neighbouring integers
    assert (difference > 1e-6).float().mean() < (0.0 if side == SIDE else 0.05) + 1e-9


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_open_clip_and_transformers_give_the_same_maps_for_the_same_weights(tmp_path: Path, act: str) -> None:
    ours = edit_config(save_open_clip(tmp_path / "open_clip"), quick_gelu=act == "quick_gelu")
    theirs = to_transformers(ours, tmp_path / "transformers", act)
    one, other = clip(ours).run(pictures()), clip(theirs).run(pictures())
    for name in ("clip", "clip_global"):
        np.testing.assert_allclose(stacked(one[name]), stacked(other[name]), atol=1e-5)
        assert stacked(one[name]).std() > 0.1  # not equal because both are nothing


def test_full_transformers_clip_agrees_with_its_own_image_features(tmp_path: Path) -> None:
    from transformers import CLIPModel

    folder = save_transformers_clip(tmp_path / "clip")
    made = clip(folder)
    found = made.run(pictures())
    with torch.inference_mode():
        images = made.tower.prepare(torch.from_numpy(pictures().pixels))
        expected = CLIPModel.from_pretrained(folder).eval().get_image_features(images).pooler_output
    np.testing.assert_allclose(stacked(found["clip_global"]), expected.numpy(), atol=1e-5)
    assert stacked(found["clip"]).shape == (3, 24, 4, 4)


def test_centre_crop_of_a_processor_cuts_nothing_off_a_square_crop(tmp_path: Path) -> None:
    """A processor that resizes to 40 and cuts 32 would shift the map against the other modalities."""
    folder = save_transformers_clip(tmp_path / "clip")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"shortest_edge": 40}}))
    pixels = np.zeros((1, 3, 64, 64), dtype=np.uint8)
    pixels[:, :, :4, :] = 255
    images = clip(folder).tower.prepare(torch.from_numpy(pixels))
    assert images.shape == (1, 3, SIDE, SIDE)
    assert images[0, 0, 0].min() > images[0, 0, 8].max()  # the top rows are still there


@pytest.mark.parametrize("outputs", [["clip"], ["clip_global"], ["clip_global", "clip"]])
def test_only_the_outputs_asked_for_are_made_and_they_are_the_same(tmp_path: Path, outputs: list[str]) -> None:
    folder = save_open_clip(tmp_path / "clip")
    both, made = clip(folder).run(pictures()), clip(folder, outputs=outputs)
    found = made.run(pictures())
    assert list(found) == list(made.makes) == outputs
    for name in outputs:
        np.testing.assert_allclose(stacked(found[name]), stacked(both[name]), atol=1e-5)


def test_pictures_of_mixed_sizes_have_the_features_that_each_has_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sizes = [(60, 40), (33, 90), (200, 201), (48, 48)]
    crops = []
    for height, width in sizes:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        crop = draw_crops("k", height, width, CropConfig(size=CROP, count=2))[1]
        crops.append(apply_crop(image, crop, CROP).transpose(2, 0, 1))
    batch = Batch([str(size) for size in sizes], np.stack(crops))
    made = clip(save_open_clip(tmp_path / "clip"))
    together = made.run(batch)
    for row in range(len(sizes)):
        alone = made.run(batch.select([row]))
        np.testing.assert_allclose(alone["clip"][0], together["clip"][row], atol=1e-5)
        np.testing.assert_allclose(alone["clip_global"][0], together["clip_global"][row], atol=1e-5)


@pytest.mark.parametrize("save", [save_open_clip, save_transformers_clip])
def test_half_precision_checkpoint_runs_in_float32(tmp_path: Path, save: Any) -> None:
    folder = save(tmp_path / "clip")
    (path,) = folder.glob("*.safetensors")
    save_file({k: v.half() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    made = clip(folder)
    assert {p.dtype for p in made.tower.parameters()} == {torch.float32}
    assert np.isfinite(stacked(made.run(pictures())["clip"])).all()


@pytest.mark.parametrize("save", [save_open_clip, save_transformers_clip])
def test_bfloat16_features_are_near_those_of_float32(tmp_path: Path, save: Any) -> None:
    folder = save(tmp_path / "clip")
    exact, rough = clip(folder).run(pictures()), clip(folder, precision="bfloat16").run(pictures())
    for name in ("clip", "clip_global"):
        error = np.abs(stacked(exact[name]) - stacked(rough[name])).mean() / stacked(exact[name]).std()
        assert 0 < error < 0.03


# Networks without a dense map


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (save_open_clip_resnet, "has a ModifiedResNet as its image tower: no patch tokens, so no dense map"),
        (save_siglip, "is a SiglipModel, which pools its patches by attention"),
        (
            lambda folder: save_open_clip(folder, vision_cfg={"timm_model_name": "test_vit", "image_size": 160}),
            "has timm's test_vit as its image tower",
        ),
        (
            lambda folder: save_open_clip(
                folder,
                vision_cfg={
                    "image_size": SIDE,
                    "layers": 1,
                    "width": 32,
                    "head_width": 16,
                    "patch_size": PATCH,
                    "attentional_pool": True,
                    "attn_pooler_queries": 4,
                    "attn_pooler_heads": 2,
                },
            ),
            "pools its patches by attention before the last norm",
        ),
    ],
    ids=["resnet", "siglip", "timm", "attentional pool"],
)
def test_tower_without_projected_patches_gives_its_embedding_alone(tmp_path: Path, save: Any, message: str) -> None:
    folder = save(tmp_path / "clip")
    with pytest.raises(ValueError, match=f"{message}.*outputs: \\[clip_global\\]"):
        clip(folder)
    found = clip(folder, outputs=["clip_global"]).run(pictures())
    assert list(found) == ["clip_global"]
    assert stacked(found["clip_global"]).ndim == 2


def test_siglips_embedding_is_its_own(tmp_path: Path) -> None:
    from transformers import SiglipModel

    folder = save_siglip(tmp_path / "siglip")
    made = clip(folder, outputs=["clip_global"])
    with torch.inference_mode():
        images = made.tower.prepare(torch.from_numpy(pictures().pixels))
        expected = SiglipModel.from_pretrained(folder).eval().get_image_features(images).pooler_output
    np.testing.assert_allclose(stacked(made.run(pictures())["clip_global"]), expected.numpy(), atol=1e-5)


def test_checkpoint_without_weights_is_refused_not_made_up(tmp_path: Path) -> None:
    folder = save_open_clip(tmp_path / "clip")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="open_clip cannot load it"):
        clip(folder)


def test_checkpoint_that_lacks_a_weight_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_open_clip(tmp_path / "clip")
    weights = load_file(folder / "open_clip_model.safetensors")
    weights.pop("visual.ln_post.bias")
    save_file(weights, folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"visual\.ln_post\.bias"):
        clip(folder)


def test_asking_open_clip_for_a_transformers_checkpoint_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no open_clip_config\.json"):
        clip(save_clip_vision(tmp_path / "clip"), library="open_clip")


# Hub


def test_hub_id_is_loaded_at_its_revision_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commits of one repository with different weights; open_clip's own hf-hub: would load the newer one."""
    from huggingface_hub import constants

    commits = {"a" * 40: 1.0, "b" * 40: 2.0}  # commit -> what the projection is multiplied by
    repository = tmp_path / "models--someone--clip"
    for commit, factor in commits.items():
        folder = save_open_clip(repository / "snapshots" / commit)
        weights = load_file(folder / "open_clip_model.safetensors")
        save_file(weights | {"visual.proj": weights["visual.proj"] * factor}, folder / "open_clip_model.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    older, newer = (clip(repository / "snapshots" / commit).run(pictures()) for commit in commits)
    pinned, main = clip("someone/clip@" + "a" * 40), clip("someone/clip")
    assert pinned.checkpoint.digest == "hub:" + "a" * 40
    np.testing.assert_array_equal(stacked(pinned.run(pictures())["clip"]), stacked(older["clip"]))
    np.testing.assert_array_equal(stacked(main.run(pictures())["clip"]), stacked(newer["clip"]))
    assert np.abs(older["clip"][0] - newer["clip"][0]).max() > 0.1


# The demo's checkpoint, and the published size


def test_demo_clip_finds_the_caption_of_an_unseen_scene() -> None:
    """R@1 of 64 scenes with different captions, both ways: 1.00 and 0.98; chance is 0.016."""
    import open_clip

    from fourmill.checkpoints import DEMO_FOLDER
    from fourmill.scenes import render

    scenes = list({scene.caption: scene for scene in (render(99, i, 128) for i in range(72))}.values())[:64]
    found = clip("demo:clip").run(
        Batch([str(i) for i in range(64)], np.stack([s.image for s in scenes]).transpose(0, 3, 1, 2))
    )
    model = open_clip.create_model(f"local-dir:{DEMO_FOLDER / 'clip'}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{DEMO_FOLDER / 'clip'}")([s.caption for s in scenes])
    with torch.inference_mode():
        texts = model.encode_text(tokens, normalize=True)
    similar = torch.nn.functional.normalize(torch.from_numpy(stacked(found["clip_global"])), dim=1) @ texts.T
    for table in (similar, similar.T):
        assert (table.argmax(dim=1) == torch.arange(64)).float().mean() > 0.9
    assert stacked(found["clip"]).shape == (64, 128, 8, 8)


@pytest.mark.slow
def test_vit_b_16_of_openai_at_full_size_gives_4ms_map(tmp_path: Path) -> None:
    import open_clip

    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    assert config["quick_gelu"]
    model = open_clip.create_model("ViT-B-16-quickgelu")
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    found = clip(tmp_path).run(pictures(1, 256))
    assert found["clip"][0].shape == (512, 14, 14)
    assert found["clip_global"][0].shape == (512,)
