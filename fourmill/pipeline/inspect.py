"""Looking into a dataset: what its manifest says (`show`), and whether the objects bear it out (`verify`)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.modalities import modality
from fourmill.pipeline.manifest import Manifest, summary
from fourmill.pipeline.shards import Record, Shard, digest, open_shard, unpack_counts
from fourmill.pipeline.store import Store, StoreError


@dataclass(frozen=True)
class ModalitySummary:
    """One line of `manifest show`. `used`, `vocabulary`: distinct token ids seen, and possible; None for labels."""

    name: str
    shards: int
    rows: int
    present: int
    num_bytes: int
    quarantined: dict[str, int]
    producers: list[dict[str, Any]]
    vocabulary: int | None = None
    used: int | None = None
    perplexity: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(manifest: Manifest) -> list[ModalitySummary]:
    """Every modality of a snapshot, from its records alone."""
    return [_summarise(manifest, name) for name in manifest.modalities]


def _summarise(manifest: Manifest, name: str) -> ModalitySummary:
    records, totals = manifest.of(name), summary(manifest, name)
    reasons: Counter[str] = Counter()
    for record in records:
        reasons.update(record.quarantined)
    use = _vocabulary_use(records) if modality(name).is_tokens else {}
    producers = [manifest.producers.get(p, {}) for p in totals.pop("producers")]
    return ModalitySummary(name, quarantined=dict(reasons), producers=producers, **totals, **use)


def _vocabulary_use(records: list[Record]) -> dict[str, Any]:
    vocabulary = max(r.spec.get("vocabulary", 0) for r in records)
    counts = np.zeros(vocabulary, dtype=np.int64)
    for record in records:
        if packed := record.statistics.get("histogram"):
            found = unpack_counts(packed)
            counts[: len(found)] += found[:vocabulary]
    return {"vocabulary": vocabulary, "used": int(np.count_nonzero(counts)), "perplexity": perplexity(counts)}


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of a histogram: how many ids are in use, weighted by how much."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


@dataclass(frozen=True)
class Problem:
    """Something wrong with one object: which, and what."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`: what was read, and everything found wrong."""

    snapshot: int
    objects: int
    num_bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [str(p) for p in self.problems]
        verdict = "all sound" if self.ok else f"{len(self.problems)} problems"
        read = f"read {self.objects} objects, {self.num_bytes / 1e6:.1f} MB"
        return "\n".join([*lines, f"snapshot {self.snapshot}: {read}: {verdict}"])


def verify(store: Store, manifest: Manifest, threads: int = 8, tick: Callable[[], None] | None = None) -> Verification:
    """Read every object that the manifest names and check it against its record and its siblings.

    Digest and size, format, rows, key order against the other modalities of the shard, presence, token ranges and
    grid lengths, decodability of labels is not tried here (the bytes are those that were committed).
    """
    problems = [*_check_completeness(manifest), *_check_alignment(manifest)]
    records = list(manifest.records.values())
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(lambda r: _check_object(store, r), records):
            problems += found
            if tick:
                tick()
    return Verification(manifest.snapshot, len(records), sum(r.num_bytes for r in records), tuple(problems))


def _check_completeness(manifest: Manifest) -> Iterable[Problem]:
    for name in manifest.modalities:
        have = {r.shard for r in manifest.of(name)}
        if lacking := sorted(set(manifest.shards) - have):
            yield Problem(name, f"no object for {len(lacking)} of {len(manifest.shards)} shards, first {lacking[0]}")
        if len(producers := manifest.generations(name)) > 1:
            yield Problem(name, f"mixes {len(producers)} generations: {', '.join(producers)}")


def _check_alignment(manifest: Manifest) -> Iterable[Problem]:
    """Row i of shard s must be the same key in every modality."""
    for shard in manifest.shards:
        records = [r for (_, s), r in sorted(manifest.records.items()) if s == shard]
        expected = Counter(r.keys_digest for r in records).most_common(1)[0][0]
        for record in records:
            if record.keys_digest != expected:
                yield Problem(record.name, "its keys differ from those of the shard's other modalities")


def _check_object(store: Store, record: Record) -> list[Problem]:
    try:
        data = store.get(record.name)
    except FileNotFoundError:
        return [Problem(record.name, "the object is gone")]
    except StoreError as error:
        return [Problem(record.name, f"cannot be read: {error}")]
    if len(data) != record.num_bytes:
        return [Problem(record.name, f"has {len(data)} bytes; its record says {record.num_bytes}")]
    if hashlib.sha256(data).hexdigest() != record.digest:
        return [Problem(record.name, "its SHA-256 differs from its record's: the bytes have changed")]
    try:
        shard = open_shard(pa.py_buffer(data), "it")
    except ValueError as error:
        return [Problem(record.name, str(error))]
    return [Problem(record.name, what) for what in _disagreements(shard, record)]


def _disagreements(shard: Shard, record: Record) -> Iterable[str]:
    keys = shard.keys
    if len(keys) != record.rows:
        yield f"has {len(keys)} rows; its record says {record.rows}"
    if digest(*keys) != record.keys_digest:
        yield "its keys differ from its record's"
    if len(set(keys)) != len(keys):
        yield f"has {len(keys) - len(set(keys))} duplicate keys"
    if (shard.meta["modality"], shard.meta["shard"]) != (record.modality, record.shard):
        yield f"holds {shard.meta['modality']} shard {shard.meta['shard']}"
    columns = [shard.column(c) for c in range(shard.spec.crops if shard.entry.per_crop else 1)]
    valid = np.logical_and.reduce([np.asarray(c.is_valid()) for c in columns])
    if int(valid.sum()) != record.present:
        yield f"has {int(valid.sum())} values; its record says {record.present}"
    if shard.entry.is_tokens and shard.spec.vocabulary is not None:
        highest = max((int(np.asarray(c.drop_null().flatten()).max(initial=0)) for c in columns), default=0)
        if highest >= shard.spec.vocabulary:
            yield f"holds token {highest}; the vocabulary has {shard.spec.vocabulary} ids"
