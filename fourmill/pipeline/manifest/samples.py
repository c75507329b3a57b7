"""Sample tables: one line a sample in Parquet, so that a key is found without opening shards, and DuckDB or pandas can
ask where samples came from, how large they are and which of them are unusable.

    manifest/samples/000000-000099.<digest16>.parquet      the samples of shards 0 to 99, by shard and row

Invariant: a table follows from the objects of its shards alone. Ingest writes them as it goes; `make_sample_tables`
gives the same bytes afterwards, for datasets that came without. The snapshot's root lists them.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fourmill.pipeline.manifest import Manifest, Update, read_manifest, update_manifest
from fourmill.pipeline.shards import Record, read_shard
from fourmill.pipeline.store import Store, join_uri
from fourmill.pipeline.store.ranges import RangeFile

SHARDS = 100  # in one table: 100,000 samples of 1,000 a shard are 10 to 15 MB
_ROW_GROUP = 10_000  # what a look-up of one key reads at least: about 0.2 MB of keys
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.int64(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("origin", pa.string()),  # where in the corpus
        pa.field("url", pa.string()),  # what the sample's own metadata gives as its address
        pa.field("width", pa.int32()),  # of the upright picture
        pa.field("height", pa.int32()),
        pa.field("format", pa.string()),
        pa.field("sha256", pa.string()),  # of the picture's file, also where it is unusable
        pa.field("has_text", pa.bool_(), nullable=False),
        pa.field("quarantine", pa.string()),  # why rgb is null, if it is
    ]
)


def table_uris(manifest: Manifest) -> dict[str, list[str]]:
    """The Parquet files of a snapshot, as DuckDB and pandas open them: `records` of shards, `samples`."""
    records = [info.name for blocks in manifest.blocks.values() for info in blocks.values()]
    names = {"records": records, "samples": [str(entry["name"]) for entry in manifest.sample_tables]}
    return {kind: [join_uri(manifest.store.uri, name) for name in found] for kind, found in names.items()}


@dataclass(frozen=True)
class Facts:
    """What a sample table says of one shard's samples, by row. `sources`: values of `source`, None where null."""

    shard: int
    keys: Sequence[str]
    sources: Sequence[Mapping[str, Any] | None]
    has_text: Sequence[bool]
    quarantine: Mapping[str, str]

    def batch(self) -> pa.RecordBatch:
        """The lines of the table."""
        known = [source or {} for source in self.sources]
        columns: dict[str, Any] = {
            "key": self.keys,
            "shard": np.full(len(self.keys), self.shard, np.int64),
            "row": np.arange(len(self.keys), dtype=np.int32),
            **{name: [_text(k.get(name)) for k in known] for name in ("origin", "format", "sha256")},
            "url": [_url(k) for k in known],
            **{name: [_side(k.get(name)) for k in known] for name in ("width", "height")},
            "has_text": list(self.has_text),
            "quarantine": [self.quarantine.get(key) for key in self.keys],
        }
        return pa.record_batch([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _side(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 < value < 1 << 31 else None


def _url(source: Mapping[str, Any]) -> str | None:
    """img2dataset's tars have it as `url`, COYO's tables too; COCO's annotations as `coco_url`."""
    metadata = source.get("metadata")
    if not isinstance(metadata, Mapping):
        return None
    return next((v for v in map(metadata.get, ("url", "URL", "coco_url")) if isinstance(v, str)), None)


class SampleTables:
    """Writes sample tables from shards that come in order; `close` gives what a root lists."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.entries: list[dict[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []
        self._group = 0

    def add(self, facts: Facts) -> None:
        group = facts.shard // SHARDS
        if group != self._group:
            self._publish()
        self._group = group
        self._batches.append(facts.batch())

    def close(self) -> tuple[dict[str, Any], ...]:
        """Every table, the last one published too."""
        self._publish()
        return tuple(self.entries)

    def _publish(self) -> None:
        table = pa.Table.from_batches(self._batches, SCHEMA)
        self._batches = []
        if not table.num_rows:
            return
        data = _parquet(table)
        whole = hashlib.sha256(data).hexdigest()
        first = self._group * SHARDS
        name = f"manifest/samples/{first:06d}-{first + SHARDS - 1:06d}.{whole[:16]}.parquet"
        self.store.create(name, data)
        keys = pc.min_max(table["key"]).as_py()
        self.entries.append(
            {
                "name": name,
                "digest": whole,
                "num_bytes": len(data),
                "first_shard": table["shard"][0].as_py(),
                "last_shard": table["shard"][-1].as_py(),
                "rows": table.num_rows,
                "first_key": keys["min"],
                "last_key": keys["max"],
            }
        )


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    # A dictionary of keys, addresses or digests would be as long as the column.
    repeated = ["shard", "format", "quarantine"]
    pq.write_table(table, sink, row_group_size=_ROW_GROUP, compression="zstd", use_dictionary=repeated)
    return sink.getvalue()


def make_sample_tables(store: Store, threads: int = 8) -> Manifest:
    """Make the sample tables that the newest snapshot lacks, or names and the store has lost, from its shards, and
    publish a snapshot that lists them, unless it does already.

    Reads `source` and `alt_text` whole and, of `rgb`, only where something was quarantined.
    """
    found = read_manifest(store)
    made = _made(found, threads)
    if not made:
        return found
    return update_manifest(store, lambda old: Update(sample_tables=_merged(old.sample_tables, made)))


def uncovered(manifest: Manifest) -> np.ndarray:
    """The shards of which no sample table tells, ascending."""
    shards = np.asarray(manifest.shards, dtype=np.int64)
    known = np.zeros(len(shards), dtype=bool)
    for entry in manifest.sample_tables:
        known |= (shards >= entry["first_shard"]) & (shards <= entry["last_shard"])
    return shards[~known]


def _made(manifest: Manifest, threads: int) -> tuple[dict[str, Any], ...]:
    """Tables of whole groups of shards: a group that has none, or is covered in part, is made whole."""
    sizes = manifest.store.sizes([str(entry["name"]) for entry in manifest.sample_tables])
    lost = [e for e, size in zip(manifest.sample_tables, sizes, strict=True) if size is None]
    groups = {*(uncovered(manifest) // SHARDS).tolist(), *(int(e["first_shard"]) // SHARDS for e in lost)}
    writer = SampleTables(manifest.store)
    with ThreadPoolExecutor(threads, thread_name_prefix="samples") as pool:
        for group, shards in _by_group(manifest.shards):
            if group in groups:
                for facts in pool.map(_facts, [_objects(manifest, shard) for shard in shards]):
                    writer.add(facts)
    return writer.close()


def _by_group(shards: Iterable[int]) -> Iterator[tuple[int, list[int]]]:
    numbers = np.asarray(shards, dtype=np.int64)
    groups, starts = np.unique(numbers // SHARDS, return_index=True)
    for group, part in zip(groups.tolist(), np.split(numbers, starts[1:]), strict=True):
        yield group, part.tolist()


def _merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """New tables in place of those that cover some of the same shards."""
    kept = [
        o for o in old if all(o["last_shard"] < n["first_shard"] or o["first_shard"] > n["last_shard"] for n in new)
    ]
    return tuple(sorted([*kept, *new], key=lambda entry: int(entry["first_shard"])))


@dataclass(frozen=True)
class _Objects:
    """The records of one shard that its facts are read from."""

    store: Store
    shard: int
    keys: Record
    source: Record | None
    text: Record | None
    rgb: Record | None


def _objects(manifest: Manifest, shard: int) -> _Objects:
    source, text, rgb = (manifest.record(name, shard) for name in ("source", "alt_text", "rgb"))
    return _Objects(manifest.store, shard, source or smallest(manifest, shard), source, text, rgb)


def smallest(manifest: Manifest, shard: int) -> Record:
    """The record of the smallest object of a shard: where its keys are read from."""
    found = (manifest.record(name, shard) for name in manifest.modalities)
    return min((r for r in found if r is not None), key=lambda r: (r.num_bytes, r.modality))


def _facts(objects: _Objects) -> Facts:
    keys = read_shard(objects.store, objects.keys.name).keys
    sources: list[Mapping[str, Any] | None] = [None] * len(keys)
    if objects.source is not None:
        sources = [
            v if isinstance(v, Mapping) else None for v in read_shard(objects.store, objects.source.name).values()
        ]
    has_text = [False] * len(keys)
    if objects.text is not None:
        has_text = read_shard(objects.store, objects.text.name).valid().tolist()
    for record in (objects.source, objects.text, objects.rgb):
        if record is not None and record.keys_digest != objects.keys.keys_digest:
            raise ValueError(
                f"{record.name} does not hold the same keys in the same order as {objects.keys.name}: "
                f"`fourmill manifest verify {objects.store.uri}` says more"
            )
    reasons = _reasons(objects.store, objects.rgb) if objects.rgb is not None and objects.rgb.quarantined else {}
    return Facts(objects.shard, keys, sources, has_text, reasons)


def _reasons(store: Store, record: Record) -> dict[str, str]:
    """The quarantine of an object from its footer: its pictures are not read."""
    with pa.ipc.open_file(opened(store, record.name, record.num_bytes)) as file:
        meta = json.loads(file.schema.metadata[b"fourmill"])
    return dict(meta["quarantine"])


def opened(store: Store, name: str, num_bytes: int) -> pa.NativeFile:
    """An object as a file of which only the parts asked for are read; a memory map where it is a local file."""
    path = store.local_path(name)
    if path is not None:
        return pa.memory_map(str(path))
    return pa.PythonFile(RangeFile(store, name, num_bytes), mode="r")
