"""One way to configure, everywhere: a YAML file plus dotted overrides, checked by pydantic, unknown keys refused.

The resolved configuration is saved beside what it made. `Config` has one section per job; each section's model
stands beside the class that it configures.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, overload

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fourmill.modalities import unknown
from fourmill.model.config import PretrainConfig
from fourmill.pipeline.geometry import CropConfig
from fourmill.pipeline.store.settings import StoreSettings

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value and what would be right."""


class StageConfig(BaseModel):
    """Labelers and tokenizers that share one worker process, one decode, one set of resources."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labelers: tuple[str, ...] = ()
    """Names from `labelers`."""
    tokenizers: tuple[str, ...] = ()
    """Names from `tokenizers`; beside labelers they tokenize in the same pass."""
    store: tuple[str, ...] | None = None
    """Modalities to write; by default all that the stage makes. Leave bulky labels out of a fused stage here."""
    workers: int | None = Field(default=None, ge=1)
    """Worker processes; by default as many as the cluster's CPUs and GPUs allow, at most one per shard."""
    cpus: float = Field(default=1.0, gt=0)
    """CPUs that each worker reserves; it runs this many threads, at least one."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs that each worker reserves, fractions allowed; by default what its components want, if there are GPUs."""


class RayConfig(BaseModel):
    """Where the workers run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str = "auto"
    """'auto': RAY_ADDRESS if it is set (as in a submitted job), else a local Ray; 'local'; 'none': in this process,
    without Ray; or an address such as 'host:6379'."""
    num_cpus: int | None = None
    """CPUs of a local Ray; by default all."""
    concurrent_stages: bool | None = None
    """All stages at once, or one after another; by default at once if their workers fit in the cluster together."""


class Config(BaseModel):
    """A whole run: what to label, with what, where."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    """Root of the dataset: a path or s3://bucket/prefix."""
    storage: StoreSettings | None = None
    """How an S3 dataset is reached; what is not said here is taken from FOURMILL_S3_* and AWS_* variables."""
    corpus: str | None = None
    """Where the dataset was ingested from; for the reader, jobs do not use it."""
    crops: CropConfig = CropConfig()
    """The geometry that every teacher sees."""
    labelers: dict[str, dict[str, Any]] = {}
    """Name -> options; `kind` names the class where it differs from the name. See `fourmill labelers`."""
    tokenizers: dict[str, dict[str, Any]] = {}
    """Token modality -> options. See `fourmill tokenizers`."""
    stages: dict[str, StageConfig] = {}
    """By default one stage `labels` with all labelers and one stage `tokens` with all tokenizers."""
    ray: RayConfig = RayConfig()
    """The cluster."""
    max_failures: float = Field(default=0.01, ge=0, le=1)
    """A run stops when more than this share of a modality's rows had to be quarantined."""
    pretrain: PretrainConfig | None = None
    """The trainer's section."""

    def resolved_stages(self) -> dict[str, StageConfig]:
        """The stages, with the default ones where none are named."""
        if self.stages:
            return self.stages
        stages = {
            "labels": StageConfig(labelers=tuple(self.labelers)),
            "tokens": StageConfig(tokenizers=tuple(self.tokenizers)),
        }
        return {name: stage for name, stage in stages.items() if stage.labelers or stage.tokenizers}


@overload
def load_config(path: str | Path, overrides: Iterable[str] = ...) -> Config: ...
@overload
def load_config(path: str | Path, overrides: Iterable[str], model: type[Model]) -> Model: ...
def load_config(path: str | Path, overrides: Iterable[str] = (), model: type[BaseModel] = Config) -> BaseModel:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML), and check the result against `model`."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, not {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return check(tree, model, str(path))


def check(tree: Mapping[str, Any], model: type[Model], where: str) -> Model:
    """`tree` as a `model`, or a ConfigError with one line for each thing wrong."""
    try:
        return model.model_validate(dict(tree))
    except ValidationError as error:
        lines = [_explain(problem, model) for problem in error.errors()]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from error


def save_config(config: BaseModel) -> bytes:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode()


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r}: give a.b=value")
    *parents, last = path.split(".")
    for name in parents:
        child = tree.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {name} is {child!r}, not a section")
        tree = child
    try:
        tree[last] = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error


def _explain(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        parent = _model_at(model, problem["loc"][:-1])
        if parent is not None:
            return f"{where}: " + unknown("key", str(problem["loc"][-1]), list(parent.model_fields))
    if problem["type"] == "missing":
        return f"{where}: is required"
    return f"{where}: {problem['msg']} (it is {problem['input']!r})"


def _model_at(model: type[BaseModel], path: Iterable[Any]) -> type[BaseModel] | None:
    """The model that a location in the tree is checked against, through dictionaries, lists and optional fields."""
    found: Any = model
    for part in path:
        if isinstance(found, type) and issubclass(found, BaseModel):
            name = str(part)
            found = found.model_fields[name].annotation if name in found.model_fields else None
        else:  # an element of a dict or list
            found = next((a for a in reversed(typing.get_args(found)) if a is not type(None)), None)
        found = _without_none(found)
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation
