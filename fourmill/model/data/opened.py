"""The open shards of a dataset: where the values of each row lie in memory, and which shards are mapped at present.

A shard is parsed and checked once; what is kept of it is where its columns begin, 8 to 24 bytes a column. Opening it
again maps it and no more. Whoever reads holds the lock, so that no other thread closes a shard meanwhile.

Legend: S shards, C crops, B samples, L cells of a grid, T longest text. A shard's place is its index in the dataset.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.modalities import Kind, modality
from fourmill.model.data.memory import gather, texts
from fourmill.model.data.source import Source
from fourmill.pipeline.codecs import token_dtype
from fourmill.pipeline.shards import Shard, open_shard

_MAPS = 32_768  # at once; Linux allows a process 65,530
_ALL_VALID = -1
_CROP = 5  # top, left, height, width, flip


class Columns:
    """One modality. `base_S`: address of the shard's buffer, 0 while it is closed. The others count bytes from there.

    `values_SC`: a column's first value. `offsets_SC`: a list column's first offset. `valid_SC`: its validity bits, -1
    where every row holds a value. `size_S`: the buffer's bytes, 0 until the shard has been parsed.
    """

    def __init__(self, source: Source, name: str) -> None:
        shards, spec = len(source.numbers), source.specs[name]
        self.name, self.spec, self.per_crop = name, spec, modality(name).per_crop
        self.is_list, is_crop = modality(name).kind is Kind.SEQUENCE, modality(name).kind is Kind.CROP
        self.crops = spec.crops if self.per_crop else 1
        self.dtype = np.dtype(np.int32 if is_crop else token_dtype(spec.vocabulary or 0))
        self.length = -1 if self.is_list else _CROP if is_crop else spec.length or 0
        self.has_S = source.has(name)
        self.complete = bool((source.present(name) == source.rows).all())
        self.base_S = np.zeros(shards, np.int64)
        self.size_S = np.zeros(shards, np.int64)
        self.values_SC = np.zeros((shards, self.crops), np.int64)
        self.valid_SC = np.full((0 if self.complete else shards, self.crops), _ALL_VALID, np.int64)
        self.offsets_SC = np.zeros((shards if self.is_list else 0, self.crops), np.int64)

    def learn(self, place: int, shard: Shard, where: str) -> None:
        """Note where the columns of an open shard lie. ValueError if one is not laid out as this modality's are."""
        for crop in range(self.crops if shard.table.num_rows else 0):
            column = shard.column(crop)
            wanted = pa.list_(pa.from_numpy_dtype(self.dtype), self.length)
            if column.type != wanted or column.values.null_count or column.offset:
                raise ValueError(f"{where}: column {crop} is {column.type}, not a whole one of {wanted}")
            if not self.complete:
                bits = column.buffers()[0] if column.null_count else None
                self.valid_SC[place, crop] = _within(shard.data, bits, where) if bits else _ALL_VALID
            elif column.null_count:
                raise ValueError(f"{where} has nulls; its record says that every row holds a value")
            if self.is_list:
                self.offsets_SC[place, crop] = _within(shard.data, column.buffers()[1], where)
            values = column.values
            start = values.offset * self.dtype.itemsize
            self.values_SC[place, crop] = _within(shard.data, values.buffers()[1], where) + start if len(values) else 0


def _within(data: pa.Buffer, part: pa.Buffer, where: str) -> int:
    """Where a column's buffer begins in its shard's."""
    start = part.address - data.address
    if not 0 <= start <= data.size - part.size:
        raise ValueError(f"{where} is compressed or in several batches: a shard is one plain batch")
    return int(start)


