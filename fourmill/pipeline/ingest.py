"""Ingest: a raw corpus becomes shards of `rgb`, `alt_text` and `source`, and the first snapshot of a dataset.

Invariants: every sample of the corpus is one row, with its picture's bytes untouched, or null and the reason in
quarantine; names follow from content, so an interrupted ingest is simply run again and nothing is published before
all of it is there; one shard at a time is in memory, and the lines of a hundred for their sample table. The
manifest's corpus entry says what was read and what was not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fourmill.modalities import modality
from fourmill.pipeline import codecs, images
from fourmill.pipeline.corpus import Corpus, Sample, open_corpus
from fourmill.pipeline.corpus.values import percent_encoded, printable
from fourmill.pipeline.manifest import Manifest, Update, read_manifest, update_manifest
from fourmill.pipeline.manifest.samples import Facts, SampleTables, make_sample_tables
from fourmill.pipeline.shards import (
    FORMAT,
    Record,
    Spec,
    canonical,
    commit,
    digest,
    producer_id,
    reason_kind,
    write_shard,
)
from fourmill.pipeline.store import Store, open_store

_log = logging.getLogger(__name__)
MODALITIES = ("rgb", "alt_text", "source")
VERSION = 1  # raise it when the same corpus would give other rows


class IngestConfig(BaseModel):
    """How a corpus is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["webdataset", "folder", "parquet", "coco"] | None = None
    """Layout of the corpus; found out from its files if not given."""
    shard_size: int = Field(default=1000, ge=1, le=10_000)
    """Samples per shard. A shard's pictures are in memory at once: 1,000 of 200 KB are 0.2 GB."""
    text_field: str | None = None
    """Member, column or JSON field that holds the text, instead of the usual names (txt, caption, text, …)."""
    image_field: str | None = None
    """Member, column or, in a captions table, column of paths that holds the image, instead of the usual names."""
    check: Literal["decode", "header"] = "decode"
    """How far each picture is tried: decoded whole (5 ms for 0.25 megapixels), or its header only (0.1 ms)."""
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Threads that check pictures; no effect on the result."""
    limit: int | None = Field(default=None, ge=1)
    """Read only so many samples."""


@dataclass(frozen=True)
class IngestReport:
    """What one run read. Counts are of samples; `quarantined`, `ignored` by reason; `damage` with its place."""

    src: str
    dataset: str
    format: str
    samples: int
    shards: int
    quarantined: dict[str, int] = field(default_factory=dict)
    renamed: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)
    digest: str = ""
    snapshot: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.src} ({self.format}) -> {self.dataset}",
            f"  {self.samples} samples in {self.shards} shards, snapshot {self.snapshot}, digest {self.digest[:16]}",
        ]
        lines += [f"  quarantined: {count} x {reason}" for reason, count in self.quarantined.items()]
        lines += [f"  renamed: {self.renamed} keys that were taken or unfit"] if self.renamed else []
        lines += [f"  ignored: {count} x {what}" for what, count in self.ignored.items()]
        lines += [f"  DAMAGED: {what}" for what in self.damage]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Row:
    """One sample, checked. `faults`: reason by modality; `source` is there whatever its metadata's fault."""

    key: str
    rgb: bytes | None
    rgb_sha256: str | None
    alt_text: str | None
    source: str
    faults: dict[str, str]
    renamed: bool


def ingest(
    src: str,
    dataset_uri: str,
    config: IngestConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> IngestReport:
    """Read the corpus at `src` into a dataset. `progress` is called after each shard with the samples so far.

    The same corpus again changes nothing and publishes no snapshot. ValueError for an empty corpus, for one without a
    known layout, and for a dataset that holds another corpus.
    """
    config = config or IngestConfig()
    _check_apart(src, dataset_uri)
    store = open_store(dataset_uri)
    corpus = open_corpus(src, config.format, config.text_field, config.image_field)
    producer = _producer(corpus.format, config)
    expected = _Expected(_existing(store), store.uri, src, producer)
    records: list[Record] = []
    tally, tables = _Tally(), SampleTables(store)
    for number, rows in enumerate(_shards(corpus, config)):
        records += _commit_shard(store, number, rows, producer, expected)
        if expected.before is None:
            tables.add(_sample_facts(number, rows))
        tally.add(rows)
        _log.info("ingest: %d samples in %d shards", tally.samples, number + 1)
        if progress:
            progress(tally.samples)
    if not records:
        raise ValueError(f"the corpus at {src!r} ({corpus.format}) holds no samples{_because(corpus.damage)}")
    for what in corpus.damage:
        _log.warning("ingest: damaged, what could be read of it is kept: %s", what)
    entry = _corpus_entry(src, corpus, config, tally, records)
    samples = tables.close()
    manifest = update_manifest(store, lambda old: _with_corpus(old, entry, records, producer, samples))
    if expected.before is not None:  # known by now to be the same corpus; its tables may be lost, or never made
        manifest = make_sample_tables(store)
    return _report(src, store, entry, manifest)


@dataclass
class _Tally:
    """What the shards so far hold."""

    samples: int = 0
    renamed: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Sequence[_Row]) -> None:
        self.samples += len(rows)
        self.renamed += sum(row.renamed for row in rows)
        self.quarantined.update(reason_kind(reason) for row in rows for reason in row.faults.values())


