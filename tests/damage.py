"""A small dataset whose every object is written down here, and hands that damage it: for the tests of `verify`.

Three shards of five samples, keys s0r0 … s2r4, seven modalities with the recipes and fingerprints of a real run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from helpers import make_jpeg

from fourmill.modalities import modality
from fourmill.pipeline import codecs
from fourmill.pipeline.fingerprints import fingerprints, recipe_of
from fourmill.pipeline.manifest import Manifest, Update, read_manifest, update_manifest
from fourmill.pipeline.shards import Record, Spec, commit, digest, record_of, shard_name, write_shard
from fourmill.pipeline.store import Store

SHARDS, ROWS = 3, 5
INGEST = {"class": "ingest", "version": 1, "config": {}}
DEPTH = {"class": "Depth", "version": 1, "config": {}, "inputs": {"rgb": "corpus"}}
CAPTION = {"class": "Caption", "version": 1, "config": {}, "inputs": {"rgb": "corpus"}}
BOXES = {"class": "Boxes", "version": 1, "config": {}, "inputs": {"source": "corpus"}}
TOKENS = {"class": "Tokens", "version": 1, "config": {}, "inputs": {"depth": recipe_of(DEPTH)}}
PRODUCERS: dict[str, dict[str, Any]] = {
    "rgb": INGEST,
    "alt_text": INGEST,
    "source": INGEST,
    "depth": DEPTH,
    "caption": CAPTION,
    "det": BOXES,
    "tok_depth": TOKENS,
}
SPECS = {"depth": Spec(convention="metric"), "tok_depth": Spec(vocabulary=256, length=4, grid=(2, 2))}


def keys_of(shard: int) -> list[str]:
    return [f"s{shard}r{row}" for row in range(ROWS)]


def value_of(name: str, shard: int, row: int) -> Any:
    number = shard * ROWS + row
    return {
        "rgb": lambda: make_jpeg(8, 8, seed=number),
        "alt_text": lambda: f"text {number}",
        "source": lambda: {"origin": f"x.tar/{number}", "width": 8, "height": 8},
        "depth": lambda: np.arange(64, dtype=np.float32).reshape(8, 8) + number,
        "caption": lambda: f"caption {number}",
        "det": lambda: [{"box": [0.1, 0.2, 0.5, 0.9], "class_name": "cat", "score": 0.5}],
        "tok_depth": lambda: np.arange(4) + number,
    }[name]()


def fingerprint_of(name: str, shard: int) -> str:
    producer = PRODUCERS[name]
    if "inputs" not in producer:
        return digest(name, str(shard))[:16]
    ingested = "source" if name == "det" else "rgb"
    return fingerprints(name, recipe_of(producer), [[fingerprint_of(ingested, shard)]])[0]


def object_name(name: str, shard: int, suffix: str = "arrow") -> str:
    return shard_name(name, shard, fingerprint_of(name, shard), suffix)


def object_of(
    name: str, shard: int, rows: Sequence[int] = range(ROWS), values: dict[int, Any] | None = None, **changes: Any
) -> bytes:
    """The object's bytes; `rows`: in which order, `values`: in place of the usual by row, `changes`: other parts."""
    usual = [(values or {}).get(row, value_of(name, shard, row)) for row in rows]
    column = [None if v is None else v if isinstance(v, bytes) else codecs.encode(modality(name), v) for v in usual]
    parts: dict[str, Any] = {
        "keys": [keys_of(shard)[row] for row in rows],
        "columns": [column],
        "spec": SPECS.get(name, Spec()),
        "producer": PRODUCERS[name],
        "quarantine": {},
        "fingerprint": fingerprint_of(name, shard),
        "modality_name": name,
        "shard": shard,
        **changes,
    }
    return write_shard(**parts)


def build(store: Store, names: Sequence[str] = tuple(PRODUCERS)) -> Manifest:
    """The sound dataset."""
    records = [commit(store, object_of(name, shard)) for name in names for shard in range(SHARDS)]
    return add(store, records)


def add(store: Store, records: Sequence[Record]) -> Manifest:
    producers = {recipe_of(p): p for p in PRODUCERS.values()}
    return update_manifest(store, lambda _: Update(records, producers, corpus={"samples": SHARDS * ROWS}))


def overwrite(store: Store, name: str, data: bytes) -> None:
    store.delete(name)
    assert store.create(name, data)


def put(store: Store, data: bytes, record: bool = True, manifest: bool = True) -> None:
    """An object in place of that of its name, with its record and in a new snapshot, or without."""
    found = record_of(data)
    overwrite(store, found.name, data)
    if record:
        overwrite(store, found.name.replace(".arrow", ".json"), found.to_json())
    if manifest:
        add(store, [found])


def newest(store: Store) -> Manifest:
    return read_manifest(store)
