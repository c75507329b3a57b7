"""Facts about a picture as numbers, no network: 4M-21's metadata, as far as its definitions are public.

    original_width, original_height               source        pixels of the upright picture, before cropping
    caption_n_chars, _n_words, _n_sentences       alt_text or caption, the first listed that the sample has
    colorfulness                                  the picture   Hasler and Süsstrunk (2003), 0 to about 150
    brightness, contrast                          the picture   mean and standard deviation of grey levels, 0..255
    saturation                                    the picture   mean of S in HSV, 0..255
    entropy                                       the picture   bits, of the values of R, G and B in one histogram: 1.58
                                                                for an even picture, 9.58 at most
    n_coco_instances, coco_instance_diversity     det or instance, the first listed: objects, and classes among them
    n_sam_instances, n_humans                     sam_instance, human_poses: how many
    objectness, semantic_diversity                panoptic      share of pixels in things; classes
    walkability                                   panoptic      share of pixels in the classes `walkable` names
    geometric_complexity                          normal        1 - length of the mean normal

4M names its tools (Pillow, OpenCV, Omnidata), not its code. Two of the readings above are ours: entropy, as Pillow's,
since 4M's bins go to 10 and the entropy of grey levels only to 8; and the spherical variance, for its "angular variance
of surface normals". `occlusion_score` depends on a threshold that is not published, `watermark_score` and
`aesthetic_score` on networks: they are taken over from the corpus (`from_corpus`) or left out.

Invariants: a fact whose input a sample lacks is left out, never guessed; everything but the original size and the text
is of the sample's first crop, the centre square; values are raw, their tokenizer bins them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from fourmill.labelers.base import Labeler, LabelerConfig
from fourmill.modalities import unknown
from fourmill.pipeline.component import Batch, ComponentConfig, Failure
from fourmill.pipeline.shards import Spec
from fourmill.tokenizers.sequences.metadata import NAMES

Facts = dict[str, float]
Input = Literal["source", "alt_text", "caption", "det", "instance", "sam_instance", "human_poses", "panoptic", "normal"]
_DIGITS = 4  # after the point; 4M's narrowest bin is 0.005 wide
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


class MetadataConfig(LabelerConfig):
    """Configuration of the facts."""

    batch_size: int | None = Field(default=16, ge=1)
    reads: tuple[Input, ...] = ("source", "alt_text")
    """What to look at besides the picture. Of texts, and of det and instance, the first listed that a sample has
    counts. What is not listed is not looked at, so that facts do not depend on what happens to be made already."""
    min_score: float = Field(default=0.6, ge=0, le=1)
    """Objects of det and instance below it do not count (4M: 0.6)."""
    walkable: tuple[str, ...] = ()
    """Class names of panoptic on which one can walk; 4M names only 'road'. Without any there is no walkability."""
    from_corpus: dict[str, str] = Field({})
    """Facts to take over: name -> key of the sample's own metadata. COYO's: {watermark_score: watermark_score,
    aesthetic_score: aesthetic_score_laion_v2}."""

    @model_validator(mode="after")
    def _consistent(self) -> MetadataConfig:
        for name in self.from_corpus:
            if name not in NAMES:
                raise ValueError(f"from_corpus: {unknown('fact', name, NAMES)}")
        for option, needed in (("from_corpus", "source"), ("walkable", "panoptic")):
            if getattr(self, option) and needed not in self.reads:
                raise ValueError(f"{option} needs {needed} among reads: {', '.join(self.reads)}")
        return self


class Metadata(Labeler):
    """`metadata`: {name: number}, names as 4M's."""

    Config: ClassVar[type[ComponentConfig]] = MetadataConfig
    config: MetadataConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("rgb",)

    @property
    def also_reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.config.reads))

    @property
    def makes(self) -> tuple[str, ...]:
        return ("metadata",)

    def spec(self, modality: str) -> Spec:
        return Spec()

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        assert batch.pixels is not None
        views = [{m: batch.views[m][row] for m in self.also_reads} for row in range(len(batch))]
        return {"metadata": [self._one(pixels, view) for pixels, view in zip(batch.pixels, views, strict=True)]}

    def _one(self, pixels_3HW: np.ndarray, view: Mapping[str, Any]) -> Facts | Failure:
        present = {m: value for m, value in view.items() if value is not None}
        source = present.get("source", {})
        facts = {f"original_{side}": source[side] for side in ("width", "height") if source.get(side)}
        facts |= text_facts(_first(present, ("alt_text", "caption")) or "")
        facts |= picture_facts(pixels_3HW)
        objects = _first(present, ("det", "instance"))
        if objects is not None:
            facts |= object_facts([o for o in objects if o["score"] >= self.config.min_score])
        for name, counted in (("n_sam_instances", "sam_instance"), ("n_humans", "human_poses")):
            if counted in present:
                facts[name] = len(present[counted])
        if "panoptic" in present:
            facts |= segment_facts(present["panoptic"], pixels_3HW[0].size, self.config.walkable)
        if "normal" in present:
            facts |= normal_facts(present["normal"])
        return self._with_corpus(facts, source.get("metadata") or {})

    def _with_corpus(self, facts: Facts, given: Mapping[str, Any]) -> Facts | Failure:
        for name, key in self.config.from_corpus.items():
            value = given.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                return Failure(f"bad metadata: {key} of the sample is {value!r}, not a number")
            facts[name] = value
        return facts


