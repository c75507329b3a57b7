"""Manifests for the report's tests: every record and every lineage is written down, no object exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.pipeline.manifest import Manifest, Update, update_manifest
from fourmill.pipeline.shards import Record, digest
from fourmill.pipeline.statistics import pack_counts
from fourmill.pipeline.store import open_store

ROWS = 10
INGEST, CROPS, DEPTH, OLD_DEPTH, TOKENS = ("1" * 16, "2" * 16, "3" * 16, "4" * 16, "5" * 16)
NC = {"reference": "lab/depth-nc", "digest": "d" * 64, "licence": "cc-by-nc-4.0"}


def lineages() -> dict[str, dict[str, Any]]:
    """A labeler whose weights may not be sold, an older version of it, and a tokenizer of the newer one's labels."""
    depth = {
        "class": "DepthLabeler",
        "licence": "Apache-2.0",
        "checkpoint": NC,
        "inputs": {"rgb": "corpus", "crop_settings": CROPS},
    }
    return {
        INGEST: {"class": "ingest", "version": 1},
        CROPS: {"class": "CropSettings", "version": 1, "inputs": {"rgb": "corpus", "source": "corpus"}},
        DEPTH: {**depth, "version": 2},
        OLD_DEPTH: {**depth, "version": 1},
        TOKENS: {
            "class": "SpatialTokenizer",
            "version": 2,
            "checkpoint": {"reference": "/models/tok_depth", "digest": "e" * 64, "licence": "mit"},
            "inputs": {"depth": DEPTH},
        },
    }


def record(modality: str, shard: int, producer: str = INGEST, **fields: Any) -> Record:
    """Ten rows, all there unless `quarantined` says how many are not, by reason."""
    quarantined = fields.pop("quarantined", {})
    given: dict[str, Any] = {
        "rows": ROWS,
        "present": ROWS - sum(quarantined.values()),
        "num_bytes": 1000,
        "digest": digest(modality, str(shard)),
        "keys_digest": digest("keys", str(shard)),
        "spec": {},
        "quarantined": quarantined,
    }
    return Record(modality, shard, digest(modality, str(shard), producer)[:16], producer, **{**given, **fields})


def codes(counts: Sequence[int], vocabulary: int, **more: Any) -> dict[str, Any]:
    """Statistics of tokens."""
    histogram = pack_counts(np.array(counts, np.int64))
    return {"vocabulary": vocabulary, "values": 1, "tokens": sum(counts), "histogram": histogram, **more}


def ingested(shards: Sequence[int], **fields: Any) -> list[Record]:
    """Pictures and crops."""
    made = [record(name, s, **fields) for name in ("rgb", "source") for s in shards]
    return made + [record("crop_settings", s, CROPS) for s in shards]


def publish(
    folder: Path | str, records: Sequence[Record], corpus: Mapping[str, Any] | None = None, **producers: Any
) -> Manifest:
    """The next snapshot with these records."""
    known = {**lineages(), **{key.removeprefix("r"): value for key, value in producers.items()}}
    return update_manifest(open_store(folder), lambda _: Update(records, known, corpus))
