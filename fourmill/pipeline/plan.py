"""The plan: which (shard, stage) units are missing or stale, and why.

A modality's fingerprint for a shard is the digest of what made it: the lineage of its component and the
fingerprints of what the component read, back to the ingested bytes. Fingerprints stand in object names, so the plan
follows from one listing per modality, and does not depend on whether labels between a picture and its tokens were
stored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fourmill.config import Config, ConfigError, StageConfig
from fourmill.labelers import LABELERS
from fourmill.labelers.crop_settings import CropSettings, CropSettingsConfig
from fourmill.modalities import modality, unknown
from fourmill.pipeline.component import Component
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.shards import FORMAT, canonical, digest, parse_name, producer_id
from fourmill.pipeline.store import Store
from fourmill.tokenizers import TOKENIZERS

GEOMETRY = "geometry"  # the built-in first stage: it records the crops that all others apply
INGESTED = ("rgb", "alt_text", "source")


@dataclass(frozen=True)
class Unit:
    """One shard to be taken through one stage.

    `makes`: modality -> fingerprint, for what is missing. `inputs`: the stored modalities to read, likewise.
    `reasons`: why, per modality. `skip`: rows not to touch, key -> reason (they killed a worker before).
    """

    stage: str
    shard: int
    makes: Mapping[str, str]
    inputs: Mapping[str, str]
    reasons: Mapping[str, str] = field(default_factory=dict)
    rows: int = 0
    skip: Mapping[str, str] = field(default_factory=dict)

    def skipping(self, killers: Mapping[str, str]) -> Unit:
        return replace(self, skip={**self.skip, **killers})


@dataclass(frozen=True)
class Stage:
    """A stage ready to run: its components in order of dependence, and the modalities that it writes."""

    name: str
    components: tuple[Component, ...]
    stores: tuple[str, ...]
    config: StageConfig

    @property
    def makes(self) -> tuple[str, ...]:
        return tuple(m for c in self.components for m in c.makes)

    @property
    def reads(self) -> tuple[str, ...]:
        """Stored modalities it needs: what its components read and do not make among themselves."""
        wanted = {m for c in self.components for m in inputs_of(c)}
        return tuple(sorted(wanted - set(self.makes)))


@dataclass(frozen=True)
class Plan:
    """Stages in order of dependence, the units to do, and what is done already."""

    stages: tuple[Stage, ...]
    units: tuple[Unit, ...]
    wanted: Mapping[tuple[str, int], str]
    lineages: Mapping[str, dict[str, Any]]

    def of(self, stage: str) -> list[Unit]:
        return [u for u in self.units if u.stage == stage]

    def describe(self) -> str:
        """The plan in words, for `--dry-run`."""
        lines = []
        for stage in self.stages:
            units = self.of(stage.name)
            done = len({s for m, s in self.wanted if m in stage.stores}) - len(units)
            made = ", ".join(m if m in stage.stores else f"({m})" for m in stage.makes)
            lines.append(f"stage {stage.name}: {' + '.join(c.name for c in stage.components)} -> {made}")
            lines.append(f"  {len(units)} shards to do ({sum(u.rows for u in units)} samples), {done} done")
            lines += [f"  {count} x {reason}" for reason, count in _tally(units)]
        return "\n".join(lines)


def _tally(units: Iterable[Unit]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for unit in units:
        for name, reason in unit.reasons.items():
            counts[f"{name}: {reason}"] = counts.get(f"{name}: {reason}", 0) + 1
    return sorted(counts.items())


def inputs_of(component: Component) -> tuple[str, ...]:
    """What a component needs; whoever reads pictures reads them through the recorded crops."""
    reads = (*component.reads, *component.also_reads)
    return (*reads, "crop_settings") if "rgb" in reads and "crop_settings" not in reads else reads


def build_stages(config: Config) -> tuple[Stage, ...]:
    """The configuration's stages with their components, geometry first. ConfigError on names that do not fit."""
    crops = CropSettings("crop_settings", CropSettingsConfig(kind="crop_settings", crops=config.crops))
    stages = [Stage(GEOMETRY, (crops,), ("crop_settings",), StageConfig(cpus=1, gpus=0))]
    for name, stage in config.resolved_stages().items():
        if name == GEOMETRY:
            raise ConfigError(f"stages.{name}: this name is taken by the built-in stage; choose another")
        stages.append(_build_stage(name, stage, config))
    _check_unique(stages)
    return tuple(_in_order(stages))


def _build_stage(name: str, stage: StageConfig, config: Config) -> Stage:
    parts = [
        *(_component("labelers", LABELERS, n, config.labelers, name) for n in stage.labelers),
        *(_component("tokenizers", TOKENIZERS, n, config.tokenizers, name) for n in stage.tokenizers),
    ]
    if not parts:
        raise ConfigError(f"stages.{name}: names no labelers and no tokenizers")
    ordered = tuple(_components_in_order(parts))
    makes = [m for c in ordered for m in c.makes]
    for wanted in stage.store or ():
        if wanted not in makes:
            raise ConfigError(f"stages.{name}.store: {unknown('output', wanted, makes)}")
    return Stage(name, ordered, tuple(m for m in makes if stage.store is None or m in stage.store), stage)


def _component(section: str, registry: Any, name: str, options: Mapping[str, Any], stage: str) -> Component:
    if name not in options:
        raise ConfigError(f"stages.{stage}.{section}: {unknown(section[:-1], name, list(options))}")
    try:
        built: Component = registry.build(name, options[name] or {})
        built.lineage()  # resolves the checkpoint, so that a wrong path is found before anything runs
        if len({modality(made).per_crop for made in built.makes}) > 1:
            raise ValueError(f"makes {', '.join(built.makes)}: some have a value per crop, some one per sample")
    except ValueError as error:
        raise ConfigError(f"{section}.{name}: {error}") from error
    return built


