"""Where objects live: a local folder or an S3 bucket behind one small interface.

The one promise everything else rests on: `create` publishes a whole object or nothing, and of two writers of one
name exactly one wins and is told so. There is no overwrite. Retries for transient storage errors live here and
nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

_TEMPORARY = ".fourmill-tmp"  # half-written files wait here, on the same file system as their final name
_BODY_TRIES = 5  # with pauses of 0.1, 0.2, 0.4, ... s


class StoreError(RuntimeError):
    """A storage operation that failed for good; the message names the object and the service's own words."""


class _RangeError(StoreError):
    """The range begins behind the object's end."""


@dataclass(frozen=True)
class ObjectInfo:
    """Name below the store's root, and size in bytes."""

    name: str
    num_bytes: int


class Store(Protocol):
    """Named immutable objects below one root URI. Names are relative POSIX paths."""

    uri: str

    def create(self, name: str, data: bytes) -> bool:
        """Publish `data` whole under `name`. False, and nothing changed, if the name is taken."""

    def get(self, name: str) -> bytes:
        """The object's bytes; FileNotFoundError names it if it is not there."""

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from offset `start`, fewer at the object's end."""

    def head(self, name: str) -> ObjectInfo | None:
        """Its size, or None if it is not there."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose name starts with `prefix`, sorted by name."""

    def delete(self, name: str) -> None:
        """Remove it; no error if it is gone already."""

    def local_path(self, name: str) -> Path | None:
        """A file that can be memory-mapped, or None where objects are not files."""


def open_store(uri: str | Path) -> Store:
    """The store at a local path, a `file://` URI or an `s3://bucket/prefix` URI."""
    text = str(uri)
    if text.startswith("s3://"):
        return S3Store(text)
    if text.startswith("file://"):
        text = urlsplit(text).path
    elif "://" in text:
        raise ValueError(f"unknown kind of store {text!r}: give a path, file:// or s3://bucket/prefix")
    return LocalStore(text)


def join_uri(uri: str, *parts: str) -> str:
    """`uri` with path parts appended, for paths and s3:// alike."""
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def _checked(name: str) -> str:
    """`name` if it stays below the root; names can come from manifests written by strangers."""
    parts = name.split("/")
    if not name or "\0" in name or "\\" in name or any(p in ("", ".", "..") for p in parts):
        raise ValueError(f"bad object name {name!r}: a relative path without '.', '..' or empty parts is needed")
    return name


def _checked_prefix(prefix: str) -> str:
    """`prefix` if everything below it is below the root; its last part may be the beginning of a name."""
    if prefix.startswith("/") or any(part in (".", "..") for part in prefix.split("/")):
        raise ValueError(f"bad prefix {prefix!r}: the beginning of a relative path is needed, without '.' or '..'")
    return prefix


