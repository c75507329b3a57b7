"""Stages: the configuration's labelers and tokenizers, built, in order of dependence, the crops' geometry first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fourmill.config import Config, ConfigError, StageConfig
from fourmill.labelers import LABELERS
from fourmill.labelers.crop_settings import CropSettings, CropSettingsConfig
from fourmill.modalities import modality, unknown
from fourmill.pipeline.component import Component
from fourmill.pipeline.fingerprints import INGESTED
from fourmill.tokenizers import TOKENIZERS

GEOMETRY = "geometry"  # the built-in first stage: it records the crops that all others apply


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


def chosen_stages(stages: tuple[Stage, ...], only: Iterable[str] | None) -> tuple[Stage, ...]:
    """The stages asked for and those before them that they read from."""
    if only is None:
        return stages
    only = list(only)
    if strangers := [name for name in only if name not in {s.name for s in stages}]:
        raise ConfigError(unknown("stage", strangers[0], [s.name for s in stages]))
    chosen = {s.name for s in stages if s.name in set(only)}
    for stage in reversed(stages):
        if any(set(stage.stores) & set(s.reads) for s in stages if s.name in chosen):
            chosen.add(stage.name)
    return tuple(s for s in stages if s.name in chosen)
