"""Where objects live: a local folder or an S3 bucket behind one small interface.

`create` publishes a whole object or nothing, and of two writers of one name exactly one wins. Retries for transient
storage errors live here and nowhere else, and credentials nowhere at all.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from fourmill.pipeline.store.base import Counters, ObjectInfo, Store, StoreError, redacted
from fourmill.pipeline.store.local import LocalStore
from fourmill.pipeline.store.s3 import S3Store
from fourmill.pipeline.store.settings import StoreSettings

__all__ = [
    "Counters",
    "LocalStore",
    "ObjectInfo",
    "S3Store",
    "Store",
    "StoreError",
    "StoreSettings",
    "join_uri",
    "open_store",
]


def open_store(uri: str | Path, settings: StoreSettings | None = None) -> Store:
    """The store at a local path, a `file://` URI or an `s3://bucket/prefix` URI; `settings` matter to S3 only."""
    text = str(uri)
    if text.startswith("s3://"):
        return S3Store(text, settings)
    if text.startswith("file://"):
        text = urlsplit(text).path
    elif "://" in text:
        raise ValueError(f"unknown kind of store {redacted(text)!r}: give a path, file:// or s3://bucket/prefix")
    return LocalStore(text)


def join_uri(uri: str, *parts: str) -> str:
    """`uri` with path parts appended, for paths and s3:// alike."""
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])
