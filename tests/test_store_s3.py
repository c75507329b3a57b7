"""The S3 store against a real server: exactly one winner, parts, settings as the server sees them, listings."""

from __future__ import annotations

import json
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_proxy import Fault, Proxy

from fourmill.pipeline.store import ObjectInfo, S3Store, StoreError, StoreSettings, listing
from fourmill.pipeline.store.upload import crc32

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
PARTS = {"multipart_threshold": 5 * MIB, "part_bytes": 5 * MIB, "conditional_writes": "atomic"}
LARGE = random.Random(0).randbytes(11 * MIB)  # three parts: 5, 5 and 1 MiB


def _store(uri: str, **settings: Any) -> S3Store:
    return S3Store(uri, StoreSettings(**{"conditional_writes": "atomic", **settings}))


def _raw(endpoint: str) -> Any:
    """boto3 as it comes, to look at what is really there."""
    import boto3

    return boto3.session.Session().client("s3", endpoint_url=endpoint)


@pytest.mark.parametrize(
    ("num_bytes", "writes", "requests"), [(100, "atomic", 0), (6 * MIB, "single", 0), (6 * MIB, "atomic", 16)]
)
def test_sixteen_writers_of_one_name_have_exactly_one_winner(
    s3_uri: str, s3_proxy: Proxy, num_bytes: int, writes: str, requests: int
) -> None:
    # SeaweedFS checks the condition of an upload in parts, but not atomically; behind a queue it does.
    s3_proxy.faults = [Fault("queue", "POST", "uploadId=", times=99)]
    stores = [_store(s3_uri, endpoint=s3_proxy.url, **{**PARTS, "conditional_writes": writes}) for _ in range(16)]
    start = threading.Barrier(16)

    def write(number: int) -> bool:
        start.wait()
        return stores[number].create("x", bytes([number]) * num_bytes)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(write, range(16)))
    assert won.count(True) == 1
    assert len(s3_proxy.requests("POST", "uploadId=")) == requests
    assert stores[0].get("x") == bytes([won.index(True)]) * num_bytes


# --- parts ---------------------------------------------------------------------------------------------------------


def test_a_large_object_moves_in_parts_both_ways(s3_uri: str, s3_proxy: Proxy) -> None:
    store = _store(s3_uri, endpoint=s3_proxy.url, **PARTS)
    assert store.create("x", LARGE) is True
    assert len(s3_proxy.requests("PUT", "partNumber=")) == 3
    (completion,) = s3_proxy.requests("POST", "uploadId=")
    sent = [completion.headers[name] for name in ("if-none-match", "x-amz-checksum-type", "x-amz-checksum-crc32")]
    assert sent == ["*", "FULL_OBJECT", crc32(LARGE)]
    assert store.get("x") == LARGE
    ranges = sorted(seen.headers["range"] for seen in s3_proxy.requests("GET") if "range" in seen.headers)
    assert ranges == ["bytes=0-5242879", "bytes=10485760-11534335", "bytes=5242880-10485759"]
    assert store.get_range("x", 3, 11 * MIB) == LARGE[3:]
    assert store.create("x", LARGE) is False
    assert len(s3_proxy.requests("PUT", "partNumber=")) == 3  # nothing was sent for a name that is taken


def test_an_object_of_exactly_the_threshold_is_one_put(s3_uri: str, s3_proxy: Proxy) -> None:
    store = _store(s3_uri, endpoint=s3_proxy.url, **PARTS)
    assert store.create("x", LARGE[: 5 * MIB]) is True
    assert [seen.path.partition("?")[2] for seen in s3_proxy.requests("PUT")] == [""]
    assert store.get("x") == LARGE[: 5 * MIB]


@pytest.mark.parametrize("method", ["PUT", "POST"], ids=["a part", "the completion"])
def test_an_upload_in_parts_that_fails_leaves_nothing(s3_uri: str, s3_proxy: Proxy, method: str) -> None:
    store = _store(s3_uri, endpoint=s3_proxy.url, **PARTS)
    where = "partNumber=2" if method == "PUT" else "uploadId="
    s3_proxy.faults = [Fault("answer", method, where, status=403, code="AccessDenied")]
    operation = "upload_part" if method == "PUT" else "complete_multipart_upload"
    with pytest.raises(StoreError, match=rf"{operation} {s3_uri}/x failed: AccessDenied: m \(request id R7\)"):
        store.create("x", LARGE)
    assert store.head("x") is None
    assert not _raw(s3_proxy.url).list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix).get("Uploads")
    assert store.create("x", LARGE) is True


