"""Tokenizers published by 4M's authors (ml-4m's format): their config.json told in this project's words.

Weights need no translation: `networks.VQNetwork` has ml-4m's names. What their configuration leaves unsaid, the source
modality and how its values were brought to the network's range, follows from the modality that is asked for: ml-4m's
transforms of each are fixed.
"""

from __future__ import annotations

import ast
import json
import re
import struct
from typing import Any

from pydantic import ValidationError

from fourmill.checkpoints import Checkpoint
from fourmill.tokenizers.config import FEATURES, CheckpointConfig
from fourmill.tokenizers.files import has_file, read_file
from fourmill.tokenizers.networks.diffusion_config import from_published

# Width, blocks and heads behind ml-4m's names of transformers.
VIT_SIZES = {"vit_s": (512, 8, 8), "vit_b": (768, 12, 12), "vit_l": (1024, 24, 16)}
_MLP = re.compile(r"BottleneckMLP/B_(\d+)-Wi_(\d+)(?:-E_(\d+))?")
_QUANTIZERS = {"lucid": "vq", "memcodes": "memcodes"}
_NORMALISATIONS = {
    "rgb": "signed",
    "canny_edge": "signed",
    "depth": "standardise",
    "normal": "unit",  # their 8-bit pictures of normals are (n + 1) / 2, and -1..1 after scaling: n itself
    "semseg": "classes",
    "mask": "binary",
}


def read_settings(checkpoint: Checkpoint, source: str) -> CheckpointConfig:
    """The configuration of a checkpoint of either format; ValueError if it is broken or for another modality."""
    where = f"config.json of checkpoint {checkpoint.reference!r}"
    try:
        found = _read(checkpoint)
        if "enc_type" in found:
            return translate(found, source, where)
        settings = CheckpointConfig.model_validate_json(json.dumps(found))
    except (ValidationError, json.JSONDecodeError) as error:
        raise ValueError(f"bad {where}: {error}") from error
    if settings.source != source:
        raise ValueError(f"checkpoint {checkpoint.reference!r} tokenizes {settings.source}, not {source}")
    return settings


def _read(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json, or where there is none the header of the weights, which published files carry it in too."""
    if has_file(checkpoint, "config.json"):
        return dict(json.loads(read_file(checkpoint, "config.json")))
    data = read_file(checkpoint, "model.safetensors")
    (length,) = struct.unpack_from("<Q", data)
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return {name: _literal(text) for name, text in metadata.items()}


def _literal(text: str) -> Any:
    """A Python literal as `str` wrote it; other words are themselves."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def translate(found: dict[str, Any], source: str, where: str = "config.json") -> CheckpointConfig:
    """ml-4m's configuration of a VQ-VAE or DiVAE as a `CheckpointConfig`; ValueError for what is not supported."""
    quantizer = _QUANTIZERS.get(found.get("quant_type", "lucid"))
    if quantizer is None or not found.get("norm_codes", True) or found.get("undo_std"):
        raise ValueError(f"{where}: quant_type {found.get('quant_type')!r} with these settings is not supported")
    mlp = _MLP.fullmatch(found["enc_type"])
    network = _mlp(mlp) if mlp else _vit(found, source, where)
    if found.get("dec_type", "").startswith(("unet", "uvit")):
        network["diffusion"] = from_published(found)
        network["decoder_size"] = found.get("image_size_dec") or found["image_size"]
    network |= {
        "quantizer": quantizer,
        "codebook_size": found["codebook_size"],
        "num_codebooks": found.get("num_codebooks", 1),
        "latent_dim": found.get("latent_dim", 32),
    }
    labels = found.get("n_labels")
    return CheckpointConfig.model_validate(
        {
            "source": source,
            "channels": found["n_channels"],
            "classes": labels - 1 if labels else 0,  # their first label is void
            "normalisation": {"kind": _NORMALISATIONS.get(source, "raw")},
            "network": network,
        }
    )


def _vit(found: dict[str, Any], source: str, where: str) -> dict[str, Any]:
    name = found["enc_type"].removesuffix("_enc")
    if name not in VIT_SIZES:
        raise ValueError(f"{where}: enc_type {found['enc_type']!r} is not known; known: {', '.join(VIT_SIZES)}")
    dim, blocks, heads = VIT_SIZES[name]
    decoder = found.get("dec_type", f"{name}_dec")
    if decoder.startswith("vit_"):
        other = VIT_SIZES.get(decoder.removesuffix("_dec"), (0, 0, 0))
        if other[0] != dim:
            raise ValueError(f"{where}: dec_type {decoder!r} is not as wide as enc_type {found['enc_type']!r}")
    patch = found.get("patch_size", 16)
    size = found.get("image_size_enc") or found["image_size"]
    if source in FEATURES or not found.get("patch_proj", True):  # one token a cell, whatever patch_size says
        size, patch = size // patch, 1
    return {
        "size": size,
        "patch_size": patch,
        "dim": dim,
        "encoder_blocks": blocks,
        "decoder_blocks": other[1] if decoder.startswith("vit_") else 0,
        "heads": heads,
        "post_mlp": found.get("post_mlp", False),
        "out_conv": found.get("out_conv", False),
    }


def _mlp(match: re.Match[str]) -> dict[str, Any]:
    blocks, dim, ratio = int(match[1]), int(match[2]), int(match[3] or 4)
    sizes = {"dim": dim, "encoder_blocks": blocks, "decoder_blocks": blocks, "mlp_ratio": float(ratio)}
    return {"architecture": "mlp", "size": 1, "patch_size": 1, **sizes}
