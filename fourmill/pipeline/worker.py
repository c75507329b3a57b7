"""The worker: takes one shard through one stage, and commits one object per output modality.

It reads the shard's stored inputs, decodes each picture once, runs the stage's components on batches, and publishes.
A sample that cannot be processed becomes a null in its row and a reason in quarantine; it never shifts a row and never
takes its neighbours along. The same class runs inside a Ray actor and in the driver's own process.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from fourmill.config import Config
from fourmill.labelers import LABELERS
from fourmill.modalities import modality
from fourmill.pipeline import codecs, conventions
from fourmill.pipeline.batches import Batches
from fourmill.pipeline.component import Batch, Component, Failure
from fourmill.pipeline.decode import Picture, decoded
from fourmill.pipeline.fingerprints import content_of
from fourmill.pipeline.geometry import Crop, CropConfig
from fourmill.pipeline.plan import Plan, Unit
from fourmill.pipeline.shards import Record, Shard, Spec, commit, read_shard, record_of, shard_name, write_shard
from fourmill.pipeline.stages import Stage, inputs_of
from fourmill.pipeline.store import Store, StoreSettings, open_store
from fourmill.tokenizers import TOKENIZERS
from fourmill.tokenizers.base import Tokenizer


class SetupError(RuntimeError):
    """A worker that cannot start: retrying will not help, so the run stops and says why."""


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker needs to build its stage on any node: plain data."""

    stage: str
    dataset: str
    components: tuple[tuple[str, str, Mapping[str, Any]], ...]  # (section, name, options)
    producers: Mapping[str, Mapping[str, Any]]  # content of the lineage by component, as the driver saw it
    crops: CropConfig
    stores: tuple[str, ...]
    threads: int = 1
    gpus: float = 0.0  # reserved for it, for the account
    storage: StoreSettings | None = None

    @classmethod
    def of(cls, plan: Plan, stage: Stage, config: Config, gpus: float = 0.0) -> WorkerSpec:
        parts = tuple((_section(c), c.name, c.config.model_dump()) for c in stage.components)
        producers = {c.name: content_of(plan.producer(c)) for c in stage.components}
        threads = max(1, int(stage.config.cpus))
        parts_of = (stage.name, config.dataset, parts, producers, config.crops, stage.stores)
        return cls(*parts_of, threads, gpus, config.storage)


@dataclass(frozen=True)
class UnitResult:
    """What one unit came to: its records, and what was unusual."""

    unit: Unit
    records: tuple[Record, ...]
    seconds: float
    notes: tuple[str, ...] = ()


class _Outputs:
    """Values being collected for one shard: `columns[modality][crop][row]`, and reasons by modality and key; `busy`:
    seconds that it took, `seconds`: those spent in each component.

    Values are checked and settled at once, since other components may read them, and encoded by `pool` meanwhile.
    """

    def __init__(
        self, specs: Mapping[str, Spec], crops: Mapping[str, int], keys: list[str], pool: ThreadPoolExecutor
    ) -> None:
        self.specs, self.keys, self.pool = specs, keys, pool
        self.busy, self.seconds = 0.0, dict[str, float]()
        self.columns: dict[str, list[list[Any]]] = {m: [[None] * len(keys) for _ in range(crops[m])] for m in specs}
        self.quarantine: dict[str, dict[str, str]] = {m: {} for m in specs}

    def put(self, name: str, crop: int, row: int, key: str, value: Any) -> Any:
        """Record one value; returns it as a reader would see it, or None if there is none."""
        if isinstance(value, Failure):
            self.quarantine[name].setdefault(key, value.reason)
            return None
        if value is None:
            return None
        entry = modality(name)
        try:
            settled = codecs.settle(entry, value)
            conventions.check(entry, self.specs[name], settled)
        except conventions.ConventionError as error:
            self.quarantine[name].setdefault(key, str(error))
            return None
        except (ValueError, TypeError, KeyError) as error:
            self.quarantine[name].setdefault(key, f"unusable output: {error}")
            return None
        self.columns[name][crop][row] = self.pool.submit(codecs.encode, entry, settled)
        return settled

    def encoded(self, name: str) -> list[list[Any]]:
        """The modality's columns as they are stored."""
        return [[v.result() if isinstance(v, Future) else v for v in column] for column in self.columns[name]]


