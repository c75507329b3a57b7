"""Depth, normals and classes from one pass of TIPSv2-DPT's shared backbone (`google/tipsv2-*-dpt`).

Depth is in metres and normals turned into the labels' frame (see `depth` and `normal`); the heads of depth and normals
were trained on NYUv2, which is indoors, that of classes on ADE20K.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from fourmill.labelers import depth, normal, segmentation
from fourmill.labelers.base import Teacher, TeacherConfig
from fourmill.labelers.loading import load_class, load_processor, process
from fourmill.pipeline.component import Batch, ComponentConfig
from fourmill.pipeline.shards import Spec

Output = Literal["depth", "normal", "semseg"]


class DensePredictionConfig(TeacherConfig):
    """Configuration of the labeler of three modalities."""

    outputs: tuple[Output, ...] = Field(("depth", "normal", "semseg"), min_length=1)
    """Which of them to make; all come from the same forward pass."""
    frame: Literal["auto", "opencv", "opengl", "pytorch3d", "outward"] = "auto"
    """Axes of the network's normals, as in the normal labeler; 'auto' is TIPSv2's own."""


class DensePredictionLabeler(Teacher):
    """`depth`, `normal` and `semseg`, resized as the processor does."""

    Config: ClassVar[type[ComponentConfig]] = DensePredictionConfig
    config: DensePredictionConfig

    @property
    def makes(self) -> tuple[str, ...]:
        return tuple(name for name in ("depth", "normal", "semseg") if name in self.config.outputs)

    def spec(self, modality: str) -> Spec:
        if modality == "semseg":
            return Spec(classes=segmentation.class_names(self.checkpoint))
        return Spec(convention="metric" if modality == "depth" else "opencv")

    def load(self, device: str) -> None:
        from transformers import AutoConfig, Tipsv2DptForDensePrediction

        super().load(device)
        where = self.checkpoint
        config = AutoConfig.from_pretrained(where.location, revision=where.revision)
        architectures = config.architectures or ["Tipsv2DptForDensePrediction"]
        if config.model_type != "tipsv2_dpt" or "Tipsv2DptForDensePrediction" not in architectures:
            raise ValueError(
                f"{where.reference} holds {', '.join(architectures)}; dense_prediction takes TIPSv2-DPT with its three "
                "heads, for example google/tipsv2-b14-dpt"
            )
        self.frame = normal.frame_of(self.config.frame, config, where.reference)
        self.processor = load_processor(where)
        self.model = self.adopt(load_class(Tipsv2DptForDensePrediction, where))

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, list[Any]]:
        pixels = self.on_device(batch)
        inputs = process(self.processor, pixels)
        with self.autocast():
            outputs = self.model(**inputs)
        return {name: list(self._made(name, outputs, pixels.shape[-1]).cpu().numpy()) for name in self.makes}

    def _made(self, name: str, outputs: Any, size: int) -> torch.Tensor:
        if name == "depth":
            return depth.post_process(outputs, self.processor, "tipsv2_dpt", size).clamp(min=0)
        if name == "normal":
            return normal.unit_normals(outputs.normals, size, self.frame)
        return segmentation.class_map(outputs.segmentation_logits, size)
