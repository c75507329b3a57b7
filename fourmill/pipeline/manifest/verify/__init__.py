"""Whether a dataset is what its manifest says: `verify` names every object, row and key that is not.

Quick: the snapshot against its record tables, modalities against one another, and the existence and size of every
object; no object is read. Deep: everything in the objects too. Memory is bounded by a few blocks of record tables
(10,000 shards each), whatever the dataset's size. Nothing is repaired, and nothing written but a journal of what was
found sound.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from fourmill.pipeline.manifest.snapshot import Manifest
from fourmill.pipeline.manifest.verify.beside import check_retries, check_sample_tables
from fourmill.pipeline.manifest.verify.deep import Deep
from fourmill.pipeline.manifest.verify.journal import Journal
from fourmill.pipeline.manifest.verify.objects import Task, wrong_size
from fourmill.pipeline.manifest.verify.pool import check_objects, in_order
from fourmill.pipeline.manifest.verify.problems import CODES, Findings, Problem, Verification
from fourmill.pipeline.manifest.verify.selection import Selection
from fourmill.pipeline.manifest.verify.tables import Block, Coverage, check_block, check_generations, reference
from fourmill.pipeline.store import Store

__all__ = ["CODES", "Options", "Problem", "Selection", "Verification", "verify"]

Tick = Callable[[int, int], None]  # objects done and bytes read since the last call
_BLOCKS_AHEAD = 2  # whose record tables are read while others are checked; 12 modalities of a block are 0.1 GB


@dataclass(frozen=True)
class Options:
    """`processes`: 1 is the caller's own; others are spawned, so that the caller's main module must be importable.
    `threads`: in each. `resume`: the journal of a deep verification, which is made if it is not there."""

    deep: bool = False
    selection: Selection = field(default_factory=Selection)
    processes: int = 1
    threads: int = 8
    resume: str | Path | None = None


def verify(store: Store, manifest: Manifest, options: Options | None = None, tick: Tick | None = None) -> Verification:
    """Check a snapshot, by default all of it and quickly."""
    run = _Run(store, manifest, options or Options(), tick or (lambda objects, num_bytes: None))
    return run.deep() if run.options.deep else run.quick()


class _Run:
    """One verification under way."""

    def __init__(self, store: Store, manifest: Manifest, options: Options, tick: Tick) -> None:
        self.store, self.manifest, self.options, self.tick = store, manifest, options, tick
        self.chosen = options.selection.names(manifest)
        self.base = reference(self.chosen)
        self.findings = Findings()
        self.counts: Counter[str] = Counter()

    def quick(self) -> Verification:
        for block, problems, checked in self._blocks(self._check_sizes):
            self.findings.add([*block.problems, *problems])
            self.counts["checked"] += checked
            self.tick(checked, 0)
        return self._outcome(None)

    def deep(self) -> Verification:
        with tempfile.TemporaryDirectory(prefix="fourmill-verify-") as folder:
            journal = Journal(self.options.resume or Path(folder, "journal"), self.store.uri)
            try:
                deep = Deep(self.store, self.manifest, self.findings, journal, self.base or "")
                tasks = self._tasks(deep)
                for found in check_objects(self.store, tasks, self.options.processes, self.options.threads):
                    deep.take(found)
                    self.tick(1, found.num_bytes)
                deep.finish()
                return self._outcome(deep)
            finally:
                journal.close()

    def _tasks(self, deep: Deep) -> Iterator[Task]:
        for block, _, _ in self._blocks(lambda block: ([], 0)):
            self.findings.add(block.problems)
            for name in self.chosen:
                if name in block.tables:
                    table = self._selected(block.tables[name])
                    self.counts["checked"] += table.num_rows
                    yield from deep.tasks(block, name, table)

    def _blocks(
        self, check: Callable[[Block], tuple[list[Problem], int]]
    ) -> Iterator[tuple[Block, list[Problem], int]]:
        """Every block that the selection touches, its tables checked, and what `check` says of it."""
        self.findings.add(check_generations(self.manifest, self.chosen))
        self.findings.add(check_sample_tables(self.manifest, self.options.deep and self.options.selection.everything))
        unread = list(check_retries(self.manifest))
        self.findings.add(unread)
        base = reference(self.manifest.modalities) or ""
        names = sorted({base, *self.chosen} & set(self.manifest.blocks))
        coverage = Coverage()

        def checked(number: int) -> tuple[Block, list[Problem], int]:
            block = check_block(self.manifest, number, names, follow=not unread)
            return (block, *check(block))

        with ThreadPoolExecutor(_BLOCKS_AHEAD, thread_name_prefix="verify-tables") as pool:
            for block, problems, count in in_order(pool, checked, self._numbers(names), _BLOCKS_AHEAD):
                if base not in block.unusable:
                    shards = {n: self._ranged(table) for n, table in block.tables.items()}
                    coverage.add(shards, sorted(set(names) - block.unusable), base)
                self.counts["tables"] += len(block.tables)
                yield block, problems, count
        self.findings.add(coverage.problems())

    def _numbers(self, names: list[str]) -> list[int]:
        chosen, blocks = self.options.selection, self.manifest.blocks
        return sorted({number for n in names for number, info in blocks[n].items() if chosen.touches(info)})

    def _ranged(self, table: pa.Table) -> np.ndarray:
        shards = table["shard"].to_numpy()
        return np.asarray(shards[self.options.selection.ranged(shards)])

    def _selected(self, table: pa.Table) -> pa.Table:
        """The records of a table that the selection takes."""
        if self.options.selection.everything:
            return table
        shards = table["shard"].to_numpy()
        ranged, sampled = self.options.selection.ranged(shards), self.options.selection.sampled(shards)
        return table.filter(pa.array(ranged & sampled))

    def _check_sizes(self, block: Block) -> tuple[list[Problem], int]:
        problems: list[Problem] = []
        checked = 0
        for name in self.chosen:
            if name in block.tables:
                table = self._selected(block.tables[name])
                problems += _wrong_sizes(self.store, name, table)
                checked += table.num_rows
        return problems, checked

    def _outcome(self, deep: Deep | None) -> Verification:
        listed = self.findings.listed
        return Verification(
            snapshot=self.manifest.snapshot,
            deep=deep is not None,
            objects=sum(self.manifest.num_shards(m) for m in self.manifest.modalities),
            checked=self.counts["checked"],
            read=deep.read if deep else 0,
            num_bytes=deep.num_bytes if deep else 0,
            resumed=deep.resumed if deep else 0,
            tables=self.counts["tables"],
            skipped=self._skipped(),
            unchecked=tuple(self._unchecked(deep)),
            problems=tuple(p for p in listed if not p.warning),
            warnings=tuple(p for p in listed if p.warning),
            counts={code: n for code, n in self.findings.counts.items() if n},
            warned=dict(self.findings.warned),
        )

    def _skipped(self) -> dict[str, int]:
        """Objects that the selection left out, by the option that did."""
        selection = self.options.selection
        others = sum(self.manifest.num_shards(m) for m in self.manifest.modalities if m not in self.chosen)
        rest = sum(self.manifest.num_shards(m) for m in self.chosen) - self.counts["checked"]
        why = ["--shards"] if selection.shards != (None, None) else []
        why += ["--sample"] if selection.share < 1 else []
        found = {"of other modalities": others, "left out by " + " and ".join(why or ["damaged record tables"]): rest}
        return {reason: count for reason, count in found.items() if count}

    def _unchecked(self, deep: Deep | None) -> Iterator[str]:
        if deep is None:
            yield "what is in the objects; --deep reads them"
        elif self.options.selection.shards != (None, None) or self.options.selection.share < 1:
            yield "keys that stand in a chosen shard and in one that is not"
        if deep is not None and deep.unkeyed:
            shards = f"{deep.unkeyed:,} shards, whose {self.base} objects are not sound,"
            yield f"whether keys of {shards} stand in others too"


def _wrong_sizes(store: Store, name: str, table: pa.Table) -> Iterator[Problem]:
    """Objects that are gone or of another size than their records say."""
    names = table["name"].to_pylist()
    sizes = store.sizes(names)
    should = table["num_bytes"].to_numpy()
    has = np.array([-1 if size is None else size for size in sizes], np.int64)
    for row in np.flatnonzero(has != should).tolist():
        shard = table["shard"][row].as_py()
        if has[row] < 0:
            yield Problem("missing-object", names[row], "the object is gone", name, shard)
        else:
            yield Problem("wrong-size", names[row], wrong_size(int(should[row]), int(has[row])), name, shard)
