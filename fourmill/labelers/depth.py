"""Depth by any monocular depth network of transformers: DPT (as 4M used), Depth Anything, ZoeDepth, DepthPro.

Whether the network's numbers are metres or relative inverse depth is not written in its checkpoint in any one way, so
the configuration says it and the records carry it on.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from fourmill.labelers.base import Teacher, TeacherConfig
from fourmill.labelers.loading import forward, load_model, load_processor
from fourmill.pipeline.component import Batch, ComponentConfig
from fourmill.pipeline.shards import Spec


class DepthConfig(TeacherConfig):
    """Configuration of the depth labeler."""

    output: Literal["metric", "inverse"]
    """'metric': the network gives metres (DepthPro, ZoeDepth, Depth Anything Metric, demo). 'inverse': relative inverse
    depth, up to scale and shift (DPT/MiDaS, Depth Anything V2)."""


class DepthLabeler(Teacher):
    """`depth`: float32 (S, S), resized bicubically from the network's own resolution to the crop's."""

    Config: ClassVar[type[ComponentConfig]] = DepthConfig
    config: DepthConfig

    @property
    def makes(self) -> tuple[str, ...]:
        return ("depth",)

    def spec(self, modality: str) -> Spec:
        return Spec(convention=self.config.output)

    def load(self, device: str) -> None:
        from transformers import AutoModelForDepthEstimation

        self.processor = load_processor(self.checkpoint)
        self.model = load_model([AutoModelForDepthEstimation], self.checkpoint, device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, list[Any]]:
        assert batch.pixels is not None
        outputs = forward(self.model, self.processor, batch.pixels, self.config.autocast)
        sizes = [batch.pixels.shape[-2:]] * len(batch)
        maps = self.processor.post_process_depth_estimation(outputs, target_sizes=sizes)
        return {"depth": [m["predicted_depth"].float().cpu().numpy() for m in maps]}
