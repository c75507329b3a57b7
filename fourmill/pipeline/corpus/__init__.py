"""Raw corpora, read lazily and in one fixed order, whatever their layout and wherever they lie.

A reader turns a layout (tars, folders, parquet, COCO) into `Sample`s. Invariants: the same objects give the same
samples in the same order; every sample has a key of its own that is safe as a relative path; what cannot be read is
a sample with a problem, a line in `damage` or a count in `ignored`, never silence. Nothing is written to disk.
"""

from __future__ import annotations

import fnmatch
import importlib
import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from fourmill.modalities import unknown
from fourmill.pipeline.corpus.values import KeyRegister, printable
from fourmill.pipeline.images import MAX_BYTES
from fourmill.pipeline.store import ObjectInfo, Store, open_store

# In the order of preference where a sample has several. The last four cannot be decoded here: they become
# quarantined rows, since an ignored file would be a lost sample.
# fmt: off
IMAGE_SUFFIXES = (
    "jpg", "jpeg", "png", "webp", "gif", "tif", "tiff", "bmp", "jpe", "jfif", "jp2", "j2k", "j2c", "jpx",
    "ppm", "pgm", "pbm", "pnm", "mpo", "avif", "heic", "heif", "jxl",
)
# fmt: on
_GLOB = ("*", "?", "[")
_FORMATS = {
    "webdataset": "fourmill.pipeline.corpus.webdataset:WebDatasetCorpus",
    "folder": "fourmill.pipeline.corpus.folder:FolderCorpus",
    "parquet": "fourmill.pipeline.corpus.parquet:ParquetCorpus",
    "coco": "fourmill.pipeline.corpus.coco:CocoCorpus",
}
FORMATS = tuple(_FORMATS)


@dataclass(frozen=True)
class Sample:
    """One raw sample.

    `image`: the file's bytes, empty where there are none. `origin`: where in the corpus it stood, relative to the
    corpus. `original_key`: the corpus's own key where it had to be changed. `problems`: why `rgb`, `alt_text` or the
    metadata (`source`) could not be read; each begins with a short kind and a colon.
    """

    key: str
    image: bytes
    text: str | None
    metadata: dict[str, Any]
    origin: str
    original_key: str | None = None
    problems: Mapping[str, str] = field(default_factory=dict)


class Corpus(ABC):
    """One corpus in one format. Iterating reads it from its start; `damage` and `ignored` tell of the last pass."""

    format: ClassVar[str]

    def __init__(
        self,
        src: str,
        store: Store,
        objects: Sequence[ObjectInfo],
        text_field: str | None = None,
        image_field: str | None = None,
    ) -> None:
        self.src, self.store, self.text_field, self.image_field = src, store, text_field, image_field
        self.objects = [o for o in objects if not is_hidden(o.name)]
        self.damage: list[str] = []
        """What is broken, with its place: a stretch of a tar, a row group."""
        self.ignored: Counter[str] = Counter()
        """What was passed over because it is no part of an image-text sample, by suffix or kind."""

    def __iter__(self) -> Iterator[Sample]:
        self.damage.clear()
        self.ignored.clear()
        register = KeyRegister()
        for sample in self._read():
            key = register.claim(sample.key)
            yield sample if key == sample.key else replace(sample, key=key, original_key=sample.key)

    @abstractmethod
    def _read(self) -> Iterator[Sample]:
        """The samples in order, with the corpus's own keys."""


def open_corpus(
    src: str, format: str | None = None, text_field: str | None = None, image_field: str | None = None
) -> Corpus:
    """The corpus at a path, a glob without braces, or the same under s3://; its format is found out unless given.

    `text_field`, `image_field`: the member, column or JSON field to use instead of the usual ones. ValueError says
    what was looked for and where.
    """
    store, objects = locate(src)
    name = format or _detect(src, objects)
    if name not in _FORMATS:
        raise ValueError(unknown("corpus format", name, list(_FORMATS)))
    module, _, attribute = _FORMATS[name].partition(":")
    reader: Callable[..., Corpus] = getattr(importlib.import_module(module), attribute)
    return reader(src, store, objects, text_field, image_field)


def detect_format(src: str) -> str:
    """The format of the corpus at `src`, from the names of its objects. ValueError if it has none of the layouts."""
    return _detect(src, locate(src)[1])


