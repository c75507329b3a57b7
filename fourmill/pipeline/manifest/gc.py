"""Garbage collection: what a dataset's store holds that no kept snapshot names, and its removal.

    orphan      no snapshot names it, and it is older than an unfinished run may be
    young       no snapshot names it yet: an interrupted or running job goes on from it; left alone
    stale       only snapshots that are dropped name it
    temporary   half-written files and uploads of processes that are gone
    foreign     not of Fourmill's making; listed, never touched

Invariant: whatever is killed when, a snapshot that is there names only objects that are there. So the roots of dropped
snapshots go first. A record (.json) goes before its object, because a run adopts an unpublished object through its
record: once that is gone, the snapshots and the records are looked at again, and what came into use meanwhile stays.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fourmill.modalities import CATALOGUE
from fourmill.pipeline.manifest import FORMAT, Manifest, block_of, root_name, snapshots
from fourmill.pipeline.shards import check_format, commit, parse_name, shard_name
from fourmill.pipeline.store import ObjectInfo, Store, StoreError
from fourmill.pipeline.store.folders import top_level
from fourmill.pipeline.store.leftovers import leftovers

DAY = 86_400.0
REASONS = ("orphan", "stale", "temporary", "young", "foreign", "used")
GARBAGE = ("orphan", "stale", "temporary")
_TABLE_AGE = 3600.0  # a writer publishes tables and then, within minutes, the root that names them
_LISTED = 20  # names given as examples of each reason
_FOLDERS = 8  # listed at once; of each there is one block of 10,000 shards in memory
_CHUNK = 10_000  # objects that are no shards, looked at together
_THREADS = 16
_OURS = re.compile(r"manifest/(records/[^/]+/|samples/|retries-)[^/]*\.(parquet|json)")
_HISTORY = re.compile(r"manifest/(snapshot-\d{6,}\.json|config-[0-9a-f]+\.yaml)")


@dataclass
class Tally:
    """Objects of one reason; `names`: the first of them."""

    objects: int = 0
    num_bytes: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str, num_bytes: int) -> None:
        self.objects += 1
        self.num_bytes += num_bytes
        if len(self.names) < _LISTED:
            self.names.append(name)


@dataclass
class Collection:
    """What a collection found, by reason, and did. `dropped`: snapshots below the kept ones. `spared`: garbage that
    came into use while it was being removed. `lost`: objects that a snapshot of the last minutes names, and that are
    gone: the job that made that snapshot has to be run again."""

    snapshots: tuple[int, ...]
    dropped: tuple[int, ...]
    deleted: bool
    found: dict[str, Tally] = field(default_factory=lambda: {reason: Tally() for reason in REASONS})
    spared: int = 0
    lost: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def collect(store: Store, older_than: float = 7 * DAY, keep: int | None = None, delete: bool = False) -> Collection:
    """Look for garbage, and remove it if `delete`. `older_than`: seconds; `keep`: how many of the newest snapshots.

    ValueError where a snapshot cannot be read: what it names is not known, so nothing is touched.
    """
    numbers = snapshots(store)
    if not numbers:
        raise ValueError(f"{store.uri} holds no snapshot: it is no dataset, or its ingest is not finished")
    if keep is not None and keep < 1:
        raise ValueError(f"keep {keep}: at least the newest snapshot is kept")
    kept = numbers if keep is None else numbers[-keep:]
    dropped = [n for n in numbers if n < kept[0]]
    found = Collection(tuple(kept), tuple(dropped), delete)
    sweep = _Sweep(store, _Named(store, kept), _Named(store, dropped), time.time() - older_than, found)
    if delete:
        for number in dropped:  # the oldest first: what is left of history has no gaps
            store.delete(root_name(number))
    sweep.run()
    if delete:
        found.lost = _lost(store, sweep.kept)
    return found


class _Named:
    """What some snapshots name: of shard objects which tables say so, by (modality, block); other objects by name."""

    def __init__(self, store: Store, numbers: Sequence[int]) -> None:
        self.store, self.newest = store, max(numbers, default=0)
        self.tables: dict[tuple[str, int], set[str]] = {}
        self.others: set[str] = set()
        self._shards = functools.lru_cache(maxsize=4 * _FOLDERS)(self._read)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="gc") as pool:
            for manifest in pool.map(self._open, numbers):
                self._note(manifest)

    def _open(self, number: int) -> Manifest:
        root = json.loads(self.store.get(root_name(number)))
        check_format(root.get("format"), f"manifest {number} of {self.store.uri}", FORMAT)
        return Manifest(self.store, root)

    def _note(self, manifest: Manifest) -> None:
        self.others.add(root_name(manifest.snapshot))
        self.others |= {str(entry["name"]) for entry in manifest.sample_tables}
        if manifest.retries_name:
            self.others.add(manifest.retries_name)
        for name, blocks in manifest.blocks.items():
            for block, info in blocks.items():
                self.tables.setdefault((name, block), set()).add(info.name)
                self.others.add(info.name)

    def shards(self, modality: str, block: int) -> frozenset[tuple[int, str]]:
        """(shard, fingerprint) of the objects that are named."""
        return self._shards(modality, block)

    def _read(self, modality: str, block: int) -> frozenset[tuple[int, str]]:
        found: set[tuple[int, str]] = set()
        for name in self.tables.get((modality, block), ()):
            file = pq.ParquetFile(pa.BufferReader(self.store.get(name)), pre_buffer=False)
            table = file.read(columns=["shard", "fingerprint"], use_threads=False)
            found |= set(zip(table["shard"].to_pylist(), table["fingerprint"].to_pylist(), strict=True))
        return frozenset(found)


@dataclass(frozen=True)
class _Item:
    """An object of the store, and of which shard it is, if of one."""

    name: str
    num_bytes: int
    modified: float
    place: tuple[str, int, str] | None

    @property
    def chunk(self) -> tuple[str, int] | None:
        """What it is looked at together with: modality and block."""
        return (self.place[0], block_of(self.place[1])) if self.place else None


class _Sweep:
    """One pass over the store's listing: folder beside folder, in each chunk by chunk."""

    def __init__(self, store: Store, kept: _Named, dropped: _Named, before: float, found: Collection) -> None:
        self.store, self.kept, self.dropped, self.before, self.found = store, kept, dropped, before, found
        self.modalities = {*CATALOGUE, *(name for name, _ in (*kept.tables, *dropped.tables))}
        self.stale = dropped.others - kept.others
        self.lock = threading.Lock()
        self.tables: list[_Item] = []  # the manifest's own garbage: removed last, it tells what dropped snapshots name

    def run(self) -> None:
        folders, loose = top_level(self.store)
        strange = [f for f in folders if f in ("/", "./", "../")]  # keys of a bucket that are no paths
        self.found.notes += [f"not looked at: what is below {self.store.uri}/{folder}" for folder in strange]
        with ThreadPoolExecutor(_FOLDERS) as pool, ThreadPoolExecutor(_THREADS) as self.deletions:
            running = [pool.submit(self._folder, folder) for folder in folders if folder not in strange]
            self._chunk([self._item(info) for info in loose])
            for future in running:
                future.result()
            self._finish()

    def _folder(self, folder: str) -> None:
        items = map(self._item, self.store.list(folder))
        for place, chunk in itertools.groupby(items, key=lambda item: item.chunk):
            # Records stand beside their objects: a block is one chunk. Of the rest there can be any number.
            size = None if place else _CHUNK
            while part := list(itertools.islice(chunk, size)):
                self._chunk(part)

    def _item(self, info: ObjectInfo) -> _Item:
        place = parse_name(info.name)
        known = place is not None and place[0].split("@")[0] in self.modalities
        return _Item(info.name, info.num_bytes, info.modified, place if known else None)

    def _chunk(self, items: Sequence[_Item]) -> None:
        reasons = [self._reason(item) for item in items]
        garbage = [item for item, reason in zip(items, reasons, strict=True) if reason in GARBAGE]
        spared = self._remove([g for g in garbage if g.place]) if self.found.deleted else set()
        with self.lock:
            self.tables += [g for g in garbage if not g.place]
            for item, reason in zip(items, reasons, strict=True):
                self.found.found["used" if item.name in spared else reason].add(item.name, item.num_bytes)
            self.found.spared += len(spared)

    def _reason(self, item: _Item) -> str:
        unnamed = "orphan" if 0 < item.modified < self.before else "young"
        if item.place is None:
            return self._reason_of_other(item, unnamed)
        modality, shard, fingerprint = item.place
        held, block = (shard, fingerprint), block_of(shard)
        if held in self.kept.shards(modality, block):
            return "used"
        return "stale" if held in self.dropped.shards(modality, block) else unnamed

    def _reason_of_other(self, item: _Item, unnamed: str) -> str:
        """Of what is no shard object. Snapshots that are no dropped ones were published since the first look."""
        if item.name in self.stale:
            return "stale"
        if item.name in self.kept.others or _HISTORY.fullmatch(item.name):
            return "used"
        if _OURS.fullmatch(item.name):
            return unnamed if item.modified < time.time() - _TABLE_AGE else "young"
        return "foreign"

    def _remove(self, garbage: Sequence[_Item]) -> set[str]:
        """Delete, records first; the names that came into use meanwhile and stay."""
        records = [item for item in garbage if item.name.endswith(".json")]
        rest = [item for item in garbage if not item.name.endswith(".json")]
        self._delete(item.name for item in records)
        spared = {item.name for item in self._in_use(rest)}
        self._delete(item.name for item in rest if item.name not in spared)
        return spared

    def _delete(self, names: Iterable[str]) -> None:
        for _ in self.deletions.map(self.store.delete, names):
            pass

    def _in_use(self, items: Sequence[_Item]) -> list[_Item]:
        """Those whose record is back, or that a snapshot names which is newer than the first look."""
        shards = [(item, item.place) for item in items if item.place]
        back = self.store.sizes([shard_name(*place, "json") for _, place in shards])
        used = [item for (item, _), size in zip(shards, back, strict=True) if size is not None]
        names = {item.name for item in used}
        newer = [n for n in snapshots(self.store) if n > self.kept.newest]
        if newer:
            named = _Named(self.store, newer)
            for item, place in shards:
                if item.name not in names and place[1:] in named.shards(place[0], block_of(place[1])):
                    commit(self.store, self.store.get(item.name))  # its record again
                    used.append(item)
            used += [item for item in items if item.name in named.others]
        return used

    def _finish(self) -> None:
        """Tables that nothing kept names, half-written files, and uploads that nobody finished."""
        if self.found.deleted:
            spared = {item.name for item in self._in_use(self.tables)}
            self._delete(item.name for item in self.tables if item.name not in spared)
        try:
            self._leftovers()
        except StoreError as error:  # some stores do not list uploads, some keys may not
            self.found.notes.append(f"not all that is half-written was looked at: {error}")

    def _leftovers(self) -> None:
        tally = self.found.found["temporary"]
        for leftover in leftovers(self.store):
            if leftover.info.modified < self.before:
                tally.add(leftover.info.name, leftover.info.num_bytes)
                if self.found.deleted:
                    leftover.remove()


def _lost(store: Store, kept: _Named) -> list[str]:
    """Objects that are gone and named by a snapshot that was published during the collection."""
    newer = [n for n in snapshots(store) if n > kept.newest]
    lost: list[str] = []
    if newer:
        named = _Named(store, newer[-1:])
        for modality, block in named.tables:
            fresh = named.shards(modality, block) - kept.shards(modality, block)
            names = [shard_name(modality, shard, fingerprint) for shard, fingerprint in sorted(fresh)]
            lost += [name for name, size in zip(names, store.sizes(names), strict=True) if size is None]
    return lost
