"""What is configured about the model, its masking and its training; no torch here, so that a plan can be checked fast.

`Architecture` is the whole truth about a network's shape: it is written beside the weights and is enough to rebuild
them. A model's modality is `pixels` (raw RGB patches), `grid` (L tokens in every row) or `sequence` (text tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fourmill.modalities import unknown

PIXELS = "rgb"  # in a list of inputs it means raw pixels; RGB as tokens is `tok_rgb`
PAD, UNK, SOS, EOS, FIRST_SENTINEL = 0, 1, 2, 3, 4  # the ids that every text vocabulary of 4M begins with
SEQUENCE_POSITIONS = 512  # rows of a published position table for text, whatever the longest text


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Config):
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


class ModalityInfo(_Config):
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


class Mixture(_Config):
    """One way to share out the token budgets: Dirichlet concentrations over the modalities that a sample has.

    Small alphas concentrate a budget on few modalities, large ones spread it evenly, 0 leaves a modality out.
    4M's RGB-to-all is `input_alphas: {rgb: 1000}, input_default: 0, target_default: 0.5`.
    """

    weight: float = Field(default=1.0, gt=0)
    """How often this mixture is drawn, relative to the others."""
    input_alphas: dict[str, float] = {}
    """Concentration of each input modality."""
    input_default: float = Field(default=0.5, ge=0)
    """Concentration of the inputs not named."""
    target_alphas: dict[str, float] = {}
    """Concentration of each target modality."""
    target_default: float = Field(default=0.5, ge=0)
    """Concentration of the targets not named."""

    @model_validator(mode="after")
    def _not_negative(self) -> Mixture:
        for name, alpha in {**self.input_alphas, **self.target_alphas}.items():
            if alpha < 0:
                raise ValueError(f"the alpha of {name!r} is {alpha}; 0 leaves a modality out, there is nothing below")
        return self


class MaskingConfig(_Config):
    """Which tokens a sample shows and which it asks for."""

    num_input_tokens: int = Field(default=128, ge=1)
    """Most visible tokens of a sample, over all modalities."""
    num_target_tokens: int = Field(default=128, ge=1)
    """Most predicted tokens of a sample."""
    min_input_tokens: int | None = Field(default=None, ge=1)
    """If set, a sample's input budget is uniform from here to `num_input_tokens`; else always the most."""
    min_target_tokens: int | None = Field(default=None, ge=1)
    """The same for targets."""
    mixtures: tuple[Mixture, ...] = Field(default=(Mixture(),), min_length=1)
    """One is drawn for each sample, by weight, among those with an input and a target that the sample has."""
    num_sentinels: int = Field(default=200, ge=3)
    """Sentinels [S_0], [S_1], … of the text vocabulary, ids 4 and up. [S_0] is never used, as in 4M."""

    @model_validator(mode="after")
    def _ordered(self) -> MaskingConfig:
        for low, high in (("min_input_tokens", "num_input_tokens"), ("min_target_tokens", "num_target_tokens")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and least > most:
                raise ValueError(f"{low} {least} is above {high} {most}")
        return self

    def check(self, domains_in: Sequence[str], domains_out: Sequence[str]) -> None:
        """ValueError for an alpha that names a modality the model does not have on that side."""
        for mixture in self.mixtures:
            sides: tuple[tuple[str, Mapping[str, float], Sequence[str]], ...]
            sides = (("input", mixture.input_alphas, domains_in), ("target", mixture.target_alphas, domains_out))
            for side, alphas, known in sides:
                for name in alphas:
                    if name not in known:
                        raise ValueError(f"{side}_alphas: {unknown('modality', name, list(known))}")


# Fields that change how a run is watched or where it runs, not what it computes (on one kind of device).
FREE = ("out", "cache_bytes", "device", "num_threads", "eval_every", "checkpoint_every", "log_every", "tensorboard")


class PretrainConfig(_Config):
    """One training run. Everything but the fields marked (free) must stay the same for a run to be continued."""

    out: str
    """Folder or s3:// URI of the checkpoint; a run that was stopped is continued from what lies there."""
    inputs: tuple[str, ...] = Field(min_length=1)
    """Modalities that the encoder may see; `rgb` means raw pixels."""
    targets: tuple[str, ...] = Field(min_length=1)
    """Token modalities that the decoder predicts."""
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    batch_size: int = Field(default=64, ge=1)
    """Samples per step."""
    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    lr: float = Field(default=1e-3, gt=0)
    """Highest learning rate, reached after the warm-up; it falls to 0 as a cosine."""
    warmup: int = Field(default=50, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW's decoupled decay of matrices and embeddings; norms, biases and mask token have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages, as 4M."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; None: unclipped."""
    seed: int = Field(default=0, ge=0)
    """Initial weights, order of samples, crops and masks are functions of it and of the step."""
    held_out: float = Field(default=0.125, ge=0, lt=1)
    """Share of the samples, by a hash of the key, that are never trained on."""
    eval_samples: int = Field(default=512, ge=1)
    """Most held-out samples that an evaluation looks at."""
    mixed_generations: bool = False
    """Train on a modality that is partly redone, so that its shards were made by different labelers or tokenizers."""
    missing: Literal["mask", "error", "skip"] = "mask"
    """A sample without one of the modalities: train on what it has, refuse the dataset, or leave the sample out."""
    crop: int | Literal["random"] = "random"
    """Which recorded crop: a number, or drawn for each sample in each epoch; then evaluation uses crop 0."""
    max_tokens: dict[str, int] = {}
    """Longest text of each sequence modality with its end marker, in tokens; longer ones are cut. Default: the
    catalogue's."""
    cache_bytes: int = Field(default=512 << 20, ge=0)
    """(free) Decoded crops are kept in memory if all of them fit into this; in object storage also the shards."""
    autocast: bool = False
    """Compute in bfloat16; weights and optimizer stay float32."""
    device: str = "auto"
    """(free) 'auto' takes a GPU if there is one; or 'cpu', 'cuda', 'cuda:1'."""
    num_threads: int | None = Field(default=None, ge=1)
    """(free) CPU threads of torch; None: as many as there are cores."""
    eval_every: int = Field(default=200, ge=1)
    """(free) Steps between evaluations; there is always one at the end."""
    checkpoint_every: int = Field(default=500, ge=1)
    """(free) Steps between training states from which a stopped run continues."""
    log_every: int = Field(default=20, ge=1)
    """(free) Steps between progress reports."""
    tensorboard: bool | None = None
    """(free) Write TensorBoard scalars into `out`; None: if `out` is a local folder."""

    @model_validator(mode="after")
    def _consistent(self) -> PretrainConfig:
        self.masking.check(self.inputs, self.targets)
        if PIXELS in self.targets:
            raise ValueError("targets: 'rgb' is raw pixels and cannot be predicted; name 'tok_rgb'")
        for name, longest in self.max_tokens.items():
            if name not in (*self.inputs, *self.targets):
                raise ValueError(f"max_tokens: {unknown('modality', name, [*self.inputs, *self.targets])}")
            if not 1 <= longest <= SEQUENCE_POSITIONS:
                raise ValueError(f"max_tokens: {name} {longest}; there are {SEQUENCE_POSITIONS} positions for text")
        return self
