"""What every store promises, and the words that its implementations share.

The one promise everything else rests on: `create` publishes a whole object or nothing, and of two writers of one
name exactly one wins and is told so. There is no overwrite.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

# Userinfo of a URL, and the parts of a presigned one that let somebody in.
_SECRETS = re.compile(r"(?<=://)[^/@\s'\"]+@|(?<=[?&])(X-Amz-[A-Za-z-]+|AWSAccessKeyId|Signature)=[^&\s'\"]+")


Sizes = list[int | None]  # in the classes below, `list` is a method


class StoreError(RuntimeError):
    """A storage operation that failed for good; the message names the object and the service's own words."""

    kind: str = ""
    """The service's code, such as AccessDenied, or the name of the exception."""


@dataclass(frozen=True)
class ObjectInfo:
    """Name below the store's root, size in bytes, and when it was written (Unix seconds by the store's clock)."""

    name: str
    num_bytes: int
    modified: float = field(default=0.0, compare=False)


class Counters:
    """What a store has done in this process, so that retries do not stay silent. Safe to use from threads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, requests: int = 0, bytes_read: int = 0, bytes_written: int = 0) -> None:
        with self._lock:
            self._counts.update(requests=requests, bytes_read=bytes_read, bytes_written=bytes_written)

    def add_retry(self, kind: str) -> bool:
        """Count one; True if it is the first of its kind."""
        with self._lock:
            self._kinds[kind] += 1
            return self._kinds[kind] == 1

    def as_dict(self) -> dict[str, Any]:
        """requests, retries, bytes_read, bytes_written, and the retries by kind, as JSON."""
        with self._lock:
            counts = {name: self._counts[name] for name in ("requests", "bytes_read", "bytes_written")}
            return {**counts, "retries": self._kinds.total(), "retries_by_kind": dict(sorted(self._kinds.items()))}


class Store(Protocol):
    """Named immutable objects below one root URI. Names are relative POSIX paths. Pickles; safe to use from threads."""

    uri: str
    counters: Counters

    def create(self, name: str, data: bytes) -> bool:
        """Publish `data` whole under `name`. False, and nothing changed, if the name is taken."""

    def get(self, name: str) -> bytes:
        """The object's bytes; FileNotFoundError names it if it is not there."""

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from offset `start`, fewer at the object's end."""

    def head(self, name: str) -> ObjectInfo | None:
        """Its size and age, or None if it is not there."""

    def sizes(self, names: Sequence[str]) -> Sizes:
        """The sizes of many objects, None for those that are not there, in fewer round trips than as many `head`."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose name starts with `prefix`, sorted by name, streamed."""

    def names(self, prefix: str = "") -> Iterator[str]:
        """As `list`, where the names are enough: a folder then looks at no file."""

    def delete(self, name: str) -> None:
        """Remove it; no error if it is gone already."""

    def local_path(self, name: str) -> Path | None:
        """A file that can be memory-mapped, or None where objects are not files."""


def checked(name: str) -> str:
    """`name` if it stays below the root; names can come from manifests written by strangers."""
    parts = name.split("/")
    if not name or "\0" in name or "\\" in name or any(p in ("", ".", "..") for p in parts):
        raise ValueError(f"bad object name {name!r}: a relative path without '.', '..' or empty parts is needed")
    return name


def checked_prefix(prefix: str) -> str:
    """`prefix` if everything below it is below the root; its last part may be the beginning of a name."""
    if prefix.startswith("/") or any(part in (".", "..") for part in prefix.split("/")):
        raise ValueError(f"bad prefix {prefix!r}: the beginning of a relative path is needed, without '.' or '..'")
    return prefix


def redacted(text: str) -> str:
    """`text` without the credentials that a URL in it may hold."""
    return _SECRETS.sub(lambda match: f"{match[1]}=***" if match[1] else "***@", text)
