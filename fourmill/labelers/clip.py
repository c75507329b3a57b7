"""CLIP features by any open_clip checkpoint: the dense map that 4M trains on, and the image embedding.

4M's dense map is `ln_post(tokens)[1:] @ proj` (ml-4m, `fourm/utils/clip`): every patch token goes through the last norm
and the projection that the class token alone goes through when the embedding is made.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn import functional

from fourmill.checkpoints import Checkpoint
from fourmill.labelers.base import Teacher
from fourmill.labelers.loading import precision
from fourmill.pipeline.component import Batch
from fourmill.pipeline.shards import Spec


class ClipLabeler(Teacher):
    """`clip`: float32 (C, h, w), one projected feature per patch; `clip_global`: float32 (C,), not normalised."""

    @property
    def makes(self) -> tuple[str, ...]:
        return ("clip", "clip_global")

    def spec(self, modality: str) -> Spec:
        return Spec()

    def load(self, device: str) -> None:
        self.device = device
        self.model, config = load_open_clip(self.checkpoint)
        self.model = self.model.eval().to(device)
        if not hasattr(self.model.visual, "proj") or not hasattr(self.model.visual, "ln_post"):
            raise ValueError(
                f"{self.checkpoint.reference}: dense features need a vision transformer of open_clip's own"
            )
        size = self.model.visual.image_size
        self.size = size if isinstance(size, tuple) else (size, size)
        self.mean = torch.tensor(config["mean"], device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(config["std"], device=device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, list[Any]]:
        with precision(self.device, self.config.autocast):
            dense, pooled = self._features(self._prepared(batch.pixels))
        return {"clip": list(dense.float().cpu().numpy()), "clip_global": list(pooled.float().cpu().numpy())}

    def _prepared(self, pixels: Any) -> torch.Tensor:
        """uint8 (B, 3, S, S) -> normalised float at the network's size, as open_clip's own transform (bicubic)."""
        images = torch.from_numpy(pixels.copy()).to(self.device).float()
        if tuple(images.shape[-2:]) != tuple(self.size):
            images = functional.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 255)
        return (images / 255 - self.mean) / self.std

    def _features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        visual = self.model.visual
        found = visual.forward_intermediates(images, indices=1, output_fmt="NCHW", normalize_intermediates=True)
        dense = torch.einsum("bchw,cd->bdhw", found["image_intermediates"][-1], visual.proj)
        return dense, found["image_features"]


def load_open_clip(checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
    """The model, and its preprocessing's mean and std. A QuickGELU mismatch would give wrong features: an error."""
    import open_clip

    where = f"local-dir:{checkpoint.location}" if checkpoint.is_local else f"hf-hub:{checkpoint.location}"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*QuickGELU.*")
        model = open_clip.create_model(where)
    return model, {"mean": model.visual.image_mean, "std": model.visual.image_std}
