"""Span masking of text with sentinels, for a whole batch at once.

Tokens are kept or dropped one by one; every run of dropped tokens becomes one sentinel in the input, and the target is
[S_1] run [S_2] run … ended by one more sentinel (4M, after T5). A target of n ids takes
n - 1 slots of the decoder, which is given all ids but the last and predicts all but the first.

Legend: B samples, T longest text with its end marker, W = places of the target stream.
"""
# ruff: noqa: N815  (tensors carry shape suffixes, as fields too)

from __future__ import annotations

from dataclasses import dataclass

import torch

from fourmill.model.config import EOS, FIRST_SENTINEL

_DECAY, _TRIES = 0.9, 50  # 4M lowers the keep probability by a tenth until the input fits; 0.9^50 = 0.5 %, then 0


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
    length_B: torch.Tensor, budget_B: torch.Tensor, width: int, most_runs: int, generator: torch.Generator
) -> torch.Tensor:
    """Which tokens to drop, bool (B, width): keep probability uniform in 0..1 for each text, lowered and drawn again
    until the input, with its sentinels, is within the budget. A budget of 0 drops everything."""
    device = length_B.device
    keep_B1 = torch.rand(len(length_B), 1, generator=generator, device=device) * (budget_B > 0)[:, None]
    dropped_BT = torch.ones(len(length_B), width, dtype=torch.bool, device=device)
    redo_B1 = torch.ones_like(keep_B1, dtype=torch.bool)
    for attempt in range(_TRIES + 1):
        drawn_BT = torch.rand(dropped_BT.shape, generator=generator, device=device) >= keep_B1 * (attempt < _TRIES)
        dropped_BT = torch.where(redo_B1, limit_runs(drawn_BT, length_B, most_runs), dropped_BT)
        size_B = _valid(dropped_BT, length_B).sum(1) - dropped_BT.sum(1) + _starts(dropped_BT).sum(1)
        redo_B1 = ((size_B > budget_B) & (budget_B > 0))[:, None]
        if not redo_B1.any():
            break
        keep_B1 = torch.where(redo_B1, keep_B1 * _DECAY, keep_B1)
    return dropped_BT


def limit_runs(dropped_BT: torch.Tensor, length_B: torch.Tensor, most_runs: int) -> torch.Tensor:
    """The drops within the text; where there are more runs than sentinels, the last one runs to the end."""
    dropped_BT = dropped_BT & _valid(dropped_BT, length_B)
    last_BT = _starts(dropped_BT).cumsum(1) >= most_runs
    return dropped_BT | (last_BT & _valid(dropped_BT, length_B))


def mask_spans(ids_BT: torch.Tensor, length_B: torch.Tensor, dropped_BT: torch.Tensor, hidden_B: torch.Tensor) -> Spans:
    """Lay out inputs and targets for given drops (which `limit_runs` has seen).

    `hidden_B`: texts of which the input shows nothing, not even a sentinel.
    """
    width = ids_BT.shape[1]
    start_BT = _starts(dropped_BT)
    run_BT = start_BT.cumsum(1)
    sentinel_BT = FIRST_SENTINEL + run_BT  # [S_1] for the first run

    kept_BT = _valid(dropped_BT, length_B) & ~dropped_BT
    shown_BT = (kept_BT | start_BT) & ~hidden_B[:, None]
    input_BT = _place(torch.where(start_BT, sentinel_BT, ids_BT), shown_BT, shown_BT.cumsum(1) - 1, width)

    before_BT = dropped_BT.cumsum(1) - dropped_BT.long()
    runs_B, slots_B = run_BT[:, -1], dropped_BT.sum(1) + run_BT[:, -1]
    most = width + (width + 1) // 2 + 1
    tokens_BW = _place(ids_BT, dropped_BT, before_BT + run_BT, most)
    marks_BW = _place(sentinel_BT, start_BT, before_BT + run_BT - 1, most)
    end_BW = torch.arange(most, device=ids_BT.device) == slots_B[:, None]
    ended_BW = end_BW * (length_B > 0)[:, None] * (FIRST_SENTINEL + 1 + runs_B)[:, None]
    run_slot_BR = _place(before_BT + run_BT - 1, start_BT, run_BT - 1, (width + 1) // 2)
    return Spans(input_BT, shown_BT.sum(1), tokens_BW + marks_BW + ended_BW, slots_B, run_slot_BR, runs_B)


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


def _valid(like_BT: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
    return torch.arange(like_BT.shape[1], device=like_BT.device) < length_B[:, None]


def _starts(dropped_BT: torch.Tensor) -> torch.Tensor:
    """True at the first token of each run."""
    before_BT = torch.nn.functional.pad(dropped_BT, (1, 0))[:, :-1]
    return dropped_BT & ~before_BT


def _place(values_BT: torch.Tensor, which_BT: torch.Tensor, place_BT: torch.Tensor, width: int) -> torch.Tensor:
    """Zeros (B, width) with the chosen values at their places."""
    empty = values_BT.new_zeros(len(values_BT), width + 1)
    return empty.scatter_(1, torch.where(which_BT, place_BT, width), values_BT)[:, :width]
