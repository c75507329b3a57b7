"""Shards of object storage as files in a local folder: bounded, least recently used first out, shared by processes.

A file is named by the SHA-256 that its content must have, and is compared with it whenever it is opened. It is written
beside (`*.part`, locked by whoever writes it) and renamed once it is whole and right; a `.part` without its writer, who
was killed, is removed by the next process that looks. Of several processes that want one file, one downloads it.

    <digest>.arrow      a whole shard object           <digest>.split    which samples are held out, see `splits`
    <digest>.part       being written                  .lock, .bytes     who may change the folder; bytes in it, at most
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from fourmill.model.config import ShardCacheConfig

log = logging.getLogger(__name__)
Ranges = Callable[[int, int], bytes]

_STEP = 16 << 20  # bytes of one range request
_PAUSE_S = 0.02  # between looks at a file that another process is writing
_TRIES = 3  # a file may be thrown out between its download and its opening, by a process that needs the room
_KEPT = 0.9  # share of the bound that is left when files must go: the folder is listed once in a tenth of it


class ShardCache:
    """A folder of at most `config.max_bytes`. Pickles; safe to use from threads and from processes of one node.

    ValueError if the folder belongs to somebody else.
    """

    def __init__(self, config: ShardCacheConfig) -> None:
        self.config = config
        self.folder = Path(config.folder or Path(tempfile.gettempdir()) / f"fourmill-cache-{os.getuid()}").absolute()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise ValueError(f"the cache folder {self.folder} belongs to another user: name one of your own")
        with self._locked():
            self._clean(config.max_bytes)

    def open(self, name: str, num_bytes: int, digest: str, ranges: Ranges) -> pa.Buffer:
        """The object with this digest as a memory map, downloaded if it is not there or not what it should be.

        `ranges(start, length)` reads from the store. ValueError if the store's own object differs from the digest.
        """
        path = self.folder / f"{digest}.arrow"
        for _ in range(_TRIES):
            self.fetch(name, num_bytes, digest, ranges)
            with contextlib.suppress(FileNotFoundError):
                data = pa.memory_map(str(path)).read_buffer()
                if data.size == num_bytes and hashlib.sha256(data).hexdigest() == digest:
                    with contextlib.suppress(FileNotFoundError):  # thrown out since: it is mapped
                        os.utime(path)
                    return data
                log.warning("%s is damaged in the cache and is downloaded again: %s", name, path)
                path.unlink(missing_ok=True)
        raise OSError(f"{name} does not stay in the cache {self.folder}: others throw it out; raise max_bytes")

    def fetch(self, name: str, num_bytes: int, digest: str, ranges: Ranges) -> None:
        """Have the object's file in the folder, on its way to be opened. Waits where another process downloads it."""
        sha = hashlib.sha256()

        def chunks() -> Iterator[bytes]:
            for start in range(0, num_bytes, _STEP):
                data = ranges(start, min(_STEP, num_bytes - start))
                sha.update(data)
                yield data
            if sha.hexdigest() != digest:
                raise ValueError(f"{name} has digest {sha.hexdigest()}, its record says {digest}: see manifest verify")

        self.put(f"{digest}.arrow", num_bytes, chunks())

    def put(self, file_name: str, num_bytes: int, chunks: Iterable[bytes]) -> None:
        """Write a file whole, unless it is there. ValueError if it is larger than the whole cache."""
        if num_bytes > self.config.max_bytes:
            raise ValueError(f"an object of {num_bytes} bytes does not fit into a cache of {self.config.max_bytes}")
        path = self.folder / file_name
        while not path.exists():
            part = self._claim(path, num_bytes)
            if part is None:  # somebody else is at it, or all there is is being written: wait for that
                time.sleep(_PAUSE_S)
                continue
            with part:
                for data in chunks:
                    part.write(data)
                part.publish()

    def get(self, file_name: str) -> bytes | None:
        """A file's content, None if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / file_name).read_bytes()
        return None

    def _claim(self, path: Path, num_bytes: int) -> _Part | None:
        """The right to write a file, with room for it; None if another has it or there is no room now."""
        with self._locked():
            if path.exists():
                return None
            used = self._used()
            if used is None or used + num_bytes > self.config.max_bytes:
                used = self._clean(int(self.config.max_bytes * _KEPT) - num_bytes)
            part = _Part.open(self, path) if used + num_bytes <= self.config.max_bytes else None
            if part is not None:
                part.reserve(num_bytes)
                self._note(used + num_bytes)
            return part

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone in the folder, among threads and processes; milliseconds."""
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # not by closing alone: a process forked meanwhile has it open too
            os.close(handle)

    def _used(self) -> int | None:
        """Bytes in the folder, at most; None if that is not known."""
        text = self.get(".bytes") or b""
        return int(text) if text.isdigit() else None

    def _note(self, used: int) -> None:
        (self.folder / ".bytes").write_text(str(used))

    def _clean(self, most: int) -> int:
        """Remove what killed processes left, then the files used longest ago, until `most` bytes remain; those left."""
        files = []
        used = 0
        for entry in os.scandir(self.folder):
            if entry.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):
                if entry.name.endswith(".part") and _Part.is_left(entry.path):
                    os.unlink(entry.path)
                    continue
                status = entry.stat()
                used += status.st_size
                if not entry.name.endswith(".part"):
                    files.append((status.st_mtime, status.st_size, entry.path))
        for _, size, path in sorted(files):
            if used <= most:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # who has it mapped keeps it
            used -= size
        self._note(used)
        return used


class _Part:
    """A file being written; its lock is held until it is published or given up, or the process dies."""

    def __init__(self, cache: ShardCache, path: Path, handle: int) -> None:
        self.cache, self.path, self.handle = cache, path, handle
        self.at = _part_of(path)
        self.published = False

    @classmethod
    def open(cls, cache: ShardCache, path: Path) -> _Part | None:
        handle = os.open(_part_of(path), os.O_RDWR | os.O_CREAT, 0o600)
        if not _try_lock(handle):
            os.close(handle)
            return None
        return cls(cache, path, handle)

    @staticmethod
    def is_left(path: str) -> bool:
        """Whether whoever wrote it is gone."""
        handle = os.open(path, os.O_RDWR)
        try:
            free = _try_lock(handle)
            if free:
                fcntl.flock(handle, fcntl.LOCK_UN)
            return free
        finally:
            os.close(handle)

    def reserve(self, num_bytes: int) -> None:
        """Count as so many bytes from now on."""
        os.ftruncate(self.handle, 0)
        os.ftruncate(self.handle, num_bytes)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.handle, view) :]

    def publish(self) -> None:
        with self.cache._locked():
            os.replace(self.at, self.path)
            self.published = True

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.published:  # given up: gone before its lock is free
            self.at.unlink(missing_ok=True)
        fcntl.flock(self.handle, fcntl.LOCK_UN)
        os.close(self.handle)


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.part")


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
