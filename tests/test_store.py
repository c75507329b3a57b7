"""The store's promises, one suite for both backends, and what only a folder can get wrong."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fourmill.pipeline.store import LocalStore, ObjectInfo, S3Store, StoreError, StoreSettings, join_uri, open_store

ROOT = Path(__file__).parent.parent


def test_second_create_of_a_name_is_told_false_and_changes_nothing(store_uri: str) -> None:
    store = open_store(store_uri)
    assert store.create("a/b.bin", b"first") is True
    assert store.create("a/b.bin", b"second") is False
    assert store.get("a/b.bin") == b"first"


def test_eight_racing_writers_have_exactly_one_winner_for_each_name(store_uri: str) -> None:
    names, writers = [f"race/{i}" for i in range(3)], 8
    stores = [open_store(store_uri) for _ in range(writers)]
    start = threading.Barrier(writers)

    def write(writer: int) -> list[bool]:
        start.wait()
        return [stores[writer].create(name, f"{name} by {writer}".encode() * 1000) for name in names]

    with ThreadPoolExecutor(writers) as pool:
        won = list(pool.map(write, range(writers)))
    for column, name in enumerate(names):
        winners = [writer for writer in range(writers) if won[writer][column]]
        assert len(winners) == 1
        assert open_store(store_uri).get(name) == f"{name} by {winners[0]}".encode() * 1000


def test_an_empty_object_is_an_object(store_uri: str) -> None:
    store = open_store(store_uri)
    assert store.create("empty", b"")
    assert (store.get("empty"), store.head("empty")) == (b"", ObjectInfo("empty", 0))


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, 3, b"012"), (4, 100, b"456789"), (9, 1, b"9"), (3, 0, b""), (10, 5, b""), (50, 5, b"")],
)
def test_get_range_gives_at_most_what_is_there(store_uri: str, start: int, length: int, expected: bytes) -> None:
    store = open_store(store_uri)
    store.create("digits", b"0123456789")
    assert store.get_range("digits", start, length) == expected


def test_list_is_sorted_by_whole_name_and_narrowed_by_prefix(store_uri: str) -> None:
    store = open_store(store_uri)
    for name in ("b", "a/z", "a-b/x", "a/é", "a/b/c", "ab"):
        store.create(name, name.encode())
    everything = ["a-b/x", "a/b/c", "a/z", "a/é", "ab", "b"]
    assert [info.name for info in store.list()] == list(store.names()) == everything
    assert list(store.list("a/")) == [ObjectInfo("a/b/c", 5), ObjectInfo("a/z", 3), ObjectInfo("a/é", 4)]
    assert [info.name for info in store.list("a")] == everything[:5]
    assert list(store.list("none/")) == []


def test_list_gives_both_backends_the_same_order_whatever_the_names(store_uri: str) -> None:
    store = open_store(store_uri)
    names = ["a!/x", "a", "a-b/c/d", "a-b/c-d", "a.txt", "a0", "aa/b/c", "aa/b-c", "aé", "a b/x", "aa/b/c.d", "z/a/b/c"]
    for name in names:
        store.create(name, b"")
    assert [info.name for info in store.list()] == sorted(names)
    assert [info.name for info in store.list("aa/b")] == ["aa/b-c", "aa/b/c", "aa/b/c.d"]
    assert list(store.list("a//")) == []


def test_sizes_answers_for_each_name_in_its_place(store_uri: str) -> None:
    store = open_store(store_uri)
    names = [f"depth/shard-{i:06d}.arrow" for i in range(0, 80, 2)]
    for i, name in enumerate(names):
        store.create(name, b"x" * i)
    store.create("rgb/one", b"12345")
    asked = ["rgb/one", "rgb/none", *(f"depth/shard-{i:06d}.arrow" for i in range(79, -1, -1)), "rgb/one", "no/such"]
    sizes = [None if i % 2 else i // 2 for i in range(79, -1, -1)]
    assert store.sizes(asked) == [5, None, *sizes, 5, None]
    assert store.sizes([]) == []


def test_head_and_list_tell_when_an_object_was_written(store_uri: str) -> None:
    store = open_store(store_uri)
    store.create("x", b"1")
    head = store.head("x")
    assert head is not None
    (listed,) = store.list()
    for info in (head, listed):
        assert abs(info.modified - time.time()) < 60


def test_a_folder_is_no_object(store_uri: str) -> None:
    store = open_store(store_uri)
    store.create("a/b", b"1")
    for read in (store.get, lambda name: store.get_range(name, 0, 1)):
        with pytest.raises(FileNotFoundError, match="a"):
            read("a")
    store.delete("a")
    assert (store.head("a"), store.sizes(["a", "a/b"]), store.get("a/b")) == (None, [None, 1], b"1")


def test_counters_hold_the_bytes_that_moved(store_uri: str) -> None:
    store = open_store(store_uri, StoreSettings(conditional_writes="atomic"))
    store.create("x", b"12345")
    store.create("x", b"123")  # taken: not written
    store.get("x")
    store.get_range("x", 1, 2)
    assert store.counters.as_dict() == {
        "requests": 4,
        "bytes_read": 7,
        "bytes_written": 5,
        "retries": 0,
        "retries_by_kind": {},
    }


def test_what_is_not_there_has_no_head_and_no_bytes(store_uri: str) -> None:
    store = open_store(store_uri)
    assert store.head("gone") is None
    with pytest.raises(FileNotFoundError, match="gone"):
        store.get("gone")
    with pytest.raises(FileNotFoundError, match="gone"):
        store.get_range("gone", 0, 5)


def test_delete_twice_is_no_error_and_the_name_is_free_again(store_uri: str) -> None:
    store = open_store(store_uri)
    store.create("x", b"1")
    store.delete("x")
    store.delete("x")
    assert store.head("x") is None
    assert store.create("x", b"2")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//b", "a/./b", "", "a\\b", "a\0b", "a/"])
def test_a_name_that_could_leave_the_root_is_refused(store_uri: str, name: str) -> None:
    store = open_store(store_uri)
    with pytest.raises(ValueError, match="bad object name"):
        store.create(name, b"x")
    with pytest.raises(ValueError, match="bad object name"):
        store.get(name)
    with pytest.raises(ValueError, match="bad object name"):
        store.delete(name)


@pytest.mark.parametrize("prefix", ["../", "/etc/", "a/../../"])
def test_a_prefix_that_could_leave_the_root_is_refused(store_uri: str, prefix: str) -> None:
    with pytest.raises(ValueError, match="bad prefix"):
        list(open_store(store_uri).list(prefix))


def test_a_pickled_store_reads_and_writes_the_same_objects(store_uri: str) -> None:
    store = open_store(store_uri)
    store.create("x", b"1")  # so that the S3 client, which cannot be pickled, exists
    copy = pickle.loads(pickle.dumps(store))
    assert (type(copy), copy.uri, copy.get("x")) == (type(store), store.uri, b"1")
    assert copy.create("y", b"2")
    assert store.get("y") == b"2"


def test_roots_below_one_another_share_objects(store_uri: str) -> None:
    open_store(join_uri(store_uri, "inner")).create("x", b"1")
    assert open_store(store_uri).get("inner/x") == b"1"


def test_an_unknown_kind_of_uri_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'gs://b/x'.*s3://bucket/prefix"):
        open_store("gs://b/x")
    for uri in ("s3:///x", "s3://", "s3://a:b/x", "s3://a b/x"):
        with pytest.raises(ValueError, match="bad S3 URI"):
            open_store(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAKEY:hush-hush@bucket/x",
        "https://user:hush-hush@host/bucket",
        "s3://bucket/x?X-Amz-Signature=hush-hush&X-Amz-Date=1",
    ],
)
def test_a_uri_with_credentials_is_refused_without_repeating_them(uri: str) -> None:
    with pytest.raises(ValueError, match=r"\*\*\*") as refused:
        open_store(uri)
    assert "hush" not in str(refused.value)


# --- local ---------------------------------------------------------------------------------------------------------

_DIES_IN_CREATE = """
import os, sys, time
from fourmill.pipeline.store import LocalStore
def hang(*_):
    print("inside", flush=True)
    time.sleep(60)
