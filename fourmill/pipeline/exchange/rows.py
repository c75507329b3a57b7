"""What goes through an exchange: a run of samples with their values in stored form, read from shards or for shards.

Values stay encoded as shards store them, so that an exporter can pass bytes on untouched and an importer hands them
straight to `write_shard`. Row i of every part is the same sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.pipeline.shards import Record, Shard, Spec, read_shard
from fourmill.pipeline.store import Store


class WrongDataError(ValueError):
    """Data that contradicts itself or what is said of it; the message names the place."""


@dataclass
class Part:
    """One modality of a run. `columns[crop][row]`: bytes, str or an integer array as the codec stores it; None is null.
    `quarantine`: reason by key."""

    spec: Spec
    columns: list[list[Any]]
    quarantine: dict[str, str] = field(default_factory=dict)

    def value(self, row: int, crop: int = 0) -> Any:
        return self.columns[crop][row]


@dataclass
class Run:
    """Samples in order, with the modalities that were asked for."""

    keys: list[str]
    parts: dict[str, Part]

    def extended(self, other: Run) -> None:
        """`other`'s samples behind these; both must have the same modalities."""
        self.keys += other.keys
        for name, part in other.parts.items():
            mine = self.parts[name]
            for column, more in zip(mine.columns, part.columns, strict=True):
                column.extend(more)
            mine.quarantine.update(part.quarantine)


@dataclass(frozen=True)
class Source:
    """One shard of a dataset: its records by modality; a modality that it lacks is absent."""

    shard: int
    rows: int
    records: Mapping[str, Record]


def take(store: Store, source: Source, specs: Mapping[str, Spec], rows: np.ndarray) -> Run:
    """Those rows of one shard, in all modalities of `specs`; a modality that the shard lacks is null throughout.

    WrongDataError for an object that is not the one its record describes."""
    shards = {name: opened(store, record) for name, record in source.records.items()}
    for name, shard in shards.items():
        found, wanted = hashlib.sha256(shard.data).hexdigest(), source.records[name].digest
        if found != wanted:
            raise WrongDataError(f"{source.records[name].name} has digest {found}, its record says {wanted}")
    keys = np.array(next(iter(shards.values())).keys, dtype=object)[rows].tolist()
    parts = {}
    for name, spec in specs.items():
        blank = [[None] * len(rows) for _ in range(spec.crops)]
        parts[name] = _part(shards[name], spec, rows, set(keys)) if name in shards else Part(spec, blank)
    return Run(keys, parts)


def opened(store: Store, record: Record) -> Shard:
    """The shard object of a record; WrongDataError if it is gone or damaged."""
    try:
        return read_shard(store, record.name)
    except (FileNotFoundError, ValueError) as error:
        raise WrongDataError(str(error)) from error


def _part(shard: Shard, spec: Spec, rows: np.ndarray, keys: set[str]) -> Part:
    columns = [_items(shard, crop, rows) for crop in range(spec.crops)]
    return Part(spec, columns, {k: reason for k, reason in shard.quarantine.items() if k in keys})


def _items(shard: Shard, crop: int, rows: np.ndarray) -> list[Any]:
    column = shard.column(crop).take(pa.array(rows, pa.int64()))
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        return [np.asarray(item.values) if item.is_valid else None for item in column]
    return list(column.to_pylist())


def complete(shard: Shard, crops: int) -> np.ndarray:
    """bool (rows,): rows with a value in every crop."""
    return np.logical_and.reduce([shard.valid(crop) for crop in range(crops)])


def spec_fields(spec: Spec) -> dict[str, Any]:
    """A spec as it stands in JSON, without what is not known."""
    return {name: value for name, value in vars(spec).items() if value is not None}


def aligned(what: str, names: Sequence[str], keys: Mapping[str, Sequence[str]]) -> list[str]:
    """The keys that all of `names` share, in order. WrongDataError tells how they differ."""
    first, *others = names
    for other in others:
        if list(keys[other]) != list(keys[first]):
            raise WrongDataError(f"{what}: {_divergence(first, list(keys[first]), other, list(keys[other]))}")
    return list(keys[first])


def _divergence(first: str, mine: list[str], other: str, theirs: list[str]) -> str:
    only_mine, only_theirs = sorted({*mine} - {*theirs}), sorted({*theirs} - {*mine})
    if not only_mine and not only_theirs:
        row = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
        return f"{other} has the samples of {first} in another order: row {row} is {theirs[row]!r}, not {mine[row]!r}"
    parts = []
    for name, only, rest in ((first, only_mine, other), (other, only_theirs, first)):
        if only:
            shown = ", ".join(map(repr, only[:3])) + (", …" if len(only) > 3 else "")
            parts.append(f"{len(only)} samples of {name} are not in {rest} ({shown})")
    return "; ".join(parts)
