"""How one value of a modality becomes bytes and comes back, with the error each encoding may make.

    codec     value                          stored as                                     error
    verbatim  bytes                          the same bytes                                none
    utf8      str                            Arrow string                                  none
    json      dict, list                     JSON text, sorted keys                        none
    png8      uint8 (H, W)                   8-bit grey PNG                                none
    float16   float32 (H, W) or (C, H, W)    float16, bytes regrouped, zstd                2^-11 of the value
    int32     int32 (n,)                     Arrow fixed-size list                         none
    tokens    uint16 or uint32 (n,)          Arrow list, fixed-size for grids              none

`settle` is the round trip without the bytes: what a reader will see. A stage that feeds a label straight to its
tokenizer passes it through `settle`, so that tokens do not depend on whether the label was stored in between.
"""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fourmill.modalities import Kind, Modality

_MAX_VALUES = 1 << 28  # a header that asks for more than 2^28 numbers (1 GiB) is corrupt or hostile


def encode(entry: Modality, value: Any) -> Any:
    """`value` as its Arrow column stores it: bytes, str, or a list of integers."""
    if entry.codec == "png8":
        return _encode_png(_as_bytes(entry, value))
    if entry.codec == "float16":
        return _encode_float16(_as_float16(value))
    if entry.codec == "json":
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    if entry.codec in ("int32", "tokens"):
        return np.asarray(value)
    return value


def decode(entry: Modality, stored: Any) -> Any:
    """The value that `encode` was given, within the codec's stated error."""
    if entry.codec == "png8":
        return _decode_png(stored)
    if entry.codec == "float16":
        return _decode_float16(stored).astype(np.float32)
    if entry.codec == "json":
        return json.loads(stored)
    return stored


def settle(entry: Modality, value: Any) -> Any:
    """What `decode(encode(value))` would give, without making the bytes."""
    if entry.codec == "png8":
        return _as_bytes(entry, value)
    if entry.codec == "float16":
        return _as_float16(value).astype(np.float32)
    if entry.codec == "json":
        return json.loads(encode(entry, value))
    return value


def arrow_type(entry: Modality, dtype: str = "uint16", length: int | None = None) -> pa.DataType:
    """The column type; tokens need their `dtype` and, for a grid, their `length`."""
    if entry.kind is Kind.CROP:
        return pa.list_(pa.int32(), 5)
    if entry.is_tokens:
        item = pa.uint16() if dtype == "uint16" else pa.uint32()
        return pa.list_(item, length) if entry.kind is Kind.GRID else pa.list_(item)
    return pa.string() if entry.codec in ("utf8", "json") else pa.large_binary()


def token_dtype(vocabulary: int) -> str:
    """The narrowest unsigned type that holds ids below `vocabulary`."""
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


def _as_bytes(entry: Modality, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != 2 or array.min(initial=0) < 0 or array.max(initial=0) > 255:
        what = "ids" if entry.kind is Kind.CLASSES else "values"
        raise ValueError(f"{entry.name} must be (H, W) with {what} 0..255, not {array.shape} up to {array.max()}")
    return array.astype(np.uint8)


def _as_float16(value: Any) -> np.ndarray:
    array = np.asarray(value, dtype=np.float32)
    if not np.isfinite(array).all():
        raise ValueError("the map holds NaN or infinite values")
    if np.abs(array).max(initial=0) > 65504:
        raise ValueError(f"the map reaches {np.abs(array).max():.6g}; float16 holds at most 65504")
    return array.astype(np.float16)


def _encode_png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array, mode="L").save(file, "PNG")
    return file.getvalue()


def _decode_png(stored: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(stored), formats=["PNG"]) as image:
        return np.array(image.convert("L"))


def _encode_float16(array: np.ndarray) -> bytes:
    """Header (dimensions), then all low bytes, then all high bytes: neighbours are alike, so zstd gains a third."""
    header = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
    planes = np.frombuffer(array.tobytes(), np.uint8).reshape(-1, 2).T
    return header + pa.Codec("zstd").compress(planes.tobytes(), asbytes=True)


def _decode_float16(stored: bytes) -> np.ndarray:
    ndim = stored[0]
    shape = struct.unpack_from(f"<{ndim}I", stored, 1)
    count = int(np.prod(shape))
    if count > _MAX_VALUES:
        raise ValueError(f"a map of shape {shape} is larger than any this project writes")
    raw = pa.Codec("zstd").decompress(stored[1 + 4 * ndim :], decompressed_size=2 * count, asbytes=True)
    planes = np.frombuffer(raw, np.uint8).reshape(2, count)
    return np.ascontiguousarray(planes.T).view(np.float16).reshape(shape)
