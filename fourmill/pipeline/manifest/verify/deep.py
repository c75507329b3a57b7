"""The deep part of a verification: which objects to read, and what to make of what comes back.

Workers see one object at a time. What takes more than one, the order of keys across modalities and keys that stand in
two shards, is found here, from the few keys that workers hand back and from hashes in the journal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from fourmill.pipeline.manifest.snapshot import Manifest
from fourmill.pipeline.manifest.tables import records_in
from fourmill.pipeline.manifest.verify.journal import Journal
from fourmill.pipeline.manifest.verify.keys import duplicates, key_problems
from fourmill.pipeline.manifest.verify.objects import Checked, Task
from fourmill.pipeline.manifest.verify.problems import Findings, Problem
from fourmill.pipeline.manifest.verify.tables import Block
from fourmill.pipeline.shards import Record, digest, read_shard
from fourmill.pipeline.store import Store, StoreError

_LOOKED_UP = 256  # records whose place in the journal is looked up before their objects are asked for


class Deep:
    """Tasks out, outcomes in; `finish` when all are in. `base`: the modality whose keys stand for a shard's."""

    def __init__(self, store: Store, manifest: Manifest, findings: Findings, journal: Journal, base: str) -> None:
        self.store, self.manifest, self.findings, self.journal, self.base = store, manifest, findings, journal, base
        self.read = self.num_bytes = self.resumed = self.unkeyed = 0
        self._named: set[str] = set()  # objects whose keys were read and found to be off: told better than by records

    def tasks(self, block: Block, name: str, table: pa.Table) -> Iterator[Task]:
        """What to do for these records of one modality."""
        for start in range(0, table.num_rows, _LOOKED_UP):
            records = list(records_in(table.slice(start, _LOOKED_UP)))
            known = self.journal.sound(records)
            for record in records:
                was, keyed = known.get(record.name), name != self.base or self.journal.has_keys(record.shard)
                expected = block.expected.get(record.shard)
                yield Task(
                    record,
                    was if keyed and expected is None else None,
                    hashes=name == self.base,
                    expected=expected if expected != record.keys_digest else None,
                )

    def take(self, found: Checked) -> None:
        """Note one outcome."""
        task, problems = found.task, list(found.problems)
        self.read += found.num_bytes > 0
        self.num_bytes += found.num_bytes
        if found.unchanged:
            self.resumed += 1
            self.findings.add(self.journal.warnings(task.record))
            return
        if found.keys is not None:
            problems = self._with_keys(task, found.keys, problems)
        self.findings.add(problems)
        if all(p.warning for p in problems):
            self.journal.add(task.record, found.modified, problems, found.hashes)
        elif task.hashes and found.hashes is None:
            self.unkeyed += 1

    def _with_keys(self, task: Task, keys: Sequence[str], problems: list[Problem]) -> list[Problem]:
        """`problems`, and what is wrong with the keys: said once, and instead of what follows from it."""
        record = task.record
        damaged = [p for p in problems if p.code == "wrong-digest"]
        expected_digest = task.expected or record.keys_digest
        found_digest = digest(*keys)
        alike = found_digest == expected_digest
        if alike and task.expected is None and (damaged or not task.hashes):
            return problems  # the keys are the shard's: if they are wrong, that is said of the reference
        expected = None if alike else self._keys(record.shard, expected_digest, record.modality)
        wrong = key_problems(record, keys, expected)
        if not wrong and not damaged and found_digest != record.keys_digest:
            rest = ", but those of the shard's other modalities" if alike else ""
            what = f"its keys are not those of its record{rest}"
            wrong = [Problem("wrong-keys", record.name, what, record.modality, record.shard)]
        if not wrong:
            return problems
        self._named.add(record.name)
        if not damaged:
            return [*problems, *wrong]
        rest = "; its SHA-256 differs from its record's"
        return [Problem(**{**vars(p), "what": p.what + rest}) for p in wrong]

    def finish(self) -> None:
        """What only shows when all objects have been read: keys that stand in two shards."""
        self.findings.drop("misaligned-keys", self._named)
        self.journal.commit()
        self.findings.add(duplicates(self.journal.num_keys(), self.journal.keys, self._keys_for_reference))

    def _keys_for_reference(self, shard: int) -> tuple[Record, Sequence[str]] | None:
        record = self.manifest.record(self.base, shard)
        if record is None:
            return None
        keys = self._keys(shard, record.keys_digest, "")
        return None if keys is None else (record, keys)

    def _keys(self, shard: int, keys_digest: str, but: str) -> Sequence[str] | None:
        """The keys with this digest, from the smallest whole object of the shard that holds them."""
        records = [r for m in self.manifest.modalities if m != but and (r := self.manifest.record(m, shard))]
        for record in sorted(records, key=lambda r: r.num_bytes):
            if record.keys_digest == keys_digest:
                try:
                    keys = read_shard(self.store, record.name).keys
                except (ValueError, FileNotFoundError, StoreError):
                    continue  # damaged too: said of that object
                if digest(*keys) == keys_digest:
                    return keys
        return None
