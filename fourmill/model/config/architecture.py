"""The network's shape: `Architecture` is written beside the weights and is enough to rebuild them.

A model's modality is `pixels` (raw RGB patches), `grid` (L tokens in every row), `sequence` (text tokens) or `vectors`
(a text embedded by another network, such as T5; input only).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fourmill.model.config.base import SEQUENCE_POSITIONS, Section

# 4M's sizes: width, blocks of the encoder and of the decoder, heads. Published are B, L and XL.
SIZES = {
    "tiny": {"dim": 384, "encoder_depth": 6, "decoder_depth": 6, "num_heads": 6},
    "small": {"dim": 512, "encoder_depth": 8, "decoder_depth": 8, "num_heads": 8},
    "b": {"dim": 768, "encoder_depth": 12, "decoder_depth": 12, "num_heads": 12},
    "l": {"dim": 1024, "encoder_depth": 24, "decoder_depth": 24, "num_heads": 16},
    "xl": {"dim": 2048, "encoder_depth": 24, "decoder_depth": 24, "num_heads": 32},
}


class ModelConfig(Section):
    """The trunk. Defaults are smaller than 4M's smallest size; `size: b` gives 4M-B's numbers."""

    size: Literal["tiny", "small", "b", "l", "xl"] | None = None
    """One of 4M's sizes: `dim`, both depths and `num_heads`, of which those given beside it win."""
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
    qkv_bias: bool = False
    """Biases of queries, keys and values; 4M's `_gelu` family has all four kinds, the published models none."""
    proj_bias: bool = False
    """Bias after attention."""
    mlp_bias: bool = False
    """Biases of the MLPs."""
    norm_bias: bool = False
    """Biases of the LayerNorms."""
    num_register_tokens: int = Field(default=0, ge=0)
    """Learned tokens before the inputs, which the decoder sees too."""
    decoder_causal_mask: bool = False
    """Targets of a grid see what came before only, as those of a text."""
    decoder_sep_mask: bool = True
    """Targets see their own modality only; else also the modalities before it in the row."""
    tie_logits: bool = True
    """Share each output embedding with its logits layer. Published checkpoints hold them apart."""
    share_modality_embeddings: bool = True
    """One vector for a modality in the encoder and the decoder; 4M-21 has two."""
    patch_size: int = Field(default=16, ge=1)
    """Side of a patch of raw pixels."""
    image_size: int = Field(default=224, ge=16)
    """Side of the square of raw pixels that the model is given."""

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("size") in SIZES:
            return {**SIZES[values["size"]], **values, "size": None}
        return values

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        if self.dim % 4 or self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} must be a multiple of 4 and of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        return self


class ModalityInfo(Section):
    """How one modality enters or leaves the network."""

    kind: Literal["pixels", "grid", "sequence", "vectors"]
    vocabulary: int = Field(default=0, ge=0)
    """Number of distinct ids; 0 for pixels and vectors."""
    tokens: int = Field(ge=1)
    """Patches, grid cells, or the longest text in tokens with its end marker."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of patches and grids; (1, n) or None for the codes of a global vector; None for text."""
    width: int = Field(default=0, ge=0)
    """Numbers in each vector: 4096 for T5-XXL."""
    table: int | None = Field(default=None, ge=1)
    """Rows of the position table of a text; None: 512, as published, or as many as the longest text needs."""

    @property
    def positions(self) -> int:
        """Rows of the position table."""
        is_text = self.kind in ("sequence", "vectors")
        return self.table or (max(self.tokens, SEQUENCE_POSITIONS) if is_text else self.tokens)

    @property
    def has_layout(self) -> bool:
        """Whether positions lie in a plane; the codes of a global vector do not, and 4M learns theirs."""
        return self.grid is not None and self.grid[0] > 1

    @model_validator(mode="after")
    def _fits(self) -> ModalityInfo:
        if self.positions < self.tokens:
            raise ValueError(f"{self.tokens} tokens need as many positions; the table has {self.positions} rows")
        if self.kind == "vectors" and not self.width:
            raise ValueError("vectors need their width")
        return self


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
        for name in self.domains_out:
            if self.modalities[name].kind == "pixels":
                raise ValueError(f"{name!r} is raw pixels and cannot be predicted; predict 'tok_rgb' instead")
            if self.modalities[name].kind == "vectors":
                raise ValueError(f"{name!r} is vectors and cannot be predicted; predict the text's tokens instead")
        return self
