"""What every export layout offers, and the small files that stand beside the data of all of them.

fourmill.json             what was exported, from which snapshot, made by what, under which licences; written last
README.md                 the same for people, with how to load it
.fourmill/export.json     what this folder is being filled with; another export into it is refused
.fourmill/part-000012.json    one output shard: its objects and digests, and what its file names cannot say
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

from fourmill.pipeline.exchange.rows import Run
from fourmill.pipeline.exchange.stems import is_exact, stem_of
from fourmill.pipeline.fingerprints import referenced
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.shards import Spec

FORMAT = 1
SUMMARY = "fourmill.json"
CARD = "README.md"
INTENT = ".fourmill/export.json"
PARTS = ".fourmill/part-"


def part_name(number: int) -> str:
    return f"{PARTS}{number:06d}.json"


def part_number(name: str) -> int | None:
    match = re.fullmatch(re.escape(PARTS) + r"(\d+)\.json", name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class File:
    """One published object of an output shard."""

    name: str
    num_bytes: int
    digest: str

    @classmethod
    def of(cls, name: str, data: bytes) -> File:
        return cls(name, len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True)
class PartInfo:
    """One output shard as published.

    `odd`: by stem, what stems cannot say: `key` where it was shortened, `quarantine` by modality, `row` of a sample
    that has no value at all. `notes`: what had to be changed, with counts.
    """

    number: int
    rows: int
    files: tuple[File, ...]
    odd: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> PartInfo:
        files = tuple(File(**f) for f in tree["files"])
        return cls(tree["number"], tree["rows"], files, dict(tree["odd"]), dict(tree["notes"]))


@dataclass(frozen=True)
class Content:
    """What a layout writes from: the snapshot, what was chosen of it, and the values' specifications."""

    manifest: Manifest
    modalities: tuple[str, ...]
    specs: Mapping[str, Spec]
    split: str = "train"

    @property
    def crop_size(self) -> int | None:
        """The side in pixels of the crops that labels were made from, if the lineage tells."""
        recipes = self.manifest.generations("crop_settings")
        for producer in referenced(recipes, self.manifest.producers).values():
            crops = producer.get("config", {}).get("crops", {})
            if isinstance(crops, Mapping) and isinstance(crops.get("size"), int):
                return int(crops["size"])
        return None


class Layout(Protocol):
    """One export format. Stateless but for its `Content`, so that threads share it."""

    name: ClassVar[str]
    keeps_incomplete: ClassVar[bool]
    """Whether it has a place for a sample that lacks a modality."""

    def __init__(self, content: Content) -> None: ...

    @classmethod
    def select(cls, manifest: Manifest, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """The modalities to read; ValueError says why one that was asked for has no place here."""

    def files(self, number: int, run: Run) -> Iterator[tuple[str, bytes, Mapping[str, int]]]:
        """(name, content, notes) of the objects of one output shard."""

    def folders(self) -> dict[str, Any]:
        """For each modality where and how it stands, for fourmill.json."""

    def extra(self, parts: Sequence[tuple[int, int]]) -> Iterator[tuple[str, bytes]]:
        """Objects that stand beside the shards, given (number, rows) of each."""

    def usage(self, shards: int) -> str:
        """How to load so many shards, in Markdown."""


def odd_samples(run: Run) -> dict[str, dict[str, Any]]:
    """What the names of a run's samples cannot say, by stem."""
    odd: dict[str, dict[str, Any]] = {}
    for row, key in enumerate(run.keys):
        if all(column[row] is None for part in run.parts.values() for column in part.columns):
            odd.setdefault(stem_of(key), {})["row"] = row
        if not is_exact(key):
            odd.setdefault(stem_of(key), {})["key"] = key
        reasons = {name: part.quarantine[key] for name, part in run.parts.items() if key in part.quarantine}
        if reasons:
            odd.setdefault(stem_of(key), {})["quarantine"] = reasons
    return odd
