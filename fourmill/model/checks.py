"""Whether a dataset is fit to train on, from its records alone: before a single shard is read.

Refused: modalities that are absent or not tokens, two generations of one modality, shards whose keys differ between
modalities, vocabularies or grids that differ between shards, ids beyond the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fourmill.modalities import modality, unknown
from fourmill.model.config import PIXELS
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.shards import Record

CROPS = "crop_settings"  # where each crop of raw pixels is recorded


def check(manifest: Manifest, names: Sequence[str], uri: str, mixed_generations: bool = False) -> None:
    """ValueError unless every modality is there, of one generation or mixed by choice, and all agree by row."""
    known = [m for m in manifest.modalities if modality(m).is_tokens or m == PIXELS]
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
        _check_specs(manifest.records(name), uri)
    _check_keys((r for name in names for r in manifest.records(name)), uri)


def _check_specs(records: Iterable[Record], uri: str) -> None:
    first: Record | None = None
    for record in records:
        first = first or record
        if record.spec != first.spec:
            raise ValueError(
                f"{uri}: {record.modality} differs between shards: {first.spec} in shard {first.shard},"
                f" {record.spec} in shard {record.shard}"
            )
        largest, vocabulary = record.statistics.get("max", -1), record.spec.get("vocabulary")
        if vocabulary is not None and largest >= vocabulary:
            raise ValueError(f"{uri}: {record.name} holds id {largest}; its vocabulary has {vocabulary}")


def _check_keys(records: Iterable[Record], uri: str) -> None:
    first: dict[int, Record] = {}
    for record in records:
        other = first.setdefault(record.shard, record)
        if (record.rows, record.keys_digest) != (other.rows, other.keys_digest):
            raise ValueError(
                f"{uri}: shard {record.shard} has other keys in {record.modality} than in {other.modality}"
                f" ({record.rows} and {other.rows} rows); one of them belongs to another corpus"
            )
