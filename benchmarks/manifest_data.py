"""What benchmarks/manifest.py works on: a dataset of any number of shards that is all manifest.

12 modalities, 1,000 samples a shard. Record tables, roots, recipes and fingerprints are those that runs of CONFIG
would have published, statistics of a 30,000-word vocabulary included; the shard objects themselves do not exist, or are
sparse files of the right size. Snapshot 1 is what ingest leaves, snapshot 2 the finished job.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.config import Config
from fourmill.pipeline import statistics
from fourmill.pipeline.fingerprints import INGESTED, Retries, ancestry, fingerprints
from fourmill.pipeline.manifest import BLOCK, BlockInfo, Manifest, root_name
from fourmill.pipeline.manifest.tables import FORMAT, SCHEMA, describe, encoded, settled_by
from fourmill.pipeline.plan import make_plan
from fourmill.pipeline.shards import Record, producer_id, shard_name
from fourmill.pipeline.store import LocalStore

FIRST = BLOCK // 2  # the first shard's number, so that the block to which shards are added is half full
INGEST: dict[str, Any] = {"class": "ingest", "version": 1, "config": {}}
VOCABULARY = 30_000
ROWS = 1_000
CONFIG: dict[str, Any] = {
    "labelers": {
        "canny_edge": {},
        "color_palette": {},
        "det": {"kind": "annotated_boxes"},
        "metadata": {"reads": ["source", "alt_text", "det"]},
    },
    "tokenizers": {
        "tok_alt_text": {"kind": "text", "checkpoint": "demo:text", "max_tokens": 63},
        "tok_det": {"kind": "text", "checkpoint": "demo:text", "max_tokens": 40},
        "tok_color_palette": {"kind": "text", "checkpoint": "demo:text_4m", "max_tokens": 22},
        "tok_metadata": {"kind": "text", "checkpoint": "demo:text_4m", "max_tokens": 42},
    },
    "stages": {
        "labels": {"labelers": ["canny_edge", "color_palette", "det", "metadata"]},
        "tokens": {"tokenizers": ["tok_alt_text", "tok_det", "tok_color_palette", "tok_metadata"]},
    },
}


def config(folder: str) -> Config:
    return Config(dataset=folder, **CONFIG)


def object_bytes(shards: np.ndarray) -> np.ndarray:
    """The size of a shard's objects, from its number alone."""
    return np.asarray(1_000_000 + shards % 977)


class Answering(LocalStore):
    """A folder that answers for the sizes of objects it does not hold: what `verify` asks at 12 million objects costs
    what asking costs, without twelve million files."""

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        numbers = (int(name[name.index("/shard-") + 7 :].partition(".")[0]) for name in names)
        return [int(n) for n in object_bytes(np.fromiter(numbers, np.int64, len(names)))]


class Recipes:
    """Recipe by modality, producer by recipe, and fingerprints, of a run of CONFIG."""

    def __init__(self, folder: str) -> None:
        plan = make_plan(LocalStore(folder), Manifest(LocalStore(folder)), config(folder))
        self.by_modality = {**dict.fromkeys(INGESTED, producer_id(INGEST)), **plan.wanted.recipes}
        self.producers: dict[str, dict[str, Any]] = {**plan.producers, producer_id(INGEST): INGEST}
        self.ancestry = {m: ancestry(m, r, self.producers) for m, r in plan.wanted.recipes.items()}

    def fingerprints(self, shards: np.ndarray) -> dict[str, list[str]]:
        """Of these shards, by modality; those of ingested ones stand for the corpus's bytes."""
        found = {m: _hex(shards, m, 8) for m in INGESTED}
        for name, known in self.ancestry.items():
            columns = [found[m] for m in known.ingested]
            found[name] = fingerprints(name, self.by_modality[name], columns)
        return found


def _hex(shards: np.ndarray, salt: str, num_bytes: int) -> list[str]:
    """A hexadecimal number of so many bytes for each shard, with no pattern that a compressor could find."""
    seeds = [int(shards[0]), *salt.encode()]
    text = np.random.default_rng(seeds).bytes(num_bytes * len(shards)).hex()
    return [text[i : i + 2 * num_bytes] for i in range(0, len(text), 2 * num_bytes)]


def _columns(recipes: Recipes, name: str, shards: np.ndarray, prints: Sequence[str]) -> dict[str, Any]:
    count, tokens = len(shards), name.startswith("tok_")
    faulty = shards % 50 == 0  # one shard in fifty has a sample that could not be made
    found = {"tokens": 40_000, "min": 0, "max": VOCABULARY - 1} if tokens else {}
    spec = {"crops": 1, **({"vocabulary": VOCABULARY} if tokens else {})}
    return {
        "modality": [name] * count,
        "shard": shards,
        "name": [shard_name(name, s, f) for s, f in zip(shards.tolist(), prints, strict=True)],
        "fingerprint": prints,
        "producer": [recipes.by_modality[name]] * count,
        "rows": np.full(count, ROWS),
        "present": ROWS - faulty,
        "num_bytes": object_bytes(shards),
        "digest": _hex(shards, "digest " + name, 32),
        "keys_digest": _hex(shards, "keys", 32),
        "seconds": 20 + shards % 7,
        "gpu_seconds": 10 + shards % 5,
        "attempts": np.ones(count, np.int64),
        "spec": [json.dumps(spec)] * count,
        "statistics": [json.dumps(found)] * count,
        "quarantined": ['{"decode":1}' if bad else "{}" for bad in faulty],
    }


