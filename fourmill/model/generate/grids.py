"""Filling a grid of tokens in a few passes.

The most confident cells are decided first (MaskGIT, Chang et al. 2022, arXiv 2202.04200), or cells in random order
(ROAR, 4M section 3.2); what is decided is shown to the encoder at the next pass. As in ml-4m, a pass asks for all open
cells under MaskGIT and only for those that it decides under ROAR: queries of a grid see each other.

Legend: B samples, L cells of a grid, K cells asked for in a pass, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fourmill.model.batch import Targets
from fourmill.model.generate.contexts import Columns, Context, Contexts, columns_of
from fourmill.model.generate.guidance import passes
from fourmill.model.generate.plan import Target
from fourmill.model.generate.sampling import Noise, pick
from fourmill.model.generate.schedules import decided, temperatures
from fourmill.model.network import FourM

log = logging.getLogger(__name__)


def fill_grid(contexts: Contexts, target: Target, part: Any, noise: Noise) -> torch.Tensor:
    """int64 (B, L). `part`: cells that are known, -1 elsewhere; None if none are."""
    tokens, device = contexts.model.architecture.modalities[target.name].tokens, contexts.device
    ids_BL = torch.zeros(contexts.size, tokens, dtype=torch.long, device=device)
    known_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    if part is not None:
        columns = columns_of(contexts.model, target.name, part)
        ids_BL, known_BL = columns.ids_BW, columns.shown_BW
    steps = _possible_steps(contexts.model, target, begun=part is not None)
    courses = [_course(target, cells, steps) for cells in (~known_BL).sum(1).tolist()]
    order_BL = noise.uniform(tokens, device)
    for step in range(max(len(course) for course in courses)):
        now = _Pass([course[step] if step < len(course) else _Stage(0, 1.0, 1.0) for course in courses], device)
        asked_BL = ~known_BL & (now.count_B > 0)[:, None]
        if target.order == "roar":
            asked_BL = asked_BL & _lowest(torch.where(asked_BL, order_BL, 2.0), now.count_B)
        place_BK, valid_BK = _places(asked_BL)
        logits_BKV = grid_logits(contexts, target, ids_BL, known_BL, place_BK, valid_BK)
        uniform_BK = noise.uniform(tokens, device).gather(1, place_BK)
        heat = now.temperature_B[:, None, None] if target.temperature else 0.0
        drawn_BK, sure_BK = pick(logits_BKV, uniform_BK, heat, target.top_k, target.top_p, target.truncate)
        if target.gumbel:
            uniform_BK = noise.uniform(tokens, device).gather(1, place_BK)
            sure_BK = _noisy(sure_BK, uniform_BK, target.gumbel * (1 - now.done_B)[:, None])
        chosen_BK = valid_BK & _lowest(torch.where(valid_BK, -sure_BK.double(), torch.inf), now.count_B)
        ids_BL = _put(ids_BL, place_BK, drawn_BK, chosen_BK)
        known_BL = _put(known_BL, place_BK, chosen_BK, chosen_BK)
    return ids_BL


@dataclass(frozen=True)
class _Stage:
    """One pass over one sample: how many cells it decides, how hot, and the share of passes done after it."""

    count: int
    temperature: float
    done: float


class _Pass:
    """The stages of a batch's samples as tensors (B,)."""

    def __init__(self, stages: Sequence[_Stage], device: torch.device) -> None:
        self.count_B = torch.tensor([s.count for s in stages], device=device)
        self.temperature_B = torch.tensor([s.temperature for s in stages], dtype=torch.float64, device=device)
        self.done_B = torch.tensor([s.done for s in stages], dtype=torch.float64, device=device)


def _course(target: Target, cells: int, steps: int) -> list[_Stage]:
    """The passes over a sample with this many open cells."""
    steps = min(steps, cells)
    if not steps:
        return []
    schedule = target.fill_schedule
    after = [decided(cells, step, steps, schedule) for step in range(1, steps + 1)]
    heat = temperatures(target.temperature, steps, cells, schedule, target.decay, target.coldest, target.power)
    return [
        _Stage(a - b, t, (i + 1) / steps) for i, (a, b, t) in enumerate(zip(after, [0, *after], heat, strict=False))
    ]


def _possible_steps(model: FourM, target: Target, begun: bool) -> int:
    """A modality that the encoder cannot read is predicted in one step: what is decided could not be shown."""
    if target.name in model.architecture.domains_in or (target.steps == 1 and not begun):
        return target.steps
    log.warning(
        "%s is no input of this model: it is predicted in one step (asked for: %d), which sees none of its known cells",
        target.name,
        target.steps,
    )
    return 1


def _places(asked_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (B, K), those of the cells asked for first, and which of them are; K is the most of any sample."""
    count_B = asked_BL.sum(1)
    place_BK = (~asked_BL).long().argsort(dim=1, stable=True)[:, : int(count_B.max())]
    return place_BK, torch.arange(place_BK.shape[1], device=asked_BL.device) < count_B[:, None]


def grid_logits(
    contexts: Contexts,
    target: Target,
    ids_BL: torch.Tensor,
    known_BL: torch.Tensor,
    place_BK: torch.Tensor,
    valid_BK: torch.Tensor,
) -> torch.Tensor:
    """(B, K, V), guided."""
    model, name = contexts.model, target.name
    extra = None
    if known_BL.any() and name in model.architecture.domains_in:
        position_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
        extra = Columns(name, ids_BL, position_BL, known_BL)
    nothing_BK = torch.zeros_like(place_BK)
    asked = Targets(
        ids_BM=nothing_BK,
        position_BM=torch.where(valid_BK, place_BK, 0),
        modality_BM=torch.where(valid_BK, model.architecture.names.index(name), -1),
        valid_BM=valid_BK,
        label_BM=nothing_BK,
    )

    def logits(seen: Context) -> torch.Tensor:
        return model.logits(model.decode(seen.context_BND, seen.valid_BN, asked), name)

    return passes(contexts, target, extra, lambda seen: seen).logits(logits)


def _noisy(sure_BK: torch.Tensor, uniform_BK: torch.Tensor, scale_B1: torch.Tensor) -> torch.Tensor:
    """Log-confidence with Gumbel noise, MaskGIT's "choice temperature"."""
    gumbel_BK = -(-uniform_BK.clamp(min=1e-30).log()).clamp(min=1e-30).log()
    return sure_BK.double().clamp(min=1e-30).log() + scale_B1 * gumbel_BK


def _lowest(rank_BK: torch.Tensor, count_B: torch.Tensor) -> torch.Tensor:
    """bool (B, K): the `count` lowest of each row; of equal ones the first."""
    return rank_BK.argsort(dim=1, stable=True).argsort(dim=1) < count_B[:, None]


def _put(into_BL: torch.Tensor, place_BK: torch.Tensor, value_BK: torch.Tensor, which_BK: torch.Tensor) -> torch.Tensor:
    """`into` with the chosen values at their places, which are different within a row."""
    return into_BL.scatter(1, place_BK, torch.where(which_BK, value_BK, into_BL.gather(1, place_BK)))
