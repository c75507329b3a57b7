"""Export: a snapshot's samples into another layout, shard by shard, in parallel, and again from where it stopped.

Invariants: the same snapshot and options give the same bytes; every object is published whole through the store; an
output shard counts as done once its part file stands, and `fourmill.json` comes last; a sample that is left out is
counted under its reason. Objects that another export has left are never touched: they are an error.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fourmill.modalities import unknown
from fourmill.pipeline.exchange import card
from fourmill.pipeline.exchange.layout import (
    FORMAT,
    INTENT,
    PARTS,
    SUMMARY,
    Content,
    File,
    Layout,
    PartInfo,
    odd_samples,
    part_name,
    part_number,
)
from fourmill.pipeline.exchange.ml4m import Ml4m, Ml4mCrops, Ml4mFiles
from fourmill.pipeline.exchange.parquet import Parquet
from fourmill.pipeline.exchange.rows import spec_fields, take
from fourmill.pipeline.exchange.selection import (
    Chosen,
    Selection,
    Task,
    check_modalities,
    choose,
    in_parallel,
    sources,
    specs_of,
    tasks,
)
from fourmill.pipeline.exchange.webdataset import Energon, WebDataset
from fourmill.pipeline.fingerprints import referenced
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.shards import canonical, digest
from fourmill.pipeline.store import Store, open_store

_log = logging.getLogger(__name__)
LAYOUTS: dict[str, type[Layout]] = {c.name: c for c in (Ml4m, Ml4mFiles, Ml4mCrops, WebDataset, Energon, Parquet)}


@dataclass(frozen=True)
class ExportOptions:
    """`modalities`: None for all that the layout holds. `start`, `stop`: the shards, by number. `shard_size`: samples
    in an output shard; None for as many as the dataset's shards have. `keep`: incomplete samples too, None for the
    layout's custom. `mixed`: modalities that mix generations too. `split`: what the samples are called."""

    format: str
    modalities: tuple[str, ...] | None = None
    start: int = 0
    stop: int | None = None
    shard_size: int | None = None
    keep: bool | None = None
    at: int | None = None
    mixed: bool = False
    split: str = "train"
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))


@dataclass(frozen=True)
class ExportReport:
    """What lies in `out` now. Counts are of samples; `dropped` by reason, `notes` by what had to be changed; `resumed`:
    output shards that stood there already."""

    out: str
    format: str
    dataset: str
    snapshot: int
    modalities: tuple[str, ...]
    samples: int
    shards: int
    num_bytes: int
    dropped: dict[str, int]
    notes: dict[str, int]
    resumed: int

    @property
    def ok(self) -> bool:
        """Whether anything was left to export."""
        return self.samples > 0


def export_dataset(
    dataset_uri: str, out: str, options: ExportOptions, progress: Callable[[int, int], None] | None = None
) -> ExportReport:
    """Write a snapshot of the dataset into `out`. `progress` is called with shards and samples so far.

    ValueError for modalities that are not there, that the layout cannot hold or that mix generations, and where `out`
    holds another export.
    """
    if options.format not in LAYOUTS:
        raise ValueError(unknown("export format", options.format, LAYOUTS))
    store, target = open_store(dataset_uri), open_store(out)
    manifest = read_manifest(store, options.at)
    layout, selection, content = _prepared(manifest, options)
    identity = _identity(manifest, options, selection)
    intent = _claim(target, options, identity, store.uri, manifest.snapshot)
    done = {n for info in target.list(PARTS) if (n := part_number(info.name)) is not None}

    def write(task: Task) -> PartInfo:
        return _write(store, target, layout, content, task, done)

    tally = _Tally()
    chosen = in_parallel(
        lambda s: choose(store, s, selection, dict(content.specs)),
        sources(manifest, selection, dict(content.specs)),
        options.workers,
    )
    for part in in_parallel(write, tasks(tally.dropping(chosen), options.shard_size), options.workers):
        tally.add(part)
        _log.info("export: %d samples in %d shards", tally.samples, len(tally.parts))
        if progress:
            progress(len(tally.parts), tally.samples)
    report = _report(target, store, options, manifest, content, tally, len(done & {n for n, _ in tally.parts}))
    _finish(target, layout, content, report, tally, intent)
    return report


def _prepared(manifest: Manifest, options: ExportOptions) -> tuple[Layout, Selection, Content]:
    kind = LAYOUTS[options.format]
    if options.modalities is not None:
        check_modalities(manifest, Selection(options.modalities, mixed=True))
    names = kind.select(manifest, options.modalities)
    if not names:
        raise ValueError(f"nothing to export: of {', '.join(manifest.modalities)} none has a place in {kind.name}")
    keep = kind.keeps_incomplete if options.keep is None else options.keep
    if keep and not kind.keeps_incomplete:
        raise ValueError(f"{kind.name} has no place for incomplete samples: --incomplete drop")
    selection = Selection(names, options.start, options.stop, keep, options.mixed)
    check_modalities(manifest, selection)
    content = Content(manifest, names, specs_of(manifest, selection), options.split)
    return kind(content), selection, content


