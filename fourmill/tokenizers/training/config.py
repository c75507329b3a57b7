"""Parts of the configuration of a tokenizer's training; importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VocabularyConfig(_Strict):
    """Layout of a text vocabulary; the defaults are 4M's."""

    vocabulary_size: int = Field(default=30_000, ge=8)
    """Most entries, everything included; fewer if the texts do not have so many word pieces."""
    num_sentinels: int = Field(default=200, ge=1)
    """Markers for masked spans."""
    coordinate_bins: int = Field(default=1000, ge=2)
    """Values of each of the four coordinates."""
    class_names: tuple[str, ...] = ()
    """Names of detected classes; each becomes one token."""
    markers: tuple[str, ...] = ()
    """Words of other serialisations (point, polygon, human, ...); each becomes one token."""


class PerceptualConfig(_Strict):
    """A loss between features of a frozen timm network, beside the one between pixels (4M: CLIP-B/16's, cosine)."""

    checkpoint: str
    """Local folder with timm's config.json and model.safetensors, or a local weights file of `model`."""
    model: str | None = None
    """timm's name of the architecture, where `checkpoint` is a file."""
    blocks: tuple[str, ...] = Field(min_length=1)
    """Modules whose outputs are compared: blocks.2 of a ViT, layer3 of a ResNet, stages.1 of a ConvNeXt."""
    weight: float = Field(default=1.0, gt=0)
    """Of the sum over blocks, against the loss between pixels."""
    distance: Literal["cosine", "l1", "l2"] = "cosine"
    """Between feature vectors; 'l1' and 'l2' (squared) after they were divided by their length."""
