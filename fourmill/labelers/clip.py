"""CLIP features by any CLIP of open_clip or transformers: 4M's dense map, and the image embedding.

What the two are, and which networks have them, stands in `fourmill.labelers.clip_towers`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from fourmill.labelers.base import Teacher, TeacherConfig
from fourmill.labelers.clip_towers import load_tower
from fourmill.pipeline.component import Batch, ComponentConfig
from fourmill.pipeline.shards import Spec


class ClipConfig(TeacherConfig):
    """Configuration of the CLIP labeler."""

    outputs: tuple[Literal["clip", "clip_global"], ...] = Field(("clip", "clip_global"), min_length=1)
    """Which modalities to make: the dense map, the embedding, or both from one pass."""
    activation: Literal["gelu", "quick_gelu"] | None = None
    """What the weights were trained with; by default as the checkpoint says, unless its origin says otherwise."""
    library: Literal["auto", "open_clip", "transformers"] = "auto"
    """Which library loads a checkpoint that has the files of both; 'auto' prefers open_clip."""


class ClipLabeler(Teacher):
    """`clip`: float32 (C, h, w), one projected feature per patch; `clip_global`: float32 (C,). Not normalised."""

    Config: ClassVar[type[ComponentConfig]] = ClipConfig
    config: ClipConfig
    version = 2  # pictures are rounded to 8 bits after resizing, as the networks' own transforms do

    @property
    def makes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.config.outputs))

    def spec(self, modality: str) -> Spec:
        return Spec()

    def load(self, device: str) -> None:
        super().load(device)
        dense = "clip" in self.makes
        self.tower = self.adopt(load_tower(self.checkpoint, self.config.library, dense, self.config.activation))

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, list[Any]]:
        images = self.tower.prepare(self.on_device(batch))
        with self.autocast():
            dense, pooled = self.tower(images)
        made = {"clip": dense, "clip_global": pooled}
        return {name: list(made[name].float().cpu().numpy()) for name in self.makes}
