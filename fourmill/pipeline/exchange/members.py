"""One value as a file that other tools open, and back: what a tar member or a file in a folder holds.

    codec             file                                          back
    verbatim          .jpg, .png, … : the same bytes                the same bytes
    utf8              .txt                                          the same text
    json              .json: the same text                          the same text
    png8              .png: the same bytes                          the same bytes
    float16           .npy float16                                  the same numbers
    int32, tokens     .npy int32, uint16, uint32                    the same numbers

Crop 0 of `depth` is `<key>.depth.npy`, crop 2 is `<key>.depth.2.npy`.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np

from fourmill.modalities import Modality
from fourmill.pipeline import codecs

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"BM", "bmp"),
    (b"\0\0\0\x0cjP", "jp2"),
    (b"\xff\x4f\xff\x51", "j2k"),
)
_SUFFIX = re.compile(r"(?P<modality>[^.]+)(\.(?P<crop>[1-9]\d*))?\.(?P<extension>[^.]+)")


def to_file(entry: Modality, stored: Any) -> tuple[str, bytes]:
    """(extension, content) for a stored value."""
    if entry.codec == "verbatim":
        return image_extension(stored), stored
    if entry.codec == "utf8":
        return "txt", stored.encode()
    if entry.codec == "json":
        return "json", stored.encode()
    if entry.codec == "png8":
        return "png", stored
    if entry.codec == "float16":
        return "npy", to_npy(codecs.decode(entry, stored).astype(np.float16))
    return "npy", to_npy(np.asarray(stored))


def from_file(entry: Modality, data: bytes) -> Any:
    """The stored value for a file's content; ValueError if it is not what `to_file` makes."""
    if entry.codec in ("utf8", "json"):
        return data.decode("utf-8")
    if entry.codec in ("verbatim", "png8"):
        return data
    array = from_npy(data)
    if entry.codec == "float16":
        if array.dtype != np.float16:
            raise ValueError(f"{entry.name} is float16 here, not {array.dtype}")
        return codecs.encode(entry, array)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{entry.name} is a row of integers here, not {array.dtype} {array.shape}")
    return array


def suffix(name: str, crop: int, extension: str) -> str:
    """'depth.npy' for crop 0, 'depth.2.npy' for crop 2."""
    return f"{name}.{crop}.{extension}" if crop else f"{name}.{extension}"


def parse_suffix(text: str) -> tuple[str, int] | None:
    """(modality, crop) of such a suffix, None for any other."""
    match = _SUFFIX.fullmatch(text)
    return (match["modality"], int(match["crop"] or 0)) if match else None


def image_extension(data: bytes) -> str:
    """By the first bytes; 'img' for a format without a mark of its own."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for magic, extension in _MAGIC if data.startswith(magic)), "img")


def to_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def from_npy(data: bytes) -> np.ndarray:
    """An array from a .npy file of a stranger: no pickles, and no more memory than the file has bytes."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
    except Exception as error:  # numpy parses the header as Python, and lets through whatever that stumbles over
        raise ValueError(f"not a .npy file: {error}") from error
    if dtype.hasobject:
        raise ValueError("a .npy file of Python objects is a pickle, which could run code: it is not opened")
    body = data[file.tell() :]
    if len(body) != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError(f"a .npy file of shape {shape} and {dtype} with {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")
