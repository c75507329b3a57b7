"""What differs between two snapshots, of one dataset or of two on different stores.

Blocks whose record tables are the same object are skipped unread; of the others only two columns are compared, and
shard objects are opened only where per-sample differences are asked for. Two shards are the same if their objects'
bytes are: a shard redone by another version with equal values counts as changed, and `samples` shows that no value is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fourmill.pipeline.fingerprints import differences, explain
from fourmill.pipeline.manifest import BlockInfo, Manifest
from fourmill.pipeline.manifest.diff_samples import SampleDiff, ShardPair, compare_shards

_NAMED = 5  # shard numbers that are listed as examples of each change


@dataclass
class ShardCounts:
    """Shards by what became of them; `first`: a few of each, by number."""

    same: int = 0
    changed: int = 0
    added: int = 0
    removed: int = 0
    other_keys: int = 0  # of the changed: the keys themselves or their order
    first: dict[str, list[int]] = field(default_factory=dict)

    def count(self, what: str, shards: np.ndarray) -> None:
        setattr(self, what, getattr(self, what) + len(shards))
        if len(shards):
            named = self.first.setdefault(what, [])
            named += shards[: _NAMED - len(named)].tolist()


@dataclass(frozen=True)
class ModalityDiff:
    """One modality of A and B. `kind`: 'added', 'removed' or 'changed'. `present`, `rows`, `quarantined`: (A, B).

    `producers`: in words what about its making differs. `samples`: values that differ, as far as they were asked for.
    """

    name: str
    kind: str
    shards: ShardCounts
    rows: tuple[int, int]
    present: tuple[int, int]
    quarantined: dict[str, tuple[int, int]]
    producers: tuple[str, ...]
    samples: SampleDiff | None = None


@dataclass(frozen=True)
class ManifestDiff:
    """Everything that differs between snapshots `a` and `b` (uri, number). `corpus`: in words, and no reason by itself
    to call them different: the same pictures may have lain elsewhere."""

    a: tuple[str, int]
    b: tuple[str, int]
    modalities: tuple[ModalityDiff, ...]
    same: tuple[str, ...]
    corpus: tuple[str, ...]
    retried: int  # (modality, shard) put back into the plan more often in one than in the other
    tables_read: int

    @property
    def equal(self) -> bool:
        return not self.modalities

    def to_json(self) -> dict[str, Any]:
        return {"equal": self.equal, **asdict(self)}


def diff(a: Manifest, b: Manifest, names: Iterable[str] | None = None, samples: int = 0) -> ManifestDiff:
    """Compare two snapshots, or only the modalities `names`; for each list at most `samples` differing samples."""
    reader = _Tables()
    everything = sorted({*a.modalities, *b.modalities})
    wanted = everything if names is None else _known(names, everything)
    found = {name: _modality_diff(a, b, name, samples, reader) for name in wanted}
    return ManifestDiff(
        (a.store.uri, a.snapshot),
        (b.store.uri, b.snapshot),
        tuple(d for d in found.values() if d is not None),
        tuple(name for name, d in found.items() if d is None),
        tuple(differences(a.corpus, b.corpus)),
        _retried(a, b),
        reader.count,
    )


def _known(names: Iterable[str], have: list[str]) -> list[str]:
    from fourmill.modalities import unknown

    for name in (names := list(names)):
        if name not in have:
            raise ValueError(unknown("modality of these datasets", name, have))
    return names


def _retried(a: Manifest, b: Manifest) -> int:
    old, new = a.retries.counts, b.retries.counts
    places = {(name, shard) for counts in (old, new) for name, shards in counts.items() for shard in shards}
    return sum(old.get(name, {}).get(shard, 0) != new.get(name, {}).get(shard, 0) for name, shard in places)


class _Tables:
    """Reads record tables and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def read(self, manifest: Manifest, name: str, block: int) -> pa.Table:
        self.count += 1
        return manifest.read_table(manifest.blocks[name][block])


