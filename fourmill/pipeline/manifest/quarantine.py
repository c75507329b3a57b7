"""Rows that could not be made, for `fourmill manifest quarantine`: how many and why, which, and once more.

Counts are in the root. Full reasons stand in the shard objects, in the first kilobytes: only those of shards whose
record counts some are read, and of those not the values. Putting rows back into the plan raises the retries of their
(modality, shard), from which a new fingerprint follows for that modality and everything made of it, in these shards.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fourmill.modalities import unknown
from fourmill.pipeline.fingerprints import ancestry, fingerprints
from fourmill.pipeline.manifest import BlockInfo, Manifest, Update, update_manifest
from fourmill.pipeline.shards import reason_kind
from fourmill.pipeline.store import Store

_HEAD = 1 << 16  # bytes read of an object first; a shard with a few hundred reasons fits
_MOST = 1 << 28
_THREADS = 16


@dataclass(frozen=True)
class Choice:
    """Which rows are meant: of these modalities, reasons (their first words) and shards; all where it is None."""

    modalities: tuple[str, ...] | None = None
    reasons: tuple[str, ...] | None = None
    shards: range | None = None

    def names(self, manifest: Manifest) -> list[str]:
        for name in self.modalities or ():
            if name not in manifest.blocks:
                raise ValueError(unknown("modality", name, manifest.modalities))
        known = {reason for name in manifest.modalities for reason in manifest.totals(name).quarantined}
        for reason in self.reasons or ():
            if reason not in known:
                raise ValueError(unknown("reason", reason, known) if known else "no row is in quarantine")
        return list(self.modalities or manifest.modalities)

    def of(self, quarantined: Mapping[str, int]) -> dict[str, int]:
        """Those of the counts that are meant."""
        return {r: n for r, n in quarantined.items() if self.reasons is None or r in self.reasons}

    def meets(self, info: BlockInfo) -> bool:
        """Whether a block has any of the shards."""
        return self.shards is None or (info.first < self.shards.stop and info.last >= self.shards.start)


@dataclass(frozen=True)
class Reason:
    """How many rows of a modality have one kind of reason, and their share of its rows."""

    modality: str
    reason: str
    rows: int
    share: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def reasons(manifest: Manifest, choice: Choice = Choice()) -> list[Reason]:
    """Counts by modality and reason, the commonest first; of `choice.shards` from record tables, else from the root."""
    found = []
    for name in choice.names(manifest):
        totals = manifest.totals(name)
        counts = totals.quarantined if choice.shards is None else _counted(manifest, name, choice)
        ranked = sorted(choice.of(counts).items(), key=lambda item: (-item[1], item[0]))
        found += [Reason(name, reason, rows, rows / totals.rows) for reason, rows in ranked]
    return found


def _counted(manifest: Manifest, name: str, choice: Choice) -> dict[str, int]:
    counts: dict[str, int] = {}
    for shard in affected(manifest, name, choice):
        for reason, rows in shard.quarantined.items():
            counts[reason] = counts.get(reason, 0) + rows
    return counts


@dataclass(frozen=True)
class Affected:
    """A shard object with rows in quarantine."""

    modality: str
    shard: int
    name: str
    rows: int
    producer: str
    fingerprint: str
    quarantined: dict[str, int]


def affected(manifest: Manifest, name: str, choice: Choice) -> Iterator[Affected]:
    """The shards of a modality with rows that are meant, in order; tables of blocks without any are not read."""
    for _, info in sorted(manifest.blocks[name].items()):
        if not choice.of(info.quarantined) or not choice.meets(info):
            continue
        table = manifest.read_table(info)
        some = table.filter(pc.not_equal(table["quarantined"], "{}"))
        columns = (some[c].to_pylist() for c in ("shard", "name", "rows", "producer", "fingerprint", "quarantined"))
        for shard, object_name, rows, producer, fingerprint, text in zip(*columns, strict=True):
            counts = choice.of(json.loads(text))
            if counts and (choice.shards is None or shard in choice.shards):
                yield Affected(name, shard, object_name, rows, producer, fingerprint, counts)


# Keys


@dataclass(frozen=True)
class Quarantined:
    """One row: its key and the full reason."""

    modality: str
    shard: int
    key: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rows(manifest: Manifest, choice: Choice = Choice()) -> Iterator[Quarantined]:
    """Every row that is meant, by modality and shard; several objects are read at once, few are held."""
    shards = (shard for name in choice.names(manifest) for shard in affected(manifest, name, choice))
    with ThreadPoolExecutor(_THREADS) as pool:
        reading: deque[tuple[Affected, Future[dict[str, str]]]] = deque()
        for shard in shards:
            reading.append((shard, pool.submit(reasons_in, manifest.store, shard.name)))
            if len(reading) >= 2 * _THREADS:
                yield from _listed(*reading.popleft(), choice)
        for shard, future in reading:
            yield from _listed(shard, future, choice)


def _listed(shard: Affected, future: Future[dict[str, str]], choice: Choice) -> Iterator[Quarantined]:
    for key, reason in sorted(future.result().items()):
        if choice.of({reason_kind(reason): 1}):
            yield Quarantined(shard.modality, shard.shard, key, reason)


def reasons_in(store: Store, name: str) -> dict[str, str]:
    """Reason by key of one shard object, from its head: an Arrow file begins with its schema, metadata included."""
    head = store.get_range(name, 0, _HEAD)
    try:
        (length,) = struct.unpack_from("<i", head, 12)  # "ARROW1\0\0", four bytes ff, then this
        if not 0 < length < _MOST:
            raise ValueError(f"its schema claims {length} bytes")
        if len(head) < 16 + length:
            head += store.get_range(name, len(head), 16 + length - len(head))
        schema = pa.ipc.read_schema(pa.py_buffer(head[8 : 16 + length]))
        found: dict[str, str] = json.loads(schema.metadata[b"fourmill"])["quarantine"]
        return found
    except (struct.error, ValueError, KeyError, TypeError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{name} in {store.uri} is not a whole shard object: {error}") from error


# Once more


@dataclass(frozen=True)
class Retry:
    """What is put back into the plan. `shards` and `rows`: by modality, those whose quarantined rows are tried again.
    `redone`: by modality, (shards, rows) that will be made again, those made of them included. `refused`: rows that
    cannot be tried again here. `pending`: shards that wait to be made again already."""

    shards: dict[str, list[int]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    redone: dict[str, tuple[int, int]] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    pending: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_retry(manifest: Manifest, choice: Choice = Choice()) -> Retry:
    """What a retry of these rows would put back into the plan."""
    plan = Retry()
    for name in choice.names(manifest):
        for shard in affected(manifest, name, choice):
            count = sum(shard.quarantined.values())
            if not manifest.producers.get(shard.producer, {}).get("inputs"):  # ingested or imported
                plan.refused[name] = plan.refused.get(name, 0) + count
            elif _is_pending(manifest, shard):
                plan.pending[name] = plan.pending.get(name, 0) + 1
            else:
                plan.shards.setdefault(name, []).append(shard.shard)
                plan.rows[name] = plan.rows.get(name, 0) + count
    plan.redone.update(_redone(manifest, plan.shards))
    return plan


def _is_pending(manifest: Manifest, shard: Affected) -> bool:
    """Whether it was put back before, and no run has made it since."""
    known = ancestry(shard.modality, shard.producer, manifest.producers)
    again = manifest.retries.text(known.made, shard.shard)
    ingested = [manifest.record(name, shard.shard) for name in known.ingested]
    columns = [[record.fingerprint] for record in ingested if record is not None]
    return bool(again) and fingerprints(shard.modality, shard.producer, columns, [again]) != [shard.fingerprint]


def _redone(manifest: Manifest, shards: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """(shards, rows) by modality: the retried ones and what goes back to them."""
    found = {}
    for name in manifest.modalities:
        sources = _sources(manifest, name) & set(shards)
        numbers = np.unique(np.array([shard for source in sources for shard in shards[source]], np.int64))
        count, total = _rows_of(manifest, name, numbers)
        if count:
            found[name] = (count, total)
    return found


def _sources(manifest: Manifest, name: str) -> set[str]:
    """The modality and those made on the way to it, by any recipe in use."""
    found = {name}
    for recipe in manifest.generations(name):
        try:
            found |= set(ancestry(name, recipe, manifest.producers).made)
        except KeyError:  # an import that does not say what it was made of
            continue
    return found


def _rows_of(manifest: Manifest, name: str, shards: np.ndarray) -> tuple[int, int]:
    """How many of these shards the modality has, and their rows."""
    count = total = 0
    for info in manifest.blocks[name].values():
        here = shards[(shards >= info.first) & (shards <= info.last)]
        if len(here):
            table = manifest.read_table(info)
            chosen = np.isin(table["shard"].to_numpy(), here)
            count += int(chosen.sum())
            total += int(table["rows"].to_numpy()[chosen].sum())
    return count, total


def retry(store: Store, choice: Choice = Choice()) -> tuple[Retry, Manifest]:
    """Publish a snapshot with the retries raised, if any row is to be tried again; the next run makes the shards."""
    plan = Retry()

    def change(old: Manifest) -> Update | None:
        nonlocal plan
        plan, retries = plan_retry(old, choice), old.retries
        for name, shards in plan.shards.items():
            retries = retries.raised(name, shards)
        return Update(retries=retries) if plan.shards else None

    manifest = update_manifest(store, change)
    return plan, manifest
