"""How many cells of a grid are decided at each step, and how hot the sampling is at each.

Legend: L open cells, n steps. Schedules are computed on the host, in float64.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Schedule = Literal["cosine", "linear", "raised-cosine"]
Decay = Literal["constant", "linear", "onex"]
_SHARES = {
    "cosine": lambda part: 1 - math.cos(math.pi / 2 * part),  # MaskGIT, arXiv 2202.04200: few at first
    "linear": lambda part: part,
    "raised-cosine": lambda part: (1 - math.cos(math.pi * part)) / 2,  # what ml-4m calls cosine: few first and last
}
_COLDEST = 1e-9  # as ml-4m: below it a temperature counts as 0


def decided(tokens: int, step: int, steps: int, schedule: Schedule) -> int:
    """Cells of `tokens` that are decided after `step` of `steps` (1 to `tokens`): at least one more each step, and
    all of them after the last."""
    if step == steps:
        return tokens
    cells = int(tokens * _SHARES[schedule](step / steps) + 1e-9)  # half of 64 is 32, whatever the cosine's last bit
    return min(max(cells, step), tokens - (steps - step))


def temperatures(
    hottest: float, steps: int, tokens: int, schedule: Schedule, decay: Decay, coldest: float, power: float
) -> list[float]:
    """The temperature of each step.

    'linear': falls with the share of cells still open before the step. 'onex': ml-4m's, from `hottest` to `coldest` as
    1 / x^power, x from 1 to 100 over the *tokens* (so that the first steps see its steep beginning), times the share
    still open after the step; the last step is at `coldest`.
    """
    done = np.array([0, *(decided(tokens, i + 1, steps, schedule) for i in range(steps))]) / tokens
    if decay == "constant" or hottest == 0:
        return [hottest] * steps
    if decay == "linear":
        found = hottest * (1 - done[:-1])
    else:
        curve = np.linspace(1, 100, tokens) ** -power
        fall = (curve - curve[-1]) / max(curve[0] - curve[-1], 1e-12)
        found = coldest + (hottest - coldest) * fall[:steps] * (1 - done[1:])
    return [float(t) for t in np.maximum(found, _COLDEST)]
