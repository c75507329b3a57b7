"""Training examples of a tokenizer: values of one modality by number, from a dataset's shards or from memory.

Invariants: which keys are held out depends on the key alone, so two modalities, two runs and two machines hold out the
same samples; rows that are null are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from fourmill.modalities import modality
from fourmill.pipeline import masks
from fourmill.pipeline.geometry import Crop, apply_crop
from fourmill.pipeline.images import decode
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.shards import Record, Shard, Spec, read_shard
from fourmill.pipeline.splits import is_held_out
from fourmill.pipeline.store import Store, open_store

CROPS = "crop_settings"
MIN_AREA = 0.0005  # share of the picture that a mask's box covers at least; 4M leaves smaller ones out


class Examples(Protocol):
    """Numbered values."""

    @property
    def keys(self) -> Sequence[str]:
        """The sample of each value."""

    @property
    def groups(self) -> Sequence[int]:
        """The shard of each value; those of one are read together."""

    def values(self, rows: Sequence[int]) -> list[Any]:
        """The values of these numbers, as the tokenizer takes them."""


class ArrayExamples:
    """Values in memory."""

    def __init__(self, keys: Sequence[str], array: Sequence[Any]) -> None:
        self.keys, self.array, self.groups = keys, array, [0] * len(keys)

    def values(self, rows: Sequence[int]) -> list[Any]:
        return [self.array[row] for row in rows]


class ShardExamples:
    """Values of one modality of a dataset; of `rgb`, its recorded crops at `size` pixels as uint8 (3, size, size)."""

    def __init__(
        self,
        dataset: str,
        name: str,
        size: int,
        *,
        max_shards: int | None = None,
        open_shards: int = 16,
        mixed_generations: bool = False,
    ) -> None:
        """`open_shards` objects stay open; rgb opens two a shard."""
        self.store: Store = open_store(dataset)
        self.name, self.size = name, size
        manifest = read_manifest(self.store)
        self.records = records_of(manifest, name, dataset, mixed_generations)
        self.crops = records_of(manifest, CROPS, dataset, mixed_generations) if name == "rgb" else {}
        shards = sorted(set(self.records) & set(self.crops) if name == "rgb" else set(self.records))[:max_shards]
        self._open = functools.lru_cache(maxsize=open_shards)(self._read)
        self.spec: Spec = self._read(self.records[shards[0]].name).spec if shards else Spec()
        self.keys, self.groups, self._where = self._index(shards)

    def _read(self, name: str) -> Shard:
        return read_shard(self.store, name)

    def _index(self, shards: Sequence[int]) -> tuple[list[str], list[int], list[tuple[int, int]]]:
        keys: list[str] = []
        groups: list[int] = []
        where: list[tuple[int, int]] = []
        for number in shards:
            shard = self._read(self.records[number].name)
            present = shard if self.name != "rgb" else self._read(self.crops[number].name)
            names = shard.keys
            for crop in range(present.spec.crops if present.entry.per_crop else 1):
                valid = present.valid(crop) & shard.valid(0 if self.name == "rgb" else crop)
                rows = np.flatnonzero(valid).tolist()
                keys += [names[row] for row in rows]
                groups += [number] * len(rows)
                where += [(row, crop) for row in rows]
        return keys, groups, where

    def values(self, rows: Sequence[int]) -> list[Any]:
        return [self._value(self.groups[i], *self._where[i]) for i in rows]

    def _value(self, number: int, row: int, crop: int) -> Any:
        shard = self._open(self.records[number].name)
        if self.name != "rgb":
            return shard.value(row, crop)
        box = Crop(*map(int, self._open(self.crops[number].name).value(row, crop)))
        return apply_crop(decode(shard.value(row)), box, self.size).transpose(2, 0, 1)


class PartExamples(ShardExamples):
    """The parts that a label's values hold: masks of instances as uint8 (size, size) within their box, or poses.

    Every value is read once to number its parts; `max_shards` bounds that.
    """

    def _index(self, shards: Sequence[int]) -> tuple[list[str], list[int], list[tuple[int, int]]]:
        keys, groups, where = super()._index(shards)
        numbers: list[int] = []
        self._parts: list[int] = []
        for number, (group, place) in enumerate(zip(groups, where, strict=True)):
            parts = _parts_of(self._open(self.records[group].name).value(*place), self.name)
            numbers += [number] * len(parts)
            self._parts += parts
        return [keys[i] for i in numbers], [groups[i] for i in numbers], [where[i] for i in numbers]

    def values(self, rows: Sequence[int]) -> list[Any]:
        return [self._part(self._value(self.groups[i], *self._where[i])[self._parts[i]]) for i in rows]

    def _part(self, item: dict[str, Any]) -> np.ndarray:
        from fourmill.tokenizers.sam_instance import inside

        return np.asarray(item["pose"], np.float32) if "pose" in item else inside(masks.decode(item["mask"]), self.size)


def _parts_of(items: Sequence[dict[str, Any]], name: str) -> list[int]:
    """Numbers of the items that hold a part; of masks those whose box is large enough to be tokenized."""
    if name.startswith("human_poses"):
        return list(range(len(items)))
    sides = [(item["box"][2] - item["box"][0]) * (item["box"][3] - item["box"][1]) for item in items]
    return [i for i, side in enumerate(sides) if side >= MIN_AREA and items[i]["area"] > 0]


def records_of(manifest: Manifest, name: str, dataset: str, mixed_generations: bool) -> dict[int, Record]:
    """A modality's records by shard; ValueError if there are none, or if two producers made them and may not."""
    records = {record.shard: record for record in manifest.records(name)}
    if not records:
        raise ValueError(f"{dataset} has no {name}; it has: {', '.join(manifest.modalities)}")
    made_by = manifest.generations(name)
    if len(made_by) > 1 and not mixed_generations:
        raise ValueError(
            f"{name} of {dataset} is partly redone (producers {', '.join(made_by)}): finish that run first, or say "
            "mixed_generations: true"
        )
    return records


