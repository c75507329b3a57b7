"""Captions by any image-to-text network of transformers: BLIP, BLIP-2, GIT, Florence-2, PaliGemma, chat models.

A style is one way to ask and to generate; a run can make several, and keep them beside the alt text with the source of
each, so that training mixes them as it likes. Everything random belongs to the sample: a caption is the same whatever
batch its picture is in.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from fourmill.labelers.base import Teacher, TeacherConfig
from fourmill.labelers.caption_prompts import Prompter
from fourmill.labelers.caption_sampling import SeededSampler, uniforms
from fourmill.labelers.loading import load_model
from fourmill.pipeline.component import Batch, ComponentConfig, Failure
from fourmill.pipeline.shards import Spec

log = logging.getLogger("fourmill.labelers")
_TOWERS = ("vision_model", "vision_tower", "visual", "image_encoder")  # what families call their image encoder


class Style(BaseModel):
    """How to ask for a caption and how to generate it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = None
    """Text that the network continues or answers; not part of the caption. By default what the family wants:
    '<CAPTION>' for Florence-2, 'caption en' for PaliGemma, a sentence for chat models, nothing for the others."""
    max_new_tokens: int = Field(40, ge=1)
    """Longest caption, in the network's own tokens."""
    num_beams: int = Field(1, ge=1)
    """Beam search width; 1 is greedy, or sampling."""
    do_sample: bool = False
    """Draw each token, from numbers that belong to the sample's key, instead of taking the best one."""
    temperature: float = Field(1.0, gt=0)
    """Divides the scores before drawing: below 1 likelier tokens, above 1 rarer ones."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the fewest likeliest tokens that together have this probability."""
    count: int = Field(1, ge=1)
    """Captions per picture: as many draws, or the best beams."""

    @model_validator(mode="after")
    def _consistent(self) -> Style:
        if self.do_sample and self.num_beams > 1:
            raise ValueError("do_sample draws tokens and num_beams > 1 searches for the best: choose one")
        if not self.do_sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise ValueError("temperature and top_p have no effect without do_sample: true")
        if not self.do_sample and self.count > self.num_beams:
            raise ValueError(f"count {self.count} needs do_sample: true, or num_beams of at least {self.count}")
        return self


class CaptionConfig(TeacherConfig, Style):
    """Configuration of the captioner. The fields of a style that stand here are those of every style in `styles` that
    does not say otherwise."""

    seed: int = 0
    """Draws are a function of this, the sample's key, the style's name and the caption's number."""
    outputs: tuple[Literal["caption", "captions"], ...] = Field(("caption",), min_length=1)
    """'caption': the first one of the first style. 'captions': all of them, after the alt text."""
    styles: dict[str, Style] = Field({"short": {}}, min_length=1, validate_default=True)
    """Ways to caption, by name, in order."""

    @field_validator("styles", mode="before")
    @classmethod
    def _inherit(cls, styles: Any, info: ValidationInfo) -> Any:
        """Every style in full, so that a configuration reads the same after it was written out."""
        if not isinstance(styles, dict) or not all(isinstance(s, (dict, Style)) for s in styles.values()):
            return styles  # pydantic says what is wrong
        shared = {name: info.data[name] for name in Style.model_fields if name in info.data}
        given = {name: s.model_dump() if isinstance(s, Style) else s for name, s in styles.items()}
        return {name: {**shared, **style} for name, style in given.items()}


