"""The runner: hands the plan's units to workers until nothing is missing. The only module that imports Ray.

Kill anything: a worker that dies is replaced and its unit tried again; a unit that keeps killing its worker is searched
for the sample that does it, which is quarantined; a driver that dies is run again and finds what is missing. Nothing
but unit descriptions travels between processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourmill.config import Config, ConfigError, save_config
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.plan import Plan, Unit, make_plan
from fourmill.pipeline.progress import Progress
from fourmill.pipeline.schedule import MAX_DEATHS, BudgetExceededError, Publisher, RunReport, Schedule
from fourmill.pipeline.shards import digest, shard_name
from fourmill.pipeline.stages import Stage
from fourmill.pipeline.store import S3Store, Store, open_store
from fourmill.pipeline.worker import SetupError, UnitResult, Worker, WorkerSpec

__all__ = ["BudgetExceededError", "RunReport", "dry_run", "plan_of", "ray_session", "run"]

_STALLED_S = 60.0  # say so when nothing has started for this long


def run(config: Config, only: Sequence[str] | None = None, recheck: bool = False) -> RunReport:
    """Make what is missing for every stage (or those in `only`, and what they need), and update the manifest."""
    store = open_store(config.dataset, config.storage)
    manifest = read_manifest(store)
    plan = make_plan(store, manifest, config, only, recheck)
    report = RunReport(plan, manifest)
    publisher = Publisher(store, plan, manifest)
    start = time.monotonic()
    try:
        with Progress(plan) as progress:
            if plan.num_units:
                resolved = save_config(config)
                store.create(f"manifest/config-{digest(resolved)[:16]}.yaml", resolved)
                if isinstance(store, S3Store):  # its conditional writes are tried once, not by each worker
                    config = config.model_copy(update={"storage": store.settle()})
                _work(config, Schedule(config, plan, progress, report, publisher), _depth(store))
    finally:
        report.seconds = time.monotonic() - start
        report.manifest = publisher.finish()
    return report


def _depth(store: Store) -> int:
    """Units that a worker holds at once: with a second one, downloads and uploads go on while the first is computed."""
    return 2 if store.local_path("rgb") is None else 1


def _work(config: Config, schedule: Schedule, depth: int) -> None:
    if config.ray.address == "none":
        for stage in schedule.plan.stages:
            _run_here(config, schedule, stage, depth)
        return
    with ray_session(config) as ray:
        stages = [s for s in schedule.plan.stages if schedule.waiting[s.name]]
        sizes = {s.name: _pool_size(ray, s, schedule.waiting[s.name].left) for s in stages}
        fit = _fit_together(ray, stages, sizes)
        together = config.ray.concurrent_stages
        together = fit if together is None else together
        for group in [stages] if together else [[s] for s in stages]:
            _Pools(schedule, ray, group, sizes, tight=not fit, depth=depth).run()


def _run_here(config: Config, schedule: Schedule, stage: Stage, depth: int) -> None:
    """One stage in this process, `depth` units at once."""
    if not schedule.waiting[stage.name]:
        return
    worker = Worker(WorkerSpec.of(schedule.plan, stage, config))
    schedule.progress.stages[stage.name].workers = 1
    running: dict[Future[UnitResult], Unit] = {}
    with ThreadPoolExecutor(depth, thread_name_prefix="unit") as pool:
        while True:
            while len(running) < depth and (unit := schedule.next_unit(stage.name)):
                schedule.progress.began(stage.name)
                running[pool.submit(worker.run, unit)] = unit
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                error = future.exception()
                if isinstance(error, Exception):
                    schedule.erred(unit, error)
                else:
                    schedule.finished(future.result())


@dataclass
class _Search:
    """Halving a unit's rows to find those that kill a worker. `spans` are still to be probed."""

    unit: Unit
    spans: list[tuple[int, int]]
    killers: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Actor:
    """A worker process. `calls`: how many it has; `alone`: one of them may kill it, and must not take others along."""

    handle: Any
    calls: int = 0
    alone: bool = False


@dataclass(frozen=True)
class _Call:
    """A unit, or a span of its rows that is only tried, on an actor."""

    actor: _Actor
    unit: Unit
    span: tuple[int, int] | None

    @property
    def suspicious(self) -> bool:
        return self.span is not None or self.unit.attempt > 1


