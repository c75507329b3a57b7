"""Everything a dataset knows of one sample: what each modality holds of it or why it holds nothing, what made that,
under which licences, and where the sample came from. As files to look at: sample_files.py."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourmill.checkpoints import is_non_commercial
from fourmill.modalities import Kind, unknown
from fourmill.pipeline.fingerprints import referenced
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.manifest.lookup import Place, number_of_row
from fourmill.pipeline.manifest.samples import smallest
from fourmill.pipeline.shards import Record, Shard, read_shard

NOT_COMMERCIAL = "NOT FOR COMMERCIAL USE"
_TOKENS = 12  # shown of a row in words; all of them are in the JSON
_WORDS = 200  # characters of a text shown in words


@dataclass(frozen=True)
class Held:
    """One modality of the sample. `value`: in words, of crop 0 where there are several; `reason`: why it is null.

    `tokens`: their ids, one list a crop. `made_by`: class, version, checkpoint; `licences`: of code, weights, and of
    all that it was made from.
    """

    modality: str
    present: bool
    value: str
    reason: str | None
    crops: int
    object: str
    producer: str
    made_by: str
    licences: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class SampleReport:
    """Everything about one sample. `row_number`: in the dataset, from 0. `lacking`: modalities that have other shards
    but not this one. `licences`, `lineage` (producers by recipe): of all that it has and of what that was made from."""

    dataset: str
    snapshot: int
    key: str
    shard: int
    row: int
    row_number: int
    source: dict[str, Any]
    corpus: dict[str, Any]
    held: tuple[Held, ...]
    lacking: tuple[str, ...]
    licences: tuple[str, ...]
    lineage: dict[str, dict[str, Any]]


def describe_sample(manifest: Manifest, place: Place, names: Sequence[str] | None = None) -> SampleReport:
    """The sample at one place, in all modalities or only in `names`. ValueError if there is no such row or name."""
    number = number_of_row(manifest, place)
    for name in names or ():
        if name not in manifest.modalities:
            raise ValueError(unknown("modality of this dataset", name, manifest.modalities))
    keys = read_shard(manifest.store, smallest(manifest, place.shard).name).keys
    if place.row >= len(keys):
        raise ValueError(f"row {place.row}: the objects of shard {place.shard} hold {len(keys)} rows; verify says more")
    key, held, lacking = keys[place.row], [], []
    for name in names or manifest.modalities:
        record = manifest.record(name, place.shard)
        if record is None:
            lacking.append(name)
        else:
            held.append(_held(manifest, record, place.row, key))
    recipes = [h.producer for h in held]
    source = manifest.record("source", place.shard)
    return SampleReport(
        dataset=manifest.store.uri,
        snapshot=manifest.snapshot,
        key=key,
        shard=place.shard,
        row=place.row,
        row_number=number,
        source=_source(manifest, source, place.row),
        corpus={name: manifest.corpus.get(name) for name in ("sources", "format", "digest") if name in manifest.corpus},
        held=tuple(held),
        lacking=tuple(lacking),
        licences=tuple(licences(manifest, recipes)),
        lineage=referenced(recipes, manifest.producers),
    )


def _source(manifest: Manifest, record: Record | None, row: int) -> dict[str, Any]:
    value = read_shard(manifest.store, record.name).value(row) if record is not None else None
    return dict(value) if isinstance(value, Mapping) else {}


def _held(manifest: Manifest, record: Record, row: int, key: str) -> Held:
    shard = read_shard(manifest.store, record.name)
    if row >= len(shard.keys) or shard.keys[row] != key:
        raise ValueError(f"{record.name}: row {row} is not {key!r}, as it is in others: `fourmill manifest verify` it")
    crops = shard.spec.crops if shard.entry.per_crop else 1
    values = [shard.value(row, crop) for crop in range(crops)]
    present = all(value is not None for value in values)
    producer = manifest.producers.get(record.producer, {})
    return Held(
        modality=record.modality,
        present=present,
        value="" if values[0] is None else in_words(shard, values[0]),
        reason=None if present else shard.quarantine.get(key, "there is none, and nothing went wrong"),
        crops=crops,
        object=record.name,
        producer=record.producer,
        made_by=made_by(producer),
        licences=tuple(licences(manifest, [record.producer])),
        tokens=tuple(tuple(v.tolist()) for v in values if v is not None) if shard.entry.is_tokens else (),
    )


def made_by(producer: Mapping[str, Any]) -> str:
    """'DepthLabeler version 2, /models/dpt (mit, digest 3f9a41c07d55)'."""
    checkpoint = producer.get("checkpoint")
    weights = ""
    if isinstance(checkpoint, Mapping):
        licence = checkpoint.get("licence") or "licence not stated"
        weights = f", {checkpoint.get('reference')} ({licence}, digest {str(checkpoint.get('digest'))[:12]})"
    return f"{producer.get('class', '?')} version {producer.get('version', '?')}{weights}"


def licences(manifest: Manifest, recipes: Sequence[str]) -> Iterator[str]:
    """Of what made something and of everything that was made from: 'code Apache-2.0 (DepthLabeler)', 'weights mit
    (/models/dpt)'. Weights that may not be used commercially are said to be so."""
    code: dict[str, list[str]] = {}
    weights: dict[str, list[str]] = {}
    for producer in referenced(recipes, manifest.producers).values():
        if licence := producer.get("licence"):
            code.setdefault(str(licence), []).append(str(producer.get("class", "?")))
        for checkpoint in _checkpoints(producer.get("checkpoint")):
            weights.setdefault(str(checkpoint.get("licence") or "not stated"), []).append(str(checkpoint["reference"]))
    for licence, makers in sorted(code.items()):
        yield f"code {licence} ({', '.join(sorted(set(makers)))})"
    for licence, places in sorted(weights.items()):
        bound = f", {NOT_COMMERCIAL}" if is_non_commercial(licence) else ""
        yield f"weights {licence}{bound} ({', '.join(sorted(set(places)))})"


