"""Pictures with their labels, for fine-tuning: from a dataset, or from a folder of pictures for each class.

Crop, resize and flip of a sample are one `Crop`, a function of seed, epoch and key, and move picture and label alike.
A dense label lies in the dataset's recorded crop of the picture (the first one), so that crop is made first.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fourmill.evaluate.truth import moved_map
from fourmill.modalities import modality
from fourmill.model.checks import CROPS
from fourmill.model.finetune.config import FinetuneConfig
from fourmill.model.train import seed_of
from fourmill.pipeline.geometry import Crop, CropConfig, apply_crop, draw_crops
from fourmill.pipeline.images import decode
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.shards import Shard, Spec, read_shard
from fourmill.pipeline.splits import held_out_rank, is_held_out
from fourmill.pipeline.store import open_store

log = logging.getLogger(__name__)

_DECODERS = 8  # threads; Pillow releases the interpreter lock while it decodes and resizes
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
Picture = tuple[np.ndarray, Any]  # uint8 (H, W, 3) and its label


class Samples(ABC):
    """Numbered samples. `train`, `held_out`: int64 arrays of numbers; `classes`: names by id, where there are any."""

    keys: list[str]
    train: np.ndarray
    held_out: np.ndarray
    classes: tuple[str, ...] = ()

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self._pool = ThreadPoolExecutor(_DECODERS, "finetune")
        self._kept: dict[int, Picture] = {}
        self._room = config.cache_bytes

    @abstractmethod
    def read(self, number: int) -> Picture:
        """The picture as it lies there, and the label over all of it."""

    def split(self, held_out: Sequence[bool]) -> None:
        """Divide the samples, and keep of those to train on, and to look at, what the configuration wants."""
        c, keys, held = self.config, self.keys, np.asarray(held_out, dtype=bool)
        self.train, self.held_out = np.flatnonzero(~held), np.flatnonzero(held)
        if c.train_samples is not None:
            if c.train_samples > len(self.train):
                raise ValueError(f"train_samples is {c.train_samples}, but there are {len(self.train)} to train on")
            drawn = sorted(self.train, key=lambda i: seed_of(c.seed, "sample", keys[i]))
            self.train = np.sort(np.array(drawn[: c.train_samples], dtype=np.int64))
        if not len(self.train):
            raise ValueError(f"no sample to train on, of {len(keys)} with picture and label")
        by_rank = sorted(self.held_out, key=lambda i: held_out_rank(keys[i]))
        self.held_out = np.array(by_rank[: c.eval_samples], dtype=np.int64)

    def batch(self, numbers: Sequence[int], epochs: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels uint8 (B, 3, S, S) and labels; random crops, those of the epochs, or the centre squares."""
        chosen = [None] * len(numbers) if epochs is None else [int(e) for e in epochs]
        made = list(self._pool.map(self._one, [int(n) for n in numbers], chosen))
        pixels, labels = zip(*made, strict=True)
        return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(labels))

    def _remembered(self, number: int) -> Picture:
        """Read once, as long as there is room."""
        if number in self._kept:
            return self._kept[number]
        picture, label = self.read(number)
        size = picture.nbytes + np.asarray(label).nbytes
        if size <= self._room:
            self._room -= size
            self._kept[number] = picture, label
        return picture, label

    def _one(self, number: int, epoch: int | None) -> tuple[np.ndarray, np.ndarray]:
        c, (picture, label) = self.config, self._remembered(number)
        height, width = picture.shape[:2]
        drawn = CropConfig(
            size=c.image_size, count=2, min_scale=c.min_scale, flip=c.flip, seed=seed_of(c.seed, "crop", epoch)
        )
        crop = draw_crops(self.keys[number], height, width, drawn)[0 if epoch is None else 1]
        pixels = apply_crop(Image.fromarray(picture), crop, c.image_size).transpose(2, 0, 1)
        return np.ascontiguousarray(pixels), moved_label(label, crop, (height, width), c.image_size, c.task)


def moved_label(label: Any, crop: Crop, shape: tuple[int, int], size: int, task: str) -> np.ndarray:
    """A class stays; a map is cut out and resized with its picture, to the nearest pixel; mirrored normals turn."""
    if task == "classification":
        return np.asarray(label, dtype=np.int64)
    moved = moved_map(label, crop, *shape, size)
    if task == "normal" and crop.flip:
        moved = moved * np.array([-1, 1, 1], np.float32)[:, None, None]
    return np.ascontiguousarray(moved, dtype=np.int64 if task == "semseg" else np.float32)