def test_the_loser_of_a_race_in_parts_takes_its_parts_away(s3_uri: str, s3_proxy: Proxy) -> None:
    store, other = _store(s3_uri, endpoint=s3_proxy.url, **PARTS), _store(s3_uri)
    s3_proxy.faults = [Fault("answer", "HEAD", status=404, code="NotFound")]  # it looks before the other writes
    other.create("x", b"first")
    assert store.create("x", LARGE) is False
    assert store.get("x") == b"first"
    assert not _raw(s3_proxy.url).list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix).get("Uploads")


def test_a_conflict_at_completion_sends_all_parts_again(s3_uri: str, s3_proxy: Proxy) -> None:
    store = _store(s3_uri, endpoint=s3_proxy.url, **PARTS)
    s3_proxy.faults = [Fault("answer", "POST", "uploadId=", status=409, code="ConditionalRequestConflict")]
    assert store.create("x", LARGE) is True
    assert len(s3_proxy.requests("PUT", "partNumber=")) == 6
    assert store.get("x") == LARGE


_DIES_IN_PARTS = """
import sys, time
from fourmill.pipeline.store import S3Store, StoreSettings
from fourmill.pipeline.store.upload import Upload
def hang(*_):
    print("inside", flush=True)
    time.sleep(60)
Upload._complete = hang
settings = StoreSettings(multipart_threshold=5 << 20, part_bytes=5 << 20, conditional_writes="atomic")
S3Store(sys.argv[1], settings).create("x", bytes(6 << 20))
"""