setattr(os, sys.argv[2], hang)
LocalStore(sys.argv[1]).create("shard/x", b"x" * 1_000_000)
"""


@pytest.mark.parametrize("step", ["fsync", "chmod", "link"])
def test_a_writer_killed_inside_create_leaves_nothing_visible(tmp_path: Path, step: str) -> None:
    command = [sys.executable, "-c", _DIES_IN_CREATE, str(tmp_path), step]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"inside\n"
        writer.send_signal(signal.SIGKILL)
    store = LocalStore(tmp_path)
    assert list(store.list()) == []
    assert store.head("shard/x") is None
    assert store.create("shard/x", b"whole")
    assert store.get("shard/x") == b"whole"


def test_an_object_that_cannot_be_written_is_a_store_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot create .*x: .*No space left"):
        LocalStore(tmp_path).create("x", b"1")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_link_whose_answer_was_lost_is_still_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(source: str, target: Path) -> None:
        link(source, target)
        link(source, target)  # as an NFS client that sends it again

    monkeypatch.setattr(os, "link", twice)
    assert LocalStore(tmp_path).create("x", b"1") is True
    assert LocalStore(tmp_path).create("x", b"1") is False


def test_what_cannot_be_read_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    LocalStore(tmp_path).create("x", b"1")
    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(StoreError, match=r"cannot read .*/x: .*Input/output error"):
        LocalStore(tmp_path).get("x")


def test_list_passes_over_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    LocalStore(tmp_path).create("x", b"1")
    assert list(LocalStore(tmp_path).list()) == [ObjectInfo("x", 1)]
    assert list(LocalStore(tmp_path).names()) == ["x"]


def test_list_walks_no_folder_that_cannot_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    for name in ("depth/a/1", "depth/b/1", "depth-old/x/1", "rgb/a/1"):
        store.create(name, b"")
    walked, scandir = [], os.scandir

    def watched(path: str) -> object:
        walked.append(os.path.relpath(path, tmp_path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", watched)
    assert [info.name for info in store.list("depth/a")] == ["depth/a/1"]
    assert walked == ["depth", "depth/a"]


def test_list_looks_at_each_file_only_when_its_turn_comes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for name in ("a", "b", "c/d"):
        store.create(name, b"")
    listing = store.list()
    assert next(listing).name == "a"
    store.delete("b")
    store.delete("c/d")
    assert list(listing) == []


def test_a_linked_file_is_listed_and_a_linked_folder_is_not_walked(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"12")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "x")
    assert list(LocalStore(tmp_path).list()) == [ObjectInfo("link", 2), ObjectInfo("real/x", 2)]


def test_local_objects_can_be_memory_mapped_and_remote_ones_say_no(tmp_path: Path) -> None:
    LocalStore(tmp_path).create("x", b"1")
    path = LocalStore(tmp_path).local_path("x")
    assert path is not None
    assert path.read_bytes() == b"1"
    assert S3Store("s3://bucket/x").local_path("x") is None
