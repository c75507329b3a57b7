"""Datasets that lie as tars: what `fourmill manifest export --format webdataset` (or energon, parquet) wrote.

A tar is read whole, compared with its digest, and made into the shards that it was exported from, in memory; from there
on everything is as for a dataset of shards, so the samples are the same, only slower to come by: about 0.1 ms a value
when a window of tars is opened, and every tar is read once when the dataset is opened. Keys stay in memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.modalities import modality, unknown
from fourmill.model.data.options import WINDOW, DataConfig
from fourmill.model.data.source import ManifestSource, Source, in_threads
from fourmill.pipeline.exchange.layout import SUMMARY
from fourmill.pipeline.exchange.readers import ExportReader, part_of, read_summary
from fourmill.pipeline.exchange.rows import Part, Run
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.shards import digest, write_shard
from fourmill.pipeline.store import Store, StoreSettings, open_store

_LAYOUTS = ("webdataset", "energon", "parquet")
_KEPT = 2  # tars made into shards that are kept for the modalities still to be asked for


def open_source(uri: str, names: tuple[str, ...], config: DataConfig, storage: StoreSettings | None) -> Source:
    """What lies at `uri`: a dataset, or an export of one."""
    store = open_store(uri, storage)
    if store.head(SUMMARY) is not None:
        return ExportSource(store, names, config)
    return ManifestSource(store, names, config)


def modalities_at(uri: str, storage: StoreSettings | None) -> set[str]:
    """The modalities that a dataset or an export has."""
    store = open_store(uri, storage)
    summary = read_summary(store)
    return set(summary["modalities"]) if summary else set(read_manifest(store).modalities)


class ExportSource:
    """An export as a source of shards. ValueError if it has no such modality or is of another layout."""

    def __init__(self, store: Store, names: tuple[str, ...], config: DataConfig) -> None:
        summary = read_summary(store)
        assert summary is not None
        if summary["layout"] not in _LAYOUTS:
            raise ValueError(
                f"{store.uri} is an export as {summary['layout']!r}; what is read here: {', '.join(_LAYOUTS)};"
                " bring it into a dataset with `fourmill manifest import`"
            )
        self.reader, self.uri, self.names = ExportReader(store, summary), store.uri, names
        self._check(summary, config)
        self.specs = {name: self.reader.specs[name] for name in names}
        self.numbers = np.arange(len(self.reader))
        self.rows = np.array([part_of(store, n).rows for n in range(len(self.reader))], np.int64)
        self.window: int | None = config.shuffle_shards or WINDOW
        self.digest = digest(*names, *(f.digest for n in range(len(self.reader)) for f in part_of(store, n).files))
        self.keys_digest = self.digest
        self._keys: list[list[str]] = []
        self._present = {name: np.zeros(len(self.numbers), np.int64) for name in names}
        self._scan(config.shard_cache.threads)
        self.forked()

    def forked(self) -> None:
        self._lock = threading.Lock()
        self._made: OrderedDict[int, dict[str, pa.Buffer]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_made")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forked()

    def _check(self, summary: dict[str, Any], config: DataConfig) -> None:
        held = summary["modalities"]
        for name in self.names:
            modality(name)
            if name not in held:
                raise ValueError(f"{self.uri}: {unknown('modality', name, held)}")
            if len(held[name]["recipes"]) > 1 and not config.mixed_generations:
                raise ValueError(
                    f"{self.uri}: {name} is of {len(held[name]['recipes'])} generations; export it again when it is"
                    " done, or say mixed_generations: true"
                )

    def _scan(self, threads: int) -> None:
        """Read every tar once: its keys, and which values are there."""

        def facts(place: int) -> tuple[list[str], dict[str, int]]:
            run = self.reader.read(place)
            return run.keys, {name: _count(run.parts[name]) for name in self.names}

        for place, (keys, counts) in enumerate(in_threads(facts, range(len(self.numbers)), threads)):
            self._keys.append(keys)
            for name, count in counts.items():
                self._present[name][place] = count

    def has(self, name: str) -> np.ndarray:
        return np.ones(len(self.numbers), bool)

    def present(self, name: str) -> np.ndarray:
        return self._present[name]

    def open(self, name: str, place: int) -> pa.Buffer:
        with self._lock:
            if place not in self._made:
                run = self.reader.read(place)
                self._made[place] = {n: self._shard(n, place, run) for n in self.names}
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
            return self._made[place][name]

    def _shard(self, name: str, place: int, run: Run) -> pa.Buffer:
        part = run.parts[name]
        vocabulary = part.spec.vocabulary
        if vocabulary is not None:
            values = (value for column in part.columns for value in column if value is not None)
            largest = max((int(value.max(initial=0)) for value in values), default=0)
            if largest >= vocabulary:
                where = f"{name} shard {place} of {self.uri}"
                raise ValueError(f"{where} holds id {largest}; its vocabulary has {vocabulary}")
        data = write_shard(name, place, "0" * 16, run.keys, part.columns, part.spec, {}, part.quarantine)
        return pa.py_buffer(data)

    def keys(self, place: int) -> list[str]:
        return self._keys[place]

    def prefetch(self, places: Iterable[int]) -> None:
        """Nothing: what is slow is Python's reading of tars, which threads do not make faster."""

    def close(self) -> None:
        """Nothing runs in threads."""


def _count(part: Part) -> int:
    """Rows with a value in every crop."""
    return sum(all(value is not None for value in row) for row in zip(*part.columns, strict=True))
