"""Drawing tokens from logits: top-k, top-p, temperature, and one number of noise for each draw.

A draw inverts the cumulative distribution at one uniform number, so that a sample's tokens depend on its own noise and
not on what else is in the batch. Noise comes from generators on the host, one for each (seed, sample, target).

Legend: B samples, K cells, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

Truncate = Literal["before", "after"]


class Noise:
    """Uniform numbers in [0, 1) for each sample of a batch, from generators of their own."""

    def __init__(self, seed: int, samples: Sequence[int], target: int) -> None:
        seeds = [np.random.SeedSequence([seed, sample, target]).generate_state(2, np.uint32) for sample in samples]
        self._generators = [torch.Generator().manual_seed(int(low) | int(high) << 32) for low, high in seeds]

    def uniform(self, count: int, device: torch.device) -> torch.Tensor:
        """float64 (B, count)."""
        rows = [torch.rand(count, generator=g, dtype=torch.float64) for g in self._generators]
        return torch.stack(rows).to(device)


def kept(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """bool (..., V): the `top_k` likeliest tokens, and of these the fewest whose share among them reaches `top_p`.

    Of equal logits those with lower ids count as likelier; one token is always kept.
    """
    order = logits.float().argsort(dim=-1, descending=True, stable=True)
    chosen = torch.ones_like(order, dtype=torch.bool)
    if top_k is not None:
        chosen[..., top_k:] = False
    if top_p is not None:
        sorted_logits = logits.double().gather(-1, order).masked_fill(~chosen, -torch.inf)
        share = sorted_logits.softmax(-1)
        before = share.cumsum(-1) - share
        chosen &= before < top_p
        chosen[..., 0] = True
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


def probabilities(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | None,
    top_p: float | None,
    truncate: Truncate = "before",
) -> torch.Tensor:
    """float64 (..., V), of which to draw; `temperature` above 0.

    `truncate`: top-k and top-p look at the distribution 'before' the temperature, as ml-4m's do, or 'after' it. Top-k
    keeps the same tokens either way; top-p keeps more of a hotter distribution.
    """
    hot = logits.double() / temperature
    if top_k is not None or top_p is not None:
        hot = hot.masked_fill(~kept(logits if truncate == "before" else hot, top_k, top_p), -torch.inf)
    return hot.softmax(-1)


def draw(chances: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """int64 (...): the token at which the cumulative distribution (..., V) passes `uniform` (...); a token of
    probability 0 is never drawn."""
    total = chances.cumsum(-1)
    found = torch.searchsorted(total, (uniform * total[..., -1])[..., None], right=True)[..., 0]
    last = (chances > 0).long().cumsum(-1).argmax(-1)  # the first of the largest counts: the last possible token
    return torch.minimum(found, last)


def pick(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    truncate: Truncate = "before",
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row of logits (..., V) and its probability, float32; at temperature 0 the likeliest.

    `temperature`: a number, or as a tensor one above 0 for each row, (..., 1).
    """
    if not isinstance(temperature, torch.Tensor) and temperature == 0:
        best = logits.float().softmax(-1).max(-1)
        return best.indices, best.values
    chances = probabilities(logits, temperature, top_k, top_p, truncate)
    drawn = draw(chances, uniform)
    return drawn, chances.gather(-1, drawn[..., None])[..., 0].float()
