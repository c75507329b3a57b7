"""Segmentation by transformers' networks: class maps, panoptic segments and instances, all from one forward pass.

Universal networks (Mask2Former as in 4M, MaskFormer, EoMT on DINOv2 or DINOv3, OneFormer) give Q masks and the class of
each; per-pixel classifiers (Segformer, UPerNet, BEiT, DPT) give class maps only. OneFormer is told its task in words,
so it runs once for each output.

Class maps equal the processors' own post-processing. Panoptic segments and instances follow the inference of the
Mask2Former paper, for all families alike, because the processors differ from it and from one another: Mask2Former's
gives two segments one number after it has fused stuff, and weighs masks by their scores before it measures them.

Invariants: panoptic segments do not overlap; ids are those of `Spec.classes`; a box is the extent of its mask.

Shape legend: B batch, Q queries, C classes, S side of the crop, h w side of the network's masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.nn import functional

from fourmill.checkpoints import Checkpoint
from fourmill.labelers import coco
from fourmill.labelers.base import Teacher, TeacherConfig
from fourmill.labelers.loading import load_model, load_processor, process
from fourmill.labelers.segments import instances_of, panoptic_of
from fourmill.modalities import unknown
from fourmill.pipeline.component import Batch, ComponentConfig
from fourmill.pipeline.shards import Spec

Output = Literal["semseg", "panoptic", "instance"]
VOID = 255
_TASKS = {"semseg": "semantic", "panoptic": "panoptic", "instance": "instance"}  # OneFormer's words
_MAX_FLOATS = 1 << 26  # 256 MB: maps at the crop's size are made for so many pictures at a time


class SegmentationConfig(TeacherConfig):
    """Configuration of the segmentation labeler."""

    outputs: tuple[Output, ...] = Field(("semseg",), min_length=1)
    """Which modalities to make."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Panoptic segments and instances need at least this score. The Mask2Former paper has 0.8 for panoptic."""
    mask_threshold: float = Field(default=0.5, ge=0, le=1)
    """A pixel belongs to a mask above this probability."""
    overlap_threshold: float = Field(default=0.8, ge=0, le=1)
    """A panoptic segment of which others cover more than one minus this share is dropped."""
    max_instances: int = Field(default=100, ge=1)
    """The best so many instances of a crop are looked at."""
    stuff: tuple[str, ...] | None = None
    """Classes whose segments are fused and never are instances. Known by itself for COCO's 133, ADE20K's 150,
    Cityscapes' 19 and the demo's classes."""
    class_map: Literal["none", "coco_4m"] = "none"
    """'coco_4m' numbers a COCO checkpoint's classes as 4M's semseg tokenizer expects them."""


