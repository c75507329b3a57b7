"""The labeler: one specialist teacher, or one classical algorithm, that turns pictures into a label modality.

A teacher's network goes through `Teacher.adopt` and its pictures through `Teacher.on_device`: precision, memory layout,
compilation and transfer are decided there once for all.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from fourmill.pipeline.component import Batch, Component, ComponentConfig, Pretrained, PretrainedConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LabelerConfig(ComponentConfig):
    """Configuration of a labeler without weights."""


class TeacherConfig(LabelerConfig, PretrainedConfig):
    """Configuration of a labeler whose teacher is a network."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of matrix products and convolutions (autocast; weights stay float32). 'auto': float32 on a CPU, so that labels
    are reproducible; bfloat16 on a GPU."""
    compile: bool = False
    """Compile the network with torch.compile for one static batch shape: minutes once, then faster on a GPU."""


class Labeler(Component):
    """A component that labels: subclasses have `reads`, `makes`, `spec`, `run`, and `load` if there are weights."""


class Teacher(Pretrained, Labeler):
    """A labeler with a checkpoint, which looks at pictures."""

    Config: ClassVar[type[ComponentConfig]] = TeacherConfig
    config: TeacherConfig
    device: torch.device

    @property
    def reads(self) -> tuple[str, ...]:
        return ("rgb",)

    @property
    def fixed_batches(self) -> bool:  # type: ignore[override]
        return self.config.compile

    def load(self, device: str) -> None:
        """Subclasses call this first, then load their network and `adopt` it."""
        self.device = torch.device(device)

    def adopt(self, model: Any) -> Any:
        """A network ready to run: evaluation mode, no gradients, on the device, in the layout that it likes best."""
        model = model.eval().requires_grad_(False).to(self.device)
        if self._dtype() is not torch.float32 and any(isinstance(m, torch.nn.Conv2d) for m in model.modules()):
            # Half-precision convolutions run in channels_last on GPUs and AVX-512 CPUs alike; in the other layout
            # bfloat16 was slower than float32 (2.44 CPU-s for DPT-hybrid, 0.97 with it).
            model = model.to(memory_format=torch.channels_last)
        if self.config.compile:
            model.compile(dynamic=False)  # in place: the module keeps its class, its configuration and `generate`
        return model

    def on_device(self, batch: Batch) -> torch.Tensor:
        """The batch's pictures as uint8 (B, 3, S, S) on the device."""
        assert batch.pixels is not None
        pixels = torch.from_numpy(np.require(batch.pixels, requirements=["C", "W"]))
        if self.device.type == "cuda":
            return pixels.pin_memory().to(self.device, non_blocking=True)
        return pixels.to(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision asked for, around a network's forward pass."""
        dtype = self._dtype()
        return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(self.device.type, dtype=dtype)

    def _dtype(self) -> torch.dtype:
        if self.config.precision == "auto":
            return torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return _DTYPES[self.config.precision]