class _Pools:
    """Ray actors for a group of stages that run at once.

    Actors are made when their stage has a unit for them, and let go when it is finished. Where the cluster is too small
    for all stages' actors together (`tight`), idle ones are let go too, so that no stage waits for another's.
    """

    def __init__(
        self, schedule: Schedule, ray: Any, stages: list[Stage], sizes: Mapping[str, int], tight: bool, depth: int
    ) -> None:
        self.schedule, self.ray, self.sizes, self.tight, self.depth = schedule, ray, sizes, tight, depth
        self.stages = {s.name: s for s in stages}
        self.actors: dict[str, list[_Actor]] = {s.name: [] for s in stages}
        self.busy: dict[Any, _Call] = {}
        self.searches: dict[tuple[str, int], _Search] = {}
        self.last_event = time.monotonic()
        specs = {s.name: WorkerSpec.of(schedule.plan, s, schedule.config, _gpus(ray, s)) for s in stages}
        self.specs = {name: ray.put(spec) for name, spec in specs.items()}

    def run(self) -> None:
        try:
            while True:
                self._assign()
                if not self.busy:
                    break
                self._collect()
        finally:
            for actor in [a for actors in self.actors.values() for a in actors]:
                self.ray.kill(actor.handle)

    def _start(self, name: str) -> _Actor:
        stage = self.stages[name]
        options = {"num_cpus": stage.config.cpus, "num_gpus": _gpus(self.ray, stage)}
        limits = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": self.depth}
        actor = _Actor(self.ray.remote(Worker).options(**options, **limits).remote(self.specs[name]))
        self.actors[name].append(actor)
        return actor

    def _assign(self) -> None:
        """Give every stage's actors units to do, and let go of actors that have none to come."""
        for name, actors in self.actors.items():
            while (has_room := self._room(name)) and (task := self._next_task(name, alone=has_room == "idle")):
                self._send(name, *task)
            if self.tight or not (self.schedule.waiting[name] or any(a.calls for a in actors)):
                for actor in [a for a in actors if not a.calls]:
                    self._let_go(name, actor)
            self.schedule.progress.stages[name].workers = len(actors)

    def _room(self, name: str) -> str:
        """'idle': there is, or may be, an actor without a call; 'shared': only beside another call; '' for none."""
        actors = self.actors[name]
        if len(actors) < self.sizes[name] or any(not a.calls for a in actors):
            return "idle"
        return "shared" if any(a.calls < self.depth and not a.alone for a in actors) else ""

    def _send(self, name: str, unit: Unit, span: tuple[int, int] | None) -> None:
        actors = self.actors[name]
        actor = next((a for a in actors if not a.calls), None)
        if actor is None and len(actors) < self.sizes[name]:
            actor = self._start(name)
        if actor is None:
            actor = min((a for a in actors if not a.alone), key=lambda a: a.calls)
        call = _Call(actor, unit, span)
        actor.calls, actor.alone = actor.calls + 1, call.suspicious
        handle = actor.handle
        sent = handle.run.remote(unit) if span is None else handle.probe.remote(unit, *span)
        self.busy[sent] = call
        self.schedule.progress.began(name)

    def _let_go(self, name: str, actor: _Actor) -> None:
        self.ray.kill(actor.handle)
        self._forget(name, actor)

    def _forget(self, name: str, actor: _Actor) -> None:
        if actor in self.actors[name]:
            self.actors[name].remove(actor)

    def _next_task(self, stage: str, alone: bool) -> tuple[Unit, tuple[int, int] | None] | None:
        """A span to probe or a unit; what may kill its worker only where it can have one to itself (`alone`)."""
        for search in self.searches.values():
            if alone and search.unit.stage == stage and search.spans:
                return search.unit, search.spans.pop()
        if self.schedule.waiting[stage].again and not alone:
            return None
        unit = self.schedule.next_unit(stage)
        return (unit, None) if unit else None

    def _collect(self) -> None:
        ready, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=1.0)
        for sent in ready:
            self.last_event = time.monotonic()
            call = self.busy.pop(sent)
            actor, unit, span = call.actor, call.unit, call.span
            actor.calls, actor.alone = actor.calls - 1, False
            try:
                result = self.ray.get(sent)
            except self.ray.exceptions.ActorDiedError as error:
                if isinstance(error.__cause__, SetupError) or "SetupError" in str(error):
                    raise SetupError(_reason_of(error)) from error
                self._forget(unit.stage, actor)
                self._on_death(unit, span)
            except self.ray.exceptions.ActorUnavailableError:
                self._let_go(unit.stage, actor)
                self._on_death(unit, span)
            except self.ray.exceptions.RayTaskError as error:
                if span is None:
                    self.schedule.erred(unit, error.cause if isinstance(error.cause, Exception) else error)
            else:
                if span is None:
                    self.schedule.finished(result)
            if span is not None:
                self._probed(unit)
        self.schedule.progress.tick()
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
        elif self.schedule.died(unit):
            self.schedule.progress.say(f"{unit.stage} shard {unit.shard}: looking for the sample that kills its worker")
            self.searches[place] = _Search(unit, [(0, unit.rows)])
        else:
            self.schedule.put_back(unit)

    def _probed(self, unit: Unit) -> None:
        """When a search has nothing left to probe, the unit runs again without the samples that were found."""
        place = (unit.stage, unit.shard)
        search = self.searches[place]
        if search.spans or any(b.unit is unit and b.span for b in self.busy.values()):
            return
        del self.searches[place]
        if not search.killers and self.schedule.deaths[place] >= 3 * MAX_DEATHS:
            self.schedule.give_up(unit, f"its worker died {self.schedule.deaths[place]} times, by no single sample")
            return
        keys = _keys_of(self.schedule.publisher.store, unit)
        killers = {keys[row]: f"killed its worker: {unit.stage} died on this sample alone" for row in search.killers}
        self.schedule.progress.say(
            f"{unit.stage} shard {unit.shard}: {len(killers)} samples kill their worker: {list(killers)}"
        )
        self.schedule.report.notes.append(
            f"{unit.stage} shard {unit.shard}: quarantined {list(killers)}: they kill their worker"
        )
        self.schedule.put_back(unit.skipping(killers))

    def _warn_if_stalled(self) -> None:
        if time.monotonic() - self.last_event > _STALLED_S:
            self.last_event = time.monotonic()
            free, total = self.ray.available_resources(), self.ray.cluster_resources()
            want = {n: {"cpus": s.config.cpus, "gpus": _gpus(self.ray, s)} for n, s in self.stages.items()}
            brief = {k: (free.get(k, 0), total[k]) for k in ("CPU", "GPU") if k in total}
            self.schedule.progress.say(
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


def plan_of(config: Config, only: Sequence[str] | None = None, recheck: bool = False) -> Plan:
    """What a run would do; nothing is done."""
    store = open_store(config.dataset, config.storage)
    return make_plan(store, read_manifest(store), config, only, recheck)


def dry_run(config: Config, only: Sequence[str] | None = None, recheck: bool = False) -> str:
    """The plan in words; nothing is done."""
    return plan_of(config, only, recheck).describe()
