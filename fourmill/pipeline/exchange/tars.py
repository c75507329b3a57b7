"""Tars that any tool reads and that come out the same every time: USTAR, in order, without clock, owner or host."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from fourmill.pipeline.exchange.rows import WrongDataError
from fourmill.pipeline.images import MAX_BYTES

_BLOCK = 512
_MAX_NAME = 100  # a longer one would be split into a prefix, which not every reader puts together again


def archive(members: Iterable[tuple[str, bytes]]) -> tuple[bytes, list[int]]:
    """A tar of (name, content), the offset of each member's header, and that of the end mark."""
    chunks: list[bytes] = []
    offsets: list[int] = []
    at = 0
    for name, data in members:
        offsets.append(at)
        for chunk in (_header(name, len(data)), data, bytes(-len(data) % _BLOCK)):
            chunks.append(chunk)
            at += len(chunk)
    end = 2 * _BLOCK
    chunks.append(bytes(end + -(at + end) % tarfile.RECORDSIZE))
    return b"".join(chunks), [*offsets, at]


def _header(name: str, num_bytes: int) -> bytes:
    if len(name) > _MAX_NAME:
        raise ValueError(f"a tar member's name has at most {_MAX_NAME} bytes, {name!r} has {len(name)}")
    info = tarfile.TarInfo(name)
    info.size, info.mode = num_bytes, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def contents(file: BinaryIO, where: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a tar's files in order. WrongDataError names `where` if it is damaged or cut off."""
    try:
        with tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                if member.size > MAX_BYTES:
                    raise ValueError(f"{member.name!r} has {member.size} bytes; at most {MAX_BYTES} are read")
                if member.isfile():
                    yield member.name.removeprefix("./"), tar.extractfile(member).read()  # type: ignore[union-attr]
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise ValueError(f"no end mark at byte {tar.offset}: cut off or damaged there")
    except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError) as error:
        raise WrongDataError(f"{where} is not a whole tar: {error}") from error
