"""What `--from NAME=VALUE` names, as a model is given it: photos, texts, label files, tokens.

    rgb=photo.jpg            largest centred square, at the model's size; a pattern such as photos/*.jpg gives several
    caption="a red cube"     the text itself, or a .txt file; structured texts (det) as .json file or JSON
    depth=depth.npy          a label, brought to tokens by the model's tokenizer; maps also as .png
    tok_depth=tokens.npy     one row of ids, integers of one dimension; -1 for cells that are not known
    t5_caption=t5.npy        embeddings, one row a token

Maps of another size are cut to the centred square and take the nearest pixel: values are never mixed.
"""

from __future__ import annotations

import glob
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from fourmill.modalities import CATALOGUE, Kind
from fourmill.model.config import Architecture
from fourmill.model.generate.names import resolve_name, source_name
from fourmill.model.generate.tokenizers import Tokenizers
from fourmill.pipeline import images
from fourmill.pipeline.geometry import CropConfig, apply_crop, draw_crops
from fourmill.pipeline.store import StoreError, open_store

_MILLIMETRE = 0.001  # 16-bit pictures of depth are in millimetres, as of most cameras


@dataclass
class Sample:
    """One sample's inputs by the model's names, and the pictures to show of them; `key` names its files."""

    key: str
    values: dict[str, Any] = field(default_factory=dict)
    shown: dict[str, Any] = field(default_factory=dict)


def read_samples(
    sources: Sequence[str], architecture: Architecture, tokenizers: Tokenizers, targets: Sequence[str]
) -> list[Sample]:
    """The samples that `--from` options describe; a name given once holds for all of them.

    ValueError for a name the model does not read, a file that cannot be, or numbers of values that do not fit.
    """
    given: dict[str, list[str]] = {}
    for text in sources:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--from {text!r}: give NAME=VALUE, such as rgb=photo.jpg")
        known = [*architecture.domains_in, *(t for t in targets if t not in architecture.domains_in)]
        given.setdefault(resolve_name(name, known, "input"), []).extend(_expanded(value))
    count = max((len(values) for values in given.values()), default=0)
    for name, values in given.items():
        if len(values) not in (1, count):
            raise ValueError(f"--from {name}: {len(values)} values beside {count} of another input; give 1 or {count}")
    samples = [Sample(key) for key in _keys(given, count)]
    for name, values in given.items():
        found = [_read(name, value, architecture, tokenizers) for value in values]
        for number, sample in enumerate(samples):
            sample.values[name], sample.shown[name] = found[number % len(found)]
    return samples


def _expanded(value: str) -> list[str]:
    """The files that a pattern matches, in order; anything else as it is."""
    if "://" in value or not any(c in value for c in "*?") or " " in value:
        return [value]
    return sorted(glob.glob(value)) or [value]


def _keys(given: dict[str, list[str]], count: int) -> list[str]:
    """Names of the samples: of their files where those differ, else numbers."""
    for values in given.values():
        stems = [PurePosixPath(value).stem for value in values]
        if len(values) == count and len(set(stems)) == count and all(_suffix(v) for v in values):
            return stems
    return [f"{number:03d}" for number in range(count)]


def _suffix(value: str) -> str:
    """'.npy' of what looks like a file; '' of a text."""
    suffix = PurePosixPath(value).suffix.lower()
    return suffix if suffix in (".npy", ".json", ".txt", ".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff") else ""


def _read(name: str, value: str, architecture: Architecture, tokenizers: Tokenizers) -> tuple[Any, Any]:
    """(what the model is given, what is shown of it)."""
    info = architecture.modalities[name]
    if info.kind == "pixels":
        assert info.grid is not None
        picture = _square(_photo(name, value), info.grid[0] * architecture.patch_size)
        return picture.transpose(2, 0, 1), picture
    if info.kind == "vectors":
        return _vectors(name, value, info.tokens, info.width), None
    try:
        if _suffix(value) == ".npy" and (array := _array(value)).ndim == 1 and array.dtype.kind in "iu":
            return array.astype(np.int64), None
        return _tokenized(name, value, tokenizers)
    except images.BadImageError as error:
        raise ValueError(f"--from {name}={value}: {error}") from error


