"""Reading ml-4m's layout, ours or anyone's: tars or folders by modality, with or without `train/` and `val/` above.

ml-4m pairs modalities by position; here they are paired by name, and what does not fit is told, never shifted. Its
pickles (`sam_instance`) are not opened. Boxes and maps of whole pictures become those of each recorded crop.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fourmill.modalities import CATALOGUE, Kind, modality, unknown
from fourmill.pipeline.exchange.members import from_npy
from fourmill.pipeline.exchange.ml4m import MAPS, TEXTS
from fourmill.pipeline.exchange.ml4m_rows import Row
from fourmill.pipeline.exchange.readers import lineage_in, part_of, specs_in, told_of, whole
from fourmill.pipeline.exchange.rows import Part, Run, WrongDataError, aligned
from fourmill.pipeline.exchange.stems import key_of
from fourmill.pipeline.exchange.tars import contents
from fourmill.pipeline.shards import Spec
from fourmill.pipeline.store import Store

_TAR = re.compile(r"(?:(?P<split>[^/]+)/)?(?P<folder>[^/]+)/(?P<shard>[^/]+)\.tar")
_FILE = re.compile(r"(?:(?P<split>train|val|test|validation)/)?(?P<folder>[^/]+)/(?P<shard>[^/]+)/(?P<leaf>[^/]+)")
_EXTENSIONS = ("json.gz",)
_FOLDERS = {folder: name for name, folder in MAPS.items()}
_READABLE = ("rgb", "crop_settings", "det", "metadata", "color_palette", *TEXTS, *MAPS)
_UNREADABLE = {"sam_instance": "a pickle, which could run code", "human_poses": "HMR2's output, not our persons"}


@dataclass(frozen=True)
class ReadOptions:
    """`rename`: folder to modality. `skip_unknown`: leave folders that match no modality. `keep_misaligned`: samples
    that a modality lacks become nulls instead of an error. `map_size`: side of maps cut from whole pictures.
    `shard_size`: samples in a shard of what comes as single files."""

    rename: Mapping[str, str] = field(default_factory=dict)
    skip_unknown: bool = False
    keep_misaligned: bool = False
    map_size: int = 224
    shard_size: int = 1000


@dataclass(frozen=True)
class Unit:
    """One shard to be: a tar name that all modalities have, or a stretch of a class folder."""

    split: str
    shard: str
    leaves: Mapping[str, tuple[str, ...]] | None = None  # by folder, for single files

    @property
    def where(self) -> str:
        return f"{self.split}/{self.shard}" if self.split else self.shard


File = tuple[str, str, bytes]  # stem, extension, content


class Ml4mReader:
    """`summary`: the `fourmill.json` of our own export, None for anyone else's folder."""

    layout: str = "ml4m"

    def __init__(self, store: Store, summary: Mapping[str, Any] | None, options: ReadOptions) -> None:
        self.store, self.summary, self.options = store, summary, options
        self.settled_keys = summary is not None
        self.skipped: dict[str, str] = {}
        found = _listed(store)
        self.folders = self._named(sorted({folder for _, folder, _ in found}))
        self.units = self._units({place: leaves for place, leaves in found.items() if place[1] in self.folders})
        self.specs: Mapping[str, Spec] = self._specs()

    def __len__(self) -> int:
        return len(self.units)

    def lineage(self, name: str) -> dict[str, Any]:
        return lineage_in(self.summary, name) if self.summary else {}

    def told(self) -> dict[str, Any]:
        told = told_of(self.summary) if self.summary else {}
        return {**told, "folders": self.folders, "skipped": self.skipped}

    def producers(self) -> Mapping[str, Mapping[str, Any]]:
        return dict(self.summary["producers"]) if self.summary else {}

    def _named(self, folders: Sequence[str]) -> dict[str, str]:
        """Modality by folder; those that are none are refused, or skipped if that was asked for."""
        if self.summary is not None:
            return {entry["folder"]: name for name, entry in self.summary["modalities"].items()}
        named = {}
        for folder in folders:
            name = self.options.rename.get(folder) or _FOLDERS.get(folder, folder)
            why = _refusal(name)
            if why is None:
                named[folder] = name
            elif self.options.skip_unknown:
                self.skipped[folder] = why
            else:
                raise ValueError(
                    f"folder {folder!r} in {self.store.uri}: {why}; say what it is with --rename, or --skip-unknown"
                )
        if not named:
            raise ValueError(f"no modality of ml-4m's in {self.store.uri}: it holds {', '.join(folders) or 'nothing'}")
        bases = {folder: name.partition("@")[0] for folder, name in named.items()}
        # One resolution needs no suffix: a dataset's sizes are in its records.
        once = [base for base, count in Counter(bases.values()).items() if count == 1]
        return {folder: bases[folder] if bases[folder] in once else name for folder, name in named.items()}

    def _units(self, found: Mapping[tuple[str, str, str], list[str]]) -> list[Unit]:
        shards = sorted({(split, shard) for split, _, shard in found})
        units: list[Unit] = []
        for split, shard in shards:
            have = {folder: found[split, folder, shard] for folder in self.folders if (split, folder, shard) in found}
            lacking = sorted({*self.folders} - {*have})
            if lacking and not self.options.keep_misaligned:
                raise WrongDataError(f"{split}/{shard}".lstrip("/") + f" is not in {', '.join(lacking)}")
            units += self._stretches(split, shard, have)
        return units

    def _stretches(self, split: str, shard: str, leaves: Mapping[str, list[str]]) -> Iterator[Unit]:
        if not any(leaves.values()):
            yield Unit(split, shard)
            return
        stems = {folder: [_split(leaf)[0] for leaf in names] for folder, names in leaves.items()}
        order = self._joined(f"{split}/{shard}".lstrip("/"), stems)
        by_stem = {f: dict(zip(stems[f], leaves[f], strict=True)) for f in leaves}
        size = self.options.shard_size if self.summary is None else max(1, len(order))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            yield Unit(split, shard, {f: tuple(by_stem[f][s] for s in chosen if s in by_stem[f]) for f in leaves})

    def _joined(self, where: str, stems: Mapping[str, Sequence[str]]) -> list[str]:
        """The order of samples that all folders share, or of all of them together."""
        if self.options.keep_misaligned:
            return list(dict.fromkeys(s for names in stems.values() for s in names))
        return aligned(where, list(stems), stems)

    def _files(self, unit: Unit, folder: str, number: int) -> Iterator[File]:
        """A modality's files of one unit, in order."""
        root = f"{unit.split}/{folder}" if unit.split else folder
        if unit.leaves is not None:
            digests = self._digests(number)
            for leaf in unit.leaves.get(folder, ()):
                name = f"{root}/{unit.shard}/{leaf}"
                data = self.store.get(name) if self.summary is None else whole(self.store, name, digests.get(name, ""))
                yield (*_split(leaf), data)
            return
        name = f"{root}/{unit.shard}.tar"
        data = self._tar(name, number)
        for member, content in contents(io.BytesIO(data), f"{name} in {self.store.uri}") if data else ():
            yield member.partition(".")[0], _split(member)[1], content

    def _tar(self, name: str, number: int) -> bytes:
        if self.summary is None:
            return self.store.get(name) if self.store.head(name) else b""
        return whole(self.store, name, self._digests(number).get(name, ""))

    def _digests(self, number: int) -> dict[str, str]:
        """By name, of the objects of our own export's shard."""
        if self.summary is None:
            return {}
        return {file.name: file.digest for file in part_of(self.store, number).files}

    def _specs(self) -> dict[str, Spec]:
        """Ours are known; anyone else's follow from the first sample."""
        if self.summary is not None:
            return specs_in(self.summary)
        firsts = {n: next(self._files(self.units[0], folder, 0), None) for folder, n in self.folders.items()}
        arrays = {
            n: np.atleast_2d(from_npy(file[2]))
            for n, file in firsts.items()
            if file and modality(n).kind in (Kind.GRID, Kind.CROP)
        }
        counts = {n: len(a) for n, a in arrays.items()}
        if len({*counts.values()}) > 1:
            raise WrongDataError(f"{self.store.uri}: modalities have different numbers of crops: {counts}")
        crops = next(iter(counts.values()), 1)
        return {n: _spec(n, crops, arrays.get(n)) for n in self.folders.values()}

    def read(self, number: int) -> Run:
        unit = self.units[number]
        files = {n: {s: (e, d) for s, e, d in self._files(unit, folder, number)} for folder, n in self.folders.items()}
        stems = self._joined(unit.where, {n: list(found) for n, found in files.items()})
        keys = [self._key(unit, stem, number) for stem in stems]
        parts = {n: Part(spec, [[] for _ in range(spec.crops)]) for n, spec in self.specs.items()}
        for key, stem in zip(keys, stems, strict=True):
            row = Row(self.specs, {n: files[n].get(stem) for n in self.specs}, self.options.map_size)
            for name, part in parts.items():
                values, reason = row.read(name)
                for column, value in zip(part.columns, values, strict=True):
                    column.append(value)
                if reason:
                    part.quarantine[key] = reason
        return Run(keys, parts)

    def _key(self, unit: Unit, stem: str, number: int) -> str:
        if self.summary is not None:
            odd = part_of(self.store, number).odd if "~" in stem else {}
            return str(odd.get(stem, {}).get("key", key_of(stem)))
        return f"{unit.split}/{stem}" if unit.split else stem


