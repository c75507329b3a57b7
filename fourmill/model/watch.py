"""What goes wrong in a training run and is not seen in a mean: spikes, losses that are no numbers, dead modalities.

Judged on figures of all processes, so that all come to the same judgement. Whether a step counts is decided before the
optimizer is called. The state is plain JSON, and with it the judgement goes on as if the run had never stopped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import Any

from fourmill.model.config import PretrainConfig
from fourmill.model.progress import StepFigures

_WINDOW = 100  # steps that a loss is compared with
_FEWEST = 20  # fewer say nothing about what is usual
_NORMAL = 1.4826  # the median deviation of a normal distribution times this is its standard deviation
_FLOOR = 0.01  # of the median: the least deviation, for losses that hardly vary


class Watch:
    """Looks at every step of one run. `events` are sentences for people, of the whole run."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.events: list[str] = []
        self.skipped = 0  # steps without an update
        self._new: list[str] = []
        self._bad = 0  # of these, the ones without finite figures
        self._losses: list[float] = []
        self._absent: Counter[str] = Counter()  # steps since the last token of each target modality
        self._poor: list[str] = []  # modalities reported as no better than frequencies

    def accepts(self, step: int, figures: StepFigures) -> bool:
        """Whether the optimizer shall take step number `step` (1, 2, …).

        FloatingPointError once more than `max_skipped` steps had no finite loss and gradient.
        """
        self._count_absent(step, figures.targets)
        if not (math.isfinite(figures.loss) and math.isfinite(figures.grad_norm)):
            self._skip_bad(step, figures)
            return False
        z = self._deviation(figures.loss)
        spiked = z is not None and z > self.config.spike_z
        skip = spiked and self.config.on_spike == "skip"
        if spiked:
            self._say(
                f"step {step}: the loss is {figures.loss:.3f}, {z:.0f} deviations above the median of the "
                f"{len(self._losses)} steps before; {'no update, ' if skip else ''}{self._hint(step)}"
            )
        if skip:
            self.skipped += 1  # and the loss does not become usual by being repeated
        else:
            self._losses = [*self._losses[1 - _WINDOW :], figures.loss]
        return not skip

    def evaluated(self, step: int, losses: Mapping[str, float], frequencies: Mapping[str, float]) -> None:
        """Look at held-out losses beside those of token frequencies, in nats a token."""
        poor = [name for name, loss in losses.items() if loss >= frequencies[name]]
        for name in poor:
            if step >= self.config.dead_after and name not in self._poor:
                self._say(
                    f"step {step}: {name} has not been learned: {losses[name]:.3f} nats a held-out token, and its "
                    f"token frequencies alone give {frequencies[name]:.3f}"
                )
                self._poor.append(name)
        self._poor = [name for name in self._poor if name in poor]

    def drain(self) -> tuple[str, ...]:
        """The events since the last call."""
        found, self._new = tuple(self._new), []
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "events": self.events,
            "new": self._new,
            "skipped": self.skipped,
            "bad": self._bad,
            "losses": self._losses,
            "absent": dict(self._absent),
            "poor": self._poor,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.events, self._new, self._losses = list(state["events"]), list(state["new"]), list(state["losses"])
        self.skipped, self._bad = state["skipped"], state["bad"]
        self._absent, self._poor = Counter(state["absent"]), list(state["poor"])

    def _say(self, event: str) -> None:
        self.events.append(event)
        self._new.append(event)

    def _deviation(self, loss: float) -> float | None:
        """How many deviations `loss` lies above the median of the last steps; None if there are too few."""
        if len(self._losses) < _FEWEST:
            return None
        middle = median(self._losses)
        spread = _NORMAL * median(abs(x - middle) for x in self._losses)
        return (loss - middle) / max(spread, _FLOOR * abs(middle), 1e-12)

    def _skip_bad(self, step: int, figures: StepFigures) -> None:
        self.skipped += 1
        self._bad += 1
        names = [name for name, value in figures.sums.items() if not math.isfinite(value)]
        where = f"of {', '.join(names)}" if names else "of no single modality, but the gradient's norm is not finite"
        what = f"loss {figures.loss}, gradient norm {figures.grad_norm}, {where}"
        self._say(f"step {step}: no update ({what}); {self._hint(step)}")
        if self._bad > self.config.max_skipped:
            raise FloatingPointError(
                f"step {step}: {what}; that is step {self._bad} of the run without finite figures, and max_skipped is "
                f"{self.config.max_skipped}. Lower lr ({self.config.lr:g}) or clip ({self.config.clip}), lengthen "
                f"warmup ({self.config.warmup}), switch model.qk_norm on or autocast off; {self._hint(step)}"
            )

    def _count_absent(self, step: int, targets: Mapping[str, int]) -> None:
        for name, count in targets.items():
            self._absent[name] = 0 if count else self._absent[name] + 1
            if self._absent[name] == self.config.dead_after:
                self._say(
                    f"step {step}: {name} is dead: no target token of it in the last {self.config.dead_after} steps; "
                    "look at `missing` in the result and at the target alphas of masking.mixtures"
                )

    def _hint(self, step: int) -> str:
        return f"its samples: fourmill trace --run {self.config.out} --step {step - 1}"  # which counts from 0
