"""The runner: hands the plan's units to workers until nothing is missing. The only module that imports Ray.

Kill anything: a worker that dies is replaced and its unit tried again; a unit that keeps killing its worker is searched
for the sample that does it, which is quarantined; a driver that dies is run again and finds what is missing. Nothing
but unit descriptions travels between processes.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourmill.config import Config, ConfigError, save_config
from fourmill.pipeline.manifest import Manifest, read_manifest, update_manifest
from fourmill.pipeline.plan import Plan, Stage, Unit, make_plan
from fourmill.pipeline.progress import Progress
from fourmill.pipeline.shards import Record, digest, shard_name
from fourmill.pipeline.store import Store, open_store
from fourmill.pipeline.worker import SetupError, UnitResult, Worker, WorkerSpec

_MAX_DEATHS = 2  # times a unit may lose its worker before its samples are searched for the cause
_MAX_ERRORS = 2  # times a unit may fail with an exception before it is left for the next run
_STALLED_S = 60.0  # say so when nothing has started for this long


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
        units = len(self.plan.units)
        lines = [
            f"{units - len(self.failed)} of {units} units done in {self.seconds:.1f} s; "
            f"snapshot {self.manifest.snapshot}"
        ]
        for name, reasons in sorted(self.quarantined.items()):
            lines.append(f"quarantined in {name}: " + ", ".join(f"{n} x {r}" for r, n in sorted(reasons.items())))
        lines += [f"FAILED {stage} shard {shard}: {why}" for (stage, shard), why in sorted(self.failed.items())]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def run(config: Config, only: list[str] | None = None) -> RunReport:
    """Make what is missing for every stage (or those in `only`, and what they need), and update the manifest."""
    store = open_store(config.dataset)
    plan = make_plan(store, read_manifest(store), config, only)
    report = RunReport(plan, Manifest())
    records: dict[tuple[str, int], Record] = {}
    start = time.monotonic()
    try:
        with Progress(plan) as progress:
            if plan.units:
                resolved = save_config(config)
                store.create(f"manifest/config-{digest(resolved)[:16]}.yaml", resolved)
                _Driver(config, plan, progress, report, records).run()
    finally:
        report.seconds = time.monotonic() - start
        report.manifest = _publish(store, plan, records)
    return report


def _publish(store: Store, plan: Plan, fresh: Mapping[tuple[str, int], Record]) -> Manifest:
    """A snapshot that selects, for every (modality, shard) of the plan that exists, the fingerprint the plan wants."""

    def change(old: Manifest) -> Manifest:
        known = {place: record.fingerprint for place, record in old.records.items()}
        unknown = [(*place, f) for place, f in plan.wanted.items() if place not in fresh and known.get(place) != f]
        with ThreadPoolExecutor(16) as pool:  # after a kill there can be thousands, each a request
            found = pool.map(lambda item: _stored_record(store, *item), unknown)
            return old.including([*fresh.values(), *(r for records in found for r in records)], plan.lineages)

    return update_manifest(store, change)


def _stored_record(store: Store, name: str, shard: int, fingerprint: str) -> list[Record]:
    try:
        return [Record.from_json(store.get(shard_name(name, shard, fingerprint, "json")))]
    except FileNotFoundError:
        return []


class _Driver:
    """The scheduling loop over one plan."""

    def __init__(
        self, config: Config, plan: Plan, progress: Progress, report: RunReport, records: dict[tuple[str, int], Record]
    ) -> None:
        self.config, self.plan, self.progress, self.report, self.records = config, plan, progress, report, records
        self.waiting = {s.name: deque(plan.of(s.name)) for s in plan.stages}
        self.undone = {(m, u.shard) for u in plan.units for m in u.makes}
        self.deaths: dict[tuple[str, int], int] = {}
        self.errors: dict[tuple[str, int], int] = {}

    def run(self) -> None:
        if self.config.ray.address == "none":
            for stage in self.plan.stages:
                self._run_here(stage)
            return
        with ray_session(self.config) as ray:
            stages = [s for s in self.plan.stages if self.waiting[s.name]]
            sizes = {s.name: _pool_size(ray, s, len(self.waiting[s.name])) for s in stages}
            fit = _fit_together(ray, stages, sizes)
            together = self.config.ray.concurrent_stages
            together = fit if together is None else together
            for group in [stages] if together else [[s] for s in stages]:
                _Pools(self, ray, group, sizes, tight=not fit).run()

    def _run_here(self, stage: Stage) -> None:
        units = self.waiting[stage.name]
        if not units:
            return
        worker = Worker(WorkerSpec.of(stage, self.config.dataset, self.config.crops))
        self.progress.stages[stage.name].workers = 1
        while unit := self.next_unit(stage.name):
            self.progress.began(stage.name)
            try:
                result = worker.run(unit)
            except Exception as error:
                self.erred(unit, error)
            else:
                self.finished(result)

    def next_unit(self, stage: str) -> Unit | None:
        """The first waiting unit whose inputs are all there; units whose inputs failed are dropped as failed too."""
        units = self.waiting[stage]
        for _ in range(len(units)):
            unit = units.popleft()
            lacking = [m for m in unit.inputs if (m, unit.shard) in self.undone]
            if not lacking:
                return unit
            if any(
                (s.name, unit.shard) in self.report.failed for s in self.plan.stages if set(lacking) & set(s.stores)
            ):
                self.give_up(unit, f"its input {lacking[0]} could not be made")
            else:
                units.append(unit)
        return None

    def finished(self, result: UnitResult) -> None:
        unit = result.unit
        self.undone -= {(m, unit.shard) for m in unit.makes}
        self.records.update({(r.modality, r.shard): r for r in result.records})
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
            self.waiting[unit.stage].appendleft(unit)

    def give_up(self, unit: Unit, why: str) -> None:
        self.report.failed[unit.stage, unit.shard] = why
        self.progress.stages[unit.stage].failed += 1

    def died(self, unit: Unit) -> bool:
        """A worker died under this unit; True when it has done so often enough to look for the sample that kills."""
        place = (unit.stage, unit.shard)
        self.deaths[place] = self.deaths.get(place, 0) + 1
        self.progress.stages[unit.stage].retried += 1
        self.progress.say(f"{unit.stage} shard {unit.shard}: its worker died (time {self.deaths[place]}); trying again")
        return self.deaths[place] >= _MAX_DEATHS


@dataclass
class _Search:
    """Halving a unit's rows to find those that kill a worker. `spans` are still to be probed."""

    unit: Unit
    spans: list[tuple[int, int]]
    killers: list[int] = field(default_factory=list)


