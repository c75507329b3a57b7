"""Captions by any image-to-text network of transformers: BLIP, BLIP-2, GIT, Florence-2 and others."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from fourmill.labelers.base import Teacher, TeacherConfig
from fourmill.labelers.loading import load_model, precision, tensors
from fourmill.pipeline.component import Batch, ComponentConfig, Failure
from fourmill.pipeline.shards import Spec


class CaptionConfig(TeacherConfig):
    """Configuration of the captioner."""

    prompt: str | None = None
    """Text that the network continues or answers, where it wants one (Florence-2: '<CAPTION>')."""
    max_new_tokens: int = Field(40, ge=1)
    """Longest caption, in the network's own tokens."""
    num_beams: int = Field(1, ge=1)
    """Beam search width; 1 is greedy."""


class CaptionLabeler(Teacher):
    """`caption`: the network's description of the first crop, the centre square."""

    Config: ClassVar[type[ComponentConfig]] = CaptionConfig
    config: CaptionConfig

    @property
    def makes(self) -> tuple[str, ...]:
        return ("caption",)

    def spec(self, modality: str) -> Spec:
        return Spec()

    def load(self, device: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = device
        self.processor = AutoProcessor.from_pretrained(self.checkpoint.location, revision=self.checkpoint.revision)
        self.model = load_model([AutoModelForImageTextToText], self.checkpoint, device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, list[Any]]:
        assert batch.pixels is not None
        text = {"text": [self.config.prompt] * len(batch)} if self.config.prompt else {}
        inputs = self.processor(images=tensors(batch.pixels), return_tensors="pt", **text).to(self.device)
        with precision(self.device, self.config.autocast):
            ids = self.model.generate(
                **inputs, max_new_tokens=self.config.max_new_tokens, num_beams=self.config.num_beams, do_sample=False
            )
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        captions = [text.strip() for text in texts]
        return {"caption": [c or Failure("empty caption: the network generated no words") for c in captions]}
