"""Toy tokenizers that lose nothing, or all but a constant, and datasets whose every value is written down literally."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import numpy as np
from PIL import Image

from fourmill.modalities import modality
from fourmill.pipeline import codecs
from fourmill.pipeline.manifest import Update, update_manifest
from fourmill.pipeline.shards import Spec, commit, producer_id, write_shard
from fourmill.pipeline.store import open_store
from fourmill.tokenizers import TOKENIZERS
from fourmill.tokenizers.base import Tokenizer, TokenizerConfig
from fourmill.tokenizers.text import FILE, train_text_tokenizer

GEOMETRY = {"class": "CropSettings", "version": 1, "config": {"kind": "crop_settings", "crops": {"size": 4}}}


class ToyConfig(TokenizerConfig):
    """`shape`: of a value. `constant`: what every number of a decoded value is, in place of what was encoded."""

    shape: tuple[int, ...]
    constant: float | None = None


class Bits(Tokenizer):
    """A token is a number of the value: bytes as they are, floats by the bits of a float16. Nothing is lost."""

    Config = ToyConfig
    config: ToyConfig

    @property
    def _bytes(self) -> bool:
        return self.source in ("rgb", "semseg", "canny_edge")

    @property
    def vocabulary(self) -> int:
        return 256 if self._bytes else 1 << 16

    @property
    def grid(self) -> tuple[int, int]:
        return 1, int(np.prod(self.config.shape))

    def encode(self, values: Any) -> list[np.ndarray]:
        kind = np.uint8 if self._bytes else np.float16
        arrays = [np.asarray(value).astype(kind).ravel() for value in values]
        return [a.astype(np.uint16) if self._bytes else a.view(np.uint16) for a in arrays]

    def decode(self, tokens: Sequence[np.ndarray]) -> list[Any]:
        return [self._value(np.asarray(row, np.uint16)) for row in tokens]

    def _value(self, row: np.ndarray) -> np.ndarray:
        if row[0] == 13:
            raise ValueError("13 brings bad luck")
        flat = row.astype(np.uint8) if self._bytes else row.view(np.float16).astype(np.float32)
        if self.config.constant is not None:
            flat = np.full_like(flat, self.config.constant)
        return flat.reshape(self.config.shape)


def folder(path: Path, content: bytes = b"weights") -> str:
    """A checkpoint folder of one file."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "weights").write_bytes(content)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    return str(path)


def vocabulary(path: Path) -> str:
    """A text tokenizer's checkpoint with 1000 bins and a few words."""
    path.mkdir(parents=True, exist_ok=True)
    texts = ["a red box on a blue floor", "two cats and a dog", "a red box on a blue floor .", "two cats and a dog"]
    (path / FILE).write_bytes(train_text_tokenizer(texts, 4400, 10, 1000, ("cat", "dog")))
    return str(path)


def bits(name: str, checkpoint: str, shape: Sequence[int], constant: float | None = None) -> Tokenizer:
    """A loaded toy."""
    return build(name, kind="token_toys:Bits", checkpoint=checkpoint, shape=list(shape), constant=constant)


def build(name: str, **options: Any) -> Tokenizer:
    """A loaded tokenizer."""
    found = TOKENIZERS.build(name, options)
    assert isinstance(found, Tokenizer)
    found.load("cpu")
    return found


def config_of(dataset: str, *tokenizers: Tokenizer, labelers: Mapping[str, Any] | None = None) -> Any:
    """A configuration that names these tokenizers."""
    from fourmill.config import Config

    sections = {t.name: t.config.model_dump(exclude={"batch_size"}) for t in tokenizers}
    return Config(dataset=dataset, tokenizers=sections, labelers=dict(labelers or {}))


class Literal:
    """A dataset in the making: every modality is put down as columns of values, one a crop."""

    def __init__(self, uri: str, keys: Sequence[str], size: int = 4, crops: int = 1, shards: int = 1) -> None:
        self.uri, self.keys, self.size, self.crops = uri, list(keys), size, crops
        self.store = open_store(uri)
        self.parts = np.array_split(np.arange(len(self.keys)), shards)
        self.records: list[Any] = []
        self.producers: dict[str, Any] = {}

    def put(
        self,
        name: str,
        *columns: Sequence[Any],
        spec: Spec | None = None,
        producer: Mapping[str, Any] | None = None,
        quarantine: Mapping[str, str] | None = None,
    ) -> None:
        """Values as components give them, None for null."""
        entry, lineage = modality(name), dict(producer or {"class": "Literal", "version": 1})
        spec = replace(spec or Spec(), crops=len(columns))
        for number, rows in enumerate(self.parts):
            keys = [self.keys[i] for i in rows]
            stored = [[None if c[i] is None else codecs.encode(entry, c[i]) for i in rows] for c in columns]
            reasons = {k: v for k, v in (quarantine or {}).items() if k in keys}
            data = write_shard(name, number, "0" * 16, keys, stored, spec, lineage, reasons)
            self.records.append(commit(self.store, data))
        self.producers[producer_id(lineage)] = lineage

    def pictures(self, values: Sequence[np.ndarray], sources: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Square pictures as PNG, where they came from, and crops of all of each."""
        side = len(values[0])
        self.put("rgb", [helpers.encoded(Image.fromarray(v)) for v in values])
        described = [{"height": side, "width": side, **dict(s)} for s in sources or [{}] * len(values)]
        self.put("source", described)
        geometry = {**GEOMETRY, "config": {"kind": "crop_settings", "crops": {"size": self.size}}}
        whole = [np.array([0, 0, side, side, 0], np.int32)] * len(values)
        self.put("crop_settings", *[whole] * self.crops, producer=geometry)

    def tokens(self, tokenizer: Tokenizer, *columns: Sequence[Any], **options: Any) -> None:
        """Values through their tokenizer; None stays null, arrays of integers under 'raw' are put down as they are."""
        raw = options.pop("raw", False)
        rows = [[v if v is None or raw else tokenizer.encode([v])[0] for v in column] for column in columns]
        spec = tokenizer.spec(tokenizer.name)
        self.put(tokenizer.name, *rows, spec=spec, producer=tokenizer.lineage(), **options)

    def done(self) -> str:
        """Publish the manifest."""
        update_manifest(self.store, lambda _: Update(self.records, self.producers))
        return self.uri