class _Pools:
    """Ray actors for a group of stages that run at once.

    Actors are made when their stage has a unit for them, and let go when it is finished. Where the cluster is too small
    for all stages' actors together (`tight`), idle ones are let go too, so that no stage waits for another's.
    """

    def __init__(self, driver: _Driver, ray: Any, stages: list[Stage], sizes: Mapping[str, int], tight: bool) -> None:
        self.driver, self.ray, self.sizes, self.tight = driver, ray, sizes, tight
        self.stages = {s.name: s for s in stages}
        self.specs = {s.name: ray.put(WorkerSpec.of(s, driver.config.dataset, driver.config.crops)) for s in stages}
        self.idle: dict[str, list[Any]] = {s.name: [] for s in stages}
        self.busy: dict[Any, tuple[str, Any, Unit, tuple[int, int] | None]] = {}
        self.searches: dict[tuple[str, int], _Search] = {}
        self.last_event = time.monotonic()

    def run(self) -> None:
        try:
            while True:
                self._assign()
                if not self.busy:
                    break
                self._collect()
        finally:
            for actor in [a for actors in self.idle.values() for a in actors] + [b[1] for b in self.busy.values()]:
                self.ray.kill(actor)

    def _actor(self, stage: Stage) -> Any:
        gpus = _gpus(self.ray, stage)
        options = {"num_cpus": stage.config.cpus, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        return self.ray.remote(Worker).options(**options).remote(self.specs[stage.name])

    def _assign(self) -> None:
        """Give every stage's idle or still missing actors a unit, and let go of actors that have none to come."""
        for name, stage in self.stages.items():
            working = sum(b[0] == name for b in self.busy.values())
            while working < self.sizes[name] and (task := self._next_task(name)):
                unit, span = task
                actor = self.idle[name].pop() if self.idle[name] else self._actor(stage)
                call = actor.run.remote(unit) if span is None else actor.probe.remote(unit, *span)
                self.busy[call] = (name, actor, unit, span)
                self.driver.progress.began(name)
                working += 1
            if self.tight or not (self.driver.waiting[name] or working):
                while self.idle[name]:
                    self.ray.kill(self.idle[name].pop())
            self.driver.progress.stages[name].workers = working + len(self.idle[name])

    def _next_task(self, stage: str) -> tuple[Unit, tuple[int, int] | None] | None:
        for search in self.searches.values():
            if search.unit.stage == stage and search.spans:
                return search.unit, search.spans.pop()
        unit = self.driver.next_unit(stage)
        return (unit, None) if unit else None

    def _collect(self) -> None:
        ready, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=1.0)
        for call in ready:
            self.last_event = time.monotonic()
            name, actor, unit, span = self.busy.pop(call)
            try:
                result = self.ray.get(call)
            except self.ray.exceptions.ActorDiedError as error:
                if isinstance(error.__cause__, SetupError) or "SetupError" in str(error):
                    raise SetupError(_reason_of(error)) from error
                self._on_death(unit, span)
            except self.ray.exceptions.ActorUnavailableError:
                self.ray.kill(actor)
                self._on_death(unit, span)
            except self.ray.exceptions.RayTaskError as error:
                self.idle[name].append(actor)
                if span is None:
                    self.driver.erred(unit, error.cause if isinstance(error.cause, Exception) else error)
            else:
                self.idle[name].append(actor)
                if span is None:
                    self.driver.finished(result)
            if span is not None:
                self._probed(unit)
        self.driver.progress.tick()
        self._warn_if_stalled()

    def _on_death(self, unit: Unit, span: tuple[int, int] | None) -> None:
        place = (unit.stage, unit.shard)
        if span is not None:
            start, stop = span
            middle = (start + stop) // 2
            search = self.searches[place]
            if stop - start == 1:
                search.killers.append(start)
            else:
                search.spans += [(start, middle), (middle, stop)]
        elif self.driver.died(unit):
            self.driver.progress.say(f"{unit.stage} shard {unit.shard}: looking for the sample that kills its worker")
            self.searches[place] = _Search(unit, [(0, unit.rows)])
        else:
            self.driver.waiting[unit.stage].appendleft(unit)

    def _probed(self, unit: Unit) -> None:
        """When a search has nothing left to probe, the unit runs again without the samples that were found."""
        place = (unit.stage, unit.shard)
        search = self.searches[place]
        if search.spans or any(b[2] is unit and b[3] for b in self.busy.values()):
            return
        del self.searches[place]
        if not search.killers and self.driver.deaths[place] >= 3 * _MAX_DEATHS:
            self.driver.give_up(unit, f"its worker died {self.driver.deaths[place]} times, by no single sample")
            return
        store = open_store(self.driver.config.dataset)
        keys = _keys_of(store, unit)
        killers = {keys[row]: f"killed its worker: {unit.stage} died on this sample alone" for row in search.killers}
        self.driver.progress.say(
            f"{unit.stage} shard {unit.shard}: {len(killers)} samples kill their worker: {list(killers)}"
        )
        self.driver.report.notes.append(
            f"{unit.stage} shard {unit.shard}: quarantined {list(killers)}: they kill their worker"
        )
        self.driver.waiting[unit.stage].appendleft(unit.skipping(killers))

    def _warn_if_stalled(self) -> None:
        if time.monotonic() - self.last_event > _STALLED_S:
            self.last_event = time.monotonic()
            free, total = self.ray.available_resources(), self.ray.cluster_resources()
            want = {n: {"cpus": s.config.cpus, "gpus": _gpus(self.ray, s)} for n, s in self.stages.items()}
            brief = {k: (free.get(k, 0), total[k]) for k in ("CPU", "GPU") if k in total}
            self.driver.progress.say(
                f"no shard finished for {_STALLED_S:.0f} s; workers want {want}, (free, all): {brief}"
            )


