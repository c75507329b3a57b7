"""Import: what `export` wrote, or anyone's ml-4m folder, becomes a dataset.

Invariants: a shard's modalities hold the same keys in the same order or the import stops and says how they differ; what
cannot be read is a null with a reason; what matches no modality is refused by name. Names follow from content, so an
interrupted import is run again. A snapshot every few hundred shards bounds the memory, and the corpus entry comes with
the last: a dataset without it is known to be unfinished. The lineage says 'import' and keeps the licences of what made
the values.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.modalities import Kind, modality
from fourmill.pipeline import codecs, conventions
from fourmill.pipeline.corpus.values import KeyRegister
from fourmill.pipeline.exchange.layout import SUMMARY
from fourmill.pipeline.exchange.ml4m import Ml4m
from fourmill.pipeline.exchange.ml4m_read import Ml4mReader, ReadOptions
from fourmill.pipeline.exchange.readers import ExportReader, Reader, is_dataset, read_summary
from fourmill.pipeline.exchange.rows import Part, Run
from fourmill.pipeline.exchange.selection import in_parallel
from fourmill.pipeline.exchange.target import Target
from fourmill.pipeline.fingerprints import INGESTED, content_of, recipe_of
from fourmill.pipeline.images import BadImageError, size_of
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.manifest.samples import Facts, SampleTables
from fourmill.pipeline.shards import (
    FORMAT,
    Record,
    Spec,
    canonical,
    commit,
    digest,
    reason_kind,
    write_shard,
)
from fourmill.pipeline.store import Store, open_store

_log = logging.getLogger(__name__)
VERSION = 1  # raise it when the same source would give other shards
_TOGETHER = 256  # shards in a snapshot: records with histograms of 10 modalities take 10 to 100 KB a shard


@dataclass(frozen=True)
class ImportOptions:
    """`read`: how anyone else's folder is to be taken; our own exports say it themselves."""

    read: ReadOptions = field(default_factory=ReadOptions)
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))


@dataclass(frozen=True)
class ImportReport:
    """What came in. `quarantined`: values by modality and reason; `skipped`: folders left out, and why; `renamed`: keys
    that were taken or unfit."""

    src: str
    dataset: str
    layout: str
    snapshot: int
    samples: int
    shards: int
    modalities: tuple[str, ...]
    quarantined: dict[str, int]
    skipped: dict[str, str]
    renamed: int

    @property
    def ok(self) -> bool:
        """Whether every value could be read."""
        return not any(": unreadable" in reason or ": missing" in reason for reason in self.quarantined)


def open_reader(src: str, options: ReadOptions) -> Reader:
    """The reader for what lies at `src`. ValueError if it is neither an export nor an ml-4m folder."""
    store = open_store(src)
    summary = read_summary(store)
    if summary is not None:
        return (
            Ml4mReader(store, summary, options)
            if summary["layout"].startswith(Ml4m.name)
            else ExportReader(store, summary)
        )
    names = [info.name for _, info in zip(range(1000), store.list(), strict=False)]
    if not names:
        raise ValueError(f"nothing to import at {src!r}: it is empty or does not exist")
    if is_dataset(names):
        raise ValueError(f"{src!r} is a dataset of Fourmill's own: it needs no import")
    try:
        return Ml4mReader(store, None, options)
    except ValueError as error:
        raise type(error)(
            f"{error} (there is no {SUMMARY} of an export; a raw corpus goes through `fourmill ingest`)"
        ) from error


def import_dataset(
    src: str, dataset_uri: str, options: ImportOptions | None = None, progress: Callable[[int, int], None] | None = None
) -> ImportReport:
    """Make a dataset of what lies at `src`. `progress` is called with shards and samples so far.

    The same source again changes nothing. WrongDataError for data that contradicts itself; ValueError for a source that
    is none, and for a dataset that holds something else.
    """
    options = options or ImportOptions()
    reader, store = open_reader(src, options.read), open_store(dataset_uri)
    target = Target(store, src)
    producers = {name: _producer(reader, name) for name in (*reader.specs, "source")}
    lineages = {**reader.producers(), **{recipe_of(p): p for p in producers.values()}}
    register, tally, tables = KeyRegister(), _Tally(), SampleTables(store)

    def prepared(run: Run) -> Run:
        return run if reader.settled_keys else _with_own_keys(run, register, tally)

    def write(numbered: tuple[int, Run]) -> tuple[int, Run, list[Record]]:
        number, run = numbered
        _checked(run)
        _sourced(run, reader)
        return number, run, [_commit(target, number, name, run, producers[name]) for name in run.parts]

    runs = enumerate(map(prepared, in_parallel(reader.read, range(len(reader)), options.workers)))
    for number, run, records in in_parallel(write, runs, options.workers):
        tables.add(_facts(number, run))
        tally.add(run, records)
        if len(tally.records) >= _TOGETHER * len(records):
            target.publish(tally.taken(), lineages)
        if progress:
            progress(number + 1, tally.samples)
    if not tally.samples:
        raise ValueError(f"nothing to import at {src!r}: it holds no samples")
    manifest = target.publish(tally.taken(), lineages, _corpus_entry(src, reader, tally), tables.close())
    return _report(src, store, reader, manifest, tally)


