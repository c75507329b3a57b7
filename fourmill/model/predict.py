"""Any-to-any prediction: given some modalities whole, predict others.

Grids are filled in a few steps, the most confident cells first (MaskGIT, Chang et al. 2022, arXiv 2202.04200) or in
random order (ROAR, 4M section 3.2): what is decided is shown to the encoder at the next step. Texts are generated token
by token from [S_1], as in training when a text is wholly masked, up to [EOS] or the next sentinel.

Legend: B samples, L cells of a grid, K cells still open, M tokens generated so far, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from fourmill.modalities import unknown
from fourmill.model.batch import Inputs, Targets, compact
from fourmill.model.config import EOS, FIRST_SENTINEL, PAD
from fourmill.model.network import FourM
from fourmill.model.spans import with_end
from fourmill.model.weights import load_model

__all__ = ["load_model", "predict"]

log = logging.getLogger(__name__)


@torch.no_grad()
def predict(
    model: FourM,
    inputs: Mapping[str, Any],
    targets: Sequence[str],
    *,
    steps: int = 1,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    order: Literal["confident", "random"] = "confident",
    chained: bool = False,
) -> dict[str, Any]:
    """Predict `targets` for a batch from `inputs`, on the model's device.

    `inputs`: `rgb` as uint8 (B, 3, S, S), grids as integers (B, L), texts as B arrays of ids without end marker.
    `steps`: passes to fill a grid, 1 to L. `temperature`: 0 takes the likeliest token; else samples are drawn with
    `generator` (on the model's device). `chained`: each predicted target is an input of the next; else all are
    predicted from the inputs alone. Returns int64 (B, L) for grids and B tensors of ids for texts.
    """
    _check(model, inputs, targets, steps)
    given, found = dict(inputs), {}
    for name in targets:
        if model.architecture.modalities[name].kind == "grid":
            found[name] = _predict_grid(model, given, name, steps, temperature, generator, order)
        else:
            found[name] = _predict_text(model, given, name, temperature, generator)
        if chained and name in model.architecture.domains_in:
            given[name] = found[name]
    return found


def _check(model: FourM, inputs: Mapping[str, Any], targets: Sequence[str], steps: int) -> None:
    sides = (("input", inputs, model.architecture.domains_in), ("target", targets, model.architecture.domains_out))
    for side, names, known in sides:
        for name in names:
            if name not in known:
                raise ValueError(f"{side}: {unknown('modality', name, list(known))}")
    both = [name for name in targets if name in inputs]
    if both:
        raise ValueError(f"{both[0]!r} is given and cannot be a target too")
    if not inputs:
        raise ValueError("no inputs: give at least one modality")
    if steps < 1:
        raise ValueError(f"steps {steps}: at least 1 is needed")


def _encode(model: FourM, views: Mapping[str, Any], extra: _Columns | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and valid mask for whole modalities, and for the cells of a grid decided so far."""
    device = model.mask_token.device
    parts = [_columns(model, name, value, device) for name, value in views.items()]
    parts += [extra] if extra is not None else []
    names = model.architecture.names
    columns = {
        "ids": [ids for _, ids, _, _ in parts],
        "position": [position for _, _, position, _ in parts],
        "modality": [torch.full_like(ids, names.index(name)) for name, ids, _, _ in parts],
    }
    valid = [shown for _, _, _, shown in parts]
    width = int(torch.cat(valid, 1).sum(1).max())
    packed = compact(columns, valid, width)
    pixels = [value for name, value in views.items() if model.architecture.modalities[name].kind == "pixels"]
    pixels_B3SS = torch.as_tensor(pixels[0]).to(device) if pixels else None
    shown = Inputs(packed["ids"], packed["position"], packed["modality"], packed["valid"], pixels_B3SS)
    return model.encode(shown), shown.valid_BN


_Columns = tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]  # modality; ids, positions, which are shown: (B, W)


def _columns(model: FourM, name: str, value: Any, device: torch.device) -> _Columns:
    info = model.architecture.modalities[name]
    if info.kind == "sequence":
        texts = [torch.as_tensor(text).long() for text in value]
        length_B = torch.tensor([len(text) for text in texts], device=device)
        ids_BT = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
        ids, length_B = with_end(ids_BT, length_B, info.tokens)
        position = torch.arange(ids.shape[1], device=device).expand_as(ids)
        return name, ids, position, position < length_B[:, None]
    if info.kind == "pixels":
        ids = torch.zeros(len(value), info.tokens, dtype=torch.long, device=device)
    else:
        ids = torch.as_tensor(value).long().to(device)
    if ids.shape[1] != info.tokens:
        raise ValueError(f"{name}: {ids.shape[1]} tokens a sample, the model has {info.tokens}")
    position = torch.arange(info.tokens, device=device).expand_as(ids)
    return name, ids, position, torch.ones_like(ids, dtype=torch.bool)


