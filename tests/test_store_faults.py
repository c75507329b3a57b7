"""The S3 store behind a proxy that goes wrong: what is tried again, what is said, who is told that it won."""

from __future__ import annotations

import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tiny_proxy import Fault, Proxy

from fourmill.pipeline.store import S3Store, StoreError, StoreSettings, conditional, retries
from fourmill.pipeline.store.base import redacted
from fourmill.pipeline.store.conditional import is_content_named

MIB = 1 << 20
LARGE = random.Random(0).randbytes(6 * MIB)
PARTS = {"multipart_threshold": 5 * MIB, "part_bytes": 5 * MIB}


def _store(uri: str, proxy: Proxy, **settings: Any) -> S3Store:
    return S3Store(uri, StoreSettings(endpoint=proxy.url, **{"conditional_writes": "atomic", **settings}))


# --- tried again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (429, "TooManyRequests"),
        (500, "InternalError"),
        (502, "BadGateway"),
        (504, "GatewayTimeout"),
        (400, "RequestTimeout"),
        (403, "RequestTimeTooSkewed"),
    ],
)
def test_a_transient_refusal_is_tried_again_and_counted(s3_uri: str, s3_proxy: Proxy, status: int, code: str) -> None:
    store = _store(s3_uri, s3_proxy)
    store.create("x", b"data")
    s3_proxy.faults = [Fault("answer", "GET", times=3, status=status, code=code)]
    assert store.get("x") == b"data"
    counted = store.counters.as_dict()
    assert (counted["retries"], counted["retries_by_kind"], counted["requests"]) == (3, {code: 3}, 5)


@pytest.mark.parametrize(
    ("does", "kind"),
    [
        ("reset", "ConnectionClosedError"),
        ("truncate", "ResponseStreamingError"),
        ("reset_body", "ResponseStreamingError"),
        ("corrupt", "FlexibleChecksumError"),
    ],
)
def test_a_body_that_breaks_off_or_changes_on_the_way_is_asked_for_again(
    s3_uri: str, s3_proxy: Proxy, does: str, kind: str
) -> None:
    store, data = _store(s3_uri, s3_proxy), bytes(range(256)) * 1000
    store.create("x", data)
    s3_proxy.faults = [Fault(does, "GET", times=2)]
    assert store.get("x") == data
    counted = store.counters.as_dict()["retries_by_kind"]
    assert sum(counted.values()) == 2
    assert kind in counted or does == "reset_body"  # a reset may overtake the half that was sent


def test_a_listing_that_breaks_off_is_asked_for_again(s3_uri: str, s3_proxy: Proxy) -> None:
    store = _store(s3_uri, s3_proxy)
    for name in "abc":
        store.create(name, b"")
    s3_proxy.faults = [Fault("truncate", "GET", "list-type=2", times=2)]
    assert [info.name for info in store.list()] == ["a", "b", "c"]


def test_a_changed_byte_in_one_part_of_a_download_is_noticed_by_the_whole(s3_uri: str, s3_proxy: Proxy) -> None:
    store = _store(s3_uri, s3_proxy, **PARTS)
    store.create("x", LARGE)
    reading = _store(s3_uri, s3_proxy, multipart_threshold=5 * MIB, part_bytes=5 * MIB)
    # The first GET is for the whole and is given up at its headers; the second and third are the two ranges.
    s3_proxy.faults = [Fault("", "GET"), Fault("corrupt", "GET")]
    assert reading.get("x") == LARGE
    assert reading.counters.as_dict()["retries_by_kind"] == {"ChecksumError": 1}
    s3_proxy.faults = [Fault("corrupt", "GET", times=999)]
    with pytest.raises(
        StoreError, match=rf"get_object {s3_uri}/x failed after 2 tries .*ChecksumError: stored with CRC-32"
    ):
        _store(s3_uri, s3_proxy, max_attempts=2, **PARTS).get("x")


def test_what_the_server_says_arrived_changed_is_sent_again(s3_uri: str, s3_proxy: Proxy) -> None:
    s3_proxy.faults = [Fault("answer", "PUT", status=400, code="BadDigest")]
    store = _store(s3_uri, s3_proxy)
    assert store.create("x", b"data") is True
    assert [seen.headers["x-amz-checksum-crc32"] for seen in s3_proxy.requests("PUT")] == ["rfPzYw==", "rfPzYw=="]


