"""The order in which one dataset's training samples come, each once an epoch: a function of seed and epoch alone.

A folder's samples are permuted all together. From object storage that would fetch a shard for every sample, so there
the shards are permuted, and the samples within windows of some shards. Neither knows of ranks, workers or caches.
Numbers are drawn from `default_rng([seed, epoch])` for a dataset that is alone, and with the numbers of its window and
of its part of a mixture, from 1 on, where there are some.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from fourmill.model.data.dataset import TokenDataset

_CHUNK = 1 << 20  # crops drawn at a time: 8 bytes each until they are kept in one


class Order:
    """Samples and their crops by epoch and position. Keeps one epoch (5 bytes a sample), or two windows, in memory.

    `ahead`: have the dataset prefetch the window that is read and the next one.
    """

    def __init__(
        self, dataset: TokenDataset, crop: int | Literal["random"], part: int = 0, *, ahead: bool = True
    ) -> None:
        self.dataset, self.crop, self.part, self.ahead = dataset, crop, part, ahead
        self.window = dataset.source.window
        self._epoch: tuple[tuple[int, ...], np.ndarray, np.ndarray] | None = None
        self._shards: tuple[tuple[int, ...], np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.dataset.train)

    def take(self, seed: int, epoch: int, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next samples from a position on, and their crops; fewer where a window or the epoch ends."""
        if self.window is None:
            start, samples, crops = 0, *self._whole(seed, epoch)
        else:
            start, samples, crops = self._window(seed, epoch, position)
        part = slice(position - start, position - start + count)
        return samples[part], crops[part]

    def _rng(self, seed: int, epoch: int, window: int = 0) -> np.random.Generator:
        more = [window, self.part] if window or self.part else []  # zeros at the end would matter to a seed above 2^32
        return np.random.default_rng([seed, epoch, *more])

    def _whole(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            self._epoch = None  # the last epoch's is not needed while this one is made
            rng = self._rng(seed, epoch)
            order = rng.permutation(self.dataset.train)
            self._epoch = (seed, epoch), order, self._crops(rng, len(order))
        return self._epoch[1:]

    def _crops(self, rng: np.random.Generator, count: int) -> np.ndarray:
        dtype = np.uint8 if self.dataset.crops <= 1 << 8 else np.int32
        if self.crop != "random":
            return np.full(count, self.crop, dtype)
        crops = np.empty(count, dtype)
        for start in range(0, count, _CHUNK):
            size = min(_CHUNK, count - start)
            crops[start : start + size] = rng.integers(self.dataset.crops, size=size)
        return crops

    def _window(self, seed: int, epoch: int, position: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The window that holds a position: where it starts in the epoch, its samples and their crops."""
        shards, starts = self._shard_order(seed, epoch)
        number = int(np.searchsorted(starts, position, side="right")) - 1
        if self._epoch is None or self._epoch[0] != (seed, epoch, number):
            train, bounds = self.dataset.train, self.dataset.starts
            mine = self._of(shards, number)
            ends = np.searchsorted(train, np.stack([bounds[mine], bounds[mine + 1]]))
            samples = np.concatenate([train[a:b] for a, b in ends.T])
            rng = self._rng(seed, epoch, number + 1)
            self._epoch = (seed, epoch, number), rng.permutation(samples), self._crops(rng, len(samples))
            if self.ahead:
                self.dataset.source.prefetch([*mine, *self._next(seed, epoch, shards, number)])
        return int(starts[number]), *self._epoch[1:]

    def _of(self, shards: np.ndarray, number: int) -> np.ndarray:
        assert self.window is not None
        return shards[number * self.window : (number + 1) * self.window]

    def _next(self, seed: int, epoch: int, shards: np.ndarray, number: int) -> np.ndarray:
        """The shards of the window after this one, in the next epoch after the last."""
        following = self._of(shards, number + 1)
        return following if len(following) else self._of(self._permuted(seed, epoch + 1)[0], 0)

    def _shard_order(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards with training samples in this epoch's order, and the position at which each window starts."""
        if self._shards is None or self._shards[0] != (seed, epoch):
            self._shards = (seed, epoch), *self._permuted(seed, epoch)
        return self._shards[1:]

    def _permuted(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        counts = np.diff(np.searchsorted(self.dataset.train, self.dataset.starts))
        shards = self._rng(seed, epoch).permutation(np.flatnonzero(counts))
        sums = np.concatenate([[0], np.cumsum(counts[shards])])
        return shards, sums[: -1 : self.window]
