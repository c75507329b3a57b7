"""Semantic segmentation by any semantic or universal segmentation network of transformers.

Mask2Former (as 4M used), OneFormer-like universal networks, Segformer and other per-pixel classifiers: the processor of
each does its own post-processing at the crop's resolution.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fourmill.labelers.base import Teacher
from fourmill.labelers.loading import forward, load_model, load_processor
from fourmill.pipeline.component import Batch
from fourmill.pipeline.shards import Spec

VOID = 255


class SemsegLabeler(Teacher):
    """`semseg`: uint8 (S, S), the network's own class ids; their names are in the record's `classes`."""

    @property
    def makes(self) -> tuple[str, ...]:
        return ("semseg",)

    def spec(self, modality: str) -> Spec:
        from transformers import AutoConfig

        checkpoint = self.checkpoint
        names = AutoConfig.from_pretrained(checkpoint.location, revision=checkpoint.revision).id2label
        return Spec(classes=tuple(names[i] for i in range(len(names))))

    def load(self, device: str) -> None:
        from transformers import AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation

        self.processor = load_processor(self.checkpoint)
        families = [AutoModelForUniversalSegmentation, AutoModelForSemanticSegmentation]
        self.model = load_model(families, self.checkpoint, device)
        if len(self.model.config.id2label) > VOID:
            raise ValueError(f"{len(self.model.config.id2label)} classes; a class map holds at most {VOID}")

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, list[Any]]:
        assert batch.pixels is not None
        outputs = forward(self.model, self.processor, batch.pixels, self.config.autocast)
        sizes = [tuple(batch.pixels.shape[-2:])] * len(batch)
        maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return {"semseg": [_classes(m) for m in maps]}


def _classes(ids: torch.Tensor) -> np.ndarray:
    """Ids as uint8; whatever the network left unassigned (-1) is void."""
    array = ids.cpu().numpy()
    return np.where((array < 0) | (array > VOID), VOID, array).astype(np.uint8)