def test_a_writer_killed_before_completion_leaves_nothing_visible(s3_uri: str) -> None:
    with subprocess.Popen([sys.executable, "-c", _DIES_IN_PARTS, s3_uri], stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"inside\n"
        writer.kill()
    store = _store(s3_uri, **PARTS)
    assert (store.head("x"), list(store.list())) == (None, [])
    assert store.create("x", LARGE) is True
    assert store.get("x") == LARGE


def test_an_object_replaced_while_its_parts_are_read_is_not_mixed(s3_uri: str, s3_proxy: Proxy) -> None:
    store = _store(s3_uri, endpoint=s3_proxy.url, **PARTS)
    store.create("x", LARGE)
    another = Fault("answer", "GET", status=206, headers={"ETag": '"other"'}, body=b"1" * 5 * MIB)
    s3_proxy.faults = [Fault("", "GET"), another]  # the second GET is the first for a part
    assert store.get("x") == LARGE
    assert store.counters.as_dict()["retries_by_kind"] == {"ChecksumError": 1}
    another.times = 1
    with pytest.raises(StoreError, match=rf"get_object {s3_uri}/x failed: the object was replaced while"):
        store.get_range("x", 0, 11 * MIB)


# --- settings, as the server sees them -----------------------------------------------------------------------------


def _everything(store: S3Store) -> None:
    store.create("small", b"1")
    store.create("large", LARGE)
    store.get("small")
    store.get("large")
    store.get_range("small", 0, 1)
    store.head("small")
    list(store.list())
    store.delete("small")


def test_requester_pays_is_said_in_every_request_and_encryption_in_every_write(s3_uri: str, s3_proxy: Proxy) -> None:
    _everything(_store(s3_uri, endpoint=s3_proxy.url, requester_pays=True, server_side_encryption="AES256", **PARTS))
    assert {seen.headers.get("x-amz-request-payer") for seen in s3_proxy.seen} == {"requester"}
    assert {seen.method for seen in s3_proxy.seen} == {"PUT", "POST", "GET", "HEAD", "DELETE"}
    encrypted = [
        (s.method, s.path.partition("?")[2]) for s in s3_proxy.seen if "x-amz-server-side-encryption" in s.headers
    ]
    assert encrypted == [("PUT", ""), ("POST", "uploads")]


def test_a_key_for_encryption_is_named_to_the_server(s3_proxy: Proxy) -> None:
    s3_proxy.faults = [Fault("answer", status=200, body=b"")]
    settings = {"server_side_encryption": "aws:kms", "kms_key_id": "alias/ours"}
    _store("s3://bucket/x", endpoint=s3_proxy.url, **settings).create("a", b"1")
    headers = s3_proxy.seen[0].headers
    assert headers["x-amz-server-side-encryption"] == "aws:kms"
    assert headers["x-amz-server-side-encryption-aws-kms-key-id"] == "alias/ours"


@pytest.mark.parametrize(
    ("addressing", "host", "path"), [("path", "s3.test", "/bucket/x/a"), ("virtual", "bucket.s3.test", "/x/a")]
)
def test_the_bucket_is_named_in_path_or_host(
    s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch, addressing: str, host: str, path: str
) -> None:
    resolve = socket.getaddrinfo

    def to_here(name: Any, *rest: Any, **named: Any) -> Any:
        return resolve("127.0.0.1" if str(name).endswith("s3.test") else name, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", to_here)
    port = s3_proxy.url.rpartition(":")[2]
    s3_proxy.faults = [Fault("answer", status=200, body=b"")]
    _store("s3://bucket/x", endpoint=f"http://s3.test:{port}", addressing=addressing).create("a", b"1")
    assert (s3_proxy.seen[0].headers["host"], s3_proxy.seen[0].path) == (f"{host}:{port}", path)


def test_anonymous_reads_what_is_public_and_sends_no_credentials(s3_uri: str, s3_proxy: Proxy) -> None:
    store = _store(s3_uri)
    store.create("public/x", b"open")
    store.create("private/x", b"closed")
    statement = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": ["s3:GetObject"],
        "Resource": [f"arn:aws:s3:::{store.bucket}/{store.prefix}/public/*"],
    }
    client = _raw(s3_proxy.url)
    client.put_bucket_policy(
        Bucket=store.bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    )
    try:
        anonymous = _store(s3_uri, endpoint=s3_proxy.url, anonymous=True)
        assert anonymous.get("public/x") == b"open"
        with pytest.raises(StoreError, match=r"get_object .*private/x failed: AccessDenied"):
            anonymous.get("private/x")
    finally:
        client.delete_bucket_policy(Bucket=store.bucket)
    assert all("authorization" not in seen.headers for seen in s3_proxy.requests("GET", store.prefix))
    assert "authorization" in s3_proxy.requests("PUT")[0].headers  # that of the policy: the test can tell


_READS = """
import pickle, sys
store = pickle.load(sys.stdin.buffer)
print(store.uri, store.settings.part_bytes, store.get("x").decode(), store.create("y", b"2"))
"""


def test_a_pickled_store_takes_its_settings_into_another_process(s3_uri: str, s3_proxy: Proxy) -> None:
    store = _store(s3_uri, endpoint=s3_proxy.url, part_bytes=7 * MIB)
    store.create("x", b"hello")
    environment = {**os.environ, "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "FOURMILL_S3_PART_BYTES": "6000000"}
    command = [sys.executable, "-c", _READS]
    done = subprocess.run(
        command, input=pickle.dumps(store), env=environment, cwd=ROOT, capture_output=True, check=True
    )
    assert done.stdout.decode().split() == [s3_uri, str(7 * MIB), "hello", "True"]
    assert store.get("y") == b"2"


def test_a_forked_process_gets_connections_of_its_own(s3_uri: str) -> None:
    store = _store(s3_uri)
    store.create("x", b"1" * 100_000)
    ours = store._requests.client
    child = os.fork()
    if not child:  # no assertion here: pytest would go on in two processes
        os._exit(0 if store.get("x") == b"1" * 100_000 and store._requests.client is not ours else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store._requests.client is ours
    assert store.get("x") == b"1" * 100_000


# --- listings and sizes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(s3_server: str) -> str:
    """1,200 objects of one folder, 20 bytes, and 40 of others, 3 bytes."""
    uri = f"s3://fourmill-tests/many-{os.urandom(4).hex()}"
    names = [(f"depth/shard-{i:06d}", 20) for i in range(1200)] + [(f"rgb/{i}/x", 3) for i in range(40)]
    store = _store(uri)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda one: store.create(one[0], b"x" * one[1]), names))
    return uri


def test_a_listing_is_streamed_page_by_page(many: str, s3_proxy: Proxy) -> None:
    found = _store(many, endpoint=s3_proxy.url).list("depth/")
    assert next(found) == ObjectInfo("depth/shard-000000", 20)
    assert len(s3_proxy.requests("GET", "list-type=2")) == 1
    assert [info.name for info in found] == [f"depth/shard-{i:06d}" for i in range(1, 1200)]
    assert len(s3_proxy.requests("GET", "list-type=2")) == 2


def test_sizes_of_neighbours_take_a_listing_and_of_strangers_a_head_each(many: str, s3_proxy: Proxy) -> None:
    store = _store(many, endpoint=s3_proxy.url)
    names = [f"depth/shard-{i:06d}" for i in range(500, 700)]
    assert store.sizes([*names, "depth/shard-000600.gone"]) == [20] * 200 + [None]
    # What a page lacks is asked for by name: a store may list in no order.
    assert (len(s3_proxy.requests("GET", "list-type=2")), len(s3_proxy.requests("HEAD"))) == (1, 1)
    assert store.sizes([f"rgb/{i}/x" for i in range(39, 42)]) == [3, None, None]
    assert len(s3_proxy.requests("HEAD")) == 1 + 3


def test_sizes_of_names_far_apart_stop_listing_and_ask_for_each(
    many: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_LISTED_FROM", 2)
    original = listing.pages

    def small_pages(*args: Any, **named: Any) -> Iterator[list[ObjectInfo]]:
        for page in original(*args, **named):
            yield from (page[i : i + 100] for i in range(0, len(page), 100))

    monkeypatch.setattr(listing, "pages", small_pages)
    store = _store(many, endpoint=s3_proxy.url)
    assert store.sizes(["depth/shard-000001", "depth/shard-001100", "depth/shard-001200"]) == [20, 20, None]
    assert len(s3_proxy.requests("HEAD")) == 2  # two pages were enough to give up


def _page(*names: str) -> Fault:
    contents = "".join(
        f"<Contents><Key>{name}</Key><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
        for name in names
    )
    body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
    return Fault("answer", "GET", "list-type=2", times=9, status=200, body=body.encode())


def test_a_store_that_lists_in_no_order_is_found_out_and_sorted_where_that_is_said(s3_proxy: Proxy) -> None:
    s3_proxy.faults = [_page("x/b", "x/a", "x/c")]
    with pytest.raises(StoreError, match=r"s3://bucket lists x/a after x/b.*FOURMILL_S3_LISTING.*'unsorted'"):
        list(_store("s3://bucket/x", endpoint=s3_proxy.url).list())
    unsorted = _store("s3://bucket/x", endpoint=s3_proxy.url, listing="unsorted")
    assert list(unsorted.names()) == ["a", "b", "c"]


def test_directory_buckets_are_known_to_list_in_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    store = _store("s3://ours--use1-az4--x-s3/x", region="us-east-1")
    monkeypatch.setattr(store._requests, "call", lambda *_, **__: _paged("x/b", "x/a", "x/c"))
    assert list(store.names()) == ["a", "b", "c"]


def _paged(*keys: str) -> dict[str, Any]:
    when = datetime(2026, 1, 1, tzinfo=timezone.utc)
    return {"Contents": [{"Key": key, "Size": 1, "LastModified": when} for key in keys]}


def test_aws_is_taken_at_its_word_and_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    store, calls = _store("s3://bucket/x", region="eu-central-1"), []

    def page(_operation: str, _prefix: str, **arguments: Any) -> Any:
        calls.append(arguments)
        contents = _paged(*[f"x/folder/{len(calls)}{i}" for i in "abc"])
        return {**contents, "IsTruncated": True, "NextContinuationToken": "more"}

    monkeypatch.setattr(store._requests, "call", page)
    found = store.list()
    assert [next(found).name for _ in range(4)] == ["folder/1a", "folder/1b", "folder/1c", "folder/2a"]
    assert calls == [{"Prefix": "x/"}, {"Prefix": "x/", "ContinuationToken": "more"}]


_NAMES = st.lists(st.text("ab-/", min_size=1, max_size=8), unique=True, max_size=30)


@given(_NAMES, st.sampled_from([None, lambda name: name.split("/")]))
def test_both_orders_of_listing_come_out_as_one(names: list[str], order: Callable[[str], Any] | None) -> None:
    clean = {"/".join(part for part in name.split("/") if part) for name in names} - {""}
    listed = [ObjectInfo(f"p/{name}", 0) for name in sorted(clean, key=order)]
    assert [info.name for info in listing.in_order(listed, "p")] == sorted(f"p/{name}" for name in clean)


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ([f"p/a-{i}" for i in range(9)], 2),  # plain objects, such as a modality's shards: one ahead
        (["p/a/1", "p/ab/1", "p/b/1"], 2),
        (["p/a/1", "p/a/2", "p/a-b", "p/a.txt", "p/aa", "p/b"], 5),  # 'a-b' sorts before 'a/1'
    ],
)
def test_no_more_is_held_back_than_has_to_be(names: list[str], read: int) -> None:
    taken = []

    def infos() -> Iterator[ObjectInfo]:
        for name in names:
            taken.append(name)
            yield ObjectInfo(name, 0)

    assert next(listing.in_order(infos(), "p")).name == min(names)
    assert len(taken) == read
