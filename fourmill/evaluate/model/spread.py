"""Each field's figures as functions of per-sample sums, so that samples can be drawn again: the bootstrap.

The figures over all samples are taken by the measures of `fourmill.evaluate`; what is here gives the same figures for
samples that count several times or not at all (a test compares both where every sample counts once).

Legend: N samples, R draws of N samples with replacement, C classes of the truth, K sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from fourmill.evaluate.dense import DepthMeasure, NormalMeasure, SemsegMeasure, angles, class_iou, confusion
from fourmill.evaluate.measure import Measure
from fourmill.evaluate.truth import VOID, Truth
from fourmill.evaluate.words import CaptionMeasure, phrases

Draws = dict[str, np.ndarray]
_ANGLE_BINS = 3600  # of 0.05 degrees: an interval's ends are no finer
_BELOW = (11.25, 22.5, 30.0)


class Spread(ABC):
    """What the values of one predictor come to, sample by sample, in the order in which they are added."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure

    @abstractmethod
    def add(self, value: Any, truth: Truth) -> None:
        """Take in a value that the measure has accepted."""

    @abstractmethod
    def figures(self, weights_RN: np.ndarray) -> Draws:
        """Figures (R,) when each sample counts as often as the weights say."""


def draws(samples: int, resamples: int, seed: int) -> np.ndarray:
    """float32 (R, N): how often each sample is drawn in each of R draws of N with replacement."""
    random = np.random.default_rng([seed, samples])
    return random.multinomial(samples, np.full(samples, 1 / samples), size=resamples).astype(np.float32)


class MeanSpread(Spread):
    """Figures that are means over samples of each sample's figure."""

    def __init__(self, measure: Measure) -> None:
        super().__init__(measure)
        self.rows: list[dict[str, float]] = []

    def add(self, value: Any, truth: Truth) -> None:
        alone = type(self.measure)(self.measure.spec, self.measure.source, self.measure.size)
        alone.add(value, truth)
        self.rows.append({name: figure for name, figure in alone.figures().items() if name != "coverage"})

    def figures(self, weights_RN: np.ndarray) -> Draws:
        return means({name: np.array([row[name] for row in self.rows]) for name in self.rows[0]}, weights_RN)


def means(values: dict[str, np.ndarray], weights_RN: np.ndarray) -> Draws:
    """Weighted means (R,) of values (N,)."""
    total_R = weights_RN.sum(axis=1, dtype=np.float64)
    return {name: weights_RN.astype(np.float64) @ value_N / total_R for name, value_N in values.items()}


class SumSpread(Spread):
    """Figures of K sums over samples."""

    def __init__(self, measure: Measure) -> None:
        super().__init__(measure)
        self.rows: list[np.ndarray] = []

    def sums(self, weights_RN: np.ndarray) -> np.ndarray:
        """float64 (R, K)."""
        found: np.ndarray = weights_RN.astype(np.float64) @ np.stack(self.rows)
        return found


class NormalSpread(SumSpread):
    """Angles: a histogram, and exact sums for what needs no order."""

    def add(self, value: np.ndarray, truth: Truth) -> None:
        assert truth.normal is not None  # the measure has compared it
        both = np.any(truth.normal != 0, axis=0) & np.any(value != 0, axis=0)
        angle = angles(value[:, both].astype(np.float64), truth.normal[:, both].astype(np.float64))
        bins = np.minimum((angle / 180.0 * _ANGLE_BINS).astype(np.int64), _ANGLE_BINS - 1)
        exact = [len(angle), angle.sum(), (angle**2).sum(), *((angle < bound).sum() for bound in _BELOW)]
        self.rows.append(np.concatenate([exact, np.bincount(bins, minlength=_ANGLE_BINS)]).astype(np.float32))

    def figures(self, weights_RN: np.ndarray) -> Draws:
        sums_RK = self.sums(weights_RN)
        count_R, sum_R, squares_R = sums_RK[:, :3].T
        below = {f"below_{bound:g}": sums_RK[:, 3 + i] / count_R for i, bound in enumerate(_BELOW)}
        reached = np.cumsum(sums_RK[:, 3 + len(_BELOW) :], axis=1) >= ((count_R + 1) // 2)[:, None]
        median_R = (reached.argmax(axis=1) + 0.5) * 180.0 / _ANGLE_BINS
        return {"mean": sum_R / count_R, "median": median_R, "rmse": np.sqrt(squares_R / count_R), **below}


class SemsegSpread(SumSpread):
    """A confusion matrix a sample."""

    def add(self, value: np.ndarray, truth: Truth) -> None:
        assert isinstance(self.measure, SemsegMeasure)
        assert truth.semseg is not None  # the measure has compared it
        classes = len(self.measure.source.classes)
        said, (_, keep) = self.measure.translated(value), self.measure.wrong(value, truth.semseg)
        meant = np.where(said == VOID, classes, said)
        self.rows.append(confusion(meant[keep], truth.semseg[keep], classes).astype(np.float32).ravel())

    def figures(self, weights_RN: np.ndarray) -> Draws:
        classes = len(self.measure.source.classes)
        counts = self.sums(weights_RN).reshape(-1, classes, classes + 1)
        hits = np.trace(counts, axis1=1, axis2=2)
        miou = np.array([np.nanmean(class_iou(one)) for one in counts])
        return {"miou": miou, "pixel_accuracy": hits / counts.sum(axis=(1, 2))}


class PhraseSpread(SumSpread):
    """Object phrases of scenes' captions: right, named, there."""

    def add(self, value: str, truth: Truth) -> None:
        mine, theirs = phrases(value), phrases(truth.captions[0])
        self.rows.append(np.array([(mine & theirs).total(), mine.total(), theirs.total()], np.float64))

    def figures(self, weights_RN: np.ndarray) -> Draws:
        right_R, named_R, there_R = self.sums(weights_RN).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "phrase_f1": 2 * right_R / (named_R + there_R),
                "phrase_precision": right_R / named_R,
                "phrase_recall": right_R / there_R,
            }


class FreeTextSpread(Spread):
    """ROUGE-L of free captions; BLEU is no sum of samples' figures and gets no interval."""

    def __init__(self, measure: Measure) -> None:
        super().__init__(measure)
        self.rows: list[float] = []

    def add(self, value: str, truth: Truth) -> None:
        wrong = CaptionMeasure(self.measure.spec, self.measure.source, self.measure.size).add(value, truth)
        assert wrong is not None  # the measure has compared it
        self.rows.append(1.0 - wrong)

    def figures(self, weights_RN: np.ndarray) -> Draws:
        return means({"rouge_l": np.array(self.rows)}, weights_RN)


def spread_of(measure: Measure) -> Spread | None:
    """The spread that goes with a measure; None: its figures stand without intervals."""
    from fourmill.evaluate.model.spread_boxes import BoxSpread
    from fourmill.evaluate.objects import DetMeasure

    if isinstance(measure, CaptionMeasure):
        return PhraseSpread(measure) if measure.source.closed_captions else FreeTextSpread(measure)
    kinds: dict[type[Measure], type[Spread]] = {
        DepthMeasure: MeanSpread,
        NormalMeasure: NormalSpread,
        SemsegMeasure: SemsegSpread,
        DetMeasure: BoxSpread,
    }
    kind = kinds.get(type(measure))
    return kind(measure) if kind else None
