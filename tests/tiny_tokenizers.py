"""Tokenizer checkpoints small enough to be made in a test, in this project's format and in that of ml-4m."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fourmill.tokenizers import TOKENIZERS
from fourmill.tokenizers.config import CheckpointConfig
from fourmill.tokenizers.networks.quantizers import to_stored
from fourmill.tokenizers.networks.vq import VQNetwork
from fourmill.tokenizers.networks.weights import pack

NORMALISATION = {
    "rgb": "signed",
    "canny_edge": "signed",
    "depth": "log",
    "semseg": "classes",
    "mask": "binary",
    "human_pose": "raw",
}
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
VECTOR = {
    "architecture": "mlp",
    "size": 1,
    "patch_size": 1,
    "dim": 16,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "quantizer": "memcodes",
    "latent_dim": 16,
    "codebook_size": 32,
    "num_codebooks": 4,
}
PUBLISHED = {  # as hub files of 4M's tokenizers spell it; 'vit_tiny' is 64 wide, 2 blocks, 4 heads
    "image_size": 64,
    "image_size_enc": None,
    "n_labels": None,
    "enc_type": "vit_tiny_enc",
    "patch_proj": True,
    "post_mlp": True,
    "patch_size": 16,
    "quant_type": "lucid",
    "codebook_size": 64,
    "num_codebooks": 1,
    "latent_dim": 16,
    "norm_codes": True,
    "norm_latents": False,
    "sync_codebook": False,
    "undo_std": False,
    "dec_type": "vit_tiny_dec",
    "image_size_dec": None,
    "patch_size_dec": None,
    "out_conv": False,
    "n_channels": 3,
}


def checkpoint_config(source: str, channels: int, classes: int = 0, **network: Any) -> CheckpointConfig:
    """A tiny network for values of `source`, 8 pixels wide unless `network` says otherwise."""
    sizes = VECTOR if network.get("architecture") == "mlp" else NETWORK
    return CheckpointConfig.model_validate(
        {
            "source": source,
            "channels": channels,
            "classes": classes,
            "normalisation": {"kind": NORMALISATION.get(source, "unit")},
            "network": {**sizes, **network},
        }
    )


def settled(config: CheckpointConfig) -> VQNetwork:
    """A network whose codebook one training pass has started."""
    torch.manual_seed(0)
    network, side = VQNetwork(config), config.network.size
    inputs: torch.Tensor = torch.randn(8, config.channels, side, side)
    if config.classes:
        inputs = torch.randint(0, config.classes + 1, (8, side, side))
    with torch.no_grad():
        network.train().quantize(network.latents(inputs))
    return network.eval()


def write_checkpoint(folder: Path, config: CheckpointConfig) -> Path:
    """The folder with a settled network's checkpoint."""
    folder.mkdir()
    (folder / "config.json").write_text(config.model_dump_json())
    (folder / "model.safetensors").write_bytes(pack(settled(config)))
    return folder


def write_published(folder: Path, network: VQNetwork, config: dict[str, Any], layout: str) -> Path:
    """The network as 4M's authors publish theirs: 'hub' has a config.json; 'header' carries it in the weights' header,
    each value as Python's `str` writes it."""
    folder.mkdir()
    tensors = {name: tensor.float().contiguous() for name, tensor in to_stored(network.state_dict()).items()}
    metadata = {name: str(value) for name, value in config.items()} if layout == "header" else {"format": "pt"}
    save_file(tensors, folder / "model.safetensors", metadata)
    if layout == "hub":
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def build(name: str, folder: Path | str, kind: str = "spatial", **options: Any) -> Any:
    """The loaded tokenizer of a checkpoint folder."""
    tokenizer = TOKENIZERS.build(name, {"kind": kind, "checkpoint": str(folder), **options})
    tokenizer.load("cpu")
    return tokenizer
