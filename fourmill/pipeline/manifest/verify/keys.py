"""Keys: what is wrong with the keys of one shard, and which keys stand in two shards.

A key in two shards is found from 64-bit hashes, of which one pass holds a bounded number in memory; each candidate is
then confirmed by reading the keys themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from fourmill.pipeline.manifest.verify.problems import LISTED, Problem
from fourmill.pipeline.shards import Record

PER_PASS = 16_000_000
"""Keys whose hashes are in memory at once: 0.5 GB with the sort. A billion samples take 63 passes over 8 GB."""
Place = tuple[int, int]  # shard, row


def key_problems(record: Record, keys: Sequence[str], expected: Sequence[str] | None) -> list[Problem]:
    """What is wrong with the keys of one object, by the keys of the shard's other modalities where they are known."""
    if doubled := list(_doubled(record, keys)):
        return doubled
    if expected is None or list(keys) == list(expected):
        return []
    return [_disorder(record, keys, expected)]


def _doubled(record: Record, keys: Sequence[str]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        if key in first:
            what = f"key {key!r} stands in rows {first[key]} and {row}"
            yield Problem("duplicate-key", record.name, what, record.modality, record.shard, row, key)
        first.setdefault(key, row)


def _disorder(record: Record, keys: Sequence[str], expected: Sequence[str]) -> Problem:
    def problem(code: str, what: str, row: int, key: str | None) -> Problem:
        return Problem(code, record.name, what, record.modality, record.shard, row, key)

    if len(keys) != len(expected):
        what = f"has {len(keys)} keys where the shard's other modalities have {len(expected)}"
        return problem("wrong-keys", what, min(len(keys), len(expected)), None)
    rows = [row for row, pair in enumerate(zip(keys, expected, strict=True)) if pair[0] != pair[1]]
    first = rows[0]
    if sorted(keys) != sorted(expected):
        what = f"row {first} is {keys[first]!r}; in the shard's other modalities it is {expected[first]!r}"
        return problem("wrong-keys", what + _more(rows), first, keys[first])
    if len(rows) == 2:
        what = f"rows {first} and {rows[1]} ({keys[first]!r}, {keys[rows[1]]!r}) stand in each other's place"
        return problem("swapped-rows", what, first, keys[first])
    what = f"{len(rows)} rows stand in another order than in the shard's other modalities, from row {first} on"
    return problem("misordered-rows", what, first, keys[first])


def _more(rows: list[int]) -> str:
    return f"; {len(rows)} rows differ" if len(rows) > 1 else ""


def duplicates(
    total: int,
    chunks: Callable[[], Iterable[tuple[int, bytes]]],
    keys_of: Callable[[int], tuple[Record, Sequence[str]] | None],
    per_pass: int = PER_PASS,
) -> Iterator[Problem]:
    """Keys that stand in two shards. `chunks()`: (shard, hashes of its keys) of every shard, `total` hashes in all,
    again at every call; `keys_of(shard)`: the keys themselves, None if they cannot be had."""
    passes = max(1, -(-total // per_pass))
    for number in range(passes):
        hashes, places = _gather(chunks(), number, passes)
        doubled = _doubled_hashes(hashes)
        for group in _groups(hashes, places, doubled[:LISTED]):  # confirming takes reads: a double ingest has millions
            yield from _confirmed(group, keys_of)
        if len(doubled) > LISTED:
            more = f"{len(doubled) - LISTED:,} more keys by their hashes, which were not compared themselves"
            yield Problem("duplicate-key", "keys", more)


def _gather(chunks: Iterable[tuple[int, bytes]], number: int, passes: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of one pass, and (shard, row) of each as shard * 2^24 + row: a shard has far fewer rows."""
    hashes, places = [np.zeros(0, "<u8")], [np.zeros(0, np.int64)]
    for shard, data in chunks:
        found = np.frombuffer(data, "<u8")
        rows = np.flatnonzero(found % np.uint64(passes) == number) if passes > 1 else np.arange(len(found))
        hashes.append(found[rows])
        places.append(rows.astype(np.int64) + (shard << 24))
    return np.concatenate(hashes), np.concatenate(places)


def _doubled_hashes(hashes: np.ndarray) -> np.ndarray:
    """Those that are there more than once, sorted."""
    ordered = np.sort(hashes)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _groups(hashes: np.ndarray, places: np.ndarray, doubled: np.ndarray) -> Iterator[list[Place]]:
    """For each of these hashes the places that have it, in order of the first."""
    at = np.flatnonzero(np.isin(hashes, doubled)) if len(doubled) else np.zeros(0, np.int64)
    groups: dict[int, list[Place]] = {}
    for hashed, place in sorted(zip(hashes[at].tolist(), places[at].tolist(), strict=True), key=lambda p: p[1]):
        groups.setdefault(hashed, []).append((place >> 24, place & 0xFFFFFF))
    return iter(groups.values())


def _confirmed(group: list[Place], keys_of: Callable[[int], tuple[Record, Sequence[str]] | None]) -> Iterator[Problem]:
    """The later places of a group whose key is the same as an earlier one's."""
    first: dict[str, tuple[Record, Place]] = {}
    for shard, row in group:
        found = keys_of(shard)
        if found is None or row >= len(found[1]):
            continue
        record, key = found[0], found[1][row]
        if key in first:
            other, (other_shard, other_row) = first[key]
            what = f"key {key!r} of row {row} stands in shard {other_shard} too: row {other_row} of {other.name}"
            yield Problem("duplicate-key", record.name, what, record.modality, shard, row, key)
        first.setdefault(key, (record, (shard, row)))
