"""Samples of a dataset for the evaluation: what the model is given, what was labelled, and what is true, of crop 0.

A chunk of samples is in memory at a time. Row i is the same sample in every modality, or ValueError.

Legend: S side of the labels' crops, s side of the model's pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fourmill.evaluate.labels import count_reason
from fourmill.evaluate.results import Place
from fourmill.evaluate.tokens.rows import Rows, keys_of
from fourmill.evaluate.truth import Truth, TruthSource
from fourmill.modalities import modality
from fourmill.model.config import PIXELS
from fourmill.pipeline import images
from fourmill.pipeline.geometry import apply_crop
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.shards import Spec
from fourmill.pipeline.store import Store

CHUNK = 64  # samples in memory and in one batch of the model
Chosen = Mapping[int, Sequence[int]]
"""Rows by shard."""


@dataclass
class Sample:
    """One sample. `inputs`: by modality of the model, uint8 (3, s, s) of `rgb`, else ids (n,). `labels`: by modality,
    `tokens`: by token modality, without those that are missing. `truth`: as the crop shows it."""

    place: Place
    image: np.ndarray
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    truth: Truth = field(default_factory=Truth)


class Reader:
    """Reads samples. `without`: samples that cannot be used, by reason; `bad_truth`: unusable truth, by reason."""

    def __init__(self, store: Store, manifest: Manifest, image_size: int) -> None:
        self.store, self.manifest, self.image_size = store, manifest, image_size
        self.without: Counter[str] = Counter()
        self.bad_truth: Counter[str] = Counter()

    def keys(self, chosen: Chosen) -> list[str]:
        """The keys of rows."""
        return [keys_of(self.store, self.manifest, number)[row] for number, rows in chosen.items() for row in rows]

    def spec(self, name: str, chosen: Chosen) -> Spec:
        """How the labels of a modality are to be read; ValueError where the shards differ in it."""
        found = {
            str(record.spec): record for number in chosen if (record := self.manifest.record(name, number)) is not None
        }
        specs = [Spec.from_json(record.spec) for record in found.values()]
        if len({(spec.convention, spec.classes) for spec in specs}) > 1:
            raise ValueError(f"{name}: the labels of this dataset are of several conventions or lists of classes")
        return specs[0]

    def size(self, chosen: Chosen) -> int:
        """The side S of the crops."""
        return Rows(self.store, self.manifest, next(iter(chosen))).size

    def chunks(
        self, chosen: Chosen, inputs: Sequence[str], names: Sequence[str], source: TruthSource, parts: frozenset[str]
    ) -> Iterator[list[Sample]]:
        """Samples in order, at most `CHUNK` at a time. `names`: labels and tokens to read."""
        chunk: list[Sample] = []
        for number, rows in chosen.items():
            opened = Rows(self.store, self.manifest, number)
            keys = keys_of(self.store, self.manifest, number)
            for row in rows:
                sample = self._sample(Place(keys[row], number, row, 0, 0.0), opened, inputs, names)
                if sample is not None:
                    self._add_truth(sample, opened, source, parts)
                    chunk.append(sample)
                if len(chunk) == CHUNK:
                    yield chunk
                    chunk = []
        if chunk:
            yield chunk

    def _sample(self, place: Place, opened: Rows, inputs: Sequence[str], names: Sequence[str]) -> Sample | None:
        image = opened.picture(place.row)
        if image is None:
            self.without["no picture or no crop"] += 1
            return None
        sample = Sample(place, image)
        for name in inputs:
            value = self._pixels(sample, opened) if name == PIXELS else opened.value(name, place.row)
            if value is None:
                self.without[f"no {name}, which the model is given"] += 1
                return None
            sample.inputs[name] = np.asarray(value)
        for name in names:
            value = opened.value(name, place.row)
            if value is not None:
                (sample.tokens if modality(name).is_tokens else sample.labels)[name] = value
        return sample

    def _pixels(self, sample: Sample, opened: Rows) -> np.ndarray:
        """uint8 (3, s, s), as the trainer's loader makes them."""
        square = sample.image
        if len(square) != self.image_size:
            row = sample.place.row
            square = apply_crop(images.decode(opened.value("rgb", row)), opened.crops(row)[0], self.image_size)
        return np.ascontiguousarray(square.transpose(2, 0, 1))

    def _add_truth(self, sample: Sample, opened: Rows, source: TruthSource, parts: frozenset[str]) -> None:
        row = sample.place.row
        described = opened.described(row)
        try:
            found = source.find(sample.place.key, described, parts) if parts else None
        except ValueError as error:
            count_reason(self.bad_truth, error)
            return
        if found is not None:
            sample.truth = found.moved(opened.crops(row)[0], described["height"], described["width"], opened.size)


def label_values(
    store: Store, manifest: Manifest, chosen: Chosen, name: str, most_bytes: int | None = None
) -> Iterator[Any]:
    """The stored values of one modality, crop 0, those that are there; arrays only up to so many bytes together, floats
    as float16, which is how they are stored."""
    used = 0
    for number, rows in chosen.items():
        opened = Rows(store, manifest, number)
        for row in rows:
            value = opened.value(name, row)
            if value is None:
                continue
            if isinstance(value, np.ndarray):
                value = value.astype(np.float16) if value.dtype.kind == "f" else value
                used += value.nbytes
            if most_bytes is not None and used > most_bytes:
                return
            yield value
