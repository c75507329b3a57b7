"""One object, whole, with its checksum, in one PUT or in parts: conditional on its name being free.

Each attempt writes a random id into the object's metadata (not its bytes). If an answer was lost and the next try
hears that the name is taken, the id tells whose object is there. The whole object's CRC-32 stands in the metadata
too, so that a reader can check what it got from any store, however it was cut into parts.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import secrets
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fourmill.pipeline.store.base import StoreError
from fourmill.pipeline.store.requests import BucketRequests
from fourmill.pipeline.store.retries import TakenError

log = logging.getLogger(__name__)
PARTS_AT_ONCE = 8
CONFLICT = "ConditionalRequestConflict"  # of an upload in parts: all its parts have to be sent again
SINGLE_PUT_BYTES = 5 << 30  # S3's limit
_MOST_PARTS = 10_000  # S3's limit
_ATTEMPT, CRC32 = "fourmill-attempt", "fourmill-crc32"


@dataclass(frozen=True)
class Upload:
    """An attempt to create `key`. `conditional`: only if the name is free, by the store's own judgement.

    `ready` is called when nothing is left to do but the request that publishes: so races can be begun on the line.
    """

    requests: BucketRequests
    key: str
    data: bytes
    conditional: bool = True
    before_retry: Callable[[], None] | None = None
    ready: Callable[[], object] | None = None
    attempt: str = field(default_factory=lambda: secrets.token_hex(8))

    def whole(self) -> bool:
        """By a single PUT. False if the name is somebody else's."""
        if self.ready:
            self.ready()
        try:
            self.requests.call(
                "put_object",
                self.key,
                before_retry=self.before_retry,
                Body=self.data,
                ChecksumCRC32=crc32(self.data),
                Metadata=self._metadata(),
                **self._condition(),
            )
        except TakenError as taken:
            return taken.unclear and self.is_ours()
        self.requests.counters.add(bytes_written=len(self.data))
        return True

    def in_parts(self) -> bool:
        """By a multipart upload, of which nothing is to be seen until it is complete. False as of `whole`."""
        upload_id = self.requests.call(
            "create_multipart_upload",
            self.key,
            ChecksumAlgorithm="CRC32",
            ChecksumType="FULL_OBJECT",
            Metadata=self._metadata(),
        )["UploadId"]
        try:
            parts = self._send_parts(upload_id)
            if self.ready:
                self.ready()
            self._complete(upload_id, parts)
        except TakenError as taken:
            self._abort(upload_id)
            return taken.unclear and self.is_ours()
        except BaseException as error:
            self._abort(upload_id)
            # A complete upload is forgotten: the try that completed it had no answer.
            if isinstance(error, StoreError) and error.kind == "NoSuchUpload" and self.is_ours():
                return True
            raise
        return True

    def is_ours(self) -> bool:
        """Whether the object that is there is the one that this attempt wrote."""
        try:
            found = self.requests.call("head_object", self.key)
        except FileNotFoundError:  # deleted since
            return False
        return bool(found.get("Metadata", {}).get(_ATTEMPT) == self.attempt)

    def _metadata(self) -> dict[str, str]:
        return {_ATTEMPT: self.attempt, CRC32: crc32(self.data)}

    def _condition(self) -> dict[str, Any]:
        return {"IfNoneMatch": "*"} if self.conditional else {}

    def _send_parts(self, upload_id: str) -> list[dict[str, Any]]:
        size = max(self.requests.settings.part_bytes, -(-len(self.data) // _MOST_PARTS))
        starts = range(0, len(self.data), size) or range(1)  # an empty object has one empty part
        view = memoryview(self.data)

        def send(number: int, start: int) -> dict[str, Any]:
            part = bytes(view[start : start + size])
            sent: dict[str, Any] = {"PartNumber": number, "ChecksumCRC32": crc32(part)}
            answer = self.requests.call("upload_part", self.key, UploadId=upload_id, Body=part, **sent)
            self.requests.counters.add(bytes_written=len(part))
            return {**sent, "ETag": answer["ETag"]}

        with ThreadPoolExecutor(min(PARTS_AT_ONCE, len(starts))) as pool:
            try:
                return list(pool.map(send, range(1, len(starts) + 1), starts))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # waits for parts under way: they would outlive an abort
                raise

    def _complete(self, upload_id: str, parts: list[dict[str, Any]]) -> None:
        self.requests.call(
            "complete_multipart_upload",
            self.key,
            before_retry=self.before_retry,
            final=[CONFLICT],
            UploadId=upload_id,
            MultipartUpload={"Parts": parts},
            ChecksumCRC32=crc32(self.data),
            ChecksumType="FULL_OBJECT",
            **self._condition(),
        )

    def _abort(self, upload_id: str) -> None:
        """Give the parts' space back. If that fails too, the bucket's lifecycle rule has to."""
        try:
            with contextlib.suppress(FileNotFoundError):
                self.requests.call("abort_multipart_upload", self.key, UploadId=upload_id)
        except StoreError as error:
            if error.kind != "NoSuchUpload":
                log.warning("parts of an upload stay behind, unseen but stored: %s", error)


def crc32(data: bytes) -> str:
    """As S3 writes it: base64 of the four bytes, big end first."""
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
