"""How a codebook fares: usage, perplexity and entropy of its codes, and the refusal of one that has collapsed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fourmill.tokenizers.training.config import TrainTokenizerConfig


class CodebookCollapseError(RuntimeError):
    """The codebook has come to a few codes; no checkpoint was written."""


@dataclass(frozen=True)
class CodebookHealth:
    """Of one codebook, or the mean of several. `usage`: share of codes used at all; `entropy`: in bits a token;
    `lowest`: the perplexity of the codebook with the lowest."""

    usage: float
    entropy: float
    lowest: float

    @property
    def perplexity(self) -> float:
        """Number of equally used codes that would be as varied."""
        return float(2.0**self.entropy)

    def __str__(self) -> str:
        lowest = "" if math.isclose(self.lowest, self.perplexity) else f" (lowest codebook {self.lowest:.1f})"
        return (
            f"{self.usage:.1%} of codes used, perplexity {self.perplexity:.1f}{lowest}, {self.entropy:.2f} bits a token"
        )


def health_of(counts: np.ndarray) -> CodebookHealth:
    """Of histograms: how often each code was used, (K,) or (H, K) for H codebooks."""
    rows = np.atleast_2d(counts)
    entropies = [entropy_bits(row) for row in rows]
    return CodebookHealth(float((rows > 0).mean()), float(np.mean(entropies)), float(2.0 ** min(entropies)))


def entropy_bits(counts: np.ndarray) -> float:
    """Bits a token, of a histogram; 0 where nothing was counted."""
    shares = counts[counts > 0] / max(int(counts.sum()), 1)
    return max(0.0, float(-(shares * np.log2(shares)).sum()))


def perplexity_of(counts: np.ndarray) -> float:
    """exp(entropy) of a histogram: the number of equally used codes that would be as varied."""
    return health_of(counts).perplexity


def refuse_collapse(health: CodebookHealth, config: TrainTokenizerConfig, step: int) -> None:
    """Raise `CodebookCollapseError` if fewer codes than configured are in effective use in any codebook."""
    if health.lowest < config.min_perplexity:
        raise CodebookCollapseError(
            f"the codebook of {config.modality} has collapsed: {health.lowest:.1f} of {config.network.vocabulary} "
            f"codes in effective use at step {step}, fewer than min_perplexity={config.min_perplexity:g}. Look at the "
            f"labels (all alike?), lower lr or latent_dim, or set a smaller codebook"
        )
