"""How a modality's codes are used, and what a value costs in bits: from the statistics that the manifest keeps.

Nothing is read but the manifest, so the figures are of all stored rows, not of a sample of them.

Entropy is that of single ids (no context), the plug-in estimate: of fewer tokens than codes it is too low. A value is
one crop of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourmill.pipeline.codecs import token_dtype
from fourmill.pipeline.statistics import code_counts, entropy_bits

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


def code_use(statistics: Mapping[str, Any]) -> CodeUse:
    """The use of codes, from the statistics of one modality by one recipe: `Manifest.statistics(modality)[recipe]`."""
    counts = code_counts(statistics)
    vocabulary, values = len(counts), int(statistics.get("values", 0))
    tokens = int(counts.sum())
    entropy = entropy_bits(counts)
    each = tokens / values if values else math.nan
    width = 8 * np.dtype(token_dtype(vocabulary)).itemsize
    used = int(np.count_nonzero(counts))
    effective = 2**entropy if tokens else 0.0
    return CodeUse(
        values, tokens, vocabulary, used, effective, entropy, each, each * entropy, each * width, _bars(counts)
    )


def _bars(counts: np.ndarray) -> tuple[float, ...]:
    if not counts.sum():
        return ()
    ranked = np.sort(counts)[::-1] / counts.sum()
    return tuple(float(group.sum()) for group in np.array_split(ranked, min(_BARS, len(ranked))))
