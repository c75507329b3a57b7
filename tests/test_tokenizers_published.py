"""Tokenizers as 4M's authors publish them: read from both of their layouts, the same numbers out.

The configurations below are those of the hub repositories EPFL-VILAB/4M_tokenizers_*; the digests are of each file's
table of tensor names and shapes. Equality with ml-4m's own outputs is on reference data where that lies beside the
repository (a full VQ-VAE, a semantic one, a vector one), and for diffusion decoders in test_diffusion_reference.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_model import REFERENCE, needs_reference
from tiny_tokenizers import PUBLISHED, build, settled, write_published

from fourmill.tokenizers import TOKENIZERS, published
from fourmill.tokenizers.networks.diffusion_config import DENOISERS, UNetConfig
from fourmill.tokenizers.networks.quantizers import to_stored
from fourmill.tokenizers.networks.vq import VQNetwork
from fourmill.tokenizers.networks.weights import unpack
from fourmill.tokenizers.published import translate

UNET = {
    "dec_type": "unet_patched",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "prediction_type": "sample",
    "thresholding": False,
    "conditioning": "add",
    "zero_terminal_snr": True,
    "scheduler": "ddim",
}
MLP = {"enc_type": "BottleneckMLP/B_6-Wi_1024", "dec_type": "BottleneckMLP/B_6-Wi_1024", "patch_proj": False}
VIT = {"enc_type": "vit_b_enc", "dec_type": "vit_b_dec", "latent_dim": 32, "image_size": 448}
MEMCODES = {"quant_type": "memcodes", "latent_dim": 1024, "image_size": 224}
HUB: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "CLIP-B16_8k_224-448": (
        "clip",
        {**VIT, "patch_proj": False, "n_channels": 512, "codebook_size": 8192},
        313,
        "282ea1c077c3bdbc",
    ),
    "DINOv2-B14_8k_224-448": (
        "dinov2",
        {**VIT, "patch_proj": False, "n_channels": 768, "codebook_size": 8192},
        313,
        "2a8ec21133c59151",
    ),
    "ImageBind-H14_8k_224-448": (
        "imagebind",
        {**VIT, "patch_proj": False, "n_channels": 1280, "codebook_size": 8192},
        313,
        "399543b94cfb8b22",
    ),
    "DINOv2-B14-global_8k_16_224": (
        "dinov2_global",
        {**MLP, **MEMCODES, "n_channels": 768, "codebook_size": 8192, "num_codebooks": 16},
        87,
        "c8208ae5f8b33a1d",
    ),
    "ImageBind-H14-global_8k_16_224": (
        "imagebind_global",
        {**MLP, **MEMCODES, "n_channels": 1280, "codebook_size": 8192, "num_codebooks": 16},
        87,
        "742c631baa2fb6a0",
    ),
    "human-poses_1k_8": (
        "human_pose",
        {**MLP, **MEMCODES, "n_channels": 207, "codebook_size": 1024, "num_codebooks": 8},
        87,
        "be7292fc97bc05a5",
    ),
    "depth_8k_224-448": (
        "depth",
        {**VIT, **UNET, "n_channels": 1, "codebook_size": 8192},
        604,
        "6720c2e331a735bb",
    ),
    "normal_8k_224-448": (
        "normal",
        {**VIT, **UNET, "clip_sample": True, "n_channels": 3, "codebook_size": 8192},
        604,
        "e4f1ce16b036ce3e",
    ),
    "rgb_16k_224-448": (
        "rgb",
        {**VIT, **UNET, "n_channels": 3, "codebook_size": 16384},
        604,
        "cd2106e46ee97e3f",
    ),
    "edge_8k_224-512": (
        "canny_edge",
        {
            **VIT,
            **UNET,
            "dec_type": "uvit_b_p4_f16",
            "conditioning": "concat",
            "image_size": 512,
            "image_size_enc": 224,
            "n_channels": 1,
            "codebook_size": 8192,
        },
        492,
        "a964b48662c547fc",
    ),
    "sam-instance_1k_64": (
        "mask",
        {**VIT, "image_size": 64, "latent_dim": 1024, "out_conv": True, "n_channels": 1, "codebook_size": 1024},
        331,
        "cb00e12b26b0ab07",
    ),
    "semseg_4k_224-448": (
        "semseg",
        {**VIT, "n_labels": 134, "n_channels": 64, "codebook_size": 4096},
        314,
        "60993d150159148e",
    ),
}


@pytest.fixture(autouse=True)
def _tiny_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(published.VIT_SIZES, "vit_tiny", (64, 2, 4))


def full(name: str) -> tuple[str, dict[str, Any]]:
    source, config, _, _ = HUB[name]
    return source, {**PUBLISHED, "out_conv": False, **config}


@pytest.mark.parametrize("name", HUB)
def test_the_network_has_the_tensors_of_the_published_file(name: str) -> None:
    source, config = full(name)
    with torch.device("meta"):
        network = VQNetwork(translate(config, source))
    shapes = {key: list(tensor.shape) for key, tensor in to_stored(network.state_dict()).items()}
    _, _, count, digest = HUB[name]
    assert len(shapes) == count
    assert hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("name", "grid", "vocabulary"),
    [
        ("rgb_16k_224-448", (14, 14), 16_384),
        ("semseg_4k_224-448", (14, 14), 4_096),
        ("DINOv2-B14-global_8k_16_224", (1, 16), 8_192),
        ("sam-instance_1k_64", (4, 4), 1_024),
    ],
)
def test_vocabulary_and_grid_follow_from_the_published_configuration(
    name: str, grid: tuple[int, int], vocabulary: int
) -> None:
    source, config = full(name)
    network = translate(config, source).network
    side = {"mask": 64, "dinov2_global": 1}.get(source, 224)
    assert (network.grid_of(side), network.vocabulary) == (grid, vocabulary)


@needs_reference
@pytest.mark.parametrize("weights", ["model.safetensors", "model_with_metadata.safetensors"])
@pytest.mark.parametrize(
    ("name", "source"), [("vq_rgb", "rgb"), ("vq_semseg", "semseg"), ("vq_memcodes", "clip_global")]
)
def test_reference_outputs_of_ml_4m_are_reproduced(name: str, source: str, weights: str) -> None:
    folder = REFERENCE / name
    config = translate(json.loads((folder / "config.json").read_text()), source)
    network = unpack(config, (folder / weights).read_bytes(), weights)
    wanted = load_file(folder / "ref.safetensors")
    with torch.no_grad():
        latents = network.latents(wanted["x"])
        codes, ids, _ = network.quantize(latents)
        outputs = network.values(network.tokens(wanted["x"]))
    assert torch.equal(ids, wanted["tokens"])
    assert (latents - wanted["latent"]).abs().max() < 1e-4
    assert (codes - wanted["quant"]).abs().max() < 1e-6
    assert (outputs - wanted["dec"]).abs().max() < 1e-4


@needs_reference
@pytest.mark.parametrize("layout", ["config.json", "header"])
def test_a_published_folder_tokenizes_by_the_ordinary_configuration(layout: str, tmp_path: Path) -> None:
    folder = REFERENCE / "vq_semseg"
    weights = "model.safetensors" if layout == "config.json" else "model_with_metadata.safetensors"
    (tmp_path / "model.safetensors").write_bytes((folder / weights).read_bytes())
    if layout == "config.json":
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tokenizer = build("tok_semseg", tmp_path)
    wanted = load_file(folder / "ref.safetensors")
    theirs = wanted["x"].numpy()  # their label 0 is void, their label k + 1 our class k
    ours = np.where(theirs == 0, 255, theirs - 1).astype(np.uint8)
    tokens = tokenizer.encode(list(ours))
    assert np.array_equal(np.stack(tokens), wanted["tokens"].flatten(1).numpy())
    classes = wanted["dec"][:, 1:].argmax(1).numpy()
    assert np.array_equal(np.stack(tokenizer.decode(tokens)), classes)


@pytest.mark.parametrize("layout", ["hub", "header"])
@pytest.mark.parametrize(
    ("modality", "kind", "changes"),
    [
        ("tok_rgb", "spatial", {}),
        ("tok_depth", "spatial", {"n_channels": 1}),
        ("tok_clip", "spatial", {"patch_proj": False, "n_channels": 12}),
        ("tok_semseg", "spatial", {"n_labels": 10, "n_channels": 8}),
        ("tok_clip_global", "vector", {**MLP, "quant_type": "memcodes", "num_codebooks": 4, "n_channels": 12}),
    ],
)
def test_checkpoints_built_in_the_published_format_load_and_round_trip(
    modality: str, kind: str, changes: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    config = {**PUBLISHED, **changes}
    if kind == "vector":
        config |= {"enc_type": "BottleneckMLP/B_2-Wi_32", "dec_type": "BottleneckMLP/B_2-Wi_32", "latent_dim": 32}
    source = modality.removeprefix("tok_")
    network = settled(translate(config, source))
    tokenizer = build(modality, write_published(tmp_path / "c", network, config, layout), kind)
    values = _values(source, config["n_channels"])
    tokens = tokenizer.encode(values)
    with torch.no_grad():
        wanted = network.tokens(tokenizer.codec.source.prepare(values))
    assert np.array_equal(np.stack(tokens), wanted.numpy())
    assert np.shape(tokenizer.decode(tokens)[0]) == ((64, 64, 3) if source == "rgb" else np.shape(values[0]))


def _values(source: str, channels: int) -> Any:
    rng = np.random.default_rng(0)
    if source == "rgb":
        return rng.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    if source == "semseg":
        return list(rng.integers(0, 9, (2, 64, 64), dtype=np.uint8))
    shape = {"depth": (64, 64), "clip": (channels, 4, 4), "clip_global": (channels,)}[source]
    return list(rng.random((2, *shape), dtype=np.float32))


def test_a_diffusion_tokenizer_encodes_without_its_decoder_and_decodes_the_same_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = UNetConfig(patch_size=8, dim=16, multipliers=(1, 2), blocks=1, attention_at=(2,), groups=4)
    monkeypatch.setitem(DENOISERS, "unet_tiny", tiny)
    config = {**PUBLISHED, **UNET, "dec_type": "unet_tiny"}
    network = settled(translate(config, "rgb"))
    with torch.no_grad():  # a new denoiser's last layer is zero, and says the same of all tokens
        for weight in network.decoder.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    tokenizer = build("tok_rgb", write_published(tmp_path / "c", network, config, "hub"))
    tokens = tokenizer.encode(_values("rgb", 3))
    assert not any(name.startswith("decoder.") for name in tokenizer.codec.network.state_dict())
    pictures = tokenizer.decode(tokens)
    assert pictures[0].shape == (64, 64, 3)
    assert np.array_equal(tokenizer.decode(tokens[1:])[0], pictures[1])  # whatever batch it is in
    assert not np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enc_type": "vit_g_enc"}, "enc_type 'vit_g_enc' is not known; known: vit_s, vit_b, vit_l"),
        ({"quant_type": "fsq"}, "quant_type 'fsq' with these settings is not supported"),
        ({"dec_type": "vit_s_dec"}, "dec_type 'vit_s_dec' is not as wide as enc_type 'vit_tiny_enc'"),
        ({"dec_type": "unet_huge"}, "dec_type 'unet_huge' is not a diffusion decoder; known: unet_patched"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate({**PUBLISHED, **changes}, "rgb")


def test_shared_tensors_come_back_under_both_names(tmp_path: Path) -> None:
    """huggingface_hub stores tensors that share memory once, and says so in the header."""
    from safetensors.torch import save_file

    network = settled(translate(PUBLISHED, "rgb"))
    folder = write_published(tmp_path / "c", network, PUBLISHED, "hub")
    tensors = load_file(folder / "model.safetensors")
    kept = tensors.pop("decoder.pos_emb")  # equal to the encoder's
    assert torch.equal(kept, tensors["encoder.pos_emb"])
    save_file(tensors, folder / "model.safetensors", {"decoder.pos_emb": "encoder.pos_emb"})
    tokenizer = TOKENIZERS.build("tok_rgb", {"kind": "spatial", "checkpoint": str(folder)})
    tokenizer.load("cpu")
    assert tokenizer.decode(tokenizer.encode(_values("rgb", 3)))[0].shape == (64, 64, 3)