def _keys_of(store: Store, unit: Unit) -> list[str]:
    from fourmill.pipeline.shards import read_shard

    name, fingerprint = next(iter(unit.inputs.items()))
    return read_shard(store, shard_name(name, unit.shard, fingerprint)).keys


def _reason_of(error: Exception) -> str:
    """The last line of a remote traceback: the sentence meant for the user."""
    lines = [line for line in str(error).splitlines() if "SetupError" in line]
    return lines[-1].split("SetupError:", 1)[-1].strip() if lines else str(error)


@contextmanager
def ray_session(config: Config) -> Iterator[Any]:
    """Ray connected as configured, and left as it was found; None where the configuration wants no Ray."""
    if config.ray.address == "none":
        yield None
        return
    import ray

    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers without GPUs must not see them
    address = config.ray.address
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "local")
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "configure_logging": False}
    package = Path(__file__).parent.parent
    if address == "local":
        # Without this, workers import whatever fourmill their interpreter finds, not the one this driver runs.
        options |= {"num_cpus": config.ray.num_cpus, "include_dashboard": False}
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": _path_first(str(package.parent))}}
    elif "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        options["runtime_env"] = {"py_modules": [str(package)]}  # a submitted job's working_dir brings it already
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise ConfigError(f"ray.address={config.ray.address!r}: no Ray cluster answers there: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _path_first(folder: str) -> str:
    rest = os.environ.get("PYTHONPATH", "")
    return f"{folder}{os.pathsep}{rest}" if rest else folder


def _gpus(ray: Any, stage: Stage) -> float:
    if stage.config.gpus is not None:
        return stage.config.gpus
    wanted = max((c.gpus for c in stage.components), default=0.0)
    return wanted if ray.cluster_resources().get("GPU", 0) >= wanted else 0.0


def _pool_size(ray: Any, stage: Stage, units: int) -> int:
    """Configured, or as many as the cluster's CPUs and GPUs hold, at most one per unit."""
    if stage.config.workers is not None:
        return min(stage.config.workers, units)
    resources = ray.cluster_resources()
    room = resources.get("CPU", 0) / stage.config.cpus
    if gpus := _gpus(ray, stage):
        room = min(room, resources["GPU"] / gpus)
    if room < 1:
        raise ConfigError(
            f"stages.{stage.name}: a worker wants {stage.config.cpus} CPUs and {_gpus(ray, stage)} GPUs; "
            f"the cluster has {resources.get('CPU', 0)} and {resources.get('GPU', 0)}"
        )
    return max(1, min(int(room), units))


def _fit_together(ray: Any, stages: list[Stage], sizes: Mapping[str, int]) -> bool:
    resources = ray.cluster_resources()
    cpus = sum(sizes[s.name] * s.config.cpus for s in stages)
    gpus = sum(sizes[s.name] * _gpus(ray, s) for s in stages)
    return cpus <= resources.get("CPU", 0) and gpus <= resources.get("GPU", 0)


def dry_run(config: Config, only: list[str] | None = None) -> str:
    """The plan in words; nothing is done."""
    store = open_store(config.dataset)
    return make_plan(store, read_manifest(store), config, only).describe()
