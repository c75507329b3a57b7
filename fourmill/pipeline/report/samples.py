"""A dozen samples with all that is known of each: labels, labels decoded from tokens, truth, predictions of a 4M.

Samples are taken from up to four shards spread over the dataset; of nothing else an object is read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fourmill.evaluate.labels import crop_size
from fourmill.evaluate.page import true_objects, true_segments
from fourmill.evaluate.tokens.page import Loaded
from fourmill.evaluate.tokens.rebuild import Rebuilt
from fourmill.evaluate.tokens.sources import SOURCES as TOKEN_SOURCES
from fourmill.evaluate.truth import PARTS, Truth, TruthSource
from fourmill.pipeline import images
from fourmill.pipeline.geometry import Crop, apply_crop
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.shards import Shard, Spec, read_shard
from fourmill.pipeline.splits import is_held_out
from fourmill.pipeline.store import Store, StoreError, open_store

_FIRST = ("rgb", "depth", "normal", "semseg", "panoptic", "instance", "sam_instance", "det", "clip")
PICTURED = (*_FIRST, *(name for name, kind in TOKEN_SOURCES.items() if kind.draw and name not in _FIRST))
TEXTS = ("alt_text", "caption")
LABELS = (*PICTURED[1:], *TEXTS)
SOURCES = ("truth", "label", "decoded", "predicted")
_SHARDS = 4  # that samples are taken from
_MOST_SHARDS = 16  # that are opened, where most keys are not wanted
_PREDICTION_STEPS = 1  # passes to fill a grid; for the demo's model more were no better (docs/LOG.md)


@dataclass
class SampleViews:
    """All views of one sample at its first crop: `values[modality][source]`, sources as in `SOURCES`; `rgb` is uint8
    (S, S, 3). `producers`, `specs`: of each modality's value."""

    key: str
    shard: int
    row: int
    crop: Crop
    producers: dict[str, str] = field(default_factory=dict)
    specs: dict[str, Spec] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)

    def get(self, modality: str, source: str) -> Any:
        return self.values.get(modality, {}).get(source)

    def put(self, modality: str, source: str, value: Any) -> None:
        if value is not None:
            self.values.setdefault(modality, {})[source] = value


