"""Runs one component on batches: of a size that the device holds, and without letting one sample spoil the others.

Out of memory halves the batch, for good; any other exception is pinned on the samples that raise it alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fourmill.pipeline.component import Batch, Component, Failure
from fourmill.pipeline.geometry import Crop

log = logging.getLogger("fourmill.worker")

CPU_BATCH = 16  # a CPU gains nothing beyond it, and smaller batches overlap better with decoding
_LARGEST = 512
_GAIN = 1.05  # a doubled batch must bring at least so much more speed to be kept


class Batches:
    """One component with its batch size."""

    def __init__(self, component: Component, device: str, crop_size: int) -> None:
        self.component = component
        self.notes: list[str] = []
        self.size = component.config.batch_size or CPU_BATCH
        if device.startswith("cuda") and tuple(component.reads) == ("rgb",):
            self._warm_up(crop_size)

    def _warm_up(self, crop_size: int) -> None:
        """One batch compiles kernels and picks algorithms; without a given size, also find the fastest."""
        run = _timed(self.component, crop_size)
        if self.component.config.batch_size is not None:
            run(self.size)
            return
        self.size = fastest(run)
        self.notes.append(f"{self.component.name}: batches of {self.size} are fastest on this device")

    def take_notes(self) -> list[str]:
        """What was unusual since the last call."""
        taken, self.notes = self.notes, []
        return taken

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        """For each modality that the component makes, one value, Failure or None for each sample of the batch."""
        made: dict[str, list[Any]] = {m: [] for m in self.component.makes}
        done = 0
        while done < len(batch):
            part = batch.select(range(done, min(done + self.size, len(batch))))
            for name, values in self._attempt(part).items():
                made[name] += values
            done += len(part)
        return made

    def _attempt(self, batch: Batch) -> dict[str, list[Any]]:
        """One call; where it fails, calls on parts of the batch."""
        try:
            return self._call(batch)
        except Exception as error:
            if _out_of_memory(error) and self._halve(len(batch)):
                self._note(batch, error)
                return self.run(batch)
            if len(batch) == 1:
                log.warning("%s failed on %s: %s", self.component.name, batch.keys[0], error, exc_info=True)
                return {m: [Failure(f"{type(error).__name__}: {error}")] for m in self.component.makes}
            self._note(batch, error)
        singles = [self._attempt(batch.select([row])) for row in range(len(batch))]
        return {m: [single[m][0] for single in singles] for m in self.component.makes}

    def _call(self, batch: Batch) -> dict[str, list[Any]]:
        count = len(batch)
        if self.component.fixed_batches and count < self.size:
            batch = batch.select([*range(count), *[count - 1] * (self.size - count)])
        made = self.component.run(batch)
        if any(len(values) != len(batch) for values in made.values()):
            lengths = {m: len(v) for m, v in made.items()}
            raise ValueError(f"{self.component.name} returned {lengths} values for {len(batch)} samples")
        return {m: values[:count] for m, values in made.items()}

    def _halve(self, count: int) -> bool:
        """Whether there was anything left to halve."""
        held = self.size if self.component.fixed_batches else count
        self.size = max(1, held // 2)
        return held > 1

    def _note(self, batch: Batch, error: Exception) -> None:
        what = f"batch of {len(batch)} split after {type(error).__name__}: {error}"
        self.notes.append(f"{self.component.name}: {what}")


def fastest(run: Callable[[int], float]) -> int:
    """The batch size to use, given `run(size)` -> seconds: doubled from 8 while speed grows by 5 % and memory lasts."""
    best, rate, size = 1, 0.0, 8
    while size <= _LARGEST:
        try:
            found = size / max(run(size), 1e-9)
        except Exception as error:
            if not _out_of_memory(error):
                raise
            break
        if found < _GAIN * rate:
            break
        best, rate, size = size, found, size * 2
    return best


def _timed(component: Component, crop_size: int) -> Callable[[int], float]:
    """Seconds that the component takes for so many grey pictures with noise; the first call of a size is not timed."""

    def run(size: int) -> float:
        pixels = np.random.default_rng(0).integers(96, 160, (size, 3, crop_size, crop_size), dtype=np.uint8)
        crop = Crop(0, 0, crop_size, crop_size, 0)
        views = {m: [None] * size for m in component.also_reads}
        batch = Batch([f"warm-up {i}" for i in range(size)], pixels, views, [crop] * size)
        component.run(batch)
        start = time.perf_counter()
        component.run(batch)
        return time.perf_counter() - start

    return run


def _out_of_memory(error: Exception) -> bool:
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True
    return False
