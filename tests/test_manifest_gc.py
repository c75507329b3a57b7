"""Garbage collection: it removes what nothing needs, whatever dies when, and nothing that anybody needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from typer.testing import CliRunner

from fourmill.cli import app
from fourmill.config import Config
from fourmill.modalities import modality
from fourmill.pipeline import codecs
from fourmill.pipeline.manifest import Manifest, Update, gc, read_manifest, snapshots, update_manifest
from fourmill.pipeline.manifest.gc import DAY, Collection, collect
from fourmill.pipeline.runner import run
from fourmill.pipeline.shards import Record, Spec, commit, producer_id, shard_name, write_shard
from fourmill.pipeline.store import LocalStore, ObjectInfo, Store, StoreError, open_store
from fourmill.pipeline.store.folders import top_level

ROOT = Path(__file__).parent.parent
MAKER = {"class": "Toy", "version": 1, "inputs": {}}


def committed(store: Store, shard: int, fingerprint: str) -> Record:
    """An object of `depth` and its record, in no snapshot yet."""
    keys = [f"{shard * 6 + row:09}" for row in range(6)]
    values = [np.asarray(shard, np.float32).reshape(1, 1)] * len(keys)
    columns = [[codecs.encode(modality("depth"), value) for value in values]]
    return commit(store, write_shard("depth", shard, fingerprint, keys, columns, Spec(), MAKER, {}))


def publish(store: Store, *records: Record) -> Manifest:
    return update_manifest(store, lambda old: Update(records, {producer_id(MAKER): MAKER}))


def names(store: Store) -> list[str]:
    return [info.name for info in store.list()]


def counts(found: Collection) -> dict[str, int]:
    return {reason: tally.objects for reason, tally in found.found.items() if tally.objects}


def assert_sound(store: Store) -> None:
    """Every snapshot that is there names only what is there."""
    for number in snapshots(store):
        manifest = read_manifest(store, number)
        wanted = [entry["name"] for entry in manifest.sample_tables]
        for name in manifest.modalities:
            wanted += [info.name for info in manifest.blocks[name].values()]
            for record in manifest.records(name):
                wanted += [record.name, shard_name(name, record.shard, record.fingerprint, "json")]
        lost = [name for name, size in zip(wanted, store.sizes(wanted), strict=True) if size is None]
        assert not lost, f"snapshot {number} lost {lost}"


@pytest.fixture
def store(store_uri: str, tmp_path: Path) -> Store:
    """A dataset of four shards as ingested, snapshot 1."""
    return open_store(toys.make_dataset(tmp_path, store_uri))


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return open_store(toys.make_dataset(tmp_path, str(tmp_path / "store")))


def grown_old(store: Store, days: float, *parts: str) -> None:
    """Local objects whose name holds one of `parts`, as if written so many days ago."""
    for name in names(store):
        if any(part in name for part in parts):
            path = store.local_path(name)
            assert path is not None
            os.utime(path, (time.time() - days * DAY,) * 2)


A, B, C = "a" * 16, "b" * 16, "c" * 16


def test_only_old_objects_that_no_snapshot_names_are_orphans(local: Store) -> None:
    publish(local, committed(local, 0, A))
    committed(local, 1, B)
    committed(local, 2, C)
    grown_old(local, 8, A, B)
    grown_old(local, 6, C)
    before = names(local)
    found = collect(local)
    assert counts(found) == {"orphan": 2, "young": 2, "used": len(before) - 4}
    assert found.found["orphan"].names == [shard_name("depth", 1, B, s) for s in ("arrow", "json")]
    sizes = local.sizes(found.found["orphan"].names)
    assert found.found["orphan"].num_bytes == sum(size or 0 for size in sizes)
    assert names(local) == before, "a dry run removes nothing"
    assert counts(collect(local, delete=True)) == counts(found)
    assert names(local) == [name for name in before if B not in name]
    assert_sound(local)


def test_with_keep_only_what_old_snapshots_alone_name_is_stale(store: Store) -> None:
    one, two = committed(store, 0, A), committed(store, 1, A)
    publish(store, one, two)
    publish(store, committed(store, 0, B))
    before = names(store)
    found = collect(store, keep=1, delete=True)
    gone = sorted(set(before) - set(names(store)))
    old = [shard_name("depth", 0, A, "arrow"), shard_name("depth", 0, A, "json")]
    roots = ["manifest/snapshot-000001.json", "manifest/snapshot-000002.json"]
    (table,) = [name for name in gone if name.startswith("manifest/records/depth/")]
    assert gone == sorted([*old, *roots, table])
    assert (found.snapshots, found.dropped) == ((3,), (1, 2))
    assert counts(found) == {"stale": 3, "used": len(before) - 5}, "roots go before the listing"
    assert_sound(store)
    with pytest.raises(FileNotFoundError, match=r"no manifest 1 in .*: it has snapshots 3 to 3"):
        read_manifest(store, 1)
    assert publish(store, committed(store, 2, C)).snapshot == 4


def test_all_snapshots_are_kept_unless_said_otherwise(local: Store) -> None:
    publish(local, committed(local, 0, A))
    publish(local, committed(local, 0, B))
    grown_old(local, 30, "")
    before = names(local)
    assert counts(collect(local, delete=True)) == {"used": len(before)}
    assert names(local) == before


def test_tables_and_retries_of_writers_that_lost_a_race_are_orphans(local: Store) -> None:
    for name in (f"manifest/records/depth/000000.{A}.parquet", f"manifest/samples/000000-000099.{A}.parquet"):
        local.create(name, b"theirs")
    local.create(f"manifest/retries-{A}.json", b"{}")
    local.create(f"manifest/config-{A}.yaml", b"dataset: x")
    assert counts(collect(local, delete=True))["young"] == 3
    time.sleep(0.01)
    assert counts(collect(local, older_than=0, delete=True))["young"] == 3, "their root may be about to come"
    grown_old(local, 8, A)
    assert counts(collect(local, delete=True))["orphan"] == 3
    assert [name for name in names(local) if A in name] == [f"manifest/config-{A}.yaml"]


FOREIGN = [
    "README.md",
    f"cats/shard-000001.{A}.arrow",
    "depth/notes.txt",
    f"depth/shard-1.{A}.arrow",
    "export/00000.tar",
    "manifest/000003.json",
]


def test_what_is_not_ours_is_listed_and_never_touched(local: Store) -> None:
    for name in FOREIGN:
        local.create(name, b"x")
    grown_old(local, 1000, "")
    found = collect(local, older_than=0, keep=1, delete=True)
    assert sorted(found.found["foreign"].names) == FOREIGN
    assert local.sizes(FOREIGN) == [1] * len(FOREIGN)


def test_a_large_foreign_folder_is_looked_at_in_parts(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "_CHUNK", 4)
    for number in range(11):
        local.create(f"export/{number:05}.tar", b"12")
    found = collect(local)
    assert (found.found["foreign"].objects, found.found["foreign"].num_bytes) == (11, 22)
    assert found.found["foreign"].names[-1] == "export/00010.tar"


def test_a_bucket_is_gone_through_folder_by_folder(store: Store) -> None:
    before = names(store)
    store.create("README.md", b"x")
    store.create("export/a/b.tar", b"12")
    assert top_level(store) == (
        ["alt_text/", "export/", "manifest/", "rgb/", "source/"],
        [ObjectInfo("README.md", 1)],
    )
    found = collect(store)
    assert counts(found) == {"used": len(before), "foreign": 2}
    assert sorted(found.found["foreign"].names) == ["README.md", "export/a/b.tar"]


def test_keys_of_a_bucket_that_are_no_paths_are_said_to_be_left_out(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, loose = top_level(local)
    monkeypatch.setattr(gc, "top_level", lambda store: (["/", "../", *folders], loose))
    found = collect(local, older_than=0, delete=True)
    assert found.notes == [f"not looked at: what is below {local.uri}/{name}" for name in ("/", "../")]
    assert_sound(local)


def test_half_written_files_of_the_dead_are_removed_and_those_of_the_living_are_not(local: Store) -> None:
    waiting = local.local_path(".fourmill-tmp/dead")
    assert waiting is not None
    waiting.parent.mkdir(exist_ok=True)
    waiting.write_bytes(b"12345")
    os.utime(waiting, (time.time() - 8 * DAY,) * 2)
    (waiting.parent / "alive").write_bytes(b"1")
    found = collect(local)
    assert (counts(found)["temporary"], found.found["temporary"].num_bytes) == (1, 5)
    collect(local, delete=True)
    assert [path.name for path in waiting.parent.iterdir()] == ["alive"]


def test_uploads_in_parts_that_nobody_finished_are_given_up(s3_uri: str, tmp_path: Path) -> None:
    import boto3

    store = open_store(toys.make_dataset(tmp_path, s3_uri))
    bucket, prefix = s3_uri.removeprefix("s3://").split("/")
    client = boto3.client("s3")
    mine, others = f"{prefix}/depth/shard-000000.{A}.arrow", f"other-{prefix}/x"
    probe = f"{prefix}/.fourmill-probe/x"
    client.put_object(Bucket=bucket, Key=probe, Body=b"1")
    for key in (mine, others):
        started = client.create_multipart_upload(Bucket=bucket, Key=key)
        client.upload_part(Bucket=bucket, Key=key, UploadId=started["UploadId"], PartNumber=1, Body=b"12345")
    assert counts(collect(store)).get("temporary") is None, "it is young: its writer may be at it"
    time.sleep(1.1)  # stores tell whole seconds
    found = collect(store, older_than=0, delete=True).found["temporary"]
    assert found.names == [f"depth/shard-000000.{A}.arrow", ".fourmill-probe/x"]
    assert "Contents" not in client.list_objects_v2(Bucket=bucket, Prefix=probe)
    left = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert (mine in [u["Key"] for u in left], others in [u["Key"] for u in left]) == (False, True)
    assert_sound(store)


def test_a_store_that_does_not_list_uploads_is_collected_all_the_same(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(store: Store) -> Any:
        raise StoreError("list_multipart_uploads s3://b/: NotImplemented")

    monkeypatch.setattr("fourmill.pipeline.manifest.gc.leftovers", refusing)
    committed(local, 1, B)
    time.sleep(0.01)
    found = collect(local, older_than=0, delete=True)
    assert found.notes == ["not all that is half-written was looked at: list_multipart_uploads s3://b/: NotImplemented"]
    assert [name for name in names(local) if B in name] == []


def test_a_snapshot_that_cannot_be_read_stops_everything(local: Store) -> None:
    committed(local, 0, A)
    local.create("manifest/snapshot-000002.json", json.dumps({"format": 99, "snapshot": 2}).encode())
    before = names(local)
    with pytest.raises(ValueError, match=r"manifest 2 of .* has format 99; this Fourmill reads format 2"):
        collect(local, older_than=0, delete=True)
    assert names(local) == before


def test_a_folder_without_a_snapshot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds no snapshot: it is no dataset, or its ingest is not finished"):
        collect(open_store(tmp_path / "photos"), older_than=0, delete=True)


def test_a_collected_dataset_has_nothing_to_do_and_an_old_configuration_is_made_again(tmp_path: Path) -> None:
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "d"))
    store = open_store(dataset)
    config, other = (Config.model_validate(toys.config(dataset, gain=gain)) for gain in (1.0, 2.0))
    first = digests(run(config).manifest)
    run(other)
    assert counts(collect(store, keep=1, delete=True))["stale"] == 3 * (4 * 2) + 3, "depth, semseg, tok_depth"
    assert_sound(store)
    assert run(other).plan.num_units == 0
    assert run(config).plan.num_units == 8
    assert digests(read_manifest(store)) == first
    assert_sound(store)


def digests(manifest: Manifest) -> dict[str, list[str]]:
    return {name: [r.digest for r in manifest.records(name)] for name in manifest.modalities}


# --- killed --------------------------------------------------------------------------------------------------------

_DIES_AFTER = """
import os, signal, sys
from fourmill.pipeline.manifest.gc import collect
from fourmill.pipeline.store import LocalStore, open_store
delete, left = LocalStore.delete, [int(sys.argv[2])]
def mortal(self, name):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    delete(self, name)
LocalStore.delete = mortal
collect(open_store(sys.argv[1]), older_than=0, keep=1, delete=True)
"""


@pytest.mark.parametrize("deletions", [0, 1, 2, 3, 5, 7])
def test_killed_after_any_deletion_it_leaves_sound_snapshots_and_a_rerun_finishes(local: Store, deletions: int) -> None:
    publish(local, committed(local, 0, A), committed(local, 1, A))
    newest = publish(local, committed(local, 0, B), committed(local, 1, B))
    committed(local, 2, C)
    command = [
        sys.executable,
        "-c",
        _DIES_AFTER,
        local.uri,
        str(deletions),
    ]  # of 2 roots, 6 records, 6 objects, 1 table
    killed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert_sound(local)
    time.sleep(0.01)
    collect(local, older_than=0, keep=1, delete=True)
    assert_sound(local)
    assert snapshots(local) == [newest.snapshot]
    assert [name for name in names(local) if A in name or C in name] == []


# --- beside writers ------------------------------------------------------------------------------------------------


def on_first_delete(monkeypatch: pytest.MonkeyPatch, suffix: str, happens: Callable[[], Any]) -> None:
    """Something happens just before the first object whose name ends so is deleted."""
    delete, done = LocalStore.delete, threading.Event()

    def deleting(store: LocalStore, name: str) -> None:
        if name.endswith(suffix) and not done.is_set():
            done.set()
            happens()
        delete(store, name)

    monkeypatch.setattr(LocalStore, "delete", deleting)


def test_a_job_that_runs_meanwhile_loses_nothing(tmp_path: Path) -> None:
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "d"))
    store = open_store(dataset)
    config = Config.model_validate(toys.config(dataset, seconds=0.05))
    reports: list[Any] = []
    writer = threading.Thread(target=lambda: reports.append(run(config)))
    writer.start()
    unpublished = 0
    while writer.is_alive():
        unpublished = max(unpublished, counts(collect(store, delete=True)).get("young", 0))
    writer.join()
    assert unpublished > 0, "objects were committed and in no snapshot while garbage was collected"
    assert reports[0].ok
    assert_sound(store)
    assert run(config).plan.num_units == 0


def test_objects_that_a_snapshot_names_since_their_record_went_are_spared(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopted, garbage = committed(local, 0, A), committed(local, 1, B)
    time.sleep(0.01)
    on_first_delete(monkeypatch, ".json", lambda: publish(local, adopted))
    found = collect(local, older_than=0, delete=True)
    assert (found.spared, found.lost) == (1, [])
    assert local.head(garbage.name) is None
    assert_sound(local)
    again = Record.from_json(local.get(shard_name("depth", 0, A, "json")))
    assert again == adopted, "its record is written again from the object"


def test_objects_whose_record_came_back_are_spared(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(local, 0, A)
    time.sleep(0.01)
    delete = LocalStore.delete
    again: list[Record] = []

    def deleting(store: LocalStore, name: str) -> None:
        delete(store, name)
        if not again:
            again.append(committed(local, 0, A))  # a worker makes the shard anew, and finds the object there

    monkeypatch.setattr(LocalStore, "delete", deleting)
    assert collect(local, older_than=0, delete=True).spared == 1
    publish(local, *again)
    assert_sound(local)


def test_an_object_that_is_adopted_in_the_last_moment_is_reported_lost(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopted = committed(local, 0, A)
    time.sleep(0.01)
    on_first_delete(monkeypatch, ".arrow", lambda: publish(local, adopted))
    assert collect(local, older_than=0, delete=True).lost == [adopted.name]


# --- command -------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["manifest", "gc", *arguments], standalone_mode=False)


def test_the_command_tells_sizes_by_reason_and_deletes_only_when_told(local: Store) -> None:
    committed(local, 1, B)
    local.create("notes.txt", b"x")
    grown_old(local, 8, B)
    told = command(local.uri, "--names")
    assert told.return_value == 0
    assert f"orphan: depth/shard-000001.{B}.arrow" in told.stdout
    assert "foreign: notes.txt" in told.stdout
    assert "nothing was removed; --delete removes" in told.stdout
    done = json.loads(command(local.uri, "--delete", "--json").stdout)
    assert (done["deleted"], done["found"]["orphan"]["objects"], done["snapshots"]) == (True, 2, [1])
    assert [name for name in names(local) if B in name] == []


@pytest.mark.parametrize("text", ["7", "d", "-1d", "7 days", "1w"])
def test_an_age_without_a_unit_is_refused(local: Store, text: str) -> None:
    refused = command(local.uri, "--older-than", text, "--delete")
    assert str(refused.exception) == f"--older-than {text!r}: give a number and a unit, such as 90s, 30m, 12h or 7d"
