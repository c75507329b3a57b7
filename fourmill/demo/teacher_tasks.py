"""The table of the demo teachers that can be trained."""

from __future__ import annotations

from collections.abc import Callable

from fourmill.demo.teacher_dense import DepthTask, NormalTask, SemsegTask
from fourmill.demo.teacher_objects import DetectionTask, PanopticTask
from fourmill.demo.teacher_parts import Task
from fourmill.demo.teacher_sam import SamTask
from fourmill.demo.teacher_words import CaptionTask, ClipTask
from fourmill.scenes.cache import SceneCache

TASKS: dict[str, Callable[[SceneCache], Task]] = {
    "depth": DepthTask,
    "normal": NormalTask,
    "semseg": SemsegTask,
    "panoptic": PanopticTask,
    "detection": DetectionTask,
    "sam": SamTask,
    "clip": ClipTask,
    "caption": CaptionTask,
}
