"""Requests to one bucket: authorised by boto3's chain, tried again where that helps, counted, refused in plain words.

Retries live here and nowhere else: botocore's own are off, because only who sees every try knows whether an
"it exists already" speaks of somebody else's object or of one's own, whose answer was lost.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from fourmill.pipeline.store.base import Counters, StoreError, redacted
from fourmill.pipeline.store.retries import RangeError, TakenError, describe, pauses, request_errors
from fourmill.pipeline.store.settings import StoreSettings

log = logging.getLogger(__name__)
_lock = threading.Lock()
_WRITES = {"put_object", "create_multipart_upload"}  # they say how an object is to be encrypted


class BucketRequests:
    """The one way to a bucket. Safe to use from threads, and after a fork."""

    def __init__(self, bucket: str, settings: StoreSettings, counters: Counters) -> None:
        self.bucket, self.settings, self.counters = bucket, settings, counters
        self._client: tuple[int, Any] | None = None  # sockets must not be shared over a fork, as of a data loader

    @property
    def client(self) -> Any:
        if self._client is None or self._client[0] != os.getpid():
            self._client = os.getpid(), _new_client(self.settings)
        return self._client[1]

    @property
    def endpoint(self) -> str:
        return str(self.client.meta.endpoint_url)

    def call(
        self,
        operation: str,
        key: str,
        read: Callable[[Any], Any] | None = None,
        before_retry: Callable[[], None] | None = None,
        final: Collection[str] = (),
        **arguments: Any,
    ) -> Any:
        """One operation on `key`, as often as it takes; `read` of its response counts as part of it.

        `before_retry` may look around first and raise; failures of a kind in `final` are not tried again.
        Raises FileNotFoundError, TakenError or StoreError, which name operation, bucket, key and request id.
        """
        from botocore.exceptions import BotoCoreError

        where = f"{operation} s3://{self.bucket}/{key}"
        request = {"Bucket": self.bucket, **self._extras(operation), **arguments}
        if not operation.startswith("list_"):  # for these `key` is a prefix, named in errors
            request["Key"] = key
        start, unclear, tries = time.monotonic(), False, 0
        waits = pauses(self.settings.max_attempts, self.settings.max_retry_s)
        while True:
            tries += 1
            self.counters.add(requests=1)
            try:
                response = getattr(self.client, operation)(**request)
                return read(response) if read else response
            except request_errors() as error:
                failure = describe(error)
            except BotoCoreError as error:  # no credentials, a bad parameter: nothing was sent
                raise StoreError(f"{where} failed: {redacted(str(error))}") from None
            # Outside the handlers: botocore's exceptions, which hold whole responses, do not go along with ours.
            _raise_if_an_answer(where, failure.kind, unclear)
            unclear = unclear or failure.unclear
            pause = next(waits, None) if failure.transient and failure.kind not in final else None
            if pause is None:
                spent = f" after {tries} tries in {time.monotonic() - start:.1f} s" if tries > 1 else ""
                refused = StoreError(f"{where} failed{spent}: {failure}")
                refused.kind = failure.kind
                raise refused
            if self.counters.add_retry(failure.kind):
                log.warning("%s: %s; trying again (said once for this kind, then only counted)", where, failure)
            time.sleep(pause)
            if before_retry:
                before_retry()

    def _extras(self, operation: str) -> dict[str, Any]:
        settings = self.settings
        extras: dict[str, Any] = {}
        if settings.requester_pays:
            extras["RequestPayer"] = "requester"
        if operation in _WRITES and settings.server_side_encryption:
            extras["ServerSideEncryption"] = settings.server_side_encryption
            if settings.kms_key_id:
                extras["SSEKMSKeyId"] = settings.kms_key_id
        return extras


def _raise_if_an_answer(where: str, kind: str, unclear: bool) -> None:
    """Some refusals are what was asked."""
    if kind in ("412", "PreconditionFailed"):
        raise TakenError(where, unclear)
    if kind in ("404", "NoSuchKey"):
        raise FileNotFoundError(f"no object for {where}")
    if kind in ("416", "InvalidRange"):
        raise RangeError(where)


def _new_client(settings: StoreSettings) -> Any:
    """botocore's S3 client; 4 ms with a session that has read its models, 140 ms without."""
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    for name in ("botocore", "boto3", "urllib3"):  # at DEBUG they log session tokens and signatures
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.INFO)
    options: dict[str, Any] = {"signature_version": UNSIGNED} if settings.anonymous else {}
    if settings.addressing != "auto":
        options["s3"] = {"addressing_style": settings.addressing}
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        max_pool_connections=32,
        tcp_keepalive=True,
        **options,
    )
    try:
        with _lock:  # sessions are not safe to use from threads, clients are
            session = _session(os.getpid(), settings.profile, _environment())
            return session.client("s3", endpoint_url=settings.endpoint, region_name=settings.region, config=config)
    except (BotoCoreError, ValueError) as error:  # no such profile, or an endpoint that is no URL
        raise StoreError(f"cannot reach S3: {redacted(str(error))}") from None


@functools.lru_cache(maxsize=8)
def _session(_pid: int, profile: str | None, _environment: str) -> Any:
    import boto3

    return boto3.session.Session(profile_name=profile)


def _environment() -> str:
    """Changes when the variables do that boto3's chain begins with; a digest, as some of them are secret."""
    found = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("AWS_"))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()
