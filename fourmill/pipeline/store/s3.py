"""Objects in an S3 bucket, or in one of the many stores that speak S3.

What is written carries a CRC-32 that the store checks; what is read whole is checked against it again, on every store
and however the object was cut into parts. A range cannot be checked so: its reader has the shard's digest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fourmill.pipeline.store import conditional, listing
from fourmill.pipeline.store.base import Counters, ObjectInfo, Sizes, StoreError, checked, checked_prefix, redacted
from fourmill.pipeline.store.requests import BucketRequests
from fourmill.pipeline.store.retries import ChecksumError, RangeError
from fourmill.pipeline.store.settings import StoreSettings
from fourmill.pipeline.store.upload import CRC32, PARTS_AT_ONCE, crc32

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


class S3Store:
    """A prefix of a bucket. Created by conditional PUT, single or in parts; see `conditional` for stores without."""

    def __init__(self, uri: str, settings: StoreSettings | None = None) -> None:
        self.bucket, self.prefix = _bucket_and_prefix(uri)
        self.uri = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self.settings = settings or StoreSettings()
        self.counters = Counters()
        self._requests = BucketRequests(self.bucket, self.settings, self.counters)
        self._start = f"{self.prefix}/" if self.prefix else ""

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.uri, self.settings)

    def settle(self) -> StoreSettings:
        """Find out now what `conditional_writes` is; workers that are given these settings need not."""
        return conditional.settle(self._requests, self._start)

    def _key(self, name: str) -> str:
        return self._start + checked(name)

    def create(self, name: str, data: bytes) -> bool:
        return conditional.create(self._requests, self._start, self._key(name), data)

    def get(self, name: str) -> bytes:
        key = self._key(name)
        return bytes(self._requests.call("get_object", key, read=lambda response: self._whole(key, response)))

    def get_range(self, name: str, start: int, length: int) -> bytes:
        key = self._key(name)
        if length <= self.settings.multipart_threshold:
            return self._range(key, start, length)[0]
        try:
            return b"".join(self._ranges(key, start, start + length))
        except ChecksumError as error:
            raise StoreError(f"get_object s3://{self.bucket}/{key} failed: {error}") from None

    def head(self, name: str) -> ObjectInfo | None:
        try:
            found = self._requests.call("head_object", self._key(name))
        except FileNotFoundError:
            return None
        return ObjectInfo(name, found["ContentLength"], found["LastModified"].timestamp())

    def sizes(self, names: Sequence[str]) -> Sizes:
        return listing.sizes(self._requests, [self._key(name) for name in names])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for info in listing.sorted_keys(self._requests, self._start + checked_prefix(prefix)):
            name = info.name[len(self._start) :]
            if f"{conditional.PROBE_FOLDER}/" not in name and not name.endswith("/"):  # consoles make 'folder/' objects
                yield ObjectInfo(name, info.num_bytes, info.modified)

    def names(self, prefix: str = "") -> Iterator[str]:
        return (info.name for info in self.list(prefix))

    def delete(self, name: str) -> None:
        self._requests.call("delete_object", self._key(name))

    def local_path(self, name: str) -> Path | None:
        return None

    def _whole(self, key: str, response: Any) -> bytes:
        """The body of an answer to a GET. Of a large object only what is known, and then its parts, several at once."""
        length, body = response["ContentLength"], response["Body"]
        if length <= self.settings.multipart_threshold:
            data = body.read()
            self.counters.add(bytes_read=len(data))
        else:
            body.close()
            data = b"".join(self._ranges(key, 0, length))
        told = response.get("Metadata", {}).get(CRC32) or response.get("ChecksumCRC32", "-")
        if "-" not in told and told != crc32(data):  # 'CRC-3' is a checksum of three parts' checksums
            raise ChecksumError(f"stored with CRC-32 {told}, arrived with {crc32(data)}")
        return bytes(data)

    def _ranges(self, key: str, start: int, stop: int) -> Sequence[bytes]:
        """The object's bytes from `start` to `stop`, in pieces, several at once."""
        step = self.settings.part_bytes
        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            parts = list(pool.map(lambda at: self._range(key, at, min(step, stop - at)), range(start, stop, step)))
        if len({tag for data, tag in parts if data}) > 1:
            raise ChecksumError("the object was replaced while its parts were read")
        return [data for data, _ in parts]

    def _range(self, key: str, start: int, length: int) -> tuple[bytes, str]:
        """Bytes, and the object's entity tag."""
        if length <= 0:
            return b"", ""

        def read(response: Any) -> tuple[bytes, str]:
            return response["Body"].read(), str(response.get("ETag"))

        try:
            found: tuple[bytes, str] = self._requests.call(
                "get_object", key, read=read, Range=f"bytes={start}-{start + length - 1}"
            )
        except RangeError:
            return b"", ""
        self.counters.add(bytes_read=len(found[0]))
        return found


def _bucket_and_prefix(uri: str) -> tuple[str, str]:
    """Read by hand: to urlsplit '#' and '?' are not part of a path, in S3 they are characters of a key."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if "@" in bucket or redacted(uri) != uri:
        shown = redacted(uri)
        raise ValueError(f"{shown!r} holds credentials: give s3://bucket/prefix, and let AWS_* or a profile say who")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(f"bad S3 URI {uri!r}: s3://bucket/prefix is needed")
    return bucket, prefix.strip("/")
