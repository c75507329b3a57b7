"""What an evaluation of a model found, as typed objects: for JSON, for a table in the terminal, and for a page.

Invariant: figures that could not be taken are None in JSON and '–' in print, never 0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fourmill.evaluate.results import Place, finite, shown, title

Interval = tuple[float, float]
_LOWER_IS_BETTER = ("absrel", "rmse", "log10", "mean", "median", "loss")
_MAIN = {
    "depth": ("absrel", "rmse", "delta1", "absrel_median", "rmse_median", "delta1_median"),
    "normal": ("mean", "median", "below_11.25", "below_22.5", "below_30"),
    "det": ("ap", "ap50", "f1_50"),
}
"""Figures in print, where there are more; JSON has all."""


@dataclass(frozen=True)
class Row:
    """One figure of all predictors, on the same samples.

    `constant_is`: which constant, of those fitted, the figure is held against. `gain`: by how much the model is better
    than it, in the figure's unit, whichever direction is better. `share`: of the way from the constant to the teacher.
    Intervals hold 95 % of bootstrap draws of samples; None where the figure is no sum over samples.
    """

    figure: str
    constant: float
    constant_is: str
    model: float
    round_trip: float
    teacher: float
    model_interval: Interval | None = None
    gain_interval: Interval | None = None

    @property
    def sign(self) -> int:
        """1 where larger is better, -1 where smaller is."""
        return sign_of(self.figure)

    @property
    def gain(self) -> float:
        return self.sign * (self.model - self.constant)

    @property
    def share(self) -> float:
        way = self.teacher - self.constant
        return (self.model - self.constant) / way if way else math.nan

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "higher_is_better": self.sign > 0, "gain": self.gain, "share_of_the_way": self.share}


def sign_of(figure: str) -> int:
    """1 where larger is better, -1 where smaller is."""
    return -1 if figure.partition("_")[0] in _LOWER_IS_BETTER else 1


@dataclass(frozen=True)
class ModalityScore:
    """One modality that the model predicts.

    `compared`: samples that all figures are taken on. `unusable`: values that could not be compared, by predictor and
    reason; the model's and the round trip's were replaced by the constant, so that they count as no better than that.
    `places`: samples by how wrong the model is on them: 'worst', 'median', 'best'.
    """

    modality: str
    tokens: str
    protocol: str
    rows: tuple[Row, ...] = ()
    compared: int = 0
    no_label: int = 0
    no_truth: int = 0
    unusable: dict[str, int] = field(default_factory=dict)
    constant_samples: int = 0
    notes: tuple[str, ...] = ()
    places: dict[str, tuple[Place, ...]] = field(default_factory=dict)

    def main_rows(self) -> list[Row]:
        """The rows for print."""
        wanted = _MAIN.get(self.modality)
        return [row for row in self.rows if wanted is None or row.figure in wanted]

    def remarks(self) -> list[str]:
        """Everything besides the figures that a reader must know."""
        found = list(self.notes)
        lacking = {"label": self.no_label, "truth": self.no_truth}
        found += [f"{count} samples have no {what}" for what, count in lacking.items() if count]
        return found + [f"{count} unusable: {reason}" for reason, count in self.unusable.items()]

    def to_json(self) -> dict[str, Any]:
        tree = {**asdict(self), "rows": [row.to_json() for row in self.rows]}
        return dict(finite(tree))


@dataclass(frozen=True)
class TokenScore:
    """The dataset's own tokens of one modality, predicted whole from the inputs alone (texts: each token from those
    before it). Losses in nats a token; `frequency_*`: of giving each token its frequency in training samples, and of
    saying the most frequent one."""

    name: str
    samples: int
    tokens: int
    loss: float
    accuracy: float
    frequency_loss: float
    frequency_accuracy: float
    loss_interval: Interval | None = None
    accuracy_interval: Interval | None = None


@dataclass(frozen=True)
class ModelEvaluation:
    """All of one checkpoint on one dataset. `without`: samples left out, by reason; `fitted_on`: training samples that
    constants and frequencies are fitted on, at most; `parameters`: how predictions and intervals were made."""

    checkpoint: str
    dataset: str
    snapshot: int
    truth: str
    split: str
    samples: int
    fitted_on: int
    inputs: tuple[str, ...]
    parameters: dict[str, Any]
    scores: tuple[ModalityScore, ...]
    tokens: tuple[TokenScore, ...] = ()
    notes: tuple[str, ...] = ()
    without: dict[str, int] = field(default_factory=dict)
    bad_truth: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether anything could be compared."""
        return any(score.compared for score in self.scores)

    def remarks(self) -> list[str]:
        """Everything besides the figures that a reader must know."""
        left_out = [f"{count} samples left out: {reason}" for reason, count in self.without.items()]
        bad = [f"truth of {count} samples is unusable: {reason}" for reason, count in self.bad_truth.items()]
        return [*self.notes, *left_out, *bad]

    def to_json(self) -> dict[str, Any]:
        tree = {**asdict(self), "scores": [score.to_json() for score in self.scores]}
        return dict(finite(tree))


