"""What an evaluation of tokens found, as typed objects: for JSON, for a table in the terminal, and for a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fourmill.evaluate.results import Place, finite, shown, title
from fourmill.evaluate.tokens.codes import CodeUse

_SHOWN = 3  # figures against truth in one line; the most telling come first, JSON has all


@dataclass(frozen=True)
class TruthScore:
    """Decoded values against truth, and the labels that they come from against the same truth."""

    protocol: str
    compared: int
    decoded: dict[str, float]
    label: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenScore:
    """The tokens of one modality by one producer.

    `compared`, `without_label`, `missing` (no tokens): numbers of values, one a crop. `unusable`: values that could not
    be decoded or compared, by reason. `malformed`: pieces of sequences that were none, by what was wrong.
    """

    modality: str
    producer: str
    use: CodeUse
    protocol: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    compared: int = 0
    without_label: int = 0
    missing: int = 0
    unusable: dict[str, int] = field(default_factory=dict)
    malformed: dict[str, int] = field(default_factory=dict)
    truth: TruthScore | None = None
    notes: tuple[str, ...] = ()
    worst: tuple[Place, ...] = ()

    def to_json(self) -> dict[str, Any]:
        tree = asdict(self)
        tree["use"]["usage"] = self.use.usage
        return dict(finite(tree))

    def summary(self) -> str:
        """The figures against labels in one line."""
        return figures_line(self.figures)

    def truth_summary(self) -> str:
        """The most telling figures of tokens and of labels against truth; nothing if nothing was compared."""
        if self.truth is None or not self.truth.compared:
            return ""
        label = self.truth.label
        return "; ".join(
            f"{title(name)} {shown(value)}" + (f" (label {shown(label[name])})" if label else "")
            for name, value in list(self.truth.decoded.items())[:_SHOWN]
        )

    def code_summary(self) -> str:
        """Code use in one line."""
        use = self.use
        return f"{use.used}/{use.vocabulary} ({shown(100 * use.usage, 0)} %), perplexity {use.perplexity:.0f}"

    def bits_summary(self) -> str:
        """Bits of a value in one line."""
        use = self.use
        coded, stored = shown(use.coded_bits, 0), shown(use.stored_bits, 0)
        return f"{shown(use.tokens_per_value, 1)} tokens, {coded} bits coded, {stored} stored"

    def remarks(self) -> list[str]:
        """Everything besides the figures that a reader must know."""
        found = list(self.notes)
        if self.malformed:
            found.append(f"{sum(self.malformed.values())} malformed pieces, such as {next(iter(self.malformed))}")
        found += [f"{count} unusable: {reason}" for reason, count in self.unusable.items()]
        if self.truth is not None:
            found += [f"truth: {note}" for note in self.truth.notes]
        return found


@dataclass(frozen=True)
class TokenEvaluation:
    """All token modalities of one dataset. `samples`: those that were decoded, of `rows` in the dataset."""

    dataset: str
    snapshot: int
    truth: str
    samples: int
    rows: int
    scores: tuple[TokenScore, ...]
    bad_truth: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether anything was decoded and compared."""
        return any(score.compared or (score.truth and score.truth.compared) for score in self.scores)

    @property
    def bits(self) -> tuple[float, float]:
        """(coded, stored) bits of all token modalities of a value together."""
        found = [score.use for score in self.scores if score.use.values]
        return sum(use.coded_bits for use in found), sum(use.stored_bits for use in found)

    def to_json(self) -> dict[str, Any]:
        tree = {"dataset": self.dataset, "snapshot": self.snapshot, "truth": self.truth, "samples": self.samples}
        coded, stored = self.bits
        totals = {"rows": self.rows, "coded_bits": coded, "stored_bits": stored, "bad_truth": self.bad_truth}
        return {**tree, **totals, "scores": [score.to_json() for score in self.scores]}


def figures_line(figures: Mapping[str, float]) -> str:
    """Figures by name in one line."""
    return ", ".join(f"{title(name)} {shown(value)}" for name, value in figures.items())


def print_tokens(evaluation: TokenEvaluation) -> None:
    """For people: one block a modality."""
    import sys

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(
        escape(f"{evaluation.dataset}: snapshot {evaluation.snapshot}, tokens decoded and compared with their labels"),
        escape(f"({evaluation.samples} of {evaluation.rows} samples; truth: {evaluation.truth})"),
    )
    table = Table("tokens", "compared", "figures", "codes used", "a value", show_lines=True)
    for score in evaluation.scores:
        truth = score.truth_summary()
        lines = [score.summary(), score.protocol, f"against truth: {truth}" if truth else "", *score.remarks()]
        name, figures = f"{score.modality}\n{score.producer}", "\n".join(line for line in lines if line)
        bits = score.bits_summary().replace(", ", "\n")
        table.add_row(*map(escape, (name, str(score.compared), figures, score.code_summary(), bits)))
    console.print(table)
    coded, stored = evaluation.bits
    console.print(
        f"Of all modalities together: {coded:.0f} bits coded, {stored:.0f} stored. coded: by an ideal entropy coder of "
        "single ids. Codes and bits are of all rows of the dataset."
    )
    for reason, count in evaluation.bad_truth.items():
        console.print(escape(f"truth of {count} samples is unusable: {reason}"))