def test_a_wrong_checksum_is_refused_by_the_server_for_whole_objects_and_parts(
    s3_uri: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fourmill.pipeline.store.upload.crc32", lambda data: "AAAAAA==")
    store = _store(s3_uri, s3_proxy, max_attempts=2, **PARTS)
    for data in (b"data", LARGE):
        with pytest.raises(StoreError, match=r"failed after 2 tries.*BadDigest"):
            store.create("x", data)
    assert store.head("x") is None


# --- lost answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "method", "part"), [(b"data", "PUT", ""), (LARGE, "POST", "uploadId=")])
def test_a_create_whose_answer_was_lost_is_still_ours(
    s3_uri: str, s3_proxy: Proxy, data: bytes, method: str, part: str
) -> None:
    store = _store(s3_uri, s3_proxy, **PARTS)
    s3_proxy.faults = [Fault("drop", method, part)]
    assert store.create("x", data) is True
    assert len(s3_proxy.requests(method, part)) == 2  # the second heard that the name is taken
    assert store.get("x") == data
    assert store.create("x", data) is False  # equal bytes are not the same writer


def test_a_complete_upload_that_the_server_has_forgotten_is_still_ours(s3_uri: str, s3_proxy: Proxy) -> None:
    store = _store(s3_uri, s3_proxy, **PARTS)
    forgotten = Fault("answer", "POST", "uploadId=", status=404, code="NoSuchUpload")  # as AWS answers
    s3_proxy.faults = [Fault("drop", "POST", "uploadId="), forgotten]
    assert store.create("x", LARGE) is True
    assert store.get("x") == LARGE


def test_a_refusal_between_does_not_make_a_lost_answer_forgotten(s3_uri: str, s3_proxy: Proxy) -> None:
    store = _store(s3_uri, s3_proxy)
    s3_proxy.faults = [Fault("drop", "PUT"), Fault("answer", "PUT", status=429, code="TooManyRequests")]
    assert store.create("x", b"data") is True


def test_an_unclear_try_does_not_make_somebody_elses_object_ours(s3_uri: str, s3_proxy: Proxy) -> None:
    store, other = _store(s3_uri, s3_proxy), _store(s3_uri, s3_proxy)
    other.create("x", b"theirs")
    s3_proxy.faults = [Fault("reset", "PUT")]  # ours never arrived, but we cannot know
    assert store.create("x", b"theirs") is False


# --- given up ------------------------------------------------------------------------------------------------------


def test_a_refusal_for_good_names_operation_bucket_key_reason_and_request(s3_uri: str, s3_proxy: Proxy) -> None:
    s3_proxy.faults = [Fault("answer", "PUT", status=403, code="AccessDenied")]
    with pytest.raises(StoreError, match=rf"^put_object {s3_uri}/a failed: AccessDenied: m \(request id R7\)$"):
        _store(s3_uri, s3_proxy).create("a", b"data")
    assert len(s3_proxy.seen) == 1


def test_tries_end_after_max_attempts(s3_uri: str, s3_proxy: Proxy) -> None:
    s3_proxy.faults = [Fault("answer", times=99)]
    with pytest.raises(StoreError, match=r"failed after 5 tries in \d+\.\d s: SlowDown: m \(request id R7\)"):
        _store(s3_uri, s3_proxy, max_attempts=5).get("x")
    assert len(s3_proxy.seen) == 5


def test_tries_end_after_max_retry_s_and_pauses_are_jittered_up_to_a_cap() -> None:
    now = iter(range(0, 1000, 7))
    assert len(list(retries.pauses(100, 60.0, clock=lambda: float(next(now))))) in (6, 7, 8)  # a try a 7 s, and pauses
    drawn = [list(retries.pauses(12, 1e9)) for _ in range(200)]
    for attempt, longest in enumerate([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20.0, 20.0, 20.0, 20.0]):
        column = [pauses[attempt] for pauses in drawn]
        assert 0 <= min(column) < 0.1 * longest
        assert 0.9 * longest < max(column) <= longest


def test_one_warning_a_kind(s3_uri: str, s3_proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    store = _store(s3_uri, s3_proxy)
    store.create("x", b"1")
    s3_proxy.faults = [
        Fault("answer", "GET", times=4),
        Fault("answer", "GET", times=2, status=500, code="InternalError"),
    ]
    store.get("x")
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [message.partition(";")[0] for message in said] == [
        f"get_object {s3_uri}/x: SlowDown: m (request id R7)",
        f"get_object {s3_uri}/x: InternalError: m (request id R7)",
    ]


def test_a_clock_that_stays_wrong_is_said_in_seconds(s3_uri: str, s3_proxy: Proxy) -> None:
    skewed = {"Date": "Sat, 01 Jan 2000 00:00:00 GMT"}
    s3_proxy.faults = [Fault("answer", times=9, status=403, code="RequestTimeTooSkewed", headers=skewed)]
    with pytest.raises(StoreError, match=r"RequestTimeTooSkewed.*this machine's clock is \d{9,} s ahead"):
        _store(s3_uri, s3_proxy, max_attempts=2).get("x")


def test_no_bucket_and_no_profile_are_store_errors(s3_uri: str, s3_proxy: Proxy) -> None:
    with pytest.raises(StoreError, match="list_objects_v2 s3://no-such-bucket/x/ failed: NoSuchBucket"):
        list(_store("s3://no-such-bucket/x", s3_proxy).list())
    with pytest.raises(StoreError, match=r"cannot reach S3: .*nobody"):
        _store(s3_uri, s3_proxy, profile="nobody").get("x")


# --- credentials ---------------------------------------------------------------------------------------------------


def test_no_credential_reaches_a_log_or_an_error_even_at_debug(
    s3_uri: str, s3_proxy: Proxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAHUSH")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hush-token")
    for name in ("botocore", "boto3", "urllib3"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
        logging.getLogger(name).manager._clear_cache()  # type: ignore[attr-defined]
    caplog.set_level(logging.DEBUG)
    body = (
        b"<Error><Code>InvalidAccessKeyId</Code><Message>m</Message><AWSAccessKeyId>AKIAHUSH</AWSAccessKeyId></Error>"
    )
    s3_proxy.faults = [Fault("answer", times=2), Fault("answer", status=403, body=body)]
    with pytest.raises(StoreError) as refused:
        _store(s3_uri, s3_proxy).create("x", b"1")
    assert s3_proxy.seen[0].headers["x-amz-security-token"] == "hush-token"  # they were used
    assert "AKIAHUSH" in s3_proxy.seen[0].headers["authorization"]
    everything = caplog.text + repr(refused.value) + repr(refused.value.__context__) + repr(vars(refused.value))
    assert "SlowDown" in everything
    assert "hush" not in everything.lower()


def test_an_endpoint_with_a_password_in_the_environment_is_shown_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:hush-hush@127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(StoreError) as refused:
        S3Store("s3://bucket/x", StoreSettings(max_attempts=1)).get("x")
    assert "hush" not in str(refused.value)
    assert "bucket/x/x" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("to http://user:hush@host/a@b failed", "to http://***@host/a@b failed"),
        ("s3://AKIA:hush@bucket", "s3://***@bucket"),
        (
            "https://h/b?a=1&X-Amz-Credential=hush&X-Amz-Signature=hush&c=2",
            "https://h/b?a=1&X-Amz-Credential=***&X-Amz-Signature=***&c=2",
        ),
        ("mail me@example.org about https://h/b", "mail me@example.org about https://h/b"),
    ],
)
def test_redacted_takes_what_lets_somebody_in(text: str, expected: str) -> None:
    assert redacted(text) == expected


# --- stores without conditional writes -----------------------------------------------------------------------------


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "conditional" in record.getMessage()]


