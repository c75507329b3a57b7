"""The plan: which (shard, stage) units are missing or stale, and why.

What is wanted is a fingerprint for every (modality, shard) (fingerprints.py); what is there stands in the manifest. A
block of ten thousand shards that one recipe made is told done from the manifest's root; the others are compared column
by column. Objects that an interrupted run left unpublished are found by listing the blocks that lack something.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fourmill.config import Config
from fourmill.pipeline.component import Component
from fourmill.pipeline.fingerprints import (
    INGESTED,
    Ancestry,
    ancestry,
    explain,
    fingerprints,
    inputs_entry,
    recipe_of,
)
from fourmill.pipeline.manifest import BLOCK, Manifest, block_of
from fourmill.pipeline.manifest.tables import inputs_digest
from fourmill.pipeline.shards import parse_name
from fourmill.pipeline.stages import Stage, build_stages, chosen_stages, inputs_of
from fourmill.pipeline.store import Store

_LISTINGS = 16  # at once; each is a request or twenty


@dataclass(frozen=True)
class Unit:
    """One shard to be taken through one stage.

    `makes`: modality -> fingerprint, for what is missing. `inputs`: the stored modalities to read, likewise.
    `skip`: rows not to touch, key -> reason (they killed a worker before). `attempt`: 1 for the first try.
    """

    stage: str
    shard: int
    makes: Mapping[str, str]
    inputs: Mapping[str, str]
    rows: int = 0
    skip: Mapping[str, str] = field(default_factory=dict)
    attempt: int = 1

    def skipping(self, killers: Mapping[str, str]) -> Unit:
        return replace(self, skip={**self.skip, **killers})

    def again(self) -> Unit:
        return replace(self, attempt=self.attempt + 1)


@dataclass(frozen=True)
class _Todo:
    """What one block lacks of one stage. `shards`: int64 (N,); `lacking`: bool (N, stored modalities of the stage);
    `rows`: int64 (N,)."""

    stage: Stage
    shards: np.ndarray
    lacking: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class StageTotals:
    """Shards and samples to do, shards done already, and why, by 'modality: reason'."""

    shards: int = 0
    samples: int = 0
    done: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Stages in order of dependence, and what is to be done in each, block by block.

    `producers`: lineages by recipe. `unpublished`: objects that are there though the manifest does not name them, as
    (modality, shard, fingerprint).
    """

    stages: tuple[Stage, ...]
    todo: tuple[_Todo, ...]
    totals: Mapping[str, StageTotals]
    producers: Mapping[str, dict[str, Any]]
    unpublished: tuple[tuple[str, int, str], ...]
    wanted: Wanted

    @property
    def num_units(self) -> int:
        return sum(t.shards for t in self.totals.values())

    def producer(self, component: Component) -> dict[str, Any]:
        """The lineage of one of its components, with the recipes of what it reads."""
        return self.producers[self.wanted.recipes[component.makes[0]]]

    def units(self, stage: str | None = None) -> Iterator[Unit]:
        """What is to be done, made while it is asked for: a large plan has millions."""
        for todo in self.todo:
            if stage in (None, todo.stage.name):
                for shard, lacking, rows in zip(todo.shards, todo.lacking, todo.rows, strict=True):
                    names = [m for m, lacks in zip(todo.stage.stores, lacking, strict=True) if lacks]
                    makes = {m: self.wanted(m, int(shard)) for m in names}
                    inputs = {m: self.wanted(m, int(shard)) for m in todo.stage.reads}
                    yield Unit(todo.stage.name, int(shard), makes, inputs, int(rows))

    def lacks(self) -> dict[str, list[np.ndarray]]:
        """Modality -> the shards, int64, that lack it."""
        found: dict[str, list[np.ndarray]] = {}
        for todo in self.todo:
            for column, name in enumerate(todo.stage.stores):
                found.setdefault(name, []).append(todo.shards[todo.lacking[:, column]])
        return found

    def describe(self) -> str:
        """The plan in words, for `--dry-run`."""
        lines = []
        for stage in self.stages:
            totals = self.totals[stage.name]
            made = ", ".join(m if m in stage.stores else f"({m})" for m in stage.makes)
            lines.append(f"stage {stage.name}: {' + '.join(c.name for c in stage.components)} -> {made}")
            lines.append(f"  {totals.shards} shards to do ({totals.samples} samples), {totals.done} done")
            lines += [f"  {count} x {reason}" for reason, count in totals.reasons.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        stages = {
            s.name: {
                "components": [c.name for c in s.components],
                "makes": list(s.makes),
                "stores": list(s.stores),
                "shards_to_do": (t := self.totals[s.name]).shards,
                "samples_to_do": t.samples,
                "shards_done": t.done,
                "reasons": dict(t.reasons),
            }
            for s in self.stages
        }
        return {"units": self.num_units, "unpublished": len(self.unpublished), "stages": stages}


class Wanted:
    """The fingerprint that every (modality, shard) should have, by a configuration's recipes."""

    def __init__(self, manifest: Manifest, recipes: Mapping[str, str], producers: Mapping[str, dict[str, Any]]) -> None:
        self.manifest, self.recipes = manifest, recipes
        self.ancestry: dict[str, Ancestry] = {m: ancestry(m, r, producers) for m, r in recipes.items()}
        self._block = functools.lru_cache(maxsize=64)(self._block_of)

    def __call__(self, name: str, shard: int) -> str:
        return self._block(name, block_of(shard))[shard]

    def in_block(self, name: str, block: int) -> dict[int, str]:
        """Fingerprint by shard."""
        return self._block(name, block)

    def is_settled(self, name: str, block: int) -> bool:
        """Whether the manifest's root says that every shard of the block has what is wanted."""
        info = self.manifest.blocks.get(name, {}).get(block)
        known = self.ancestry[name]
        ingested = {m: i for m in known.ingested if (i := self.manifest.blocks.get(m, {}).get(block))}
        if info is None or info.settled is None or len(ingested) < len(known.ingested):
            return False
        inputs = inputs_digest(known, ingested, self.manifest.retries, block)
        return info.settled == {"recipe": self.recipes[name], "inputs": inputs}

    def _block_of(self, name: str, block: int) -> dict[int, str]:
        if name in INGESTED:
            table = self.manifest.table(name, block)
            return dict(zip(table["shard"].to_pylist(), table["fingerprint"].to_pylist(), strict=True))
        shards = self.manifest.table("rgb", block)["shard"].to_pylist()
        known, retries = self.ancestry[name], self.manifest.retries
        columns = [self._column(m, block, shards) for m in known.ingested]
        again = [retries.text(known.made, s) for s in shards] if retries else None
        return dict(zip(shards, fingerprints(name, self.recipes[name], columns, again), strict=True))

    def _column(self, name: str, block: int, shards: Sequence[int]) -> list[str]:
        found = self._block(name, block)
        if lacking := [s for s in shards if s not in found]:
            raise ValueError(f"the dataset's {name} lacks shard {lacking[0]}, which rgb has: ingest the corpus again")
        return [found[s] for s in shards]


def make_plan(
    store: Store, manifest: Manifest, config: Config, only: Iterable[str] | None = None, recheck: bool = False
) -> Plan:
    """What must be done so that every stage (or every stage in `only`) has its outputs for every shard.

    The manifest is believed; with `recheck` the store is asked for everything that it names, so that what was lost is
    made again.
    """
    stages = build_stages(config)
    chosen = chosen_stages(stages, only)
    recipes, producers = _recipes(stages)
    wanted = Wanted(manifest, recipes, producers)
    planner = _Planner(store, manifest, wanted, {**manifest.producers, **producers}, recheck)
    todo, totals = [], {}
    with ThreadPoolExecutor(_LISTINGS) as pool:
        for stage in chosen:
            parts = [planner.todo(stage, block, pool) for block in sorted(manifest.blocks.get("rgb", {}))]
            found = [part for part in parts if part is not None]
            todo += found
            totals[stage.name] = _totals(found, manifest.num_shards("rgb"), planner.reasons.pop(stage.name, {}))
    return Plan(chosen, tuple(todo), totals, producers, tuple(planner.unpublished), wanted)


def _recipes(stages: Iterable[Stage]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Recipe by modality, and producer by recipe, of all that the stages make."""
    recipes: dict[str, str] = {}
    producers: dict[str, dict[str, Any]] = {}
    for stage in stages:
        for component in stage.components:
            producer = producer_of(component, recipes)
            producers[recipe_of(producer)] = producer
            recipes.update({made: recipe_of(producer) for made in component.makes})
    return recipes, producers


def producer_of(component: Component, recipes: Mapping[str, str]) -> dict[str, Any]:
    """A component's lineage with the recipe of each of its inputs."""
    return {**component.lineage(), "inputs": {m: inputs_entry(m, recipes) for m in inputs_of(component)}}


def _totals(todo: Sequence[_Todo], shards: int, reasons: Mapping[str, int]) -> StageTotals:
    lacking = sum(len(t.shards) for t in todo)
    samples = sum(int(t.rows.sum()) for t in todo)
    return StageTotals(lacking, samples, shards - lacking, dict(sorted(reasons.items())))


class _Planner:
    """Compares one block of one stage after another with what is wanted."""

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        wanted: Wanted,
        producers: Mapping[str, dict[str, Any]],
        recheck: bool,
    ) -> None:
        self.store, self.manifest, self.wanted, self.producers = store, manifest, wanted, producers
        self.recheck = recheck
        self.reasons: dict[str, Counter[str]] = {}
        self.unpublished: list[tuple[str, int, str]] = []

    def todo(self, stage: Stage, block: int, pool: ThreadPoolExecutor) -> _Todo | None:
        if not self.recheck and all(self.wanted.is_settled(m, block) for m in stage.stores):
            return None
        table = self.manifest.table("rgb", block)
        shards, rows = table["shard"].to_numpy(), table["rows"].to_numpy()
        columns = pool.map(lambda m: self._missing(m, block), stage.stores)
        lacking = np.stack([np.isin(shards, missing) for missing in columns], axis=1)
        for column, name in enumerate(stage.stores):
            self._explain(stage, name, block, shards[lacking[:, column]])
        some = lacking.any(axis=1)
        return _Todo(stage, shards[some], lacking[some], rows[some]) if some.any() else None

    def _missing(self, name: str, block: int) -> list[int]:
        """The shards of a block whose wanted object is not there; notes those that only the manifest lacks."""
        wanted = self.wanted.in_block(name, block)
        known = self._known(name, block)
        lacking = [s for s, f in wanted.items() if self.recheck or known.get(s, ("", ""))[0] != f]
        if not lacking:
            return []
        there = _stored(self.store, name, block, whole=self.recheck)
        found = [(name, s, wanted[s]) for s in lacking if wanted[s] in there.get(s, ())]
        self.unpublished += [item for item in found if known.get(item[1], ("", ""))[0] != item[2]]
        return sorted(set(lacking) - {shard for _, shard, _ in found})

    def _known(self, name: str, block: int) -> dict[int, tuple[str, str]]:
        """Fingerprint and recipe by shard, as the manifest has them."""
        if block not in self.manifest.blocks.get(name, {}):
            return {}
        table = self.manifest.table(name, block)
        columns = (table[c].to_pylist() for c in ("shard", "fingerprint", "producer"))
        return {shard: (fingerprint, recipe) for shard, fingerprint, recipe in zip(*columns, strict=True)}

    def _explain(self, stage: Stage, name: str, block: int, shards: np.ndarray) -> None:
        known, wanted = self._known(name, block), self.wanted.in_block(name, block)
        made = self.wanted.ancestry[name].made
        for shard in shards.tolist():
            fingerprint, recipe = known.get(shard, ("", ""))
            if not recipe:
                reason = "missing"
            elif fingerprint == wanted[shard]:
                reason = "lost: the manifest names it, the store does not have it"
            elif recipe == self.wanted.recipes[name] and self.manifest.retries.text(made, shard):
                reason = "put back: its quarantined rows are tried again"
            else:
                reason = "stale: " + self._change(name, recipe)
            self.reasons.setdefault(stage.name, Counter())[f"{name}: {reason}"] += 1

    @functools.lru_cache(maxsize=1024)  # noqa: B019  (the planner lives as long as the plan is made)
    def _change(self, name: str, recipe: str) -> str:
        return explain(recipe, self.wanted.recipes[name], self.producers)


def _stored(store: Store, name: str, block: int, whole: bool = False) -> dict[int, set[str]]:
    """Fingerprints with a record, by shard, of one block; with `whole`, those with both a record and an object."""
    found: dict[str, dict[int, set[str]]] = {"json": {}, "arrow": {}}
    for info in store.list(block_prefix(name, block)):
        parsed = parse_name(info.name)
        if parsed and block_of(parsed[1]) == block:
            found[info.name.rpartition(".")[2]].setdefault(parsed[1], set()).add(parsed[2])
    if not whole:
        return found["json"]
    return {shard: prints & found["arrow"].get(shard, set()) for shard, prints in found["json"].items()}


def block_prefix(name: str, block: int) -> str:
    """What the names of a block's objects begin with: shard numbers have at least six digits."""
    return f"{name}/shard-{block * BLOCK:06d}"[: -len(str(BLOCK)) + 1]