class OpenShards:
    """Buffers of a source's shards, opened when they are needed; those of the shards used longest ago are let go."""

    def __init__(self, source: Source, tokens: Sequence[str], most: int | None = None) -> None:
        shards = len(source.numbers)
        self.source, self.columns = source, {name: Columns(source, name) for name in tokens}
        self.most = most or max(_MAPS // max(len(tokens), 1), 1)
        self.lead_S = _leads(source, tokens)  # of the names, the one whose object the keys are read from
        self.keys_S2 = np.zeros((shards, 2), np.int64)  # offsets and bytes of the keys, in the lead's buffer
        self.used_S = np.zeros(shards, np.int64)
        self._reset()
        _ALIVE.add(self)

    def _reset(self) -> None:
        """Nothing is open: at the start, and in a forked process, whose parent may have been opening something."""
        self.lock = threading.RLock()
        self._buffers: dict[tuple[str, int], pa.Buffer] = {}
        self._open: set[int] = set()
        self._tick = 0
        for columns in self.columns.values():
            columns.base_S[:] = 0

    def need(self, places: np.ndarray) -> None:
        """Have these shards open, in all modalities. The lock must be held until they are read."""
        self._tick += 1
        self.used_S[places] = self._tick
        for place in places.tolist():
            if place not in self._open:
                for columns in self.columns.values():
                    if columns.has_S[place] and not columns.base_S[place]:
                        self._map(columns, place)
                self._open.add(place)
        if len(self._open) > self.most:
            self._close_some()

    def _map(self, columns: Columns, place: int) -> None:
        data = self.source.open(columns.name, place)
        if columns.size_S[place] != data.size:  # 0 until it is known to be right
            self._parse(columns, place, data)
        self._buffers[columns.name, place] = data
        columns.base_S[place] = data.address

    def _parse(self, columns: Columns, place: int, data: pa.Buffer) -> None:
        where = f"{columns.name} shard {self.source.numbers[place]} of {self.source.uri}"
        shard = open_shard(data, where)
        keys = shard.table["key"]
        if len(keys) != self.source.rows[place]:
            raise ValueError(f"{where} has {len(keys)} rows, its record says {self.source.rows[place]}")
        if columns.name == list(self.columns)[self.lead_S[place]]:
            if keys.type != pa.string() or keys.num_chunks != 1 or keys.chunk(0).offset:
                raise ValueError(
                    f"{where}: keys of type {keys.type} in {keys.num_chunks} parts; one of strings is needed"
                )
            _, offsets, text = keys.chunk(0).buffers()
            self.keys_S2[place] = _within(data, offsets, where), _within(data, text, where) if text else 0
        columns.learn(place, shard, where)
        columns.size_S[place] = data.size

    def _close_some(self) -> None:
        """An eighth more than must be closed, those used longest ago and not by this batch."""
        others = np.array([p for p in self._open if self.used_S[p] != self._tick], np.int64)
        count = min(len(self._open) - self.most + self.most // 8, len(others))
        for place in others[np.argsort(self.used_S[others], kind="stable")[:count]].tolist():
            self._open.discard(place)
            for name, columns in self.columns.items():
                columns.base_S[place] = 0
                self._buffers.pop((name, place), None)

    def keys(self, place_B: np.ndarray, row_B: np.ndarray) -> list[str]:
        """The samples' keys, from shards that are open."""
        base_B = np.zeros(len(place_B), np.int64)
        for number, columns in enumerate(self.columns.values()):
            of_B = self.lead_S[place_B] == number
            base_B[of_B] = columns.base_S[place_B[of_B]]
        if not base_B.all():  # shards with pictures and no tokens
            known = {int(place): self.source.keys(int(place)) for place in np.unique(place_B)}
            return [known[place][row] for place, row in zip(place_B.tolist(), row_B.tolist(), strict=True)]
        start_B, text_B = self.keys_S2[place_B].T
        ends_B2 = gather(base_B + start_B + 4 * row_B, 2, np.int32).astype(np.int64)
        return texts(base_B + text_B + ends_B2[:, 0], ends_B2[:, 1] - ends_B2[:, 0])

    def grids(self, name: str, place_B: np.ndarray, row_B: np.ndarray, crop_B: Any) -> tuple[np.ndarray, np.ndarray]:
        """Ids (B, L), zero where the shard has no object, and bool (B,): which samples have a value."""
        columns = self.columns[name]
        crop_B = crop_B if columns.per_crop else 0
        base_B, length = columns.base_S[place_B], columns.length
        address_B = base_B + columns.values_SC[place_B, crop_B] + row_B * (length * columns.dtype.itemsize)
        ids_BL = _gather_where(base_B != 0, address_B, length, columns.dtype)
        return ids_BL, self._present(columns, base_B, place_B, row_B, crop_B)

    def texts(
        self, name: str, longest: int, place_B: np.ndarray, row_B: np.ndarray, crop_B: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids (B, T), no text longer than `longest`, zeros after the end; lengths (B,); bool (B,): which are there."""
        columns = self.columns[name]
        crop_B = crop_B if columns.per_crop else 0
        base_B, item = columns.base_S[place_B], columns.dtype.itemsize
        present_B = self._present(columns, base_B, place_B, row_B, crop_B)
        ends_at_B = base_B + columns.offsets_SC[place_B, crop_B] + 4 * row_B
        ends_B2 = _gather_where(base_B != 0, ends_at_B, 2, np.int32).astype(np.int64)
        length_B = np.minimum(ends_B2[:, 1] - ends_B2[:, 0], longest) * present_B
        width = max(int(length_B.max(initial=0)), 1)
        address_B = base_B + columns.values_SC[place_B, crop_B] + item * ends_B2[:, 0]
        # `width` ids are read of each text and cut afterwards: the last ones of a shard would be read beyond its end.
        inside_B = present_B & (address_B + width * item <= base_B + columns.size_S[place_B])
        ids_BT = _gather_where(inside_B, address_B, width, columns.dtype)
        ids_BT *= np.arange(width) < length_B[:, None]
        for i in np.flatnonzero(present_B & ~inside_B & (length_B > 0)):
            ids_BT[i, : length_B[i]] = gather(address_B[i : i + 1], int(length_B[i]), columns.dtype)
        return ids_BT, length_B, present_B

    def _present(
        self, columns: Columns, base_B: np.ndarray, place_B: np.ndarray, row_B: np.ndarray, crop_B: Any
    ) -> np.ndarray:
        present_B = base_B != 0
        if columns.complete:
            return np.asarray(present_B)
        bits_B = columns.valid_SC[place_B, crop_B]
        some_B = present_B & (bits_B >= 0)
        byte_K = gather((base_B + bits_B + (row_B >> 3))[some_B], 1, np.uint8)[:, 0]
        present_B[some_B] = (byte_K >> (row_B[some_B] & 7)) & 1
        return np.asarray(present_B)


def _gather_where(there_B: np.ndarray, address_B: np.ndarray, count: int, dtype: Any) -> np.ndarray:
    """`gather` of the rows that are there, zeros elsewhere."""
    if there_B.all():
        return gather(address_B, count, dtype)
    values = np.zeros((len(address_B), count), dtype)
    values[there_B] = gather(address_B[there_B], count, dtype)
    return values


def _leads(source: Source, names: Sequence[str]) -> np.ndarray:
    """int16 for each shard: the first of the names that has an object there, -1 if none has."""
    lead_S = np.full(len(source.numbers), -1, np.int16)
    for number, name in reversed(list(enumerate(names))):
        lead_S[source.has(name)] = number
    return lead_S


_ALIVE: weakref.WeakSet[OpenShards] = weakref.WeakSet()


def _after_fork() -> None:
    for shards in list(_ALIVE):
        shards._reset()
        shards.source.forked()


os.register_at_fork(after_in_child=_after_fork)
