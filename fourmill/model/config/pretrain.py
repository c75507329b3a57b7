"""One training run: data, model, masking, optimizer, and how it is watched."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fourmill.modalities import unknown
from fourmill.model.config.architecture import ModelConfig
from fourmill.model.config.base import PIXELS, SEQUENCE_POSITIONS, Section
from fourmill.model.config.masking import MaskingConfig

# Fields that change how a run is watched or where it runs, not what it computes (on one kind of device).
FREE = ("out", "cache_bytes", "device", "num_threads", "eval_every", "checkpoint_every", "log_every", "tensorboard")


class PretrainConfig(Section):
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
    max_tokens: dict[str, int] = Field(default_factory=dict)
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