def _vectors(name: str, value: str, most: int, width: int) -> np.ndarray:
    """Embeddings of a text, float32 (most, width); rows of zeros after the last."""
    found = np.zeros((most, width), np.float32)
    rows = _array(value)
    if rows.ndim != 2 or rows.shape[1] != width or not 0 < len(rows) <= most:
        raise ValueError(f"--from {name}={value}: shape {rows.shape}; 1 to {most} rows of {width} numbers are needed")
    found[: len(rows)] = rows
    return found


def _tokenized(name: str, value: str, tokenizers: Tokenizers) -> tuple[np.ndarray, Any]:
    tokenizer = tokenizers.get(name).tokenizer
    label = _label(source_name(name), value, tokenizer)
    try:
        (tokens,) = tokenizer.encode(label[None] if isinstance(label, np.ndarray) else [label])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"--from {name}={value!r} is no {tokenizer.source}: {error!r}") from error
    shown = label.transpose(1, 2, 0) if tokenizer.source == "rgb" else label
    return np.asarray(tokens).astype(np.int64), shown


def _label(source: str, value: str, tokenizer: Any) -> Any:
    """A value of the label modality `source`, of the size that its tokenizer takes."""
    kind, suffix = CATALOGUE[source].kind, _suffix(value)
    if kind is Kind.TEXT:
        return read_bytes(value).decode().strip() if suffix == ".txt" else value
    if kind is Kind.JSON:
        text = read_bytes(value).decode() if suffix == ".json" else value
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}={value!r} is neither a .json file nor JSON: {error}") from error
    size = tokenizer.codec.source.size
    if source == "rgb":
        return np.ascontiguousarray(_square(_photo(source, value), size).transpose(2, 0, 1))
    if kind is Kind.FEATURES:
        return np.ascontiguousarray(_array(value), dtype=np.float32)
    return _map(source, _array(value) if suffix == ".npy" else _pictured(source, read_bytes(value)), size)


def _pictured(source: str, data: bytes) -> np.ndarray:
    """A map out of a picture: depth in millimetres (16 bits), class ids, edges, or normals in their colour code."""
    if source == "normal":
        colours = np.asarray(images.decode(data)).astype(np.float32) / 255 * 2 - 1
        return np.stack([colours[..., 0], -colours[..., 1], -colours[..., 2]])
    images.size_of(data)  # refuses what is no picture, or too large
    with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
        values = np.asarray(image)
    if values.ndim != 2:
        raise ValueError(f"a picture of {source} has one channel; this one is of mode {image.mode}")
    return values.astype(np.float32) * _MILLIMETRE if source == "depth" else values.astype(np.uint8)


def _map(source: str, values: np.ndarray, size: int) -> np.ndarray:
    """The centred square of a map (…, H, W) at `size`, by the nearest pixel; normals are (3, H, W)."""
    if values.ndim != (3 if source == "normal" else 2):
        raise ValueError(f"a {source} of shape {values.shape}; (H, W) is needed, of normals (3, H, W)")
    height, width = values.shape[-2:]
    side = min(height, width)
    steps = ((np.arange(size) + 0.5) * side / size).astype(int)
    rows, columns = (height - side) // 2 + steps, (width - side) // 2 + steps
    found = values[..., rows[:, None], columns]
    return np.ascontiguousarray(found, dtype=np.float32 if source in ("depth", "normal") else np.uint8)


def _photo(name: str, value: str) -> Image.Image:
    try:
        return images.decode(read_bytes(value))
    except images.BadImageError as error:
        raise ValueError(f"--from {name}={value}: the picture cannot be read: {error}") from error


def _square(image: Image.Image, size: int) -> np.ndarray:
    """uint8 (size, size, 3): crop 0 of the dataset's geometry, the largest centred square."""
    (crop,) = draw_crops("", image.height, image.width, CropConfig(size=size, count=1))
    return apply_crop(image, crop, size)


def _array(value: str) -> np.ndarray:
    try:
        return np.load(io.BytesIO(read_bytes(value)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{value} is no .npy file of numbers: {error}") from error


def read_bytes(uri: str) -> bytes:
    """A file of a local path or s3:// URI; ValueError if it is not there."""
    if "://" not in uri:
        if not Path(uri).expanduser().is_file():
            raise ValueError(f"there is no file {uri}")
        return Path(uri).expanduser().read_bytes()
    folder, _, name = uri.rpartition("/")
    try:
        return open_store(folder).get(name)
    except (FileNotFoundError, StoreError) as error:
        raise ValueError(f"{uri} cannot be read: {error}") from error
