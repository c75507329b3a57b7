"""Which of a snapshot's objects to verify: some modalities, a run of shards, a share of the shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fourmill.modalities import unknown
from fourmill.pipeline.manifest.snapshot import Manifest
from fourmill.pipeline.manifest.tables import BlockInfo


@dataclass(frozen=True)
class Selection:
    """`modalities`: None for all. `shards`: numbers from the first up to, not with, the second; None is open.

    `share`: of the shards, by a hash of their number, so that the same ones are taken again, in every modality.
    """

    modalities: tuple[str, ...] | None = None
    shards: tuple[int | None, int | None] = (None, None)
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"a share of {self.share:g} of the shards; more than 0 and at most 1 is needed")

    @property
    def everything(self) -> bool:
        return self == Selection()

    def names(self, manifest: Manifest) -> list[str]:
        """The modalities chosen. ValueError for one that the snapshot lacks."""
        if self.modalities is None:
            return manifest.modalities
        for name in self.modalities:
            if name not in manifest.blocks:
                raise ValueError(f"snapshot {manifest.snapshot}: {unknown('modality', name, manifest.modalities)}")
        return sorted(set(self.modalities))

    def touches(self, info: BlockInfo) -> bool:
        """Whether a block has shards in the range."""
        start, stop = self.shards
        return (start is None or info.last >= start) and (stop is None or info.first < stop)

    def ranged(self, shards: np.ndarray) -> np.ndarray:
        """bool: which of the shard numbers are in the range."""
        start, stop = self.shards
        return np.asarray((shards >= (0 if start is None else start)) & (shards < (1 << 62 if stop is None else stop)))

    def sampled(self, shards: np.ndarray) -> np.ndarray:
        """bool: which of the shard numbers belong to the share."""
        if self.share >= 1:
            return np.ones(len(shards), bool)
        return np.asarray(_mixed(shards) < np.uint64(int(self.share * 2**64)))


def _mixed(shards: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: neighbouring numbers get unrelated 64-bit ones."""
    x = shards.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