HEADINGS = ("constant", "4M", "95 %", "tokens' ceiling", "teacher", "better than the constant by", "share of the way")


def cells(row: Row) -> list[str]:
    """The row in print, under `HEADINGS`."""
    figures = [_number(value) for value in (row.constant, row.model, row.round_trip, row.teacher)]
    gain = f"{_number(row.gain)} {_interval(row.gain_interval)}".strip()
    share = "–" if math.isnan(row.share) else f"{round(100 * row.share)} %"
    return [figures[0], figures[1], _interval(row.model_interval), figures[2], figures[3], gain, share]


def figure_title(score: ModalityScore, row: Row) -> str:
    """The figure's name with an arrow to where it is better."""
    name = "F1 at IoU 0.5" if row.figure == "f1_50" else title(row.figure)
    if score.modality == "depth" and row.figure in ("rmse", "rmse_median"):
        name += " m"
    return f"{name} {'↑' if row.sign > 0 else '↓'}"


def _number(value: float) -> str:
    return shown(value + 0.0, 3 if abs(value) < 10 else 2)


def _interval(ends: Interval | None) -> str:
    return "" if ends is None else f"[{_number(ends[0])}, {_number(ends[1])}]"


def token_cells(score: TokenScore) -> list[str]:
    """A row on tokens in print."""
    loss = f"{_number(score.loss)} {_interval(score.loss_interval)}".strip()
    right = f"{_number(score.accuracy)} {_interval(score.accuracy_interval)}".strip()
    return [str(score.tokens), loss, _number(score.frequency_loss), right, _number(score.frequency_accuracy)]


TOKEN_HEADINGS = ("tokens", "nats a token", "by frequencies", "likeliest is right", "most frequent is right")


def headline(evaluation: ModelEvaluation) -> str:
    """What was evaluated, in a sentence."""
    by = ", ".join(evaluation.inputs)
    return (
        f"{evaluation.checkpoint} from {by} on {evaluation.samples} {evaluation.split} samples of {evaluation.dataset} "
        f"(snapshot {evaluation.snapshot}; truth: {evaluation.truth})"
    )


def print_model(evaluation: ModelEvaluation) -> None:
    """For people: one table of figures, one of tokens."""
    from rich.console import Console
    from rich.markup import escape

    out = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    out.print(escape(headline(evaluation)))
    table = _table("figure", *HEADINGS)
    for score in evaluation.scores:
        table.add_row(f"[bold]{escape(score.modality)}[/bold]", f"{score.compared} samples", *[""] * 6)
        for row in score.main_rows():
            table.add_row(escape(figure_title(score, row)), *map(escape, cells(row)))
    out.print(table)
    if evaluation.tokens:
        table = _table("tokens of", *TOKEN_HEADINGS)
        for one in evaluation.tokens:
            table.add_row(escape(one.name), *map(escape, token_cells(one)))
        out.print(table)
    for heading, remarks in all_remarks(evaluation).items():
        for remark in remarks:
            out.print(escape(f"{heading}: {remark}"))


def all_remarks(evaluation: ModelEvaluation) -> Mapping[str, Sequence[str]]:
    """Remarks by what they are on."""
    found = {"evaluation": evaluation.remarks()}
    return {**found, **{score.modality: score.remarks() for score in evaluation.scores}}


def _table(first: str, *others: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table
