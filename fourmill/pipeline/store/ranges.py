"""An object as a file that can be read anywhere, so that a reader of files fetches only the ranges that it needs."""

from __future__ import annotations

import io

from fourmill.pipeline.store.base import Store


class RangeFile(io.RawIOBase):
    """One request for each read; `num_bytes` is the object's size, as its record or a listing says."""

    def __init__(self, store: Store, name: str, num_bytes: int) -> None:
        self.store, self.name, self.num_bytes = store, name, num_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.num_bytes}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self.num_bytes if size < 0 else min(self._at + size, self.num_bytes)
        data = self.fetch(self._at, stop) if stop > self._at else b""
        self._at += len(data)
        return data

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop`, of which there is at least one."""
        return self.store.get_range(self.name, start, stop - start)
