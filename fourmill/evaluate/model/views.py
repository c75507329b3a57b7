"""Samples pictured: the photo, and truth, teacher and 4M of one modality side by side, in the same colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourmill.evaluate.dense import SemsegMeasure
from fourmill.evaluate.model.predictors import Output
from fourmill.evaluate.model.run import Evaluated
from fourmill.evaluate.model.samples import Sample
from fourmill.evaluate.page import true_objects
from fourmill.evaluate.results import Place
from fourmill.evaluate.tokens.sources import Backdrop, painted, reference_of
from fourmill.evaluate.truth import PARTS, Truth
from fourmill.modalities import Kind, modality

HEADINGS = {"truth": "truth", "teacher": "teacher", "model": "4M"}


@dataclass(frozen=True)
class View:
    """One modality of one sample: values by 'truth', 'teacher' and 'model', those that are there."""

    sample: Sample
    output: Output
    values: dict[str, Any]

    def texts(self) -> list[tuple[str, str]]:
        """(heading, text) of values that are texts."""
        return [(HEADINGS[who], value) for who, value in self.values.items() if isinstance(value, str)]

    def pictures(self, painter: Any = None) -> dict[str, np.ndarray]:
        """Pictures (H, W, 3) by whose they are; `painter`: the axes of features, the same for all samples."""
        reference = painter if painter is not None else reference_of(self.output.source, list(self.values.values()))
        on = Backdrop(self.sample.image, reference)
        drawn = {who: painted(self.output.source, value, on) for who, value in self.values.items()}
        return {who: picture for who, picture in drawn.items() if picture is not None}


def views_of(found: Evaluated, places: Sequence[Place], outputs: Sequence[Output]) -> list[list[View]]:
    """For each place a view of each output; the samples are read again, the predictions are those measured."""
    rows: dict[int, list[int]] = {}
    for place in places:
        rows.setdefault(place.shard, []).append(place.row)
    names = [output.source for output in outputs]
    read = {}
    for chunk in found.reader.chunks(rows, (), names, found.source, frozenset(PARTS)):
        read.update({(sample.place.shard, sample.place.row): sample for sample in chunk})
    return [[_view(found, read[place.shard, place.row], output) for output in outputs] for place in places]


def _view(found: Evaluated, sample: Sample, output: Output) -> View:
    ids = found.ids[sample.place.shard, sample.place.row][output.name]
    ((said, _),) = output.rebuilt.restore([ids])
    values = {"truth": _true(sample.truth, output.source), "teacher": sample.labels.get(output.source), "model": said}
    if output.source == "semseg":
        spec = found.reader.spec("semseg", found.chosen)
        measure = SemsegMeasure(spec, found.source, len(sample.image))
        values |= {who: measure.translated(values[who]) for who in ("teacher", "model") if values[who] is not None}
    return View(sample, output, {who: value for who, value in values.items() if value is not None})


def _true(truth: Truth, source: str) -> Any:
    if source in ("depth", "normal", "semseg"):
        return getattr(truth, source)
    if source == "det" and truth.objects is not None:
        return true_objects(truth)
    return truth.captions[0] if source == "caption" and truth.captions else None


def painters(views: Sequence[Sequence[View]]) -> dict[str, Any]:
    """The axes that colour feature maps, by modality: those of the teacher's maps of all the samples."""
    maps: dict[str, list[np.ndarray]] = {}
    for row in views:
        for view in row:
            name = view.output.source
            teacher = view.values.get("teacher")
            if modality(name).kind is Kind.FEATURES and teacher is not None and teacher.ndim == 3:
                maps.setdefault(name, []).append(teacher)
    return {name: reference_of(name, values) for name, values in maps.items()}
