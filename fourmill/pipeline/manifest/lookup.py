"""Where a sample stands: from its key, through the sample tables, or from its number in the dataset.

Row numbers count from 0 over the shards in order, unusable samples included, so that row 8,412,077 is the same sample
in every modality and for as long as the corpus stays.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.manifest.samples import opened, smallest, uncovered
from fourmill.pipeline.shards import read_shard
from fourmill.pipeline.store import Store

_COMPARED = 100_000  # keys that an unknown one is compared with
_LIKELY = 200  # of each row group: difflib takes 20 us a key, counting shared ends 1 us
_AT_ONCE = 256  # tables or shards handed to the threads at a time


class Place(NamedTuple):
    """Shard number and row."""

    shard: int
    row: int


def find_key(manifest: Manifest, key: str, threads: int = 8) -> Place:
    """Where a key stands, the first place if it stands in several. ValueError names the nearest keys there are.

    Tables whose keys cannot include it are not opened: with sorted keys one table is read, of it one row group's keys.
    """
    tables = [e for e in manifest.sample_tables if str(e["first_key"]) <= key <= str(e["last_key"])]
    with ThreadPoolExecutor(threads, thread_name_prefix="find") as pool:
        for part in _parts(tables):
            for place in pool.map(lambda entry: _in_table(manifest.store, entry, key), part):
                if place is not None:
                    return place
        for part in _parts(uncovered(manifest).tolist()):
            for shard, keys in zip(part, _keys_of_all(pool, manifest, part), strict=True):
                if key in keys:
                    return Place(shard, keys.index(key))
    near = nearest_keys(manifest, key)
    hint = f"; the nearest keys are {', '.join(map(repr, near))}" if near else "; it has no samples"
    raise ValueError(f"no sample {key!r} in {manifest.store.uri}{hint}")


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE))


def _keys_of_all(pool: ThreadPoolExecutor, manifest: Manifest, shards: Iterable[int]) -> Iterator[list[str]]:
    names = [smallest(manifest, shard).name for shard in shards]
    return pool.map(lambda name: read_shard(manifest.store, name).keys, names)


def _file(store: Store, entry: dict[str, Any]) -> pq.ParquetFile:
    """A sample table, opened by its footer."""
    return pq.ParquetFile(opened(store, str(entry["name"]), int(entry["num_bytes"])), pre_buffer=False)


def _in_table(store: Store, entry: dict[str, Any], key: str) -> Place | None:
    with _file(store, entry) as file:
        for group in _groups_with(file, key):
            row = pc.index(_columns(file, group, ["key"])["key"], key).as_py()
            if row >= 0:
                found = _columns(file, group, ["shard", "row"])
                return Place(found["shard"][row].as_py(), found["row"][row].as_py())
    return None


def _columns(file: pq.ParquetFile, group: int, names: list[str]) -> pa.Table:
    return file.read_row_group(group, columns=names, use_threads=False)


def _groups_with(file: pq.ParquetFile, key: str) -> list[int]:
    """Row groups whose statistics do not rule the key out."""
    column = file.schema_arrow.get_field_index("key")
    found = []
    for group in range(file.num_row_groups):
        stats = file.metadata.row_group(group).column(column).statistics
        if stats is None or not stats.has_min_max or str(stats.min) <= key <= str(stats.max):
            found.append(group)
    return found


def nearest_keys(manifest: Manifest, key: str, count: int = 3) -> list[str]:
    """Existing keys most like `key`, best first, among the 100,000 that stand where it would."""
    near: list[str] = []
    compared = 0
    for keys in _keys_near(manifest, key):
        likely = heapq.nlargest(
            _LIKELY, dict.fromkeys(keys), key=lambda k: _shared(key, k) + _shared(key[::-1], k[::-1])
        )
        near = difflib.get_close_matches(key, list(dict.fromkeys([*near, *likely])), n=count, cutoff=0.0)
        compared += len(keys)
        if compared >= _COMPARED:
            break
    return near


def _keys_near(manifest: Manifest, key: str) -> Iterator[list[str]]:
    """Keys by row group, those first whose range holds the key or begins nearest below it; then untabled shards'."""
    entries = sorted(
        manifest.sample_tables, key=lambda e: (_apart(key, e["first_key"], e["last_key"]), e["first_shard"])
    )
    for entry in entries:
        with _file(manifest.store, entry) as file:
            first = _groups_with(file, key)
            for group in [*first, *(g for g in range(file.num_row_groups) if g not in first)]:
                yield _columns(file, group, ["key"])["key"].to_pylist()
    for shard in uncovered(manifest).tolist():
        yield read_shard(manifest.store, smallest(manifest, shard).name).keys


def _apart(key: str, first: str, last: str) -> int:
    """How many leading characters of the key the range does not share; -1 if it lies inside."""
    if first <= key <= last:
        return -1
    return len(key) - max(_shared(key, first), _shared(key, last))


def _shared(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _counting_modality(manifest: Manifest) -> str:
    if not manifest.modalities:
        raise ValueError(f"{manifest.store.uri} holds no modality yet")
    return "rgb" if "rgb" in manifest.modalities else manifest.modalities[0]


def place_of_row(manifest: Manifest, number: int) -> Place:
    """The place of one row of the dataset. ValueError if it has fewer."""
    name = _counting_modality(manifest)
    before = 0
    for block, info in sorted(manifest.blocks[name].items()):
        if 0 <= number - before < info.rows:
            table = manifest.table(name, block)
            ends = before + np.cumsum(np.asarray(table["rows"]))
            at = int(np.searchsorted(ends, number, side="right"))
            return Place(table["shard"][at].as_py(), number - int(ends[at]) + table["rows"][at].as_py())
        before += info.rows
    raise ValueError(f"row {number}: {manifest.store.uri} has {before} samples, rows 0 to {before - 1}")


def number_of_row(manifest: Manifest, place: Place) -> int:
    """The number in the dataset of one place. ValueError if there is no such shard or row."""
    name = _counting_modality(manifest)
    before = 0
    for block, info in sorted(manifest.blocks[name].items()):
        if info.first <= place.shard <= info.last:
            table = manifest.table(name, block)
            shards, rows = np.asarray(table["shard"]), np.asarray(table["rows"])
            at = int(np.searchsorted(shards, place.shard))
            if shards[at] == place.shard:
                if not 0 <= place.row < rows[at]:
                    raise ValueError(f"row {place.row}: shard {place.shard} has rows 0 to {rows[at] - 1}")
                return before + int(rows[:at].sum()) + place.row
        before += info.rows
    raise ValueError(f"shard {place.shard}: {manifest.store.uri} has no such shard")
