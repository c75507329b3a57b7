"""The manifest: numbered snapshots of which shard objects make up a dataset, and what made them.

Snapshot N is created only if no other writer created N first, which makes replacing N-1 a compare-and-swap on any
store that can create once; the loser reads the winner's snapshot and adds its own shards to that. Readers keep the
snapshot they opened.

    manifest/000003.json                      root: format, corpus, lineage, one summary per modality
    manifest/table-<digest>.parquet           one row per (modality, shard): every record
    manifest/config-<digest>.yaml             the resolved configuration of each run that made something
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fourmill.pipeline.shards import FORMAT, Record, canonical, check_format, digest
from fourmill.pipeline.store import Store

_ROOT = re.compile(r"manifest/(\d{6,})\.json")
_JSON_COLUMNS = ("spec", "statistics", "quarantined", "spent")


@dataclass(frozen=True)
class Manifest:
    """One consistent snapshot. `records` by (modality, shard); `producers`: lineage by producer id."""

    snapshot: int = 0
    corpus: dict[str, Any] = field(default_factory=dict)
    records: dict[tuple[str, int], Record] = field(default_factory=dict)
    producers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @functools.cached_property  # a snapshot never changes, and a scan of a large one takes a while
    def modalities(self) -> list[str]:
        return sorted({name for name, _ in self.records})

    def of(self, modality: str) -> list[Record]:
        """The records of one modality, by shard."""
        return [r for (name, _), r in sorted(self.records.items()) if name == modality]

    @functools.cached_property
    def shards(self) -> list[int]:
        return sorted({shard for _, shard in self.records})

    def generations(self, modality: str) -> list[str]:
        """Producer ids in use; more than one means the modality is partly redone and must not be mixed silently."""
        return sorted({r.producer for r in self.of(modality)})

    def including(self, records: Iterable[Record], producers: Mapping[str, dict[str, Any]]) -> Manifest:
        """This snapshot with `records` in place of what stood for their (modality, shard)."""
        merged = {**self.records, **{(r.modality, r.shard): r for r in records}}
        used = {r.producer for r in merged.values()}
        known = {**self.producers, **producers}
        return replace(self, records=merged, producers={p: known[p] for p in sorted(used)})


def read_manifest(store: Store, snapshot: int | None = None) -> Manifest:
    """The newest snapshot, or the one asked for; FileNotFoundError says where there is none."""
    found = _snapshots(store)
    wanted = snapshot if snapshot is not None else max(found, default=0)
    if wanted not in found:
        have = f"snapshots 1 to {max(found)}" if found else "no snapshot; `fourmill ingest` makes the first"
        raise FileNotFoundError(f"no manifest {snapshot or ''} in {store.uri}: it has {have}")
    root = json.loads(store.get(_root_name(wanted)))
    check_format(root.get("format"), f"manifest {wanted} of {store.uri}")
    # Read without Arrow's thread pools: a short command that exits while they start has been seen to abort.
    source = pa.BufferReader(store.get(root["table"]["name"]))
    table = pq.ParquetFile(source, pre_buffer=False).read(use_threads=False)
    records = [_record(row) for row in table.to_pylist()]
    return Manifest(wanted, root["corpus"], {(r.modality, r.shard): r for r in records}, root["producers"])


def update_manifest(store: Store, change: Callable[[Manifest], Manifest]) -> Manifest:
    """Apply `change` to the newest snapshot and publish the result as the next; again if another writer came first.

    A change that changes nothing publishes nothing.
    """
    while True:
        found = _snapshots(store)
        old = read_manifest(store, max(found)) if found else Manifest()
        new = replace(change(old), snapshot=old.snapshot + 1)
        if found and replace(new, snapshot=old.snapshot) == old:
            return old
        if _publish(store, new):
            return new


def _publish(store: Store, manifest: Manifest) -> bool:
    table = _table(manifest)
    name = f"manifest/table-{digest(table)[:16]}.parquet"
    store.create(name, table)
    root = {
        "format": FORMAT,
        "snapshot": manifest.snapshot,
        "corpus": manifest.corpus,
        "producers": manifest.producers,
        "modalities": {m: summary(manifest, m) for m in manifest.modalities},
        "table": {"name": name, "rows": len(manifest.records), "digest": digest(table)},
    }
    return store.create(_root_name(manifest.snapshot), json.dumps(root, indent=1, sort_keys=True).encode())


def summary(manifest: Manifest, modality: str) -> dict[str, Any]:
    """Totals of one modality over its shards."""
    records = manifest.of(modality)
    return {
        "shards": len(records),
        "rows": sum(r.rows for r in records),
        "present": sum(r.present for r in records),
        "num_bytes": sum(r.num_bytes for r in records),
        "producers": manifest.generations(modality),
    }


def _root_name(snapshot: int) -> str:
    return f"manifest/{snapshot:06d}.json"


def _snapshots(store: Store) -> list[int]:
    matches = (_ROOT.fullmatch(info.name) for info in store.list("manifest/"))
    return sorted(int(m[1]) for m in matches if m)


def _table(manifest: Manifest) -> bytes:
    rows = []
    for _, record in sorted(manifest.records.items()):
        row = {**asdict(record), "name": record.name}
        rows.append({k: canonical(v) if k in _JSON_COLUMNS else v for k, v in row.items()})
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    return sink.getvalue()


def _record(row: dict[str, Any]) -> Record:
    row = {k: json.loads(v) if k in _JSON_COLUMNS else v for k, v in row.items() if k != "name"}
    check_format(row["format"], f"record of {row['modality']} shard {row['shard']}")
    return Record(**row)
