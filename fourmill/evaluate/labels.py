"""The pass over a dataset: every label of every shard meets its sample's truth, moved into the recorded crop.

One shard is open and one sample in memory at a time. Labels of different producers (another teacher, or an older
version that was not redone) are measured apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fourmill.evaluate.dense import DepthMeasure, NormalMeasure, SemsegMeasure
from fourmill.evaluate.measure import IncomparableError, Measure
from fourmill.evaluate.objects import DetMeasure, InstanceMeasure, SamMeasure
from fourmill.evaluate.panoptic import PanopticMeasure
from fourmill.evaluate.results import Evaluation, LabelScore, Place, Worst
from fourmill.evaluate.truth import DepthFiles, Truth, TruthSource, open_truth
from fourmill.evaluate.words import CaptionMeasure, CaptionsMeasure, RetrievalMeasure, text_encoder
from fourmill.modalities import modality, unknown
from fourmill.pipeline.geometry import Crop
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.manifest.show import described
from fourmill.pipeline.shards import Shard, read_shard
from fourmill.pipeline.store import Store, open_store

MEASURES: dict[str, type[Measure]] = {
    "depth": DepthMeasure,
    "normal": NormalMeasure,
    "semseg": SemsegMeasure,
    "panoptic": PanopticMeasure,
    "instance": InstanceMeasure,
    "det": DetMeasure,
    "sam_instance": SamMeasure,
    "caption": CaptionMeasure,
    "captions": CaptionsMeasure,
}
"""Which measure takes the labels of a modality; `clip_global` needs an encoder of texts besides."""
_MOST_REASONS = 20
MEASURED = (*MEASURES, "clip_global")
"""Modalities that can be compared with truth."""


def evaluate_labels(
    dataset: str,
    truth: str | None = None,
    labels: Sequence[str] | None = None,
    count: int | None = None,
    worst: int = 3,
    depth_files: DepthFiles | None = None,
    wanted: Callable[[str], bool] = lambda key: True,
    progress: Callable[[int], None] | None = None,
    snapshot: int | None = None,
    shards: Collection[int] | None = None,
) -> Evaluation:
    """Compare the labels of a dataset with the truth at `truth` (None: scenes, rendered again).

    `labels`: only these modalities. `count`: only the first so many samples that have truth. `wanted`: which keys.
    `worst`: how many of the worst values are named a modality. `snapshot`: by default the newest. `shards`: only these.
    ValueError where there is nothing of the kind asked for.
    """
    store = open_store(dataset)
    manifest = read_manifest(store, snapshot)
    chosen = _chosen(manifest, labels)
    source = open_truth(truth, depth_files)
    walk = _Walk(store, manifest, source, chosen, worst)
    for number in manifest.shards.tolist() if shards is None else sorted(shards):
        if count is not None and walk.samples >= count:
            break
        walk.shard(number, count, wanted)
        if progress:
            progress(walk.samples)
    return walk.outcome()


def _chosen(manifest: Manifest, labels: Sequence[str] | None) -> list[str]:
    have = [m for m in manifest.modalities if modality(m).name in MEASURED]
    for name in labels or ():
        if name not in have:
            raise ValueError(unknown("label modality to evaluate", name, have))
    return list(labels) if labels else have


@dataclass
class _Tally:
    """What one producer's labels of one modality have come to so far."""

    measure: Measure | None
    producer: str
    reason: str = ""
    compared: int = 0
    quarantined: int = 0
    missing: int = 0
    without_truth: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    worst: Worst = field(default_factory=Worst)


