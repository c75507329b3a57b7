"""What an evaluation found, as typed objects: for JSON, for a table in the terminal, and for a page.

Invariant: figures that could not be taken are None in JSON and '–' in print, never 0.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

_SHOWN_CLASSES = 8  # in the table; JSON has all
_TITLES = {
    "absrel": "AbsRel",
    "rmse": "RMSE",
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "pq": "PQ",
    "sq": "SQ",
    "rq": "RQ",
    "ap": "AP",
    "ar": "AR@",
    "best_iou": "best-mask IoU",
    "iou": "IoU",
    "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "phrase_f1": "phrase F1",
    "psnr_db": "PSNR dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "frechet": "Fréchet distance,",
    "f1": "F1",
    "matched_iou": "matched IoU",
    "mask_iou": "mask IoU",
    "joint_angle": "joint angle °",
    "in_bin": "in bin",
}
_DEGREES = ("mean", "median")


@dataclass(frozen=True)
class Place:
    """One value of a dataset, and how wrong it is (larger is worse; comparable within its modality)."""

    key: str
    shard: int
    row: int
    crop: int
    badness: float


class Worst:
    """The worst of the places it is given; of equally bad ones the first."""

    def __init__(self, most: int = 3) -> None:
        self._most = most
        self._heap: list[tuple[float, int, Place]] = []
        self._seen = 0

    def add(self, place: Place) -> None:
        self._seen += 1
        # The number keeps equal values in order, and keeps heapq from comparing places.
        heapq.heappush(self._heap, (place.badness, -self._seen, place))
        if len(self._heap) > self._most:
            heapq.heappop(self._heap)

    @property
    def places(self) -> tuple[Place, ...]:
        """The worst first."""
        return tuple(place for _, _, place in sorted(self._heap, reverse=True))


@dataclass(frozen=True)
class LabelScore:
    """The labels of one modality by one producer against truth.

    `compared`, `quarantined`, `missing` (nothing to make), `without_truth`: numbers of values, one a crop; `unusable`:
    values that could not be compared, by reason. `unmatched_labels`, `unmatched_truth`: classes that only one side
    knows; pixels and objects of the latter are left out.
    """

    modality: str
    producer: str
    protocol: str
    figures: dict[str, float]
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    compared: int = 0
    quarantined: int = 0
    missing: int = 0
    without_truth: int = 0
    unusable: dict[str, int] = field(default_factory=dict)
    unmatched_labels: tuple[str, ...] = ()
    unmatched_truth: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    worst: tuple[Place, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dict(finite(asdict(self)))

    def summary(self) -> str:
        """The figures in one line."""
        return ", ".join(f"{title(n)} {shown(v)}" for n, v in self.figures.items())

    def remarks(self) -> list[str]:
        """Everything besides the figures that a reader must know."""
        found = list(self.notes)
        if self.unmatched_labels:
            found.append(f"classes that the truth does not know: {_few(self.unmatched_labels)}")
        if self.unmatched_truth:
            found.append(f"classes of the truth that labels do not know, left out: {_few(self.unmatched_truth)}")
        found += [f"{count} unusable: {reason}" for reason, count in self.unusable.items()]
        return found


@dataclass(frozen=True)
class Evaluation:
    """All scores of one dataset against one source of truth.

    `samples`: those with truth; `size`: side of the crops; `bad_truth`: samples whose truth is unusable, by reason.
    """

    dataset: str
    snapshot: int
    truth: str
    samples: int
    size: int
    scores: tuple[LabelScore, ...]
    bad_truth: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether anything could be compared."""
        return any(score.compared for score in self.scores)

    def to_json(self) -> dict[str, Any]:
        tree = {"dataset": self.dataset, "snapshot": self.snapshot, "truth": self.truth, "samples": self.samples}
        scores = [score.to_json() for score in self.scores]
        return {**tree, "size": self.size, "bad_truth": self.bad_truth, "scores": scores}


def title(name: str) -> str:
    """A figure's name as the field writes it."""
    name = name.replace("delta", "δ")
    for stem, words in _TITLES.items():
        rest = name.removeprefix(stem)
        if rest != name and (not rest or rest.isdigit() or rest.startswith("_")):
            return f"{words}{rest.replace('_', ' ')}"
    if name.startswith("below_"):
        return f"<{name.removeprefix('below_')}°"
    return f"{name} °" if name in _DEGREES else name.replace("_", " ")


def shown(value: float, digits: int = 3) -> str:
    """A figure in print."""
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if value > 1 and value == int(value) else f"{value:.{digits}f}"


def _few(names: tuple[str, ...]) -> str:
    rest = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + rest


def finite(value: Any) -> Any:
    """A tree of plain values with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def print_table(evaluation: Evaluation) -> None:
    """For people: one block a modality."""
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(
        escape(f"{evaluation.dataset}: snapshot {evaluation.snapshot} against {evaluation.truth}"),
        f"({evaluation.samples} samples with truth, crops of {evaluation.size} pixels)",
    )
    table = Table("labels", "compared", "quarantined", "missing", "no truth", "figures", show_lines=True)
    for score in evaluation.scores:
        counts = (score.compared, score.quarantined, score.missing, score.without_truth)
        classes = [_class_line(name, figures) for name, figures in score.per_class.items()]
        more = [f"… and {len(classes) - _SHOWN_CLASSES} more classes"] if len(classes) > _SHOWN_CLASSES else []
        lines = [score.summary(), score.protocol, *classes[:_SHOWN_CLASSES], *more, *score.remarks()]
        name = f"{score.modality}\n{score.producer}"
        table.add_row(escape(name), *map(str, counts), escape("\n".join(line for line in lines if line)))
    console.print(table)
    for reason, count in evaluation.bad_truth.items():
        console.print(escape(f"truth of {count} samples is unusable: {reason}"))


def _class_line(name: str, figures: Mapping[str, float]) -> str:
    return f"  {name}: " + ", ".join(f"{title(n)} {shown(v)}" for n, v in figures.items())