def _first(present: Mapping[str, Any], of: Sequence[str]) -> Any:
    """The first of these modalities that the sample has, in the configuration's order."""
    return next((value for name, value in present.items() if name in of), None)


def picture_facts(pixels_3HW: np.ndarray) -> Facts:
    """Of a picture, uint8 (3, H, W)."""
    image = Image.fromarray(np.ascontiguousarray(pixels_3HW.transpose(1, 2, 0)))
    grey, colours = np.asarray(image.convert("L")), image.convert("HSV")
    brightness, contrast = _mean_and_deviation(grey)
    facts = {
        "colorfulness": colorfulness(pixels_3HW),
        "brightness": brightness,
        "contrast": contrast,
        "saturation": _mean_and_deviation(np.asarray(colours)[..., 1])[0],
        "entropy": image.entropy(),
    }
    return {name: round(value, _DIGITS) for name, value in facts.items()}


def colorfulness(pixels_3HW: np.ndarray) -> float:
    """Hasler and Süsstrunk, Measuring colourfulness in natural images (2003): of the opponent colours R - G and
    (R + G) / 2 - B, the length of the standard deviations and 0.3 times that of the means."""
    red, green, blue = pixels_3HW.astype(np.int64)
    (rg, rg_spread), (yb, yb_spread) = (_mean_and_deviation(v) for v in (2 * (red - green), red + green - 2 * blue))
    return (math.hypot(rg_spread, yb_spread) + 0.3 * math.hypot(rg, yb)) / 2


def _mean_and_deviation(values: np.ndarray) -> tuple[float, float]:
    """Of whole numbers, summed as such: the same on every machine."""
    whole = values.astype(np.int64)
    count, total, squares = whole.size, int(whole.sum()), int((whole * whole).sum())
    return total / count, math.sqrt(count * squares - total * total) / count


def text_facts(text: str) -> Facts:
    """Characters, words between spaces, and sentences, which end with . ! or ? and a space; nothing of a blank text."""
    text = text.strip()
    if not text:
        return {}
    sentences = [part for part in _SENTENCE_END.split(text) if part]
    counts = {"chars": len(text), "words": len(text.split()), "sentences": len(sentences)}
    return {f"caption_n_{what}": count for what, count in counts.items()}


def object_facts(objects: Sequence[Mapping[str, Any]]) -> Facts:
    """Of objects with a `class_name`."""
    classes = {o["class_name"] for o in objects}
    return {"n_coco_instances": len(objects), "coco_instance_diversity": len(classes)}


def segment_facts(segments: Sequence[Mapping[str, Any]], pixels: int, walkable: Sequence[str] = ()) -> Facts:
    """Of panoptic segments, which do not overlap, in a picture of so many pixels."""
    things = sum(s["area"] for s in segments if s["is_thing"])
    facts: Facts = {"objectness": round(things / pixels, _DIGITS)}
    facts["semantic_diversity"] = len({s["class_name"] for s in segments})
    if walkable:
        ground = sum(s["area"] for s in segments if s["class_name"] in walkable)
        facts["walkability"] = round(ground / pixels, _DIGITS)
    return facts


def normal_facts(normal_3HW: np.ndarray) -> Facts:
    """Of unit normals: their spherical variance (Mardia and Jupp, Directional Statistics), 0 for a plane."""
    known = normal_3HW[:, (normal_3HW != 0).any(axis=0)].astype(np.float64)
    if not known.size:
        return {}
    return {"geometric_complexity": round(max(0.0, 1.0 - float(np.linalg.norm(known.mean(axis=1)))), _DIGITS)}
