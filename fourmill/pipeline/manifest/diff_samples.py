"""Which values of two versions of one shard differ, and by how much, where a measure exists.

Rows are matched by key, not by place, so that a reordered shard shows as that and not as all of its values changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fourmill.modalities import Kind, Modality
from fourmill.pipeline.shards import Shard, read_shard
from fourmill.pipeline.store import Store, StoreError

_WORDS = 160  # characters of a text or of JSON that are shown


@dataclass(frozen=True)
class SampleChange:
    """One sample whose value differs. `what`: in words; `measure`: the same as numbers, by name."""

    key: str
    shard: int
    row: int
    what: str
    measure: dict[str, Any] = field(default_factory=dict)


@dataclass
class SampleDiff:
    """Differing samples, at most `most` of them; how much was compared to find them, and what could not be."""

    most: int
    changes: list[SampleChange] = field(default_factory=list)
    shards_read: int = 0
    shards_left: int = 0  # changed shards that were not opened, since `most` was reached
    rows_same: int = 0
    rows_changed: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.changes) >= self.most


@dataclass(frozen=True)
class ShardPair:
    """Two objects of one (modality, shard)."""

    modality: str
    shard: int
    stores: tuple[Store, Store]
    names: tuple[str, str]


def compare_shards(pair: ShardPair, into: SampleDiff) -> None:
    """Compare every value of two objects. One that is gone or damaged is a line in `problems`."""
    try:
        old, new = (read_shard(store, name) for store, name in zip(pair.stores, pair.names, strict=True))
    except (FileNotFoundError, ValueError, StoreError) as error:
        into.problems.append(str(error))
        return
    into.shards_read += 1
    if old.spec.crops != new.spec.crops:
        into.problems.append(f"{pair.modality} shard {pair.shard}: {old.spec.crops} crops against {new.spec.crops}")
    rows = {key: row for row, key in enumerate(old.keys)}
    keys = new.keys
    for row, key in enumerate(keys):
        before = rows.pop(key, None)
        change = _added(key, pair, row) if before is None else _changed(pair, key, (old, before), (new, row))
        _note(into, change)
    for key, row in rows.items():
        _note(into, SampleChange(key, pair.shard, row, "the sample is no longer there"))


def _note(into: SampleDiff, change: SampleChange | None) -> None:
    if change is None:
        into.rows_same += 1
        return
    into.rows_changed += 1
    if not into.full:
        into.changes.append(change)


def _added(key: str, pair: ShardPair, row: int) -> SampleChange:
    return SampleChange(key, pair.shard, row, "the sample is new")


def _changed(pair: ShardPair, key: str, old: tuple[Shard, int], new: tuple[Shard, int]) -> SampleChange | None:
    """The difference of one sample's values, None if there is none."""
    crops = min(old[0].spec.crops, new[0].spec.crops) if new[0].entry.per_crop else 1
    differing = [c for c in range(crops) if not old[0].column(c)[old[1]].equals(new[0].column(c)[new[1]])]
    if not differing:
        if old[1] == new[1]:
            return None
        return SampleChange(key, pair.shard, new[1], f"the same value, moved from row {old[1]}")
    values = [(old[0].value(old[1], c), new[0].value(new[1], c)) for c in differing]
    what, measure = _difference(new[0].entry, values, (old[0], new[0]), key)
    if measure is None:  # other bytes, the same value
        return None
    if crops > 1:
        what += f" ({len(differing)} of {crops} crops)"
    return SampleChange(key, pair.shard, new[1], what, measure)


Values = list[tuple[Any, Any]]
Found = tuple[str, dict[str, Any] | None]


def _difference(entry: Modality, values: Values, shards: tuple[Shard, Shard], key: str) -> Found:
    for before, after in values:
        if (before is None) != (after is None):
            there, reason = ("B", shards[0]) if before is None else ("A", shards[1])
            why = reason.quarantine.get(key, "no reason is given")
            return f"only {there} has a value: {why}", {"only": there}
    return _MEASURES.get(entry.kind, _of_json)(values)


def _of_tokens(values: Values) -> Found:
    lengths = [(len(a), len(b)) for a, b in values]
    longest = sum(max(pair) for pair in lengths)
    same = sum(int((a[: min(len(a), len(b))] == b[: min(len(a), len(b))]).sum()) for a, b in values)
    share = 1 - same / max(longest, 1)
    length = "" if all(a == b for a, b in lengths) else f", {lengths[0][0]} tokens before and {lengths[0][1]} after"
    return f"{share:.1%} of its tokens differ{length}", {"changed_share": share}


def _of_map(values: Values) -> Found:
    if shapes := next(((a.shape, b.shape) for a, b in values if a.shape != b.shape), None):
        return f"shape {shapes[0]} before, {shapes[1]} after", {"shapes": [list(s) for s in shapes]}
    gaps = [np.abs(a.astype(np.float64) - b.astype(np.float64)) for a, b in values]
    most, mean = max(float(g.max(initial=0)) for g in gaps), float(np.mean([g.mean() for g in gaps]))
    found = {"max_abs_difference": most, "mean_abs_difference": mean}
    return f"differs by at most {most:.6g}, {mean:.3g} on average", found if most else None


def _of_classes(values: Values) -> Found:
    if any(a.shape != b.shape for a, b in values):
        return _of_map(values)
    share = float(np.mean([(a != b).mean() for a, b in values]))
    return f"{share:.1%} of its pixels are of another class", {"changed_share": share} if share else None


def _of_crop(values: Values) -> Found:
    before, after = (v.tolist() for v in values[0])
    return f"{before} before, {after} after", {"before": before, "after": after}


def _of_bytes(values: Values) -> Found:
    before, after = (len(v) for v in values[0])
    return f"another file: {before} bytes before, {after} after", {"bytes": [before, after]}


def _of_text(values: Values) -> Found:
    before, after = values[0]
    return f"{_short(before)!r} before, {_short(after)!r} after", {"before": before, "after": after}


def _of_json(values: Values) -> Found:
    before, after = values[0]
    if before == after:
        return "", None
    entries = ""
    if isinstance(before, list) and isinstance(after, list):
        entries = f"{len(before)} {'entry' if len(before) == 1 else 'entries'} before, {len(after)} after: "
    elif isinstance(before, Mapping) and isinstance(after, Mapping):  # only what differs of a dictionary
        names = [n for n in sorted({*before, *after}, key=str) if before.get(n) != after.get(n)]
        before, after = ({n: v[n] for n in names if n in v} for v in (before, after))
    texts = [_short(json.dumps(v, ensure_ascii=False, sort_keys=True)) for v in (before, after)]
    return f"{entries}{texts[0]} before, {texts[1]} after", {"before": before, "after": after}


def _short(text: str) -> str:
    return text if len(text) <= _WORDS else text[: _WORDS - 1] + "…"


_MEASURES: Mapping[Kind, Callable[[Values], Found]] = {
    Kind.GRID: _of_tokens,
    Kind.SEQUENCE: _of_tokens,
    Kind.MAP: _of_map,
    Kind.FEATURES: _of_map,
    Kind.EDGES: _of_map,
    Kind.CLASSES: _of_classes,
    Kind.CROP: _of_crop,
    Kind.IMAGE: _of_bytes,
    Kind.TEXT: _of_text,
    Kind.JSON: _of_json,
}
