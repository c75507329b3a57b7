"""What `verify` finds without reading a shard: a snapshot that disagrees with its record tables, or with itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from damage import DEPTH, INGEST, PRODUCERS, SHARDS, build, newest, object_name, object_of, overwrite

from fourmill.pipeline.fingerprints import recipe_of
from fourmill.pipeline.manifest import BLOCK, Manifest, Update, root_name, update_manifest
from fourmill.pipeline.manifest.tables import describe, encoded
from fourmill.pipeline.manifest.verify import Options, Selection, Verification, verify
from fourmill.pipeline.manifest.verify.problems import LISTED
from fourmill.pipeline.manifest.verify.tables import ranges
from fourmill.pipeline.shards import Spec, commit, record_of, write_shard
from fourmill.pipeline.store import LocalStore, Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    found = LocalStore(tmp_path / "dataset")
    build(found)
    return found


def codes(outcome: Verification) -> list[tuple[str, str]]:
    return [(p.code, p.name) for p in outcome.problems]


def quick(store: Store, **selection: Any) -> Verification:
    return verify(store, newest(store), Options(selection=Selection(**selection)))


def table_name(store: Store, modality: str) -> str:
    return newest(store).blocks[modality][0].name


def change_root(store: Store, change: Callable[[dict[str, Any]], None]) -> None:
    name = root_name(newest(store).snapshot)
    root = json.loads(store.get(name))
    change(root)
    overwrite(store, name, json.dumps(root).encode())


def test_a_lost_record_table_is_named_and_its_shards_are_not_called_missing(store: LocalStore) -> None:
    name = table_name(store, "depth")
    store.delete(name)
    assert codes(quick(store)) == [("missing-table", name)]
    assert quick(store).skipped == {"left out by damaged record tables": SHARDS}


def test_a_lost_table_of_the_pictures_does_not_make_the_others_superfluous(store: LocalStore) -> None:
    name = table_name(store, "rgb")
    store.delete(name)
    assert codes(quick(store)) == [("missing-table", name)]


def test_a_changed_record_table_is_named(store: LocalStore) -> None:
    name = table_name(store, "depth")
    data = bytearray(store.get(name))
    data[100] ^= 1
    overwrite(store, name, bytes(data))
    assert codes(quick(store)) == [("wrong-table", name)]


def rewrite_table(store: LocalStore, modality: str, change: Callable[[pa.Table], pa.Table], told: bool) -> None:
    """Another table in place of a modality's, the root's digest following it, its sums only if `told`."""
    info = newest(store).blocks[modality][0]
    table = change(newest(store).read_table(info))
    data = encoded(table, {})
    fresh = describe(modality, 0, table, data, info.settled)
    store.create(fresh.name, data)

    def point(root: dict[str, Any]) -> None:
        entry = root["modalities"][modality]["0"]
        entry.update(vars(fresh) if told else {"name": fresh.name, "digest": fresh.digest, "num_bytes": len(data)})

    change_root(store, point)


def replaced(table: pa.Table, column: str, values: list[Any]) -> pa.Table:
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(column), pa.array(values, table.schema.field(column).type))


def test_sums_that_are_not_the_tables_are_named_each(store: LocalStore) -> None:
    rewrite_table(store, "depth", lambda t: replaced(t, "present", [5, 4, 5]), told=False)
    (problem,) = quick(store).problems
    assert (problem.code, problem.what) == ("wrong-counts", "present: the snapshot says 15, the table has 14")


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("shard", [0, 2, 1], "its shard numbers do not rise within 0 to 9999"),
        ("shard", [0, 1, BLOCK], "its shard numbers do not rise within 0 to 9999"),
        ("modality", ["normal"] * 3, "holds records of other modalities than depth"),
        ("name", ["../../etc/passwd"] * 3, "names '../../etc/passwd' as the object of shard 0"),
    ],
)
def test_rows_that_cannot_be_are_named_and_not_followed(
    store: LocalStore, column: str, values: list[Any], words: str
) -> None:
    rewrite_table(store, "depth", lambda t: replaced(t, column, values), told=True)
    problems = quick(store).problems
    assert {p.code for p in problems} == {"bad-table"}
    assert problems[0].what.startswith(words)


def test_a_table_with_other_columns_is_no_record_table(store: LocalStore) -> None:
    info = newest(store).blocks["depth"][0]
    data = encoded(newest(store).read_table(info).drop_columns(["spec"]), {})
    store.create("manifest/records/depth/other.parquet", data)
    import hashlib

    told = {"name": "manifest/records/depth/other.parquet", "digest": hashlib.sha256(data).hexdigest()}
    change_root(store, lambda root: root["modalities"]["depth"]["0"].update(told))
    assert codes(quick(store)) == [("bad-table", told["name"])]


def test_a_fingerprint_that_does_not_follow_is_named_where_the_root_says_it_does(store: LocalStore) -> None:
    fingerprint = "0123456789abcdef"
    data = object_of("depth", 1, fingerprint=fingerprint)
    commit(store, data)
    record = record_of(data)

    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[1].update(fingerprint=fingerprint, name=record.name, digest=record.digest, num_bytes=record.num_bytes)
        return pa.Table.from_pylist(rows, schema=table.schema)

    rewrite_table(store, "depth", change, told=True)
    assert codes(quick(store)) == [("wrong-fingerprint", record.name)]


def test_a_producer_that_is_not_described_is_named_wherever_it_is_gone_back_to(store: LocalStore) -> None:
    depth, tokens = recipe_of(DEPTH), recipe_of(PRODUCERS["tok_depth"])
    change_root(store, lambda root: root["producers"].pop(depth))
    assert [(p.code, p.modality, p.what) for p in quick(store).problems] == [
        ("unknown-producer", "depth", f"3 shards of producer {depth}, which the snapshot does not describe"),
        (
            "unknown-producer",
            "tok_depth",
            f"producer {tokens} goes back to {depth}, which the snapshot does not describe",
        ),
    ]


def test_missing_and_superfluous_shards_are_counted_and_named_by_number(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def record(name: str, shard: int) -> Any:
        data = write_shard(name, shard, f"{shard:016x}", ["k"], [["a"]], Spec(), INGEST, {})
        return commit(store, data)

    records = [record("rgb", s) for s in range(8)] + [record("caption", s) for s in (0, 3, 4, 5, 9)]
    update_manifest(store, lambda _: Update(records, {recipe_of(INGEST): INGEST}))
    found = [(p.code, p.modality, p.shard, p.what) for p in quick(store).problems]
    assert found == [
        ("extra-shards", "caption", 9, "1 shards that the pictures lack: 9"),
        ("missing-shards", "caption", 1, "no object for 4 of 8 shards: 1-2, 6-7"),
    ]
    some = [(p.code, p.what) for p in quick(store, shards=(2, 7)).problems]
    assert some == [("missing-shards", "no object for 2 of 5 shards: 2, 6")]


def test_mixed_generations_are_named_with_their_recipes(store: LocalStore) -> None:
    newer = {**DEPTH, "version": 2}
    record = commit(store, object_of("depth", 1, producer=newer, fingerprint="f" * 16))
    update_manifest(store, lambda _: Update([record], {recipe_of(newer): newer}))
    (problem,) = quick(store).problems
    assert (problem.code, problem.modality) == ("mixed-generations", "depth")
    assert f"{recipe_of(DEPTH)} (2 shards)" in problem.what
    assert f"{recipe_of(newer)} (1 shards)" in problem.what


def test_an_emptied_store_is_counted_in_full_and_listed_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fourmill.pipeline.manifest.verify.problems.LISTED", 5)
    store = LocalStore(tmp_path)
    build(store)
    for name in PRODUCERS:
        for shard in range(SHARDS):
            store.delete(object_name(name, shard))
    outcome = quick(store)
    assert (len(outcome.problems), outcome.counts, LISTED) == (5, {"missing-object": 21}, 1000)
    assert "missing-object: … and 16 more" in str(outcome)
    assert str(outcome).splitlines()[-3].endswith(": 21 problems")
    assert str(outcome).splitlines()[-2] == "  21 x missing-object: a shard object is gone"


def test_sample_tables_are_asked_for_and_read_if_all_is(store: LocalStore) -> None:
    import hashlib

    data = b"a sample table"
    entry = {"num_bytes": len(data), "digest": hashlib.sha256(data).hexdigest()}
    names = [f"manifest/samples/{n}.parquet" for n in ("sound", "gone", "short", "changed")]
    for name, held in zip(names, (data, None, data[:-1], data[::-1]), strict=True):
        if held is not None:
            store.create(name, held)
    update_manifest(store, lambda _: Update(sample_tables=[{**entry, "name": name} for name in names]))
    seen = [("missing-table", names[1]), ("wrong-table", names[2])]
    assert codes(quick(store)) == seen
    assert codes(verify(store, newest(store), Options(deep=True))) == [*seen, ("wrong-table", names[3])]


@pytest.mark.parametrize(("held", "code"), [(None, "missing-table"), (b"<html>", "bad-table"), (b"[]", "bad-table")])
def test_a_lost_list_of_retries_is_named_and_fingerprints_are_not_blamed(
    store: LocalStore, held: bytes | None, code: str
) -> None:
    update_manifest(store, lambda old: Update(retries=old.retries.raised("depth", [1])))
    name = newest(store).retries_name
    assert name is not None
    store.delete(name)
    if held is not None:
        store.create(name, held)
    assert codes(quick(store)) == [(code, name)]


# --- selections ----------------------------------------------------------------------------------------------------


def test_only_what_is_chosen_is_looked_at_and_the_rest_is_said(store: LocalStore) -> None:
    store.delete(object_name("depth", 1))
    store.delete(object_name("caption", 2))
    outcome = quick(store, modalities=("depth",))
    assert codes(outcome) == [("missing-object", object_name("depth", 1))]
    assert (outcome.checked, outcome.skipped) == (3, {"of other modalities": 18})
    outcome = quick(store, shards=(2, None))
    assert codes(outcome) == [("missing-object", object_name("caption", 2))]
    assert (outcome.checked, outcome.skipped) == (7, {"left out by --shards": 14})


def test_a_modality_is_held_against_the_pictures_even_if_they_are_not_chosen(store: LocalStore) -> None:
    data = object_of("depth", 1, rows=[1, 0, 2, 3, 4])
    overwrite(store, object_name("depth", 1), data)
    update_manifest(store, lambda _: Update([record_of(data)]))
    assert codes(quick(store, modalities=("depth",))) == [("misaligned-keys", object_name("depth", 1))]
    assert codes(quick(store, modalities=("caption",))) == []


def test_an_unknown_modality_is_refused_with_the_nearest(store: LocalStore) -> None:
    with pytest.raises(ValueError, match=r"snapshot 1: unknown modality 'dpeth'; did you mean 'depth'"):
        quick(store, modalities=("dpeth",))


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="more than 0 and at most 1"):
        Selection(share=share)


def test_a_share_of_the_shards_is_the_same_at_every_call_and_as_large_as_asked() -> None:
    shards = np.arange(100_000)
    taken = Selection(share=0.01).sampled(shards)
    assert 900 < taken.sum() < 1100
    assert (Selection(share=0.01).sampled(shards[5:]) == taken[5:]).all()
    assert (taken <= Selection(share=0.1).sampled(shards)).all()  # a larger share holds the smaller one
    assert np.flatnonzero(taken)[:3].tolist() == np.flatnonzero(Selection(share=0.01).sampled(shards))[:3].tolist()


def test_a_share_is_told_apart_from_all(store: LocalStore) -> None:
    outcome = quick(store, share=0.5)
    taken = int(Selection(share=0.5).sampled(np.arange(SHARDS)).sum())
    assert (outcome.checked, outcome.skipped) == (7 * taken, {"left out by --sample": 7 * (SHARDS - taken)})


@pytest.mark.parametrize(
    ("shards", "words"),
    [([3], "3"), ([1, 2, 3, 7, 9, 10], "1-3, 7, 9-10"), (range(0, 40, 2), "0, 2, 4, 6, 8, 10, 12, 14, …")],
)
def test_shard_numbers_are_told_as_ranges(shards: Any, words: str) -> None:
    assert ranges(np.array(list(shards))) == words


def test_an_older_snapshot_is_verified_as_it_was(store_uri: str) -> None:
    store = open_store(store_uri)
    first = build(store)
    data = object_of("depth", 1, fingerprint="f" * 16, producer={**DEPTH, "version": 2})
    record = commit(store, data)
    update_manifest(store, lambda _: Update([record], {recipe_of({**DEPTH, "version": 2}): {**DEPTH, "version": 2}}))
    assert verify(store, first).ok
    assert not verify(store, newest(store)).ok


def test_an_empty_dataset_is_sound(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert verify(store, Manifest(store)).ok
    assert verify(store, Manifest(store), Options(deep=True)).ok
