"""Tokenizers: serialised boxes, text vocabulary, spatial networks and their checkpoints, and the demo's own weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fourmill.checkpoints import DEMO_FOLDER
from fourmill.labelers import LABELERS
from fourmill.pipeline.component import Batch
from fourmill.pipeline.shards import Spec
from fourmill.scenes import render
from fourmill.tokenizers import TOKENIZERS
from fourmill.tokenizers.boxes import parse, serialise
from fourmill.tokenizers.config import SpatialCheckpointConfig, TrainTokenizerConfig
from fourmill.tokenizers.networks import SpatialNetwork, pack, patchify, unpack, unpatchify
from fourmill.tokenizers.sources import source_of, standardise
from fourmill.tokenizers.text import open_tokenizer, plain, train_text_tokenizer

CAPTIONS = ["A red sphere before a blue box", "two red spheres and a green box", "three blue boxes, a red cone"] * 3
NORMALISATION = {"rgb": "signed", "depth": "log", "semseg": "classes", "clip": "unit", "normal": "unit"}
NETWORK = {
    "size": 8,
    "patch_size": 4,
    "dim": 16,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "heads": 2,
    "latent_dim": 4,
    "codebook_size": 16,
}


def checkpoint_config(source: str, channels: int, classes: int = 0, **network: Any) -> SpatialCheckpointConfig:
    return SpatialCheckpointConfig.model_validate(
        {
            "source": source,
            "channels": channels,
            "classes": classes,
            "normalisation": {"kind": NORMALISATION[source]},
            "network": {**NETWORK, **network},
        }
    )


def write_checkpoint(folder: Path, config: SpatialCheckpointConfig) -> Path:
    """A network with settled codes: one training pass starts the codebook."""
    torch.manual_seed(0)
    network = SpatialNetwork(config)
    prepared = torch.randint(0, config.classes, (8, 8, 8)) if config.classes else torch.randn(8, config.channels, 8, 8)
    network.train()(prepared)
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json())
    (folder / "model.safetensors").write_bytes(pack(network))
    return folder


def build(name: str, folder: Path | str, kind: str = "spatial", **options: Any) -> Any:
    tokenizer = TOKENIZERS.build(name, {"kind": kind, "checkpoint": str(folder), **options})
    tokenizer.load("cpu")
    return tokenizer


# Boxes.


def test_objects_are_ordered_from_the_corner_rounded_half_to_even_and_the_unsure_left_out() -> None:
    objects = [
        {"box": [0.5, 0.5, 0.75, 1.0], "class_name": "wine glass", "score": 0.9},
        {"box": [0.0, 0.125, 0.375, 0.625], "class_name": "cone", "score": 0.6},
        {"box": [0.0, 0.0, 1.0, 1.0], "class_name": "box", "score": 0.59},
    ]
    # 4 x 0.125 = 0.5 -> 0, 4 x 0.375 = 1.5 -> 2, 4 x 0.625 = 2.5 -> 2: Python rounds halves to even, as 4M does.
    assert serialise(objects, bins=5) == ["v0=0 v1=0 v2=2 v3=2 cone", "v0=2 v1=2 v2=3 v3=4 wine glass"]


def test_parsing_keeps_whole_objects_and_names_the_broken_pieces() -> None:
    text = "v1=3 v0=0 v1=1 v2=2 v3=4 wine glass v0=1 v1=1 v2=2 v0=3 v1=3 v2=1 v3=3 box v0=0 v1=0 v2=9 v3=4 cone red"
    objects, problems = parse(text, bins=5)
    assert objects == [{"box": [0.0, 0.25, 0.5, 1.0], "class_name": "wine glass", "score": 1.0}]
    assert problems == [
        "'v1=3': not the four coordinates v0 v1 v2 v3",
        "'v0=1 v1=1 v2=2': not the four coordinates v0 v1 v2 v3",
        "'v0=3 v1=3 v2=1 v3=3 box': the box is inside out",
        "'v0=0 v1=0 v2=9 v3=4 cone red': coordinate 9 is not below 5",
    ]


unit = st.floats(0, 1, allow_nan=False)


@given(st.lists(st.tuples(unit, unit, unit, unit, st.sampled_from(["box", "wine glass"])), max_size=8))
def test_any_boxes_come_back_within_half_a_bin(drawn: list[tuple[float, float, float, float, str]]) -> None:
    objects = [
        {"box": [min(a, c), min(b, d), max(a, c), max(b, d)], "class_name": name, "score": 1.0}
        for a, b, c, d, name in drawn
    ]
    found, problems = parse(" ".join(serialise(objects, bins=100)), bins=100)
    wanted = sorted(objects, key=lambda o: o["box"][0] ** 2 + o["box"][1] ** 2)
    assert problems == []
    assert [o["class_name"] for o in found] == [o["class_name"] for o in wanted]
    assert (
        np.abs([np.subtract(f["box"], w["box"]) for f, w in zip(found, wanted, strict=True)] or 0).max()
        <= 0.5 / 99 + 1e-9
    )


@given(st.lists(st.sampled_from(["v0=1", "v1=2", "v2=3", "v3=4", "v3=99", "v4=1", "box", "[EOS]", "v0=", "é"])))
def test_any_soup_of_tokens_parses_and_loses_nothing_silently(words: list[str]) -> None:
    objects, problems = parse(" ".join(words), bins=10)
    assert len(objects) + len(problems) >= words.count("v0=1")
    assert bool(objects or problems) == bool(words)


@pytest.mark.parametrize("box", [[0, 0, 1], [0, 0, 1, float("nan")]])
def test_a_box_without_four_finite_numbers_is_refused(box: list[float]) -> None:
    with pytest.raises(ValueError, match="bad box"):
        serialise([{"box": box, "class_name": "a", "score": 1}], 10)


# Text.


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    data = train_text_tokenizer(CAPTIONS, 400, num_sentinels=3, coordinate_bins=5, class_names=["box", "wine glass"])
    (folder / "tokenizer.json").write_bytes(data)
    return folder


def test_vocabulary_begins_with_the_layout_of_4m(text_folder: Path) -> None:
    vocabulary = open_tokenizer((text_folder / "tokenizer.json").read_bytes(), "here")
    layout = [vocabulary.id_to_token(i) for i in range(29)]
    assert layout[:7] == ["[PAD]", "[UNK]", "[SOS]", "[EOS]", "[S_0]", "[S_1]", "[S_2]"]
    assert layout[7:17] == ["v0=0", "v0=1", "v0=2", "v0=3", "v0=4", "v1=0", "v1=1", "v1=2", "v1=3", "v1=4"]
    assert layout[17:27] == ["v2=0", "v2=1", "v2=2", "v2=3", "v2=4", "v3=0", "v3=1", "v3=2", "v3=3", "v3=4"]
    assert layout[27:] == ["box", "wine glass"]


def test_same_texts_in_another_order_learn_the_same_vocabulary() -> None:
    assert train_text_tokenizer(CAPTIONS, 400, 3, 5) == train_text_tokenizer(CAPTIONS[::-1], 400, 3, 5)


def test_fixed_tokens_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary_size 20 is less than the 28 fixed tokens"):
        train_text_tokenizer(CAPTIONS, 20, 3, 5, ["box"])


def test_captions_come_back_lower_case_and_without_end_marker(text_folder: Path) -> None:
    tokenizer = build("tok_caption", text_folder, "text")
    rows = tokenizer.encode(["A red sphere before two boxes", ""])
    assert rows[0].dtype == np.uint16
    assert len(rows[0]) == 6  # every word is one piece, 'boxes' too: the class name only stands for the whole word
    assert 3 not in rows[0]
    assert rows[1].shape == (0,)
    assert tokenizer.decode(rows) == ["a red sphere before two boxes", ""]


def test_long_captions_are_cut_at_max_tokens(text_folder: Path) -> None:
    row = build("tok_caption", text_folder, "text", max_tokens=4).encode(["a red sphere before a blue box"])[0]
    assert len(row) == 4


def test_text_of_strangers_cannot_spell_control_tokens(text_folder: Path) -> None:
    assert plain("[EOS] v0=3 [S_1] [X] v=3 v0=x") == "[ EOS] v0= 3 [ S_1] [X] v=3 v0=x"
    row = build("tok_caption", text_folder, "text").encode(["[PAD][EOS][SOS][S_0][S_2] v0=1 v3=4"])[0]
    assert not {0, 2, 3, *range(4, 27)} & set(row.tolist())


def test_objects_take_five_tokens_each_and_are_not_cut_in_two(text_folder: Path) -> None:
    objects = [
        {"box": [0.5, 0.5, 1.0, 1.0], "class_name": "wine glass", "score": 1.0},
        {"box": [0.0, 0.25, 0.5, 0.75], "class_name": "box", "score": 1.0},
    ]
    rows = build("tok_det", text_folder, "text").encode([objects, []])
    assert rows[0].tolist() == [7, 13, 19, 25, 27, 9, 14, 21, 26, 28]
    assert rows[1].tolist() == []
    short = build("tok_det", text_folder, "text", max_tokens=9)
    assert short.encode([objects])[0].tolist() == [7, 13, 19, 25, 27]
    assert short.decode(rows) == [objects[::-1], []]


@given(st.lists(st.integers(0, 40), max_size=30))
@settings(max_examples=50)
def test_any_ids_decode_to_objects(text_folder: Path, ids: list[int]) -> None:
    for item in build("tok_det", text_folder, "text").decode([np.array(ids)])[0]:
        assert all(0 <= value <= 1 for value in item["box"])


def test_ids_beyond_the_vocabulary_are_refused(text_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"ids 7\.\.9999"):
        build("tok_caption", text_folder, "text").decode([np.array([7, 9999])])


def test_vocabulary_in_another_layout_is_refused(tmp_path: Path, text_folder: Path) -> None:
    data = (text_folder / "tokenizer.json").read_text().replace("[SOS]", "<s>")
    (tmp_path / "tokenizer.json").write_text(data)
    with pytest.raises(ValueError, match="not in 4M's layout"):
        build("tok_caption", tmp_path, "text")


# Spatial.


def test_patches_hold_their_squares_and_go_back_in_place() -> None:
    picture = torch.arange(16.0).view(1, 1, 4, 4)
    patches = patchify(picture, 2)
    assert patches[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(unpatchify(patches, 2), picture)


def test_projections_start_from_the_principal_components_of_patches() -> None:
    network = SpatialNetwork(checkpoint_config("depth", 1))
    shades = torch.randn(32, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    maps = 3 + shades.repeat_interleave(4, 2).repeat_interleave(4, 3)  # patches differ in one direction: their shade
    network.start_from(maps)
    assert network.patch_out.bias.detach().numpy() == pytest.approx(np.full(16, maps.mean()), abs=1e-4)
    seen = network.patch_in(patchify(maps, 4)).detach()[..., 0].flatten()
    found = torch.corrcoef(torch.stack([seen, shades.flatten()]))[0, 1]
    assert abs(found.item()) == pytest.approx(1.0, abs=1e-4)


@pytest.fixture(scope="module")
def rgb_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("spatial") / "rgb", checkpoint_config("rgb", 3))


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)


def test_vocabulary_and_grid_are_known_without_loading(rgb_folder: Path) -> None:
    tokenizer = TOKENIZERS.build("tok_rgb", {"kind": "spatial", "checkpoint": str(rgb_folder)})
    assert tokenizer.spec("tok_rgb") == Spec(vocabulary=16, length=4, grid=(2, 2))


def test_tokens_do_not_depend_on_the_batch(rgb_folder: Path) -> None:
    tokenizer, batch = build("tok_rgb", rgb_folder), pixels(9)
    together = tokenizer.run(Batch([str(i) for i in range(9)], pixels=batch))["tok_rgb"]
    assert [row.tolist() for row in together] == [tokenizer.encode(batch[i : i + 1])[0].tolist() for i in range(9)]
    assert len({tuple(row.tolist()) for row in together}) > 1
    assert together[0].dtype == np.uint16


def test_encoding_leaves_the_codebook_as_it_is(rgb_folder: Path) -> None:
    tokenizer = build("tok_rgb", rgb_folder)
    before = {k: v.clone() for k, v in tokenizer.codec.network.state_dict().items()}
    tokenizer.decode(tokenizer.encode(pixels(4)))
    assert all(torch.equal(before[k], v) for k, v in tokenizer.codec.network.state_dict().items())


def test_decoding_gives_pictures(rgb_folder: Path) -> None:
    pictures = build("tok_rgb", rgb_folder).decode([np.array([0, 1, 2, 15])] * 2)
    assert pictures[0].shape == (8, 8, 3)
    assert pictures[0].dtype == np.uint8
    assert np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize(("ids", "message"), [([0, 1, 2, 16], "ids 0..16"), ([0, 1, 2], r"\(3,\); \(4,\) is needed")])
def test_impossible_tokens_are_refused(rgb_folder: Path, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("tok_rgb", rgb_folder).decode([np.array(ids)])


def test_values_of_another_shape_are_refused(rgb_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"rgb value of shape \(3, 16, 16\); this tokenizer takes \(3, 8, 8\)"):
        build("tok_rgb", rgb_folder).encode(np.zeros((1, 3, 16, 16), np.uint8))


def test_checkpoint_of_another_modality_is_refused(rgb_folder: Path) -> None:
    with pytest.raises(ValueError, match="tokenizes rgb, not normal"):
        TOKENIZERS.build("tok_normal", {"kind": "spatial", "checkpoint": str(rgb_folder)}).spec("tok_normal")


def test_float32_weights_survive_the_file_exactly() -> None:
    config = checkpoint_config("normal", 3)
    network = SpatialNetwork(config)
    again = unpack(config, pack(network, half=False), "here")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in network.state_dict().items())


def test_missing_weight_is_fatal_and_unknown_weight_is_named(rgb_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(rgb_folder, tmp_path / "c")
    weights = load_file(rgb_folder / "model.safetensors")
    save_file({**weights, "surplus": np.zeros(1, np.float32)}, tmp_path / "c" / "model.safetensors")
    with pytest.warns(UserWarning, match="not used: surplus"):
        build("tok_rgb", tmp_path / "c")
    del weights["to_latent.bias"]
    save_file(weights, tmp_path / "c" / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 weights: to_latent\.bias"):
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


def test_finite_scalar_quantization_round_trips(tmp_path: Path) -> None:
    config = checkpoint_config("clip", 6, patch_size=1, quantizer="fsq", levels=(4, 3), codebook_size=2)
    tokenizer = build("tok_clip", write_checkpoint(tmp_path / "fsq", config))
    features = np.random.default_rng(0).normal(size=(2, 6, 8, 8)).astype(np.float32)
    tokens = tokenizer.encode(list(features))
    assert tokenizer.vocabulary == 12
    assert max(row.max() for row in tokens) < 12
    restored = tokenizer.decode(tokens)[0]
    assert restored.shape == (6, 8, 8)
    assert np.linalg.norm(restored, axis=0) == pytest.approx(1.0, abs=1e-5)


def test_void_is_taken_in_but_never_asked_for() -> None:
    source = source_of(checkpoint_config("semseg", 8, classes=3))
    ids = np.array([[[0, 1], [2, 255]]], np.uint8).repeat(4, 1).repeat(4, 2)
    inputs = source.prepare(ids)
    logits = torch.zeros(1, 3, 8, 8)
    void = torch.from_numpy(ids.astype(np.int64)) == 255
    logits[:, 0][void] = 50.0  # whatever is said where the truth is void costs nothing
    assert source.loss(logits, inputs).item() == pytest.approx(np.log(3))
    assert source.loss(logits, torch.full_like(inputs, 255)).item() == 0.0
    right = [np.where(ids[0] == 255, 1, ids[0]).astype(np.uint8)]
    assert source.measure(list(ids), right) == {"pixel_accuracy": 1.0, "miou": 1.0}


def test_class_beyond_the_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"class id 3 in a semseg value; known: 0..2 and 255"):
        source_of(checkpoint_config("semseg", 8, classes=3)).prepare(np.full((1, 8, 8), 3, np.uint8))


def test_metric_depth_comes_back_in_metres() -> None:
    config = SpatialCheckpointConfig.model_validate(
        {
            "source": "depth",
            "channels": 1,
            "normalisation": {"kind": "log", "offset": 1.0, "scale": 0.5},
            "network": NETWORK,
        }
    )
    source = source_of(config)
    depth = np.full((1, 8, 8), np.e**2, np.float32)
    inputs = source.prepare(depth)
    assert inputs[0, 0, 0, 0].item() == pytest.approx(2.0)  # (ln e^2 - 1) / 0.5
    assert source.restore(inputs)[0] == pytest.approx(depth[0])
    assert source.measure(list(depth), [depth[0] * 1.1])["abs_rel"] == pytest.approx(0.1, abs=1e-6)


def test_relative_depth_is_standardised_over_its_middle_80_percent() -> None:
    depth = np.arange(10, dtype=np.float32).reshape(2, 5)
    depth[1, 4] = 1000.0  # the largest and the smallest tenth do not count
    middle = np.arange(1, 9)
    wanted = (depth - middle.mean()) / np.sqrt(middle.var() + 1e-6)
    assert standardise(depth) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modality": "tok_dpeth"}, "did you mean 'tok_depth'"),
        ({"modality": "depth"}, "is not one of tokens"),
        ({"modality": "tok_det"}, "no vocabulary of its own"),
        ({"modality": "tok_clip"}, "patch_size must be 1"),
        ({"modality": "tok_rgb", "network": {"size": 100}}, "not a multiple of patch_size"),
        ({"modality": "tok_rgb", "stepz": 3}, "stepz"),
    ],
)
def test_impossible_training_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainTokenizerConfig(dataset="d", out="o", **fields)


# The demo's own weights.


def test_demo_tokenizers_are_small() -> None:
    files = list(DEMO_FOLDER.glob("tok_*/model.safetensors"))
    assert len(files) == 4
    assert max(f.stat().st_size for f in files) < 6e6
    assert sum(f.stat().st_size for f in files) < 12e6


@pytest.fixture(scope="module")
def unseen() -> list[Any]:
    return [render(9, index, 128) for index in range(1000, 1032)]  # the cards' figures are of 0..511


def demo(name: str, values: Any) -> tuple[dict[str, float], int]:
    """Figures of a shipped tokenizer on `values`, and how many different codes it gave them."""
    tokenizer = build(name, f"demo:{name}")
    tokens = tokenizer.encode(values)
    assert tokenizer.grid == (8, 8)
    return tokenizer.codec.source.measure(values, tokenizer.decode(tokens)), len(np.unique(np.concatenate(tokens)))


def test_demo_rgb_restores_unseen_pictures(unseen: list[Any]) -> None:
    figures, codes = demo("tok_rgb", np.stack([scene.image.transpose(2, 0, 1) for scene in unseen]))
    assert figures["psnr_db"] > 24
    assert codes > 512  # half of the codebook, in 2,048 tokens


def test_demo_depth_restores_unseen_maps(unseen: list[Any]) -> None:
    figures, codes = demo("tok_depth", [scene.depth for scene in unseen])
    assert figures["abs_rel"] < 0.04
    assert codes > 256


def test_demo_semseg_restores_unseen_maps(unseen: list[Any]) -> None:
    figures, codes = demo("tok_semseg", [scene.semantic for scene in unseen])
    assert figures["pixel_accuracy"] > 0.96
    assert figures["miou"] > 0.85
    assert codes > 256


def test_demo_clip_restores_what_the_teacher_says(unseen: list[Any]) -> None:
    teacher = LABELERS.build("clip", {"checkpoint": "demo:clip"})
    teacher.load("cpu")
    pixels = np.stack([scene.image.transpose(2, 0, 1) for scene in unseen])
    features = teacher.run(Batch([str(i) for i in range(32)], pixels=pixels))["clip"]
    figures, codes = demo("tok_clip", features)
    assert figures["cosine"] > 0.8
    assert codes > 256


def test_demo_text_restores_captions_and_objects(unseen: list[Any]) -> None:
    captions = [scene.caption for scene in unseen]
    tokenizer = build("tok_caption", "demo:text", "text")
    rows = tokenizer.encode(captions)
    assert tokenizer.decode(rows) == captions
    assert not any(1 in row for row in rows)
    boxes = [
        [{"box": [v / 128 for v in o.box], "class_name": o.class_name, "score": 1.0} for o in scene.objects]
        for scene in unseen
    ]
    found = build("tok_det", "demo:text", "text").encode(boxes)
    assert [len(row) for row in found] == [5 * len(objects) for objects in boxes]
