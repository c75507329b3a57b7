"""The network's shape: `Architecture` is written beside the weights and is enough to rebuild them.

A model's modality is `pixels` (raw RGB patches), `grid` (L tokens in every row) or `sequence` (text tokens).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fourmill.model.config.base import SEQUENCE_POSITIONS, Section


class ModelConfig(Section):
    """The trunk. Defaults: 4M's smallest published shape is 'tiny', 384 wide with 6 + 6 blocks; this is smaller."""

    dim: int = Field(default=192, ge=16)
    """Width of the residual stream; a multiple of 4 (two sine-cosine halves) and of `num_heads`."""
    encoder_depth: int = Field(default=4, ge=1)
    """Encoder blocks."""
    decoder_depth: int = Field(default=4, ge=1)
    """Decoder blocks."""
    num_heads: int = Field(default=3, ge=1)
    """Attention heads; 4M keeps 64 dimensions a head."""
    mlp_ratio: float = Field(default=4, gt=0)
    """Hidden width over `dim`; a gated MLP gets 2/3 of it, so that both kinds have equal parameters."""
    gated_mlp: bool = True
    """SwiGLU, as published; else a GELU MLP."""
    qk_norm: bool = False
    """Normalise queries and keys per head, as in 4M's `_qknorm_` family."""
    tie_logits: bool = True
    """Share each output embedding with its logits layer. Published checkpoints hold them apart."""
    share_modality_embeddings: bool = True
    """One vector for a modality in the encoder and the decoder; 4M-21 has two."""
    patch_size: int = Field(default=16, ge=1)
    """Side of a patch of raw pixels."""
    image_size: int = Field(default=224, ge=16)
    """Side of the square of raw pixels that the model is given."""

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        if self.dim % 4 or self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} must be a multiple of 4 and of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        return self


class ModalityInfo(Section):
    """How one modality enters or leaves the network."""

    kind: Literal["pixels", "grid", "sequence"]
    vocabulary: int = Field(default=0, ge=0)
    """Number of distinct ids; 0 for pixels."""
    tokens: int = Field(ge=1)
    """Patches, grid cells, or the longest text in tokens with its end marker."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of pixels' patches and of grids; None where positions are learned (global tokens) or text's."""

    @property
    def positions(self) -> int:
        """Rows of the position table."""
        return max(self.tokens, SEQUENCE_POSITIONS) if self.kind == "sequence" else self.tokens


class Architecture(ModelConfig):
    """A trunk with its modalities."""

    domains_in: tuple[str, ...] = Field(min_length=1)
    domains_out: tuple[str, ...] = Field(min_length=1)
    modalities: dict[str, ModalityInfo]

    @property
    def names(self) -> tuple[str, ...]:
        """All modalities, inputs first; a modality's place in it is its number in a batch."""
        return tuple(dict.fromkeys((*self.domains_in, *self.domains_out)))

    @model_validator(mode="after")
    def _described(self) -> Architecture:
        missing = [n for n in self.names if n not in self.modalities]
        if missing:
            raise ValueError(f"modalities without a description: {', '.join(missing)}")
        pixels = [n for n in self.domains_out if self.modalities[n].kind == "pixels"]
        if pixels:
            raise ValueError(f"{pixels[0]!r} is raw pixels and cannot be predicted; predict 'tok_rgb' instead")
        return self
