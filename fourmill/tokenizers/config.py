"""Configuration of spatial tokenizers and of training a tokenizer; importable without torch.

Three models: what a user chooses of the network (`SpatialNetworkConfig`), what a checkpoint's `config.json` holds
(`SpatialCheckpointConfig`, from which vocabulary and grid are known without loading weights), and one training run
(`TrainTokenizerConfig`). Keys that nobody reads are refused.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fourmill.modalities import Kind, modality

SpatialSource = Literal["rgb", "depth", "normal", "semseg", "clip", "dinov2"]
FEATURES = ("clip", "dinov2")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SpatialNetworkConfig(_Strict):
    """Sizes of a spatial tokenizer's network: ViT encoder, quantizer, ViT decoder (4M, arXiv 2312.06647, appendix)."""

    size: int = Field(default=224, ge=1, le=4096)
    """Side of a value, in pixels, or in cells for feature maps."""
    patch_size: int = Field(default=16, ge=1, le=64)
    """Side of the square that becomes one token, in the same unit; 1 for feature maps."""
    dim: int = Field(default=768, ge=8)
    """Width of both transformers, in channels; a multiple of 4 x heads."""
    encoder_blocks: int = Field(default=12, ge=0, le=64)
    """Transformer blocks before the quantizer."""
    decoder_blocks: int = Field(default=12, ge=0, le=64)
    """Transformer blocks after the quantizer."""
    heads: int = Field(default=12, ge=1)
    """Attention heads per block."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Width of a block's hidden layer, as a multiple of `dim`."""
    latent_dim: int = Field(default=32, ge=1)
    """Channels of the vector that is quantized (4M: 32)."""
    quantizer: Literal["vq", "fsq"] = "vq"
    """'vq': l2-normalised codebook kept by moving averages; 'fsq': finite scalar quantization (arXiv 2309.15505)."""
    codebook_size: int = Field(default=8192, ge=2, le=1 << 20)
    """Codes of the 'vq' codebook."""
    decay: float = Field(default=0.99, gt=0, lt=1)
    """Of the 'vq' codebook's moving averages, a step (4M: 0.99); less follows latents that still move."""
    levels: tuple[int, ...] = ()
    """Levels of each 'fsq' channel, such as 8, 5, 5, 5; their product is the vocabulary."""

    @model_validator(mode="after")
    def _consistent(self) -> SpatialNetworkConfig:
        if self.size % self.patch_size:
            raise ValueError(f"size {self.size} is not a multiple of patch_size {self.patch_size}")
        if self.dim % (4 * self.heads):
            raise ValueError(f"dim {self.dim} is not a multiple of 4 x heads ({4 * self.heads})")
        if (self.quantizer == "fsq") != bool(self.levels) or any(level < 2 for level in self.levels):
            raise ValueError(f"levels {self.levels}: 'fsq' needs two or more in each channel, 'vq' takes none")
        return self

    @property
    def vocabulary(self) -> int:
        return math.prod(self.levels) if self.quantizer == "fsq" else self.codebook_size

    @property
    def grid(self) -> tuple[int, int]:
        side = self.size // self.patch_size
        return side, side


class NormalisationConfig(_Strict):
    """How a value is brought to the network's range; `offset` and `scale` are of 'log' only.

    'signed': 0..255 -> -1..1. 'log': (ln(metres) - offset) / scale. 'standardise': (x - mean) / sqrt(var + 1e-6) of
    each map's middle 80 %, so that decoding gives depth up to an affine map. 'unit': vectors divided by their length.
    'classes': ids as they are.
    """

    kind: Literal["signed", "log", "standardise", "unit", "classes"]
    offset: float = 0.0
    """Mean of ln(metres) over the training maps."""
    scale: float = Field(default=1.0, gt=0)
    """Standard deviation of ln(metres) over the training maps."""


