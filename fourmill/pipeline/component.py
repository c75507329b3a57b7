"""What labelers and tokenizers have in common: a part of a stage that turns some modalities into others.

A component is cheap to construct on the driver, where the plan asks it for its lineage; it loads its weights in
`load` on the worker, once, and then maps one batch after another. It never sees shards, stores or Ray.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fourmill.checkpoints import Checkpoint, resolve
from fourmill.pipeline.geometry import Crop
from fourmill.pipeline.shards import Spec


@dataclass(frozen=True)
class Failure:
    """In place of a value that could not be made; `reason` begins with a short kind and a colon."""

    reason: str


@dataclass(frozen=True)
class Batch:
    """B samples at one crop.

    `pixels`: uint8 (B, 3, S, S), the crop of each picture, for components that read `rgb`; else None.
    `views`: for every other modality that the component reads, its B values; those of `also_reads` may be None.
    `crops`: each sample's crop, for components that read `rgb`; `crop_index`: which of its crops this is.
    """

    keys: Sequence[str]
    pixels: np.ndarray | None = None
    views: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    crops: Sequence[Crop] = ()
    crop_index: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, rows: Sequence[int]) -> Batch:
        """The same batch with only these rows; a row may come more than once."""
        return Batch(
            [self.keys[i] for i in rows],
            None if self.pixels is None else self.pixels[list(rows)],
            {name: [values[i] for i in rows] for name, values in self.views.items()},
            [self.crops[i] for i in rows] if self.crops else (),
            self.crop_index,
        )


class ComponentConfig(BaseModel):
    """What every component's configuration has; each class adds its own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """Which class: a name in the table of labelers or tokenizers."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples per call; by default 16 on a CPU, and on a GPU as many as still gain speed. Halved when the device runs
    out of memory. Not part of the fingerprint."""


class Component(ABC):
    """A labeler or a tokenizer. Subclasses set the class attributes and `Config`, and implement `run`."""

    Config: ClassVar[type[ComponentConfig]]
    version: ClassVar[int] = 1
    """Raise it whenever the same inputs and configuration would give other outputs: old shards become stale."""
    gpus: ClassVar[float] = 0.0
    """GPUs that it wants where there are any; the stage's configuration overrides it."""
    licence: ClassVar[str] = "Apache-2.0"
    """Licence of the code that it runs; that of the weights comes with the checkpoint."""
    fixed_batches: bool = False
    """Whether every call must have `batch_size` samples (a compiled network); the worker fills the last one up."""

    def __init__(self, name: str, config: ComponentConfig) -> None:
        self.name, self.config = name, config

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """Modalities it needs, all present, to make anything."""

    @property
    @abstractmethod
    def makes(self) -> tuple[str, ...]:
        """Modalities it makes."""

    @abstractmethod
    def spec(self, modality: str) -> Spec:
        """What readers must know of the values of one modality it makes (its `crops` is filled in by the stage)."""

    @property
    def also_reads(self) -> tuple[str, ...]:
        """Modalities it takes into account where a sample has them; their absence stops nothing."""
        return ()

    def lineage(self) -> dict[str, Any]:
        """Everything that determines the output besides the inputs: it goes into the fingerprint and the manifest."""
        fields = self.config.model_dump(mode="json", exclude={"batch_size"})
        maker = {"class": type(self).__qualname__, "version": self.version, "licence": self.licence}
        return {**maker, "config": fields}

    def load(self, device: str) -> None:  # noqa: B027  (most classical components have nothing to load)
        """Load weights onto `device` ('cpu', 'cuda:0'); once per worker."""

    @abstractmethod
    def run(self, batch: Batch) -> dict[str, list[Any]]:
        """For each modality in `makes`, B values, `Failure`s, or None (nothing to make, nothing wrong).

        An exception condemns the batch, not the shard: the worker tries its samples one by one.
        """

    def take_notes(self) -> list[str]:
        """What was unusual since the last call, for the run's report: things dropped, and how many."""
        return []


class PretrainedConfig(ComponentConfig):
    """Configuration of a component with weights or a vocabulary."""

    checkpoint: str
    """Hub id (optionally `@revision`), local folder or file of weights, s3:// URI, or `demo:NAME`."""


class Pretrained(Component):
    """A component with a checkpoint, resolved on first use; its digest enters the lineage."""

    gpus: ClassVar[float] = 1.0
    config: PretrainedConfig

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        return resolve(self.config.checkpoint)

    def lineage(self) -> dict[str, Any]:
        # The digest stands for the weights; where they lay does not change what is made.
        lineage = super().lineage()
        lineage["config"].pop("checkpoint")
        return {**lineage, "checkpoint": self.checkpoint.lineage()}
