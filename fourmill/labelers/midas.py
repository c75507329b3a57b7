"""DPT-hybrid networks as MiDaS and Omnidata publish them (`.ckpt`, `.pth`), loaded into transformers' DPT.

Omnidata's networks are 4M's teachers of depth and normals. Their files hold the key names of MiDaS around timm's
`vit_base_r50_s16_384`; a training checkpoint puts them below `state_dict`, each with a prefix `model.`.

Invariants: read with torch's weights-only loader, which runs no pickle; every weight of the network comes from the
file; every weight of the file is used or known to be of no use (the ImageNet classifier).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourmill.checkpoints import Checkpoint
from fourmill.labelers.loading import check_keys, load_class

_SUFFIXES = (".ckpt", ".pth", ".pt")
_PATCH = 16
_LAYERS_READ = (0, 1, 8, 11)  # two stages of the ResNet, two blocks of the transformer

# Patterns for whole names, without `.weight` or `.bias`; the refinement stages count the other way round.
_RENAMED = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"pretrained\.model\.patch_embed\.backbone\.stem\.conv", "dpt.embeddings.backbone.bit.embedder.convolution"),
        (r"pretrained\.model\.patch_embed\.backbone\.stem\.norm", "dpt.embeddings.backbone.bit.embedder.norm"),
        (
            r"pretrained\.model\.patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.(.+)",
            r"dpt.embeddings.backbone.bit.encoder.stages.\1.layers.\2.\3",
        ),
        (r"pretrained\.model\.patch_embed\.proj", "dpt.embeddings.projection"),
        (r"pretrained\.model\.blocks\.(\d+)\.norm1", r"dpt.encoder.layer.\1.layernorm_before"),
        (r"pretrained\.model\.blocks\.(\d+)\.norm2", r"dpt.encoder.layer.\1.layernorm_after"),
        (r"pretrained\.model\.blocks\.(\d+)\.attn\.proj", r"dpt.encoder.layer.\1.attention.output.dense"),
        (r"pretrained\.model\.blocks\.(\d+)\.mlp\.fc1", r"dpt.encoder.layer.\1.intermediate.dense"),
        (r"pretrained\.model\.blocks\.(\d+)\.mlp\.fc2", r"dpt.encoder.layer.\1.output.dense"),
        (r"pretrained\.model\.norm", "dpt.layernorm"),
        (r"scratch\.output_conv\.(\d+)", r"head.head.\1"),
    )
)
_UNUSED = re.compile(r"pretrained\.model\.(head|head_dist|fc_norm|pre_logits)\..*")


def weights_file(checkpoint: Checkpoint) -> Path | None:
    """The checkpoint's file in this layout, or None if it is one that transformers saved."""
    location = Path(checkpoint.location)
    place = location if location.exists() else _fetch(checkpoint)  # else a hub id
    if place is None or place.is_file():
        return place
    if (place / "config.json").is_file():
        return None
    files = sorted(p for p in place.iterdir() if p.suffix in _SUFFIXES)
    if len(files) != 1:
        found = ", ".join(p.name for p in files) or "none"
        raise ValueError(
            f"{checkpoint.reference} has no config.json and must hold one file of weights "
            f"({', '.join(_SUFFIXES)}), not {found}"
        )
    return files[0]


def _fetch(checkpoint: Checkpoint) -> Path | None:
    """Download the weights of a hub id that has no config.json; None if it has one."""
    from huggingface_hub import file_exists, snapshot_download

    if file_exists(checkpoint.location, "config.json", revision=checkpoint.revision):
        return None
    patterns = [f"*{suffix}" for suffix in _SUFFIXES]
    return Path(snapshot_download(checkpoint.location, revision=checkpoint.revision, allow_patterns=patterns))


def load_dpt_hybrid(checkpoint: Checkpoint, file: Path, channels: int) -> Any:
    """The network in float32 on the CPU, of `channels` maps: 1 for depth, 3 for normals. ValueError for a file with
    other outputs, and if any weight is missing."""
    weights = _read(checkpoint, file)
    found = int(weights["scratch.output_conv.4.weight"].shape[0])
    if found != channels:
        wanted = {1: "depth", 3: "normal"}
        taker = f"the labeler {wanted[found]!r} takes it" if found in wanted else "no labeler takes it"
        raise ValueError(f"{checkpoint.reference} gives {found} maps where {channels} are wanted; {taker}")
    model = dpt_class(channels)(_config(weights))
    state = {new: value for old, tensor in weights.items() for new, value in _renamed(old, tensor)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    check_keys(checkpoint, "DPT-hybrid", missing, unexpected)
    return model


def load_saved_dpt(checkpoint: Checkpoint, channels: int) -> Any:
    """The same network in transformers' format. ValueError for a head of another number of maps."""
    try:
        return load_class(dpt_class(channels), checkpoint)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{checkpoint.reference}: its head does not give {channels} map(s); the labeler 'depth' takes a DPT of one "
            "map, 'normal' one of three"
        ) from error


def is_saved_dpt(config: Any) -> bool:
    """Whether a configuration of transformers is that of a DPT for maps of depth or normals, not of classes."""
    return config.model_type == "dpt" and "DPTForDepthEstimation" in (config.architectures or ["DPTForDepthEstimation"])


def dpt_class(channels: int) -> Any:
    """transformers' DPT for depth, whose head ends in `channels` maps instead of one: predicted_depth is then
    (B, channels, H, W). A function, because importing transformers takes seconds."""
    from transformers import DPTForDepthEstimation

    class DPT(DPTForDepthEstimation):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            if channels != 1:
                self.head.head[4] = nn.Conv2d(self.head.head[4].in_channels, channels, kernel_size=1)

    return DPT


