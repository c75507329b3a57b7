"""One shard object against its record: what a worker process or thread of a deep verification does.

Bytes first. Where they are not the record's, nothing else in the object is held against it: one flipped bit would be
reported ten times. Keys are handed back wherever something is odd about them, for whoever knows the shard's other
modalities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from fourmill.pipeline import statistics
from fourmill.pipeline.manifest.verify.problems import Problem
from fourmill.pipeline.manifest.verify.values import flaws
from fourmill.pipeline.shards import (
    Record,
    Shard,
    canonical,
    digest,
    open_shard,
    producer_id,
    reason_kind,
    shard_name,
)
from fourmill.pipeline.store import Store, StoreError


@dataclass(frozen=True)
class Task:
    """An object to check. `known`: its size and time of change when it was last found sound. `hashes`: its keys stand
    for the shard's, their hashes are wanted. `expected`: digest of the keys of the shard's other modalities, where
    they disagree with its record."""

    record: Record
    known: tuple[int, float] | None = None
    hashes: bool = False
    expected: str | None = None


@dataclass(frozen=True)
class Checked:
    """What was found. `num_bytes`: read. `modified`: when the object last changed, 0 if the store does not tell.

    `unchanged`: it was not read, being as it was when last found sound. `keys`: where they are odd or asked for.
    """

    task: Task
    problems: tuple[Problem, ...] = ()
    num_bytes: int = 0
    modified: float = 0.0
    unchanged: bool = False
    keys: tuple[str, ...] | None = None
    hashes: bytes | None = None


def check_object(store: Store, task: Task) -> Checked:
    """Read one object and its JSON record, unless it is as it was when last found sound."""
    record = task.record
    try:
        info = store.head(record.name)
        if info is None:
            return Checked(task, (_problem(record, "missing-object", "the object is gone"),))
        if info.num_bytes != record.num_bytes:
            return Checked(task, (_problem(record, "wrong-size", wrong_size(record.num_bytes, info.num_bytes)),))
        if task.known == (info.num_bytes, info.modified) and info.modified:
            return Checked(task, unchanged=True, modified=info.modified)
        return _check_bytes(store, task, _read(store, record.name), info.modified)
    except FileNotFoundError:
        return Checked(task, (_problem(record, "missing-object", "the object was deleted while it was looked at"),))
    except (StoreError, OSError) as error:
        return Checked(task, (_problem(record, "unreadable-object", f"cannot be read: {error}"),))


def wrong_size(should: int, has: int) -> str:
    return f"has {has:,} bytes; its record says {should:,}"


def key_hashes(keys: list[str]) -> bytes:
    """64 bits of each key, the same on every machine."""
    return b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)


def _read(store: Store, name: str) -> pa.Buffer:
    path = store.local_path(name)
    return pa.memory_map(str(path)).read_buffer() if path is not None else pa.py_buffer(store.get(name))


def _check_bytes(store: Store, task: Task, data: pa.Buffer, modified: float) -> Checked:
    record, keys, shard = task.record, None, None
    damaged = hashlib.sha256(data).hexdigest() != record.digest
    problems = []
    if damaged:
        what = "its SHA-256 differs from its record's: the bytes have changed"
        problems.append(_problem(record, "wrong-digest", what))
    try:
        shard = open_shard(data, "it")
        keys = shard.keys
        if not damaged:
            problems += [*_disagreements(shard, keys, record), *_values(shard, keys, record)]
            problems += _check_record(store, record, shard)
    except ValueError as error:
        if not damaged:
            problems.append(_problem(record, "bad-format", str(error)))
    return Checked(
        task,
        tuple(problems),
        num_bytes=data.size,
        modified=modified,
        keys=tuple(keys) if keys and (task.expected or _odd(keys, record)) else None,
        hashes=key_hashes(keys) if keys and task.hashes and not damaged else None,
    )


def _odd(keys: list[str], record: Record) -> bool:
    return len(set(keys)) != len(keys) or digest(*keys) != record.keys_digest


def _disagreements(shard: Shard, keys: list[str], record: Record) -> Iterator[Problem]:
    """What the object says of itself against what its record says, bytes being equal."""
    meta = shard.meta
    said = (meta["modality"], meta["shard"], meta["fingerprint"], producer_id(meta["producer"]))
    if said != (record.modality, record.shard, record.fingerprint, record.producer):
        what = "holds {} shard {} of fingerprint {} by producer {}".format(*said)
        yield _problem(record, "wrong-identity", f"{what}; its record says producer {record.producer}")
    if len(keys) != record.rows:
        yield _problem(record, "wrong-rows", f"has {len(keys)} rows; its record says {record.rows}")
    if meta["spec"] != record.spec:
        yield _problem(record, "wrong-spec", f"its spec is {meta['spec']}; its record says {record.spec}")
    valid = np.logical_and.reduce([shard.valid(c) for c in range(shard.spec.crops if shard.entry.per_crop else 1)])
    if int(valid.sum()) != record.present:
        yield _problem(record, "wrong-presence", f"has {int(valid.sum())} values; its record says {record.present}")
    reasons = [reason_kind(r) for r in shard.quarantine.values()]
    if {r: reasons.count(r) for r in reasons} != record.quarantined:
        yield _problem(record, "wrong-quarantine", f"quarantines {len(reasons)} rows; its record: {record.quarantined}")
    for key in sorted(set(shard.quarantine) - set(keys))[:1]:
        yield _problem(record, "wrong-quarantine", "quarantines a key that it does not hold", key=key)


def _values(shard: Shard, keys: list[str], record: Record) -> Iterator[Problem]:
    for flaw in flaws(shard):
        key = None if flaw.row is None else keys[flaw.row]
        where = "" if flaw.row is None else f"row {flaw.row} ({key}): "
        yield _problem(record, flaw.code, where + flaw.what, flaw.row, key, flaw.warning)


def _check_record(store: Store, record: Record, shard: Shard) -> Iterator[Problem]:
    """The JSON record beside the object, from which a lost manifest would be made again.

    What was spent is not compared: of two attempts, one may have written the record and the other reported.
    """
    name = shard_name(record.modality, record.shard, record.fingerprint, "json")
    try:
        found = Record.from_json(store.get(name))
    except FileNotFoundError:
        yield Problem("missing-record", name, "the JSON record is gone", record.modality, record.shard)
        return
    except (ValueError, TypeError) as error:
        yield Problem("wrong-record", name, f"is no record: {error}", record.modality, record.shard)
        return
    theirs = {**asdict(found), "statistics": statistics.brief(found.statistics), "spent": {}}
    ours = {**asdict(record), "spent": {}}
    if differing := [n for n in ours if ours[n] != theirs[n]]:
        parts = ", ".join(f"{n} {theirs[n]!r} for {ours[n]!r}" for n in differing)
        yield Problem("wrong-record", name, f"is not the manifest's: {parts}", record.modality, record.shard)
    elif canonical(found.statistics) != canonical(statistics.compute(shard)):
        # Another version of Fourmill may have counted other things: odd, but no damage by itself.
        what = "its statistics are not what this version counts in the object"
        yield Problem("other-statistics", name, what, record.modality, record.shard, warning=True)


def _problem(
    record: Record, code: str, what: str, row: int | None = None, key: str | None = None, warning: bool = False
) -> Problem:
    return Problem(code, record.name, what, record.modality, record.shard, row, key, warning)