class _Walk:
    """The state of one pass."""

    def __init__(self, store: Store, manifest: Manifest, source: TruthSource, names: Sequence[str], worst: int) -> None:
        self.store, self.manifest, self.source, self.names, self.worst = store, manifest, source, names, worst
        self.tallies: dict[tuple[str, str], _Tally] = {}
        self.samples = self.size = 0
        self.bad_truth: Counter[str] = Counter()

    def shard(self, number: int, count: int | None, wanted: Callable[[str], bool]) -> None:
        opened = {m: self._opened(m, number) for m in ("source", "crop_settings", *self.names)}
        source, crops = opened.pop("source"), opened.pop("crop_settings")
        if source is None or crops is None:
            raise ValueError(f"shard {number} of {self.store.uri} has no source or crop_settings: label it first")
        self.size = crop_size(crops)
        tallies = {name: self._tally(name, shard) for name, shard in opened.items() if shard is not None}
        for row, key in enumerate(source.keys):
            if count is not None and self.samples >= count:
                return
            if wanted(key):
                shards = {m: s for m, s in opened.items() if s is not None}
                self._sample(_Row(number, row, key), source.value(row), crops, shards, tallies)

    def _opened(self, name: str, number: int) -> Shard | None:
        record = self.manifest.record(name, number)
        return read_shard(self.store, record.name) if record else None

    def _tally(self, name: str, shard: Shard) -> _Tally:
        record = self.manifest.record(name, int(shard.meta["shard"]))
        assert record is not None  # the shard was opened by it
        if (name, record.producer) not in self.tallies:
            producer = self.manifest.producers.get(record.producer, {})
            tally = _Tally(None, described(producer), worst=Worst(self.worst))
            try:
                tally.measure = self._measure(name, shard, producer)
            except IncomparableError as error:
                tally.reason = str(error)
            self.tallies[name, record.producer] = tally
        return self.tallies[name, record.producer]

    def _measure(self, name: str, shard: Shard, producer: Mapping[str, Any]) -> Measure:
        base = modality(name).name
        if base == "clip_global":
            return RetrievalMeasure(shard.spec, self.source, self.size, text_encoder(producer))
        return MEASURES[base](shard.spec, self.source, self.size)

    def _sample(
        self,
        at: _Row,
        source: dict[str, Any],
        crops: Shard,
        shards: Mapping[str, Shard],
        tallies: Mapping[str, _Tally],
    ) -> None:
        parts = frozenset[str]().union(*(t.measure.parts for t in tallies.values() if t.measure))
        views = dict(crops_of(at.row, source, crops))
        truth: Truth | None = None
        if views and parts:
            try:
                truth = self.source.find(at.key, source, parts)
            except ValueError as error:
                count_reason(self.bad_truth, error)
        self.samples += truth is not None
        for index in range(crops.spec.crops):
            crop = views.get(index)
            seen = truth.moved(crop, source["height"], source["width"], self.size) if truth and crop else None
            for name, shard in shards.items():
                if modality(name).per_crop or index == 0:
                    self._value(tallies[name], shard, at, index, seen)

    def _value(self, tally: _Tally, shard: Shard, at: _Row, crop: int, truth: Truth | None) -> None:
        try:
            label = shard.value(at.row, crop if shard.entry.per_crop else 0)
            if label is None:
                tally.quarantined += at.key in shard.quarantine
                tally.missing += at.key not in shard.quarantine
                return
            badness = tally.measure.add(label, truth) if tally.measure and truth else None
        except (ValueError, KeyError, TypeError) as error:
            count_reason(tally.unusable, error)
            return
        if badness is None:
            tally.without_truth += 1
            return
        tally.compared += 1
        tally.worst.add(Place(at.key, at.shard, at.row, crop, badness))

    def outcome(self) -> Evaluation:
        scores = [_score(name, tally) for (name, _), tally in sorted(self.tallies.items(), key=self._order)]
        bad = dict(self.bad_truth)
        uri, snapshot = self.store.uri, self.manifest.snapshot
        return Evaluation(uri, snapshot, self.source.name, self.samples, self.size, tuple(scores), bad)

    def _order(self, item: tuple[tuple[str, str], _Tally]) -> tuple[int, tuple[str, str]]:
        return MEASURED.index(modality(item[0][0]).name), item[0]


@dataclass(frozen=True)
class _Row:
    """Where a sample stands."""

    shard: int
    row: int
    key: str


def count_reason(reasons: Counter[str], error: Exception) -> None:
    """Count an error by its text; after so many different ones, the rest together."""
    reason = str(error) if isinstance(error, ValueError) else repr(error)
    reasons[reason if reason in reasons or len(reasons) < _MOST_REASONS else "other reasons"] += 1


def _score(name: str, tally: _Tally) -> LabelScore:
    counts = {n: getattr(tally, n) for n in ("compared", "quarantined", "missing", "without_truth")}
    fields: dict[str, Any] = {**counts, "unusable": dict(tally.unusable)}
    if tally.measure is None:
        return LabelScore(name, tally.producer, "", {}, notes=(f"not compared: {tally.reason}",), **fields)
    measure = tally.measure
    try:
        figures = measure.figures() if tally.compared else {}
    except IncomparableError as error:
        return LabelScore(name, tally.producer, measure.protocol, {}, notes=(f"not compared: {error}",), **fields)
    strangers, unknown_truth = measure.unmatched()
    return LabelScore(
        name,
        tally.producer,
        measure.protocol,
        figures,
        per_class=measure.per_class() if tally.compared else {},
        unmatched_labels=tuple(strangers),
        unmatched_truth=tuple(unknown_truth),
        notes=tuple(measure.notes()),
        worst=tally.worst.places,
        **fields,
    )


def crops_of(row: int, source: Mapping[str, Any], crops: Shard) -> Iterator[tuple[int, Crop]]:
    """(index, crop) of every crop that a sample has; none if its picture could not be read."""
    for index in range(crops.spec.crops):
        found = crops.value(row, index)
        if found is not None and source.get("height") and source.get("width"):
            yield index, Crop(*map(int, found))


def crop_size(crops: Shard) -> int:
    """The side that labels were made at, from the recorded lineage of the crops."""
    return int(crops.meta["producer"]["config"]["crops"]["size"])