def _modality_diff(a: Manifest, b: Manifest, name: str, samples: int, reader: _Tables) -> ModalityDiff | None:
    counts, compared = ShardCounts(), _Samples(a, b, name, samples)
    for block in sorted({*_blocks(a, name), *_blocks(b, name)}):
        pair = (_blocks(a, name).get(block), _blocks(b, name).get(block))
        compared.changed(*_compare_block(a, b, name, block, pair, counts, reader))
    kind = "added" if name not in a.modalities else "removed" if name not in b.modalities else "changed"
    if kind == "changed" and not (counts.changed or counts.added or counts.removed):
        return None
    totals = [m.totals(name) if name in m.modalities else None for m in (a, b)]
    rows, present = ([getattr(t, what) if t else 0 for t in totals] for what in ("rows", "present"))
    reasons = [dict(t.quarantined) if t else {} for t in totals]
    return ModalityDiff(
        name=name,
        kind=kind,
        shards=counts,
        rows=(rows[0], rows[1]),
        present=(present[0], present[1]),
        quarantined=_changed_counts(*reasons),
        producers=tuple(_producers(a, b, name)),
        samples=compared.result(),
    )


def _blocks(manifest: Manifest, name: str) -> Mapping[int, BlockInfo]:
    return manifest.blocks.get(name, {})


def _changed_counts(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    return {r: (a.get(r, 0), b.get(r, 0)) for r in sorted({*a, *b}) if a.get(r, 0) != b.get(r, 0)}


def _compare_block(
    a: Manifest,
    b: Manifest,
    name: str,
    block: int,
    infos: tuple[BlockInfo | None, BlockInfo | None],
    counts: ShardCounts,
    reader: _Tables,
) -> tuple[np.ndarray, pa.Table | None, pa.Table | None]:
    """Count what became of the block's shards; gives those that changed, and the tables they stand in."""
    one, two = infos
    nothing = np.empty(0, np.int64)
    if one is not None and two is not None and one.digest == two.digest:
        counts.same += one.shards
        return nothing, None, None
    old = reader.read(a, name, block) if one is not None else None
    new = reader.read(b, name, block) if two is not None else None
    if old is None or new is None:
        table = old if new is None else new
        assert table is not None
        counts.count("removed" if new is None else "added", np.asarray(table["shard"]))
        return nothing, None, None
    before, after = np.asarray(old["shard"]), np.asarray(new["shard"])
    both, i, j = np.intersect1d(before, after, assume_unique=True, return_indices=True)
    changed = _unequal(old, new, "digest", i, j)
    counts.same += int((~changed).sum())
    counts.other_keys += int((_unequal(old, new, "keys_digest", i, j) & changed).sum())
    counts.count("changed", both[changed])
    counts.count("removed", np.setdiff1d(before, both, assume_unique=True))
    counts.count("added", np.setdiff1d(after, both, assume_unique=True))
    return both[changed], old, new


def _unequal(old: pa.Table, new: pa.Table, column: str, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    return np.asarray(pc.not_equal(old[column].take(pa.array(i)), new[column].take(pa.array(j))))


def _producers(a: Manifest, b: Manifest, name: str) -> Iterator[str]:
    """What differs in how a modality was made."""
    old, new = (set(m.generations(name)) if name in m.modalities else set() for m in (a, b))
    if old == new:
        return
    gone, come = sorted(old - new), sorted(new - old)
    if len(gone) == len(come) == 1:
        yield explain(gone[0], come[0], {**a.producers, **b.producers})
        return
    for manifest, recipes, what in ((a, gone, "no longer"), (b, come, "now")):
        for recipe in recipes:
            lineage = manifest.producers.get(recipe, {})
            yield f"{what} made by {lineage.get('class', '?')} version {lineage.get('version', '?')} (recipe {recipe})"


class _Samples:
    """Collects per-sample differences of one modality until enough are listed."""

    def __init__(self, a: Manifest, b: Manifest, name: str, most: int) -> None:
        self.a, self.b, self.name = a, b, name
        self.found = SampleDiff(most) if most else None

    def changed(self, shards: np.ndarray, old: pa.Table | None, new: pa.Table | None) -> None:
        if self.found is None or old is None or new is None:
            return
        for shard in shards.tolist():
            if self.found.full:
                self.found.shards_left += 1
                continue
            names = [_object_name(table, shard) for table in (old, new)]
            compare_shards(ShardPair(self.name, shard, (self.a.store, self.b.store), (names[0], names[1])), self.found)

    def result(self) -> SampleDiff | None:
        return self.found


def _object_name(table: pa.Table, shard: int) -> str:
    at = int(np.searchsorted(np.asarray(table["shard"]), shard))
    return str(table["name"][at].as_py())
