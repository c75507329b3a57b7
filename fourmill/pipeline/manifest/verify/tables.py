"""A snapshot against itself: its root's sums against its record tables, and one modality's records against another's.

Block by block, so that memory does not grow with the dataset; nothing but record tables is read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import pyarrow as pa

from fourmill.pipeline.fingerprints import ancestry, fingerprints
from fourmill.pipeline.manifest.snapshot import Manifest
from fourmill.pipeline.manifest.tables import BLOCK, SCHEMA, BlockInfo, decoded, describe
from fourmill.pipeline.manifest.verify.problems import Problem
from fourmill.pipeline.shards import shard_name

_RANGES = 8  # of missing shards, named in one problem


@dataclass
class Block:
    """The record tables of one block, as far as they can be used, and what is wrong with them.

    `unusable`: modalities whose table is not what one must be. `expected`: the digest of a shard's keys, for shards
    whose modalities disagree.
    """

    number: int
    tables: dict[str, pa.Table] = field(default_factory=dict)
    unusable: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    expected: dict[int, str] = field(default_factory=dict)


def reference(names: Iterable[str]) -> str | None:
    """The modality that the others are held against: the pictures, or the first there is."""
    known = sorted(names)
    return "rgb" if "rgb" in known else next(iter(known), None)


def check_block(manifest: Manifest, number: int, names: Iterable[str], follow: bool = True) -> Block:
    """Read the tables of a block and check each, and the modalities against one another. `follow`: that fingerprints
    follow, for which the list of retries is read."""
    block = Block(number)
    for name in names:
        if info := manifest.blocks[name].get(number):
            table, problems = _read(manifest, name, info)
            if table is not None and not (problems := list(_malformed(name, number, info, table))):
                block.tables[name] = table
                problems = [*_check_sums(name, number, info, table), *_check_producers(manifest, name, info)]
            else:
                block.unusable.add(name)
            block.problems += problems
    for name, table in block.tables.items() if follow else ():
        block.problems += _check_fingerprints(manifest, name, number, table, block.tables)
    _check_alignment(block)
    return block


def check_generations(manifest: Manifest, names: Iterable[str]) -> Iterator[Problem]:
    """Modalities made by more than one recipe."""
    for name in names:
        recipes = manifest.totals(name).recipes
        if len(recipes) > 1:
            parts = ", ".join(f"{recipe} ({shards:,} shards)" for recipe, shards in recipes.items())
            yield Problem("mixed-generations", name, f"mixes {len(recipes)} generations: {parts}", name)


def _read(manifest: Manifest, name: str, info: BlockInfo) -> tuple[pa.Table | None, list[Problem]]:
    """A record table with the bytes that the root names, or what is wrong with it."""
    try:
        data = manifest.store.get(info.name)
    except FileNotFoundError:
        return None, [Problem("missing-table", info.name, "the record table is gone", name)]
    if hashlib.sha256(data).hexdigest() != info.digest:
        what = "its SHA-256 differs from the snapshot's: the record table's bytes have changed"
        return None, [Problem("wrong-table", info.name, what, name)]
    try:
        return decoded(data, info.name), []
    except ValueError as error:
        return None, [Problem("bad-table", info.name, str(error), name)]


def _malformed(name: str, number: int, info: BlockInfo, table: pa.Table) -> Iterator[Problem]:
    """What must not be taken for a record table at all."""
    if table.schema.remove_metadata() != SCHEMA or any(column.null_count for column in table.columns):
        yield Problem("bad-table", info.name, "its columns are not those of a record table", name)
        return
    shards = table["shard"].to_numpy()
    if not len(shards) or shards[0] // BLOCK != number or shards[-1] // BLOCK != number or (np.diff(shards) <= 0).any():
        what = f"its shard numbers do not rise within {number * BLOCK} to {(number + 1) * BLOCK - 1}"
        yield Problem("bad-table", info.name, what, name)
        return
    if table["modality"].unique().to_pylist() != [name]:
        yield Problem("bad-table", info.name, f"holds records of other modalities than {name}", name)
    found = zip(shards.tolist(), table["fingerprint"].to_pylist(), table["name"].to_pylist(), strict=True)
    for shard, fingerprint, object_name in found:
        if object_name != shard_name(name, shard, fingerprint):
            what = f"names {object_name!r} as the object of shard {shard}, whose fingerprint is {fingerprint}"
            yield Problem("bad-table", info.name, what, name, shard)


def _check_sums(name: str, number: int, info: BlockInfo, table: pa.Table) -> Iterator[Problem]:
    """The root's sums; its name and digest are those of the bytes that were read."""
    told = describe(name, number, table, b"", info.settled)
    for part in (f.name for f in fields(BlockInfo) if f.name not in ("name", "digest", "num_bytes", "settled")):
        says, has = getattr(info, part), getattr(told, part)
        if says != has:
            yield Problem("wrong-counts", info.name, f"{part}: the snapshot says {says}, the table has {has}", name)


def _check_producers(manifest: Manifest, name: str, info: BlockInfo) -> Iterator[Problem]:
    for recipe, shards in info.recipes.items():
        if recipe not in manifest.producers:
            what = f"{shards:,} shards of producer {recipe}, which the snapshot does not describe"
            yield Problem("unknown-producer", info.name, what, name)


