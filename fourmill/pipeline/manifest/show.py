"""What a dataset is, for `fourmill manifest show`: totals, licences, lineage back to the corpus, and its history.

Everything follows from roots alone, so that a million shards take as long to show as one; but the use of codes of small
datasets, for which record tables are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fourmill.modalities import modality, unknown
from fourmill.pipeline.fingerprints import INGESTED
from fourmill.pipeline.manifest import Manifest, Totals, read_manifest, snapshots
from fourmill.pipeline.statistics import code_counts, entropy_bits, merged
from fourmill.pipeline.store import Store

_FEW_BLOCKS = 4  # record tables read for one modality: a second or so from object storage


@dataclass(frozen=True)
class ModalitySummary:
    """One line of `manifest show`. `missing`: shards of the corpus that it lacks. `spent`: seconds, GPU-seconds and
    attempts, summed. `recipes`: shards by recipe; `producers`: their lineages in the same order. `used`: distinct ids
    of `vocabulary` that occur; None of labels, and above 40,000 shards, where `manifest stats` tells it."""

    name: str
    shards: int
    missing: int
    rows: int
    present: int
    num_bytes: int
    quarantined: dict[str, int]
    spent: dict[str, float]
    recipes: dict[str, int]
    producers: list[dict[str, Any]]
    vocabulary: int | None = None
    used: int | None = None
    perplexity: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(manifest: Manifest) -> list[ModalitySummary]:
    """Every modality of a snapshot."""
    return [_summarise(manifest, name, manifest.totals(name)) for name in manifest.modalities]


def _summarise(manifest: Manifest, name: str, totals: Totals) -> ModalitySummary:
    return ModalitySummary(
        name,
        shards=totals.shards,
        missing=max(_corpus_shards(manifest) - totals.shards, 0),
        rows=totals.rows,
        present=totals.present,
        num_bytes=totals.num_bytes,
        quarantined=dict(totals.quarantined),
        spent=dict(totals.spent),
        recipes=dict(totals.recipes),
        producers=[manifest.producers.get(recipe, {}) for recipe in totals.recipes],
        **_use_of_codes(manifest, name),
    )


def _use_of_codes(manifest: Manifest, name: str) -> dict[str, Any]:
    if not modality(name).is_tokens or len(manifest.blocks[name]) > _FEW_BLOCKS:
        return {}
    counts = code_counts(merged(manifest.statistics(name).values()))
    perplexity = 2 ** entropy_bits(counts) if counts.any() else 0.0
    return {"vocabulary": len(counts), "used": int(np.count_nonzero(counts)), "perplexity": perplexity}


def _corpus_shards(manifest: Manifest) -> int:
    first = "rgb" if "rgb" in manifest.blocks else next(iter(manifest.modalities), "")
    return manifest.num_shards(first)


def described(producer: Mapping[str, Any]) -> str:
    """Which class made a modality, with which weights."""
    checkpoint = producer.get("checkpoint")
    weights = f" {checkpoint['reference']}" if isinstance(checkpoint, Mapping) and "reference" in checkpoint else ""
    return f"{producer.get('class', '?')} v{producer.get('version', '?')}{weights}"


def licences(producer: Mapping[str, Any]) -> tuple[str, str]:
    """Of the code and of the weights; '' where there is none to have."""
    checkpoint = producer.get("checkpoint")
    weights = str(checkpoint.get("licence", "unknown")) if isinstance(checkpoint, Mapping) else ""
    return str(producer.get("licence", "")), weights


def restricted(manifest: Manifest) -> list[str]:
    """What may not be used commercially, by the name of its licence: 'weights (licence)'."""
    from fourmill.checkpoints import is_non_commercial

    found = set()
    for producer in manifest.producers.values():
        _, weights = licences(producer)
        if is_non_commercial(weights):
            found.add(f"{producer['checkpoint']['reference']} ({weights})")
    return sorted(found)


# Lineage


@dataclass(frozen=True)
class Ancestor:
    """What made a modality, and what that read. `shards`: how many the recipe made, of the modality asked about."""

    modality: str
    recipe: str
    producer: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[Ancestor, ...] = ()
    shards: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def lineage(manifest: Manifest, name: str) -> list[Ancestor]:
    """The whole lineage of a modality, back to the corpus: a tree for each recipe in use, the commonest first."""
    if name not in manifest.blocks:
        raise ValueError(unknown("modality", name, manifest.modalities))
    recipes = manifest.totals(name).recipes
    ranked = sorted(recipes, key=lambda recipe: (-recipes[recipe], recipe))
    return [_ancestor(manifest, name, recipe, shards=recipes[recipe]) for recipe in ranked]


def _ancestor(manifest: Manifest, name: str, recipe: str, shards: int | None = None) -> Ancestor:
    if name in INGESTED and recipe not in manifest.producers:  # a reader's inputs say "corpus" for it
        recipe = next(iter(manifest.totals(name).recipes), "")
    producer = manifest.producers.get(recipe, {})
    read = sorted(producer.get("inputs", {}).items())
    return Ancestor(name, recipe, producer, tuple(_ancestor(manifest, *part) for part in read), shards)


# History


@dataclass(frozen=True)
class Change:
    """One snapshot: when it came, what it holds, and what was different before it: words, and of which modalities."""

    snapshot: int
    created: str
    samples: int
    shards: int
    num_bytes: int
    changes: dict[str, list[str]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def history(store: Store, last: int = 20, until: int | None = None) -> Iterator[Change]:
    """The newest snapshots (up to `until`), the newest first; two roots in memory at a time."""
    numbers = [n for n in snapshots(store) if until is None or n <= until]
    newer: Manifest | None = None
    for number in [*reversed(numbers[-last - 1 :])]:
        older = read_manifest(store, number)
        if newer is not None:
            yield _change(older, newer)
        newer = older
    if newer is not None and len(numbers) <= last:
        yield _change(Manifest(store), newer)


def _change(old: Manifest, new: Manifest) -> Change:
    totals = {name: new.totals(name) for name in new.modalities}
    samples = totals["rgb"].rows if "rgb" in totals else max((t.rows for t in totals.values()), default=0)
    shards, num_bytes = sum(t.shards for t in totals.values()), sum(t.num_bytes for t in totals.values())
    changes: dict[str, list[str]] = {}
    for name in sorted({*old.modalities, *totals}):
        for words in _differences(old, new, name, totals[name]) if name in totals else ("gone",):
            changes.setdefault(words, []).append(name)
    if old.retries_name != new.retries_name:
        changes["rows in quarantine were put back into the plan"] = []
    if old.snapshot and old.corpus != new.corpus:
        changes["another entry of the corpus"] = []
    return Change(new.snapshot, new.created, samples, shards, num_bytes, changes)


def _differences(old: Manifest, new: Manifest, name: str, now: Totals) -> Iterator[str]:
    if name not in old.blocks:
        yield f"new, {_number(now.shards, 'shard')}"
        return
    before = old.totals(name)
    if now.shards != before.shards:
        yield f"{_number(abs(now.shards - before.shards), 'shard')} {'more' if now.shards > before.shards else 'fewer'}"
    for recipe, count in now.recipes.items():
        if recipe not in before.recipes:
            yield f"{_number(count, 'shard')} by another recipe ({recipe})"
    same = now.shards == before.shards and now.recipes == before.recipes
    if same and _fingerprints(old, name) != _fingerprints(new, name):
        yield "some shards made again"
    if now.quarantined != before.quarantined:
        yield f"{sum(before.quarantined.values())} rows in quarantine before, {sum(now.quarantined.values())} now"


def _fingerprints(manifest: Manifest, name: str) -> dict[int, str]:
    return {block: info.fingerprints for block, info in manifest.blocks[name].items()}


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
