"""A deep verification that was killed goes on: what was sound is not read again, what changed since is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import DEPTH, build, keys_of, newest, object_name, object_of, overwrite, put

from fourmill.pipeline.manifest import Update, update_manifest
from fourmill.pipeline.manifest.verify import Options, Selection, Verification, verify
from fourmill.pipeline.manifest.verify.journal import Journal
from fourmill.pipeline.manifest.verify.keys import duplicates
from fourmill.pipeline.manifest.verify.objects import key_hashes
from fourmill.pipeline.shards import Record, commit
from fourmill.pipeline.store import LocalStore, ObjectInfo, Store, open_store

ROOT = Path(__file__).parent.parent


@pytest.fixture
def store(store_uri: str) -> Store:
    found = open_store(store_uri)
    build(found)
    return found


def deep(store: Store, journal: Path, **selection: Any) -> Verification:
    options = Options(deep=True, resume=journal, selection=Selection(**selection))
    return verify(store, newest(store), options)


def later(store: Store) -> None:
    """S3 tells the time of change in whole seconds."""
    if store.local_path("x") is None:
        time.sleep(1.1)


def test_what_was_sound_is_not_read_again(store: Store, tmp_path: Path) -> None:
    first = deep(store, tmp_path / "journal")
    assert (first.read, first.resumed) == (21, 0)
    again = deep(store, tmp_path / "journal")
    assert (again.ok, again.read, again.num_bytes, again.resumed) == (True, 0, 0, 21)


def test_what_changed_since_is_read_again_and_found(store: Store, tmp_path: Path) -> None:
    deep(store, tmp_path / "journal")
    later(store)
    data = bytearray(store.get(object_name("depth", 1)))
    data[len(data) // 2] ^= 1
    overwrite(store, object_name("depth", 1), bytes(data))
    store.delete(object_name("det", 0))
    again = deep(store, tmp_path / "journal")
    assert [(p.code, p.name) for p in again.problems] == [
        ("wrong-digest", object_name("depth", 1)),
        ("missing-object", object_name("det", 0)),
    ]
    assert (again.read, again.resumed) == (1, 19)


def test_a_sound_object_is_read_again_if_its_keys_are_the_only_ones(store: Store, tmp_path: Path) -> None:
    overwrite(store, object_name("rgb", 1), store.get(object_name("rgb", 1))[::-1])
    first = deep(store, tmp_path / "journal")
    assert first.unchecked == ("whether keys of 1 shards, whose rgb objects are not sound, stand in others too",)
    again = deep(store, tmp_path / "journal", modalities=("depth",))  # now its keys stand for the shards
    assert (again.ok, again.read, again.resumed, again.unchecked) == (True, 1, 2, ())


class Timeless(LocalStore):
    """A store that does not tell when an object was written."""

    def head(self, name: str) -> ObjectInfo | None:
        found = super().head(name)
        return found and ObjectInfo(name, found.num_bytes)


def test_where_the_store_tells_no_time_everything_is_read_again(tmp_path: Path) -> None:
    store = Timeless(tmp_path / "dataset")
    build(store)
    for _ in range(2):
        outcome = deep(store, tmp_path / "journal")
        assert (outcome.read, outcome.resumed) == (21, 0)


def test_what_was_wrong_is_read_again_until_it_is_mended(store: Store, tmp_path: Path) -> None:
    name = object_name("depth", 1)
    sound = store.get(name)
    overwrite(store, name, sound[::-1])
    assert [p.code for p in deep(store, tmp_path / "journal").problems] == ["wrong-digest"]
    again = deep(store, tmp_path / "journal")
    assert [p.code for p in again.problems] == ["wrong-digest"]
    assert (again.read, again.resumed) == (1, 20)
    overwrite(store, name, sound)
    again = deep(store, tmp_path / "journal")
    assert (again.ok, again.read, again.resumed) == (True, 1, 20)


def test_a_redone_shard_is_read_again(store: Store, tmp_path: Path) -> None:
    deep(store, tmp_path / "journal")
    newer = {**DEPTH, "version": 2}
    record = commit(store, object_of("depth", 1, producer=newer, fingerprint="f" * 16))
    update_manifest(store, lambda _: Update([record], {record.producer: newer}))
    again = deep(store, tmp_path / "journal")
    assert (again.read, again.resumed) == (1, 20)


def test_warnings_of_what_is_not_read_again_are_told_again(store: Store, tmp_path: Path) -> None:
    put(store, object_of("tok_depth", 1, values={3: np.full(4, 7)}))
    first, again = deep(store, tmp_path / "journal"), deep(store, tmp_path / "journal")
    assert (again.warnings, again.resumed) == (first.warnings, 21)
    assert [w.row for w in again.warnings] == [3]


def test_a_key_in_a_shard_read_before_and_one_read_now_is_found(store: Store, tmp_path: Path) -> None:
    keys = [*keys_of(2)[:4], "s0r3"]
    for name in newest(store).modalities:
        put(store, object_of(name, 2, keys=keys))
    first = deep(store, tmp_path / "journal", shards=(0, 1))
    assert (first.read, first.problems) == (7, ())
    assert first.unchecked == ("keys that stand in a chosen shard and in one that is not",)
    again = deep(store, tmp_path / "journal")
    assert [(p.code, p.shard, p.row, p.key) for p in again.problems] == [("duplicate-key", 2, 4, "s0r3")]
    assert (again.read, again.resumed) == (14, 7)


def test_a_mended_duplicate_is_gone_though_the_journal_knew_it(store: Store, tmp_path: Path) -> None:
    for name in newest(store).modalities:
        put(store, object_of(name, 2, keys=[*keys_of(2)[:4], "s0r3"]))
    assert [p.code for p in deep(store, tmp_path / "journal").problems] == ["duplicate-key"]
    later(store)
    for name in newest(store).modalities:
        put(store, object_of(name, 2))
    again = deep(store, tmp_path / "journal")
    assert (again.ok, again.read) == (True, 7)


def test_a_journal_of_another_dataset_or_no_journal_is_refused(tmp_path: Path) -> None:
    one, other = LocalStore(tmp_path / "one"), LocalStore(tmp_path / "other")
    build(one, ["rgb"])
    build(other, ["rgb"])
    deep(one, tmp_path / "journal")
    with pytest.raises(ValueError, match=r"journal is the journal of .*one, version 1; .*other, version 1, needs"):
        deep(other, tmp_path / "journal")
    (tmp_path / "text").write_text("no database at all, but long enough to be looked into " * 50)
    with pytest.raises(ValueError, match="is no journal of a verification"):
        deep(one, tmp_path / "text")


SLOW = """
import sys, time
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.manifest.verify import Options, journal, verify
from fourmill.pipeline.store import open_store
journal._COMMIT_EVERY_S = 0.0
store = open_store(sys.argv[1])
def tick(objects, num_bytes):
    print(objects, flush=True)
    time.sleep(0.05)
