"""A tiny dataset of two-coloured pictures with exact labels, and a tiny 4M, for the tests of fine-tuning."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fourmill.modalities import modality
from fourmill.model.config import Architecture, ModalityInfo
from fourmill.model.finetune.config import FinetuneConfig
from fourmill.model.network import FourM
from fourmill.model.weights import save_model
from fourmill.pipeline import codecs
from fourmill.pipeline.manifest import Update, update_manifest
from fourmill.pipeline.shards import Spec, commit, write_shard
from fourmill.pipeline.store import open_store

SIDE = 32
SPECS = {
    "rgb": Spec(),
    "crop_settings": Spec(),
    "semseg": Spec(classes=("left", "right")),
    "depth": Spec(convention="metric"),
    "normal": Spec(convention="opencv"),
    "source": Spec(),
}


def tiny(**changes: Any) -> Architecture:
    """Pixels in, one grid out; 16 wide, 2 + 1 blocks, 2 x 2 patches of 16 pixels."""
    pixels = ModalityInfo(kind="pixels", tokens=4, grid=(2, 2))
    grid = ModalityInfo(kind="grid", vocabulary=8, tokens=4, grid=(2, 2))
    fields: dict[str, Any] = {"dim": 16, "encoder_depth": 2, "decoder_depth": 1, "num_heads": 2, "image_size": SIDE}
    fields |= {"domains_in": ("rgb",), "domains_out": ("tok_depth",)}
    return Architecture(**{**fields, "modalities": {"rgb": pixels, "tok_depth": grid}, **changes})


def model(seed: int = 0, **changes: Any) -> FourM:
    """A 4M with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FourM(tiny(**changes)).eval()


def checkpoint(folder: Path) -> str:
    """The same as a checkpoint folder."""
    if not folder.exists():
        save_model(model(), open_store(folder))
    return str(folder)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def make_dataset(folder: Path, count: int = 48, **specs: Spec) -> str:
    """Dark to the left of an edge, bright to its right; the edge stands at one of four places.

    Classes 0 and 1, depths 1 and 4 metres, normals up and down follow from it; `side` is where the
    edge stands, and every seventh sample has none.
    """
    values: dict[str, list[Any]] = {name: [] for name in SPECS}
    for index in range(count):
        edge = 8 * (index % 4)
        bright = np.arange(SIDE)[None, :].repeat(SIDE, 0) >= edge
        values["rgb"].append(png(np.where(bright, 220, 40)[..., None].repeat(3, 2).astype(np.uint8)))
        values["crop_settings"].append(np.array([0, 0, SIDE, SIDE, 0], np.int32))
        values["semseg"].append(bright.astype(np.uint8))
        values["depth"].append(np.where(bright, 4, 1).astype(np.float32))
        normal = np.zeros((3, SIDE, SIDE), np.float32)
        normal[1] = np.where(bright, 1, -1)
        values["normal"].append(normal)
        values["source"].append({"metadata": {} if index % 7 == 6 else {"side": f"at {edge}"}})
    store, keys, records = open_store(folder), [f"k{index}" for index in range(count)], []
    for name, spec in {**SPECS, **specs}.items():
        column = [codecs.encode(modality(name), value) for value in values[name]]
        records.append(commit(store, write_shard(name, 0, "0" * 16, keys, [column], spec, {"who": name}, {})))
    update_manifest(store, lambda _: Update(records, {r.producer: {} for r in records}))
    return str(folder)


def config_for(folder: Path, **changes: Any) -> FinetuneConfig:
    """A run of a few steps on the toys below `folder`."""
    fields: dict[str, Any] = {
        "task": "semseg",
        "out": str(folder / "out"),
        "checkpoint": checkpoint(folder / "checkpoint"),
        "image_size": SIDE,
        "held_out": 0.25,
        "batch_size": 8,
        "steps": 6,
        "warmup": 1,
        "lr": 3e-3,
        "head_width": 8,
        "head_depth": 1,
        "num_threads": 1,
        "tensorboard": False,
    }
    if "images" not in changes:
        fields["dataset"] = str(folder / "dataset")
    return FinetuneConfig(**{**fields, **changes})
