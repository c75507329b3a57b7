"""Reading back what `export` wrote: any of its layouts, told by the `fourmill.json` beside the data.

Every object is compared with the digest that the export noted, so that what comes in is what went out.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from fourmill.modalities import modality
from fourmill.pipeline.exchange import members, parquet
from fourmill.pipeline.exchange.card import non_commercial
from fourmill.pipeline.exchange.layout import FORMAT, SUMMARY, PartInfo, part_name
from fourmill.pipeline.exchange.rows import Part, Run, WrongDataError
from fourmill.pipeline.exchange.stems import key_of
from fourmill.pipeline.exchange.tars import contents
from fourmill.pipeline.shards import Spec, check_format, parse_name
from fourmill.pipeline.store import Store


class Reader(Protocol):
    """A source of runs, one for each shard to be. Threads share it."""

    layout: str
    specs: Mapping[str, Spec]
    settled_keys: bool
    """Whether its keys are a dataset's already: unique and fit to store."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> Run:
        """Shard `number`; WrongDataError for one that contradicts itself."""

    def lineage(self, name: str) -> dict[str, Any]:
        """What is known of how a modality was made."""

    def told(self) -> dict[str, Any]:
        """What the corpus entry is to say of the source."""

    def producers(self) -> Mapping[str, Mapping[str, Any]]:
        """The lineages that those of the modalities name as inputs."""


def read_summary(store: Store) -> dict[str, Any] | None:
    """The `fourmill.json` of an export, None where there is none."""
    try:
        tree = json.loads(store.get(SUMMARY))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WrongDataError(f"{SUMMARY} in {store.uri} is not JSON: {error}") from error
    check_format(tree.get("format"), f"{SUMMARY} in {store.uri}", FORMAT)
    return dict(tree)


class ExportReader:
    """WebDataset, Energon and Parquet exports."""

    settled_keys = True

    def __init__(self, store: Store, summary: Mapping[str, Any]) -> None:
        self.store, self.summary = store, summary
        self.layout: str = summary["layout"]
        self.specs: Mapping[str, Spec] = specs_in(summary)

    def __len__(self) -> int:
        return int(self.summary["shards"])

    def lineage(self, name: str) -> dict[str, Any]:
        return lineage_in(self.summary, name)

    def told(self) -> dict[str, Any]:
        return told_of(self.summary)

    def producers(self) -> Mapping[str, Mapping[str, Any]]:
        return dict(self.summary["producers"])

    def read(self, number: int) -> Run:
        part = part_of(self.store, number)
        file = next(f for f in part.files if not f.name.endswith(".idx"))
        data, where = whole(self.store, file.name, file.digest), f"{file.name} in {self.store.uri}"
        run = parquet.read(data, self.specs, where) if self.layout == "parquet" else self._tar(data, part, where)
        if len(run.keys) != part.rows:
            raise WrongDataError(f"{where} holds {len(run.keys)} samples, {part.rows} were exported")
        return run

    def _tar(self, data: bytes, part: PartInfo, where: str) -> Run:
        samples = {stem: dict(found) for stem, found in grouped(contents(io.BytesIO(data), where), where)}
        stems = list(samples)
        for stem, odd in sorted(part.odd.items(), key=lambda o: o[1].get("row", -1)):
            if "row" in odd:
                stems.insert(odd["row"], stem)
        keys = [part.odd.get(stem, {}).get("key", key_of(stem)) for stem in stems]
        parts = {}
        for name, spec in self.specs.items():
            columns = [
                [self._stored(samples.get(s, {}), name, crop, where) for s in stems] for crop in range(spec.crops)
            ]
            why = {
                k: part.odd[s]["quarantine"].get(name) for k, s in zip(keys, stems, strict=True) if _reasons(part, s)
            }
            parts[name] = Part(spec, columns, {k: reason for k, reason in why.items() if reason})
        return Run(keys, parts)

    def _stored(self, files: Mapping[tuple[str, int], bytes], name: str, crop: int, where: str) -> Any:
        data = files.get((name, crop))
        if data is None:
            return None
        try:
            return members.from_file(modality(name), data)
        except ValueError as error:
            raise WrongDataError(f"{where}: {name}: {error}") from error


def _reasons(part: PartInfo, stem: str) -> bool:
    return "quarantine" in part.odd.get(stem, {})


def grouped(
    files: Iterator[tuple[str, bytes]], where: str
) -> Iterator[tuple[str, list[tuple[tuple[str, int], bytes]]]]:
    """A WebDataset tar's members by sample: (stem, [((modality, crop), content)])."""
    stem, found = None, list[tuple[tuple[str, int], bytes]]()
    for name, data in files:
        mine, _, rest = name.partition(".")
        place = members.parse_suffix(rest)
        if place is None:
            raise WrongDataError(f"{where}: {name!r} is not <key>.<modality>.<extension>")
        if mine != stem:
            if stem is not None:
                yield stem, found
            stem, found = mine, []
        found.append((place, data))
    if stem is not None:
        yield stem, found


def part_of(store: Store, number: int) -> PartInfo:
    """What the export noted of one of its shards."""
    try:
        return PartInfo.from_json(json.loads(store.get(part_name(number))))
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise WrongDataError(f"{part_name(number)} in {store.uri} is missing or damaged: {error}") from error


def whole(store: Store, name: str, digest: str) -> bytes:
    """An object's bytes, if they are those that were exported."""
    try:
        data = store.get(name)
    except FileNotFoundError as error:
        raise WrongDataError(f"{name} is gone from {store.uri}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise WrongDataError(f"{name} in {store.uri} is not what was exported: its digest is {found}, not {digest}")
    return data


def specs_in(summary: Mapping[str, Any]) -> dict[str, Spec]:
    """The values' specifications by modality; ValueError for a modality that this Fourmill does not know."""
    for name in summary["modalities"]:
        modality(name)
    return {name: Spec.from_json(entry["spec"]) for name, entry in summary["modalities"].items()}


def lineage_in(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """How a modality of an export was made: its producers as inputs, and of the strictest the licences."""
    recipes = [r for r in summary["modalities"][name]["recipes"] if r in summary["producers"]]
    made = sorted((summary["producers"][r] for r in recipes), key=lambda p: not non_commercial({"": p}))
    inputs = {name if n == 0 else f"{name} ({n + 1})": recipe for n, recipe in enumerate(recipes)}
    return {"inputs": inputs, **{k: made[0][k] for k in ("licence", "checkpoint") if made and k in made[0]}}


def told_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Of an export's summary, what a corpus entry keeps."""
    kept = ("layout", "identity", "dataset", "snapshot", "dropped", "notes")
    return {"export": {name: summary[name] for name in kept}, "corpus": summary.get("corpus", {})}


def is_dataset(names: Sequence[str]) -> bool:
    """Whether object names are those of a dataset of ours, which needs no import."""
    return any(parse_name(name) for name in names)
