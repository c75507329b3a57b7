"""Many objects of a bucket at once: listings in order of name without holding them, and sizes of given names.

AWS lists in order of the key's bytes, which is the order that `list` promises. SeaweedFS walks folders, so it lists
'a/x' before 'a-b/x', and what it lists needs holding back a little; S3 Express lists in no order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fourmill.pipeline.store.base import ObjectInfo, StoreError
from fourmill.pipeline.store.requests import BucketRequests

_HEADS_AT_ONCE = 16
_LISTED_FROM = 32  # names in one folder below which as many HEADs are sooner done
_NAMES_A_PAGE = 50  # a page of 1,000 takes as long as 50 HEADs, 16 at once: list where a page holds more wanted names


def pages(requests: BucketRequests, prefix: str, **first: Any) -> Iterator[list[ObjectInfo]]:
    """The objects whose keys start with `prefix`, as the store orders them, a thousand at a time."""
    arguments = {"Prefix": prefix, **first}
    while True:
        page = requests.call("list_objects_v2", prefix, **arguments)
        yield [ObjectInfo(o["Key"], o["Size"], o["LastModified"].timestamp()) for o in page.get("Contents", ())]
        if not page.get("IsTruncated"):
            return
        arguments = {"Prefix": prefix, "ContinuationToken": page["NextContinuationToken"]}


def sorted_keys(requests: BucketRequests, prefix: str) -> Iterator[ObjectInfo]:
    """As `pages`, sorted by key and streamed, unless the store lists in no order."""
    found = (info for page in pages(requests, prefix) for info in page)
    if _unsorted(requests):
        yield from sorted(found, key=lambda info: info.name)
        return
    last = ""
    aws = "amazonaws.com" in requests.endpoint
    for info in found if aws else in_order(found, prefix.rpartition("/")[0]):
        if info.name < last:
            raise StoreError(
                f"s3://{requests.bucket} lists {info.name} after {last}, in no order: set storage.listing (or "
                "FOURMILL_S3_LISTING) to 'unsorted'"
            )
        last = info.name
        yield info


def in_order(infos: Iterable[ObjectInfo], folder: str) -> Iterator[ObjectInfo]:
    """A listing below `folder`, by whole key or folder by folder, as one sorted by whole key.

    The two orders differ only between a folder `a/` and siblings such as `a-b`, whose next character sorts before the
    slash. So what begins with the folder's name and such a character is held together and sorted; a folder of plain
    objects, such as a modality's shards, is held not at all.
    """
    skipped, opened = len(folder) + bool(folder), ""
    held: list[ObjectInfo] = []
    for info in infos:
        part, slash, _ = info.name[skipped:].partition("/")
        follows = part.startswith(opened) and part[len(opened) : len(opened) + 1] < "/"
        if held and not (opened and follows):
            yield from sorted(held, key=lambda one: one.name)
            held = []
        if not held:
            opened = part if slash else ""
        held.append(info)
    yield from sorted(held, key=lambda one: one.name)


def sizes(requests: BucketRequests, keys: Sequence[str]) -> list[int | None]:
    """Of each key: from a listing of the stretch where many wanted keys lie close together, else from a HEAD."""
    found: dict[str, int | None] = {}
    folders: dict[str, list[str]] = {}
    for key in keys:
        folders.setdefault(key.rpartition("/")[0], []).append(key)
    for wanted in folders.values():
        if len(wanted) >= _LISTED_FROM:
            found.update(_listed_sizes(requests, wanted))
    rest = list(dict.fromkeys(key for key in keys if key not in found))
    if rest:
        with ThreadPoolExecutor(min(_HEADS_AT_ONCE, len(rest))) as pool:
            found.update(zip(rest, pool.map(lambda key: size(requests, key), rest), strict=True))
    return [found[key] for key in keys]


def size(requests: BucketRequests, key: str) -> int | None:
    """Of one object, None if it is not there."""
    try:
        return int(requests.call("head_object", key)["ContentLength"])
    except FileNotFoundError:
        return None


def _listed_sizes(requests: BucketRequests, keys: list[str]) -> dict[str, int | None]:
    """The sizes that a listing of few enough pages tells; a key is missing if the listing did not come that far."""
    missing, first, last = set(keys), min(keys), max(keys)
    found: dict[str, int | None] = {}
    # The longest proper beginning of the first key sorts right before it. S3 Express knows no StartAfter.
    start = {} if _unsorted(requests) else {"StartAfter": first[:-1]}
    most = max(2, len(keys) // _NAMES_A_PAGE)
    for number, page in enumerate(pages(requests, _common(first, last), **start), 1):
        here = {info.name: info.num_bytes for info in page if info.name in missing}
        found.update(here)
        missing -= here.keys()
        if not missing or number == most or (page and page[-1].name > last and not _unsorted(requests)):
            return found
    return {**found, **dict.fromkeys(missing)}  # the listing went to its end: they are not there


def _common(one: str, other: str) -> str:
    """What two strings begin with, and so do all that sort between them."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _unsorted(requests: BucketRequests) -> bool:
    directory_bucket = requests.bucket.endswith("--x-s3")  # S3 Express
    return directory_bucket or requests.settings.listing == "unsorted"
