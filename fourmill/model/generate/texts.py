"""Writing texts token by token from [S_1], as in training when a text is wholly masked, up to [EOS] or [S_2].

A beginning that is given is forced upon the decoder token by token; the encoder does not see it.

Legend: B samples, M longest text, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from fourmill.model.config import EOS, FIRST_SENTINEL, PAD
from fourmill.model.generate.cache import TextDecoder
from fourmill.model.generate.contexts import FIRST, Contexts
from fourmill.model.generate.guidance import passes
from fourmill.model.generate.plan import Target
from fourmill.model.generate.sampling import Noise, pick

LAST = FIRST_SENTINEL + 2  # [S_2] ends the target of a wholly masked text


def write_text(contexts: Contexts, target: Target, part: Any, noise: Noise) -> list[torch.Tensor]:
    """B tensors of ids without end marker. `part`: their beginnings; None if there are none."""
    model, name = contexts.model, target.name
    most = model.architecture.modalities[name].tokens
    longest = min(target.max_tokens or most, most)
    begun_BM, length_B = _beginnings(contexts, part, longest)
    decoders = passes(contexts, target, None, lambda seen: TextDecoder(model, name, seen))
    uniform_BM = noise.uniform(longest, contexts.device)
    next_B = torch.full((contexts.size,), FIRST, device=contexts.device)
    ended_B = torch.zeros_like(next_B, dtype=torch.bool)
    tokens = []
    for place in range(longest):
        given_B = next_B
        logits_BV = decoders.logits(lambda decoder: decoder.step(given_B, place))  # noqa: B023  (called at once)
        options = (target.temperature, target.top_k, target.top_p, target.truncate)
        drawn_B, _ = pick(logits_BV, uniform_BM[:, place], *options)
        next_B = torch.where(place < length_B, begun_BM[:, place], drawn_B)
        ended_B = ended_B | (next_B == EOS) | (next_B == LAST)
        tokens.append(torch.where(ended_B, PAD, next_B))
        if ended_B.all():
            break
    return [text[text != PAD] for text in torch.stack(tokens, 1)]


def _beginnings(contexts: Contexts, part: Any, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, longest) and their numbers (B,)."""
    texts = [torch.as_tensor(text).long()[:longest] for text in part] if part is not None else []
    texts = texts or [torch.zeros(0, dtype=torch.long)] * contexts.size
    ids_BM = torch.zeros(contexts.size, longest, dtype=torch.long)
    for row, text in enumerate(texts):
        ids_BM[row, : len(text)] = text
    lengths = torch.tensor([len(text) for text in texts])
    return ids_BM.to(contexts.device), lengths.to(contexts.device)
