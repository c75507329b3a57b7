"""One sample of an ml-4m folder, read into what shards store; a value that cannot be read is a reason, not an error."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fourmill.modalities import Kind, modality
from fourmill.pipeline import codecs, images
from fourmill.pipeline.exchange import ml4m_values
from fourmill.pipeline.exchange.members import from_npy
from fourmill.pipeline.exchange.ml4m import MAPS, TEXTS
from fourmill.pipeline.shards import Spec

_MAX_JSON = 1 << 24
_BROKEN = (ValueError, KeyError, TypeError, IndexError, OSError, AttributeError)


class Row:
    """One sample's files, read into what shards store."""

    def __init__(self, specs: Mapping[str, Spec], files: Mapping[str, tuple[str, bytes] | None], map_size: int) -> None:
        self.specs, self.files, self.map_size = specs, files, map_size

    def read(self, name: str) -> tuple[list[Any], str | None]:
        """(stored value of each crop, reason if there is none)."""
        spec = self.specs[name]
        if self.files[name] is None:
            return [None] * spec.crops, "missing: the source has no such file"
        try:
            return self._values(name, spec), None
        except _BROKEN as error:
            return [None] * spec.crops, f"unreadable: {error}"

    def _values(self, name: str, spec: Spec) -> list[Any]:
        entry, data = modality(name), self._data(name)
        if entry.name == "rgb":
            images.size_of(data)
            return [data]
        if entry.kind in (Kind.GRID, Kind.CROP):
            return _integers(from_npy(data), spec, entry.kind)
        if entry.name in MAPS:
            maps = [ml4m_values.read_map(entry, data, crop, self._side(crop)) for crop in self._crops()]
            return [codecs.encode(entry, m) for m in maps]
        if entry.name in TEXTS:
            return [_texts(data, self.files[name])]
        tree = json.loads(data)
        if entry.name == "det":
            tree = ml4m_values.read_boxes(tree, self._crops(), self._data("rgb"))
        elif entry.name == "color_palette":
            tree = ml4m_values.read_palettes(tree, spec.crops)
        else:
            tree = [tree]
        return [codecs.encode(entry, value) for value in tree]

    def _data(self, name: str) -> bytes:
        found = self.files.get(name)
        if found is None:
            raise ValueError(f"needs {name}, which the source does not have")
        extension, data = found
        if extension == "json.gz":
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(_MAX_JSON + 1)
            if len(data) > _MAX_JSON:
                raise ValueError(f"more than {_MAX_JSON} bytes of JSON")
        return data

    def _crops(self) -> list[np.ndarray]:
        return list(np.atleast_2d(from_npy(self._data("crop_settings"))))

    def _side(self, crop: np.ndarray) -> int:
        """Our own exports are cut already: the crop is the whole picture."""
        top, left, height, width, _ = map(int, crop)
        return height if (top, left) == (0, 0) and height == width else self.map_size


def _texts(data: bytes, file: Any) -> str:
    text = data.decode("utf-8")
    return text if file[0] == "txt" else ml4m_values.read_caption(json.loads(text))[0]


def _integers(array: np.ndarray, spec: Spec, kind: Kind) -> list[np.ndarray]:
    rows = np.atleast_2d(array)
    wanted = (spec.crops, 5 if kind is Kind.CROP else spec.length)
    if rows.shape != wanted or rows.dtype.kind not in "iu":
        raise ValueError(f"{rows.dtype} {rows.shape} where whole numbers {wanted} are expected")
    top = spec.vocabulary if kind is Kind.GRID else 1 << 31
    if rows.min(initial=0) < 0 or rows.max(initial=0) >= (top or 0):
        raise ValueError(f"numbers from {rows.min()} to {rows.max()}, outside of 0 to {(top or 0) - 1}")
    return list(rows.astype(np.int32 if kind is Kind.CROP else codecs.token_dtype(spec.vocabulary or 0)))
