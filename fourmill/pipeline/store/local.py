"""Objects as files below a folder. Created by hard link, which fails if the name exists: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fourmill.pipeline.store.base import Counters, ObjectInfo, Sizes, StoreError, checked, checked_prefix

_TEMPORARY = ".fourmill-tmp"  # half-written files wait here, on the same file system as their final name


class LocalStore:
    """A folder, which need not exist yet."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.uri = str(self.root)
        self.counters = Counters()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (self.uri,)

    def _path(self, name: str) -> Path:
        return self.root / checked(name)

    def create(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        self.counters.add(requests=1)
        if path.exists():
            return False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            created = self._publish(path, data)
        except OSError as error:
            raise StoreError(f"cannot create {path}: {error}") from error
        if created:
            self.counters.add(bytes_written=len(data))
        return created

    def _publish(self, path: Path, data: bytes) -> bool:
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
            # Over NFS a link may be made and its answer lost; the second try then hears that the name exists.
            if os.stat(temporary).st_nlink == 1:
                return False
        finally:
            os.unlink(temporary)
        _sync_folder(path.parent)
        return True

    def get(self, name: str) -> bytes:
        with self._reading(name) as path:
            data = path.read_bytes()
        self.counters.add(requests=1, bytes_read=len(data))
        return data

    def get_range(self, name: str, start: int, length: int) -> bytes:
        with self._reading(name) as path, path.open("rb") as file:
            file.seek(start)
            data = file.read(max(length, 0))
        self.counters.add(requests=1, bytes_read=len(data))
        return data

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        """A folder is not an object; what cannot be read is the store's error, as on S3."""
        path = self._path(name)
        try:
            yield path
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise FileNotFoundError(f"no object {path}") from None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error}") from error

    def head(self, name: str) -> ObjectInfo | None:
        path = self._path(name)
        self.counters.add(requests=1)
        if not path.is_file():
            return None
        found = path.stat()
        return ObjectInfo(name, found.st_size, found.st_mtime)

    def sizes(self, names: Sequence[str]) -> Sizes:
        self.counters.add(requests=len(names))
        return [_size(f"{self.uri}/{checked(name)}") for name in names]

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for name, entry in self._files(prefix):
            with contextlib.suppress(FileNotFoundError):  # deleted since, or a link to nowhere
                status = entry.stat()
                yield ObjectInfo(name, status.st_size, status.st_mtime)

    def names(self, prefix: str = "") -> Iterator[str]:
        # A look at links only: `list` leaves out those that lead nowhere.
        return (name for name, entry in self._files(prefix) if not entry.is_symlink() or os.path.exists(entry.path))

    def _files(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        folder, _, beginning = checked_prefix(prefix).rpartition("/")
        self.counters.add(requests=1)
        if "//" not in prefix:  # which the file system would take for '/'
            yield from self._below(f"{folder}/" if folder else "", beginning)

    def _below(self, folder: str, beginning: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Files in `folder`, which ends in '/', and below. Holds the names of one folder a level, and no more."""
        try:
            with os.scandir(f"{self.uri}/{folder}") as entries:
                found = [(_sort_name(e), e) for e in entries if e.name.startswith(beginning) and e.name != _TEMPORARY]
        except (FileNotFoundError, NotADirectoryError):
            return
        for name, entry in sorted(found, key=lambda pair: pair[0]):
            if not name.endswith("/"):
                yield folder + name, entry
            elif not entry.is_symlink():  # a linked folder may lead back up
                yield from self._below(folder + name)

    def delete(self, name: str) -> None:
        path = self._path(name)
        self.counters.add(requests=1)
        try:
            path.unlink(missing_ok=True)
        except (IsADirectoryError, NotADirectoryError):
            return
        except OSError as error:
            raise StoreError(f"cannot delete {path}: {error}") from error

    def local_path(self, name: str) -> Path | None:
        return self._path(name)


def _sort_name(entry: os.DirEntry[str]) -> str:
    """Folders with their slash: so a folder's objects come where S3 has them, 'a-b/x' before 'a/x'."""
    return f"{entry.name}/" if entry.is_dir() else entry.name


def _size(path: str) -> int | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None if stat.S_ISDIR(found.st_mode) else found.st_size


def _sync_folder(folder: Path) -> None:
    """Make a new directory entry survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