def _detect(src: str, objects: Sequence[ObjectInfo]) -> str:
    names = [o.name for o in objects if not is_hidden(o.name)]
    kinds = Counter(suffix_of(name) for name in names)
    if kinds["tar"]:
        return "webdataset"
    if (any(is_coco(name) for name in names) and not _all_sidecars(names)) or (len(names) == 1 and kinds["json"]):
        return "coco"
    if any(kinds[suffix] for suffix in IMAGE_SUFFIXES):
        return "folder"
    if kinds["parquet"]:
        return "parquet"
    if any(name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2")) for name in names):
        raise ValueError(f"{src!r} holds compressed tars, in which nothing can be found by offset: unpack them to .tar")
    looked = ".tar, captions_*.json, .parquet, or images (" + ", ".join(IMAGE_SUFFIXES[:8]) + ", …)"
    found = ", ".join(repr(n) for n in names[:5]) or "only hidden files"
    raise ValueError(f"cannot tell the corpus format of {src!r}: looked for {looked}; it holds {found}")


def is_coco(name: str) -> bool:
    """Whether this is what COCO calls its caption files."""
    return fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], "captions_*.json")


def _all_sidecars(names: Sequence[str]) -> bool:
    """Whether each captions_*.json merely stands beside a captions_*.jpg."""
    pictures = {stem_of(n) for n in names if suffix_of(n) in IMAGE_SUFFIXES}
    return all(stem_of(n) in pictures for n in names if is_coco(n))


def locate(src: str) -> tuple[Store, list[ObjectInfo]]:
    """The store that holds `src` and its objects, sorted by name: of a folder, a single file, or a glob."""
    found = _single(src) or (_matching(src) if any(c in src for c in _GLOB) and not _exists(src) else None)
    if found is None:
        store = open_store(src)
        found = store, list(store.list())
    if not found[1]:
        brace = "; braces are not expanded, use * or a folder" if "{" in src else ""
        state = "is an empty folder" if _exists(src) else "matches nothing" if _GLOB[0] in src else "does not exist"
        raise ValueError(f"no corpus at {src!r}: it {state}{brace}")
    return found


def _exists(src: str) -> bool:
    return "://" not in src and Path(src).expanduser().exists()


def _single(src: str) -> tuple[Store, list[ObjectInfo]] | None:
    if "://" not in src:
        path = Path(src).expanduser().absolute()
        return (open_store(path.parent), [ObjectInfo(path.name, path.stat().st_size)]) if path.is_file() else None
    parent, _, leaf = src.rstrip("/").rpartition("/")
    if parent.endswith(":/") or not leaf:  # a bucket
        return None
    store = open_store(parent)
    info = store.head(leaf)
    return (store, [info]) if info else None


def _matching(pattern: str) -> tuple[Store, list[ObjectInfo]]:
    """Objects below the last folder that is spelled out, matched part by part: `*` does not cross a `/`."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if any(c in part for c in _GLOB))
    root = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")
    if "://" in pattern and first < 3:
        raise ValueError(f"bad pattern {pattern!r}: the bucket must be spelled out")
    store, wanted = open_store(root), parts[first:]
    return store, [o for o in store.list() if _matches(o.name.split("/"), wanted)]


def _matches(name: Sequence[str], wanted: Sequence[str]) -> bool:
    return len(name) == len(wanted) and all(map(fnmatch.fnmatchcase, name, wanted))


def is_hidden(name: str) -> bool:
    """Dot files and folders, and what macOS adds to archives."""
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in name.split("/"))


def suffix_of(name: str) -> str:
    """'jpg' of 'a/b.JPG'; '' if it has none."""
    leaf = name.rsplit("/", 1)[-1]
    return leaf.rpartition(".")[2].lower() if "." in leaf else ""


def stem_of(name: str) -> str:
    """'a/b.c' of 'a/b.c.jpg'."""
    suffix = suffix_of(name)
    return name[: -len(suffix) - 1] if suffix else name


class RangeFile(io.RawIOBase):
    """A remote object as a seekable file, read by ranges; wrap it in `io.BufferedReader`."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        super().__init__()
        self._store, self._info, self._at = store, info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._info.num_bytes}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), max(0, self._info.num_bytes - self._at))
        data = self._store.get_range(self._info.name, self._at, length) if length else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_binary(store: Store, info: ObjectInfo) -> BinaryIO:
    """A seekable file over one object: the local file itself, or ranges of 4 MiB."""
    path = store.local_path(info.name)
    if path is not None:
        return path.open("rb")
    return io.BufferedReader(RangeFile(store, info), buffer_size=4 << 20)


def fetch(store: Store, info: ObjectInfo, limit: int = MAX_BYTES) -> tuple[bytes, str | None]:
    """An object's bytes, or none and the reason. A `StoreError` passes: an outage must not look like bad data."""
    if info.num_bytes > limit:
        return b"", f"too large: {info.num_bytes} bytes, at most {limit} are read"
    try:
        return store.get(info.name), None
    except (OSError, ValueError) as error:
        return b"", f"unreadable: {printable(str(error))}"
