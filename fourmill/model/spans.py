"""Span masking of text with sentinels, for a whole batch at once.

Tokens are kept or dropped one by one; every run of dropped tokens becomes one sentinel in the input, and the target is
[S_1] run [S_2] run … ended by one more sentinel (4M, after T5). A target of n ids takes
n - 1 slots of the decoder, which is given all ids but the last and predicts all but the first.

Legend: B texts, T longest text with its end marker, W = places of the target stream, P texts that are drawn again,
A attempts.
"""
# ruff: noqa: N815  (tensors carry shape suffixes, as fields too)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fourmill.model.config import EOS, FIRST_SENTINEL

# 4M lowers the keep probability by a tenth until the input fits: 0.9^50 = 0.5 %, then nothing is kept. Half of 4M's
# texts fit at once, the others after 15 attempts or so; those are drawn some at a time, as every pass has its price.
_DECAY, _ATTEMPTS = 0.9, (1, 6, 6, 8, 10, 19)


@dataclass(frozen=True)
class Spans:
    """Masked texts. `input_BT` with its `input_len_B`; `target_BW`, of which `slots_B` + 1 ids are used (none if the
    sample has no text); `run_slot_BR` is the place in `target_BW` of each run's sentinel, `runs_B` their number."""

    input_BT: torch.Tensor
    input_len_B: torch.Tensor
    target_BW: torch.Tensor
    slots_B: torch.Tensor
    run_slot_BR: torch.Tensor
    runs_B: torch.Tensor


