"""What processes that died left behind: half-written files in a folder's waiting room, uploads in parts that nobody
finished, objects that only tried a bucket out.

They are in no listing and harm no reader, but take space; a bucket's bill counts their parts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fourmill.pipeline.store import listing
from fourmill.pipeline.store.base import ObjectInfo, Store, StoreError
from fourmill.pipeline.store.conditional import PROBE_FOLDER
from fourmill.pipeline.store.local import LocalStore
from fourmill.pipeline.store.requests import BucketRequests
from fourmill.pipeline.store.s3 import S3Store

WAITING = ".fourmill-tmp"  # of a local store (local.py)


@dataclass(frozen=True)
class Leftover:
    """Something that nobody needs once its writer is gone. Unfinished uploads count as 0 bytes: their parts are not
    asked for one by one."""

    info: ObjectInfo
    remove: Callable[[], Any]


def leftovers(store: Store) -> Iterator[Leftover]:
    """All that there is, that of writers which are still at it too: `info.modified` tells its age."""
    if isinstance(store, LocalStore):
        yield from _files(store)
    elif isinstance(store, S3Store):
        yield from _uploads(store)
        yield from _probes(store)


def _files(store: LocalStore) -> Iterator[Leftover]:
    waiting = store.root / WAITING
    for path in sorted(waiting.iterdir()) if waiting.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # its writer is done by now
            stat = path.stat()
            info = ObjectInfo(f"{WAITING}/{path.name}", stat.st_size, stat.st_mtime)
            yield Leftover(info, functools.partial(path.unlink, missing_ok=True))


def _uploads(store: S3Store) -> Iterator[Leftover]:
    requests, start = store._requests, store._start
    for upload in _listed(requests, start):
        if upload["Key"].startswith(start):
            info = ObjectInfo(upload["Key"][len(start) :], 0, upload["Initiated"].timestamp())
            yield Leftover(info, functools.partial(_abort, requests, upload["Key"], upload["UploadId"]))


def _probes(store: S3Store) -> Iterator[Leftover]:
    """Throw-away objects of the race that finds out about conditional writes."""
    requests, start = store._requests, store._start
    for page in listing.pages(requests, f"{start}{PROBE_FOLDER}/"):
        for found in page:
            info = ObjectInfo(found.name[len(start) :], found.num_bytes, found.modified)
            yield Leftover(info, functools.partial(requests.call, "delete_object", found.name))


def _listed(requests: BucketRequests, prefix: str) -> Iterator[dict[str, Any]]:
    arguments: dict[str, Any] = {"Prefix": prefix}
    while True:
        page = requests.call("list_multipart_uploads", prefix, **arguments)
        yield from page.get("Uploads", ())
        if not page.get("IsTruncated"):
            return
        markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        arguments = {"Prefix": prefix, **markers}


def _abort(requests: BucketRequests, key: str, upload_id: str) -> None:
    try:
        requests.call("abort_multipart_upload", key, UploadId=upload_id)
    except FileNotFoundError:  # finished or given up by now
        pass
    except StoreError as error:
        if error.kind != "NoSuchUpload":
            raise
