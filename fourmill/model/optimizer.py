"""What an optimizer step is made of: AdamW, the learning rate at each step, and the moving average of the weights.

All three are functions of their arguments and the step, so that a run that goes on from a state goes on exactly.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from fourmill.tokenizers.training.average import WeightAverage as Ema

__all__ = ["Decay", "Ema", "Schedule", "adamw", "learning_rate"]

Schedule = Literal["cosine", "wsd", "constant"]
Decay = Literal["linear", "1-sqrt"]


def adamw(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW as 4M's: matrices and embeddings decay; norms, biases and single vectors do not."""
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim == 2], "weight_decay": weight_decay},
        {"params": [p for p in learned if p.ndim != 2], "weight_decay": 0.0},
    ]
    # One fused kernel for all parameters: without it the update is a tenth of a small model's step.
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=fused, foreach=not fused)


def learning_rate(
    step: int,
    *,
    lr: float,
    warmup: int,
    steps: int,
    schedule: Schedule = "cosine",
    decay_steps: int | None = None,
    decay: Decay = "linear",
) -> float:
    """Of step 0, 1, …: a linear warm-up to `lr`, then by the schedule.

    `cosine`: half a cosine down to 0 at `steps`. `constant`: `lr`. `wsd` (warm-up, stable, decay): `lr` until
    `decay_steps` before the end (None: a fifth of all steps), then down to 0, `linear` or as 1 - sqrt of the way
    (Hägele et al. 2024, arXiv 2405.18392).
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    if schedule == "cosine":
        way = (step - warmup) / max(steps - warmup, 1)
        return lr * 0.5 * (1 + math.cos(math.pi * way))
    length = max(steps // 5 if decay_steps is None else decay_steps, 1)
    way = max(0.0, (step - (steps - length)) / length)
    return lr * (1 - way if decay == "linear" else 1 - math.sqrt(way))