def _check_apart(src: str, dataset_uri: str) -> None:
    """A dataset inside its corpus would be read as part of it the second time."""
    inner, outer = (p if "://" in p else str(Path(p).expanduser().absolute()) for p in (dataset_uri, src))
    if f"{inner}/".startswith(f"{outer.rstrip('/')}/"):
        raise ValueError(f"the dataset {dataset_uri!r} lies inside the corpus {src!r}: choose a place beside it")


def _producer(format_name: str, config: IngestConfig) -> dict[str, Any]:
    fields = {"format": format_name, **config.model_dump(include={"text_field", "image_field", "check"})}
    return {"class": "ingest", "version": VERSION, "config": fields}


def _existing(store: Store) -> Manifest | None:
    """The dataset's newest snapshot, if it holds a corpus already."""
    try:
        manifest = read_manifest(store)
    except FileNotFoundError:
        return None
    return manifest if manifest.corpus else None


def _shards(corpus: Corpus, config: IngestConfig) -> Iterator[list[_Row]]:
    """Rows by shard. Reading goes on in this thread while others check what was read."""
    samples = itertools.islice(iter(corpus), config.limit)
    with ThreadPoolExecutor(config.workers, thread_name_prefix="ingest") as pool:
        while True:
            futures: list[Future[_Row]] = [
                pool.submit(_row, sample, config.check) for sample in itertools.islice(samples, config.shard_size)
            ]
            if not futures:
                return
            yield [future.result() for future in futures]


def _row(sample: Sample, check: str) -> _Row:
    """A sample checked and put into the form in which it is stored."""
    faults = {name: printable(reason) for name, reason in sample.problems.items()}
    facts: dict[str, Any] = {"width": None, "height": None}
    if "rgb" not in faults:
        try:
            facts = _facts(sample.image, check)
        except images.BadImageError as error:
            faults["rgb"] = printable(str(error))
    sha256 = hashlib.sha256(sample.image).hexdigest() if sample.image else None
    source = {"origin": sample.origin, **_original(sample), **facts, "sha256": sha256, "metadata": sample.metadata}
    if "source" in faults:
        source["metadata_problem"] = faults["source"]
    return _Row(
        key=sample.key,
        rgb=None if "rgb" in faults else sample.image,
        rgb_sha256=None if "rgb" in faults else sha256,
        alt_text=sample.text,
        source=codecs.encode(modality("source"), source),
        faults=faults,
        renamed=sample.original_key is not None,
    )


def _facts(data: bytes, check: str) -> dict[str, Any]:
    """What is known of a usable picture: size of the upright picture and what its header says."""
    if check == "decode":
        width, height = images.decode(data).size
    else:
        height, width = images.size_of(data)
    return {"width": width, "height": height, **images.describe(data)}


def _original(sample: Sample) -> dict[str, str]:
    """The corpus's own key, exactly; percent-encoded under another name if it is not valid UTF-8."""
    if sample.original_key is None:
        return {}
    if printable(sample.original_key) == sample.original_key:
        return {"original_key": sample.original_key}
    return {"original_key_percent": percent_encoded(sample.original_key)}