def _predict_grid(
    model: FourM,
    views: Mapping[str, Any],
    name: str,
    steps: int,
    temperature: float,
    generator: torch.Generator | None,
    order: Literal["confident", "random"],
) -> torch.Tensor:
    info, number = model.architecture.modalities[name], model.architecture.names.index(name)
    if steps > 1 and name not in model.architecture.domains_in:
        log.warning(
            "%s is no input of this model, so that all of it is predicted in one step instead of %d", name, steps
        )
        steps = 1
    steps = min(steps, info.tokens)
    device, size = model.mask_token.device, len(next(iter(views.values())))
    ids_BL = torch.zeros(size, info.tokens, dtype=torch.long, device=device)
    known_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    position_BL = torch.arange(info.tokens, device=device).expand_as(ids_BL)
    context, valid = _encode(model, views)
    for step in range(steps):
        if step:
            context, valid = _encode(model, views, (name, ids_BL, position_BL, known_BL))
        open_BK = position_BL[~known_BL].unflatten(0, (size, -1))
        query = torch.zeros_like(open_BK)
        asked = Targets(query, open_BK, torch.full_like(query, number), torch.ones_like(open_BK) > 0, query)
        logits_BKV = model.logits(model.decode(context, valid, asked), name)
        drawn_BK, sure_BK = _draw(logits_BKV, temperature, generator)
        if order == "random":
            sure_BK = torch.rand(sure_BK.shape, generator=generator, device=device)
        count = _decided(info.tokens, step + 1, steps, order) - (info.tokens - open_BK.shape[1])
        chosen = sure_BK.topk(count, dim=1).indices
        place = open_BK.gather(1, chosen)
        ids_BL.scatter_(1, place, drawn_BK.gather(1, chosen))
        known_BL.scatter_(1, place, torch.ones_like(place, dtype=torch.bool))
    return ids_BL


def _decided(tokens: int, step: int, steps: int, order: str) -> int:
    """Cells decided after `step` of `steps`: MaskGIT's cosine decides few at first, ROAR equally many each time."""
    share = step / steps if order == "random" else 1 - math.cos(math.pi / 2 * step / steps)
    # At least one a step, and enough left for the steps to come.
    return tokens if step == steps else min(max(int(tokens * share), step), tokens - (steps - step))


def _predict_text(
    model: FourM, views: Mapping[str, Any], name: str, temperature: float, generator: torch.Generator | None
) -> list[torch.Tensor]:
    info, number = model.architecture.modalities[name], model.architecture.names.index(name)
    context, valid = _encode(model, views)
    first, last = FIRST_SENTINEL + 1, FIRST_SENTINEL + 2
    ids_BM = torch.full((len(context), 1), first, device=context.device)
    ended_B = torch.zeros(len(context), dtype=torch.bool, device=context.device)
    for _ in range(info.tokens):
        position_BM = torch.arange(ids_BM.shape[1], device=context.device).expand_as(ids_BM)
        kind_BM = torch.full_like(ids_BM, number)
        asked = Targets(ids_BM, position_BM, kind_BM, kind_BM >= 0, ids_BM)
        logits_BV = model.logits(model.decode(context, valid, asked)[:, -1], name)
        drawn_B, _ = _draw(logits_BV, temperature, generator)
        ended_B = ended_B | (drawn_B == EOS) | (drawn_B == last)
        ids_BM = torch.cat([ids_BM, torch.where(ended_B, PAD, drawn_B)[:, None]], 1)
        if ended_B.all():
            break
    return [text[text != PAD] for text in ids_BM[:, 1:]]


def _draw(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row of logits (..., V), and its probability."""
    if temperature == 0:
        best = logits.float().softmax(-1).max(-1)
        return best.indices, best.values
    chances = (logits.float() / temperature).softmax(-1)
    drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=generator).view(logits.shape[:-1])
    return drawn, chances.gather(-1, drawn[..., None])[..., 0]