def table_of(recipes: Recipes, name: str, shards: np.ndarray, prints: Sequence[str]) -> pa.Table:
    """The record table of these shards."""
    columns = _columns(recipes, name, shards, prints)
    return pa.table({f.name: pa.array(columns[f.name], f.type) for f in SCHEMA}, schema=SCHEMA)


def histogram(samples: int) -> dict[str, Any]:
    """Statistics of 40 tokens a sample, in Zipf's proportions: of 1,000 samples 3,669 ids occur."""
    counts = (40 * samples / 10.9 / np.arange(1, VOCABULARY + 1)).astype(np.int64)
    bounds = {"min": 0, "max": int(np.count_nonzero(counts)) - 1}
    told = {"vocabulary": VOCABULARY, "values": samples, "tokens": int(counts.sum()), **bounds}
    return {**told, "histogram": statistics.pack_counts(counts)}


def build(folder: str, num_shards: int) -> None:
    """Snapshots 1 and 2."""
    store, recipes = LocalStore(folder), Recipes(folder)
    blocks: dict[str, dict[int, BlockInfo]] = {name: {} for name in recipes.by_modality}
    for number, shards in in_blocks(FIRST, num_shards):
        prints = recipes.fingerprints(shards)
        tables = {name: table_of(recipes, name, shards, prints[name]) for name in prints}
        infos = {name: _store(store, recipes, name, number, table) for name, table in tables.items()}
        for name, known in recipes.ancestry.items():
            ingested = {m: (infos[m], tables[m]) for m in known.ingested}
            settled = settled_by(name, tables[name], known, ingested, Retries())
            infos[name] = BlockInfo(**{**asdict(infos[name]), "settled": settled})
        for name, info in infos.items():
            blocks[name][number] = info
    for snapshot, names in ((1, INGESTED), (2, tuple(blocks))):
        chosen = {name: blocks[name] for name in sorted(names)}
        store.create(root_name(snapshot), json.dumps(_root(snapshot, recipes, chosen)).encode())


def in_blocks(first: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Block numbers and shard numbers of `count` shards from `first` on."""
    numbers = np.arange(first, first + count, dtype=np.int64)
    for block in range(first // BLOCK, (first + count - 1) // BLOCK + 1):
        yield block, numbers[numbers // BLOCK == block]


def _store(store: LocalStore, recipes: Recipes, name: str, block: int, table: pa.Table) -> BlockInfo:
    sums = {recipes.by_modality[name]: histogram(ROWS * table.num_rows)} if name.startswith("tok_") else {}
    data = encoded(table, sums)
    info = describe(name, block, table, data, None)
    store.create(info.name, data)
    return info


def _root(snapshot: int, recipes: Recipes, blocks: dict[str, dict[int, BlockInfo]]) -> dict[str, Any]:
    used = {r for infos in blocks.values() for i in infos.values() for r in i.recipes}
    return {
        "format": FORMAT,
        "snapshot": snapshot,
        "created": "2026-01-01T00:00:00Z",
        "corpus": {"samples": sum(i.rows for i in blocks["rgb"].values()), "sources": ["synthetic"]},
        "producers": {r: recipes.producers[r] for r in sorted(used)},
        "sample_tables": [],
        "retries": None,
        "modalities": {m: {str(b): asdict(i) for b, i in infos.items()} for m, infos in blocks.items()},
    }


def new_records(recipes: Recipes, first: int, count: int) -> list[Record]:
    """Records of `count` more shards, with full statistics, as workers would return them."""
    one = histogram(ROWS)
    found = []
    for _, shards in in_blocks(first, count):
        for name, prints in recipes.fingerprints(shards).items():
            for row in table_of(recipes, name, shards, prints).to_pylist():
                fields = {n: row[n] for n in SCHEMA.names[:10] if n != "name"}
                spent = {n: row[n] for n in ("seconds", "gpu_seconds", "attempts")}
                sums = one if name.startswith("tok_") else {}
                quarantined = json.loads(row["quarantined"])
                found.append(
                    Record(
                        **fields, spec=json.loads(row["spec"]), statistics=sums, quarantined=quarantined, spent=spent
                    )
                )
    return found


def make_files(folder: str, num_shards: int) -> None:
    """The shard objects as sparse files."""
    store, recipes = LocalStore(folder), Recipes(folder)
    for _, shards in in_blocks(FIRST, num_shards):
        for name, prints in recipes.fingerprints(shards).items():
            (store.root / name).mkdir(exist_ok=True)
            for shard, size, mark in zip(shards.tolist(), object_bytes(shards).tolist(), prints, strict=True):
                with (store.root / shard_name(name, shard, mark)).open("wb") as file:
                    file.truncate(size)
