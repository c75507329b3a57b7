"""Record tables: Parquet objects with the records of one modality in one block of shard numbers.

    manifest/records/<modality>/000012.<digest>.parquet    block 12: shards 120,000 to 129,999

One row per shard, sorted; DuckDB and pandas read them. Histograms are not in the rows but summed up by recipe in the
table's own metadata: a thousand samples' token histogram takes 12 KB, so that a million shards' would be 12 GB.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fourmill.pipeline import statistics
from fourmill.pipeline.fingerprints import Ancestry, Retries, fingerprints
from fourmill.pipeline.shards import Record, canonical, check_format, digest

BLOCK = 10_000
"""Shard numbers in a block. A power of ten, so that a block's objects share a prefix and are listed together; a table
of them takes about 1 MB."""
FORMAT = 2
"""Of roots and record tables. Format 1 had one table for everything."""
SPENT = ("seconds", "gpu_seconds", "attempts")

SCHEMA = pa.schema(
    [
        ("modality", pa.string()),
        ("shard", pa.int64()),
        ("name", pa.string()),
        ("fingerprint", pa.string()),
        ("producer", pa.string()),
        ("rows", pa.int64()),
        ("present", pa.int64()),
        ("num_bytes", pa.int64()),
        ("digest", pa.string()),
        ("keys_digest", pa.string()),
        ("seconds", pa.float64()),
        ("gpu_seconds", pa.float64()),
        ("attempts", pa.int64()),
        ("spec", pa.string()),
        ("statistics", pa.string()),
        ("quarantined", pa.string()),
    ]
)


@dataclass(frozen=True)
class BlockInfo:
    """What a root says of one record table: enough to plan and to sum up without reading it.

    `name`, `digest`, `num_bytes`: the table object. `shards`: how many, from `first` to `last`. `rows`, `present`,
    `object_bytes`: sums over them. `recipes`: shards by producer id. `quarantined`: rows by reason. `fingerprints`,
    `keys`: digests of those columns (with the shard numbers). `settled`: the recipe and inputs that give every shard's
    fingerprint, if one recipe does.
    """

    name: str
    digest: str
    num_bytes: int
    shards: int
    first: int
    last: int
    rows: int
    present: int
    object_bytes: int
    recipes: dict[str, int]
    quarantined: dict[str, int]
    spent: dict[str, float]
    fingerprints: str
    keys: str
    settled: dict[str, str] | None = None

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> BlockInfo:
        return cls(**{f.name: tree[f.name] for f in fields(cls)})


def block_of(shard: int) -> int:
    return shard // BLOCK


def table_name(modality: str, block: int, data_digest: str) -> str:
    return f"manifest/records/{modality}/{block:06d}.{data_digest[:16]}.parquet"


def table_of(records: Sequence[Record]) -> pa.Table:
    """Records of one modality as a table, sorted by shard."""
    rows = []
    for record in sorted(records, key=lambda r: r.shard):
        row = {**asdict(record), "name": record.name, **{s: record.spent.get(s, 0) for s in SPENT}}
        row["statistics"] = statistics.brief(record.statistics)
        rows.append({f.name: _cell(row[f.name]) for f in SCHEMA})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _cell(value: Any) -> Any:
    return canonical(value) if isinstance(value, dict) else value


def merged(old: pa.Table | None, new: pa.Table) -> pa.Table:
    """`old` with the rows of `new` in place of those of the same shards, sorted by shard."""
    if old is None:
        return new
    kept = old.filter(pc.invert(pc.is_in(old["shard"], value_set=new["shard"].combine_chunks())))
    return pa.concat_tables([kept.replace_schema_metadata(None), new]).sort_by("shard").combine_chunks()


def records_in(table: pa.Table) -> Iterator[Record]:
    """The rows of a table as records, with brief statistics."""
    for row in table.to_pylist():
        yield record_in(row)


def record_in(row: Mapping[str, Any]) -> Record:
    """One row of a table as a record."""
    return Record(
        modality=row["modality"],
        shard=row["shard"],
        fingerprint=row["fingerprint"],
        producer=row["producer"],
        rows=row["rows"],
        present=row["present"],
        num_bytes=row["num_bytes"],
        digest=row["digest"],
        keys_digest=row["keys_digest"],
        spec=dict(_parsed(row["spec"])),
        statistics=dict(_parsed(row["statistics"])),
        quarantined=dict(_parsed(row["quarantined"])),
        spent={s: row[s] for s in SPENT if row[s]},
    )


@functools.lru_cache(maxsize=4096)  # a block's shards share a handful of specifications
def _parsed(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


def encoded(table: pa.Table, sums: Mapping[str, Any]) -> bytes:
    """A record table as Parquet. `sums`: statistics by recipe."""
    meta = {b"fourmill": canonical({"format": FORMAT, "statistics": dict(sorted(sums.items()))}).encode()}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(meta), sink, compression="zstd")
    return sink.getvalue()


def decoded(data: bytes, where: str) -> pa.Table:
    """A record table from its bytes; ValueError names `where` if it is not one."""
    # Read without Arrow's thread pools: a short command that exits while they start has been seen to abort.
    with _named(where):
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        meta = json.loads((table.schema.metadata or {})[b"fourmill"])
    check_format(meta.get("format"), where, FORMAT)
    return table


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{where} is not a record table: {error}") from error


def sums_in(data: bytes, where: str) -> dict[str, Any]:
    """Statistics by recipe, from a table's footer alone."""
    with _named(where):
        meta = json.loads((pq.read_schema(pa.BufferReader(data)).metadata or {})[b"fourmill"])
    check_format(meta.get("format"), where, FORMAT)
    found: dict[str, Any] = meta["statistics"]
    return found


