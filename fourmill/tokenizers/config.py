"""Configuration of spatial tokenizers and of training a tokenizer; importable without torch.

Three models: what a user chooses of the network (`NetworkConfig`), what a checkpoint's `config.json` holds
(`CheckpointConfig`, from which vocabulary and grid are known without loading weights), and one training run
(`TrainTokenizerConfig`). Keys that nobody reads are refused.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fourmill.modalities import Kind, modality
from fourmill.tokenizers.networks.diffusion_config import DiffusionConfig
from fourmill.tokenizers.training.config import PerceptualConfig, VocabularyConfig

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


PARTS = {"sam_instance": "mask", "instance": "mask", "human_poses": "human_pose"}
"""Labels that hold parts with a tokenizer of their own: label -> source."""


class TrainTokenizerConfig(_Strict):
    """One run of `fourmill train-tokenizer`: a tokenizer with a network, or the vocabulary of a text tokenizer."""

    dataset: str
    """Path or s3:// URI of the dataset whose labels it learns."""
    modality: str
    """The token modality it will make, such as tok_depth, or tok_caption for a text vocabulary; for the masks within
    sam_instance or instance, and the poses within human_poses, the label's own name."""
    out: str
    """Folder or s3:// URI of the checkpoint; must not hold one yet."""
    network: NetworkConfig = NetworkConfig()
    """Sizes of the network."""
    normalisation: Literal["log", "standardise", "unit", "raw"] | None = None
    """Of depth: 'log' for metres (the default), 'standardise' for depth that is only relative. Of features: 'unit'
    keeps their direction (the default), 'raw' their length too."""
    vocabulary: VocabularyConfig = VocabularyConfig()
    """Layout of a text vocabulary."""
    init: str | None = None
    """Checkpoint to begin from: encoder and codebook, and the decoder if it is of the same kind."""
    freeze_encoder: bool = False
    """Learn the decoder only; tokens stay those of `init`."""
    sizes: tuple[int, ...] = ()
    """Sides that values are learned at, one drawn for each step; `network.size` alone if not given. Labels must have
    the largest one."""
    perceptual: PerceptualConfig | None = None
    """Of rgb: compare features too."""
    steps: int = Field(default=100_000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=64, ge=1)
    """Samples a step, over all processes."""
    accumulate: int = Field(default=1, ge=1)
    """Parts that a step's samples are computed in, one after the other; the codebook's averages move once a part."""
    lr: float = Field(default=4e-4, gt=0)
    """Peak learning rate of AdamW; a cosine brings it to 0."""
    warmup: int = Field(default=500, ge=0)
    """Steps of linear warm-up."""
    unquantized: int = Field(default=500, ge=0)
    """Steps before the quantizer is put in; its codebook then starts from latents that mean something. None with
    `init`, which has a codebook."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of matrices; biases and norms are not decayed."""
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a moving average of the weights, which is then what is published (4M: 0.99, diffusion 0.9999)."""
    seed: int = 0
    """Of the weights, the order of samples, and the restart of dead codes."""
    device: str = "auto"
    """'cpu', 'cuda', 'cuda:1', or 'auto': a GPU if there is one; under torchrun each process takes its own."""
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
    """Steps between two reports."""
    tensorboard: str | None = None
    """Local folder for scalars and reconstructions, one of each a report; none are written if not given."""
    min_perplexity: float = Field(default=4.0, ge=0)
    """Fewer codes than this in effective use, after warm-up, stop the run as collapsed."""
    state: str | None = None
    """Local folder for the state from which an interrupted run goes on; none is kept if not given."""
    save_every: int = Field(default=1000, ge=1)
    """Steps between two saves of that state."""
    licence: str = "unknown"
    """Licence of the weights, for the card beside them."""

    @property
    def source(self) -> str:
        """What a value is: one of `SOURCES`, or the text that words are learned from."""
        return PARTS.get(self.modality.partition("@")[0], modality(self.modality).source or "")

    @property
    def largest(self) -> int:
        """Side that examples come at."""
        return max(self.sizes, default=self.network.size)

    @model_validator(mode="after")
    def _trainable(self) -> TrainTokenizerConfig:
        entry, name = modality(self.modality), self.modality.partition("@")[0]
        if name not in PARTS and not entry.is_tokens:
            raise ValueError(f"modality {self.modality!r} is not one of tokens, such as tok_rgb or tok_caption")
        if entry.kind is Kind.SEQUENCE and self.source not in ("caption", "alt_text"):
            codes = f"; for the codes within, {self.source}" if self.source in ("sam_instance", "human_poses") else ""
            raise ValueError(
                f"{name} has no vocabulary of its own; train tok_caption with vocabulary.class_names{codes}"
            )
        if entry.kind is Kind.GRID and self.source in FEATURES and self.network.patch_size != 1:
            raise ValueError(f"{self.modality} makes one token per cell: network.patch_size must be 1")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> TrainTokenizerConfig:
        diffusion, patch = self.network.diffusion, self.network.patch_size
        if diffusion and self.source not in ("rgb", "depth", "normal", "canny_edge"):
            raise ValueError(f"a diffusion decoder is for rgb, depth, normals and edges, not {self.source}")
        step = math.lcm(patch, diffusion.denoiser.multiple) if diffusion else patch
        if any(size < step or size % step for size in (*self.sizes, self.network.size)):
            raise ValueError(
                f"sizes {[*self.sizes, self.network.size]} must be multiples of {step}, the networks' patches"
            )
        if self.sizes and self.network.architecture == "mlp":
            raise ValueError("sizes: a vector has none")
        if self.freeze_encoder and not self.init:
            raise ValueError("freeze_encoder needs `init`, the checkpoint whose encoder is kept")
        if self.perceptual and (self.source != "rgb" or diffusion):
            raise ValueError("a perceptual loss is for rgb, without a diffusion decoder")
        return self
