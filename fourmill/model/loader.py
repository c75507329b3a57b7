"""The order in which samples are trained on: one seeded permutation of all of them per epoch, and where we are in it.

The state is three integers. Restoring it continues the same sequence of samples, also with another number of ranks:
a step takes the next `batch_size` samples of the sequence and each rank takes its share of them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from fourmill.model.batch import RawBatch
from fourmill.model.data import TokenDataset


class Loader:
    """An endless iterator of batches over the training samples; batches run over the ends of epochs.

    `batch_size` counts samples of all ranks. Each batch carries the state after it, so that a batch that was read
    ahead but not used is not lost when the state is saved.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        seed: int,
        *,
        crop: int | Literal["random"] = "random",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if crop != "random" and not 0 <= crop < dataset.crops:
            raise ValueError(f"crop {crop}: the dataset has crops 0 to {dataset.crops - 1}")
        self.dataset, self.batch_size, self.crop = dataset, batch_size, crop
        self.rank, self.world_size = rank, world_size
        self.seed, self.epoch, self.position = seed, 0, 0
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch, and samples taken of this epoch."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._order = None

    def __iter__(self) -> Iterator[RawBatch]:
        return self

    def __next__(self) -> RawBatch:
        samples, crops = self._take(self.batch_size)
        mine = slice(self.rank, None, self.world_size)
        return self.dataset.batch(samples[mine], crops[mine], self.state_dict())

    def _take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next samples of the sequence and their crops."""
        samples, crops = [], []
        while count:
            order, crop = self._epoch_order()
            part = slice(self.position, self.position + count)
            samples.append(order[part])
            crops.append(crop[part])
            taken = len(samples[-1])
            count, self.position = count - taken, self.position + taken
            if self.position == len(order):
                self.epoch, self.position = self.epoch + 1, 0
        return np.concatenate(samples), np.concatenate(crops)

    def _epoch_order(self) -> tuple[np.ndarray, np.ndarray]:
        if self._order is None or self._order[0] != self.epoch:
            rng = np.random.default_rng([self.seed, self.epoch])
            order = rng.permutation(self.dataset.train)
            crops = rng.integers(self.dataset.crops, size=len(order)) if self.crop == "random" else None
            self._order = (self.epoch, order, np.full(len(order), self.crop) if crops is None else crops)
        return self._order[1:]


def read_ahead(loader: Loader) -> Generator[RawBatch, None, None]:
    """The loader's batches, the next one prepared in a thread while the last one is used."""
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        coming = pool.submit(next, loader)
        while True:
            batch = coming.result()
            coming = pool.submit(next, loader)
            yield batch


def in_order(dataset: TokenDataset, samples: np.ndarray, batch_size: int, crop: int = 0) -> Iterator[RawBatch]:
    """Each of these samples once, for evaluation; the last batch may be smaller."""
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        yield dataset.batch(part, np.full(len(part), crop))