def _commit_shard(
    store: Store, number: int, rows: Sequence[_Row], producer: dict[str, Any], expect: _Expected
) -> list[Record]:
    """Publish one shard in its three modalities, each once `expect(modality, shard, fingerprint)` has passed."""
    keys = [row.key for row in rows]
    parts: list[tuple[str, list[Any], list[str | None]]] = [
        ("rgb", [row.rgb for row in rows], [row.rgb_sha256 for row in rows]),
        ("alt_text", [row.alt_text for row in rows], [row.alt_text for row in rows]),
        ("source", [row.source for row in rows], [row.source for row in rows]),
    ]
    records = []
    for name, values, stand_ins in parts:
        faults = {row.key: row.faults[name] for row in rows if name in row.faults and name != "source"}
        fingerprint = _fingerprint(name, producer, keys, stand_ins, faults)
        expect(name, number, fingerprint)
        data = write_shard(name, number, fingerprint, keys, [values], Spec(), producer, faults)
        records.append(commit(store, data))
    return records


def _sample_facts(number: int, rows: Sequence[_Row]) -> Facts:
    """What the sample table says of a shard."""
    sources = [json.loads(row.source) for row in rows]
    faults = {row.key: row.faults["rgb"] for row in rows if "rgb" in row.faults}
    return Facts(number, [row.key for row in rows], sources, [row.alt_text is not None for row in rows], faults)


def _fingerprint(
    name: str, producer: dict[str, Any], keys: Sequence[str], values: Sequence[str | None], faults: dict[str, str]
) -> str:
    """Of everything in the object; pictures are represented by their SHA-256."""
    held = digest(*("-" if value is None else f"+{value}" for value in values))
    return digest(f"ingest {FORMAT}", name, canonical(producer), digest(*keys), held, canonical(faults))[:16]


@dataclass(frozen=True)
class _Expected:
    """What the dataset holds already: a shard of another corpus must not be written into it."""

    before: Manifest | None
    uri: str
    src: str
    producer: dict[str, Any]

    def __call__(self, name: str, number: int, fingerprint: str) -> None:
        if self.before is None:
            return
        known = self.before.record(name, number)
        if known is not None and known.fingerprint == fingerprint:
            return
        corpus = self.before.corpus
        if known is None:
            why = f"that has {corpus.get('shards')} shards, this more"
        elif known.producer != producer_id(self.producer):
            config = self.before.producers.get(known.producer, {}).get("config")
            why = f"that was read as {config}, this as {self.producer['config']}"
        else:
            why = f"shard {number} has other samples than with {corpus.get('settings')}"
        raise ValueError(
            f"{self.uri} already holds the corpus {_sources(corpus)}, and {self.src!r} is another: {why}; "
            "nothing was changed, ingest into another dataset"
        )


def _sources(corpus: dict[str, Any]) -> str:
    return ", ".join(map(repr, corpus.get("sources", ["?"])))


def _corpus_entry(
    src: str, corpus: Corpus, config: IngestConfig, tally: _Tally, records: Sequence[Record]
) -> dict[str, Any]:
    """What the manifest says of the corpus."""
    return {
        "sources": [src if "://" in src else str(Path(src).expanduser().absolute())],
        "format": corpus.format,
        "settings": config.model_dump(mode="json", exclude={"format", "workers"}),
        "samples": tally.samples,
        "shards": len(records) // len(MODALITIES),
        "quarantined": dict(sorted(tally.quarantined.items())),
        "renamed": tally.renamed,
        "ignored": dict(sorted(corpus.ignored.items())),
        "damaged": list(corpus.damage),
        "digest": digest(*(record.digest for record in records)),
    }


def _with_corpus(
    old: Manifest,
    entry: dict[str, Any],
    records: Sequence[Record],
    producer: dict[str, Any],
    samples: Sequence[dict[str, Any]],
) -> Update | None:
    if not old.corpus:
        return Update(records, {producer_id(producer): producer}, entry, sample_tables=samples)
    if old.corpus.get("digest") != entry["digest"]:
        raise ValueError(
            f"the dataset holds the corpus {_sources(old.corpus)} of {old.corpus.get('samples')} samples, and "
            f"{entry['sources'][0]!r} is another, of {entry['samples']}: ingest into another dataset"
        )
    return None


def _report(src: str, store: Store, entry: dict[str, Any], manifest: Manifest) -> IngestReport:
    names = ("format", "samples", "shards", "quarantined", "renamed", "ignored", "digest")
    fields = {name: entry[name] for name in names}
    return IngestReport(src, store.uri, damage=entry["damaged"], snapshot=manifest.snapshot, **fields)


def _because(damage: Sequence[str]) -> str:
    return f": {'; '.join(damage[:3])}" if damage else ""
