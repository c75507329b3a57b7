"""Where a dataset's shards come from: a folder, object storage through the cache, or tars. One interface for all.

A shard goes by its place: 0, 1, … in the order of the shard numbers. What is opened is a buffer with a whole shard
object, Arrow inside; where the shard lies decides only how it gets there.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from fourmill.model.checks import Records, read_records
from fourmill.model.config import PIXELS
from fourmill.model.data.cache import ShardCache
from fourmill.model.data.options import WINDOW, DataConfig
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.manifest.samples import opened
from fourmill.pipeline.shards import Spec, digest
from fourmill.pipeline.store import Store
from fourmill.pipeline.store.ranges import RangeFile

_END = 64 << 10  # bytes: a thousand keys of 30 bytes, and a footer of some hundred quarantined rows


class Source(Protocol):
    """Pickles; safe to use from threads.

    `numbers`: shard numbers, ascending. `rows`: of each shard, int64. `specs`: by modality. `digest`: of all that is
    read. `keys_digest`: of the keys. `window`: shards shuffled together, None for all.
    """

    uri: str
    numbers: np.ndarray
    rows: np.ndarray
    specs: dict[str, Spec]
    digest: str
    keys_digest: str
    window: int | None

    def has(self, name: str) -> np.ndarray:
        """bool (shards,): whether the modality has an object there."""

    def present(self, name: str) -> np.ndarray:
        """int64 (shards,): rows with a value, 0 where there is no object."""

    def open(self, name: str, place: int) -> pa.Buffer:
        """The object's bytes, mapped or in memory."""

    def keys(self, place: int) -> list[str]:
        """The keys of a shard, as little else as possible read."""

    def prefetch(self, places: Iterable[int]) -> None:
        """These shards will be opened soon."""

    def close(self) -> None:
        """Stop what runs in threads."""

    def forked(self) -> None:
        """Forget locks and threads: this process was forked, they belong to its parent."""


class ManifestSource:
    """A dataset by its newest snapshot: files are mapped where they are, objects through the cache."""

    def __init__(self, store: Store, names: tuple[str, ...], config: DataConfig) -> None:
        self.store, self.uri, self.config = store, store.uri, config
        manifest = read_manifest(store)
        self.records = read_records(manifest, names, store.uri, config.mixed_generations)
        self.specs = {name: Spec.from_json(found.spec) for name, found in self.records.items()}
        self.numbers = np.unique(np.concatenate([found.shards for found in self.records.values()]))
        self._at = {name: _places(found, self.numbers) for name, found in self.records.items()}
        self.rows = np.zeros(len(self.numbers), np.int64)
        for name, found in self.records.items():
            self.rows[self._at[name] >= 0] = found.rows
        names_of = ((f, i) for _, f in sorted(self.records.items()) for i in range(len(f.shards)))
        self.digest = digest(*(f"{found.object_name(i)} {found.digest(i)}" for found, i in names_of))
        self.keys_digest = _keys_digest(manifest, self.records)
        self.local = store.local_path("any") is not None
        self.window = config.shuffle_shards or (None if self.local else WINDOW)
        self.cache = None if self.local else ShardCache(config.shard_cache)
        if self.cache is not None:
            self._check_room(self.cache)
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def _check_room(self, cache: ShardCache) -> None:
        """Two windows of the largest shards must fit, or every batch would download what the last one threw out."""
        largest = np.zeros(len(self.numbers), np.int64)
        for name, found in self.records.items():
            largest[self._at[name] >= 0] += found.num_bytes
        need = int(np.sort(largest)[::-1][: 2 * (self.window or len(largest))].sum())
        if need > cache.config.max_bytes:
            raise ValueError(
                f"shard_cache.max_bytes {cache.config.max_bytes} is too small: two windows of {self.window} shards of"
                f" {self.uri} take {need} bytes; raise it, or lower shuffle_shards"
            )

    def has(self, name: str) -> np.ndarray:
        return np.asarray(self._at[name] >= 0)

    def present(self, name: str) -> np.ndarray:
        counts = np.zeros(len(self.numbers), np.int64)
        counts[self.has(name)] = self.records[name].present
        return counts

    def open(self, name: str, place: int) -> pa.Buffer:
        found, at = self.records[name], int(self._at[name][place])
        object_name = found.object_name(at)
        path = self.store.local_path(object_name)
        if path is None:
            assert self.cache is not None
            return self.cache.open(*self._wanted(name, at))
        if not path.is_file():
            raise FileNotFoundError(f"no object {object_name} in {self.store.uri}")
        return pa.memory_map(str(path)).read_buffer()

    def _wanted(self, name: str, at: int) -> Any:
        found = self.records[name]
        object_name = found.object_name(at)

        def ranges(start: int, length: int) -> bytes:
            return self.store.get_range(object_name, start, length)

        return object_name, int(found.num_bytes[at]), found.digest(at), ranges

    def keys(self, place: int) -> list[str]:
        name = self.lead(place)
        found, at = self.records[name], int(self._at[name][place])
        object_name, num_bytes = found.object_name(at), int(found.num_bytes[at])
        # Arrow asks for some 100 bytes at a time; from object storage each would be a request.
        file = opened(self.store, object_name, num_bytes) if self.local else _Ends(self.store, object_name, num_bytes)
        options = pa.ipc.IpcReadOptions(included_fields=[0])
        return list(pa.ipc.open_file(file, options=options).read_all()["key"].to_pylist())

    def lead(self, place: int) -> str:
        """The modality that a shard's keys are read from: tokens rather than pictures, whose shards are large."""
        there = [name for name in self.records if self._at[name][place] >= 0]
        return min(there, key=lambda name: name == PIXELS)

    def prefetch(self, places: Iterable[int]) -> None:
        if self.cache is None:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.config.shard_cache.threads, "prefetch")
        for place in places:
            for name in self.records:
                if self._at[name][place] >= 0:
                    wanted = self._wanted(name, int(self._at[name][place]))
                    self._pool.submit(self.cache.fetch, *wanted)  # what fails will fail again when it is opened

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def forked(self) -> None:
        self._pool = None


class _Ends(RangeFile):
    """An object of which the beginning, where the keys are, and the end, where the footer is, are read in one request
    each; anything else as it is asked for."""

    def __init__(self, store: Store, name: str, num_bytes: int) -> None:
        super().__init__(store, name, num_bytes)
        self._parts: dict[int, bytes] = {}

    def fetch(self, start: int, stop: int) -> bytes:
        for first in (0, max(self.num_bytes - _END, 0)):
            if first <= start and stop <= first + _END:
                if first not in self._parts:
                    self._parts[first] = self.store.get_range(self.name, first, _END)
                return self._parts[first][start - first : stop - first]
        return super().fetch(start, stop)


def in_threads(function: Any, items: Iterable[Any], threads: int) -> list[Any]:
    """`function` of each item, in order."""
    with ThreadPoolExecutor(threads, "read") as pool:
        return list(pool.map(function, items))


def _places(found: Records, numbers: np.ndarray) -> np.ndarray:
    """int32: for each shard its place in the modality's records, -1 where it has none."""
    at = np.full(len(numbers), -1, np.int32)
    at[np.searchsorted(numbers, found.shards)] = np.arange(len(found.shards))
    return at


def _keys_digest(manifest: Manifest, records: dict[str, Records]) -> str:
    """Of which key is in which row of which shard."""
    blocks = ((name, block, info) for name in sorted(records) for block, info in sorted(manifest.blocks[name].items()))
    return digest(*(f"{name} {block} {info.keys}" for name, block, info in blocks))
