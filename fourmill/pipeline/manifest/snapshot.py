"""One snapshot of a dataset, open for reading. Opening reads the root alone; record tables are read when asked for."""

from __future__ import annotations

import functools
import json
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.pipeline import statistics
from fourmill.pipeline.fingerprints import Retries
from fourmill.pipeline.manifest.tables import BlockInfo, block_of, decoded, record_in, records_in, sums_in
from fourmill.pipeline.shards import Record
from fourmill.pipeline.store import Store

_TABLES_KEPT = 48  # a walk through the shards of a dataset looks into each modality's table in turn; 1-3 MB each


@dataclass(frozen=True)
class Totals:
    """Sums over a modality's shards. `recipes`: shards by producer; `quarantined`: rows by reason."""

    shards: int = 0
    rows: int = 0
    present: int = 0
    num_bytes: int = 0
    recipes: Mapping[str, int] = field(default_factory=dict)
    quarantined: Mapping[str, int] = field(default_factory=dict)
    spent: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, blocks: Iterable[BlockInfo]) -> Totals:
        infos = list(blocks)
        sums = {n: sum(getattr(i, n) for i in infos) for n in ("shards", "rows", "present")}
        spent = _summed(i.spent for i in infos)
        return cls(
            **sums,
            num_bytes=sum(i.object_bytes for i in infos),
            recipes=_summed(i.recipes for i in infos),
            quarantined=_summed(i.quarantined for i in infos),
            spent={name: round(value, 3) for name, value in spent.items()},
        )


def _summed(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items()))


class Manifest:
    """A consistent snapshot, for as long as the reader likes: what it names is never changed.

    `producers`: lineage by recipe, of all recipes in use and of what they read. `blocks`: what the root says of each
    record table, by modality and block. `retries`: what was put back into the plan. `created`: UTC, ISO 8601.
    """

    def __init__(self, store: Store, root: Mapping[str, Any] | None = None) -> None:
        root = dict(root or {})
        self.root = root
        self.store = store
        self.snapshot: int = root.get("snapshot", 0)
        self.created: str = root.get("created", "")
        self.corpus: dict[str, Any] = root.get("corpus", {})
        self.producers: dict[str, dict[str, Any]] = root.get("producers", {})
        self.sample_tables: tuple[dict[str, Any], ...] = tuple(root.get("sample_tables", ()))
        self.retries_name: str | None = root.get("retries")
        self.blocks: dict[str, dict[int, BlockInfo]] = {
            m: {int(b): BlockInfo.from_json(info) for b, info in blocks.items()}
            for m, blocks in root.get("modalities", {}).items()
        }
        self._tables: OrderedDict[str, tuple[pa.Table, dict[int, int]]] = OrderedDict()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and (self.store.uri, self.root) == (other.store.uri, other.root)

    __hash__ = None  # type: ignore[assignment]

    @functools.cached_property
    def retries(self) -> Retries:
        if self.retries_name is None:
            return Retries()
        return Retries.from_json(json.loads(self.store.get(self.retries_name)))

    @property
    def modalities(self) -> list[str]:
        return sorted(self.blocks)

    @functools.cached_property
    def shards(self) -> np.ndarray:
        """int64, sorted: the numbers of the corpus's shards (of the first modality where there is no `rgb`)."""
        name = "rgb" if "rgb" in self.blocks else next(iter(self.modalities), None)
        if name is None:
            return np.zeros(0, np.int64)
        return np.concatenate([self._numbers(name, block) for block in sorted(self.blocks[name])])

    def _numbers(self, modality: str, block: int) -> np.ndarray:
        info = self.blocks[modality][block]
        if info.last - info.first + 1 == info.shards:  # no gaps: as good as always
            return np.arange(info.first, info.last + 1, dtype=np.int64)
        return np.asarray(self.table(modality, block)["shard"].to_numpy(), np.int64)

    def num_shards(self, modality: str) -> int:
        return sum(info.shards for info in self.blocks.get(modality, {}).values())

    def totals(self, modality: str) -> Totals:
        return Totals.of(self.blocks.get(modality, {}).values())

    def generations(self, modality: str) -> list[str]:
        """Recipes in use; more than one means that the modality is partly redone and must not be mixed silently."""
        return list(self.totals(modality).recipes)

    def table(self, modality: str, block: int) -> pa.Table:
        """The record table of a block; the tables last used are kept."""
        return self._opened(modality, block)[0]

    def _opened(self, modality: str, block: int) -> tuple[pa.Table, dict[int, int]]:
        info = self.blocks[modality][block]
        found = self._tables.pop(info.name, None)
        if found is None:
            table = self.read_table(info)
            found = table, {shard: row for row, shard in enumerate(table["shard"].to_pylist())}
        self._tables[info.name] = found
        while len(self._tables) > _TABLES_KEPT:
            self._tables.popitem(last=False)
        return found

    def read_table(self, info: BlockInfo) -> pa.Table:
        """A record table, read anew and not kept."""
        return decoded(self.store.get(info.name), f"{info.name} in {self.store.uri}")

    def record(self, modality: str, shard: int) -> Record | None:
        """The record of one shard, None if the modality lacks it."""
        block = block_of(int(shard))
        if block not in self.blocks.get(modality, {}):
            return None
        table, rows = self._opened(modality, block)
        row = rows.get(int(shard))
        return None if row is None else record_in(table.slice(row, 1).to_pylist()[0])

    def records(self, modality: str, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The records of one modality in order of shard, of shards start..stop; one table in memory at a time."""
        for _, info in sorted(self.blocks.get(modality, {}).items()):
            if info.last < start or (stop is not None and info.first >= stop):
                continue
            kept = self._tables.get(info.name)
            for record in records_in(kept[0] if kept else self.read_table(info)):
                if record.shard >= start and (stop is None or record.shard < stop):
                    yield record

    def statistics(self, modality: str) -> dict[str, dict[str, Any]]:
        """Merged statistics by recipe, over all shards."""
        parts: dict[str, list[dict[str, Any]]] = {}
        for info in self.blocks.get(modality, {}).values():
            for recipe, sums in sums_in(self.store.get(info.name), f"{info.name} in {self.store.uri}").items():
                parts.setdefault(recipe, []).append(sums)
        return {recipe: statistics.merged(found) for recipe, found in parts.items()}