class Worker:
    """A stage's components, loaded once, and `run` for one unit after another."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.store: Store = open_store(spec.dataset, spec.storage)
        self.notes: list[str] = []
        self.components = self._load()
        self.specs = {m: c.spec(m) for c in self.components for m in c.makes}
        self.pool = ThreadPoolExecutor(spec.threads)  # decodes pictures and encodes labels
        self.transfers = ThreadPoolExecutor(4)  # a stage's inputs and outputs travel at once
        self.telling, self.retried = threading.Lock(), Counter[str]()
        self.computing = threading.Lock()  # one unit at a time: another may be downloaded or uploaded meanwhile

    def _load(self) -> list[Component]:
        try:
            components = [_build(*part) for part in self.spec.components]
            device = _prepare_torch(self.spec.threads)
            for component in components:
                self._check_lineage(component)
                component.load(device)
            self.batches = {c.name: Batches(c, device, self.spec.crops.size) for c in components}
        except Exception as error:
            raise SetupError(f"stage {self.spec.stage}: {type(error).__name__}: {error}") from error
        return components

    def _check_lineage(self, component: Component) -> None:
        """A checkpoint folder that differs on this node would make labels that the fingerprint does not describe."""
        mine, drivers = content_of(component.lineage()), dict(self.spec.producers[component.name])
        drivers.pop("inputs")
        if mine != drivers:
            raise ValueError(f"{component.name} is not the same here as on the driver: {mine} against {drivers}")

    def run(self, unit: Unit) -> UnitResult:
        """Make and commit what the unit lacks. Objects that another attempt has published already are adopted."""
        start = time.perf_counter()
        adopted = [r for m, f in unit.makes.items() if (r := self._adopt(m, unit.shard, f))]
        left = {m: f for m, f in unit.makes.items() if m not in {r.modality for r in adopted}}
        records, notes = list(adopted), list[str]()
        if left:
            try:
                made, notes = self._make(replace(unit, makes=left))
            except (ValueError, FileNotFoundError) as error:
                kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                raise kind(f"stage {unit.stage}, shard {unit.shard}: {error}") from error
            spent = {m: self._spent(unit, made, m, len(left)) for m in left}
            records += self.transfers.map(lambda m: self._commit(unit, m, made, spent[m]), left)
        notes += self._storage_notes()
        return UnitResult(unit, tuple(records), time.perf_counter() - start, tuple(notes))

    def _storage_notes(self) -> list[str]:
        """Storage requests that had to be tried again since the last unit."""
        with self.telling:
            told, self.retried = self.retried, Counter(self.store.counters.as_dict()["retries_by_kind"])
            return [f"{count} storage requests tried again: {kind}" for kind, count in (self.retried - told).items()]

    def _spent(self, unit: Unit, made: _Outputs, name: str, modalities: int) -> dict[str, float]:
        """What one modality's shard took of this worker: its component's time, and its share of what all need."""
        component = next(c for c in self.components if name in c.makes)
        own = made.seconds.get(component.name, 0.0) / sum(m in unit.makes for m in component.makes)
        shared = made.busy - sum(made.seconds.values())
        seconds = own + max(shared, 0.0) / modalities
        spent = {"seconds": round(seconds, 3), "attempts": unit.attempt}
        return {**spent, "gpu_seconds": round(seconds * self.spec.gpus, 3)} if self.spec.gpus else spent

    def probe(self, unit: Unit, start: int, stop: int) -> None:
        """Run rows start..stop without committing anything: does one of them kill this process?"""
        self._make(unit, start, stop)

    def _adopt(self, name: str, shard: int, fingerprint: str) -> Record | None:
        """An object without a record was published by a worker that died in between; its record follows from it."""
        object_name = shard_name(name, shard, fingerprint)
        if self.store.head(object_name) is None:
            return None
        record = record_of(self.store.get(object_name))
        self.store.create(shard_name(name, shard, fingerprint, "json"), record.to_json())
        return record

    def _make(self, unit: Unit, start: int = 0, stop: int | None = None) -> tuple[_Outputs, list[str]]:
        """Rows start..stop of all that the unit lacks, and what was unusual."""
        components = self._needed(unit.makes)
        names = self._reads(components)
        opened = self.transfers.map(lambda m: read_shard(self.store, shard_name(m, unit.shard, unit.inputs[m])), names)
        inputs = dict(zip(names, opened, strict=True))
        with self.computing:
            begun = time.perf_counter()
            outputs = self._computed(unit, components, inputs, start, stop)
            outputs.busy = time.perf_counter() - begun
            notes = [n for c in components for n in (*self.batches[c.name].take_notes(), *c.take_notes())]
        return outputs, notes

    def _computed(
        self, unit: Unit, components: Sequence[Component], inputs: Mapping[str, Shard], start: int, stop: int | None
    ) -> _Outputs:
        keys = _common_keys(inputs)
        outputs = self._blank(components, keys)
        rows = [i for i in range(start, len(keys) if stop is None else stop) if keys[i] not in unit.skip]
        for key, reason in unit.skip.items():
            for name in outputs.columns:
                outputs.quarantine[name][key] = reason
        for chunk_rows, pictures in self._decoded(rows, inputs, components):
            once: dict[str, dict[int, Any]] = {}  # what has one value for all crops is made with the first
            for crop in range(self.spec.crops.count):
                made = self._run_chunk(components, inputs, keys, chunk_rows, pictures, crop, outputs, once)
                once = {m: values for m, values in made.items() if not modality(m).per_crop}
        return outputs

    def _needed(self, makes: Mapping[str, str]) -> list[Component]:
        """The components that make what is missing, and those of this stage that they read from."""
        wanted, needed = set(makes), []
        for component in reversed(self.components):
            if wanted & set(component.makes):
                wanted |= {*component.reads, *component.also_reads}
                needed.append(component)
        return needed[::-1]

    def _reads(self, components: Sequence[Component]) -> list[str]:
        made = {m for c in components for m in c.makes}
        return sorted({m for c in components for m in inputs_of(c)} - made)

    def _blank(self, components: Sequence[Component], keys: list[str]) -> _Outputs:
        specs = {m: self.specs[m] for c in components for m in c.makes}
        crops = {m: self.spec.crops.count if modality(m).per_crop else 1 for m in specs}
        return _Outputs(specs, crops, keys, self.pool)

    def _decoded(
        self, rows: list[int], inputs: Mapping[str, Shard], components: Sequence[Component]
    ) -> Iterator[tuple[Sequence[int], Mapping[int, Picture]]]:
        """The rows in chunks of the largest batch, each with its pictures if any component looks at them."""
        size = max(self.batches[c.name].size for c in components)
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        if not any("rgb" in c.reads for c in components):
            return ((chunk, {}) for chunk in chunks)
        crops = self.spec.crops
        return decoded(chunks, inputs["rgb"], inputs["crop_settings"], crops.count, crops.size, self.pool)

    def _run_chunk(
        self,
        components: Sequence[Component],
        inputs: Mapping[str, Shard],
        keys: list[str],
        rows: Sequence[int],
        pictures: Mapping[int, Picture],
        crop: int,
        outputs: _Outputs,
        once: Mapping[str, dict[int, Any]],
    ) -> dict[str, dict[int, Any]]:
        made = dict(once)
        for component in components:
            if all(m in once for m in component.makes):
                continue
            wanted = [m for m in (*component.reads, *component.also_reads) if m != "rgb"]
            views = {m: made[m] if m in made else _view(inputs[m], rows, crop) for m in wanted}
            needed = [m for m in component.reads if m != "rgb"]
            ready = [r for r in rows if all(views[m].get(r) is not None for m in needed)]
            if "rgb" in component.reads:
                for row in (r for r in ready if isinstance(pictures.get(r), Failure)):
                    for name in component.makes:
                        outputs.put(name, crop, row, keys[row], pictures[row])
                ready = [r for r in ready if isinstance(pictures.get(r), list)]
            made.update({m: {} for m in component.makes})
            batches = self.batches[component.name]
            while ready:
                part, ready = ready[: batches.size], ready[batches.size :]
                batch = self._batch(component, inputs, keys, part, pictures, views, crop)
                begun = time.perf_counter()
                results = batches.run(batch)
                took = time.perf_counter() - begun
                outputs.seconds[component.name] = outputs.seconds.get(component.name, 0.0) + took
                for name, values in results.items():
                    for row, value in zip(part, values, strict=True):
                        made[name][row] = outputs.put(name, crop, row, keys[row], value)
        return made

    def _batch(
        self,
        component: Component,
        inputs: Mapping[str, Shard],
        keys: list[str],
        rows: list[int],
        pictures: Mapping[int, Picture],
        views: Mapping[str, Mapping[int, Any]],
        crop: int,
    ) -> Batch:
        pixels, crops = None, []
        if "rgb" in component.reads:
            found = [cast(list[np.ndarray], pictures[r]) for r in rows]
            pixels = np.stack([p[crop] for p in found]).transpose(0, 3, 1, 2)
            crops = [Crop(*map(int, inputs["crop_settings"].value(r, crop))) for r in rows]
        seen = {m: [v.get(r) for r in rows] for m, v in views.items()}
        return Batch([keys[r] for r in rows], pixels, seen, crops, crop)

    def _commit(self, unit: Unit, name: str, outputs: _Outputs, spent: Mapping[str, float]) -> Record:
        component = next(c for c in self.components if name in c.makes)
        columns = outputs.encoded(name)
        spec = replace(self.specs[name], crops=len(columns))
        producer, faults = self.spec.producers[component.name], outputs.quarantine[name]
        data = write_shard(name, unit.shard, unit.makes[name], outputs.keys, columns, spec, producer, faults)
        return commit(self.store, data, spent)


def _prepare_torch(threads: int) -> str:
    """The device to load onto. A stage without networks has not imported torch, and starts seconds sooner without."""
    if "torch" not in sys.modules:
        return "cpu"
    import torch

    torch.set_num_threads(threads)  # more threads than reserved CPUs fight one another
    return "cuda" if torch.cuda.is_available() else "cpu"


def _section(component: Component) -> str:
    return "tokenizers" if isinstance(component, Tokenizer) else "labelers"


def _build(section: str, name: str, options: Mapping[str, Any]) -> Component:
    return (TOKENIZERS if section == "tokenizers" else LABELERS).build(name, options)


def _common_keys(inputs: Mapping[str, Shard]) -> list[str]:
    """The keys all inputs share; a difference means that a row would be paired with another sample's."""
    (first, shard), *others = inputs.items()
    keys = shard.keys
    for name, other in others:
        if other.keys != keys:
            raise ValueError(f"{name} does not hold the same keys in the same order as {first}")
    return keys


def _view(shard: Shard, rows: Sequence[int], crop: int) -> dict[int, Any]:
    """Decoded values by row, for the rows asked for; modalities without crops have one value for all crops."""
    index = crop if shard.entry.per_crop else 0
    return {row: shard.value(row, index) for row in rows}
