"""What a person sees while a run goes on: a live table in a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TextIO

from fourmill.pipeline.plan import Plan

_PLAIN_EVERY_S = 10.0


@dataclass
class StageProgress:
    """Counts of one stage; `rate` is samples per second since its first unit began."""

    name: str
    shards: int
    samples: int
    done_shards: int = 0
    done_samples: int = 0
    quarantined: int = 0
    retried: int = 0
    failed: int = 0
    workers: int = 0
    started: float | None = None
    finished: float | None = None

    @property
    def rate(self) -> float:
        if self.started is None or not self.done_samples:
            return 0.0
        return self.done_samples / max((self.finished or time.monotonic()) - self.started, 1e-9)

    @property
    def eta_s(self) -> float | None:
        return (self.samples - self.done_samples) / self.rate if self.rate else None


@dataclass
class Progress:
    """The run's display; used as a context manager."""

    plan: Plan
    out: TextIO = field(default_factory=lambda: sys.stderr)
    stages: dict[str, StageProgress] = field(init=False)

    def __post_init__(self) -> None:
        self.stages = {
            name: StageProgress(name, totals.shards, totals.samples)
            for name, totals in self.plan.totals.items()
            if totals.shards
        }
        self._live: Any = None
        self._last = time.monotonic()
        self._said: set[str] = set()

    def __enter__(self) -> Progress:
        if self.out.isatty() and self.stages:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(get_renderable=self._table, console=Console(file=self.out), refresh_per_second=2)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)
        else:
            self._print()

    def began(self, stage: str) -> None:
        if self.stages[stage].started is None:
            self.stages[stage].started = time.monotonic()

    def done(self, stage: str, rows: int, quarantined: int) -> None:
        state = self.stages[stage]
        state.done_shards += 1
        state.done_samples += rows
        state.quarantined += quarantined
        if state.done_shards + state.failed == state.shards:
            state.finished = time.monotonic()
        self.tick()

    def say(self, line: str) -> None:
        """A message above the live display."""
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.out, flush=True)

    def tick(self) -> None:
        if self._live is None and time.monotonic() - self._last >= _PLAIN_EVERY_S:
            self._print()

    def _print(self) -> None:
        """Lines that say something new; a finished stage is not repeated."""
        self._last = time.monotonic()
        for line in self._lines():
            if line not in self._said:
                print(line, file=self.out, flush=True)
        self._said = set(self._lines())

    def _lines(self) -> Iterable[str]:
        for s in self.stages.values():
            if s.started is not None:
                eta = "done" if s.finished else f"ETA {_clock(s.eta_s)}"
                yield (
                    f"{s.name}: {s.done_shards}/{s.shards} shards, {s.done_samples}/{s.samples} samples, "
                    f"{s.rate:.1f} samples/s, {eta}, {s.quarantined} quarantined, {s.retried} retried, "
                    f"{s.failed} failed"
                )

    def _table(self) -> Any:
        from rich.table import Table

        table = Table("stage", "shards", "samples", "samples/s", "ETA", "workers", "quarantined", "retried", "failed")
        for s in self.stages.values():
            eta = "done" if s.finished else _clock(s.eta_s)
            counts = (str(s.workers), str(s.quarantined), str(s.retried), str(s.failed))
            shards, samples = f"{s.done_shards}/{s.shards}", f"{s.done_samples}/{s.samples}"
            table.add_row(s.name, shards, samples, f"{s.rate:.1f}", eta, *counts)
        return table


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
