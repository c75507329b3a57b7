"""What tokenizers are trained on: every source's examples and settings, the parts that labels hold, their pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourmill.checkpoints import resolve
from fourmill.modalities import modality
from fourmill.pipeline import masks
from fourmill.pipeline.codecs import encode
from fourmill.pipeline.manifest import Update, update_manifest
from fourmill.pipeline.shards import Spec, commit, producer_id, write_shard
from fourmill.pipeline.store import open_store
from fourmill.tokenizers.published import read_settings
from fourmill.tokenizers.spatial import open_codec
from fourmill.tokenizers.training.config import TrainTokenizerConfig
from fourmill.tokenizers.training.examples import ArrayExamples, PartExamples
from fourmill.tokenizers.training.run import settings_of, train_spatial, train_tokenizer

VIT: dict[str, Any] = {"size": 16, "patch_size": 4, "dim": 32, "encoder_blocks": 1, "decoder_blocks": 1, "heads": 2}
VIT |= {"latent_dim": 8, "codebook_size": 32}
CELLS = {**VIT, "size": 4, "patch_size": 1}
MLP: dict[str, Any] = {"architecture": "mlp", "size": 1, "patch_size": 1, "dim": 32, "encoder_blocks": 1}
MLP |= {"decoder_blocks": 1, "quantizer": "memcodes", "latent_dim": 16, "num_codebooks": 4, "codebook_size": 8}
DIFFUSION = {"denoiser": {"kind": "unet", "dim": 32}}


def config(out: Path, name: str, network: dict[str, Any], **fields: Any) -> TrainTokenizerConfig:
    base = {"dataset": "none", "modality": name, "out": str(out), "steps": 12, "batch_size": 8, "lr": 2e-3}
    base |= {"warmup": 2, "unquantized": 4, "report_every": 6, "min_perplexity": 0, "device": "cpu", "num_threads": 1}
    return TrainTokenizerConfig.model_validate({**base, "held_out": 0.2, "network": network, **fields})


def numbered(values: list[Any]) -> ArrayExamples:
    return ArrayExamples([str(i) for i in range(len(values))], values)


def add(dataset: Path, name: str, values: list[Any]) -> None:
    store, entry, producer = open_store(str(dataset)), modality(name), {"class": "test", "version": 1}
    stored = [[None if value is None else encode(entry, value) for value in values]]
    keys = [f"k{i}" for i in range(len(values))]
    record = commit(store, write_shard(name, 0, "0" * 16, keys, stored, Spec(), producer, {}))
    update_manifest(store, lambda _: Update([record], {producer_id(producer): producer}))


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=0)


RNG = np.random.default_rng(0)
VALUES: dict[str, Any] = {
    "tok_rgb": (VIT, RNG.integers(0, 256, (24, 3, 1, 1)).repeat(16, 2).repeat(16, 3).astype(np.uint8)),
    "tok_depth": (VIT, RNG.uniform(1, 9, (24, 1, 1)).repeat(16, 1).repeat(16, 2).astype(np.float32)),
    "tok_normal": (VIT, [unit(RNG, 3, 1, 1).repeat(16, 1).repeat(16, 2) for _ in range(24)]),
    "tok_semseg": (VIT, RNG.integers(0, 3, (24, 1, 1)).repeat(16, 1).repeat(16, 2).astype(np.uint8)),
    "tok_canny_edge": (VIT, (RNG.random((24, 4, 4)) > 0.5).repeat(4, 1).repeat(4, 2).astype(np.uint8) * 255),
    "sam_instance": (VIT, (RNG.random((24, 2, 2)) > 0.5).repeat(8, 1).repeat(8, 2).astype(np.uint8)),
    "tok_clip": (CELLS, [unit(RNG, 12, 4, 4) for _ in range(24)]),
    "tok_clip_global": (MLP, [unit(RNG, 12) for _ in range(24)]),
    "human_poses": (MLP, [RNG.normal(size=207).astype(np.float32) for _ in range(24)]),
}
SETTINGS = {
    "tok_rgb": ("rgb", 3, "signed"),
    "tok_depth": ("depth", 1, "log"),
    "tok_normal": ("normal", 3, "unit"),
    "tok_semseg": ("semseg", 8, "classes"),
    "tok_canny_edge": ("canny_edge", 1, "signed"),
    "sam_instance": ("mask", 1, "binary"),
    "tok_clip": ("clip", 12, "unit"),
    "tok_clip_global": ("clip_global", 12, "unit"),
    "human_poses": ("human_pose", 207, "raw"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_source_is_learned_with_settings_read_off_its_values(tmp_path: Path, name: str) -> None:
    network, values = VALUES[name]
    examples, chosen = numbered(list(values)), config(tmp_path, name, network)
    settings = settings_of(examples, [0, 1, 2], chosen, 0)
    assert (settings.source, settings.channels, settings.normalisation.kind) == SETTINGS[name]
    result = train_spatial(examples, chosen)
    assert result.steps == 12
    assert result.losses[-1] < result.losses[0] or name in ("tok_clip_global", "human_poses")
    assert 0 < result.usage <= 1
    checkpoint = resolve(str(tmp_path))
    codec = open_codec(checkpoint, read_settings(checkpoint, settings.source), "cpu")
    tokens = codec.encode(list(values)[:2])
    assert tokens[0].shape == ((4,) if name in ("tok_clip_global", "human_poses") else (16,))
    assert len(codec.decode(tokens)) == 2


def test_memcodes_report_each_codebook(tmp_path: Path) -> None:
    network, values = VALUES["human_poses"]
    reports: list[Any] = []
    train_spatial(numbered(list(values)), config(tmp_path, "human_poses", network), progress=reports.append)
    health = reports[-1].health
    assert 1 < health.lowest <= health.perplexity <= 8
    assert f"(lowest codebook {health.lowest:.1f})" in str(reports[-1])


def test_vectors_learn_to_tell_eight_directions_apart(tmp_path: Path) -> None:
    directions = [np.eye(12, dtype=np.float32)[i % 8] for i in range(160)]
    chosen = config(tmp_path, "tok_clip_global", MLP, steps=150, batch_size=32, lr=3e-3, report_every=50)
    result = train_spatial(numbered(directions), chosen)
    assert result.figures["cosine"] > 0.95  # the mean of all directions gives 0.35


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("tok_sam_instance", {}, "no vocabulary of its own.*; for the codes within, sam_instance"),
        ("tok_color_palette", {}, "no vocabulary of its own"),
        ("tok_semseg", {"network": {**VIT, "diffusion": DIFFUSION}}, "not semseg"),
        ("tok_rgb", {"sizes": [16, 18]}, "must be multiples of 4"),
        ("tok_rgb", {"freeze_encoder": True}, "needs `init`"),
        ("tok_depth", {"perceptual": {"checkpoint": "x", "blocks": ["a"]}}, "is for rgb"),
        ("tok_clip_global", {"network": MLP, "sizes": [1, 2]}, "a vector has none"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, name, **{"network": VIT, **fields})


# Parts of labels.


def instance(box: tuple[int, int, int, int]) -> dict[str, Any]:
    mask = np.zeros((32, 32), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    mask[box[1], box[0]] = False
    return {"box": [v / 32 for v in box], "area": int(mask.sum()), "mask": masks.encode(mask), "score": 1.0}


def test_masks_are_cut_out_of_their_boxes(tmp_path: Path) -> None:
    add(
        tmp_path,
        "sam_instance",
        [[instance((0, 0, 16, 16)), instance((4, 8, 20, 16))], None, [], [instance((1, 1, 3, 3))]],
    )
    examples = PartExamples(str(tmp_path), "sam_instance", 64)
    assert examples.keys == ["k0", "k0", "k3"]
    first, second = examples.values([0, 1])
    assert (first.shape, first.dtype) == ((64, 64), np.uint8)
    # One pixel of 16 x 16 is 4 x 4 cells of 64 x 64, one of 16 x 8 is 4 x 8.
    assert (first.sum(), second.sum()) == (64 * 64 - 16, 64 * 64 - 32)
    assert first[:4, :4].sum() == 0


def test_masks_too_small_to_be_tokenized_are_left_out(tmp_path: Path) -> None:
    small = {**instance((0, 0, 1, 2)), "box": [0.0, 0.0, 0.02, 0.02]}  # 0.0004 of the picture
    add(tmp_path, "sam_instance", [[small, instance((0, 0, 9, 9))]])
    assert len(PartExamples(str(tmp_path), "sam_instance", 64).keys) == 1


def test_masks_are_learned_from_shards(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    boxes = [(0, 0, int(w), int(h)) for w, h in rng.integers(8, 32, (24, 2))]
    add(tmp_path / "d", "sam_instance", [[instance(box)] for box in boxes])
    network = {**VIT, "size": 64, "patch_size": 16, "out_conv": True}
    chosen = config(tmp_path / "out", "sam_instance", network, steps=20, dataset=str(tmp_path / "d"))
    assert train_tokenizer(chosen).figures["mask_iou"] > 0.9


def test_poses_come_person_by_person(tmp_path: Path) -> None:
    people = [{"box": [0, 0, 1, 1], "orientation": [0.0] * 9, "camera": [0.0] * 3, "shape": [0.0] * 10}]
    add(tmp_path, "human_poses", [[], [{**people[0], "pose": [0.25 * i] * 207} for i in range(2)]])
    examples = PartExamples(str(tmp_path), "human_poses", 1)
    assert examples.keys == ["k1", "k1"]
    assert examples.values([1])[0].tolist() == [0.25] * 207


def test_unknown_depth_does_not_move_the_normalisation(tmp_path: Path) -> None:
    values = [np.where(np.eye(16, dtype=bool), 0, np.exp(2)).astype(np.float32) for _ in range(3)]
    settings = settings_of(numbered(values), [0, 1, 2], config(tmp_path, "tok_depth", VIT), 0)
    assert settings.normalisation.offset == 2.0


# Pictures.


@pytest.mark.parametrize("name", ["tok_rgb", "tok_normal", "tok_semseg", "tok_canny_edge", "tok_clip", "sam_instance"])
def test_every_spatial_source_has_a_picture(tmp_path: Path, name: str) -> None:
    from fourmill.tokenizers.networks.vq import VQNetwork
    from fourmill.tokenizers.sources import source_of
    from fourmill.tokenizers.spatial import SpatialCodec
    from fourmill.tokenizers.training.board import painter

    network, values = VALUES[name]
    settings = settings_of(numbered(list(values)), [0], config(tmp_path, name, network), 3)
    codec = SpatialCodec(settings, VQNetwork(settings).eval(), source_of(settings), "cpu")
    paint = painter(codec, list(values)[:4])
    assert paint is not None
    drawn = paint(codec.decode(codec.encode(list(values)[:1]))[0])
    side = 32 if name == "tok_clip" else 16
    assert (drawn.shape, drawn.dtype) == ((side, side, 3), np.uint8)
