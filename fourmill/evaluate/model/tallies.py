"""One modality's predictors against the same truth on the same samples.

Invariant: a sample is in all columns or in none. Where the model's own value cannot be used, the constant's takes its
place and is told, so that a model gains nothing by saying nonsense.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fourmill.evaluate.labels import MEASURES, count_reason
from fourmill.evaluate.measure import Figures, Measure
from fourmill.evaluate.model.constants import Constant
from fourmill.evaluate.model.features import GALLERY, FeatureTally, own_caption, own_picture, text_vectors
from fourmill.evaluate.model.predictors import Output
from fourmill.evaluate.model.results import Interval, ModalityScore, Row, sign_of
from fourmill.evaluate.model.samples import Sample
from fourmill.evaluate.model.spread import Draws, spread_of
from fourmill.evaluate.results import Place
from fourmill.evaluate.tokens.dense import fitted_to
from fourmill.evaluate.tokens.measure import Setting
from fourmill.evaluate.tokens.rebuild import BAD_VALUE
from fourmill.evaluate.truth import Truth, TruthSource
from fourmill.evaluate.words import TextEncoder
from fourmill.pipeline.shards import Spec

_NO_FIGURES = ("coverage",)  # of the teacher's labels, not of how good they are
_SHOWN_PLACES = 3
_NOTHING: Mapping[str, Any] = {"caption": "", "det": [], "instance": [], "sam_instance": []}  # where no constant is
_FREE_DEPTH = "decoded depth is known up to scale and shift only: both are fitted to the truth, for every predictor"


class Comparison(ABC):
    """What all predictors of one modality have come to so far. `values`: 'model', 'round_trip', 'teacher', and each
    constant by its name."""

    protocol = ""

    def __init__(self, output: Output, constant: Constant | None) -> None:
        self.output, self.constant = output, constant
        self.compared = self.no_label = self.no_truth = 0
        self.unusable: Counter[str] = Counter()
        self.places: list[Place] = []

    @property
    def columns(self) -> list[str]:
        return ["teacher", "round_trip", "model", *(self.constant.values if self.constant else ())]

    def add(self, sample: Sample, said: Any, round_trip: Any) -> None:
        """Take in one sample."""
        teacher = sample.labels.get(self.output.source)
        if teacher is None:
            self.no_label += 1
            return
        try:
            if self._accept("teacher", teacher, teacher, sample.truth) is None:
                self.no_truth += 1
                return
        except BAD_VALUE as error:
            count_reason(self.unusable, ValueError(f"label: {error}"))
            return
        self._accepted("round_trip", round_trip, teacher, sample.truth)
        badness = self._accepted("model", said, teacher, sample.truth)
        for name, value in (self.constant.values if self.constant else {}).items():
            self._accept(name, value, teacher, sample.truth)
        self.compared += 1
        self.places.append(replace(sample.place, badness=badness))

    def _accepted(self, column: str, value: Any, teacher: Any, truth: Truth) -> float:
        """How wrong the value is; if it cannot be used, the constant takes its place, or saying nothing."""
        try:
            if value is None:
                raise ValueError("tokens cannot be decoded")
            badness = self._accept(column, value, teacher, truth)
        except BAD_VALUE as error:
            instead = (
                self.constant.values[self.constant.name("")] if self.constant else _NOTHING.get(self.output.source)
            )
            if instead is None:
                raise ValueError(f"{self.output.source}: {error}, and no constant could take its place") from error
            count_reason(self.unusable, ValueError(f"{column}: {error}"))
            badness = self._accept(column, instead, teacher, truth)
        assert badness is not None  # the truth says something of it: the teacher was compared
        return badness

    @abstractmethod
    def _accept(self, column: str, value: Any, teacher: Any, truth: Truth) -> float | None:
        """Take a value into the column's sums; how wrong it is, None where the truth says nothing of it."""

    @abstractmethod
    def figures(self, column: str) -> Figures:
        """The figures of one column over all samples."""

    @abstractmethod
    def draws(self, column: str, weights_RN: np.ndarray) -> Draws:
        """Its figures when samples are drawn again."""

    def notes(self) -> list[str]:
        """What a reader must know."""
        return []

    def score(self, weights_of: Mapping[int, np.ndarray]) -> ModalityScore:
        """All that was found; `weights_of`: draws of samples by how many there are."""
        rows = self._rows(weights_of[self.compared]) if self.compared else ()
        return ModalityScore(
            self.output.source,
            self.output.name,
            self.protocol,
            rows,
            self.compared,
            self.no_label,
            self.no_truth,
            dict(self.unusable),
            self.constant.samples if self.constant else 0,
            (*self.notes(), *self.output.rebuilt.notes),
            chosen_places(self.places),
        )

    def _rows(self, weights_RN: np.ndarray) -> tuple[Row, ...]:
        figures = {column: self.figures(column) for column in self.columns}
        drawn = {column: self.draws(column, weights_RN) for column in self.columns if column not in _CEILINGS}
        rows = []
        for name in figures["model"]:
            if name in _NO_FIGURES:
                continue
            constant = self.constant.name(name) if self.constant else ""
            mine, other = drawn["model"].get(name), drawn.get(constant, {}).get(name)
            gain = sign_of(name) * (mine - other) if mine is not None and other is not None else None
            rows.append(
                Row(
                    name,
                    figures[constant].get(name, math.nan) if self.constant else math.nan,
                    constant,
                    figures["model"][name],
                    figures["round_trip"].get(name, math.nan),
                    figures["teacher"].get(name, math.nan),
                    interval(mine),
                    interval(gain),
                )
            )
        return tuple(rows)


