"""One shard's modalities side by side, opened as they are asked for, and which rows of a dataset are looked at."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from PIL import Image

from fourmill.evaluate.labels import crop_size, crops_of
from fourmill.pipeline import images
from fourmill.pipeline.geometry import Crop, apply_crop
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.manifest.samples import smallest
from fourmill.pipeline.shards import Shard, read_shard
from fourmill.pipeline.splits import held_out_rank
from fourmill.pipeline.store import Store

_IMAGES = 16  # decoded pictures kept, for the other crops of the same sample


class Rows:
    """Row i is the same sample in every modality of the shard, or ValueError. Nulls and modalities that are not there
    are None."""

    def __init__(self, store: Store, manifest: Manifest, number: int) -> None:
        self.store, self.manifest, self.number = store, manifest, number
        self._keys_digest = smallest(manifest, number).keys_digest
        self._open: dict[str, Shard | None] = {}
        self._images: dict[int, Image.Image | None] = {}

    def shard(self, name: str) -> Shard | None:
        """The shard object of one modality."""
        if name not in self._open:
            record = self.manifest.record(name, self.number)
            if record is not None and record.keys_digest != self._keys_digest:
                raise ValueError(
                    f"{record.name} does not hold the same keys in the same order as the shard's other modalities: "
                    f"`fourmill manifest verify {self.store.uri}` says more"
                )
            self._open[name] = read_shard(self.store, record.name) if record else None
        return self._open[name]

    def value(self, name: str, row: int, crop: int = 0) -> Any:
        """A stored value; modalities without crops have the same for each."""
        shard = self.shard(name)
        return None if shard is None else shard.value(row, crop if shard.entry.per_crop else 0)

    def label(self, source: str, row: int, crop: int = 0) -> Any:
        """What a tokenizer was given; of `rgb` the cropped picture, uint8 (S, S, 3)."""
        return self.picture(row, crop) if source == "rgb" else self.value(source, row, crop)

    def described(self, row: int) -> Mapping[str, Any]:
        """Where the sample came from and its size; empty if nothing is known."""
        return self.value("source", row) or {}

    def crops(self, row: int) -> dict[int, Crop]:
        """The crops that the sample has, by their index."""
        shard = self.shard("crop_settings")
        return {} if shard is None else dict(crops_of(row, self.described(row), shard))

    @property
    def size(self) -> int:
        """Side of the crops in pixels; 0 where none are recorded."""
        shard = self.shard("crop_settings")
        return 0 if shard is None else crop_size(shard)

    def picture(self, row: int, crop: int = 0) -> np.ndarray | None:
        """A crop of the picture, uint8 (S, S, 3)."""
        place = self.crops(row).get(crop)
        if place is None:
            return None
        if row not in self._images:
            if len(self._images) >= _IMAGES:
                self._images.clear()
            data = self.value("rgb", row)
            self._images[row] = None if data is None else images.decode(data)
        image = self._images[row]
        return None if image is None else apply_crop(image, place, self.size)


def chosen_rows(
    store: Store,
    manifest: Manifest,
    count: int | None,
    wanted: Callable[[str], bool] = lambda key: True,
    shards: Collection[int] | None = None,
) -> dict[int, list[int]]:
    """Rows by shard of the `count` wanted keys of the lowest rank, in order; all if `count` is None. `shards`: only
    these."""
    best: list[tuple[int, int, int]] = []  # a heap of the lowest ranks, the highest of them on top
    for number in manifest.shards.tolist() if shards is None else sorted(shards):
        for row, key in enumerate(keys_of(store, manifest, number)):
            if wanted(key):
                heapq.heappush(best, (-held_out_rank(key), number, row))
                if count is not None and len(best) > count:
                    heapq.heappop(best)
    chosen: dict[int, list[int]] = {}
    for _, number, row in sorted(best, key=lambda entry: entry[1:]):
        chosen.setdefault(number, []).append(row)
    return chosen


def keys_of(store: Store, manifest: Manifest, number: int) -> list[str]:
    """The keys of a shard, from its smallest object."""
    return read_shard(store, smallest(manifest, number).name).keys