def _identity(manifest: Manifest, options: ExportOptions, selection: Selection) -> str:
    """Of everything that determines the output, but not where the dataset lies or which snapshot names its objects."""
    held = {m: [b.fingerprints for _, b in sorted(manifest.blocks[m].items())] for m in selection.modalities}
    chosen = {**vars(selection), "format": options.format, "shard_size": options.shard_size, "split": options.split}
    return digest(canonical({"export": FORMAT, "options": chosen, "objects": held}))


def _claim(target: Store, options: ExportOptions, identity: str, dataset: str, snapshot: int) -> dict[str, Any]:
    """Say what `out` is being filled with; ValueError if it holds something else.

    What was said first stands, although a later snapshot may hold the same objects: files are never written twice."""
    told = {k: v for k, v in vars(options).items() if k != "workers"}
    intent = {"format": FORMAT, "identity": identity, "dataset": dataset, "snapshot": snapshot, "options": told}
    if target.head(INTENT) is None:
        other = next((info.name for info in target.list()), None)
        if other is not None and target.head(INTENT) is None:  # or another of our kind has begun meanwhile
            raise ValueError(f"{target.uri} is not empty ({other}): export into a place of its own")
    if target.create(INTENT, json.dumps(intent, indent=1).encode()):
        return intent
    theirs: dict[str, Any] = json.loads(target.get(INTENT))
    if theirs.get("identity") != identity:
        raise ValueError(
            f"{target.uri} holds another export, of snapshot {theirs.get('snapshot')} of {theirs.get('dataset')} with "
            f"{theirs.get('options')}: choose another place, or remove it"
        )
    return theirs


def _write(store: Store, target: Store, layout: Layout, content: Content, task: Task, done: set[int]) -> PartInfo:
    """Publish one output shard, unless its part file says that it is there."""
    if task.number in done:
        return PartInfo.from_json(json.loads(target.get(part_name(task.number))))
    pieces = (take(store, source, content.specs, rows) for source, rows in task.pieces)
    run = next(pieces)
    for more in pieces:
        run.extended(more)
    files, notes = [], Counter[str]()
    for name, data, told in layout.files(task.number, run):
        _publish(target, name, data)
        files.append(File.of(name, data))
        notes.update(told)
    part = PartInfo(task.number, len(run.keys), tuple(files), odd_samples(run), dict(notes))
    _publish(target, part_name(task.number), canonical(part.to_json()).encode())
    return part


def _publish(target: Store, name: str, data: bytes) -> None:
    """Create an object; one that an interrupted run left is the same, anything else is not ours."""
    if not target.create(name, data) and target.get(name) != data:
        raise ValueError(f"{name} in {target.uri} is there already with other content: export into a place of its own")


@dataclass
class _Tally:
    """What has been written so far: (number, rows) of each output shard, and counts."""

    parts: list[tuple[int, int]] = field(default_factory=list)
    samples: int = 0
    num_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def dropping(self, chosen: Iterator[Chosen]) -> Iterator[Chosen]:
        for one in chosen:
            self.dropped.update(one.dropped)
            yield one

    def add(self, part: PartInfo) -> None:
        self.parts.append((part.number, part.rows))
        self.samples += part.rows
        self.num_bytes += sum(file.num_bytes for file in part.files)
        self.notes.update(part.notes)


def _report(
    target: Store,
    store: Store,
    options: ExportOptions,
    manifest: Manifest,
    content: Content,
    tally: _Tally,
    resumed: int,
) -> ExportReport:
    return ExportReport(
        target.uri,
        options.format,
        store.uri,
        manifest.snapshot,
        content.modalities,
        tally.samples,
        len(tally.parts),
        tally.num_bytes,
        dict(sorted(tally.dropped.items())),
        dict(sorted(tally.notes.items())),
        resumed,
    )


def _finish(
    target: Store, layout: Layout, content: Content, report: ExportReport, tally: _Tally, intent: dict[str, Any]
) -> None:
    """Everything beside the shards, `fourmill.json` last."""
    for name, data in layout.extra(tally.parts):
        _publish(target, name, data)
    summary = _summary(layout, content, report, intent)
    _publish(target, card.CARD, card.render(summary, layout.usage(report.shards)).encode())
    _publish(target, SUMMARY, json.dumps(summary, indent=1, sort_keys=True).encode())


def _summary(layout: Layout, content: Content, report: ExportReport, intent: dict[str, Any]) -> dict[str, Any]:
    manifest, places = content.manifest, layout.folders()
    modalities = {
        name: {
            "spec": spec_fields(content.specs[name]),
            **places[name],
            "recipes": manifest.generations(name),
        }
        for name in content.modalities
    }
    return {
        "format": FORMAT,
        "layout": report.format,
        **{name: intent[name] for name in ("identity", "dataset", "snapshot")},
        "corpus": manifest.corpus,
        "split": content.split,
        "samples": report.samples,
        "shards": report.shards,
        "dropped": report.dropped,
        "notes": report.notes,
        "modalities": modalities,
        "producers": referenced([r for m in modalities.values() for r in m["recipes"]], manifest.producers),
    }
