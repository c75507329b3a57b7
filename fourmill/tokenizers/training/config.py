"""Configuration of training a tokenizer; importable without torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fourmill.modalities import Kind, modality
from fourmill.tokenizers.config import FEATURES, NetworkConfig


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


PARTS = {"sam_instance": "mask", "instance": "mask", "human_poses": "human_pose"}
"""Labels that hold parts with a tokenizer of their own: label -> source."""


class TrainTokenizerConfig(_Strict):
    """One run of `fourmill train-tokenizer`: a tokenizer with a network, or the vocabulary of a text tokenizer."""

    dataset: str
    """Path or s3:// URI of the dataset whose labels it learns."""
    mixed_generations: bool = False
    """Learn from a modality that is partly redone, so that its shards were made by different labelers."""
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