def _check_unique(stages: Iterable[Stage]) -> None:
    makers: dict[str, str] = {}
    for stage in stages:
        for component in stage.components:
            for made in component.makes:
                if made in makers:
                    raise ConfigError(f"{made} is made twice: by {makers[made]} and by {stage.name}/{component.name}")
                makers[made] = f"{stage.name}/{component.name}"


def _components_in_order(parts: list[Component]) -> list[Component]:
    """Makers before readers; the configuration's order otherwise."""
    makers = {m: c for c in parts for m in c.makes}
    ordered: list[Component] = []

    def visit(component: Component, path: tuple[str, ...]) -> None:
        if component.name in path:
            raise ConfigError(f"components read one another in a circle: {' -> '.join([*path, component.name])}")
        for read in (*component.reads, *component.also_reads):
            if read in makers and makers[read] is not component:
                visit(makers[read], (*path, component.name))
        if component not in ordered:
            ordered.append(component)

    for part in parts:
        visit(part, ())
    return ordered


def _in_order(stages: list[Stage]) -> list[Stage]:
    makers = {m: s for s in stages for m in s.stores}
    ordered: list[Stage] = []

    def visit(stage: Stage, path: tuple[str, ...]) -> None:
        if stage.name in path:
            raise ConfigError(f"stages read one another in a circle: {' -> '.join([*path, stage.name])}")
        for read in stage.reads:
            if read in makers:
                visit(makers[read], (*path, stage.name))
            elif read not in INGESTED:
                hint = "it is made but not stored" if any(read in s.makes for s in stages) else "nothing makes it"
                raise ConfigError(f"stages.{stage.name} reads {read!r}, but {hint}")
        if stage not in ordered:
            ordered.append(stage)

    for stage in stages:
        visit(stage, ())
    return ordered


def make_plan(store: Store, manifest: Manifest, config: Config, only: Iterable[str] | None = None) -> Plan:
    """What must be done so that every stage (or every stage in `only`) has its outputs for every shard."""
    stages = build_stages(config)
    chosen = _chosen(stages, only)
    makers = {m: c for s in stages for c in s.components for m in c.makes}
    lineages = {m: c.lineage() for m, c in makers.items()}

    @functools.cache
    def fingerprint(name: str, shard: int) -> str:
        if name in INGESTED:
            return manifest.records[name, shard].fingerprint
        inputs = {m: fingerprint(m, shard) for m in inputs_of(makers[name])}
        parts = {"format": FORMAT, "modality": name, "lineage": content_of(lineages[name]), "inputs": inputs}
        return digest(canonical(parts))[:16]

    shards = [r.shard for r in manifest.of("rgb")]
    existing = {m: _existing(store, m) for s in chosen for m in s.stores}
    units, wanted = [], {}
    for stage in chosen:
        for shard in shards:
            names = {m: fingerprint(m, shard) for m in stage.stores}
            wanted.update({(m, shard): f for m, f in names.items()})
            missing = {m: f for m, f in names.items() if f not in existing[m].get(shard, ())}
            if missing:
                inputs = {m: fingerprint(m, shard) for m in stage.reads}
                reasons = {m: _reason(manifest, m, shard, existing[m], lineages[m]) for m in missing}
                units.append(Unit(stage.name, shard, missing, inputs, reasons, manifest.records["rgb", shard].rows))
    return Plan(chosen, tuple(units), wanted, {producer_id(content_of(v)): v for v in lineages.values()})


def _chosen(stages: tuple[Stage, ...], only: Iterable[str] | None) -> tuple[Stage, ...]:
    """The stages asked for and those before them that they read from."""
    if only is None:
        return stages
    chosen = {s.name for s in stages if s.name in set(only)}
    for stage in reversed(stages):
        if any(set(stage.stores) & set(s.reads) for s in stages if s.name in chosen):
            chosen.add(stage.name)
    return tuple(s for s in stages if s.name in chosen)


def content_of(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a lineage that determines the output: licences do not, and a checkpoint counts by digest, not by
    where it lay.

    This is also all that goes into a shard object, so that its bytes name no one's folders.
    """
    content = {name: value for name, value in lineage.items() if name != "licence"}
    if "checkpoint" in content:
        content["checkpoint"] = content["checkpoint"]["digest"]
    return content


def _existing(store: Store, name: str) -> dict[int, set[str]]:
    """Fingerprints with a record, by shard."""
    found: dict[int, set[str]] = {}
    for info in store.list(f"{name}/"):
        parsed = parse_name(info.name)
        if parsed and info.name.endswith(".json"):
            found.setdefault(parsed[1], set()).add(parsed[2])
    return found


def _reason(
    manifest: Manifest, name: str, shard: int, existing: Mapping[int, set[str]], lineage: Mapping[str, Any]
) -> str:
    if shard not in existing:
        return "missing"
    record = manifest.records.get((name, shard))
    old = manifest.producers.get(record.producer) if record else None
    if old is None:
        return "stale: made by another configuration"
    changes = _differences("", content_of(old), content_of(lineage))
    return "stale: " + ("; ".join(changes) if changes else "its inputs changed")


def _differences(path: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted({*old, *new})
        return [d for n in names for d in _differences(f"{path}.{n}".lstrip("."), old.get(n), new.get(n))]
    return [] if canonical(old) == canonical(new) else [f"{path} was {_short(old)}, is {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:20] + "…"
