"""`verify` against damage done on purpose, on a folder and on an S3 server: it names each and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from damage import add, build, keys_of, newest, object_name, object_of, overwrite, put

from fourmill.pipeline.manifest.verify import Options, Problem, Verification, verify
from fourmill.pipeline.shards import record_of
from fourmill.pipeline.store import Store, open_store

DEPTH_1 = object_name("depth", 1)


@pytest.fixture
def store(store_uri: str) -> Store:
    found = open_store(store_uri)
    build(found)
    return found


def deep(store: Store, **options: Any) -> Verification:
    return verify(store, newest(store), Options(deep=True, **options))


def quick(store: Store) -> Verification:
    return verify(store, newest(store))


def told(outcome: Verification) -> list[tuple[Any, ...]]:
    """Code, object, modality, shard, row, key of every problem; whatever else was odd would be here too."""
    assert outcome.warnings == ()
    return [(p.code, p.name, p.modality, p.shard, p.row, p.key) for p in outcome.problems]


def only(outcome: Verification) -> Problem:
    assert len(outcome.problems) == 1, outcome.problems
    return outcome.problems[0]


def test_a_sound_dataset_is_sound_and_what_was_read_is_said(store: Store) -> None:
    outcome = quick(store)
    assert (outcome.ok, outcome.checked, outcome.read, outcome.tables) == (True, 21, 0, 7)
    assert outcome.unchecked == ("what is in the objects; --deep reads them",)
    outcome = deep(store)
    sizes = sum(newest(store).totals(m).num_bytes for m in newest(store).modalities)
    assert (outcome.ok, outcome.checked, outcome.read, outcome.num_bytes) == (True, 21, 21, sizes)
    assert told(outcome) == []
    assert (outcome.skipped, outcome.unchecked) == ({}, ())


def test_a_flipped_byte_is_a_wrong_digest_of_that_object(store: Store) -> None:
    data = bytearray(store.get(DEPTH_1))
    data[len(data) // 2] ^= 1
    overwrite(store, DEPTH_1, bytes(data))
    assert told(quick(store)) == []  # as large as before: only reading it tells
    assert told(deep(store)) == [("wrong-digest", DEPTH_1, "depth", 1, None, None)]


def test_a_deleted_object_is_missing(store: Store) -> None:
    store.delete(DEPTH_1)
    for outcome in (quick(store), deep(store)):
        assert told(outcome) == [("missing-object", DEPTH_1, "depth", 1, None, None)]


def test_a_truncated_object_has_the_wrong_size(store: Store) -> None:
    data = store.get(DEPTH_1)
    overwrite(store, DEPTH_1, data[:-100])
    for outcome in (quick(store), deep(store)):
        assert told(outcome) == [("wrong-size", DEPTH_1, "depth", 1, None, None)]
        assert only(outcome).what == f"has {len(data) - 100:,} bytes; its record says {len(data):,}"


@pytest.mark.parametrize(
    ("consistent", "seen_by_quick"),
    [
        ({"record": False, "manifest": False}, []),
        ({"record": True, "manifest": False}, []),
        ({"record": True, "manifest": True}, ["misaligned-keys"]),
    ],
    ids=["object", "object and record", "object, record and manifest"],
)
def test_two_swapped_rows_are_named(store: Store, consistent: dict[str, bool], seen_by_quick: list[str]) -> None:
    put(store, object_of("depth", 1, rows=[0, 3, 2, 1, 4]), **consistent)
    assert [p.code for p in quick(store).problems] == seen_by_quick
    outcome = deep(store)
    assert told(outcome) == [("swapped-rows", DEPTH_1, "depth", 1, 1, "s1r3")]
    rest = "" if consistent["manifest"] else "; its SHA-256 differs from its record's"
    assert only(outcome).what == f"rows 1 and 3 ('s1r3', 's1r1') stand in each other's place{rest}"


def test_two_swapped_rows_of_the_pictures_are_named_there_and_not_in_all_others(store: Store) -> None:
    put(store, object_of("rgb", 1, rows=[0, 3, 2, 1, 4]))
    swapped = [("swapped-rows", object_name("rgb", 1), "rgb", 1, 1, "s1r3")]
    assert told(deep(store)) == swapped


@pytest.mark.parametrize("consistent", [True, False], ids=["recorded", "unrecorded"])
def test_a_key_doubled_in_one_object_is_named(store: Store, consistent: bool) -> None:
    keys = ["s1r0", "s1r1", "s1r2", "s1r1", "s1r4"]
    put(store, object_of("depth", 1, keys=keys), record=consistent, manifest=consistent)
    outcome = deep(store)
    assert told(outcome) == [("duplicate-key", DEPTH_1, "depth", 1, 3, "s1r1")]
    assert only(outcome).what.startswith("key 's1r1' stands in rows 1 and 3")


def everywhere(store: Store, shard: int, keys: list[str]) -> None:
    """The same keys in all modalities of a shard, records and manifest agreeing."""
    for name in newest(store).modalities:
        put(store, object_of(name, shard, keys=keys), manifest=False)
        add(store, [record_of(store.get(object_name(name, shard)))])


def test_a_key_doubled_in_every_modality_of_a_shard_is_named_once(store: Store) -> None:
    everywhere(store, 1, ["s1r0", "s1r1", "s1r2", "s1r1", "s1r4"])
    assert quick(store).ok
    assert told(deep(store)) == [("duplicate-key", object_name("rgb", 1), "rgb", 1, 3, "s1r1")]


def test_a_key_in_two_shards_is_named_once_with_both_places(store: Store) -> None:
    everywhere(store, 2, ["s2r0", "s2r1", "s0r3", "s2r3", "s2r4"])
    assert quick(store).ok
    outcome = deep(store)
    assert told(outcome) == [("duplicate-key", object_name("rgb", 2), "rgb", 2, 2, "s0r3")]
    place = f"row 3 of {object_name('rgb', 0)}"
    assert only(outcome).what == f"key 's0r3' of row 2 stands in shard 0 too: {place}"


def test_all_damage_at_once_is_all_named_and_nothing_else(store: Store) -> None:
    flipped = bytearray(store.get(object_name("caption", 0)))
    flipped[len(flipped) // 2] ^= 4
    overwrite(store, object_name("caption", 0), bytes(flipped))
    store.delete(object_name("det", 1))
    overwrite(store, object_name("source", 2), store.get(object_name("source", 2))[:-1])
    put(store, object_of("depth", 1, rows=[4, 1, 2, 3, 0]), manifest=False, record=False)
    put(store, object_of("tok_depth", 2, keys=["s2r0"] * 2 + keys_of(2)[2:]), manifest=False, record=False)
    assert told(deep(store)) == [
        ("wrong-digest", object_name("caption", 0), "caption", 0, None, None),
        ("swapped-rows", DEPTH_1, "depth", 1, 0, "s1r4"),
        ("missing-object", object_name("det", 1), "det", 1, None, None),
        ("wrong-size", object_name("source", 2), "source", 2, None, None),
        ("duplicate-key", object_name("tok_depth", 2), "tok_depth", 2, 1, "s2r0"),
    ]


def test_processes_find_what_threads_find_in_the_same_order(store: Store) -> None:
    store.delete(DEPTH_1)
    overwrite(store, object_name("rgb", 2), b"x" * len(store.get(object_name("rgb", 2))))
    assert told(deep(store, processes=2)) == told(deep(store)) != []
