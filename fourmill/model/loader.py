"""Which samples a step is trained on: a seeded sequence over all of them, dealt out to ranks, and where we are in it.

The state is a seed and two integers for each dataset. Restoring it continues the same sequence, also with another
number of ranks or accumulated slices: a step takes the next `batch_size` samples of the sequence, whoever gets them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from fourmill.model.batch import RawBatch
from fourmill.model.data import Mixture, TokenDataset
from fourmill.model.data.mixture import Draw
from fourmill.model.data.order import Order


class Traced(NamedTuple):
    """One sample of a step. `dataset`: its URI."""

    dataset: str
    shard: int
    row: int
    key: str
    crop: int


class Loader:
    """An endless iterator over the training samples; a step runs over the ends of epochs.

    `batch_size` counts the samples of a step, over all ranks. They are dealt into `world_size` x `accumulate` slices,
    slice i has every so many-th sample from the i-th on; a rank gets `accumulate` slices in a row, a tuple of batches.
    Each carries the state after the step, so that a step that was read ahead but not used is not lost when the state is
    saved. Pickles.
    """

    def __init__(
        self,
        dataset: TokenDataset | Mixture,
        batch_size: int,
        seed: int,
        *,
        crop: int | Literal["random"] = "random",
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        if crop != "random" and not 0 <= crop < dataset.crops:
            raise ValueError(f"crop {crop}: the dataset has crops 0 to {dataset.crops - 1}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}: ranks go from 0 to {world_size - 1}")
        if batch_size < world_size * accumulate:
            raise ValueError(f"batch_size {batch_size}: {world_size} ranks x {accumulate} slices need one sample each")
        self.dataset, self.batch_size, self.seed, self.crop = dataset, batch_size, seed, crop
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.parts = dataset.parts if isinstance(dataset, Mixture) else (dataset,)
        self._firsts = dataset.firsts[:-1] if isinstance(dataset, Mixture) else np.zeros(1, np.int64)
        self._draw = Draw(dataset.weights) if isinstance(dataset, Mixture) else None
        self._orders = self._new_orders()
        self._places = [(0, 0)] * len(self.parts)  # (epoch, position) in each dataset

    def _new_orders(self, ahead: bool = True) -> list[Order]:
        alone = self._draw is None
        return [Order(d, self.crop, 0 if alone else k + 1, ahead=ahead) for k, d in enumerate(self.parts)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._orders = self._new_orders()

    def state_dict(self) -> dict[str, int]:
        """`seed`, `epoch` and `position`, the samples taken of this epoch; in a mixture `epoch_k` and `position_k`."""
        state = {"seed": self.seed}
        for k, (epoch, position) in enumerate(self._places):
            end = "" if self._draw is None else f"_{k}"
            state |= {f"epoch{end}": epoch, f"position{end}": position}
        return state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """ValueError for the state of another number of datasets."""
        ends = [""] if self._draw is None else [f"_{k}" for k in range(len(self.parts))]
        if set(state) != {"seed", *(f"{what}{end}" for what in ("epoch", "position") for end in ends)}:
            raise ValueError(f"{sorted(state)} is not the state of a loader of {len(self.parts)} datasets")
        self.seed = state["seed"]
        self._places = [(state[f"epoch{end}"], state[f"position{end}"]) for end in ends]

    def realised(self) -> dict[str, int]:
        """Samples taken so far, by dataset."""
        taken = zip(self.parts, self._orders, self._places, strict=True)
        return {d.uri: epoch * len(order) + position for d, order, (epoch, position) in taken}

    def __iter__(self) -> Iterator[tuple[RawBatch, ...]]:
        return self

    def __next__(self) -> tuple[RawBatch, ...]:
        samples, crops, self._places = self._take(self._orders, self._places)
        state, slices = self.state_dict(), self.world_size * self.accumulate
        mine = range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate)
        return tuple(self.dataset.batch(samples[i::slices], crops[i::slices], state) for i in mine)

    def trace(self, step: int) -> list[Traced]:
        """The samples of a step, in the order of the sequence; step 0 is the first after the seed. Reads keys only.

        Slice i of the step has every (world_size x accumulate)-th of them from the i-th on.
        """
        if step < 0:
            raise ValueError(f"step {step}: steps count from 0")
        start, orders = step * self.batch_size, self._new_orders(ahead=False)
        before = [start] if self._draw is None else self._draw.before(self.seed, start)
        places = [divmod(int(n), len(order)) for n, order in zip(before, orders, strict=True)]
        samples, crops, _ = self._take(orders, places)
        part_B = np.searchsorted(self._firsts, samples, side="right") - 1
        found = []
        for sample, crop, k, key in zip(samples, crops, part_B, self.dataset.keys(samples), strict=True):
            dataset = self.parts[k]
            place, row = dataset.place(np.array([sample - self._firsts[k]]))
            found.append(Traced(dataset.uri, int(dataset.source.numbers[place[0]]), int(row[0]), key, int(crop)))
        return found

    def _take(
        self, orders: list[Order], places: list[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """The next step's samples and crops from these places on, and the places after it."""
        samples, crops = np.zeros(self.batch_size, np.int64), np.zeros(self.batch_size, np.int64)
        part_B = np.zeros(self.batch_size, np.int64)
        if self._draw is not None:
            start = sum(e * len(order) + p for order, (e, p) in zip(orders, places, strict=True))
            part_B = self._draw.take(self.seed, start, self.batch_size)
        after = []
        for k, order in enumerate(orders):
            epoch, position = places[k]
            at = np.flatnonzero(part_B == k)
            while len(at):
                chosen, crop = order.take(self.seed, epoch, position, len(at))
                samples[at[: len(chosen)]] = chosen + self._firsts[k]
                crops[at[: len(chosen)]] = crop
                at, position = at[len(chosen) :], position + len(chosen)
                if position == len(order):
                    epoch, position = epoch + 1, 0
            after.append((epoch, position))
        return samples, crops, after


def read_ahead(
    loader: Iterator[tuple[RawBatch, ...]], prepare: Callable[[tuple[RawBatch, ...]], Any] | None = None, depth: int = 1
) -> Generator[Any, None, None]:
    """What `prepare` makes of the loader's steps (the steps themselves by default), in order.

    One thread reads and prepares up to `depth` steps while others are used; an error there is raised here in its turn.
    Close the generator to end the thread.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()
    room, stop = threading.Semaphore(depth), threading.Event()

    def read() -> None:
        while True:
            room.acquire()
            if stop.is_set():
                return
            try:
                step = next(loader)
                ready.put((prepare(step) if prepare else step, None))
            except BaseException as error:
                ready.put((None, error))
                return

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            step, error = ready.get()
            room.release()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield step
    finally:
        stop.set()
        room.release()
        thread.join()


def in_order(
    dataset: TokenDataset | Mixture, samples: np.ndarray, batch_size: int, crop: int = 0
) -> Iterator[RawBatch]:
    """Each of these samples once, for evaluation; the last batch may be smaller."""
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        yield dataset.batch(part, np.full(len(part), crop))
