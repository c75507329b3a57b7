"""Ten-line components and a small corpus for the pipeline's tests; workers import this file by `toys:Name`."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fourmill.labelers.base import Labeler, LabelerConfig
from fourmill.pipeline.component import Batch, Failure
from fourmill.pipeline.ingest import IngestConfig, ingest
from fourmill.pipeline.shards import Spec


class ToyConfig(LabelerConfig):
    """Knobs that the tests turn."""

    gain: float = 1.0
    kill: tuple[str, ...] = ()
    fail: tuple[str, ...] = ()
    exact: bool = False
    seconds: float = 0.0
    memory: int = 1000
    calls: str = ""


class Brightness(Labeler):
    """`depth`: the mean of the three channels, times `gain`. Kills, fails or runs out of memory where it is told to."""

    Config = ToyConfig
    config: ToyConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("rgb",)

    @property
    def makes(self) -> tuple[str, ...]:
        return ("depth",)

    def spec(self, modality: str) -> Spec:
        return Spec(convention="metric")

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        assert batch.pixels is not None
        if self.config.calls:
            with open(self.config.calls, "a") as file:
                file.write(f"{len(batch)}\n")
        time.sleep(self.config.seconds)
        if set(batch.keys) & set(self.config.kill):
            os._exit(17)
        if len(batch) > self.config.memory:
            raise MemoryError("toy memory is full")
        if bad := sorted(set(batch.keys) & set(self.config.fail)):
            raise RuntimeError(f"cannot stand {bad[0]}")
        return {"depth": list(batch.pixels.mean(axis=1, dtype=np.float32) * self.config.gain)}


class Threshold(Labeler):
    """`semseg`: 1 where `depth` is above 100, from another labeler's output; refuses pictures that are all dark."""

    Config = ToyConfig
    config: ToyConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("depth",)

    @property
    def makes(self) -> tuple[str, ...]:
        return ("semseg",)

    def spec(self, modality: str) -> Spec:
        return Spec(classes=("dark", "bright"))

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        maps = [(d > 100).astype(np.uint8) for d in batch.views["depth"]]
        return {"semseg": [m if m.any() else Failure("all dark: nothing is above 100") for m in maps]}


class BlockTokens(Labeler):
    """`tok_depth`: the mean brightness of 4 x 4 blocks, as 16 tokens of 256."""

    Config = ToyConfig

    @property
    def reads(self) -> tuple[str, ...]:
        return ("depth",)

    @property
    def makes(self) -> tuple[str, ...]:
        return ("tok_depth",)

    def spec(self, modality: str) -> Spec:
        return Spec(vocabulary=256, length=16, grid=(4, 4))

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        return {"tok_depth": [_blocks(d) for d in batch.views["depth"]]}


def _blocks(depth: np.ndarray) -> np.ndarray:
    side = len(depth) // 4
    means = depth.reshape(4, side, 4, side).mean(axis=(1, 3))
    return np.clip(means, 0, 255).astype(np.uint16).reshape(-1)


def picture(index: int, width: int = 40, height: int = 32) -> Image.Image:
    """A picture that differs from sample to sample, smooth so that JPEG keeps it."""
    y, x = np.mgrid[0:height, 0:width]
    red = (x * 6 + index * 7) % 256
    return Image.fromarray(np.stack([red, y * 7 % 256, np.full_like(x, (index * 31) % 256)], -1).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def write_tar(path: Path, count: int, damaged: dict[int, bytes] | None = None, first: int = 0) -> None:
    """A tar as img2dataset writes them, keys 000000000 and up; `damaged` replaces pictures' bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index in range(first, first + count):
            data = (damaged or {}).get(index, jpeg(picture(index)))
            meta = {"key": f"{index:09}", "boxes": [{"box": [0.25, 0.25, 0.75, 0.75], "class_name": "box"}]}
            for suffix, content in (
                ("jpg", data),
                ("txt", f"number {index}".encode()),
                ("json", json.dumps(meta).encode()),
            ):
                info = tarfile.TarInfo(f"{index:09}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def make_dataset(folder: Path, dataset: str, count: int = 24, shard_size: int = 6, **tar: Any) -> str:
    """A dataset of `count` toy samples, ingested for real."""
    corpus = folder / "corpus"
    if not corpus.exists():
        write_tar(corpus / "00000.tar", count, **tar)
    ingest(str(corpus), dataset, IngestConfig(shard_size=shard_size))
    return dataset


def config(dataset: str, address: str = "none", stages: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Three toy components in two stages; `options` go to the brightness labeler."""
    return {
        "dataset": dataset,
        "crops": {"size": 16},
        "labelers": {
            "bright": {"kind": "toys:Brightness", "batch_size": 4, **options},
            "threshold": {"kind": "toys:Threshold", "batch_size": 4},
            "blocks": {"kind": "toys:BlockTokens", "batch_size": 4},
            "boxes": {"kind": "annotated_boxes"},
        },
        "stages": stages
        or {"labels": {"labelers": ["bright", "boxes"]}, "more": {"labelers": ["threshold", "blocks"]}},
        "ray": {"address": address, "num_cpus": 2},
        "max_failures": 1.0,
    }