class LocalStore:
    """Objects as files below a folder; created by hard link, which fails if the name exists."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.uri = str(self.root)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (self.uri,)

    def _path(self, name: str) -> Path:
        return self.root / _checked(name)

    def create(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        if path.exists():
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        waiting = self.root / _TEMPORARY
        waiting.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=waiting)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the object from other users of the dataset
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            raise StoreError(f"cannot create {path}: {error}") from error
        finally:
            os.unlink(temporary)
        _sync_folder(path.parent)
        return True

    def get(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def get_range(self, name: str, start: int, length: int) -> bytes:
        with self._path(name).open("rb") as file:
            file.seek(start)
            return file.read(max(length, 0))

    def head(self, name: str) -> ObjectInfo | None:
        path = self._path(name)
        return ObjectInfo(name, path.stat().st_size) if path.is_file() else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = _checked_prefix(prefix).rpartition("/")[0]
        names = []
        for parent, folders, files in os.walk(self.root / start):
            folders[:] = [f for f in folders if f != _TEMPORARY]
            names += [Path(parent, f).relative_to(self.root).as_posix() for f in files]
        # By the whole name, as S3 sorts: 'a-b/x' comes before 'a/x'.
        for name in sorted(n for n in names if n.startswith(prefix)):
            with contextlib.suppress(FileNotFoundError):  # deleted since, or a link to nowhere
                yield ObjectInfo(name, (self.root / name).stat().st_size)

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def local_path(self, name: str) -> Path | None:
        return self._path(name)


def _sync_folder(folder: Path) -> None:
    """Make a new directory entry survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class S3Store:
    """Objects in a bucket; created by a conditional PUT (`If-None-Match: *`).

    Endpoint, region, profile and credentials come from boto3's own chain (AWS_ENDPOINT_URL_S3, AWS_REGION,
    AWS_PROFILE, instance roles, ...), so nothing secret passes through our configuration or into a record.
    """

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        if not parts.netloc:
            raise ValueError(f"bad S3 URI {uri!r}: s3://bucket/prefix is needed")
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        self.uri = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self._client: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.uri,)  # a client is neither picklable nor safe to share over a fork

    @property
    def client(self) -> Any:
        if self._client is None:
            import boto3
            from botocore.config import Config

            # 'standard' retries throttling, 5xx, resets and timeouts with jittered backoff of at most 20 s.
            retries: Any = {"mode": "standard", "total_max_attempts": 8}
            self._client = boto3.client("s3", config=Config(retries=retries, max_pool_connections=32))
        return self._client

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{_checked(name)}" if self.prefix else _checked(name)

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._call("put_object", name, Body=data, IfNoneMatch="*", ChecksumAlgorithm="CRC32")
        except FileExistsError:
            return False
        return True

    def get(self, name: str) -> bytes:
        return self._body(name)

    def get_range(self, name: str, start: int, length: int) -> bytes:
        if length <= 0:
            return b""
        try:
            return self._body(name, Range=f"bytes={start}-{start + length - 1}")
        except _RangeError:
            return b""

    def head(self, name: str) -> ObjectInfo | None:
        try:
            return ObjectInfo(name, self._call("head_object", name)["ContentLength"])
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = f"{self.prefix}/" if self.prefix else ""
        whole = start + _checked_prefix(prefix)
        items = []
        with _said_plainly(f"list s3://{self.bucket}/{whole}"):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=whole):
                items += [ObjectInfo(item["Key"][len(start) :], item["Size"]) for item in page.get("Contents", ())]
        # AWS sorts by the bytes of the key, but S3 Express does not sort, and SeaweedFS sorts 'a/x' before 'a-b/x'.
        yield from sorted(items, key=lambda info: info.name)

    def delete(self, name: str) -> None:
        self._call("delete_object", name)

    def local_path(self, name: str) -> Path | None:
        return None

    def _body(self, name: str, **arguments: Any) -> bytes:
        """An object's bytes. botocore retries up to the headers; a body that breaks off is asked for again here."""
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        for attempt in range(_BODY_TRIES):
            try:
                return bytes(self._call("get_object", name, **arguments)["Body"].read())
            except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError) as error:
                last = error
                time.sleep(0.1 * 2**attempt)
        where = f"get_object s3://{self.bucket}/{self._key(name)}"
        raise StoreError(f"{where}: the body broke off {_BODY_TRIES} times: {last}") from last

    def _call(self, operation: str, name: str, **arguments: Any) -> Any:
        """One S3 request; the service's refusal becomes FileExistsError, FileNotFoundError or StoreError."""
        from botocore.exceptions import ClientError

        where = f"{operation} s3://{self.bucket}/{self._key(name)}"
        with _said_plainly(where):
            # 409: another conditional PUT of this key is under way; S3 asks for the request to be sent again.
            for _ in range(5):
                try:
                    return getattr(self.client, operation)(Bucket=self.bucket, Key=self._key(name), **arguments)
                except ClientError as error:
                    if _code(error) not in ("409", "ConditionalRequestConflict"):
                        raise
        raise StoreError(f"{where}: still in conflict after 5 tries")


@contextlib.contextmanager
def _said_plainly(where: str) -> Iterator[None]:
    """botocore's errors as FileExistsError, FileNotFoundError, or a StoreError that says what failed."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        if _code(error) in ("412", "PreconditionFailed"):
            raise FileExistsError(where) from error
        if _code(error) in ("404", "NoSuchKey"):
            raise FileNotFoundError(where) from error
        if _code(error) in ("416", "InvalidRange"):
            raise _RangeError(where) from error
        request = error.response.get("ResponseMetadata", {}).get("RequestId", "unknown")
        raise StoreError(f"{where} failed: {error} (request id {request})") from error
    except BotoCoreError as error:
        raise StoreError(f"{where} failed: {error}") from error


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
