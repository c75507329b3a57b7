"""A small dataset whose every value follows from the sample's number, for tests of the loader."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fourmill.model.data import DataConfig, TokenDataset
from fourmill.pipeline.manifest import Update, update_manifest
from fourmill.pipeline.shards import Record, Spec, commit, write_shard
from fourmill.pipeline.store import open_store

SIDE = 32
DEPTH = Spec(crops=2, vocabulary=500, length=4, grid=(2, 2))
CAPTION = Spec(vocabulary=100)
ROWS = 10


def picture(number: int) -> bytes:
    """A 40 x 48 PNG of noise that depends on the number."""
    pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def crop(index: int) -> np.ndarray:
    return np.array([(0, 4, 40, 40, 0), (2, 3, 30, 36, 1)][index], dtype=np.int32)


def depth(number: int, index: int) -> np.ndarray:
    return np.arange(4, dtype=np.uint16) + (4 * number + index) % 490


def caption(number: int) -> np.ndarray:
    return np.arange(30, 31 + number % 7, dtype=np.uint16)


def number_of(key: str) -> int:
    shard, row = key[1:].split("-")
    return ROWS * int(shard) + int(row)


class Toy:
    """A dataset of `shards` x 10 samples named s<shard>-<row>; samples are numbered through."""

    def __init__(self, uri: str | Path, shards: int = 0, *, pictures: bool = True, name: str = "s") -> None:
        self.uri, self.store, self.name = str(uri), open_store(uri), name
        records = [record for shard in range(shards) for record in self._records(shard, pictures)]
        if records:
            self.publish(records)

    def _records(self, shard: int, pictures: bool) -> list[Record]:
        numbers = range(ROWS * shard, ROWS * shard + ROWS)
        made = [
            self.make("tok_depth", shard, [[depth(n, i) for n in numbers] for i in range(2)], DEPTH),
            self.make("tok_caption", shard, [[caption(n) for n in numbers]], CAPTION),
        ]
        if pictures:
            made.append(self.make("rgb", shard, [[picture(n) for n in numbers]]))
            made.append(
                self.make("crop_settings", shard, [[crop(i) for _ in numbers] for i in range(2)], Spec(crops=2))
            )
        return made

    def make(
        self, name: str, shard: int, columns: list[list[Any]], spec: Spec | None = None, *, producer: str = "one",
        keys: list[str] | None = None,
    ) -> Record:  # fmt: skip
        """Commit a shard object."""
        keys = keys or [f"{self.name}{shard}-{row}" for row in range(ROWS)]
        print_of = f"{len(list(self.store.list())):016x}"
        return commit(
            self.store, write_shard(name, shard, print_of, keys, columns, spec or Spec(), {"who": producer}, {})
        )

    def put(self, name: str, shard: int, columns: list[list[Any]], spec: Spec | None = None, **more: Any) -> None:
        """Commit a shard object and put it into the manifest, in place of what stood there."""
        record = self.make(name, shard, columns, spec, **more)
        self.publish([record], more.get("producer", "one"))

    def publish(self, records: list[Record], producer: str = "one") -> None:
        update_manifest(self.store, lambda _: Update(records, {records[0].producer: {"who": producer}}))

    def open(self, **changes: Any) -> TokenDataset:
        return TokenDataset(self.uri, config(**changes))


def config(**changes: Any) -> DataConfig:
    fields = {"names": ("rgb", "tok_depth", "tok_caption"), "image_size": SIDE, "num_sentinels": 20, **changes}
    return DataConfig(**fields)


TOKENS = ("tok_depth", "tok_caption")
Opener = Callable[..., TokenDataset]