class SegmentationLabeler(Teacher):
    """`semseg`: uint8 (S, S); `panoptic` and `instance`: lists of segments with masks as run lengths."""

    Config: ClassVar[type[ComponentConfig]] = SegmentationConfig
    config: SegmentationConfig
    version: ClassVar[int] = 2

    @property
    def makes(self) -> tuple[str, ...]:
        return tuple(name for name in _TASKS if name in self.config.outputs)

    def spec(self, modality: str) -> Spec:
        return Spec(classes=coco.CLASSES if self.config.class_map == "coco_4m" else class_names(self.checkpoint))

    def load(self, device: str) -> None:
        from transformers import AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation

        super().load(device)
        families = [AutoModelForUniversalSegmentation, AutoModelForSemanticSegmentation]
        model = load_model(families, self.checkpoint, "segmentation")
        self.universal = type(model) in AutoModelForUniversalSegmentation._model_mapping.values()
        if not self.universal and self.makes != ("semseg",):
            raise ValueError(
                f"{self.checkpoint.reference} is a {type(model).__name__}, which gives class maps only: outputs can be "
                "[semseg]; for panoptic and instance a Mask2Former, MaskFormer, EoMT or OneFormer is needed"
            )
        self.names = class_names(self.checkpoint)
        if len(self.names) > VOID:
            raise ValueError(f"{len(self.names)} classes; a class map holds at most {VOID}")
        self.ids = coco.four_m_ids(self.names) if self.config.class_map == "coco_4m" else None
        self.stuff = self._stuff()
        self.family = model.config.model_type
        load_its = _load_text_processor if self.family == "oneformer" else load_processor
        self.processor = load_its(self.checkpoint)
        self.model = self.adopt(model)

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, list[Any]]:
        pixels = self.on_device(batch)
        if self.family != "oneformer":
            outputs = self._forward(pixels)
            return {name: self._made(name, outputs, pixels.shape[-1]) for name in self.makes}
        return {name: self._made(name, self._forward(pixels, name), pixels.shape[-1]) for name in self.makes}

    def _forward(self, pixels: torch.Tensor, output: str | None = None) -> Any:
        options = {"task_inputs": [_TASKS[output]] * len(pixels)} if output else {}
        inputs = process(self.processor, pixels, **options)
        with self.autocast():
            return self.model(**inputs)

    def _made(self, name: str, outputs: Any, size: int) -> list[Any]:
        if name == "semseg":
            return list(self._classes(outputs, size).cpu().numpy())
        chunks = self._masks(outputs, size)
        config = self.config
        if name == "panoptic":
            limits = (config.threshold, config.mask_threshold, config.overlap_threshold)
            return panoptic_of(chunks, self.names, self.stuff, *limits)
        return instances_of(chunks, self.names, self.stuff, config.threshold, config.max_instances)

    def _classes(self, outputs: Any, size: int) -> torch.Tensor:
        """uint8 (B, S, S), void where the network leaves a pixel out."""
        if not self.universal:
            found = class_map(outputs.logits, size)
        else:
            found = self._classes_of_queries(outputs, size)
        if self.ids is None:
            return found
        table = torch.full((VOID + 1,), VOID, dtype=torch.uint8)
        table[: len(self.ids)] = torch.tensor(self.ids, dtype=torch.uint8)
        return table.to(found.device)[found.long()]

    def _classes_of_queries(self, outputs: Any, size: int) -> torch.Tensor:
        """argmax over classes of the masks' probabilities weighted by their classes', as the processors do it."""
        side = self._intermediate()
        masks = outputs.masks_queries_logits.float()
        classes_BQC = outputs.class_queries_logits.float().softmax(dim=-1)[..., :-1]
        area = max(size * size, masks[0, 0].numel() if side is None else side[0] * side[1])
        found = []
        for part in _chunks(len(masks), area * (masks.shape[1] + classes_BQC.shape[2])):
            grown = masks[part] if side is None else _resized(masks[part], side)
            scores = torch.einsum("bqc,bqhw->bchw", classes_BQC[part], grown.sigmoid())
            # OneFormer's processor smooths where it makes smaller; the others do not.
            found.append(class_map(scores, size, antialias=self.family == "oneformer"))
        return torch.cat(found)

    def _masks(self, outputs: Any, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(class logits (b, Q, C + 1), mask logits (b, Q, S, S)) of a few pictures at a time."""
        masks, side = outputs.masks_queries_logits.float(), self._intermediate()
        for part in _chunks(len(masks), 3 * size * size * masks.shape[1]):
            grown = masks[part] if side is None else _resized(masks[part], side)
            yield outputs.class_queries_logits[part].float(), _resized(grown, (size, size))

    def _intermediate(self) -> tuple[int, int] | None:
        """The size at which the family's processor turns mask logits into probabilities; None: their own."""
        if self.family == "mask2former":
            return (384, 384)
        if self.family.startswith("eomt"):
            size = self.processor.size
            return (size["shortest_edge"], size["longest_edge"] or size["shortest_edge"])
        return None

    def _stuff(self) -> frozenset[int]:
        """Ids of the classes that are not things; needed for segments only."""
        if self.config.stuff is not None:
            for name in self.config.stuff:
                if name not in self.names:
                    raise ValueError(unknown("class", name, self.names))
            return frozenset(i for i, name in enumerate(self.names) if name in self.config.stuff)
        found = coco.stuff_ids(self.names)
        if found is None and self.makes != ("semseg",):
            raise ValueError(
                f"{self.checkpoint.reference}: which of its {len(self.names)} classes are stuff is not known; list "
                f"their names in `stuff` ([] for none); its classes: {', '.join(self.names[:20])}"
            )
        return found or frozenset()


def class_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """A checkpoint's class names by id."""
    from transformers import AutoConfig

    names = AutoConfig.from_pretrained(checkpoint.location, revision=checkpoint.revision).id2label
    return tuple(str(names[i]) for i in range(len(names)))


def class_map(scores_BChw: torch.Tensor, size: int, antialias: bool = False) -> torch.Tensor:
    """uint8 (B, size, size): the best class of each pixel, after resizing the scores bilinearly."""
    best = []
    for part in _chunks(len(scores_BChw), scores_BChw.shape[1] * size * size):
        scores = _resized(scores_BChw[part].float(), (size, size), antialias)
        best.append(scores.argmax(dim=1).to(torch.uint8))
    return torch.cat(best)


def _resized(maps: torch.Tensor, side: tuple[int, int], antialias: bool = False) -> torch.Tensor:
    return functional.interpolate(maps, side, mode="bilinear", align_corners=False, antialias=antialias)


def _chunks(count: int, floats_each: int) -> list[slice]:
    """Slices of as many items as fit into `_MAX_FLOATS`."""
    step = max(1, _MAX_FLOATS // max(floats_each, 1))
    return [slice(start, start + step) for start in range(0, count, step)]


def _load_text_processor(checkpoint: Checkpoint) -> Any:
    """OneFormer's processor, which also turns the task into tokens."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(checkpoint.location, revision=checkpoint.revision)
