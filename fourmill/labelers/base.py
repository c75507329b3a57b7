"""The labeler: one specialist teacher, or one classical algorithm, that turns pictures into a label modality."""

from __future__ import annotations

from typing import ClassVar

from fourmill.pipeline.component import Component, ComponentConfig, Pretrained, PretrainedConfig


class LabelerConfig(ComponentConfig):
    """Configuration of a labeler without weights."""


class TeacherConfig(LabelerConfig, PretrainedConfig):
    """Configuration of a labeler whose teacher is a network."""

    autocast: bool = False
    """Run in bfloat16 autocast where the device gains from it. Off by default on a CPU: labels stay reproducible."""


class Labeler(Component):
    """A component that labels: subclasses have `reads`, `makes`, `spec`, `run`, and `load` if there are weights."""


class Teacher(Pretrained, Labeler):
    """A labeler with a checkpoint, which looks at pictures."""

    Config: ClassVar[type[ComponentConfig]] = TeacherConfig
    config: TeacherConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("rgb",)
