"""The pass over a dataset's tokens: each is decoded and meets the label it came from, and the truth where it is known.

Rows are paired by position (one row, one sample). Which samples are decoded follows from their keys alone, those first
that training holds out first, so that as many as possible were never learned from. One shard is open and a few samples
are in memory at a time. Codes and bits are of all rows: they stand in the manifest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fourmill.config import Config
from fourmill.evaluate.labels import MEASURES, count_reason
from fourmill.evaluate.results import Place
from fourmill.evaluate.tokens.measure import Setting
from fourmill.evaluate.tokens.objects import MaskFidelity, ObjectFidelity, SamFidelity
from fourmill.evaluate.tokens.rebuild import Checkpoints, RebuildError, Rebuilt, producers_of, rebuild
from fourmill.evaluate.tokens.results import TokenEvaluation
from fourmill.evaluate.tokens.rows import Rows, chosen_rows, keys_of
from fourmill.evaluate.tokens.sources import SOURCES
from fourmill.evaluate.tokens.tally import AgainstTruth, Tally
from fourmill.evaluate.truth import Truth, TruthSource, open_truth
from fourmill.labelers import LABELERS
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.shards import Spec
from fourmill.pipeline.store import Store, open_store

_CHUNK = 16  # samples in memory at a time
_WITHOUT_SCORES = (ObjectFidelity, MaskFidelity, SamFidelity)
# Where no label is stored and no configuration names its labeler: the weakest claim that can be compared.
_WEAKEST = {"depth": Spec(convention="relative"), "normal": Spec(convention="opencv")}


def evaluate_tokens(
    dataset: str,
    truth: str | None = None,
    modalities: Sequence[str] | None = None,
    count: int | None = None,
    config: Config | None = None,
    checkpoints: Checkpoints | None = None,
    rfid_network: str | None = None,
    worst: int = 3,
    wanted: Callable[[str], bool] = lambda key: True,
    rebuilt: Mapping[tuple[str, str], Rebuilt | str] | None = None,
    snapshot: int | None = None,
    shards: Collection[int] | None = None,
) -> TokenEvaluation:
    """Decode the tokens of a dataset and compare them with labels and with truth.

    `truth`: where it lies; None: scenes, rendered again. `count`: only so many samples, by the hash of their keys.
    `config`, `checkpoints`: where the manifest's own checkpoints are not at hand. `wanted`: which keys. `rebuilt`:
    tokenizers that are loaded already, or why they could not be. `snapshot`: of the dataset, by default the newest.
    `shards`: only these.
    """
    store = open_store(dataset)
    manifest = read_manifest(store, snapshot)
    wanted_tokens = producers_of(manifest, modalities)
    source = open_truth(truth)
    loaded = rebuilt if rebuilt is not None else rebuild_all(manifest, wanted_tokens, config, checkpoints)
    tallies = {key: Tally(manifest, key, loaded.get(key, "it was not asked for"), worst) for key in wanted_tokens}
    walk = _Walk(store, manifest, source, tallies, config, rfid_network)
    chosen = chosen_rows(store, manifest, count, wanted, shards)
    for number, rows in chosen.items():
        walk.shard(number, rows)
    samples, total = sum(map(len, chosen.values())), _rows(manifest)
    scores = tuple(tally.score() for tally in tallies.values())
    return TokenEvaluation(store.uri, manifest.snapshot, source.name, samples, total, scores, dict(walk.bad_truth))


def rebuild_all(
    manifest: Manifest,
    wanted: Sequence[tuple[str, str]],
    config: Config | None = None,
    checkpoints: Checkpoints | None = None,
) -> dict[tuple[str, str], Rebuilt | str]:
    """The tokenizer of each (token modality, producer), or why it cannot be brought back."""
    found: dict[tuple[str, str], Rebuilt | str] = {}
    for name, producer in wanted:
        try:
            found[name, producer] = rebuild(manifest, name, producer, config, checkpoints)
        except RebuildError as error:
            found[name, producer] = str(error)
    return found


def _rows(manifest: Manifest) -> int:
    return manifest.totals("rgb" if "rgb" in manifest.modalities else manifest.modalities[0]).rows


@dataclass
class _Sample:
    """One row: where it stands, its truth, and the truth as its crops show it."""

    place: Place
    truth: Truth | None = None
    seen: dict[int, Truth | None] = field(default_factory=dict)


class _Walk:
    """The state of one pass."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        source: TruthSource,
        tallies: Mapping[tuple[str, str], Tally],
        config: Config | None,
        rfid_network: str | None,
    ) -> None:
        self.store, self.manifest, self.source, self.tallies = store, manifest, source, tallies
        self.config, self.rfid_network = config, rfid_network
        self.bad_truth: Counter[str] = Counter()

    def shard(self, number: int, rows: Sequence[int]) -> None:
        """Compare these rows of one shard."""
        opened = Rows(self.store, self.manifest, number)
        here = []
        for (name, producer), tally in self.tallies.items():
            record = self.manifest.record(name, number)
            if record is not None and record.producer == producer and tally.rebuilt is not None:
                self._prepare(tally, opened)
                here.append(tally)
        keys = keys_of(self.store, self.manifest, number)
        for start in range(0, len(rows), _CHUNK):
            chunk = [(row, keys[row]) for row in rows[start : start + _CHUNK]]
            self._chunk(chunk, opened, here)

    def _prepare(self, tally: Tally, opened: Rows) -> None:
        """Measures are made when the first shard shows what they need to know."""
        kind = SOURCES.get(tally.source)
        if tally.fidelity is not None or kind is None or tally.rebuilt is None:
            return
        spec, notes = self._spec(tally.source, opened)
        tally.fidelity = kind.measure(Setting(spec, tally.rebuilt.tokenizer, self.rfid_network))
        if tally.source in MEASURES:
            if kind.measure in _WITHOUT_SCORES:
                notes = [*notes, "tokens carry no scores, on which average precision depends"]
            tally.truth = AgainstTruth(tally.source, spec, self.source, opened.size, notes)

    def _spec(self, source: str, opened: Rows) -> tuple[Spec, list[str]]:
        """What is known of a label's values: from the stored label, else from the labeler that is configured."""
        stored = opened.shard(source)
        if stored is not None:
            return stored.spec, []
        for name, options in (self.config.labelers if self.config else {}).items():
            labeler = LABELERS.build(name, options)
            if source in labeler.makes:
                return labeler.spec(source), [f"no label is stored; taken for {name}'s of the configuration"]
        weak = ["no label is stored: medians aligned; --config with its labeler says more"]
        return _WEAKEST.get(source, Spec()), weak if source == "depth" else []

    def _chunk(self, rows: Sequence[tuple[int, str]], opened: Rows, tallies: Sequence[Tally]) -> None:
        parts = frozenset[str]().union(*(t.truth.parts for t in tallies if t.truth is not None))
        samples = [self._sample(Place(key, opened.number, row, 0, 0.0), opened, parts) for row, key in rows]
        for tally in tallies:
            shard = opened.shard(tally.name)
            assert shard is not None
            for crop in range(shard.spec.crops if shard.entry.per_crop else 1):
                self._values(tally, samples, crop, opened)

    def _sample(self, place: Place, opened: Rows, parts: frozenset[str]) -> _Sample:
        sample = _Sample(place)
        if parts and opened.crops(place.row):
            try:
                sample.truth = self.source.find(place.key, opened.described(place.row), parts)
            except ValueError as error:
                count_reason(self.bad_truth, error)
        return sample

    def _values(self, tally: Tally, samples: Sequence[_Sample], crop: int, opened: Rows) -> None:
        tokens = [(sample, opened.value(tally.name, sample.place.row, crop)) for sample in samples]
        tally.missing += sum(row is None for _, row in tokens)
        there = [(sample, row) for sample, row in tokens if row is not None]
        values = tally.restored([row for _, row in there]) if there else []
        for (sample, _), value in zip(there, values, strict=True):
            if value is None:
                continue
            label = opened.label(tally.source, sample.place.row, crop)
            if tally.fidelity is not None:
                tally.compare(value, label, sample.place, crop)
            seen = _seen(sample, crop, opened)
            if tally.truth is not None and seen is not None:
                tally.truth.add(value, label, seen)


def _seen(sample: _Sample, crop: int, opened: Rows) -> Truth | None:
    """The truth of one crop."""
    place = opened.crops(sample.place.row).get(crop)
    if sample.truth is None or place is None:
        return None
    if crop not in sample.seen:
        described = opened.described(sample.place.row)
        sample.seen[crop] = sample.truth.moved(place, described["height"], described["width"], opened.size)
    return sample.seen[crop]