class SpatialCheckpointConfig(_Strict):
    """`config.json` of a spatial tokenizer's checkpoint folder."""

    format: Literal[1] = 1
    """Raised when the layout of the folder changes."""
    tokenizer: Literal["spatial"] = "spatial"
    """The class that the weights belong to, as in the table of tokenizers."""
    source: SpatialSource
    """The modality whose values are tokenized."""
    channels: int = Field(ge=1)
    """Channels of a value: 3 for rgb and normals, 1 for depth, the classes' embedding for semseg, else features."""
    classes: int = Field(default=0, ge=0, le=255)
    """Classes of semseg, 0 for other sources; 255 is void and not one of them."""
    normalisation: NormalisationConfig
    network: SpatialNetworkConfig

    @model_validator(mode="after")
    def _fits_source(self) -> SpatialCheckpointConfig:
        allowed = {"rgb": ("signed",), "depth": ("log", "standardise"), "semseg": ("classes",)}
        if self.normalisation.kind not in allowed.get(self.source, ("unit",)):
            raise ValueError(f"normalisation {self.normalisation.kind!r} does not go with source {self.source!r}")
        if (self.source == "semseg") != (self.classes > 0):
            raise ValueError(f"classes={self.classes} with source {self.source!r}: semseg has some, the others none")
        return self


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


class TrainTokenizerConfig(_Strict):
    """One run of `fourmill train-tokenizer`: a spatial tokenizer, or the vocabulary of a text tokenizer."""

    dataset: str
    """Path or s3:// URI of the dataset whose labels it learns."""
    modality: str
    """The token modality it will make, such as tok_depth, or tok_caption for a text vocabulary."""
    out: str
    """Folder or s3:// URI of the checkpoint; must not hold one yet."""
    network: SpatialNetworkConfig = SpatialNetworkConfig()
    """Sizes of a spatial tokenizer's network."""
    normalisation: Literal["log", "standardise"] = "log"
    """Of depth: 'log' for metres, 'standardise' for depth that is only relative."""
    vocabulary: VocabularyConfig = VocabularyConfig()
    """Layout of a text vocabulary."""
    steps: int = Field(default=100_000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=64, ge=1)
    """Samples a step."""
    lr: float = Field(default=4e-4, gt=0)
    """Peak learning rate of AdamW; a cosine brings it to 0."""
    warmup: int = Field(default=500, ge=0)
    """Steps of linear warm-up."""
    unquantized: int = Field(default=500, ge=0)
    """Steps before the quantizer is put in; its codebook then starts from latents that mean something."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of matrices; biases and norms are not decayed."""
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    seed: int = 0
    """Of the weights, the order of samples, and the restart of dead codes."""
    device: str = "auto"
    """'cpu', 'cuda', 'cuda:1', or 'auto': a GPU if there is one."""
    num_threads: int = Field(default=0, ge=0)
    """Torch's CPU threads; 0 leaves its own choice."""
    autocast: bool = False
    """Forward passes in bfloat16."""
    held_out: float = Field(default=0.02, ge=0, lt=1)
    """Share of keys, chosen by their hash, that is measured on and never trained on."""
    eval_samples: int = Field(default=512, ge=1)
    """Most held-out samples that reconstructions are measured on."""
    max_shards: int | None = Field(default=None, ge=1)
    """Use only this many shards, the first ones; all if not given."""
    shards_in_memory: int = Field(default=8, ge=1)
    """Samples are shuffled within groups of so many shards."""
    report_every: int = Field(default=100, ge=1)
    """Steps between two lines of the log."""
    min_perplexity: float = Field(default=4.0, ge=0)
    """Fewer codes than this in effective use, after warm-up, stop the run as collapsed."""
    state: str | None = None
    """Local folder for the state from which an interrupted run goes on; none is kept if not given."""
    save_every: int = Field(default=1000, ge=1)
    """Steps between two saves of that state."""
    licence: str = "unknown"
    """Licence of the weights, for the card beside them."""

    @model_validator(mode="after")
    def _trainable(self) -> TrainTokenizerConfig:
        entry = modality(self.modality)
        if not entry.is_tokens or entry.source is None:
            raise ValueError(
                f"modality {self.modality!r} is not one of tokens; such as tok_rgb, tok_depth, tok_caption"
            )
        if self.modality.startswith("tok_det"):
            raise ValueError("tok_det has no vocabulary of its own; train tok_caption with vocabulary.class_names")
        if entry.kind is Kind.GRID and entry.source in FEATURES and self.network.patch_size != 1:
            raise ValueError(f"{self.modality} makes one token per cell: network.patch_size must be 1")
        return self