verify(store, read_manifest(store), Options(deep=True, resume=sys.argv[2]), tick)
"""


def test_a_killed_verification_goes_on_where_it_was(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "dataset")
    build(store)
    journal = tmp_path / "journal"
    command = [sys.executable, "-c", SLOW, store.uri, str(journal)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=tmp_path) as process:
        assert process.stdout is not None
        for _ in range(8):
            process.stdout.readline()
        process.kill()
    outcome = deep(store, journal)
    assert outcome.ok
    assert outcome.read + outcome.resumed == 21
    assert 7 <= outcome.resumed < 21


# --- keys in two shards --------------------------------------------------------------------------------------------


def chunks_of(shards: Sequence[Sequence[str]]) -> list[tuple[int, bytes]]:
    return [(shard, key_hashes(list(keys))) for shard, keys in enumerate(shards)]


def places(shards: Sequence[Sequence[str]], chunks: list[tuple[int, bytes]], per_pass: int) -> list[tuple[Any, ...]]:
    def keys_of_shard(shard: int) -> tuple[Record, Sequence[str]]:
        record = Record("rgb", shard, "0" * 16, "p", len(shards[shard]), 0, 0, "", "", {})
        return record, shards[shard]

    total = sum(len(hashes) // 8 for _, hashes in chunks)
    found = duplicates(total, lambda: chunks, keys_of_shard, per_pass)
    return sorted((p.key, p.shard, p.row) for p in found)


@pytest.mark.parametrize("per_pass", [1, 3, 7, 1000])
def test_duplicates_are_the_same_however_many_passes_are_made(per_pass: int) -> None:
    shards = [[f"s{s}r{r}" for r in range(10)] for s in range(6)]
    shards[4][2], shards[5][9], shards[3][0] = "s0r3", "s0r3", "s1r1"
    assert places(shards, chunks_of(shards), per_pass) == [("s0r3", 4, 2), ("s0r3", 5, 9), ("s1r1", 3, 0)]


def test_equal_hashes_of_different_keys_are_no_duplicates() -> None:
    shards = [["a", "b"], ["c", "d"]]
    same = key_hashes(["a"])
    chunks = [(0, same + key_hashes(["b"])), (1, key_hashes(["c"]) + same)]
    assert places(shards, chunks, 100) == []


def test_a_dataset_that_was_ingested_twice_is_told_in_part_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourmill.pipeline.manifest.verify.keys.LISTED", 3)
    keys = [f"k{i}" for i in range(10)]

    def keys_of_shard(shard: int) -> tuple[Record, Sequence[str]]:
        return Record("rgb", shard, "0" * 16, "p", 10, 0, 0, "", "", {}), keys

    found = list(duplicates(20, lambda: chunks_of([keys, keys]), keys_of_shard))
    assert len([p for p in found if p.key]) == 3
    assert [p.what for p in found if not p.key] == ["7 more keys by their hashes, which were not compared themselves"]


def test_the_journal_keeps_hashes_by_shard(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", "x")
    record = Record("rgb", 7, "0" * 16, "p", 2, 2, 10, "d", "k", {})
    journal.add(record, 1.5, [], key_hashes(["a", "b"]))
    journal.add(record, 1.5, [], key_hashes(["a", "c"]))
    journal.close()
    journal = Journal(tmp_path / "journal", "x")
    assert (list(journal.keys()), journal.num_keys()) == ([(7, key_hashes(["a", "c"]))], 2)
    assert journal.sound([record]) == {record.name: (10, 1.5)}
    assert (journal.has_keys(7), journal.has_keys(8)) == (True, False)
    journal.close()
