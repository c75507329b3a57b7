"""All objects and parts of a picture, without names: Segment Anything asked at every point of a grid.

What the original's automatic mask generator does at its top layer (no enlarged crops of the picture), with its settings
under its names. The work is arranged for a batch: one encoder pass for all pictures, decoder calls of
`points_per_batch` prompts over all pictures together, and masks are filtered before they are upscaled.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from fourmill.labelers.base import Teacher, TeacherConfig
from fourmill.labelers.sam_loading import load_network
from fourmill.labelers.sam_masks import KeptMask, masks_of, stability, without_duplicates
from fourmill.labelers.sam_networks import Candidates, Embedded
from fourmill.pipeline import masks
from fourmill.pipeline.component import Batch, ComponentConfig, Failure
from fourmill.pipeline.shards import Spec


class SamConfig(TeacherConfig):
    """Configuration of the mask generator; names and defaults as in SamAutomaticMaskGenerator."""

    points_per_side: int = Field(default=32, ge=1, le=256)
    """Points of the grid along each side. 32 makes 1,024 prompts: more work than ViT-H's encoder (16: a quarter)."""
    points_per_batch: int = Field(default=64, ge=1)
    """Prompts of one decoder call, over all pictures of the batch. Only speed and memory depend on it."""
    pred_iou_thresh: float = 0.88
    """Masks whose predicted IoU is above it are kept."""
    stability_score_thresh: float = Field(default=0.95, ge=0, le=1)
    """Masks at least so stable are kept: area at the threshold + offset over area at the threshold - offset."""
    stability_score_offset: float = Field(default=1.0, gt=0)
    """By how much the threshold of the logits is moved to measure stability."""
    box_nms_thresh: float = Field(default=0.7, gt=0, le=1)
    """Of two masks whose boxes overlap by more (IoU), the better is kept."""
    mask_nms_thresh: float | None = Field(default=None, gt=0, le=1)
    """Of two masks that overlap by more (IoU), the better is kept; by default only boxes are compared."""
    min_area: int = Field(default=1, ge=1)
    """Smallest mask, in pixels of the crop."""
    max_instances: int | None = Field(default=None, ge=1)
    """The best so many are stored (4M reads 20 of them); by default all."""


class SamLabeler(Teacher):
    """`sam_instance`: masks of a crop, best predicted IoU first."""

    Config: ClassVar[type[ComponentConfig]] = SamConfig
    config: SamConfig

    @property
    def makes(self) -> tuple[str, ...]:
        return ("sam_instance",)

    def spec(self, modality: str) -> Spec:
        return Spec()

    def lineage(self) -> dict[str, Any]:
        lineage = super().lineage()
        lineage["config"].pop("points_per_batch")
        return lineage

    @torch.inference_mode()
    def load(self, device: str) -> None:
        super().load(device)
        self.network = load_network(self.checkpoint)
        self.network.model = self.adopt(self.network.model)
        if self.config.compile:
            self.network.encoder.compile(dynamic=False)  # the parts are called, not the whole
        self.points_P2 = point_grid(self.config.points_per_side).to(self.device)
        self.tokens_PTC = self.network.tokens(self.points_P2)

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, list[Any]]:
        pixels = self.on_device(batch)
        with self.autocast():
            embedded = self.network.embed(pixels)
            found = self._candidates(embedded)
        found = without_duplicates(found, self.config.box_nms_thresh)
        sizes, config = self.network.sizes(pixels.shape[-1]), self.config
        settings = (config.stability_score_offset, config.min_area, config.mask_nms_thresh)
        sound = embedded.image.isfinite().all(3).all(2).all(1).tolist()
        values = [self._instances(kept) for kept in masks_of(found, len(batch), sizes, *settings)]
        failure = Failure("not finite: the encoder gave NaN")
        return {"sam_instance": [v if ok else failure for v, ok in zip(values, sound, strict=True)]}

    def _candidates(self, embedded: Embedded) -> Candidates:
        """The masks of all points that pass both thresholds, before duplicates are removed."""
        points = max(1, self.config.points_per_batch // len(embedded.image))
        parts = []
        for start in range(0, len(self.tokens_PTC), points):
            tokens = self.tokens_PTC[start : start + points]
            found = self.network.decode(embedded, tokens, self.config.pred_iou_thresh)
            stable = stability(found.logits, self.config.stability_score_offset)
            found = found[stable >= self.config.stability_score_thresh]
            parts.append(Candidates(found.picture, found.point + start, found.score, found.logits))
        return Candidates.cat(parts)

    def _instances(self, kept: list[KeptMask]) -> list[dict[str, Any]]:
        points = self.points_P2.tolist()
        return [
            {
                "score": round(min(max(k.score, 0.0), 1.0), 6),  # the head's output is not bounded
                "stability": round(k.stability, 6),
                "point": [round(v, 6) for v in points[k.point]],
                "box": masks.box_of(k.mask),
                "area": int(k.mask.sum()),
                "mask": masks.encode(k.mask),
            }
            for k in kept[: self.config.max_instances]
        ]


def point_grid(per_side: int) -> torch.Tensor:
    """Points (per_side ** 2, 2) as x, y in 0..1, row by row: the centres of as many equal cells."""
    steps = (torch.arange(per_side) + 0.5) / per_side
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)