def sums_of(table: pa.Table) -> dict[str, Any]:
    """Statistics by recipe, from a decoded table's metadata."""
    found: dict[str, Any] = json.loads(table.schema.metadata[b"fourmill"])["statistics"]
    return found


def describe(modality: str, block: int, table: pa.Table, data: bytes, settled: dict[str, str] | None) -> BlockInfo:
    """What the root is to say of a table."""
    data_digest = hashlib.sha256(data).hexdigest()
    shards = table["shard"].to_numpy()
    return BlockInfo(
        name=table_name(modality, block, data_digest),
        digest=data_digest,
        num_bytes=len(data),
        shards=len(shards),
        first=int(shards[0]),
        last=int(shards[-1]),
        rows=pc.sum(table["rows"]).as_py(),
        present=pc.sum(table["present"]).as_py(),
        object_bytes=pc.sum(table["num_bytes"]).as_py(),
        recipes=_counted(table["producer"]),
        quarantined=_quarantined(table["quarantined"]),
        spent={s: round(float(pc.sum(table[s]).as_py()), 3) for s in SPENT},
        fingerprints=_column_digest(shards, table["fingerprint"]),
        keys=_column_digest(shards, table["keys_digest"]),
        settled=settled,
    )


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    return {c["values"]: c["counts"] for c in sorted(pc.value_counts(column).to_pylist(), key=lambda c: c["values"])}


def _quarantined(column: pa.ChunkedArray) -> dict[str, int]:
    total: Counter[str] = Counter()
    for text, shards in _counted(column).items():
        for reason, count in json.loads(text).items():
            total[reason] += count * shards
    return dict(sorted(total.items()))


def _column_digest(shards: np.ndarray, column: pa.ChunkedArray) -> str:
    return digest(shards.astype("<i8").tobytes(), "".join(column.to_pylist()))[:32]


def settled_by(
    modality: str,
    table: pa.Table,
    ancestry: Ancestry,
    ingested: Mapping[str, tuple[BlockInfo, pa.Table]],
    retries: Retries,
) -> dict[str, str] | None:
    """The recipe and inputs that give the fingerprint of every shard of the table, and of the block; None if mixed.

    `ingested`: the block's tables of the ingested modalities that the recipe goes back to.
    """
    recipes = _counted(table["producer"])
    shards = table["shard"].to_pylist()
    if len(recipes) != 1 or any(t["shard"].to_pylist() != shards for _, t in ingested.values()):
        return None
    (recipe,) = recipes
    again = [retries.text(ancestry.made, s) for s in shards] if retries else None
    columns = [ingested[name][1]["fingerprint"].to_pylist() for name in ancestry.ingested]
    if not columns or fingerprints(modality, recipe, columns, again) != table["fingerprint"].to_pylist():
        return None
    infos = {name: info for name, (info, _) in ingested.items()}
    return {"recipe": recipe, "inputs": inputs_digest(ancestry, infos, retries, block_of(shards[0]))}


def inputs_digest(ancestry: Ancestry, ingested: Mapping[str, BlockInfo], retries: Retries, block: int) -> str:
    """Of everything besides the recipe that determines the fingerprints of a block."""
    parts = [f"{name} {ingested[name].fingerprints}" for name in ancestry.ingested]
    again = retries.digest(ancestry.made, block * BLOCK, (block + 1) * BLOCK)
    return digest(*parts, again)[:32]
