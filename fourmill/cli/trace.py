"""`fourmill trace`: which samples a step of a training run was trained on, or will be."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from fourmill.cli.options import AsJson, Overrides, console

if TYPE_CHECKING:
    from fourmill.model.config import PretrainConfig
    from fourmill.model.loader import Traced
    from fourmill.pipeline.store import StoreSettings


def trace(
    step: Annotated[int, typer.Option(help="The step; the first is 0.", min=0)],
    overrides: Overrides = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="YAML configuration of the run.")] = None,
    run: Annotated[str | None, typer.Option(help="Or the run's folder or s3:// URI, finished or not.")] = None,
    as_json: AsJson = False,
) -> int:
    """Which dataset, shard, row, key and crop each sample of a training step is, in order. Reads keys, no tokens.

    fourmill trace --config configs/demo.yaml --step 120 --json
    fourmill trace --run runs/demo/model --step 120
    """
    if (config is None) == (run is None):
        raise ValueError("give either --config or --run")
    dataset, pretrain, storage, digest = _of_run(run) if run else _of_config(str(config), overrides or [])
    found = _traced(dataset, pretrain, storage, digest, step)
    if as_json:
        print(json.dumps({"step": step, "samples": [sample._asdict() for sample in found]}, indent=1))
    else:
        _print(found)
    return 0


def _of_config(path: str, overrides: list[str]) -> tuple[str, PretrainConfig, StoreSettings | None, str | None]:
    from fourmill.config import ConfigError, load_config

    loaded = load_config(path, overrides)
    if loaded.pretrain is None:
        raise ConfigError(f"{path}: no `pretrain` section")
    return loaded.dataset, loaded.pretrain, loaded.storage, None


def _of_run(uri: str) -> tuple[str, PretrainConfig, StoreSettings | None, str | None]:
    from fourmill.config import check
    from fourmill.model.config import PretrainConfig
    from fourmill.pipeline.store import open_store

    told = json.loads(open_store(uri).get("pretrain.json"))
    pretrain = check(told["config"], PretrainConfig, f"pretrain.json in {uri}")
    return told["dataset"], pretrain, None, told["dataset_digest"]


def _traced(
    dataset: str, pretrain: PretrainConfig, storage: StoreSettings | None, digest: str | None, step: int
) -> list[Traced]:
    from fourmill.model.config import DatasetShare
    from fourmill.model.data import data_config, open_data
    from fourmill.model.loader import Loader

    data = open_data(pretrain.datasets or (DatasetShare(uri=dataset),), data_config(pretrain), storage)
    if digest is not None and digest != data.digest:
        raise ValueError("the run's dataset has changed since it began: what it was trained on cannot be told")
    return Loader(data, pretrain.batch_size, pretrain.seed, crop=pretrain.crop).trace(step)


def _print(found: list[Traced]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("place", "dataset", "shard", "row", "crop", "key")
    for place, sample in enumerate(found):
        numbers = (str(n) for n in (sample.shard, sample.row, sample.crop))
        table.add_row(str(place), escape(sample.dataset), *numbers, escape(sample.key))
    console().print(table)