def _check_fingerprints(
    manifest: Manifest, name: str, number: int, table: pa.Table, tables: Mapping[str, pa.Table]
) -> Iterator[Problem]:
    """Where the root says that one recipe gives every fingerprint of the block: that it does."""
    info = manifest.blocks[name][number]
    if info.settled is None or (recipe := info.settled["recipe"]) not in manifest.producers:
        return
    try:
        family = ancestry(name, recipe, manifest.producers)
    except KeyError as error:
        what = f"producer {recipe} goes back to {error.args[0]}, which the snapshot does not describe"
        yield Problem("unknown-producer", info.name, what, name)
        return
    shards = table["shard"].to_pylist()
    if any(tables[i]["shard"].to_pylist() != shards for i in family.ingested if i in tables):
        return  # missing shards: said elsewhere
    if not family.ingested or any(i not in tables for i in family.ingested):
        return
    retries = manifest.retries
    again = [retries.text(family.made, s) for s in shards] if retries else None
    columns = [tables[i]["fingerprint"].to_pylist() for i in family.ingested]
    wanted = fingerprints(name, recipe, columns, again)
    for shard, has, should in zip(shards, table["fingerprint"].to_pylist(), wanted, strict=True):
        if has != should:
            what = f"its recipe {recipe} and inputs give the fingerprint {should}"
            yield Problem("wrong-fingerprint", shard_name(name, shard, has), what, name, shard)


def _check_alignment(block: Block) -> None:
    """Row i of shard s must be the same key in every modality: so say the records' digests of keys."""
    digests: dict[int, dict[str, str]] = {}
    base = block.tables.get(reference(block.tables) or "")
    for name, table in block.tables.items():
        if table is base or (_same(table, base, "shard") and _same(table, base, "keys_digest")):
            continue
        for modality in (reference(block.tables) or "", name):
            other = block.tables[modality]
            for shard, keys in zip(other["shard"].to_pylist(), other["keys_digest"].to_pylist(), strict=True):
                digests.setdefault(shard, {})[modality] = keys
    for shard, by_modality in digests.items():
        if len(set(by_modality.values())) > 1:
            block.expected[shard] = _agreed(block, shard)
    for name, table in block.tables.items():
        block.problems += _misaligned(block, name, table)


def _same(table: pa.Table, base: pa.Table, column: str) -> bool:
    return bool(table[column].combine_chunks().equals(base[column].combine_chunks()))


def _agreed(block: Block, shard: int) -> str:
    """What most modalities have; of equals, what the reference has."""
    found = Counter(keys for name in block.tables if (keys := _keys_digest(block.tables[name], shard)))
    most = max(found.values())
    first = _keys_digest(block.tables[reference(block.tables) or ""], shard)
    return first if first and found[first] == most else min(k for k, n in found.items() if n == most)


def _keys_digest(table: pa.Table, shard: int) -> str | None:
    row = int(np.searchsorted(table["shard"].to_numpy(), shard))
    if row == table.num_rows or table["shard"][row].as_py() != shard:
        return None
    return str(table["keys_digest"][row].as_py())


def _misaligned(block: Block, name: str, table: pa.Table) -> Iterator[Problem]:
    for shard, expected in block.expected.items():
        found = _keys_digest(table, shard)
        if found is not None and found != expected:
            object_name = table["name"][int(np.searchsorted(table["shard"].to_numpy(), shard))].as_py()
            what = "by its record, its keys differ from those of the shard's other modalities"
            yield Problem("misaligned-keys", object_name, what, name, shard)


class Coverage:
    """Which shards each modality lacks or has beyond the reference's, over all blocks."""

    def __init__(self) -> None:
        self.total = 0
        self._off: dict[tuple[str, str], list[np.ndarray]] = {}

    def add(self, shards: Mapping[str, np.ndarray], names: Iterable[str], base: str) -> None:
        """One block's shard numbers by modality."""
        none = np.zeros(0, np.int64)
        wanted = shards.get(base, none)
        self.total += len(wanted)
        for name in names:
            has = shards.get(name, none)
            for code, off in (
                ("missing-shards", np.setdiff1d(wanted, has, assume_unique=True)),
                ("extra-shards", np.setdiff1d(has, wanted, assume_unique=True)),
            ):
                if len(off):
                    self._off.setdefault((name, code), []).append(off)

    def problems(self) -> Iterator[Problem]:
        for (name, code), parts in sorted(self._off.items()):
            shards = np.concatenate(parts)
            if code == "missing-shards":
                what = f"no object for {len(shards):,} of {self.total:,} shards: {ranges(shards)}"
            else:
                what = f"{len(shards):,} shards that the pictures lack: {ranges(shards)}"
            yield Problem(code, name, what, name, int(shards[0]))


def ranges(shards: np.ndarray) -> str:
    """Sorted shard numbers as '3, 7-9, 12'."""
    runs = np.split(shards, np.flatnonzero(np.diff(shards) != 1) + 1)
    words = [f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs[:_RANGES]]
    return ", ".join(words) + (", …" if len(runs) > _RANGES else "")
