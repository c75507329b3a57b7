"""The store's promises, one suite for both backends, and what only one of them can get wrong."""

from __future__ import annotations

import http.server
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from fourmill.pipeline.store import LocalStore, ObjectInfo, S3Store, StoreError, join_uri, open_store

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
    assert [info.name for info in store.list()] == everything
    assert list(store.list("a/")) == [ObjectInfo("a/b/c", 5), ObjectInfo("a/z", 3), ObjectInfo("a/é", 4)]
    assert [info.name for info in store.list("a")] == everything[:5]
    assert list(store.list("none/")) == []


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
    with pytest.raises(ValueError, match="bad S3 URI"):
        open_store("s3:///x")


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


def test_list_passes_over_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    LocalStore(tmp_path).create("x", b"1")
    assert list(LocalStore(tmp_path).list()) == [ObjectInfo("x", 1)]


def test_local_objects_can_be_memory_mapped_and_remote_ones_say_no(tmp_path: Path) -> None:
    LocalStore(tmp_path).create("x", b"1")
    path = LocalStore(tmp_path).local_path("x")
    assert path is not None
    assert path.read_bytes() == b"1"
    assert S3Store("s3://bucket/x").local_path("x") is None


# --- S3, against a server that misbehaves on purpose ---------------------------------------------------------------


class _Flaky(http.server.BaseHTTPRequestHandler):
    """Answers with the next of `script`, (status, body, bytes promised beyond the body), and remembers the requests."""

    protocol_version = "HTTP/1.1"  # answers 'Expect: 100-continue', for which botocore would wait a second
    script: ClassVar[list[tuple[int, bytes, int]]] = []
    seen: ClassVar[list[tuple[str, str | None]]] = []

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        type(self).seen.append((self.command, self.headers.get("If-None-Match")))
        status, body, promised = type(self).script.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + promised))
        self.send_header("Connection", "close")
        self.send_header("x-amz-request-id", "R7")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_DELETE = _answer  # noqa: N815  (names that http.server calls)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Flaky]]:
    _Flaky.script, _Flaky.seen = [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Flaky) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for name, value in {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("time.sleep", lambda _: None)  # the pauses between tries
        yield _Flaky
        server.shutdown()


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (502, "BadGateway")])
def test_s3_retries_a_transient_refusal(flaky: type[_Flaky], status: int, code: str) -> None:
    flaky.script = [(status, _error(code), 0), (status, _error(code), 0), (200, b"data", 0)]
    assert S3Store("s3://bucket/x").get("a") == b"data"
    assert len(flaky.seen) == 3


def test_s3_asks_again_for_a_body_that_breaks_off(flaky: type[_Flaky]) -> None:
    flaky.script = [(200, b"da", 2), (200, b"data", 0)]
    assert S3Store("s3://bucket/x").get("a") == b"data"


def test_s3_create_is_conditional_and_sent_again_on_conflict(flaky: type[_Flaky]) -> None:
    flaky.script = [(409, _error("ConditionalRequestConflict"), 0), (200, b"", 0)]
    assert S3Store("s3://bucket/x").create("a", b"data") is True
    assert flaky.seen == [("PUT", "*"), ("PUT", "*")]


def test_s3_refusal_for_good_names_the_object_the_reason_and_the_request(flaky: type[_Flaky]) -> None:
    flaky.script = [(403, _error("AccessDenied"), 0)]
    with pytest.raises(StoreError, match=r"put_object s3://bucket/x/a failed: .*AccessDenied.*R7"):
        S3Store("s3://bucket/x").create("a", b"data")
    assert len(flaky.seen) == 1  # not a transient error: not tried again


def test_s3_gives_up_after_eight_tries(flaky: type[_Flaky]) -> None:
    flaky.script = [(503, _error("SlowDown"), 0)] * 20
    with pytest.raises(StoreError, match="SlowDown"):
        S3Store("s3://bucket/x").get("a")
    assert len(flaky.seen) == 8


def test_s3_listing_a_bucket_that_is_not_there_is_a_store_error(s3_server: str) -> None:
    with pytest.raises(StoreError, match="list s3://no-such-bucket/"):
        list(open_store("s3://no-such-bucket/x").list())
