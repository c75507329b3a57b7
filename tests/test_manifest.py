"""The manifest: consistent snapshots that no two writers can take from each other, and that cost what changed."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fourmill.modalities import modality
from fourmill.pipeline import codecs
from fourmill.pipeline.fingerprints import Retries, ancestry, explain, fingerprints, recipe_of
from fourmill.pipeline.manifest import BLOCK, Manifest, Update, read_manifest, snapshots, update_manifest
from fourmill.pipeline.manifest.tables import SCHEMA
from fourmill.pipeline.shards import Record, Spec, commit, digest, producer_id, record_of, write_shard
from fourmill.pipeline.statistics import unpack_counts
from fourmill.pipeline.store import LocalStore, Store, open_store

PRODUCER = {"class": "test", "version": 1, "config": {}}
DEPTH = {"class": "D", "version": 1, "config": {"gain": 1}, "inputs": {"rgb": "corpus"}}
TOKENS = {"class": "T", "version": 1, "config": {}, "inputs": {"depth": recipe_of(DEPTH)}}


def object_bytes(
    name: str,
    shard: int,
    values: Sequence[Any] = ("a",),
    spec: Spec | None = None,
    producer: dict[str, Any] | None = None,
    fingerprint: str = "",
    quarantine: dict[str, str] | None = None,
) -> bytes:
    """A shard object of one column, under keys k0, k1, …"""
    fingerprint = fingerprint or digest(name, str(shard), *map(str, values))[:16]
    column = [None if v is None else codecs.encode(modality(name), v) for v in values]
    keys = [f"k{i}" for i in range(len(values))]
    return write_shard(
        name, shard, fingerprint, keys, [column], spec or Spec(), producer or PRODUCER, quarantine or {}
    )  # fmt: skip


def texts(shards: Sequence[int], **changes: Any) -> list[Record]:
    return [record_of(object_bytes("alt_text", shard, **changes)) for shard in shards]


def add(store: Store, records: Sequence[Record], *producers: dict[str, Any]) -> Manifest:
    known = {producer_id(p): p for p in (PRODUCER, *producers)}
    return update_manifest(store, lambda _: Update(records, known))


def test_a_snapshot_comes_back_as_it_was_written(store_uri: str) -> None:
    store = open_store(store_uri)
    spec = Spec(vocabulary=10, length=2, grid=(1, 2), classes=("a", "b"), convention="metric")
    tokens = record_of(object_bytes("tok_rgb", 3, [np.array([1, 2])], spec, quarantine={"k0": "decode: x"}))
    tokens = replace(tokens, spent={"seconds": 1.5, "gpu_seconds": 0.5, "attempts": 2})
    update = Update(
        [*texts([0, 1]), tokens], {tokens.producer: PRODUCER}, corpus={"samples": 2, "sources": ["x"]}
    )  # fmt: skip
    written = update_manifest(store, lambda _: update)
    manifest = read_manifest(store)
    assert (written.snapshot, manifest) == (1, written)
    assert manifest.modalities == ["alt_text", "tok_rgb"]
    assert manifest.shards.tolist() == [0, 1]  # of the first modality: there is no rgb
    assert manifest.corpus == {"samples": 2, "sources": ["x"]}
    brief = {"tokens": 2, "min": 1, "max": 2}
    assert list(manifest.records("tok_rgb")) == [manifest.record("tok_rgb", 3)]
    assert replace(manifest.record("tok_rgb", 3) or tokens, statistics=brief) == replace(tokens, statistics=brief)
    assert manifest.record("tok_rgb", 0) is None
    assert manifest.record("depth", 3) is None
    assert Spec.from_json(next(manifest.records("tok_rgb")).spec) == spec


def test_totals_come_from_the_root_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    spent = {"seconds": 1.5, "gpu_seconds": 0.5, "attempts": 2}
    faulty = record_of(object_bytes("alt_text", BLOCK + 1, ["a", None], quarantine={"k1": "decode: truncated"}))
    records = [*texts([0, 1]), replace(faulty, spent=spent)]
    add(store, records)
    for info in list(store.list("manifest/records/")):
        store.delete(info.name)
    totals = read_manifest(store).totals("alt_text")
    assert (totals.shards, totals.rows, totals.present) == (3, 4, 3)
    assert totals.num_bytes == sum(r.num_bytes for r in records)
    assert totals.recipes == {producer_id(PRODUCER): 3}
    assert totals.quarantined == {"decode": 1}
    assert totals.spent == spent


def test_records_of_some_shards_are_those_between_the_bounds(tmp_path: Path) -> None:
    manifest = add(LocalStore(tmp_path), texts([0, 5, BLOCK - 1, BLOCK, 3 * BLOCK]))
    assert sorted(manifest.blocks["alt_text"]) == [0, 1, 3]
    assert [r.shard for r in manifest.records("alt_text")] == [0, 5, BLOCK - 1, BLOCK, 3 * BLOCK]
    assert [r.shard for r in manifest.records("alt_text", 5, BLOCK + 1)] == [5, BLOCK - 1, BLOCK]
    assert manifest.shards.tolist() == [0, 5, BLOCK - 1, BLOCK, 3 * BLOCK]


def test_a_snapshot_rewrites_only_the_blocks_that_changed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    before = add(store, texts([0, BLOCK]))
    names = {info.name for info in store.list("manifest/records/")}
    after = add(store, texts([BLOCK + 7]))
    assert after.blocks["alt_text"][0] == before.blocks["alt_text"][0]
    assert len({info.name for info in store.list("manifest/records/")} - names) == 1


# --- writers -------------------------------------------------------------------------------------------------------


def test_two_writers_at_once_lose_no_record(store_uri: str) -> None:
    writers, each = 4, 3
    start = threading.Barrier(writers)

    def write(writer: int) -> None:
        store = open_store(store_uri)
        start.wait()
        for i in range(each):
            add(store, texts([writer * each + i]))

    threads = [threading.Thread(target=write, args=(w,)) for w in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manifest = read_manifest(open_store(store_uri))
    assert manifest.shards.tolist() == list(range(writers * each))
    assert manifest.snapshot == writers * each


RACES = 100


def _race(uri: str, writer: int, turns: Any) -> None:
    """One shard of its own in every round, both writers let go at once."""
    store = open_store(uri)
    for turn in range(RACES):
        record = commit(store, object_bytes("alt_text", 2 * turn + writer, [f"{writer} {turn}"]))
        turns.wait(timeout=60)
        add(store, [record])


def test_two_processes_race_a_hundred_times_and_no_shard_is_lost_or_doubled(store_uri: str) -> None:
    context = multiprocessing.get_context("spawn")
    turns = context.Barrier(2)
    writers = [context.Process(target=_race, args=(store_uri, writer, turns)) for writer in (0, 1)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(timeout=150)
    assert [process.exitcode for process in writers] == [0, 0]
    store = open_store(store_uri)
    manifest = read_manifest(store)
    assert [r.shard for r in manifest.records("alt_text")] == list(range(2 * RACES))
    assert snapshots(store) == list(range(1, 2 * RACES + 1))
    sizes = [read_manifest(store, n).num_shards("alt_text") for n in range(1, 2 * RACES + 1)]
    assert sizes == list(range(1, 2 * RACES + 1))  # each snapshot holds all before it and one more


def test_a_writer_that_loses_the_race_adds_to_the_winners_snapshot(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    add(store, texts([0]))
    seen = []

    def change(old: Manifest) -> Update:
        seen.append(old.snapshot)
        if len(seen) == 1:  # another writer comes between reading and publishing
            add(store, texts([1]))
        return Update(texts([2]))

    manifest = update_manifest(store, change)
    assert seen == [1, 2]
    assert (manifest.snapshot, manifest.shards.tolist()) == (3, [0, 1, 2])


def test_a_change_that_changes_nothing_publishes_nothing(store_uri: str) -> None:
    store = open_store(store_uri)
    first = add(store, texts([0]))
    names = [info.name for info in store.list()]
    assert add(store, texts([0])) == first
    assert update_manifest(store, lambda _: None) == first
    assert [info.name for info in store.list()] == names


def test_an_older_snapshot_stays_readable(store_uri: str) -> None:
    store = open_store(store_uri)
    held = add(store, texts([0]))
    add(store, texts([1]))
    assert read_manifest(store, 1).shards.tolist() == [0]
    assert read_manifest(store, 2).shards.tolist() == read_manifest(store).shards.tolist() == [0, 1]
    assert [r.shard for r in held.records("alt_text")] == [0]
    with pytest.raises(FileNotFoundError, match=r"no manifest 3 in .*: it has snapshots 1 to 2"):
        read_manifest(store, 3)


def test_a_dataset_without_a_manifest_says_how_to_get_one(store_uri: str) -> None:
    with pytest.raises(FileNotFoundError, match="no snapshot; `fourmill ingest` makes the first"):
        read_manifest(open_store(store_uri))


def test_a_replaced_record_takes_its_producer_along(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    newer = {**PRODUCER, "version": 2}
    add(store, texts([0, 1]))
    mixed = add(store, texts([0], producer=newer, values=("b",)), newer)
    assert mixed.generations("alt_text") == sorted([producer_id(PRODUCER), producer_id(newer)])
    assert mixed.totals("alt_text").recipes == {producer_id(PRODUCER): 1, producer_id(newer): 1}
    whole = add(store, texts([1], producer=newer, values=("b",)), newer)
    assert list(whole.producers) == [producer_id(newer)]


def test_record_tables_open_as_plain_parquet(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    manifest = add(store, texts([0, 1]))
    table = pq.read_table(tmp_path / manifest.blocks["alt_text"][0].name)
    assert table.column_names == SCHEMA.names
    assert table["name"].to_pylist() == [r.name for r in texts([0, 1])]
    assert table["digest"].to_pylist() == [r.digest for r in texts([0, 1])]


@pytest.mark.parametrize("found", [1, 7])
def test_a_manifest_of_another_format_is_refused_naming_both(tmp_path: Path, found: int) -> None:
    store = LocalStore(tmp_path)
    store.create("manifest/snapshot-000001.json", json.dumps({"format": found}).encode())
    with pytest.raises(ValueError, match=rf"manifest 1 of .* has format {found}; this Fourmill reads format 2"):
        read_manifest(store)


def test_a_damaged_record_table_is_a_clear_error_naming_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    info = add(store, texts([0])).blocks["alt_text"][0]
    store.delete(info.name)
    store.create(info.name, b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match=f"{info.name} in .* is not a record table"):
        list(read_manifest(store).records("alt_text"))


# --- statistics ----------------------------------------------------------------------------------------------------

GRID = Spec(vocabulary=4, length=2, grid=(1, 2))


def tokens(store: Store, shard: int, ids: Sequence[int], producer: dict[str, Any] = PRODUCER) -> Record:
    return commit(store, object_bytes("tok_rgb", shard, [np.array(ids)], GRID, producer))


def histograms(manifest: Manifest) -> dict[str, list[int]]:
    """Counts of the four ids by recipe."""
    found = {recipe: unpack_counts(one["histogram"]) for recipe, one in manifest.statistics("tok_rgb").items()}
    return {recipe: np.pad(counts, (0, 4 - len(counts))).tolist() for recipe, counts in found.items()}


def test_merged_statistics_are_those_of_the_shards_named_whatever_was_replaced(store_uri: str) -> None:
    store, newer = open_store(store_uri), {**PRODUCER, "version": 2}
    old, new = producer_id(PRODUCER), producer_id(newer)
    add(store, [tokens(store, 0, [0, 1]), tokens(store, 1, [1, 1]), tokens(store, BLOCK, [3, 3])])
    assert histograms(read_manifest(store)) == {old: [1, 3, 0, 2]}
    add(store, [tokens(store, 1, [2, 2], newer)], newer)
    assert histograms(read_manifest(store)) == {old: [1, 1, 0, 2], new: [0, 0, 2, 0]}
    add(store, [tokens(store, 0, [3, 2], newer)], newer)
    assert histograms(read_manifest(store)) == {old: [0, 0, 0, 2], new: [0, 0, 3, 1]}


def test_lost_record_of_a_replaced_shard_does_not_stop_a_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(tmp_path)
    first, second = tokens(store, 0, [0, 1]), tokens(store, 1, [1, 1])
    add(store, [first, second])
    store.delete(first.name.replace(".arrow", ".json"))
    add(store, [tokens(store, 0, [3, 3])])
    assert histograms(read_manifest(store)) == {producer_id(PRODUCER): [0, 2, 0, 2]}
    assert "from 1 of 1 shards: the record of a replaced one is gone" in caplog.text


# --- what settles a block ------------------------------------------------------------------------------------------


def corpus(shards: Sequence[int]) -> list[Record]:
    return [record_of(object_bytes("rgb", s, [b"picture"])) for s in shards]


def labels(name: str, producer: dict[str, Any], rgb: Sequence[Record], again: str = "") -> list[Record]:
    """Records as a run would make them, without the objects."""
    prints = fingerprints(name, recipe_of(producer), [[r.fingerprint for r in rgb]], [again] * len(rgb))
    made = [object_bytes("alt_text", r.shard, fingerprint=f) for r, f in zip(rgb, prints, strict=True)]
    return [replace(record_of(data), modality=name, producer=recipe_of(producer)) for data in made]


def test_block_is_settled_once_every_shard_has_what_one_recipe_gives(tmp_path: Path) -> None:
    store, rgb = LocalStore(tmp_path), corpus([0, 1, 2])
    add(store, rgb)
    made = labels("depth", DEPTH, rgb)
    assert add(store, made[:2], DEPTH).blocks["depth"][0].settled is None
    settled = add(store, made[2:], DEPTH).blocks["depth"][0].settled
    assert settled is not None
    assert settled["recipe"] == recipe_of(DEPTH)
    both = add(store, labels("tok_depth", TOKENS, rgb), DEPTH, TOKENS).blocks["tok_depth"][0].settled
    assert both == {"recipe": recipe_of(TOKENS), "inputs": settled["inputs"]}  # both go back to the same pictures


def test_shard_of_a_fingerprint_that_its_recipe_does_not_give_leaves_a_block_unsettled(tmp_path: Path) -> None:
    store, rgb = LocalStore(tmp_path), corpus([0, 1])
    add(store, rgb)
    made = labels("depth", DEPTH, rgb)
    wrong = [made[0], replace(made[1], fingerprint="0123456789abcdef")]
    assert add(store, wrong, DEPTH).blocks["depth"][0].settled is None


def test_changed_pictures_unsettle_what_was_made_of_them(tmp_path: Path) -> None:
    store, rgb = LocalStore(tmp_path), corpus([0, 1])
    add(store, [*rgb, *labels("depth", DEPTH, rgb)], DEPTH)
    other = record_of(object_bytes("rgb", 1, [b"another"]))
    assert add(store, [other], DEPTH).blocks["depth"][0].settled is None


def test_retry_changes_the_fingerprints_of_its_shard_and_of_what_is_made_of_it(tmp_path: Path) -> None:
    store, rgb = LocalStore(tmp_path), corpus([0, 1])
    add(store, [*rgb, *labels("depth", DEPTH, rgb), *labels("tok_depth", TOKENS, rgb)], DEPTH, TOKENS)
    retries = Retries().raised("depth", [1])
    manifest = update_manifest(store, lambda _: Update(retries=retries))
    assert manifest.retries == retries
    assert read_manifest(store).retries == retries
    assert {m: manifest.blocks[m][0].settled for m in ("depth", "tok_depth")} == {"depth": None, "tok_depth": None}
    again = [*labels("depth", DEPTH, rgb[1:], "depth:1"), *labels("tok_depth", TOKENS, rgb[1:], "depth:1")]
    done = add(store, again, DEPTH, TOKENS)
    assert all(done.blocks[m][0].settled for m in ("depth", "tok_depth"))
    assert retries.raised("depth", [1, 5]).counts == {"depth": {1: 2, 5: 1}}
    assert (retries.text(["depth"], 1), retries.text(["depth"], 0)) == ("depth:1", "")


def test_ancestry_goes_back_to_the_corpus() -> None:
    producers = {recipe_of(p): p for p in (DEPTH, TOKENS)}
    found = ancestry("tok_depth", recipe_of(TOKENS), producers)
    assert (found.ingested, found.made) == (("rgb",), ("depth", "tok_depth"))
    with pytest.raises(KeyError):
        ancestry("tok_depth", recipe_of(TOKENS), {recipe_of(TOKENS): TOKENS})


def test_licence_and_place_of_weights_do_not_enter_a_recipe() -> None:
    weights = {"reference": "/a/x", "digest": "d1", "licence": "mit"}
    first = {**DEPTH, "licence": "MIT", "checkpoint": weights}
    moved = {**DEPTH, "licence": "other", "checkpoint": {**weights, "reference": "/b/y", "licence": "?"}}
    assert recipe_of(first) == recipe_of(moved)
    assert recipe_of(first) != recipe_of({**first, "checkpoint": {**weights, "digest": "d2"}})


def test_changes_are_told_in_words_back_to_their_cause() -> None:
    newer = {**DEPTH, "version": 2}
    tokens_of_newer = {**TOKENS, "inputs": {"depth": recipe_of(newer)}}
    producers = {recipe_of(p): p for p in (DEPTH, TOKENS, newer, tokens_of_newer)}
    assert explain(recipe_of(DEPTH), recipe_of(newer), producers) == "version was 1, is 2"
    because = explain(recipe_of(TOKENS), recipe_of(tokens_of_newer), producers)
    assert because == "its input depth changed (version was 1, is 2)"
    assert explain("0" * 16, recipe_of(newer), producers) == "made by another configuration"