def with_end(ids_BT: torch.Tensor, length_B: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts with [EOS] appended, cut to `longest` tokens (a text that is too long loses its end marker, as in 4M)."""
    room = ids_BT.new_zeros(len(ids_BT), 1)
    ended_BT = torch.cat([ids_BT, room], 1).scatter(1, length_B[:, None], EOS)
    return ended_BT[:, :longest], (length_B + 1).clamp(max=longest)


def draw_drops(
    length_B: torch.Tensor,
    budget_B: torch.Tensor,
    keep_B: torch.Tensor,
    width: int,
    most_runs: int,
    generator: torch.Generator,
    chunk_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which tokens to drop, bool (B, width): each is kept with its text's probability `keep_B`, which is lowered and
    all tokens drawn again until the input, with its sentinels, is within the budget. A budget of 0 drops everything.

    `chunk_B`: tokens that are kept or dropped together.
    """
    dropped_BT = torch.arange(width, device=length_B.device) < length_B[:, None]
    again_P = ((budget_B > 0) & (length_B > 0)).nonzero()[:, 0]
    done = 0
    for attempts in _ATTEMPTS:
        lower_A = _DECAY ** torch.arange(done, done + attempts, device=length_B.device)
        keep_PA = keep_B[again_P, None] * lower_A
        drawn_PAT = _draw(width, generator, keep_PA, None if chunk_B is None else chunk_B[again_P])
        drawn_PAT = limit_runs(drawn_PAT, length_B[again_P, None], most_runs)
        runs_PA = (drawn_PAT[..., 1:] > drawn_PAT[..., :-1]).sum(2) + drawn_PAT[..., 0]
        size_PA = length_B[again_P, None] - drawn_PAT.sum(2) + runs_PA
        fits_PA = size_PA <= budget_B[again_P, None]
        fits_P, first_P = fits_PA.any(1), fits_PA.int().argmax(1)
        chosen_PT = drawn_PAT[torch.arange(len(again_P), device=again_P.device), first_P]
        dropped_BT[again_P[fits_P]] = chosen_PT[fits_P]
        again_P, done = again_P[~fits_P], done + attempts
        if not len(again_P):
            break
    return dropped_BT


def random_bits(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Integers of which every bit is random, on the generator's device.

    Four 16-bit numbers from one draw take 0.8 ns each on a CPU, floats 2.8 ns, integers of a range 6 ns.
    """
    count, size = math.prod(shape), torch.empty(0, dtype=dtype).element_size()
    words = torch.empty(-(-count * size // 8), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(dtype)[:count].view(*shape)


def _draw(width: int, generator: torch.Generator, keep_PA: torch.Tensor, chunk_P: torch.Tensor | None) -> torch.Tensor:
    """Drops before any bound, bool (P, A, width); probabilities in steps of 1/32768, 0 and 1 exact."""
    noise_PAT = random_bits((*keep_PA.shape, width), torch.int16, generator).bitwise_and_(32767)
    if chunk_P is not None:
        chunk_PT = torch.arange(width, device=chunk_P.device) // chunk_P[:, None]
        noise_PAT = noise_PAT.gather(2, chunk_PT[:, None].expand_as(noise_PAT))
    return noise_PAT > ((keep_PA * 32768).round() - 1).to(torch.int16)[..., None]


def limit_runs(dropped_BT: torch.Tensor, length_B: torch.Tensor, most_runs: int) -> torch.Tensor:
    """The drops within the text; where there are more runs than sentinels, the last one runs to the end.

    (…, T) and (…).
    """
    width = dropped_BT.shape[-1]
    valid_BT = torch.arange(width, device=length_B.device) < length_B[..., None]
    dropped_BT = dropped_BT & valid_BT
    if (width + 1) // 2 <= most_runs:  # so many runs do not fit
        return dropped_BT
    last_BT = _starts(dropped_BT).cumsum(-1) >= most_runs
    return dropped_BT | (last_BT & valid_BT)


def mask_spans(ids_BT: torch.Tensor, length_B: torch.Tensor, dropped_BT: torch.Tensor, hidden_B: torch.Tensor) -> Spans:
    """Lay out inputs and targets for given drops (which `limit_runs` has seen).

    `hidden_B`: texts of which the input shows nothing, not even a sentinel.
    """
    width = ids_BT.shape[1]
    start_BT = _starts(dropped_BT)
    run_BT = start_BT.cumsum(1)
    sentinel_BT = FIRST_SENTINEL + run_BT  # [S_1] for the first run

    valid_BT = torch.arange(width, device=length_B.device) < length_B[:, None]
    shown_BT = ((valid_BT & ~dropped_BT) | start_BT) & ~hidden_B[:, None]
    shown_before_BT = shown_BT.cumsum(1)
    input_BT = _place(torch.where(start_BT, sentinel_BT, ids_BT), shown_BT, shown_before_BT - 1, width)

    slot_BT = dropped_BT.cumsum(1) + run_BT - 1  # of each dropped token; a run's sentinel stands one before its first
    runs_B, slots_B = run_BT[:, -1], slot_BT[:, -1] + 1
    most = width + (width + 1) // 2 + 1
    target_BW = _place(ids_BT, dropped_BT, slot_BT, most)
    target_BW += _place(sentinel_BT, start_BT, slot_BT - 1, most)
    target_BW.scatter_(1, slots_B[:, None], ((length_B > 0) * (FIRST_SENTINEL + 1 + runs_B))[:, None])
    run_slot_BR = _place(slot_BT - 1, start_BT, run_BT - 1, (width + 1) // 2)
    return Spans(input_BT, shown_before_BT[:, -1], target_BW, slots_B, run_slot_BR, runs_B)


def cut_targets(spans: Spans, budget_B: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(first slot, number of slots) of each target within its budget, int64 (B,) each.

    A target over its budget begins at a random run and is cut; if what follows that run would leave budget over, at
    the first run from which on everything fits (4M's rule).
    """
    slots_1 = spans.slots_B[:, None]
    draw_B = torch.rand(len(budget_B), generator=generator, device=budget_B.device)
    chosen_B = (draw_B * spans.runs_B).long().clamp(max=spans.run_slot_BR.shape[1] - 1)
    start_B = spans.run_slot_BR.gather(1, chosen_B[:, None])[:, 0]
    is_run_BR = torch.arange(spans.run_slot_BR.shape[1], device=budget_B.device) < spans.runs_B[:, None]
    fits_BR = is_run_BR & (slots_1 - spans.run_slot_BR <= budget_B[:, None])
    first_fit_B = torch.where(fits_BR, spans.run_slot_BR, slots_1).min(1).values
    start_B = torch.where(spans.slots_B - start_B >= budget_B, start_B, first_fit_B)
    start_B = torch.where(spans.slots_B <= budget_B, 0, start_B)
    return start_B, torch.minimum(spans.slots_B - start_B, budget_B)


def _starts(dropped_BT: torch.Tensor) -> torch.Tensor:
    """True at the first token of each run; (…, T)."""
    before_BT = torch.nn.functional.pad(dropped_BT, (1, 0))[..., :-1]
    return dropped_BT & ~before_BT


def _place(values_BT: torch.Tensor, which_BT: torch.Tensor, place_BT: torch.Tensor, width: int) -> torch.Tensor:
    """Zeros (B, width) with the chosen values at their places."""
    empty = values_BT.new_zeros(len(values_BT), width + 1)
    return empty.scatter_(1, torch.where(which_BT, place_BT, width), values_BT)[:, :width]