@dataclass
class _Tally:
    """What has come in so far. `records`: those that no snapshot has yet; `digest`: of all."""

    samples: int = 0
    digest: str = ""
    renamed: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    records: list[Record] = field(default_factory=list)

    def add(self, run: Run, records: Sequence[Record]) -> None:
        self.samples += len(run.keys)
        self.records += records
        self.digest = digest(self.digest, *(record.digest for record in records))
        for name, part in run.parts.items():
            self.quarantined.update(f"{name}: {reason_kind(reason)}" for reason in part.quarantine.values())

    def taken(self) -> list[Record]:
        """The records that wait for a snapshot, which is now to have them."""
        records, self.records = self.records, []
        return records


def _producer(reader: Reader, name: str) -> dict[str, Any]:
    """The lineage of an imported modality. Where it lay is in the corpus entry: objects name no one's folders."""
    lineage = reader.lineage(name) if name in reader.specs else {}
    return {"class": "import", "version": VERSION, "config": {"layout": reader.layout}, **lineage}


def _with_own_keys(run: Run, register: KeyRegister, tally: _Tally) -> Run:
    """The run with keys that are fit to store and its own; ml-4m's shards may all count from zero."""
    claimed = {key: register.claim(key) for key in run.keys}
    tally.renamed += sum(new != old for old, new in claimed.items())
    for part in run.parts.values():
        part.quarantine = {claimed[key]: reason for key, reason in part.quarantine.items()}
    return Run([claimed[key] for key in run.keys], run.parts)


def _checked(run: Run) -> None:
    """Labels that break their modality's convention become nulls with the reason, as they would in a worker."""
    for name, part in run.parts.items():
        entry = modality(name)
        if name in INGESTED or entry.is_tokens or entry.kind is Kind.CROP:
            continue
        for column in part.columns:
            for row, stored in enumerate(column):
                if stored is None:
                    continue
                try:
                    conventions.check(entry, part.spec, codecs.decode(entry, stored))
                except (ValueError, KeyError, TypeError, OSError) as error:
                    column[row] = None
                    kind = "" if isinstance(error, conventions.ConventionError) else "unreadable: "
                    part.quarantine.setdefault(run.keys[row], f"{kind}{error}")


def _sourced(run: Run, reader: Reader) -> None:
    """Where a sample came from, in the words of ingest, for sources that do not bring it along."""
    if "source" in run.parts:
        return
    rgb = run.parts["rgb"].columns[0] if "rgb" in run.parts else [None] * len(run.keys)
    rows = [
        codecs.encode(modality("source"), {"origin": key, **_picture_facts(data), "metadata": {}})
        for key, data in zip(run.keys, rgb, strict=True)
    ]
    run.parts["source"] = Part(Spec(), [rows])


def _picture_facts(data: bytes | None) -> dict[str, Any]:
    try:
        height, width = size_of(data or b"")
    except BadImageError:
        return {"width": None, "height": None, "sha256": None}
    assert data is not None
    return {"width": width, "height": height, "sha256": hashlib.sha256(data).hexdigest()}


def _commit(target: Target, number: int, name: str, run: Run, producer: Mapping[str, Any]) -> Record:
    part, content = run.parts[name], content_of(producer)
    held = digest(*(_token(v) for column in part.columns for v in column))
    parts = (canonical(content), canonical(vars(part.spec)), digest(*run.keys), held, canonical(part.quarantine))
    fingerprint = digest(f"import {FORMAT}", name, *parts)[:16]
    target.check(name, number, fingerprint)
    return commit(
        target.store,
        write_shard(name, number, fingerprint, run.keys, part.columns, part.spec, content, part.quarantine),
    )


def _token(value: Any) -> bytes:
    """A stored value as bytes that are its own."""
    if value is None:
        return b"-"
    if isinstance(value, str):
        return b"+" + value.encode()
    return b"+" + (value if isinstance(value, bytes) else np.asarray(value).astype("<i8").tobytes())


def _facts(number: int, run: Run) -> Facts:
    """What the sample table says of a shard."""
    sources = [None if text is None else json.loads(text) for text in run.parts["source"].columns[0]]
    texts = run.parts["alt_text"].columns[0] if "alt_text" in run.parts else [None] * len(run.keys)
    faults = run.parts["rgb"].quarantine if "rgb" in run.parts else {}
    return Facts(number, run.keys, sources, [text is not None for text in texts], faults)


def _corpus_entry(src: str, reader: Reader, tally: _Tally) -> dict[str, Any]:
    """What the manifest says of the source."""
    return {
        "sources": [src if "://" in src else str(Path(src).expanduser().absolute())],
        "format": f"import {reader.layout}",
        "settings": {},
        "samples": tally.samples,
        "shards": len(reader),
        "quarantined": dict(sorted(tally.quarantined.items())),
        "renamed": tally.renamed,
        "ignored": {},
        "damaged": [],
        "digest": tally.digest,
        "imported": reader.told(),
    }


def _report(src: str, store: Store, reader: Reader, manifest: Manifest, tally: _Tally) -> ImportReport:
    skipped = dict(reader.told().get("skipped", {}))
    return ImportReport(
        src,
        store.uri,
        reader.layout,
        manifest.snapshot,
        tally.samples,
        len(reader),
        tuple(manifest.modalities),
        dict(sorted(tally.quarantined.items())),
        skipped,
        tally.renamed,
    )
