"""One fine-tuning run: what is learned, from which pictures and labels, and how; no torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fourmill.model.config.base import Section
from fourmill.pipeline.store.settings import StoreSettings

Task = Literal["classification", "semseg", "depth", "normal"]
# Fields that change how a run is watched or where it runs, not what it computes (on one kind of device).
FREE = (
    *("out", "storage", "cache_bytes", "device", "num_threads"),
    *("eval_every", "checkpoint_every", "log_every", "tensorboard"),
)


class FinetuneConfig(Section):
    """One run. Everything but the fields marked (free) must stay the same for a run to be continued."""

    task: Task
    """What is predicted from a picture: its class, or at each pixel a class, the depth or the normal."""
    out: str
    """(free) Folder or s3:// URI of the result; a run that was stopped is continued from what lies there."""
    checkpoint: str
    """The pretrained 4M: folder, s3:// URI or hub id. It must read RGB as pixels."""
    random_weights: bool = False
    """Take only the checkpoint's architecture and draw the encoder's weights: what pretraining is compared with."""
    dataset: str | None = None
    """Dataset that holds `rgb` and the labels; or `images`."""
    storage: StoreSettings | None = None
    """(free) How an S3 dataset is reached."""
    images: str | None = None
    """Classification: local folder with a folder of pictures for each class, or with two such, `train` and `val`."""
    label: str | None = None
    """Dense tasks: the modality of the labels; by default that of the task's name."""
    labels: str | None = None
    """Classification of a dataset: CSV or Parquet file with the columns `key` and `label`."""
    label_field: str | None = None
    """Or where the class is in the dataset's `source`, such as `metadata.class`."""
    image_size: int = Field(default=224, ge=16)
    """Side of the square that the network sees; positions are interpolated if it was pretrained on another."""
    min_scale: float = Field(default=0.5, gt=0, le=1)
    """Smallest area of a training crop, as a share of the picture's."""
    flip: bool = True
    """Mirror training crops half of the time."""
    freeze_encoder: bool = False
    """Train the head alone; with classification it is linear probing."""
    layer_decay: float = Field(default=0.75, gt=0, le=1)
    """The learning rate of each layer is this times that of the layer above it."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth: share of samples that skip each branch of the last block in training; 0 at the first block."""
    head_width: int = Field(default=96, ge=8)
    """Dense tasks: channels of the head, at a quarter of a patch's side."""
    head_depth: int = Field(default=2, ge=0)
    """Dense tasks: ConvNeXt blocks in the head; MultiMAE has 4."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Classification: share of each target that is spread over all classes."""
    batch_size: int = Field(default=64, ge=1)
    """Samples per step."""
    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    lr: float = Field(default=1e-3, gt=0)
    """Highest learning rate, that of the head; it falls to 0 as a cosine."""
    warmup: int = Field(default=50, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW's decoupled decay of matrices; norms, biases and single vectors have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averages."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; None: unclipped."""
    seed: int = Field(default=0, ge=0)
    """New weights, chosen samples, order, crops and dropped paths are functions of it."""
    train_samples: int | None = Field(default=None, ge=1)
    """Train on this many samples only, drawn by the seed."""
    held_out: float = Field(default=0.125, ge=0, lt=1)
    """Share of the samples, by a hash of the key, that are never trained on: those that pretraining holds out."""
    eval_samples: int = Field(default=1024, ge=1)
    """Most held-out samples that an evaluation looks at."""
    autocast: bool = False
    """Compute in bfloat16; weights and optimizer stay float32."""
    cache_bytes: int = Field(default=512 << 20, ge=0)
    """(free) Memory for decoded pictures and labels."""
    device: str = "auto"
    """(free) 'auto' takes a GPU if there is one; or 'cpu', 'cuda', 'cuda:1'."""
    num_threads: int | None = Field(default=None, ge=1)
    """(free) CPU threads of torch; None: as many as there are cores."""
    eval_every: int = Field(default=500, ge=1)
    """(free) Steps between evaluations; there is always one at the end."""
    checkpoint_every: int = Field(default=500, ge=1)
    """(free) Steps between training states from which a stopped run continues."""
    log_every: int = Field(default=20, ge=1)
    """(free) Steps between progress reports."""
    tensorboard: bool | None = None
    """(free) Write TensorBoard scalars into `out`; None: if `out` is a local folder."""

    @property
    def label_modality(self) -> str:
        """Of a dense task."""
        return self.label or self.task

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        if (self.dataset is None) == (self.images is None):
            raise ValueError("give either `dataset` or `images`")
        if self.task != "classification":
            given = [n for n in ("images", "labels", "label_field") if getattr(self, n) is not None]
            if given:
                raise ValueError(f"`{given[0]}` is of classification; {self.task} has maps of the dataset as labels")
        elif self.dataset is not None and (self.labels is None) == (self.label_field is None):
            raise ValueError("classification of a dataset needs either `labels` or `label_field`")
        return self
