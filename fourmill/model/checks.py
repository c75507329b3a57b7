"""Whether a dataset is fit to train on, from its records alone: before a single shard is read.

Refused: modalities that are absent or not tokens, two generations of one modality, shards whose keys differ between
modalities, vocabularies or grids that differ between shards, ids beyond the vocabulary. What is kept of the records
takes 80 bytes for each shard and modality.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.modalities import modality, unknown
from fourmill.model.config import PIXELS
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.shards import shard_name

CROPS = "crop_settings"  # where each crop of raw pixels is recorded


@dataclass(frozen=True)
class Records:
    """The shards of one modality, sorted by number; arrays of one entry each.

    `shards`, `rows`, `present`, `num_bytes`: int64. `fingerprints`: 16 letters; `digests`: 32 bytes, SHA-256.
    """

    name: str
    spec: dict[str, Any]
    shards: np.ndarray
    rows: np.ndarray
    present: np.ndarray
    num_bytes: np.ndarray
    fingerprints: np.ndarray
    digests: np.ndarray

    def object_name(self, place: int) -> str:
        return shard_name(self.name, int(self.shards[place]), self.fingerprints[place].decode())

    def digest(self, place: int) -> str:
        """The SHA-256 that the object must have, as hex."""
        return bytes(self.digests[place]).hex()


def read_records(
    manifest: Manifest, names: Sequence[str], uri: str, mixed_generations: bool = False
) -> dict[str, Records]:
    """The records of these modalities. ValueError unless every one is there, of one generation or mixed by choice, and
    all agree by row."""
    known = [m for m in manifest.modalities if modality(m).is_tokens or m == PIXELS]
    keys = _Keys(uri)
    found = {}
    for name in names:
        if not (modality(name).is_tokens or name in (PIXELS, CROPS)):
            raise ValueError(f"{name!r} is neither tokens nor 'rgb'; to train on here: {', '.join(known)}")
        if not manifest.num_shards(name):
            raise ValueError(f"{uri}: {unknown('modality', name, known)}")
        if len(generations := manifest.generations(name)) > 1 and not mixed_generations:
            raise ValueError(
                f"{uri}: {name} is of {len(generations)} generations ({', '.join(generations)}): it is partly redone;"
                " run its stage again until the plan is empty, or say mixed_generations: true"
            )
        found[name] = _read(manifest, name, uri, keys)
    return found


def _tables(manifest: Manifest, name: str) -> Iterator[pa.Table]:
    for _, info in sorted(manifest.blocks[name].items()):
        yield manifest.read_table(info)


def _read(manifest: Manifest, name: str, uri: str, keys: _Keys) -> Records:
    tables: list[pa.Table] = []
    for table in _tables(manifest, name):
        _check_specs(name, [*tables[:1], table], uri)
        keys.check(name, table)
        tables.append(table.select(["shard", "rows", "present", "num_bytes", "fingerprint", "digest", "spec"]))
    whole = pa.concat_tables(tables)
    numbers = {c: whole[c].to_numpy().astype(np.int64) for c in ("shard", "rows", "present", "num_bytes")}
    return Records(
        name,
        json.loads(whole["spec"][0].as_py()),
        numbers["shard"],
        numbers["rows"],
        numbers["present"],
        numbers["num_bytes"],
        np.array(whole["fingerprint"].to_pylist(), "S16"),
        np.frombuffer(bytes.fromhex("".join(whole["digest"].to_pylist())), "V32"),
    )


def _check_specs(name: str, tables: Sequence[pa.Table], uri: str) -> None:
    """The last table against the first."""
    first, table = tables[0], tables[-1]
    spec = first["spec"][0].as_py()
    for text in table["spec"].unique().to_pylist():
        if json.loads(text) != json.loads(spec):
            other = table["shard"][table["spec"].to_pylist().index(text)].as_py()
            raise ValueError(
                f"{uri}: {name} differs between shards: {json.loads(spec)} in shard {first['shard'][0].as_py()},"
                f" {json.loads(text)} in shard {other}"
            )
    vocabulary = json.loads(spec).get("vocabulary")
    if vocabulary is None:
        return
    for row, text in enumerate(table["statistics"].to_pylist()):
        largest = json.loads(text).get("max", -1)
        if largest >= vocabulary:
            raise ValueError(f"{uri}: {table['name'][row].as_py()} holds id {largest}; its vocabulary has {vocabulary}")


class _Keys:
    """The keys of each shard, by their digest: the same in every modality."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._first: dict[int, tuple[int, str, str]] = {}

    def check(self, name: str, table: pa.Table) -> None:
        columns = (table[c].to_pylist() for c in ("shard", "rows", "keys_digest"))
        for shard, rows, keys in zip(*columns, strict=True):
            other_rows, other_keys, other = self._first.setdefault(shard, (rows, keys, name))
            if (rows, keys) != (other_rows, other_keys):
                raise ValueError(
                    f"{self.uri}: shard {shard} has other keys in {name} than in {other}"
                    f" ({rows} and {other_rows} rows); one of them belongs to another corpus"
                )
