"""One training run: data, model, masking, optimizer, and how it is watched."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fourmill.modalities import unknown
from fourmill.model.config.architecture import ModelConfig
from fourmill.model.config.base import PIXELS, SEQUENCE_POSITIONS, Section
from fourmill.model.config.data import DatasetShare, ShardCacheConfig
from fourmill.model.config.masking import MaskingConfig

# Fields that change how a run is watched or where it runs, not what it computes (but for the rounding of sums).
FREE = (
    *("out", "cache_bytes", "shard_cache", "device", "num_threads", "accumulate", "strategy", "workers", "compile"),
    *("activation_checkpointing", "eval_every", "checkpoint_every", "keep_states", "log_every", "tensorboard", "wandb"),
)


class PretrainConfig(Section):
    """One training run. Everything but the fields marked (free) must stay the same for a run to be continued."""

    out: str
    """Folder or s3:// URI of the checkpoint; a run that was stopped is continued from what lies there."""
    inputs: tuple[str, ...] = Field(min_length=1)
    """Modalities that the encoder may see; `rgb` means raw pixels."""
    targets: tuple[str, ...] = Field(min_length=1)
    """Token modalities that the decoder predicts."""
    datasets: tuple[DatasetShare, ...] = ()
    """Datasets to mix, with their weights; empty: the run's one dataset."""
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    batch_size: int = Field(default=64, ge=1)
    """Samples per step, over all processes and slices."""
    accumulate: int = Field(default=1, ge=1)
    """(free) Slices of a step that each process computes one after the other. Keep processes x slices the same when a
    run goes on elsewhere: masks are drawn slice by slice."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """(free) Several processes: a whole model in each, or model and optimizer in shards (FSDP2)."""
    workers: int | None = Field(default=None, ge=1)
    """(free) Processes that Ray Train starts, each with a GPU if the cluster has any; None: this process, or those
    that torchrun has started."""
    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    lr: float = Field(default=1e-3, gt=0)
    """Highest learning rate, reached after the warm-up."""
    warmup: int = Field(default=50, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """What follows the warm-up: a cosine to 0; `lr` and then a decay to 0 (warm-up, stable, decay); or `lr`."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Of `wsd`: length of the decay at the end; None: a fifth of all steps."""
    decay: Literal["linear", "1-sqrt"] = "linear"
    """Of `wsd`: the decay's form."""
    loss: Literal["modality", "token"] = "modality"
    """What a step minimises: the mean over modalities of their mean cross-entropy, or the mean over all tokens."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW's decoupled decay of matrices and embeddings; norms, biases and mask token have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages, as 4M."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; None: unclipped."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a moving average of the weights, evaluated too and saved as the checkpoint `ema/`; None: no average."""
    on_spike: Literal["report", "skip"] = "report"
    """A loss far above those before: say so, or also leave the step's update out."""
    spike_z: float = Field(default=8.0, gt=0)
    """How far: deviations (1.48 times the median one) above the median of the last 100 steps."""
    max_skipped: int = Field(default=20, ge=0)
    """Steps without a finite loss and gradient are left out; more of them than this stop the run."""
    dead_after: int = Field(default=1000, ge=1)
    """A target modality is reported as dead after so many steps without a token of it, or if it is still no better than
    token frequencies after so many."""
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
    shuffle_shards: int | None = Field(default=None, ge=1)
    """Samples are shuffled within groups of so many shards; None: all of a local dataset, 16 shards of any other."""
    shard_cache: ShardCacheConfig = ShardCacheConfig()
    """(free) Where shards of object storage are kept."""
    autocast: bool = False
    """Compute in bfloat16; weights and optimizer stay float32."""
    compile: bool = False
    """(free) Compile the transformer's blocks: some minutes at the start, faster steps on a GPU."""
    activation_checkpointing: bool = False
    """(free) Keep only the blocks' inputs and compute the rest again in the backward pass: less memory, slower."""
    device: str = "auto"
    """(free) 'auto' takes a GPU if there is one; or 'cpu', 'cuda', 'cuda:1'."""
    num_threads: int | None = Field(default=None, ge=1)
    """(free) CPU threads of torch; None: as many as there are cores."""
    eval_every: int = Field(default=200, ge=1)
    """(free) Steps between evaluations; there is always one at the end."""
    checkpoint_every: int = Field(default=500, ge=1)
    """(free) Steps between training states from which a stopped run continues."""
    keep_states: int = Field(default=2, ge=1)
    """(free) Training states that are kept, the newest ones."""
    log_every: int = Field(default=20, ge=1)
    """(free) Steps between progress reports."""
    tensorboard: bool | None = None
    """(free) Write TensorBoard scalars into `out`; None: if `out` is a local folder."""
    wandb: str | None = None
    """(free) Project of Weights & Biases to report to as well; the package must be installed."""

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
