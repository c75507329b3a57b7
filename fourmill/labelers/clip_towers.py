"""The image towers of CLIP, of open_clip and of transformers, with one face: pictures in, patch map and embedding out.

4M's dense map is `ln_post(tokens)[1:] @ proj` (ml-4m, `fourm/utils/clip`): every patch token goes through the last norm
and the projection that the class token alone goes through when the embedding is made. Both libraries give the same map
for the same weights. Towers that pool in another way have no such map, and say so.

Shapes: B pictures, C embedding, h x w patches, S side of the crop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from fourmill.checkpoints import Checkpoint
from fourmill.labelers.clip_activation import Activation, Clue, origin_clues, settle, transformers_clues
from fourmill.labelers.loading import load_class, load_model, load_processor, process

_CONFIG = "open_clip_config.json"
_SAFETENSORS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")


class OpenClipTower(torch.nn.Module):
    """Any image tower of open_clip; the dense map only of its own vision transformer."""

    def __init__(self, visual: torch.nn.Module, dense: bool) -> None:
        super().__init__()
        self.visual, self.dense = visual, dense
        config: dict[str, Any] = visual.preprocess_cfg  # type: ignore[assignment]
        size = config["size"]
        self.size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        bilinear = config["interpolation"] == "bilinear"  # 'random' is bicubic outside training, as in open_clip
        self.interpolation = InterpolationMode.BILINEAR if bilinear else InterpolationMode.BICUBIC
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).view(1, -1, 1, 1), persistent=False)

    def prepare(self, pixels_BCSS: torch.Tensor) -> torch.Tensor:
        """uint8 -> normalised float at the tower's size. As open_clip's transform of a square picture, which rounds to
        8 bits after resizing; its centre crop has nothing to cut."""
        resized = resize(pixels_BCSS, list(self.size), self.interpolation, antialias=True)
        return (resized.float() / 255 - self.mean) / self.std

    def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        if not self.dense:
            pooled = self.visual(images_BCHW)
            return None, pooled[0] if isinstance(pooled, tuple) else pooled
        found = self.visual.forward_intermediates(  # type: ignore[operator]
            images_BCHW, indices=1, normalize_intermediates=True, output_fmt="NCHW"
        )
        dense = torch.einsum("bchw,cd->bdhw", found["image_intermediates"][-1], self.visual.proj)
        return dense, found["image_features"]


class TransformersTower(torch.nn.Module):
    """The image tower of a CLIP of transformers with a class token; embedding alone of SigLIP, which pools by
    attention."""

    def __init__(self, model: Any, processor: Any, dense: bool) -> None:
        super().__init__()
        self.vision, self.projection = model.vision_model, getattr(model, "visual_projection", None)
        self.processor, self.dense = processor, dense
        side = self.vision.config.image_size
        self.grid = (side // self.vision.config.patch_size,) * 2
        self.options = {"size": {"height": side, "width": side}, "do_center_crop": False}  # crops are square

    def prepare(self, pixels_BCSS: torch.Tensor) -> torch.Tensor:
        return process(self.processor, pixels_BCSS, **self.options)["pixel_values"]

    def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        found = self.vision(pixel_values=images_BCHW)
        if self.projection is None:
            return None, found.pooler_output
        pooled = self.projection(found.pooler_output)
        if not self.dense:
            return None, pooled
        tokens = self.projection(self.vision.post_layernorm(found.last_hidden_state[:, 1:]))
        return tokens.transpose(1, 2).unflatten(2, self.grid), pooled


def load_tower(checkpoint: Checkpoint, library: str, dense: bool, asked: Activation | None) -> torch.nn.Module:
    """The checkpoint's image tower on the CPU in float32. `library` 'auto': open_clip if its configuration is there."""
    folder = _folder(checkpoint)
    if library == "auto":
        library = "open_clip" if (folder / _CONFIG).is_file() else "transformers"
    if library == "open_clip":
        return _open_clip_tower(checkpoint, folder, dense, asked)
    return _transformers_tower(checkpoint, folder, dense, asked)


def _folder(checkpoint: Checkpoint) -> Path:
    """Where the checkpoint's configurations lie, at exactly its revision, which open_clip's `hf-hub:` cannot name."""
    if checkpoint.is_local:
        return Path(checkpoint.location)
    return _snapshot(checkpoint, (_CONFIG, "config.json", "README.md"))