def collect(
    store: Store, manifest: Manifest, wanted: Callable[[str], bool], count: int
) -> tuple[list[SampleViews], list[str]]:
    """At most `count` of the wanted samples that have a picture, one of each shard by turns; and why shards that should
    have been looked into could not be."""
    found: list[list[SampleViews]] = []
    problems: list[str] = []
    for shard in _spread(manifest.shards):
        lacking = count - sum(map(len, found))
        if lacking <= 0:
            break
        try:
            found.append(_of_shard(store, manifest, shard, wanted, min(-(-count // _SHARDS), lacking)))
        except (OSError, ValueError, StoreError) as error:
            problems.append(f"shard {shard} cannot be shown: {error}")
    turns = itertools.zip_longest(*sorted(found, key=lambda samples: [s.shard for s in samples[:1]]))
    return [sample for turn in turns for sample in turn if sample is not None], problems


def _spread(shards: np.ndarray) -> list[int]:
    """Shards in an order in which the first few lie far apart: the first, the middle one, the quarters, the eighths."""
    order: dict[int, None] = {}
    parts = 1
    while len(order) < min(len(shards), _MOST_SHARDS):
        order.update(dict.fromkeys(int(shards[len(shards) * i // parts]) for i in range(parts)))
        parts *= 2
    return list(order)[:_MOST_SHARDS]


def _of_shard(
    store: Store, manifest: Manifest, shard: int, wanted: Callable[[str], bool], count: int
) -> list[SampleViews]:
    records = {m: r for m in manifest.modalities if (r := manifest.record(m, shard)) is not None}
    if not {"rgb", "crop_settings"} <= set(records):
        return []
    opened = {m: read_shard(store, r.name) for m, r in records.items() if _is_shown(m)}
    found: list[SampleViews] = []
    for row, key in enumerate(opened["rgb"].keys):
        if len(found) < count and wanted(key):
            sample = _views(key, shard, row, opened)
            if sample is not None:
                sample.producers = {m: r.producer for m, r in records.items()}
                found.append(sample)
    return found


def _is_shown(name: str) -> bool:
    return name in ("rgb", "source", "crop_settings", *LABELS) or name.startswith("tok_")


def _views(key: str, shard: int, row: int, shards: Mapping[str, Shard]) -> SampleViews | None:
    data, found = shards["rgb"].value(row), shards["crop_settings"].value(row)
    if data is None or found is None:
        return None
    sample = SampleViews(key, shard, row, Crop(*map(int, found)), specs={m: s.spec for m, s in shards.items()})
    size = crop_size(shards["crop_settings"])
    sample.put("rgb", "label", apply_crop(images.decode(data), sample.crop, size))
    if "source" in shards:
        sample.put("source", "label", shards["source"].value(row))
    for name, opened in shards.items():
        if name in LABELS:
            sample.put(name, "label", opened.value(row))
        if opened.entry.is_tokens:
            sample.put(name, "tokens", opened.value(row))
    return sample


def held_out(checkpoint: str | None) -> Callable[[str], bool]:
    """Which keys training never saw; all, if nothing was trained."""
    if checkpoint is None:
        return lambda key: True
    fraction = json.loads(open_store(checkpoint).get("pretrain.json"))["config"]["held_out"]
    return lambda key: is_held_out(key, fraction)


def add_truth(samples: Sequence[SampleViews], source: TruthSource) -> None:
    """What the source knows of each sample; truth that is unusable is told by the evaluation."""
    for sample in samples:
        described = sample.get("source", "label")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            truth = source.find(sample.key, described, frozenset(PARTS)) if described else None
            if truth is not None:
                size = sample.get("rgb", "label").shape[0]
                _put_truth(sample, truth.moved(sample.crop, described["height"], described["width"], size))


def _put_truth(sample: SampleViews, truth: Truth) -> None:
    for name in ("depth", "normal", "semseg"):
        sample.put(name, "truth", getattr(truth, name))
    if truth.panoptic is not None:
        sample.put("panoptic", "truth", true_segments(truth))
    if truth.objects is not None:
        objects = true_objects(truth)
        sample.put("det", "truth", objects)
        if all("mask" in o for o in objects):
            sample.put("instance", "truth", objects)
            sample.put("sam_instance", "truth", [{**o, "class_name": ""} for o in objects])
    if truth.captions:
        sample.put("caption", "truth", truth.captions[0])


def add_decoded(samples: Sequence[SampleViews], loaded: Loaded) -> None:
    """Tokens decoded by whoever made them; what cannot be decoded is told in the section on tokens."""
    for (name, producer), rebuilt in loaded.items():
        having = [s for s in samples if s.get(name, "tokens") is not None and s.producers[name] == producer]
        if having and isinstance(rebuilt, Rebuilt):
            found = rebuilt.restore_each([s.get(name, "tokens") for s in having])
            for sample, value in zip(having, found, strict=True):
                if not isinstance(value, Exception):
                    sample.put(rebuilt.tokenizer.source, "decoded", value[0])


def add_predictions(samples: Sequence[SampleViews], checkpoint: str, loaded: Loaded) -> None:
    """What a trained 4M says of each picture."""
    from fourmill.model.predict import load_model, predict

    if not samples:
        return
    model = load_model(checkpoint)
    pixels = np.stack([s.get("rgb", "label") for s in samples]).transpose(0, 3, 1, 2)
    decoders = {name: rebuilt for (name, _), rebuilt in loaded.items() if isinstance(rebuilt, Rebuilt)}
    targets = [name for name in model.architecture.domains_out if name in decoders]
    for name, tokens in predict(model, {"rgb": pixels}, targets, steps=_PREDICTION_STEPS).items():
        found = decoders[name].restore_each([np.asarray(row) for row in tokens])
        for sample, value in zip(samples, found, strict=True):
            if not isinstance(value, Exception):
                sample.put(decoders[name].tokenizer.source, "predicted", value[0])
