"""Which failures of a storage request are worth another try, how long to wait, and what to say when it is over.

Tried again: throttling, server errors, resets, timeouts, bodies that break off or do not match their checksum, a clock
that is off, another conditional write under way. A refusal (access denied, no such bucket) is final at once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from fourmill.pipeline.store.base import StoreError, redacted

_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",  # 409: S3 asks for the same request again
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeTooSkewed",  # clocks are stepped while machines start
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
_STATUSES = {408, 429, 500, 502, 503, 504}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 20.0
_random = random.SystemRandom()  # jitter must differ between workers, which are seeded alike, and draw from no seed


class TakenError(FileExistsError):
    """The name is taken. `unclear`: an earlier try of this request got no answer and may have taken it."""

    def __init__(self, where: str, unclear: bool = False) -> None:
        super().__init__(where)
        self.unclear = unclear


class RangeError(StoreError):
    """The range begins behind the object's end."""


class ChecksumError(Exception):
    """What arrived is not what was stored."""


@dataclass(frozen=True)
class Failure:
    """One try that failed. `kind` is the service's code or the exception's name."""

    kind: str
    message: str
    status: int | None  # None: no answer
    request_id: str | None
    skew_s: float | None  # the server's clock less ours

    @property
    def transient(self) -> bool:
        certificate = "CERTIFICATE_VERIFY_FAILED" in self.message
        return self.kind in _CODES or self.status in _STATUSES or (self.status is None and not certificate)

    @property
    def unclear(self) -> bool:
        """No answer, or a server error: what was asked for may have been done all the same."""
        return self.status is None or self.status >= 500

    def __str__(self) -> str:
        said = redacted(f"{self.kind}: {self.message}" if self.message else self.kind)
        if self.kind == "RequestTimeTooSkewed" and self.skew_s is not None:
            said += f"; this machine's clock is {abs(self.skew_s):.0f} s {'behind' if self.skew_s > 0 else 'ahead'}"
        return f"{said} (request id {self.request_id or 'unknown'})"


def describe(error: Exception) -> Failure:
    """One of the exceptions in `request_errors` as a Failure."""
    response: Any = getattr(error, "response", None)
    if not isinstance(response, dict):
        return Failure(type(error).__name__, str(error), None, None, None)
    said, meta = response.get("Error", {}), response.get("ResponseMetadata", {})
    headers = meta.get("HTTPHeaders", {})
    return Failure(
        kind=str(said.get("Code", "unknown")),
        message=str(said.get("Message", "")),
        status=int(meta.get("HTTPStatusCode", 0)),
        request_id=meta.get("RequestId") or headers.get("x-amz-request-id"),
        skew_s=_skew_s(headers.get("date")),
    )


def request_errors() -> tuple[type[Exception], ...]:
    """What botocore raises on a refusal, or when there is no whole answer that matches its checksum."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    return (
        exceptions.ClientError,
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.FlexibleChecksumError,
        ResponseParserError,
        ChecksumError,
    )


def pauses(max_attempts: int, max_retry_s: float, clock: Callable[[], float] = time.monotonic) -> Iterator[float]:
    """Seconds to wait before each further try: anything up to 0.2, 0.4, 0.8, … 20 s ("full jitter").

    That spreads many workers, throttled at one moment, best: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    start = clock()
    for attempt in range(max_attempts - 1):
        pause = _random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt))
        if clock() - start + pause > max_retry_s:
            return
        yield pause


def _skew_s(date: str | None) -> float | None:
    try:
        return (parsedate_to_datetime(date) - datetime.now(timezone.utc)).total_seconds() if date else None
    except (TypeError, ValueError):
        return None
