"""The schedule of one run: which unit is next in each stage, what failed, what is published when. It knows no Ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from fourmill.config import Config
from fourmill.pipeline.manifest import Manifest, Update, update_manifest
from fourmill.pipeline.plan import Plan, Unit
from fourmill.pipeline.progress import Progress
from fourmill.pipeline.shards import Record, shard_name
from fourmill.pipeline.store import Store
from fourmill.pipeline.worker import SetupError, UnitResult

MAX_DEATHS = 2  # times a unit may lose its worker before its samples are searched for the cause
_MAX_ERRORS = 2  # times a unit may fail with an exception before it is left for the next run
_AHEAD = 1024  # units looked at for one whose inputs are there: stages that run at once take shards in the same order
_PUBLISH_S = 600.0  # between snapshots of a long run: what is not published yet is found by listing, after a kill
_PUBLISH_RECORDS = 20_000  # held at most; 1-20 KB each


class BudgetExceededError(RuntimeError):
    """Too many samples were quarantined; the run stopped rather than label a corpus that something is wrong with."""


@dataclass
class RunReport:
    """What a run did. `failed`: units left undone, with their last error; `notes`: retries, splits, deaths."""

    plan: Plan
    manifest: Manifest
    samples: int = 0
    seconds: float = 0.0
    quarantined: dict[str, dict[str, int]] = field(default_factory=dict)
    failed: dict[tuple[str, int], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failed

    def __str__(self) -> str:
        units = self.plan.num_units
        lines = [
            f"{units - len(self.failed)} of {units} units done in {self.seconds:.1f} s; "
            f"snapshot {self.manifest.snapshot}"
        ]
        for name, reasons in sorted(self.quarantined.items()):
            lines.append(f"quarantined in {name}: " + ", ".join(f"{n} x {r}" for r, n in sorted(reasons.items())))
        lines += [f"FAILED {stage} shard {shard}: {why}" for (stage, shard), why in sorted(self.failed.items())]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


class Publisher:
    """Collects records and publishes them as snapshots, so that a run of any length holds few of them."""

    def __init__(self, store: Store, plan: Plan, manifest: Manifest) -> None:
        self.store, self.plan, self.manifest = store, plan, manifest
        self.fresh: list[Record] = []
        self.left = list(plan.unpublished)
        self.last = time.monotonic()

    def add(self, records: Iterable[Record]) -> None:
        self.fresh += records
        if len(self.fresh) >= _PUBLISH_RECORDS or time.monotonic() - self.last >= _PUBLISH_S:
            self._publish()

    def finish(self) -> Manifest:
        """Publish what is left, and what an interrupted run had left; the newest snapshot."""
        while self.fresh or self.left:
            self._publish()
        return self.manifest

    def _publish(self) -> None:
        part, self.left = self.left[:_PUBLISH_RECORDS], self.left[_PUBLISH_RECORDS:]
        with ThreadPoolExecutor(16) as pool:  # after a kill there can be thousands, each a request
            found = [r for records in pool.map(lambda item: _stored_record(self.store, *item), part) for r in records]
        update = Update([*found, *self.fresh], self.plan.producers)
        self.manifest = update_manifest(self.store, lambda old: update)
        self.fresh, self.last = [], time.monotonic()


def _stored_record(store: Store, name: str, shard: int, fingerprint: str) -> list[Record]:
    try:
        return [Record.from_json(store.get(shard_name(name, shard, fingerprint, "json")))]
    except FileNotFoundError:
        return []


class _Queue:
    """The units of one stage: tried again, looked at already, and not yet made."""

    def __init__(self, plan: Plan, stage: str) -> None:
        self.again: deque[Unit] = deque()
        self.seen: deque[Unit] = deque()
        self.rest = plan.units(stage)
        self.left = plan.totals[stage].shards

    def __bool__(self) -> bool:
        return self.left > 0


class Schedule:
    """Hands out the units of one plan, each once its inputs are there, and keeps count of what became of them."""

    def __init__(self, config: Config, plan: Plan, progress: Progress, report: RunReport, publisher: Publisher) -> None:
        self.config, self.plan, self.progress, self.report, self.publisher = config, plan, progress, report, publisher
        self.waiting = {s.name: _Queue(plan, s.name) for s in plan.stages}
        self.undone = _Undone(plan.lacks())
        self.deaths: dict[tuple[str, int], int] = {}
        self.errors: dict[tuple[str, int], int] = {}

    def next_unit(self, stage: str) -> Unit | None:
        """The next unit whose inputs are all there; units whose inputs failed are dropped as failed too."""
        queue = self.waiting[stage]
        if queue.again:
            queue.left -= 1
            return queue.again.popleft()
        for _ in range(len(queue.seen)):
            if self._is_ready(unit := queue.seen.popleft()):
                return unit
        while len(queue.seen) < _AHEAD:
            following = next(queue.rest, None)
            if following is None:
                return None
            if self._is_ready(following):
                return following
        return None

    def _is_ready(self, unit: Unit) -> bool:
        """Whether a unit can be handed out; if not, it waits on, or is given up."""
        queue = self.waiting[unit.stage]
        lacking = [m for m in unit.inputs if self.undone.has(m, unit.shard)]
        makers = [s.name for s in self.plan.stages if set(lacking) & set(s.stores)]
        if any((name, unit.shard) in self.report.failed for name in makers):
            queue.left -= 1
            self.give_up(unit, f"its input {lacking[0]} could not be made")
        elif lacking:
            queue.seen.append(unit)
        else:
            queue.left -= 1
            return True
        return False

    def put_back(self, unit: Unit) -> None:
        """To be tried once more, before others."""
        self.waiting[unit.stage].left += 1
        self.waiting[unit.stage].again.append(unit.again())

    def finished(self, result: UnitResult) -> None:
        unit = result.unit
        self.undone.remove(unit.makes, unit.shard)
        self.publisher.add(result.records)
        self.report.samples += unit.rows
        self.report.notes += [f"{unit.stage} shard {unit.shard}: {note}" for note in result.notes]
        for record in result.records:
            counts = self.report.quarantined.setdefault(record.modality, {}) if record.quarantined else {}
            for reason, count in record.quarantined.items():
                counts[reason] = counts.get(reason, 0) + count
        worst = max((sum(r.quarantined.values()) for r in result.records), default=0)
        self.progress.done(unit.stage, unit.rows, worst)
        self._check_budget()

    def _check_budget(self) -> None:
        for name, reasons in self.report.quarantined.items():
            stage = next(s for s in self.plan.stages if name in s.stores)
            planned = self.progress.stages[stage.name].samples
            lost = sum(reasons.values())
            if lost > self.config.max_failures * planned:
                detail = ", ".join(f"{n} x {r}" for r, n in sorted(reasons.items()))
                raise BudgetExceededError(
                    f"{lost} of {planned} rows of {name} were quarantined ({detail}); "
                    f"max_failures={self.config.max_failures} allows {int(self.config.max_failures * planned)}. "
                    "What is done is kept; raise max_failures to go on"
                )

    def erred(self, unit: Unit, error: Exception) -> None:
        """A unit failed with an exception: once more, then left for the next run."""
        if isinstance(error, SetupError):
            raise error
        place = (unit.stage, unit.shard)
        self.errors[place] = self.errors.get(place, 0) + 1
        self.progress.say(f"{unit.stage} shard {unit.shard}: {type(error).__name__}: {error}")
        if self.errors[place] >= _MAX_ERRORS:
            self.give_up(unit, f"{type(error).__name__}: {error}")
        else:
            self.progress.stages[unit.stage].retried += 1
            self.put_back(unit)

    def give_up(self, unit: Unit, why: str) -> None:
        self.report.failed[unit.stage, unit.shard] = why
        self.progress.stages[unit.stage].failed += 1

    def died(self, unit: Unit) -> bool:
        """A worker died under this unit; True when it has done so often enough to look for the sample that kills."""
        place = (unit.stage, unit.shard)
        self.deaths[place] = self.deaths.get(place, 0) + 1
        self.progress.stages[unit.stage].retried += 1
        self.progress.say(f"{unit.stage} shard {unit.shard}: its worker died (time {self.deaths[place]}); trying again")
        return self.deaths[place] >= MAX_DEATHS


class _Undone:
    """Which (modality, shard) are still to be made: a bit each."""

    def __init__(self, lacking: Mapping[str, Iterable[np.ndarray]]) -> None:
        self.bits: dict[str, np.ndarray] = {}
        for name, parts in lacking.items():
            shards = np.concatenate([*parts, np.zeros(0, np.int64)])
            self.bits[name] = np.zeros(int(shards.max(initial=-1)) + 1, bool)
            self.bits[name][shards] = True

    def has(self, name: str, shard: int) -> bool:
        bits = self.bits.get(name)
        return bits is not None and shard < len(bits) and bool(bits[shard])

    def remove(self, names: Iterable[str], shard: int) -> None:
        for name in names:
            self.bits[name][shard] = False