def texts(dataset: str, sources: Sequence[str], mixed_generations: bool = False) -> Iterator[str]:
    """Every text of those of the modalities `sources` that the dataset has; ValueError if it has none."""
    store = open_store(dataset)
    manifest = read_manifest(store)
    there = [name for name in sources if modality(name).name in manifest.modalities]
    if not there:
        raise ValueError(f"{dataset} has neither of {', '.join(sources)}; it has: {', '.join(manifest.modalities)}")
    for name in there:
        for _, record in sorted(records_of(manifest, name, dataset, mixed_generations).items()):
            yield from (value for value in read_shard(store, record.name).values() if value is not None)


def split(keys: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Numbers of the examples to train on, and of those held out."""
    held = [is_held_out(key, share) for key in keys]
    return [i for i, out in enumerate(held) if not out], [i for i, out in enumerate(held) if out]


class Order:
    """The endless order of training: row at any position, a function of (seed, position) alone.

    Each epoch visits every row once; shards are shuffled, then rows within runs of `group_size` shards.
    """

    def __init__(self, rows: Sequence[int], groups: Sequence[int], seed: int, group_size: int) -> None:
        self.by_group: dict[int, list[int]] = {}
        for row in rows:
            self.by_group.setdefault(groups[row], []).append(row)
        self.total, self.seed, self.group_size = len(rows), seed, group_size
        self._epoch: tuple[int, np.ndarray] | None = None

    def batch(self, step: int, size: int) -> list[int]:
        """The rows of step `step`."""
        return [self._row(position) for position in range(step * size, (step + 1) * size)]

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.total)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        return int(self._epoch[1][offset])

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        names = rng.permutation(sorted(self.by_group)).tolist()
        runs = [names[i : i + self.group_size] for i in range(0, len(names), self.group_size)]
        return np.concatenate([rng.permutation([row for name in run for row in self.by_group[name]]) for run in runs])
