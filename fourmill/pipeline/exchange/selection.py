"""Which samples go out: shards in order, rows with a value in every chosen modality, and why the others stay behind.

Nothing is held but a window of shards: records are walked modality by modality in step, an incomplete shard is opened
to see which rows it lacks (a complete one is known from its records), and rows are cut into output shards on the way.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from fourmill.modalities import unknown
from fourmill.pipeline.exchange.rows import Source, WrongDataError, complete, opened
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.shards import Record, Spec, reason_kind
from fourmill.pipeline.store import Store

_INGESTED = ("rgb", "alt_text", "source")
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Selection:
    """What to take from a snapshot. `stop`: the first shard not to take. `keep`: incomplete samples too, with nulls.
    `mixed`: also modalities that several generations have made."""

    modalities: tuple[str, ...]
    start: int = 0
    stop: int | None = None
    keep: bool = False
    mixed: bool = False

    def takes(self, shard: int) -> bool:
        return self.start <= shard and (self.stop is None or shard < self.stop)


@dataclass(frozen=True)
class Chosen:
    """One shard with the rows to take, and how many were left out, by reason."""

    source: Source
    rows: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One output shard: which rows of which shards."""

    number: int
    pieces: tuple[tuple[Source, np.ndarray], ...]

    @property
    def rows(self) -> int:
        return sum(len(rows) for _, rows in self.pieces)


def check_modalities(manifest: Manifest, selection: Selection) -> None:
    """ValueError for modalities that the snapshot lacks or that mix generations."""
    for name in selection.modalities:
        if name not in manifest.blocks:
            raise ValueError(unknown("modality", name, manifest.modalities) + f" (snapshot {manifest.snapshot})")
        recipes = manifest.generations(name)
        if len(recipes) > 1 and not selection.mixed:
            raise ValueError(
                f"{name} mixes {len(recipes)} generations ({', '.join(recipes)}) in snapshot {manifest.snapshot}: "
                "finish the run that redoes it, export an older snapshot (--at), or choose to mix them (--mixed)"
            )


def specs_of(manifest: Manifest, selection: Selection) -> dict[str, Spec]:
    """The specification of each modality, from its first record among the chosen shards."""
    specs = {}
    for name in selection.modalities:
        record = next(manifest.records(name, selection.start, selection.stop), None)
        if record is None:
            raise ValueError(f"{name} has no shards from {selection.start} to {selection.stop or 'the end'}")
        specs[name] = Spec.from_json(record.spec)
    return specs


def sources(manifest: Manifest, selection: Selection, specs: dict[str, Spec]) -> Iterator[Source]:
    """The dataset's shards in order, each with the records of the chosen modalities."""
    walks = {name: _Walk(manifest.records(name, selection.start, selection.stop)) for name in selection.modalities}
    for shard in manifest.shards:
        if not selection.takes(int(shard)):
            continue
        found = {name: record for name, walk in walks.items() if (record := walk.at(int(shard)))}
        if not found:
            continue
        for name, record in found.items():
            if Spec.from_json(record.spec) != specs[name]:
                raise WrongDataError(
                    f"{name} shard {shard} is specified as {record.spec}, other shards as {specs[name]}"
                )
        _check_aligned(int(shard), found)
        yield Source(int(shard), next(iter(found.values())).rows, found)


def _check_aligned(shard: int, records: dict[str, Record]) -> None:
    (first, record), *others = records.items()
    for name, other in others:
        if other.keys_digest != record.keys_digest:
            raise WrongDataError(
                f"shard {shard}: {name} does not hold the keys of {first}; see `fourmill manifest verify`"
            )


class _Walk:
    """Records in order of shard, looked up by ascending shard numbers."""

    def __init__(self, records: Iterator[Record]) -> None:
        self.records = records
        self.next = next(records, None)

    def at(self, shard: int) -> Record | None:
        while self.next is not None and self.next.shard < shard:
            self.next = next(self.records, None)
        return self.next if self.next is not None and self.next.shard == shard else None


def choose(store: Store, source: Source, selection: Selection, specs: dict[str, Spec]) -> Chosen:
    """The rows of one shard to take. A sample that is left out counts once, for the first modality that it lacks."""
    everything = np.arange(source.rows)
    if selection.keep:
        return Chosen(source, everything)
    kept = np.ones(source.rows, bool)
    dropped: Counter[str] = Counter()
    for name in ordered(selection.modalities):
        record = source.records.get(name)
        if record is None:
            dropped[f"{name}: not made yet"] += int(kept.sum())
            kept[:] = False
        elif record.present < record.rows:
            shard = opened(store, record)
            has, why = complete(shard, specs[name].crops), shard.quarantine
            lost = np.flatnonzero(kept & ~has)
            keys = shard.keys if len(lost) else []
            dropped.update(f"{name}: {reason_kind(why[keys[i]]) if keys[i] in why else 'absent'}" for i in lost)
            kept &= has
    return Chosen(source, everything[kept], {reason: n for reason, n in dropped.items() if n})


def ordered(modalities: Sequence[str]) -> list[str]:
    """What was ingested first: a label is mostly missing because its picture is."""
    return sorted(modalities, key=lambda m: (_INGESTED.index(m) if m in _INGESTED else len(_INGESTED), m))


def tasks(chosen: Iterable[Chosen], shard_size: int | None) -> Iterator[Task]:
    """Output shards, numbered without gaps: of `shard_size` rows each but the last, or one for each shard that has any
    rows left."""
    number, waiting, count = 0, [], 0
    for one in chosen:
        rows = one.rows
        while len(rows):
            room = len(rows) if shard_size is None else shard_size - count
            waiting.append((one.source, rows[:room]))
            count, rows = count + len(rows[:room]), rows[room:]
            if shard_size is None or count == shard_size:
                yield Task(number, tuple(waiting))
                number, waiting, count = number + 1, [], 0
    if waiting:
        yield Task(number, tuple(waiting))


def in_parallel(function: Callable[[In], Out], items: Iterable[In], workers: int) -> Iterator[Out]:
    """`function` of each item, in order, by threads; at most `workers + 1` items are under way or wait to be taken."""
    with ThreadPoolExecutor(workers, thread_name_prefix="exchange") as pool:
        waiting: deque[Future[Out]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