def test_the_probe_finds_a_sound_store_once_and_leaves_nothing(
    s3_uri: str, s3_proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    store = _store(s3_uri, s3_proxy, conditional_writes="probe", **PARTS)
    assert store.create("x", b"1") is True
    asked = len(s3_proxy.seen)
    assert asked == 2 + 16 * 3 + 17 + 1  # two in turn, races of two and a look, all deleted; the object
    assert _store(f"{s3_uri}/other", s3_proxy, conditional_writes="probe").create("x", b"1") is True
    assert len(s3_proxy.seen) == asked + 1
    assert _warnings(caplog) == []
    assert [info.name for info in S3Store(s3_uri).list()] == ["other/x", "x"]
    assert [info.name for info in S3Store(f"{s3_uri}/.fourmill-probe").list()] == []
    assert store.settle().conditional_writes in ("atomic", "single")  # SeaweedFS' completions are nearly atomic


def test_a_store_that_ignores_the_condition_is_looked_at_before_writing(
    s3_uri: str, s3_proxy: Proxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditional, "_WAIT_S", 0.0)
    s3_proxy.faults = [Fault("ignore_condition", "PUT", times=999)]
    store = _store(s3_uri, s3_proxy, conditional_writes="probe")
    assert store.create("x", b"first") is True
    assert store.create("x", b"second") is False
    assert store.get("x") == b"first"
    (said,) = _warnings(caplog)
    assert said.startswith(f"s3://{store.bucket} at {s3_proxy.url}: ")
    assert "conditional writes are ignored" in said
    assert "only ONE driver may write the manifest" in said
    assert store.settle().conditional_writes == "none"


def test_a_store_that_does_not_know_the_condition_is_not_sent_it(
    s3_uri: str, s3_proxy: Proxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditional, "_WAIT_S", 0.0)
    s3_proxy.faults = [Fault("answer", "PUT", ".fourmill-probe", times=99, status=501, code="NotImplemented")]
    store = _store(s3_uri, s3_proxy, conditional_writes="probe", max_attempts=2)
    assert store.create("x", b"first") is True
    assert store.create("x", b"second") is False
    assert [seen.headers.get("if-none-match") for seen in s3_proxy.requests("PUT")] == [None]
    assert "conditional writes are refused" in _warnings(caplog)[0]


def test_a_condition_that_holds_in_turn_but_not_in_a_race_is_found_out(
    s3_uri: str, s3_proxy: Proxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditional, "_WAIT_S", 2.0)
    s3_proxy.faults = [Fault("race", "PUT", times=999)]
    stores = [_store(s3_uri, s3_proxy, conditional_writes="probe") for _ in range(8)]
    start = threading.Barrier(8)

    def write(name: str, number: int) -> bool:
        start.wait()
        return stores[number].create(name, b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        snapshot = list(pool.map(lambda n: write("manifest/snapshot-000001.json", n), range(8)))
        shard = list(pool.map(lambda n: write("depth/shard-000001.0123456789abcdef.arrow", n), range(8)))
    assert ["racy" in said for said in _warnings(caplog)] == [True]
    assert snapshot.count(True) == 1  # the last to write, found after a pause; no promise where writers stall
    assert stores[0].get("manifest/snapshot-000001.json") == b"%d" % snapshot.index(True)
    assert shard.count(True) > 1  # not told apart, as their bytes would be equal


def test_a_retry_on_such_a_store_does_not_replace_what_came_between(
    s3_uri: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditional, "_WAIT_S", 0.0)
    store, other = _store(s3_uri, s3_proxy, conditional_writes="none"), _store(s3_uri, s3_proxy)
    came_between = threading.Event()

    def between(seconds: float) -> None:
        other.create("x", b"theirs")
        came_between.set()

    s3_proxy.faults = [Fault("answer", "PUT")]
    monkeypatch.setattr("fourmill.pipeline.store.requests.time.sleep", between)
    assert store.create("x", b"ours") is False
    assert came_between.is_set()
    assert other.get("x") == b"theirs"


def test_large_objects_go_in_one_put_where_only_multipart_is_unconditional(
    s3_uri: str, s3_proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    s3_proxy.faults = [Fault("ignore_condition", "POST", "uploadId=", times=999)]  # as Ceph 16 does
    store = _store(s3_uri, s3_proxy, conditional_writes="probe", **PARTS)
    assert store.create("x", LARGE) is True
    assert store.create("x", LARGE) is False
    assert [seen.path.partition("?")[2] for seen in s3_proxy.requests("PUT", "/x")] == [""]
    assert "conditional multipart uploads are ignored" in _warnings(caplog)[0]
    assert store.get("x") == LARGE
    assert store.settle().conditional_writes == "single"
    assert _store(s3_uri, s3_proxy, conditional_writes="single", **PARTS).create("y", LARGE) is True
    assert s3_proxy.requests("POST") == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("depth/shard-000012.0123456789abcdef.arrow", True),
        ("manifest/config-0123456789abcdef0123.yaml", True),
        ("manifest/snapshot-000003.json", False),
        ("0123456789abcdef/snapshot-000003.json", False),
        ("images/1234567890123456.jpg", False),
        ("state/step-00000100.safetensors", False),
    ],
)
def test_content_named_is_a_digest_in_the_last_part(name: str, expected: bool) -> None:
    assert is_content_named(name) is expected