def processor(side: int, normalise: bool) -> Any:
    """How these networks are fed: resized bilinearly to their square, then 0..1, or -1..1 with `normalise`."""
    from transformers import DPTImageProcessor

    half = [0.5, 0.5, 0.5]
    size = {"height": side, "width": side}
    return DPTImageProcessor(
        size=size, keep_aspect_ratio=False, resample=2, do_normalize=normalise, image_mean=half, image_std=half
    )


def _read(checkpoint: Checkpoint, file: Path) -> dict[str, torch.Tensor]:
    """The file's tensors by MiDaS name."""
    import pickle

    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{checkpoint.reference}: {file.name} holds more than tensors, and reading that would run code from the "
            "file. Where you trust it, save its 'state_dict' alone once, with torch.save, and use that file"
        ) from error
    tensors = held.get("state_dict", held) if isinstance(held, dict) else {}
    weights = {str(name).removeprefix("model."): value for name, value in tensors.items()}
    if not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise ValueError(f"{checkpoint.reference}: {file.name} holds no state dict of tensors")
    wanted = ("scratch.output_conv.4.weight", "pretrained.model.patch_embed.backbone.stem.conv.weight")
    for name in (*wanted, "pretrained.model.cls_token", "pretrained.model.pos_embed"):
        if name not in weights:
            raise ValueError(f"{checkpoint.reference}: {file.name} is not a DPT-hybrid of MiDaS or Omnidata: no {name}")
    return {name: value.float() for name, value in weights.items() if not _UNUSED.fullmatch(name)}


def _config(weights: dict[str, torch.Tensor]) -> Any:
    """The architecture that the weights' shapes imply."""
    from transformers import BitConfig, DPTConfig

    model = "pretrained.model."
    stages = f"{model}patch_embed.backbone.stages."
    depths = [_count(weights, rf"{re.escape(stages)}{s}\.blocks\.(\d+)\..*") for s in range(3)]
    widths = [int(weights[f"{stages}{s}.blocks.0.conv3.weight"].shape[0]) for s in range(3)]
    hidden = int(weights[f"{model}cls_token"].shape[-1])
    side = int((weights[f"{model}pos_embed"].shape[1] - 1) ** 0.5)
    backbone = BitConfig(
        embedding_size=int(weights[f"{model}patch_embed.backbone.stem.conv.weight"].shape[0]), hidden_sizes=widths,
        depths=depths, layer_type="bottleneck", global_padding="same", embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"],
    )  # fmt: skip
    return DPTConfig(
        is_hybrid=True, backbone_config=backbone, backbone_featmap_shape=[1, widths[-1], side, side],
        hidden_size=hidden, num_attention_heads=hidden // 64, image_size=side * _PATCH, patch_size=_PATCH,
        num_hidden_layers=_count(weights, r"pretrained\.model\.blocks\.(\d+)\..*"),
        intermediate_size=int(weights[f"{model}blocks.0.mlp.fc1.weight"].shape[0]),
        layer_norm_eps=1e-6,  # timm's; transformers' own default for DPT is 1e-12
        backbone_out_indices=_LAYERS_READ, neck_ignore_stages=[0, 1], reassemble_factors=[1, 1, 1, 0.5],
        neck_hidden_sizes=[int(weights[f"scratch.layer{i}_rn.weight"].shape[1]) for i in (1, 2, 3, 4)],
        fusion_hidden_size=int(weights["scratch.layer1_rn.weight"].shape[0]), use_auxiliary_head=False,
    )  # fmt: skip


def _count(weights: dict[str, torch.Tensor], pattern: str) -> int:
    found = [re.fullmatch(pattern, name) for name in weights]
    return 1 + max((int(m[1]) for m in found if m), default=-1)


def _renamed(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """transformers' names and tensors for one of MiDaS; three for a query-key-value projection."""
    if name in ("pretrained.model.cls_token", "pretrained.model.pos_embed"):
        return [("dpt.embeddings." + ("cls_token" if name.endswith("token") else "position_embeddings"), tensor)]
    stem, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"pretrained\.model\.blocks\.(\d+)\.attn\.qkv", stem):
        into = f"dpt.encoder.layer.{found[1]}.attention.attention"
        return [(f"{into}.{n}.{kind}", t) for n, t in zip(("query", "key", "value"), tensor.chunk(3), strict=True)]
    return [(f"{_decoder_name(stem) or _encoder_name(stem)}.{kind}", tensor)]


def _encoder_name(stem: str) -> str:
    for pattern, new in _RENAMED:
        if pattern.fullmatch(stem):
            return pattern.sub(new, stem)
    return stem  # unknown: listed by name when the weights are checked


def _decoder_name(stem: str) -> str | None:
    """Names of the neck, where numbers shift; None for other names."""
    if found := re.fullmatch(r"scratch\.layer(\d)_rn", stem):
        return f"neck.convs.{int(found[1]) - 1}"
    if found := re.fullmatch(r"pretrained\.act_postprocess(\d)\.(0\.project\.0|3|4)", stem):
        stage, part = int(found[1]) - 1, found[2]
        if part.startswith("0"):
            return f"neck.reassemble_stage.readout_projects.{stage}.0"
        return f"neck.reassemble_stage.layers.{stage}.{'projection' if part == '3' else 'resize'}"
    if found := re.fullmatch(r"scratch\.refinenet(\d)\.(out_conv|resConfUnit([12])\.conv([12]))", stem):
        part = "projection" if found[2] == "out_conv" else f"residual_layer{found[3]}.convolution{found[4]}"
        return f"neck.fusion_stage.layers.{4 - int(found[1])}.{part}"
    return None