class CaptionLabeler(Teacher):
    """`caption`: one description of the first crop, the centre square. `captions`: [{text, source, style}], the alt
    text first where there is one, no text twice."""

    Config: ClassVar[type[ComponentConfig]] = CaptionConfig
    config: CaptionConfig
    version = 2  # a prompt is no longer part of the caption

    @property
    def makes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.config.outputs))

    @property
    def also_reads(self) -> tuple[str, ...]:
        return ("alt_text",) if "captions" in self.makes else ()

    def spec(self, modality: str) -> Spec:
        return Spec()

    def load(self, device: str) -> None:
        from transformers import AutoModelForImageTextToText

        super().load(device)
        self.model = load_model([AutoModelForImageTextToText], self.checkpoint, "caption")
        self.prompter = Prompter(self.checkpoint, self.model.config)
        self.prompts = {name: self.prompter.prompt(style.prompt) for name, style in self.config.styles.items()}
        self._adopt_parts()
        # By digest: the same weights write the same label wherever they lay. The manifest tells their name.
        self.source = f"{self.model.config.model_type}@{self.checkpoint.digest.removeprefix('hub:')[:12]}"

    def _adopt_parts(self) -> None:
        """Compile the image encoder alone: a decoder's shapes change with every token. Half precision for the weights
        too, where it is asked for: decoding one token at a time is bound by reading them."""
        found = [name for name, _ in self.model.named_modules() if name.rsplit(".", 1)[-1] in _TOWERS]
        if found:
            self.adopt(self.model.get_submodule(min(found, key=len)))
        elif self.config.compile:
            log.warning("%s: compile has no effect: no image encoder was found", self.checkpoint.reference)
        self.model = self.model.eval().requires_grad_(False).to(self.device, self._dtype())

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, list[Any]]:
        pixels = self.on_device(batch)
        found: list[list[tuple[str, str]]] = [[] for _ in batch.keys]  # (text, style), in order
        for name, style in self.config.styles.items():
            for texts in self._captions(name, style, pixels, batch.keys):
                for row, text in zip(found, texts, strict=True):
                    row.append((text, name))
        alt_texts = batch.views.get("alt_text") or [None] * len(batch)
        made: dict[str, list[Any]] = {
            "caption": [row[0][0] or Failure("empty caption: the network generated no words") for row in found],
            "captions": [self._all(row, alt) for row, alt in zip(found, alt_texts, strict=True)],
        }
        return {name: made[name] for name in self.makes}

    def _captions(self, name: str, style: Style, pixels: torch.Tensor, keys: Any) -> list[list[str]]:
        """`style.count` lists of B texts."""
        prompt, side = self.prompts[name], int(pixels.shape[-1])
        inputs = self.prompter.inputs(pixels, prompt).to(self._dtype())  # floating-point ones alone
        if not style.do_sample:
            ids = self._generate(inputs, style, num_beams=style.num_beams, num_return_sequences=style.count)
            texts = self.prompter.texts(inputs, ids, prompt, side)
            return [texts[index :: style.count] for index in range(style.count)]
        captions = []
        for index in range(style.count):
            numbers = uniforms(keys, self.config.seed, name, index, style.max_new_tokens).to(self.device)
            sampler = SeededSampler(numbers, style.temperature, style.top_p)
            captions.append(self.prompter.texts(inputs, self._generate(inputs, style, [sampler]), prompt, side))
        return captions

    def _generate(self, inputs: Any, style: Style, processors: list[Any] | None = None, **options: Any) -> torch.Tensor:
        from transformers import LogitsProcessorList

        # Copies: BLIP writes its opening mark into the ids it is given.
        given = {name: v.clone() if name == "input_ids" else v for name, v in inputs.items()}
        with self.autocast():
            return self.model.generate(
                **given,
                max_new_tokens=style.max_new_tokens,
                do_sample=False,
                use_cache=True,
                logits_processor=LogitsProcessorList(processors or []),
                **options,
            )

    def _all(self, captions: list[tuple[str, str]], alt_text: str | None) -> list[dict[str, str]] | Failure:
        """Every text of a sample once, with where it is from."""
        entries = [{"text": text, "source": self.source, "style": style} for text, style in captions]
        if alt_text:
            entries.insert(0, {"text": alt_text.strip(), "source": "alt_text", "style": "alt_text"})
        once: dict[str, dict[str, str]] = {}
        for entry in entries:
            if entry["text"]:
                once.setdefault(entry["text"], entry)
        return list(once.values()) or Failure("empty caption: the network generated no words")
