"""The manifest: numbered snapshots of which shard objects make up a dataset, and what made them.

Snapshot N is created only if no other writer created N first, which makes replacing N-1 a compare-and-swap on any
store that can create once; the loser reads the winner's snapshot and adds its own shards to that. Readers keep the
snapshot they opened, and history is kept.

    manifest/snapshot-000003.json                      root: format, corpus, lineage, one entry per record table
    manifest/records/<modality>/000000.<digest>.parquet  record tables (see tables.py), shared by snapshots
    manifest/samples/…                                 sample tables: which shard and row a key is in
    manifest/config-<digest>.yaml                      the resolved configuration of each run that made something

A snapshot rewrites the record tables of the blocks that changed and nothing else, so that its cost does not grow with
the dataset.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

from fourmill.pipeline import statistics
from fourmill.pipeline.fingerprints import INGESTED, Ancestry, Retries, ancestry, referenced
from fourmill.pipeline.manifest.snapshot import Manifest, Totals
from fourmill.pipeline.manifest.tables import (
    BLOCK,
    FORMAT,
    BlockInfo,
    block_of,
    describe,
    encoded,
    merged,
    records_in,
    settled_by,
    sums_of,
    table_of,
)
from fourmill.pipeline.shards import Record, check_format, digest, shard_name
from fourmill.pipeline.store import Store

__all__ = [
    "BLOCK",
    "FORMAT",
    "BlockInfo",
    "Manifest",
    "Totals",
    "Update",
    "block_of",
    "publish",
    "read_manifest",
    "snapshots",
    "update_manifest",
]

_log = logging.getLogger(__name__)
_ROOT = re.compile(r"manifest/snapshot-(\d{6,})\.json")


@dataclass(frozen=True)
class Update:
    """What a snapshot changes. `records` stand in place of those of the same (modality, shard); the rest is kept where
    it is None. `producers`: lineages by recipe, at least those of `records`."""

    records: Sequence[Record] = ()
    producers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    corpus: Mapping[str, Any] | None = None
    retries: Retries | None = None
    sample_tables: Sequence[Mapping[str, Any]] | None = None


def root_name(snapshot: int) -> str:
    return f"manifest/snapshot-{snapshot:06d}.json"


def snapshots(store: Store) -> list[int]:
    """The numbers of all snapshots there are, sorted."""
    matches = (_ROOT.fullmatch(info.name) for info in store.list("manifest/snapshot-"))
    return sorted(int(m[1]) for m in matches if m)


def read_manifest(store: Store, snapshot: int | None = None) -> Manifest:
    """The newest snapshot, or the one asked for; FileNotFoundError says where there is none."""
    found = snapshots(store)
    wanted = snapshot if snapshot is not None else max(found, default=0)
    if wanted not in found:
        have = f"snapshots {min(found)} to {max(found)}" if found else "no snapshot; `fourmill ingest` makes the first"
        raise FileNotFoundError(f"no manifest {snapshot or ''} in {store.uri}: it has {have}")
    root = json.loads(store.get(root_name(wanted)))
    check_format(root.get("format"), f"manifest {wanted} of {store.uri}", FORMAT)
    return Manifest(store, root)


def update_manifest(store: Store, change: Callable[[Manifest], Update | None]) -> Manifest:
    """Apply `change` to the newest snapshot and publish the result as the next; again if another writer came first.

    A change that changes nothing, and None, publish nothing.
    """
    while True:
        found = snapshots(store)
        old = read_manifest(store, max(found)) if found else Manifest(store)
        update = change(old)
        if update is None:
            return old
        new = publish(old, update)
        if new is not None:
            return new


def publish(old: Manifest, update: Update) -> Manifest | None:
    """The snapshot after `old`, or `old` where nothing changes; None if another writer published that number first."""
    producers = {**old.producers, **{p: dict(v) for p, v in update.producers.items()}}
    retries = old.retries if update.retries is None else update.retries
    blocks = {m: dict(infos) for m, infos in old.blocks.items()}
    tables = _Tables(old, producers, retries)
    for (name, block), records in _by_block(update.records):
        if info := tables.put(name, block, records):
            blocks.setdefault(name, {})[block] = info
    tables.settle(blocks)
    corpus = old.corpus if update.corpus is None else dict(update.corpus)
    samples = old.sample_tables if update.sample_tables is None else tuple(map(dict, update.sample_tables))
    used = referenced((r for infos in blocks.values() for i in infos.values() for r in i.recipes), producers)
    same = blocks == old.blocks and corpus == old.corpus and retries == old.retries and samples == old.sample_tables
    if same and old.snapshot and used == old.producers:
        return old
    root = {
        "format": FORMAT,
        "snapshot": old.snapshot + 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "corpus": corpus,
        "producers": used,
        "sample_tables": list(samples),
        "retries": _store_retries(old.store, retries) if retries else None,
        "modalities": {m: {str(b): asdict(i) for b, i in sorted(v.items())} for m, v in sorted(blocks.items())},
    }
    data = json.dumps(root, separators=(",", ":"), sort_keys=True).encode()
    return Manifest(old.store, root) if old.store.create(root_name(old.snapshot + 1), data) else None


def _store_retries(store: Store, retries: Retries) -> str:
    data = retries.to_json()
    name = f"manifest/retries-{digest(data)[:16]}.json"
    store.create(name, data)
    return name


def _by_block(records: Iterable[Record]) -> list[tuple[tuple[str, int], list[Record]]]:
    """Grouped by modality and block, ingested modalities first: what others settle by must be there."""
    groups: dict[tuple[str, int], dict[int, Record]] = {}
    for record in records:
        groups.setdefault((record.modality, block_of(record.shard)), {})[record.shard] = record
    order = sorted(groups, key=lambda place: (place[0] not in INGESTED, place))
    return [(place, list(groups[place].values())) for place in order]


class _Tables:
    """The record tables of a new snapshot: written where their block changed."""

    def __init__(self, old: Manifest, producers: Mapping[str, dict[str, Any]], retries: Retries) -> None:
        self.old, self.store, self.producers, self.retries = old, old.store, producers, retries
        self.fresh: dict[tuple[str, int], tuple[BlockInfo, pa.Table]] = {}

    def put(self, name: str, block: int, records: Sequence[Record]) -> BlockInfo | None:
        """Write the block's table with these records in it; None if it holds them all already."""
        before = self.old.table(name, block) if block in self.old.blocks.get(name, {}) else None
        known = _known(before)
        fresh = [r for r in records if known.get(r.shard) != (r.fingerprint, r.digest)]
        if not fresh:
            return None
        table = merged(before, table_of(fresh))
        data = encoded(table, self._sums(name, before, fresh))
        info = describe(name, block, table, data, None)
        self.store.create(info.name, data)
        self.fresh[name, block] = (info, table)
        return info

    def settle(self, blocks: dict[str, dict[int, BlockInfo]]) -> None:
        """Say by what recipe and inputs a block is settled, wherever it, what it goes back to, or retries changed."""
        corpus = {block for name, block in self.fresh if name in INGESTED}
        again = self.retries.blocks_changed(self.old.retries, BLOCK)
        for name, infos in blocks.items():
            for block, info in infos.items():
                if name not in INGESTED and ((name, block) in self.fresh or block in corpus or block in again):
                    infos[block] = replace(info, settled=self._settled(name, block, blocks))

    def _settled(self, name: str, block: int, blocks: Mapping[str, Mapping[int, BlockInfo]]) -> dict[str, str] | None:
        info = blocks[name][block]
        if len(info.recipes) != 1:
            return None
        known = self._ancestry(name, next(iter(info.recipes)))
        if known is None or any(block not in blocks.get(m, {}) for m in known.ingested):
            return None
        ingested = {m: (blocks[m][block], self._table(m, block)) for m in known.ingested}
        return settled_by(name, self._table(name, block), known, ingested, self.retries)

    def _ancestry(self, name: str, recipe: str) -> Ancestry | None:
        try:
            return ancestry(name, recipe, self.producers)
        except KeyError:  # an import, or a producer whose inputs are not described
            return None

    def _table(self, name: str, block: int) -> pa.Table:
        found = self.fresh.get((name, block))
        return found[1] if found else self.old.table(name, block)

    def _sums(self, name: str, before: pa.Table | None, fresh: Sequence[Record]) -> dict[str, Any]:
        """Statistics by recipe after `fresh` came in and what stood in their places went."""
        sums = sums_of(before) if before is not None else {}
        places = {r.shard for r in fresh}
        kept: list[Record] = []
        gone: list[Record] = []
        for record in records_in(before) if before is not None else ():
            (gone if record.shard in places else kept).append(record)
        for recipe in {r.producer for r in gone}:
            sums[recipe] = self._without(sums.get(recipe, {}), recipe, gone, kept)
        for recipe in {r.producer for r in fresh}:  # all at once: packing a histogram takes 3 ms
            added = [r.statistics for r in fresh if r.producer == recipe]
            sums[recipe] = statistics.merged([sums.get(recipe, {}), *added])
        return {recipe: one for recipe, one in sums.items() if one}

    def _without(self, total: dict[str, Any], recipe: str, gone: list[Record], kept: list[Record]) -> dict[str, Any]:
        """One recipe's statistics without those of its replaced shards."""
        left = [r for r in kept if r.producer == recipe]
        if not left:
            return {}
        found = [self._full(r) for r in gone if r.producer == recipe]
        if None not in found:
            return statistics.merged([total], filter(None, found))
        # The record object of a replaced shard is lost, and with it what is to be taken away.
        parts = [self._full(r) for r in left]
        _log.warning(
            "statistics of %s are added up anew from %d of %d shards: the record of a replaced one is gone",
            gone[0].modality,
            sum(part is not None for part in parts),
            len(parts),
        )
        return statistics.merged(filter(None, parts))

    def _full(self, record: Record) -> dict[str, Any] | None:
        """A record's statistics with their histograms, from the record object; None if that is gone."""
        if not record.statistics:
            return {}
        name = shard_name(record.modality, record.shard, record.fingerprint, "json")
        try:
            return Record.from_json(self.store.get(name)).statistics
        except FileNotFoundError:
            return None


def _known(table: pa.Table | None) -> dict[int, tuple[str, str]]:
    if table is None:
        return {}
    columns = (table[c].to_pylist() for c in ("shard", "fingerprint", "digest"))
    return {shard: (fingerprint, held) for shard, fingerprint, held in zip(*columns, strict=True)}
