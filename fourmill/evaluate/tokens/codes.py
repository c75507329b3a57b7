"""How a modality's codes are used, and what a value costs in bits: from the histograms in the shards' records.

Nothing is read but the manifest, so the figures are of all stored rows, not of a sample of them.

Entropy is that of single ids (no context), the plug-in estimate: of fewer tokens than codes it is too low. A value is
one crop of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fourmill.modalities import modality
from fourmill.pipeline.codecs import token_dtype
from fourmill.pipeline.inspect import perplexity
from fourmill.pipeline.shards import Record, unpack_counts

_BARS = 64  # of the histogram


@dataclass(frozen=True)
class CodeUse:
    """Codes of one modality by one producer. Bits are per value; `coded_bits` what an ideal entropy coder of single
    ids would need, `stored_bits` what the shards take. `bars`: share of tokens of the codes by rank, commonest first,
    in at most 64 groups of equally many codes."""

    values: int
    tokens: int
    vocabulary: int
    used: int
    perplexity: float
    entropy: float
    tokens_per_value: float
    coded_bits: float
    stored_bits: float
    bars: tuple[float, ...] = ()

    @property
    def usage(self) -> float:
        """Share of the vocabulary that occurs."""
        return self.used / self.vocabulary if self.vocabulary else math.nan


def code_use(name: str, records: Sequence[Record]) -> CodeUse:
    """The use of codes over the shards of one modality."""
    vocabulary = max((int(r.spec.get("vocabulary", 0)) for r in records), default=0)
    counts = np.zeros(vocabulary, np.int64)
    for record in records:
        if packed := record.statistics.get("histogram"):
            found = unpack_counts(packed)[:vocabulary]
            counts[: len(found)] += found
    tokens, values = int(counts.sum()), _values(name, records)
    effective = perplexity(counts)
    entropy = math.log2(effective) if effective > 0 else 0.0
    each = tokens / values if values else math.nan
    width = 8 * np.dtype(token_dtype(vocabulary)).itemsize
    used = int(np.count_nonzero(counts))
    return CodeUse(
        values, tokens, vocabulary, used, effective, entropy, each, each * entropy, each * width, _bars(counts)
    )


def _values(name: str, records: Sequence[Record]) -> int:
    """Rows that hold a value, one a crop. Exact for grids; of sequences, a row that lacks a crop counts for nothing."""
    total = 0
    for record in records:
        length, crops = record.spec.get("length"), record.spec.get("crops", 1) if modality(name).per_crop else 1
        total += record.statistics.get("tokens", 0) // length if length else record.present * crops
    return total


def _bars(counts: np.ndarray) -> tuple[float, ...]:
    if not counts.sum():
        return ()
    ranked = np.sort(counts)[::-1] / counts.sum()
    return tuple(float(group.sum()) for group in np.array_split(ranked, min(_BARS, len(ranked))))
