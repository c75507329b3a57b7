"""The first level of a store: what lies in folders can then be listed at once, folder by folder."""

from __future__ import annotations

import os
from typing import Any

from fourmill.pipeline.store.base import ObjectInfo, Store
from fourmill.pipeline.store.leftovers import WAITING
from fourmill.pipeline.store.local import LocalStore
from fourmill.pipeline.store.s3 import S3Store


def top_level(store: Store) -> tuple[list[str], list[ObjectInfo]]:
    """Folders by name with their slash, sorted, and the objects that lie in none."""
    if isinstance(store, LocalStore):
        return _of_folder(store)
    assert isinstance(store, S3Store), f"no kind of store: {store!r}"
    return _of_bucket(store)


def _of_folder(store: LocalStore) -> tuple[list[str], list[ObjectInfo]]:
    with os.scandir(store.root) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    folders = [f"{e.name}/" for e in found if e.is_dir(follow_symlinks=False) and e.name != WAITING]
    objects = [store.head(e.name) for e in found if e.is_file()]
    return folders, [info for info in objects if info is not None]


def _of_bucket(store: S3Store) -> tuple[list[str], list[ObjectInfo]]:
    start = store._start
    folders: list[str] = []
    objects: list[ObjectInfo] = []
    arguments: dict[str, Any] = {"Prefix": start, "Delimiter": "/"}
    while True:
        page = store._requests.call("list_objects_v2", start, **arguments)
        folders += [common["Prefix"][len(start) :] for common in page.get("CommonPrefixes", ())]
        for found in page.get("Contents", ()):
            name = found["Key"][len(start) :]
            if name:  # a console's marker of the folder itself
                objects.append(ObjectInfo(name, found["Size"], found["LastModified"].timestamp()))
        if not page.get("IsTruncated"):
            return sorted(folders), objects
        arguments["ContinuationToken"] = page["NextContinuationToken"]