def _refusal(name: str) -> str | None:
    """Why a folder cannot be read as this modality, None if it can."""
    base = name.partition("@")[0]
    if base not in CATALOGUE:
        return unknown("modality", base, CATALOGUE)
    entry = modality(name)
    if entry.name in _READABLE or entry.kind is Kind.GRID:
        return None
    return _UNREADABLE.get(entry.name, "ml-4m has no such files")


def _spec(name: str, crops: int, array: np.ndarray | None) -> Spec:
    entry = modality(name)
    count = crops if entry.per_crop else 1
    if entry.kind is Kind.GRID:
        length = array.shape[1] if array is not None else entry.tokens or 0
        side = round(length**0.5)
        square = side * side == length and not entry.name.endswith("_global")
        return Spec(count, entry.vocabulary, length, (side, side) if square else (1, length))
    conventions = {"depth": "relative", "normal": "opencv"}  # Omnidata's, 4M's teacher
    return Spec(count, convention=conventions.get(entry.name))


def _split(leaf: str) -> tuple[str, str]:
    """'a.b.json.gz' -> ('a.b', 'json.gz'), as ml-4m finds its files; keys of tars end at their first dot."""
    extension = next((e for e in _EXTENSIONS if leaf.lower().endswith(f".{e}")), leaf.rpartition(".")[2])
    return leaf[: -len(extension) - 1], extension.lower()


def _listed(store: Store) -> dict[tuple[str, str, str], list[str]]:
    """(split, folder, shard) of all data, with the names of single files, sorted."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for info in store.list():
        if any(part.startswith(".") for part in info.name.split("/")):
            continue
        if match := _TAR.fullmatch(info.name):
            found[match["split"] or "", match["folder"], match["shard"]] = []
        elif match := _FILE.fullmatch(info.name):
            found.setdefault((match["split"] or "", match["folder"], match["shard"]), []).append(match["leaf"])
    return found
