"""A dataset's records summed up over at most 200 runs of shards, whatever its size: what strips are drawn of.

Above twenty blocks of 10,000 shards the root says enough; below, record tables are read one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fourmill.pipeline.manifest import BLOCK, Manifest

MOST = 200  # cells in a strip: 2 to 5 pixels each
_BLOCKS_READ = 20  # with more, a cell holds whole blocks, and no table has to be read
_SUMS = ("shards", "rows", "present", "seconds", "gpu_seconds", "attempts")


@dataclass(frozen=True)
class Bins:
    """Runs of shards: cell i holds shard numbers edges[i] up to edges[i + 1]. `sums[name]`: float64, one a cell."""

    edges: np.ndarray
    sums: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def rate(self, what: str, by: str) -> np.ndarray:
        """What per unit of `by`, NaN where there is none of it."""
        return np.divide(self.sums[what], self.sums[by], out=np.full(len(self), np.nan), where=self.sums[by] > 0)


def binned(manifest: Manifest) -> dict[str, Bins]:
    """The bins of every modality; all have the same edges."""
    edges = _edges(manifest)
    return {name: Bins(edges, _sums(manifest, name, edges)) for name in manifest.modalities}


def _edges(manifest: Manifest) -> np.ndarray:
    """Equally many shard numbers a cell, or whole blocks where there are many."""
    infos = [info for blocks in manifest.blocks.values() for info in blocks.values()]
    first, last = min((i.first for i in infos), default=0), max((i.last for i in infos), default=0)
    if _by_block(manifest):
        starts = np.array(sorted({block for blocks in manifest.blocks.values() for block in blocks}), np.int64)
        starts = starts[:: -(-len(starts) // MOST)] * BLOCK
        return np.append(starts, last + 1)
    return np.unique(np.linspace(first, last + 1, min(MOST, last + 1 - first) + 1).round().astype(np.int64))


def _by_block(manifest: Manifest) -> bool:
    return max(map(len, manifest.blocks.values()), default=0) > _BLOCKS_READ


def _sums(manifest: Manifest, name: str, edges: np.ndarray) -> dict[str, np.ndarray]:
    total = {what: np.zeros(len(edges) - 1) for what in _SUMS}
    for shards, columns in _parts(manifest, name):
        cells = np.searchsorted(edges, shards, side="right") - 1
        for what, values in columns.items():
            np.add.at(total[what], cells, values)
    return total


def _parts(manifest: Manifest, name: str) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """(shard numbers, values) of a modality, a block at a time."""
    for block, info in sorted(manifest.blocks[name].items()):
        if _by_block(manifest):
            values = {"shards": info.shards, "rows": info.rows, "present": info.present, **info.spent}
            yield np.array([info.first]), {what: np.array([float(values.get(what, 0))]) for what in _SUMS}
        else:
            yield _columns(manifest.table(name, block))


def _columns(table: pa.Table) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    shards = table["shard"].to_numpy()
    values = {what: table[what].to_numpy().astype(np.float64) for what in _SUMS if what != "shards"}
    return shards, {"shards": np.ones(len(shards)), **values}
