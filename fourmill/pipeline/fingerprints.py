"""What a shard object's name stands for: recipes (how a modality is made) and fingerprints (from what, shard by shard).

A *recipe* is the digest of a component's lineage and of the recipes of what it read, back to the ingested modalities.
The *fingerprint* of (modality, shard) is the digest of the modality's recipe, of the fingerprints of the ingested
objects that the shard goes back to, and of how often it was put back into the plan. So it does not depend on whether
labels between a picture and its tokens were stored, and ten thousand shards are checked in one pass over a few columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fourmill.pipeline.shards import FORMAT, canonical, digest, producer_id

INGESTED = ("rgb", "alt_text", "source")
_CORPUS = "corpus"  # stands for an ingested modality's recipe: its bytes count, shard by shard, not how they were read


def content_of(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a lineage that determines the output: licences do not, and a checkpoint counts by digest, not by
    where it lay.

    This is also all that goes into a shard object, so that its bytes name no one's folders.
    """
    content = {name: value for name, value in lineage.items() if name != "licence"}
    if isinstance(content.get("checkpoint"), Mapping):
        content["checkpoint"] = content["checkpoint"]["digest"]
    return content


def recipe_of(producer: Mapping[str, Any]) -> str:
    """The id of a producer: a lineage whose `inputs` names the recipe of every modality that it read."""
    return producer_id(content_of(producer))


@dataclass(frozen=True)
class Ancestry:
    """What a modality goes back to: ingested modalities, and those made on the way, itself included; both sorted."""

    ingested: tuple[str, ...]
    made: tuple[str, ...]


def ancestry(modality: str, recipe: str, producers: Mapping[str, Mapping[str, Any]]) -> Ancestry:
    """Of one modality's recipe; KeyError if `producers` lacks a recipe on the way."""
    ingested, made = set(), {modality}
    for name, made_by in producers[recipe].get("inputs", {}).items():
        if made_by == _CORPUS:
            ingested.add(name)
        else:
            before = ancestry(name, made_by, producers)
            ingested |= set(before.ingested)
            made |= set(before.made)
    return Ancestry(tuple(sorted(ingested)), tuple(sorted(made)))


def referenced(recipes: Iterable[str], producers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The producers of these recipes and of all that they read, by id, sorted."""
    found: dict[str, dict[str, Any]] = {}
    waiting = list(recipes)
    while waiting:
        recipe = waiting.pop()
        if recipe not in found and recipe in producers:
            found[recipe] = dict(producers[recipe])
            waiting += [r for r in found[recipe].get("inputs", {}).values() if r != _CORPUS]
    return dict(sorted(found.items()))


def inputs_entry(modality: str, recipes: Mapping[str, str]) -> str:
    """What stands for one input in a producer's `inputs`."""
    return _CORPUS if modality in INGESTED else recipes[modality]


def fingerprints(
    modality: str, recipe: str, ingested: Sequence[Sequence[str]], retried: Sequence[str] | None = None
) -> list[str]:
    """One fingerprint per shard. `ingested`: for each ingested modality of the ancestry, its fingerprints by shard;
    `retried`: for each shard the text of its retries, '' for none."""
    start = hashlib.sha256(f"shard {FORMAT} {modality} {recipe} ".encode())
    found = []
    for number, row in enumerate(zip(*ingested, strict=True)):
        sha = start.copy()
        sha.update(" ".join(row).encode())
        if retried is not None and retried[number]:
            sha.update(f" again {retried[number]}".encode())
        found.append(sha.hexdigest()[:16])
    return found


@dataclass(frozen=True)
class Retries:
    """How often the quarantined rows of a (modality, shard) were put back into the plan; most shards are not in it."""

    counts: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    def raised(self, modality: str, shards: Iterable[int]) -> Retries:
        """These shards once more."""
        old = self.counts.get(modality, {})
        new = {**old, **{s: old.get(s, 0) + 1 for s in shards}}
        return Retries({**self.counts, modality: new})

    def text(self, modalities: Sequence[str], shard: int) -> str:
        """What enters the fingerprint of a shard: the retries of a modality and of all made before it."""
        return " ".join(f"{m}:{n}" for m in modalities if (n := self.counts.get(m, {}).get(shard, 0)))

    def digest(self, modalities: Sequence[str], start: int, stop: int) -> str:
        """Of the retries of these modalities in shards start..stop; '' if there are none."""
        parts = [
            f"{m} {shard} {n}" for m in modalities for shard, n in sorted(self.counts.get(m, {}).items())
            if start <= shard < stop
        ]  # fmt: skip
        return digest(*parts) if parts else ""

    def blocks_changed(self, other: Retries, size: int) -> set[int]:
        """Numbers of the runs of `size` shards in which the two differ."""
        changed = set()
        for name in {*self.counts, *other.counts}:
            mine, theirs = self.counts.get(name, {}), other.counts.get(name, {})
            changed |= {s // size for s in {*mine, *theirs} if mine.get(s, 0) != theirs.get(s, 0)}
        return changed

    def __bool__(self) -> bool:
        return any(self.counts.values())

    def to_json(self) -> bytes:
        return canonical({m: {str(s): n for s, n in c.items()} for m, c in self.counts.items() if c}).encode()

    @classmethod
    def from_json(cls, tree: Mapping[str, Mapping[str, int]]) -> Retries:
        return cls({m: {int(s): n for s, n in c.items()} for m, c in tree.items()})


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed from one producer's content to another's, in words; inputs are compared by name only."""
    return _differences("", _own(old), _own(new))


def _own(producer: Mapping[str, Any]) -> dict[str, Any]:
    content = content_of(producer)
    return {**content, "inputs": sorted(content.get("inputs", {}))}


def explain(old: str, new: str, producers: Mapping[str, Mapping[str, Any]]) -> str:
    """Why objects of recipe `old` are stale where `new` is wanted: its own changes, else those of what it read."""
    if old == new:
        return "the ingested data changed"
    if old not in producers:
        return "made by another configuration"
    before, after = producers[old], producers[new]
    if changes := differences(before, after):
        return "; ".join(changes)
    was, now = before.get("inputs", {}), after.get("inputs", {})
    changed = [name for name in sorted(now) if was.get(name) != now[name]]
    parts = [f"its input {name} changed ({explain(was[name], now[name], producers)})" for name in changed]
    return "; ".join(parts) or "made by another configuration"


def _differences(path: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted({*old, *new})
        return [d for n in names for d in _differences(f"{path}.{n}".lstrip("."), old.get(n), new.get(n))]
    return [] if canonical(old) == canonical(new) else [f"{path} was {_short(old)}, is {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:20] + "…"
