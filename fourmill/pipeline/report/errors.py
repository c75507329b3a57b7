"""Rows in quarantine, as a matrix of modality and reason; from roots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fourmill.pipeline.manifest import Manifest

_REASONS = 8  # columns; rarer reasons together. Reasons may be a stranger's words
_OTHERS = "other reasons"
_LONGEST = 40


@dataclass(frozen=True)
class Row:
    """One modality: rows by reason, in the order of the matrix's reasons."""

    name: str
    counts: tuple[int, ...]
    total: int
    share: float


@dataclass(frozen=True)
class Errors:
    """The matrix; modalities without errors are left out."""

    reasons: tuple[str, ...]
    rows: tuple[Row, ...]


def errors(manifest: Manifest, order: Sequence[str]) -> Errors:
    """The commonest reasons and how many rows of each modality they cost."""
    counts = {name: manifest.totals(name).quarantined for name in order}
    total: Counter[str] = Counter()
    for reasons in counts.values():
        total.update(reasons)
    common = [reason for reason, _ in total.most_common(_REASONS)]
    others = len(total) > len(common)
    rows = tuple(_row(manifest, name, common, others) for name in order if counts[name])
    shown = [r if len(r) <= _LONGEST else r[: _LONGEST - 1] + "…" for r in common]
    return Errors((*shown, *([_OTHERS] if others else [])), rows)


def _row(manifest: Manifest, name: str, common: Sequence[str], others: bool) -> Row:
    totals = manifest.totals(name)
    found = [totals.quarantined.get(reason, 0) for reason in common]
    everything = sum(totals.quarantined.values())
    rest = [everything - sum(found)] if others else []
    return Row(name, (*found, *rest), everything, everything / max(totals.rows, 1))