class DatasetSamples(Samples):
    """Rows of a dataset that have a picture and a label. ValueError says what the dataset lacks."""

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        assert config.dataset is not None
        self.dense = config.task != "classification"
        self.store = open_store(config.dataset, config.storage)
        manifest = read_manifest(self.store)
        names = ["rgb", *([CROPS, config.label_modality] if self.dense else [])]
        names += ["source"] if config.label_field else []
        self._check(manifest, names)
        self.records = {(r.modality, r.shard): r for name in names for r in manifest.records(name)}
        shards = sorted({s for name, s in self.records if all((n, s) in self.records for n in names)})
        self._open = functools.lru_cache(maxsize=4096)(self._read_shard)
        self.places: list[tuple[int, int]] = []
        self.keys = []
        self.ids: list[str] = []  # classes, where the task has them
        given = self._given()
        for shard in shards:
            self._number(shard, names, given)
        if self.dense:
            self.classes = self._spec.classes or ()
        self.split([is_held_out(key, config.held_out) for key in self.keys])

    def _check(self, manifest: Manifest, names: Sequence[str]) -> None:
        c = self.config
        for name in names:
            if not manifest.num_shards(name):
                raise ValueError(f"{c.dataset} has no {name!r}; there are {', '.join(manifest.modalities)}")
            if len(found := manifest.generations(name)) > 1:
                raise ValueError(f"{c.dataset}: {name} is of {len(found)} generations; run its stage again first")
        if not self.dense:
            return
        self._spec = Spec.from_json(next(manifest.records(c.label_modality)).spec)
        kind = {"semseg": "classes", "depth": "map", "normal": "map"}[c.task]
        if modality(c.label_modality).kind.value != kind:
            raise ValueError(f"label {c.label_modality!r} is no {c.task}")
        if c.task == "semseg" and not self._spec.classes:
            raise ValueError(f"{c.dataset}: {c.label_modality} states no class names")
        if c.task == "depth" and self._spec.convention != "metric":
            raise ValueError(
                f"{c.dataset}: {c.label_modality} is {self._spec.convention}; to learn metres, metric depth is needed"
            )

    def _read_shard(self, name: str, shard: int) -> Shard:
        return read_shard(self.store, self.records[name, shard].name)

    def _given(self) -> Mapping[str, str] | None:
        """The label file, key -> class."""
        if self.config.labels is None:
            return None
        from pyarrow import csv, parquet

        path, texts = self.config.labels, csv.ConvertOptions(column_types={"key": "string", "label": "string"})
        table = parquet.read_table(path) if path.endswith(".parquet") else csv.read_csv(path, convert_options=texts)
        if missing := {"key", "label"} - set(table.column_names):
            raise ValueError(f"{path} has no column {min(missing)!r}; it has {', '.join(table.column_names)}")
        keys, names = (table[column].cast("string").to_pylist() for column in ("key", "label"))
        found = dict(zip(keys, names, strict=True))
        self.classes = tuple(sorted(set(found.values())))
        return found

    def _number(self, shard: int, names: Sequence[str], given: Mapping[str, str] | None) -> None:
        """Append the shard's rows that have everything."""
        digests = {self.records[name, shard].keys_digest for name in names}
        if len(digests) > 1:
            raise ValueError(f"{self.config.dataset}: shard {shard} has other keys in one of {', '.join(names)}")
        whole = np.logical_and.reduce([self._open(name, shard).valid(0) for name in names])
        keys = self._open("rgb", shard).keys
        for row in np.flatnonzero(whole):
            if not self.dense:
                label = given.get(keys[row]) if given is not None else self._field(shard, int(row))
                if label is None:
                    continue
                self.ids.append(label)
            self.places.append((shard, int(row)))
            self.keys.append(keys[row])

    def _field(self, shard: int, row: int) -> str | None:
        found: Any = self._open("source", shard).value(row)
        for part in (self.config.label_field or "").split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return None if found is None else str(found)

    def split(self, held_out: Sequence[bool]) -> None:
        if self.ids:
            self.classes = self.classes or tuple(sorted(set(self.ids)))
            number = {name: i for i, name in enumerate(self.classes)}
            self.numbers = [number[name] for name in self.ids]
        super().split(held_out)

    def read(self, number: int) -> Picture:
        shard, row = self.places[number]
        image = decode(self._open("rgb", shard).value(row))
        if not self.dense:
            return np.asarray(image), self.numbers[number]
        label = np.asarray(self._open(self.config.label_modality, shard).value(row, 0))
        crop = Crop(*(int(v) for v in self._open(CROPS, shard).value(row, 0)))
        return apply_crop(image, crop, label.shape[-1]), label


class FolderSamples(Samples):
    """`images/<class>/…`, or `images/train/<class>/…` and `images/val/<class>/…`. Classes in alphabetical order."""

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        root = Path(config.images or "").expanduser()
        if not root.is_dir():
            raise ValueError(f"images: {root} is no folder")
        parts = [p for p in (root / "train", root / "val") if p.is_dir()]
        roots = parts if len(parts) == 2 else [root]
        self.classes = tuple(sorted({p.name for r in roots for p in r.iterdir() if p.is_dir()}))
        number = {name: i for i, name in enumerate(self.classes)}
        self.paths = sorted(p for r in roots for p in r.rglob("*") if p.suffix.lower() in _PICTURES)
        self.keys = [p.relative_to(root).as_posix() for p in self.paths]
        inside = 1 if len(parts) == 2 else 0
        self.numbers = [number[key.split("/")[inside]] for key in self.keys if key.count("/") > inside]
        if len(self.numbers) != len(self.keys) or len(self.classes) < 2:
            raise ValueError(f"images: {root} must hold at least two folders, one a class, and pictures only in them")
        if inside:
            self.split([key.startswith("val/") for key in self.keys])
        else:
            self.split([is_held_out(key, config.held_out) for key in self.keys])

    def read(self, number: int) -> Picture:
        return np.asarray(decode(self.paths[number].read_bytes())), self.numbers[number]


def open_samples(config: FinetuneConfig) -> Samples:
    """What the configuration names."""
    return DatasetSamples(config) if config.dataset is not None else FolderSamples(config)
