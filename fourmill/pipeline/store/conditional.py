"""Whether a bucket creates an object only if its name is free, and what is done where it does not.

AWS does, also when writers race. Others ignore the condition, refuse it, or check it without holding the name: Swift,
and SeaweedFS for uploads in parts, while its single PUTs are sound. A look at documentation or one request does not
tell these apart, small races on throw-away names do. Where only single PUTs are sound, up to 5 GiB go in one.

Where the condition does not hold, an object is created by looking first and writing then:

- For objects whose name holds a digest of what determines their bytes (shards, their records, record tables,
  configurations) that is as good: writers of one name write equal bytes, and a reader sees the same whichever came
  last. Only the answer suffers: two writers may both hear True.
- For others, such as `manifest/snapshot-000003.json`, it is not. After writing, the writer waits and looks whether its
  own attempt is still there, and hears False if not (L. Lamport, "A fast mutual exclusion algorithm", 1987, calls this
  Fischer's). That excludes a second writer if none takes longer between its look and the end of its write than the
  wait, which nobody can promise: a stalled one can replace a snapshot that readers have opened. So on such a store only
  one driver may write the manifest, and the log says so, once.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum

from fourmill.pipeline.store.base import StoreError, redacted
from fourmill.pipeline.store.requests import BucketRequests
from fourmill.pipeline.store.retries import TakenError
from fourmill.pipeline.store.settings import StoreSettings
from fourmill.pipeline.store.upload import CONFLICT, SINGLE_PUT_BYTES, Upload

log = logging.getLogger(__name__)
PROBE_FOLDER = ".fourmill-probe"
# SeaweedFS 4.48 lets both of two writers complete an upload in parts in 16 races of 40, so 16 races miss that once in
# 3,000. More writers find it sooner, but its locks make them wait: 8 PUTs of one name took 2 s there, and 2 take 20 ms.
_RACES = 16
_CONFLICTS = 5  # uploads in parts that another's completion may undo before that is an error
_WAIT_S = 1.0  # a small PUT takes 3 to 80 ms, on all stores that were measured
_DIGEST = re.compile(r"(?<![0-9a-z])(?=[0-9]*[a-f])[0-9a-f]{16,64}(?![0-9a-z])")  # with a letter: others are numbers
_Put = Callable[[Upload], bool]


class Verdict(str, Enum):
    """What a bucket makes of `If-None-Match: *`."""

    ATOMIC = "atomic"
    RACY = "racy"  # it refuses a taken name, but lets several racing writers win
    IGNORED = "ignored"
    REFUSED = "refused"  # not implemented, says the store


# A process asks once for each bucket: the answer belongs to the service, not to the prefix.
_verdicts: dict[tuple[str, str, str], Verdict] = {}
_asking = threading.Lock()


def create(requests: BucketRequests, prefix: str, key: str, data: bytes) -> bool:
    """Publish `data` under `key` if the name is free, as safely as this bucket can."""
    large = len(data) > requests.settings.multipart_threshold
    if large and _is_there(requests, key):
        return False  # before gigabytes are sent
    if verdict(requests, prefix, Upload.whole) is not Verdict.ATOMIC:
        return _create_unfenced(requests, prefix, key, data, large)
    if large and verdict(requests, prefix, Upload.in_parts) is not Verdict.ATOMIC:  # Ceph 16 ignores it there
        if len(data) > SINGLE_PUT_BYTES:
            return _create_unfenced(requests, prefix, key, data, large)
        large = False
    return _in_parts(requests, key, data) if large else Upload(requests, key, data).whole()


def _in_parts(requests: BucketRequests, key: str, data: bytes) -> bool:
    for _ in range(_CONFLICTS):
        try:
            return Upload(requests, key, data).in_parts()
        except StoreError as error:
            if error.kind != CONFLICT:
                raise
            last = error
            if _is_there(requests, key):
                return False
    raise last


def verdict(requests: BucketRequests, prefix: str, put: _Put) -> Verdict:
    """Of this bucket for single PUTs or uploads in parts: as configured, as found before, or found out now."""
    bucket, known = (requests.endpoint, requests.bucket, put.__name__), requests.settings.conditional_writes
    with _asking:
        if known == "probe" and bucket not in _verdicts:
            _verdicts[bucket] = _probe(requests, f"{prefix}{PROBE_FOLDER}/{secrets.token_hex(8)}", put)
            _say(requests, put, _verdicts[bucket])
        if known == "probe":
            return _verdicts[bucket]
        if known == "none" and bucket not in _verdicts:
            _verdicts[bucket] = Verdict.REFUSED
            _say(requests, put, Verdict.REFUSED)
    holds = known == "atomic" or (known == "single" and put is Upload.whole)
    return Verdict.ATOMIC if holds else Verdict.REFUSED


def settle(requests: BucketRequests, prefix: str) -> StoreSettings:
    """The settings with what is known of conditional writes, so that each worker need not find out for itself."""
    words: dict[tuple[bool, bool], str] = {(True, True): "atomic", (True, False): "single"}
    whole = verdict(requests, prefix, Upload.whole) is Verdict.ATOMIC
    parts = whole and verdict(requests, prefix, Upload.in_parts) is Verdict.ATOMIC
    return requests.settings.model_copy(update={"conditional_writes": words.get((whole, parts), "none")})


def _say(requests: BucketRequests, put: _Put, found: Verdict) -> None:
    where = f"s3://{requests.bucket} at {redacted(requests.endpoint)}"
    if found is Verdict.ATOMIC:
        return
    if put is Upload.in_parts:
        log.warning("%s: conditional multipart uploads are %s; up to 5 GiB go in one PUT", where, found.value)
        return
    log.warning(
        "%s: conditional writes are %s. Shards are safe, as their names hold a digest of what determines their bytes. "
        "But only ONE driver may write the manifest at a time: a second could replace its snapshot (docs/storage.md)",
        where,
        found.value,
    )


def _probe(requests: BucketRequests, name: str, put: _Put) -> Verdict:
    """First one writer after another, then races of two; throw-away objects of a few bytes."""
    keys = [f"{name}-{i}" for i in range(_RACES + 1)]
    try:
        first = put(Upload(requests, keys[0], b"first"))
    except StoreError as error:
        if error.kind == "NotImplemented":
            return Verdict.REFUSED
        raise
    with ThreadPoolExecutor(_RACES) as pool:
        if not first or put(Upload(requests, keys[0], b"second")):
            found = Verdict.IGNORED
        else:
            fair = all(_one_winner(requests, key, put, pool) for key in keys[1:])  # the first unfair one ends it
            found = Verdict.ATOMIC if fair else Verdict.RACY
        list(pool.map(lambda key: _clean_up(requests, key), keys))
    return found


def _one_winner(requests: BucketRequests, key: str, put: _Put, pool: ThreadPoolExecutor) -> bool:
    """Whether of two writers exactly one heard that it won, and its object is there."""
    line = threading.Barrier(2, timeout=60)
    uploads = [Upload(requests, key, data, ready=line.wait) for data in (b"one", b"other")]

    def race(upload: Upload) -> bool:
        try:
            return put(upload)
        except threading.BrokenBarrierError:  # the other one failed, and says why
            return False
        except StoreError:
            line.abort()
            raise

    winners = [upload for upload, won in zip(uploads, pool.map(race, uploads), strict=True) if won]
    return len(winners) == 1 and winners[0].is_ours()


def _clean_up(requests: BucketRequests, key: str) -> None:
    try:
        requests.call("delete_object", key)
    except StoreError as error:  # some may write and not delete
        log.info("a probe of a few bytes stays behind: %s", error)


def _create_unfenced(requests: BucketRequests, prefix: str, key: str, data: bytes, large: bool) -> bool:
    """Look, write, and for names without a digest wait and look again: see the module's beginning."""
    condition = verdict(requests, prefix, Upload.whole) in (Verdict.RACY, Verdict.ATOMIC)

    def look() -> None:
        if _is_there(requests, key) and not upload.is_ours():
            raise TakenError(key, unclear=False)

    upload = Upload(requests, key, data, condition, before_retry=look)
    try:
        look()
        won = upload.in_parts() if large else upload.whole()
    except TakenError:
        return False
    if not won or is_content_named(key):
        return won
    time.sleep(_WAIT_S)
    return upload.is_ours()


def is_content_named(key: str) -> bool:
    """Whether the last part of a name holds a digest (16 hexadecimal digits or more): its writers write equal bytes."""
    return _DIGEST.search(key.rpartition("/")[2]) is not None


def _is_there(requests: BucketRequests, key: str) -> bool:
    try:
        requests.call("head_object", key)
    except FileNotFoundError:
        return False
    return True
