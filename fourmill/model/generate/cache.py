"""Text decoding with kept keys and values: each token costs one pass over one place, not over all of the text so far.

Invariant: `TextDecoder.step` gives the logits that `FourM.decode` gives for the whole text at its last place. Keys and
values of the encoder's output are computed once a text; those of the text grow by one place a step.

Legend: B samples, N input tokens, M tokens so far, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from fourmill.model.generate.contexts import Context
from fourmill.model.network import FourM


class TextDecoder:
    """The decoder for one text of each of B samples, given one encoder output."""

    def __init__(self, model: FourM, name: str, context: Context) -> None:
        self.model, self.name = model, name
        self.embedding = model.decoder_embeddings[name]
        self.mask = _visible(context)
        self._cross = [b.cross_attn.kv(b.context_norm(context.context_BND)).chunk(2, dim=2) for b in model.decoder]
        self._own: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(model.decoder)

    def step(self, ids_B: torch.Tensor, position: int) -> torch.Tensor:
        """Logits (B, V) for the token after `ids_B`, which stands at `position` of the decoder's text."""
        place_1 = torch.tensor([position], device=ids_B.device)
        x_B1D = (self.embedding.places(place_1) + self.embedding.token_emb(ids_B))[:, None]
        for number, block in enumerate(self.model.decoder):
            q_B1D, k_B1D, v_B1D = block.self_attn.qkv(block.norm1(x_B1D)).chunk(3, dim=2)
            k_BMD, v_BMD = self._grown(number, k_B1D, v_B1D)
            x_B1D = x_B1D + block.self_attn.attend(q_B1D, k_BMD, v_BMD, None)
            q_B1D = block.cross_attn.q(block.query_norm(x_B1D))
            x_B1D = x_B1D + block.cross_attn.attend(q_B1D, *self._cross[number], self.mask)
            x_B1D = x_B1D + block.mlp(block.norm2(x_B1D))
        return self.model.logits(self.model.decoder_norm(x_B1D)[:, 0], self.name)

    def _grown(self, number: int, k_B1D: torch.Tensor, v_B1D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = self._own[number]
        grown = (k_B1D, v_B1D) if kept is None else (torch.cat([kept[0], k_B1D], 1), torch.cat([kept[1], v_B1D], 1))
        self._own[number] = grown
        return grown


def _visible(context: Context) -> torch.Tensor:
    """(B, 1, 1, R + N), as the network masks: a sample without anything lets its first, empty place be seen."""
    registers = context.context_BND.shape[1] - context.valid_BN.shape[1]
    seen_BN = functional.pad(context.valid_BN, (registers, 0), value=True)
    first_N = torch.arange(seen_BN.shape[1], device=seen_BN.device) == 0
    return (seen_BN | (first_N & ~seen_BN.any(1, keepdim=True)))[:, None, None, :]