def _checkpoints(entry: Any) -> Iterator[Mapping[str, Any]]:
    """A checkpoint and those that its entry names besides."""
    if isinstance(entry, Mapping) and "reference" in entry:
        yield entry
        for part in entry.values():
            yield from _checkpoints(part)


def in_words(shard: Shard, value: Any) -> str:
    """A value in a line or two."""
    return _WORDING.get(shard.entry.kind, _of_json)(shard, value)


def _of_tokens(shard: Shard, value: np.ndarray) -> str:
    first = " ".join(map(str, value[:_TOKENS].tolist()))
    more = " …" if len(value) > _TOKENS else ""
    return f"{len(value)} tokens, {len(np.unique(value))} distinct of {shard.spec.vocabulary or '?'}: {first}{more}"


def _of_map(shard: Shard, value: np.ndarray) -> str:
    shape = " x ".join(map(str, value.shape))
    unit = f" {shard.spec.convention}," if shard.spec.convention else ""
    return f"{shape},{unit} {value.min():.4g} to {value.max():.4g}, mean {value.mean():.4g}"


def _of_classes(shard: Shard, value: np.ndarray) -> str:
    counts = Counter({int(i): int(n) for i, n in zip(*np.unique(value, return_counts=True), strict=True)})
    parts = [f"{_class_name(shard, i)} {n / value.size:.0%}" for i, n in counts.most_common(6)]
    return f"{value.shape[0]} x {value.shape[1]}, {', '.join(parts)}{', …' if len(counts) > len(parts) else ''}"


def _class_name(shard: Shard, number: int) -> str:
    names = shard.spec.classes or ()
    return "void" if number == 255 else names[number] if number < len(names) else str(number)


def _of_crop(shard: Shard, value: np.ndarray) -> str:
    top, left, height, width, flip = value.tolist()
    return f"{height} x {width} from row {top}, column {left}{', mirrored' if flip else ''}"


def _of_image(shard: Shard, value: bytes) -> str:
    return f"{len(value):,} bytes"


def _of_text(shard: Shard, value: str) -> str:
    return _short(repr(value))


def _of_json(shard: Shard, value: Any) -> str:
    if isinstance(value, list):
        names = [str(v["class_name"]) for v in value if isinstance(v, Mapping) and "class_name" in v]
        counted = ", ".join(f"{n} {name}" if n > 1 else name for name, n in Counter(names).items())
        return _short(f"{len(value)} {'entry' if len(value) == 1 else 'entries'}{': ' if counted else ''}{counted}")
    return _short(json.dumps(value, ensure_ascii=False, sort_keys=True))


def _short(text: str) -> str:
    return text if len(text) <= _WORDS else text[: _WORDS - 1] + "…"


_WORDING: Mapping[Kind, Callable[[Shard, Any], str]] = {
    Kind.GRID: _of_tokens,
    Kind.SEQUENCE: _of_tokens,
    Kind.MAP: _of_map,
    Kind.FEATURES: _of_map,
    Kind.EDGES: _of_map,
    Kind.CLASSES: _of_classes,
    Kind.CROP: _of_crop,
    Kind.IMAGE: _of_image,
    Kind.TEXT: _of_text,
}