_CEILINGS = ("teacher", "round_trip")


def interval(drawn_R: np.ndarray | None) -> Interval | None:
    """The ends between which 95 % of the draws lie."""
    if drawn_R is None or not np.isfinite(drawn_R).any():
        return None
    low, high = np.nanpercentile(drawn_R, [2.5, 97.5])
    return float(low), float(high)


def chosen_places(places: Sequence[Place]) -> dict[str, tuple[Place, ...]]:
    """The worst, the middle and the best samples, a few of each, no sample twice."""
    ordered = sorted(places, key=lambda place: (-place.badness, place.shard, place.row))
    few = min(_SHOWN_PLACES, len(ordered) // 3) or min(1, len(ordered))
    middle = max((len(ordered) - few) // 2, few)
    parts = {"worst": ordered[:few], "median": ordered[middle : middle + few], "best": ordered[middle + few :][-few:]}
    return {name: tuple(part) for name, part in parts.items() if part}


class TruthComparison(Comparison):
    """Against truth, by the measures of `fourmill evaluate labels`."""

    def __init__(self, output: Output, constant: Constant | None, spec: Spec, source: TruthSource, size: int) -> None:
        super().__init__(output, constant)
        kind = MEASURES[output.source]
        self.measures: dict[str, Measure] = {column: kind(spec, source, size) for column in self.columns}
        self.spreads = {column: spread_of(self.measures[column]) for column in self.columns}
        self.free_depth = spec.convention in ("metric", "relative") and _is_standardised(output)
        self.protocol = self.measures["teacher"].protocol

    def _accept(self, column: str, value: Any, teacher: Any, truth: Truth) -> float | None:
        if self.output.source == "depth":
            value = np.where(teacher != 0, value, 0)  # the same pixels for all: those that the teacher labelled
            value = _fitted(value, truth) if self.free_depth else value
        badness = self.measures[column].add(value, truth)
        spread = self.spreads[column]
        if badness is not None and spread is not None:
            spread.add(value, truth)
        return badness

    def figures(self, column: str) -> Figures:
        spread, found = self.spreads[column], self.measures[column].figures()
        once = spread.figures(np.ones((1, self.compared), np.float32)) if spread else {}
        return {**found, **{name: float(value[0]) for name, value in once.items() if name not in found}}

    def draws(self, column: str, weights_RN: np.ndarray) -> Draws:
        spread = self.spreads[column]
        return spread.figures(weights_RN) if spread else {}

    def notes(self) -> list[str]:
        found = [f"constants: {_made_for(self.constant)}"] if self.constant else ["no constant was fitted"]
        measure = self.measures["teacher"]
        strangers, unknown = measure.unmatched()
        found += [f"classes that the truth does not know: {', '.join(strangers[:6])}"] * bool(strangers)
        found += [f"classes of the truth that labels do not know, left out: {', '.join(unknown[:6])}"] * bool(unknown)
        found += [_FREE_DEPTH] * self.free_depth
        if self.output.source == "det":
            found.append(
                "scores: the teacher's own; 4M's by the probabilities of a box's tokens; the round trip's are equal: "
                "tokens carry none; that makes its AP low; F1: boxes with a score of 0.5 or more, without a ranking"
            )
        return [*found, *measure.notes()]


def _made_for(constant: Constant) -> str:
    named = [f"{figure or 'the other figures'}: {name}" for figure, name in constant.made_for.items()]
    return f"{', '.join(sorted(named))}; fitted on labels of {constant.samples} training samples"


def _is_standardised(output: Output) -> bool:
    """Whether decoded depth has lost its scale and shift."""
    settings = getattr(output.rebuilt.tokenizer, "settings", None)
    return getattr(getattr(settings, "normalisation", None), "kind", "") == "standardise"


def _fitted(depth: np.ndarray, truth: Truth) -> np.ndarray:
    """Depth (S, S) with the scale and shift that fit the truth best; where it is 0 it stays 0."""
    if truth.depth is None:
        return depth
    both = (truth.depth > 0) & (depth != 0)
    fitted = np.zeros(depth.shape, np.float32)
    if both.any():
        fitted[both] = np.maximum(fitted_to(depth[both].astype(np.float64), truth.depth[both].astype(np.float64)), 1e-3)
    return fitted


class FeatureComparison(Comparison):
    """Feature maps against the teacher's, and retrieval; see `features`."""

    protocol = FeatureTally.protocol

    def __init__(self, output: Output, constant: Constant | None, spec: Spec, encode: TextEncoder | str) -> None:
        super().__init__(output, constant)
        setting = Setting(spec, output.rebuilt.tokenizer)
        self.tallies = {column: FeatureTally(setting) for column in self.columns}
        self.captions: list[str] = []
        self._encode, self._hits = encode, dict[str, dict[str, np.ndarray]]()
        self._texts_NE: np.ndarray | None = None

    def add(self, sample: Sample, said: Any, round_trip: Any) -> None:
        before = self.compared
        super().add(sample, said, round_trip)
        if self.compared > before:
            self.captions.append(sample.truth.captions[0] if sample.truth.captions else "")

    def _accept(self, column: str, value: Any, teacher: Any, truth: Truth) -> float | None:
        return self.tallies[column].add(value, teacher)

    def figures(self, column: str) -> Figures:
        drawn = self.draws(column, np.ones((1, self.compared), np.float32))
        return {name: float(value[0]) for name, value in drawn.items()}

    def draws(self, column: str, weights_RN: np.ndarray) -> Draws:
        return self.tallies[column].figures(weights_RN, self._retrieved(column))

    def _retrieved(self, column: str) -> dict[str, np.ndarray]:
        if column not in self._hits:
            vectors = self.tallies[column].vectors
            self._hits[column] = own_picture(vectors, self.tallies["teacher"].vectors)
            if (texts_NE := self._texts()) is not None and texts_NE.shape[1] == len(vectors[0]):
                self._hits[column] |= own_caption(vectors, texts_NE)
        return self._hits[column]

    def _texts(self) -> np.ndarray | None:
        """Captions as vectors, made once; None without a text tower or without all captions."""
        if self._texts_NE is None and not isinstance(self._encode, str) and all(self.captions):
            self._texts_NE = text_vectors(self._encode, self.captions[:GALLERY])
        return self._texts_NE

    def notes(self) -> list[str]:
        found = ["the constant is the mean of unit features per cell"] if self.constant else ["no constant was fitted"]
        if isinstance(self._encode, str):
            found.append(f"image to text not measured: {self._encode}")
        elif not all(self.captions):
            found.append("image to text not measured: not every sample has a caption")
        return found
