"""Configuration of tokenizers with a network; importable without torch.

What a user chooses of the network (`NetworkConfig`), and what a checkpoint's `config.json` holds (`CheckpointConfig`):
vocabulary and grid are known from it without loading weights. Keys that nobody reads are refused.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fourmill.tokenizers.networks.diffusion_config import DiffusionConfig

SOURCES = Literal[
    "rgb",
    "depth",
    "normal",
    "semseg",
    "canny_edge",
    "clip",
    "dinov2",
    "imagebind",
    "clip_global",
    "dinov2_global",
    "imagebind_global",
    "mask",
    "human_pose",
]
FEATURES = ("clip", "dinov2", "imagebind")
VECTORS = ("clip_global", "dinov2_global", "imagebind_global", "human_pose")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkConfig(_Strict):
    """Sizes of a tokenizer's network: encoder, quantizer, decoder (4M, arXiv 2312.06647, appendix)."""

    architecture: Literal["vit", "mlp"] = "vit"
    """'vit': transformers over a grid of patches; 'mlp': residual MLPs (arXiv 2306.13575) over one vector."""
    size: int = Field(default=224, ge=1, le=4096)
    """Side of a value, in pixels, or in cells for feature maps; 1 for vectors. Other sides are taken too: the position
    embedding belongs to this one and is interpolated."""
    patch_size: int = Field(default=16, ge=1, le=64)
    """Side of the square that becomes one token, in the same unit; 1 for feature maps and vectors."""
    dim: int = Field(default=768, ge=8)
    """Width of encoder and decoder, in channels; for a ViT a multiple of 4 x heads."""
    encoder_blocks: int = Field(default=12, ge=0, le=64)
    """Blocks before the quantizer."""
    decoder_blocks: int = Field(default=12, ge=0, le=64)
    """Blocks after the quantizer; no effect with a diffusion decoder."""
    heads: int = Field(default=12, ge=1)
    """Attention heads per block of a ViT."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Width of a block's hidden layer, as a multiple of `dim`."""
    post_mlp: bool = True
    """A last tanh MLP after each ViT's blocks (ViT-VQGAN, arXiv 2110.04627)."""
    out_conv: bool = False
    """Two ConvNeXt blocks on a ViT decoder's output, against seams between patches (4M: SAM masks)."""
    latent_dim: int = Field(default=32, ge=1)
    """Channels of the vector that 'vq' (4M: 32) and 'memcodes' (4M: 1024) quantize."""
    quantizer: Literal["vq", "fsq", "lfq", "memcodes"] = "vq"
    """'vq': l2-normalised codebook kept by moving averages; 'fsq': finite scalars (arXiv 2309.15505); 'lfq': signs of
    log2(codebook_size) channels (arXiv 2310.05737); 'memcodes': product quantization by attention, one id for each of
    `num_codebooks` parts of the vector (NWT, arXiv 2106.04283)."""
    codebook_size: int = Field(default=8192, ge=2, le=1 << 20)
    """Codes of a codebook; for 'lfq' a power of two; no effect on 'fsq'."""
    num_codebooks: int = Field(default=1, ge=1, le=256)
    """Codebooks of 'memcodes', and so tokens a vector; 1 for the other quantizers."""
    decay: float = Field(default=0.99, gt=0, lt=1)
    """Of the 'vq' codebook's moving averages, a step (4M: 0.99); less follows latents that still move."""
    levels: tuple[int, ...] = ()
    """Levels of each 'fsq' channel, such as 8, 5, 5, 5; their product is the vocabulary."""
    diffusion: DiffusionConfig | None = None
    """A diffusion decoder (4M's DiVAE) in place of the ViT's."""
    decoder_size: int | None = Field(default=None, ge=1, le=4096)
    """Side that a diffusion decoder's position embedding belongs to; by default `size`."""

    @model_validator(mode="after")
    def _consistent(self) -> NetworkConfig:
        if self.size % self.patch_size:
            raise ValueError(f"size {self.size} is not a multiple of patch_size {self.patch_size}")
        if self.architecture == "vit" and self.dim % (4 * self.heads):
            raise ValueError(f"dim {self.dim} is not a multiple of 4 x heads ({4 * self.heads})")
        if self.architecture == "mlp" and (self.size, self.patch_size, self.diffusion) != (1, 1, None):
            raise ValueError("an 'mlp' network is for vectors: size and patch_size must be 1, diffusion not given")
        if (self.quantizer == "fsq") != bool(self.levels) or any(level < 3 for level in self.levels):
            raise ValueError(f"levels {self.levels}: 'fsq' needs three or more in each channel, the others take none")
        if self.quantizer == "lfq" and self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"codebook_size {self.codebook_size} is not a power of two, which 'lfq' needs")
        if self.quantizer != "memcodes" and self.num_codebooks != 1:
            raise ValueError(f"num_codebooks {self.num_codebooks}: only 'memcodes' has more than one")
        if self.latent_dim % self.num_codebooks:
            raise ValueError(f"latent_dim {self.latent_dim} is not a multiple of num_codebooks {self.num_codebooks}")
        return self

    @property
    def vocabulary(self) -> int:
        """Number of distinct ids of a token."""
        return math.prod(self.levels) if self.quantizer == "fsq" else self.codebook_size

    @property
    def code_dim(self) -> int:
        """Channels of a code: `latent_dim`, but as many as 'fsq' has levels and 'lfq' bits."""
        if self.quantizer == "fsq":
            return len(self.levels)
        return self.codebook_size.bit_length() - 1 if self.quantizer == "lfq" else self.latent_dim

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the tokens of a value of `size`."""
        return self.grid_of(self.size)

    def grid_of(self, size: int) -> tuple[int, int]:
        """(rows, columns) of the tokens of a value of this side; ValueError if no whole number of patches fits."""
        if size % self.patch_size:
            raise ValueError(f"size {size} is not a multiple of the tokenizer's patch_size {self.patch_size}")
        side = size // self.patch_size
        return (side, side) if self.num_codebooks == 1 else (1, self.num_codebooks)


class NormalisationConfig(_Strict):
    """How a value is brought to the network's range; `offset` and `scale` are of 'log' only.

    'signed': 0..255 -> -1..1. 'log': (ln(metres) - offset) / scale. 'standardise': (x - mean) / sqrt(var + 1e-6) of
    each map's middle 80 %, so that decoding gives depth up to an affine map. 'unit': vectors divided by their length.
    'raw': as it is. 'classes': ids as they are. 'binary': 0 and 1.
    """

    kind: Literal["signed", "log", "standardise", "unit", "raw", "classes", "binary"]
    offset: float = 0.0
    """Mean of ln(metres) over the training maps."""
    scale: float = Field(default=1.0, gt=0)
    """Standard deviation of ln(metres) over the training maps."""


_NORMALISATIONS = {
    "rgb": ("signed",),
    "depth": ("log", "standardise"),
    "normal": ("unit",),
    "semseg": ("classes",),
    "canny_edge": ("signed",),
    "mask": ("binary",),
    "human_pose": ("raw",),
}


class CheckpointConfig(_Strict):
    """`config.json` of a tokenizer's checkpoint folder."""

    format: Literal[2] = 2
    """Raised when the layout of the folder changes; 2: weights named as ml-4m names them."""
    source: SOURCES
    """The modality whose values are tokenized; 'mask' and 'human_pose' are parts of sam_instance and human_poses."""
    channels: int = Field(ge=1)
    """Channels of a value: 3 for rgb and normals, 1 for depth, the classes' embedding for semseg, else features."""
    classes: int = Field(default=0, ge=0, le=255)
    """Classes of semseg, 0 for other sources; 255 is void and not one of them."""
    normalisation: NormalisationConfig
    network: NetworkConfig

    @model_validator(mode="after")
    def _fits_source(self) -> CheckpointConfig:
        if self.normalisation.kind not in _NORMALISATIONS.get(self.source, ("unit", "raw")):
            raise ValueError(f"normalisation {self.normalisation.kind!r} does not go with source {self.source!r}")
        if (self.source == "semseg") != (self.classes > 0):
            raise ValueError(f"classes={self.classes} with source {self.source!r}: semseg has some, the others none")
        if (self.source in VECTORS) != (self.network.architecture == "mlp"):
            raise ValueError(
                f"source {self.source!r} with architecture {self.network.architecture!r}: 'mlp' is for vectors"
            )
        return self
