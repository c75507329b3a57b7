"""Sampling whose draws belong to the sample: the same caption whatever batch the picture is in.

`generate(do_sample=True)` draws from one global generator, so a row's words depend on the rows above it. Here each row
has its own numbers, drawn before generation from (seed, key, style, index), and inverse transform sampling turns them
into tokens: one uniform number a token, whole batches at once, about the cost of a sort.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def uniforms(keys: Sequence[str], seed: int, style: str, index: int, count: int) -> torch.Tensor:
    """float32 (B, count) in [0, 1): row i is a function of everything but the other keys."""
    digests = [hashlib.sha256(f"{seed}/{style}/{index}/{key}".encode()).digest() for key in keys]
    rows = [np.random.default_rng(list(digest)).random(count, dtype=np.float32) for digest in digests]
    return torch.from_numpy(np.stack(rows))


class SeededSampler:
    """A logits processor for greedy `generate`: leaves the drawn token alone above minus infinity, so that taking the
    best one takes it. Must come last, as processors given to `generate` do."""

    def __init__(self, uniforms_BT: torch.Tensor, temperature: float, top_p: float) -> None:
        self.uniforms_BT, self.temperature, self.top_p = uniforms_BT, temperature, top_p
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        drawn_B = draw(scores_BV / self.temperature, self.uniforms_BT[:, self.step], self.top_p)
        self.step += 1
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, drawn_B[:, None], 0.0)


def draw(logits_BV: torch.Tensor, uniforms_B: torch.Tensor, top_p: float = 1.0) -> torch.Tensor:
    """int64 (B,): token ids drawn from softmax(logits), or from its fewest likeliest tokens that reach `top_p`."""
    # float64, and uniforms of 24 bits: rounding can neither reach past the last token nor choose an impossible one.
    likely_BV = torch.softmax(logits_BV.double(), dim=-1)
    if top_p == 1.0:
        return _invert(likely_BV, uniforms_B)
    likely_BV, order_BV = likely_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = likely_BV.cumsum(dim=-1) - likely_BV
    drawn_B = _invert(likely_BV.where(before_BV < top_p, 0.0), uniforms_B)
    return order_BV.gather(1, drawn_B[:, None])[:, 0]


def _invert(likely_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight is above `uniforms` of the whole."""
    summed_BV = likely_BV.cumsum(dim=-1)
    return torch.searchsorted(summed_BV, uniforms_B.double()[:, None] * summed_BV[:, -1:], right=True)[:, 0]
