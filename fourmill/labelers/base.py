"""The labeler: one specialist teacher, or one classical algorithm, that turns pictures into a label modality."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from fourmill.checkpoints import Checkpoint, resolve
from fourmill.pipeline.component import Component, ComponentConfig


class LabelerConfig(ComponentConfig):
    """Configuration of a labeler without weights."""


class TeacherConfig(LabelerConfig):
    """Configuration of a labeler whose teacher is a network."""

    checkpoint: str
    """Hub id (optionally `@revision`), local folder, s3:// URI, or `demo:NAME`."""
    autocast: bool = False
    """Run in bfloat16 autocast where the device gains from it. Off by default on a CPU: labels stay reproducible."""


class Labeler(Component):
    """A component that labels: subclasses have `reads`, `makes`, `spec`, `run`, and `load` if there are weights."""


class Teacher(Labeler):
    """A labeler with a checkpoint. `checkpoint` is resolved once, on first use; its digest enters the lineage."""

    Config: ClassVar[type[ComponentConfig]] = TeacherConfig
    gpus: ClassVar[float] = 1.0
    config: TeacherConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("rgb",)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        return resolve(self.config.checkpoint)

    def lineage(self) -> dict[str, Any]:
        # The digest stands for the weights; where they lay does not change a label.
        lineage = super().lineage()
        lineage["config"].pop("checkpoint")
        return {**lineage, "checkpoint": self.checkpoint.lineage()}
