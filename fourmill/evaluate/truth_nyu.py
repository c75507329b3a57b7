"""Depth truth in the layout in which NYUv2 is usually unpacked: 16-bit PNG depth beside the pictures.

A depth picture belongs to a sample if folder and number agree, once the words that only say what kind of file it is are
taken away: `depth/0001.png` to `rgb/0001.jpg`, `bathroom/sync_depth_00045.png` to `bathroom/rgb_00045.jpg`. The
labelled .mat is HDF5 and is not read: unpack it into such folders.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from PIL import Image

from fourmill.evaluate.truth import DepthFiles, Truth, TruthSource
from fourmill.pipeline.corpus import stem_of, suffix_of
from fourmill.pipeline.store import ObjectInfo, Store

_KIND_WORDS = re.compile(r"(?<![a-z])(sync|depths?|rgb|colou?rs?|images?|jpe?g|png|raw|filled)(?![a-z])", re.IGNORECASE)
_MAX_SIDE = 8192
_EIGEN = {(480, 640): (slice(45, 471), slice(41, 601))}


def depth_maps(objects: Sequence[ObjectInfo]) -> list[ObjectInfo]:
    """The PNG files whose folder or name says depth."""
    return [o for o in objects if suffix_of(o.name) == "png" and "depth" in o.name.lower()]


class NyuTruth(TruthSource):
    """A folder of depth pictures."""

    kind = "NYUv2 depth files"
    max_depth = 10.0  # metres, as in every table on NYUv2

    def __init__(self, src: str, store: Store, objects: Sequence[ObjectInfo], files: DepthFiles) -> None:
        super().__init__(src)
        self.store, self.files = store, files
        self._maps: dict[str, ObjectInfo] = {}
        for info in depth_maps(objects):
            other = self._maps.setdefault(identity(info.name), info)
            if other is not info:
                raise ValueError(f"{other.name} and {info.name} in {store.uri} would both belong to one picture")

    def find(self, key: str, source: Mapping[str, Any], parts: Set[str]) -> Truth | None:
        origin = str(source.get("origin", "")).rpartition(":")[2]
        info = self._maps.get(identity(origin)) or self._maps.get(identity(key))
        return Truth(depth=self._depth(info)) if info else None

    def _depth(self, info: ObjectInfo) -> np.ndarray:
        with Image.open(io.BytesIO(self.store.get(info.name)), formats=["PNG"]) as image:
            if not image.mode.startswith("I") or max(image.size) > _MAX_SIDE:
                raise ValueError(f"{info.name} is no 16-bit grey picture, but {image.mode} of {image.size}")
            depth = np.asarray(image).astype(np.float32) / np.float32(self.files.per_metre)
        if self.files.eigen_crop and depth.shape in _EIGEN:
            kept = np.zeros_like(depth)
            kept[_EIGEN[depth.shape]] = depth[_EIGEN[depth.shape]]
            return kept
        return depth


def identity(name: str) -> str:
    """What a picture and its depth have in common: their path without suffix and without words for kinds of files."""
    words = re.split(r"[/_\-. ]+", _KIND_WORDS.sub("", stem_of(name).replace("_", "-")))
    return "/".join(word for word in words if word)