def _snapshot(checkpoint: Checkpoint, names: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(checkpoint.location, revision=checkpoint.revision, allow_patterns=list(names)))


def _open_clip_tower(checkpoint: Checkpoint, folder: Path, dense: bool, asked: Activation | None) -> OpenClipTower:
    import open_clip

    if not (folder / _CONFIG).is_file():
        raise ValueError(f"{checkpoint.reference} is not an open_clip checkpoint: it has no {_CONFIG}")
    if not checkpoint.is_local:
        folder = _snapshot(checkpoint, (_CONFIG, *_SAFETENSORS))
        if not any((folder / name).is_file() for name in _SAFETENSORS):
            folder = _snapshot(checkpoint, (_CONFIG, "open_clip_pytorch_model.bin"))
    config = open_clip.get_model_config(f"local-dir:{folder}")
    clues = _declared(config)
    if clues:
        clues += origin_clues(checkpoint.reference, folder)
    act = settle(asked, clues, checkpoint.reference)
    options = {} if act is None else {"quick_gelu": act == "quick_gelu"}
    try:
        model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True, **options)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.reference}: open_clip cannot load it: {error}") from error
    if dense and (reason := _no_dense_map(model.visual, config["vision_cfg"])):
        raise ValueError(f"{checkpoint.reference} {reason}; its embedding can be had: outputs: [clip_global]")
    return OpenClipTower(model.visual, dense)


def _declared(config: dict[str, Any]) -> list[Clue]:
    """What open_clip_config.json says of the image tower; nothing where it has no GELU to choose (ResNet, timm)."""
    vision = config["vision_cfg"]
    if isinstance(vision.get("layers"), (list, tuple)):
        return []
    name = "quick_gelu" if "quick_gelu" in config else "the absence of quick_gelu"
    flag = Clue("quick_gelu" if config.get("quick_gelu") else "gelu", f"{name} in {_CONFIG}")
    if timm := vision.get("timm_model_name"):  # open_clip ignores the flag there: the tower is as its name says
        named = Clue("quick_gelu" if "quickgelu" in timm else "gelu", f"the image tower's name, {timm},")
        return [flag, named] if flag.says == "quick_gelu" else []
    return [flag]


def _no_dense_map(visual: torch.nn.Module, config: dict[str, Any]) -> str | None:
    """Why there is no `ln_post(tokens) @ proj` in this tower; None where there is."""
    if config.get("timm_model_name"):
        return f"has timm's {config['timm_model_name']} as its image tower, whose patches have no projection"
    if not hasattr(visual, "ln_post"):
        return f"has a {type(visual).__name__} as its image tower: no patch tokens, so no dense map"
    if visual.attn_pool is not None:
        return "pools its patches by attention before the last norm, so single patches have no projection"
    if visual.final_ln_after_pool:
        return "norms after pooling, so single patches have no norm"
    return None


def _transformers_tower(
    checkpoint: Checkpoint, folder: Path, dense: bool, asked: Activation | None
) -> TransformersTower:
    from transformers import AutoConfig, AutoModelForZeroShotImageClassification, CLIPVisionModelWithProjection

    config = AutoConfig.from_pretrained(checkpoint.location, revision=checkpoint.revision)
    if config.model_type == "clip_vision_model":
        model = load_class(CLIPVisionModelWithProjection, checkpoint)
    else:
        model = load_model([AutoModelForZeroShotImageClassification], checkpoint, "clip")
    if not hasattr(model, "vision_model") or config.model_type == "siglip2":
        raise ValueError(f"{checkpoint.reference}: the labeler 'clip' does not take a {type(model).__name__}")
    if dense and not hasattr(model, "visual_projection"):
        raise ValueError(
            f"{checkpoint.reference} is a {type(model).__name__}, which pools its patches by attention, so single "
            "patches have no projection; its embedding can be had: outputs: [clip_global]"
        )
    clues = transformers_clues(config.to_dict())
    clues += origin_clues(checkpoint.reference, folder) if clues else []
    if act := settle(asked, list(dict.fromkeys(clues)), checkpoint.reference):
        _activate(model.vision_model, act)
    return TransformersTower(model, load_processor(checkpoint), dense)


def _activate(vision: torch.nn.Module, act: Activation) -> None:
    """Put the activation into every layer: it may have been asked for against the checkpoint's configuration."""
    from transformers.activations import ACT2FN

    for layer in vision.modules():
        if hasattr(layer, "activation_fn"):
            layer.activation_fn = ACT2FN[act]
