"""Networks of spatial and vector tokenizers: their checkpoints, sizes, sources, and what bad input is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_tokenizers import NETWORK, build, checkpoint_config, settled, write_checkpoint

from fourmill.pipeline.component import Batch
from fourmill.pipeline.shards import Spec
from fourmill.tokenizers import TOKENIZERS
from fourmill.tokenizers.config import CheckpointConfig
from fourmill.tokenizers.networks.vit import patchify, unpatchify
from fourmill.tokenizers.networks.vq import VQNetwork
from fourmill.tokenizers.networks.weights import pack, unpack
from fourmill.tokenizers.sources import source_of
from fourmill.tokenizers.sources.maps import UNKNOWN, standardise


def test_patches_hold_their_squares_and_go_back_in_place() -> None:
    picture = torch.arange(16.0).view(1, 1, 4, 4)
    patches = patchify(picture, 2)
    assert patches[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(unpatchify(patches, 2), picture)


def test_projections_start_from_the_principal_components_of_patches() -> None:
    network = VQNetwork(checkpoint_config("depth", 1))
    shades = torch.randn(32, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    maps = 3 + shades.repeat_interleave(4, 2).repeat_interleave(4, 3)  # patches differ in one direction: their shade
    network.start_from(maps)
    assert network.decoder.out_proj.bias.detach().numpy() == pytest.approx(np.full(16, maps.mean()), abs=1e-4)
    seen = network.encoder.proj(maps).detach()[:, 0].flatten()
    found = torch.corrcoef(torch.stack([seen, shades.flatten()]))[0, 1]
    assert abs(found.item()) == pytest.approx(1.0, abs=1e-4)


@pytest.fixture(scope="module")
def rgb_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("spatial") / "rgb", checkpoint_config("rgb", 3))


def pixels(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def test_vocabulary_and_grid_are_known_without_loading(rgb_folder: Path) -> None:
    tokenizer = TOKENIZERS.build("tok_rgb", {"kind": "spatial", "checkpoint": str(rgb_folder)})
    assert tokenizer.spec("tok_rgb") == Spec(vocabulary=16, length=4, grid=(2, 2))


def test_one_checkpoint_takes_values_of_other_sides(rgb_folder: Path) -> None:
    tokenizer = build("tok_rgb", rgb_folder, size=20)
    assert tokenizer.spec("tok_rgb") == Spec(vocabulary=16, length=25, grid=(5, 5))
    tokens = tokenizer.encode(pixels(2, 20))
    assert [row.shape for row in tokens] == [(25,), (25,)]
    assert tokenizer.decode(tokens)[0].shape == (20, 20, 3)


def test_a_side_that_is_no_multiple_of_the_patch_is_refused(rgb_folder: Path) -> None:
    tokenizer = TOKENIZERS.build("tok_rgb", {"kind": "spatial", "checkpoint": str(rgb_folder), "size": 10})
    with pytest.raises(ValueError, match="size 10 is not a multiple of the tokenizer's patch_size 4"):
        tokenizer.spec("tok_rgb")


def test_tokens_do_not_depend_on_the_batch(rgb_folder: Path) -> None:
    tokenizer, batch = build("tok_rgb", rgb_folder), pixels(9)
    together = tokenizer.run(Batch([str(i) for i in range(9)], pixels=batch))["tok_rgb"]
    assert [row.tolist() for row in together] == [tokenizer.encode(batch[i : i + 1])[0].tolist() for i in range(9)]
    assert len({tuple(row.tolist()) for row in together}) > 1
    assert together[0].dtype == np.uint16


def test_encoding_leaves_the_codebook_as_it_is(rgb_folder: Path) -> None:
    tokenizer = build("tok_rgb", rgb_folder)
    tokenizer.decode(tokenizer.encode(pixels(4)))
    before = {k: v.clone() for k, v in tokenizer.codec.network.state_dict().items()}
    tokenizer.decode(tokenizer.encode(pixels(4)))
    assert all(torch.equal(before[k], v) for k, v in tokenizer.codec.network.state_dict().items())


def test_a_job_that_only_encodes_holds_no_decoder_and_gives_the_same_tokens(rgb_folder: Path) -> None:
    tokenizer = build("tok_rgb", rgb_folder)
    before = [row.tolist() for row in tokenizer.encode(pixels(3))]
    decoding = ("decoder.", "post_quant_proj.")
    assert not any(name.startswith(decoding) for name in tokenizer.codec.network.state_dict())
    tokenizer.decode(tokenizer.encode(pixels(3)))
    assert any(name.startswith("decoder.") for name in tokenizer.codec.network.state_dict())
    assert [row.tolist() for row in tokenizer.encode(pixels(3))] == before


def test_decoding_gives_pictures(rgb_folder: Path) -> None:
    pictures = build("tok_rgb", rgb_folder).decode([np.array([0, 1, 2, 15])] * 2)
    assert pictures[0].shape == (8, 8, 3)
    assert pictures[0].dtype == np.uint8
    assert np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize(("ids", "message"), [([0, 1, 2, 16], "ids 0..16"), ([0, 1, 2], r"\(3,\); \(4,\) is needed")])
def test_impossible_tokens_are_refused(rgb_folder: Path, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("tok_rgb", rgb_folder).decode([np.array(ids)])


def test_values_of_another_shape_are_refused_and_the_option_named(rgb_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 16, 16\); this tokenizer takes \(3, 8, 8\).*`size`"):
        build("tok_rgb", rgb_folder).encode(np.zeros((1, 3, 16, 16), np.uint8))


def test_checkpoint_of_another_modality_is_refused(rgb_folder: Path) -> None:
    with pytest.raises(ValueError, match="tokenizes rgb, not normal"):
        TOKENIZERS.build("tok_normal", {"kind": "spatial", "checkpoint": str(rgb_folder)}).spec("tok_normal")


def test_float32_weights_survive_the_file_exactly() -> None:
    config = checkpoint_config("normal", 3, out_conv=True)
    network = settled(config)
    again = unpack(config, pack(network, half=False), "here").state_dict()
    kept = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("embed_avg")}
    assert all(torch.equal(tensor, again[name]) for name, tensor in kept.items())


def test_missing_weight_is_fatal_and_unknown_weight_is_named(rgb_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(rgb_folder, tmp_path / "c")
    weights = load_file(rgb_folder / "model.safetensors")
    save_file({**weights, "surplus": np.zeros(1, np.float32)}, tmp_path / "c" / "model.safetensors")
    with pytest.warns(UserWarning, match="not used: surplus"):
        build("tok_rgb", tmp_path / "c")
    del weights["quant_proj.bias"]
    save_file(weights, tmp_path / "c" / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 weights: quant_proj\.bias"):
        build("tok_rgb", tmp_path / "c")


def test_misshapen_weight_is_named_with_both_shapes(rgb_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(rgb_folder, tmp_path / "c")
    weights = load_file(rgb_folder / "model.safetensors")
    save_file({**weights, "quant_proj.bias": np.zeros(5, np.float32)}, tmp_path / "c" / "model.safetensors")
    with pytest.raises(ValueError, match=r"quant_proj\.bias \(5,\), not \(4,\)"):
        build("tok_rgb", tmp_path / "c")


@pytest.mark.parametrize("data", [b"", b"not a tensor file at all", b"\xff" * 64])
def test_broken_weights_are_refused(rgb_folder: Path, tmp_path: Path, data: bytes) -> None:
    shutil.copytree(rgb_folder, tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        build("tok_rgb", tmp_path / "c")


def test_unknown_key_in_the_configuration_is_refused(rgb_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(rgb_folder, tmp_path / "c")
    config = {**json.loads((rgb_folder / "config.json").read_text()), "colour": 1}
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="colour"):
        TOKENIZERS.build("tok_rgb", {"kind": "spatial", "checkpoint": str(tmp_path / "c")}).spec("tok_rgb")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 10}, "size 10 is not a multiple of patch_size 4"),
        ({"dim": 20}, r"dim 20 is not a multiple of 4 x heads \(8\)"),
        ({"quantizer": "fsq"}, "'fsq' needs three or more in each channel"),
        ({"quantizer": "lfq", "codebook_size": 12}, "codebook_size 12 is not a power of two"),
        ({"num_codebooks": 2}, "only 'memcodes' has more than one"),
        ({"quantizer": "memcodes", "num_codebooks": 3}, "latent_dim 4 is not a multiple of num_codebooks 3"),
        ({"architecture": "mlp"}, "size and patch_size must be 1"),
    ],
)
def test_impossible_networks_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointConfig.model_validate(
            {
                "source": "rgb",
                "channels": 3,
                "normalisation": {"kind": "signed"},
                "network": {**NETWORK, **fields},
            }
        )


@pytest.mark.parametrize(
    "quantizer", [{"quantizer": "fsq", "levels": (4, 3)}, {"quantizer": "lfq", "codebook_size": 16}]
)
def test_quantizers_without_a_codebook_round_trip(tmp_path: Path, quantizer: dict[str, Any]) -> None:
    config = checkpoint_config("clip", 6, patch_size=1, **quantizer)
    tokenizer = build("tok_clip", write_checkpoint(tmp_path / "c", config))
    features = np.random.default_rng(0).normal(size=(2, 6, 8, 8)).astype(np.float32)
    tokens = tokenizer.encode(list(features))
    assert tokenizer.vocabulary == config.network.vocabulary
    assert max(row.max() for row in tokens) < tokenizer.vocabulary
    restored = tokenizer.decode(tokens)[0]
    assert restored.shape == (6, 8, 8)
    assert np.linalg.norm(restored, axis=0) == pytest.approx(1.0, abs=1e-5)


def test_vectors_become_one_id_a_codebook(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", checkpoint_config("clip_global", 12, architecture="mlp"))
    tokenizer = build("tok_clip_global", folder, "vector")
    assert tokenizer.spec("tok_clip_global") == Spec(vocabulary=32, length=4, grid=(1, 4))
    vectors = list(np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32))
    tokens = tokenizer.encode(vectors)
    assert [row.shape for row in tokens] == [(4,)] * 3
    restored = tokenizer.decode(tokens)
    assert [np.linalg.norm(vector) for vector in restored] == pytest.approx([1.0] * 3)
    assert restored[0].shape == (12,)


def test_a_checkpoint_of_vectors_names_its_kind(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", checkpoint_config("clip_global", 12, architecture="mlp"))
    with pytest.raises(ValueError, match="is of kind 'vector'; set `kind: vector`"):
        TOKENIZERS.build("tok_clip_global", {"kind": "spatial", "checkpoint": str(folder)}).spec("tok_clip_global")


def test_void_is_taken_in_but_never_asked_for_nor_given() -> None:
    source = source_of(checkpoint_config("semseg", 8, classes=3))
    ids = np.array([[[0, 1], [2, 255]]], np.uint8).repeat(4, 1).repeat(4, 2)
    inputs = source.prepare(ids)
    assert inputs[0, ::4, ::4].tolist() == [[1, 2], [3, 0]]  # rows of the embedding: void first
    logits = torch.zeros(1, 4, 8, 8)
    logits[:, 2][inputs == 0] = 50.0  # whatever is said where the truth is void costs nothing
    assert source.loss(logits, inputs).item() == pytest.approx(np.log(4))
    assert source.loss(logits, torch.zeros_like(inputs)).item() == 0.0
    logits[:, 0] = 99.0
    assert source.restore(logits)[0].max() <= 2
    right = [np.where(ids[0] == 255, 1, ids[0]).astype(np.uint8)]
    assert source.measure(list(ids), right) == {"pixel_accuracy": 1.0, "miou": 1.0}


def test_classes_shrink_by_the_nearest_pixel() -> None:
    source = source_of(checkpoint_config("semseg", 8, classes=3))
    ids = torch.tensor([[1, 3], [2, 0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)[None]
    assert source.resize(ids, 2).tolist() == [[[1, 3], [2, 0]]]


def test_class_beyond_the_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"class id 3 in a semseg value; known: 0..2 and 255"):
        source_of(checkpoint_config("semseg", 8, classes=3)).prepare(np.full((1, 8, 8), 3, np.uint8))


def log_depth() -> Any:
    config = checkpoint_config("depth", 1).model_dump()
    config["normalisation"] = {"kind": "log", "offset": 1.0, "scale": 0.5}
    return source_of(CheckpointConfig.model_validate(config))


def test_metric_depth_comes_back_in_metres() -> None:
    source, depth = log_depth(), np.full((1, 8, 8), np.e**2, np.float32)
    inputs = source.prepare(depth)
    assert inputs[0, 0, 0, 0].item() == pytest.approx(2.0)  # (ln e^2 - 1) / 0.5
    assert source.restore(inputs)[0] == pytest.approx(depth[0])
    assert source.measure(list(depth), [depth[0] * 1.1])["abs_rel"] == pytest.approx(0.1, abs=1e-6)


def test_unknown_depth_costs_nothing_and_does_not_count() -> None:
    source, depth = log_depth(), np.full((1, 8, 8), np.e**2, np.float32)
    depth[0, :4] = 0.0
    inputs = source.prepare(depth)
    assert inputs[0, 0, 0, 0].item() == UNKNOWN
    outputs = inputs.clone()
    outputs[:, :, :4] = 77.0
    assert source.loss(outputs, inputs).item() == 0.0
    assert source.measure(list(depth), [np.full((8, 8), np.e**2 * 1.5)])["abs_rel"] == pytest.approx(0.5)


def test_relative_depth_is_standardised_over_its_middle_80_percent() -> None:
    depth = np.arange(10, dtype=np.float32).reshape(2, 5)
    depth[1, 4] = 1000.0  # the largest and the smallest tenth do not count
    middle = np.arange(1, 9)
    wanted = (depth - middle.mean()) / np.sqrt(middle.var() + 1e-6)
    assert standardise(depth) == pytest.approx(wanted, rel=1e-6)


def test_normals_that_are_not_known_cost_nothing() -> None:
    source = source_of(checkpoint_config("normal", 3))
    normals = np.zeros((1, 3, 8, 8), np.float32)
    normals[0, 2, :4] = -1.0
    inputs = source.prepare(normals)
    outputs = inputs.clone()
    outputs[:, :, 4:] = 5.0
    assert source.loss(outputs, inputs).item() == pytest.approx(0.0, abs=1e-6)
    tilted = np.zeros((3, 8, 8), np.float32)
    tilted[1], tilted[2] = -np.sin(np.radians(10)), -np.cos(np.radians(10))
    assert source.measure(list(normals), [tilted])["median_angle_deg"] == pytest.approx(10.0, abs=1e-3)


def test_masks_and_edges_come_back_as_they_went_in() -> None:
    mask = np.zeros((1, 8, 8), np.uint8)
    mask[0, 2:6, 1:5] = 1
    source = source_of(checkpoint_config("mask", 1))
    assert np.array_equal(source.restore(source.prepare(mask) - 0.5)[0], mask[0])
    shifted = np.roll(mask[0], 2, axis=1)
    assert source.measure(list(mask), [shifted])["mask_iou"] == pytest.approx(8 / 24)
    edges = source_of(checkpoint_config("canny_edge", 1))
    assert np.array_equal(edges.restore(edges.prepare(mask * 255))[0], mask[0] * 255)
    line = np.zeros((8, 8), np.uint8)
    line[:, 3] = 255
    beside, far = np.roll(line, 1, axis=1), np.roll(line, 2, axis=1)
    assert edges.measure([line], [beside]) == {"edge_f1_1px": 1.0}  # within a pixel
    assert edges.measure([line, line], [line, far])["edge_f1_1px"] == pytest.approx(0.5)
    assert edges.measure([line], [line * 0]) == {"edge_f1_1px": 0.0}


def test_a_mask_that_is_not_binary_is_refused() -> None:
    with pytest.raises(ValueError, match="a mask holds 7; 0 and 1 are known"):
        source_of(checkpoint_config("mask", 1)).prepare(np.full((1, 8, 8), 7, np.uint8))
