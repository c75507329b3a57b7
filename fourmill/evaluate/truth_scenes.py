"""Truth of `fourmill.scenes`: rendered again from seed and index, or read from the tars that `--truth` wrote.

Invariant: both give the same truth, but that normals in tars are float16 (0.03 degrees). Tars are read by position, one
sample at a time; only the places of members are kept, for the few tars that were read last.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from fourmill.evaluate.truth import TrueObject, TrueSegment, Truth, TruthSource
from fourmill.pipeline.corpus import open_binary, suffix_of
from fourmill.pipeline.store import ObjectInfo, Store
from fourmill.scenes import CLASSES, SHAPES, render

_MAX_SIDE = 4096  # `fourmill.scenes` renders no larger pictures
_MAX_MEMBER = 16 * _MAX_SIDE**2  # bytes; the largest member is three float32 a pixel
_OPEN_TARS = 4
_MEMBERS = {"depth": "depth.npy", "normal": "normal.npy", "semseg": "semseg.png", "instances": "instances.png"}


class _Scenes(TruthSource):
    classes = CLASSES
    things = frozenset(SHAPES)
    stuff = frozenset(CLASSES) - things
    max_depth = 20.0  # metres: rooms are smaller
    closed_captions = True


class RenderedScenes(_Scenes):
    """Any sample whose metadata name a scene."""

    kind = "scenes, rendered again"

    def __init__(self) -> None:
        super().__init__("scenes, rendered again")

    def find(self, key: str, source: Mapping[str, Any], parts: Set[str]) -> Truth | None:
        origin = _metadata(source).get("scene")
        if not isinstance(origin, Mapping):
            return None
        try:
            scene = render(int(origin["seed"]), int(origin["index"]), int(origin["size"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"bad scene {origin!r}: seed, index and size are needed") from error
        size = len(scene.image)
        boxes = [(o.class_name, [edge / size for edge in o.box]) for o in scene.objects]
        objects = _objects(boxes, scene.instances) if "objects" in parts else None
        panoptic, segments = _panoptic(scene.semantic, scene.instances) if "panoptic" in parts else (None, ())
        normal = np.ascontiguousarray(scene.normals.transpose(2, 0, 1)) if "normal" in parts else None
        return Truth(scene.depth, normal, scene.semantic, panoptic, segments, objects, (scene.caption,))


class SceneTars(_Scenes):
    """The tars of `fourmill scenes --truth`. A sample is found by the tar and the key that its `origin` names."""

    kind = "scenes with --truth"

    def __init__(self, src: str, store: Store, objects: Sequence[ObjectInfo]) -> None:
        super().__init__(src)
        self.store = store
        self.tars = {o.name: o for o in objects if suffix_of(o.name) == "tar"}
        self._by_leaf = {name.rpartition("/")[2]: info for name, info in self.tars.items()}
        self._indexed: OrderedDict[str, tuple[BinaryIO, dict[str, dict[str, tarfile.TarInfo]]]] = OrderedDict()

    def find(self, key: str, source: Mapping[str, Any], parts: Set[str]) -> Truth | None:
        tar, _, member = str(source.get("origin", "")).partition(":")
        info = self.tars.get(tar) or self._by_leaf.get(tar.rpartition("/")[2])
        if info is None:
            return None
        file, samples = self._open(info)
        members = samples.get(_split(member)[0], {})
        if "json" not in members:
            return None
        if missing := [m for p, m in _MEMBERS.items() if _needed(p, parts) and m not in members]:
            raise ValueError(f"{info.name} has no {missing[0]} for {key!r}: was it written with --truth?")
        return self._truth(file, members, parts)

    def _truth(self, file: BinaryIO, members: Mapping[str, tarfile.TarInfo], parts: Set[str]) -> Truth:
        row = json.loads(_bytes(file, members["json"]))
        semantic = _png(_bytes(file, members["semseg.png"])) if _needed("semseg", parts) else None
        instances = _png(_bytes(file, members["instances.png"])) if _needed("instances", parts) else None
        depth = _npy(_bytes(file, members["depth.npy"])) if "depth" in parts else None
        normal = _npy(_bytes(file, members["normal.npy"])).astype(np.float32) if "normal" in parts else None
        panoptic: np.ndarray | None = None
        segments: tuple[TrueSegment, ...] = ()
        objects = None
        if "panoptic" in parts and semantic is not None and instances is not None:
            panoptic, segments = _panoptic(semantic, instances)
        if "objects" in parts and instances is not None:
            objects = _objects([(str(b["class_name"]), b["box"]) for b in row["boxes"]], instances)
        if normal is not None:
            normal = np.ascontiguousarray(normal.transpose(2, 0, 1))
        return Truth(depth, normal, semantic, panoptic, segments, objects, (str(row["caption"]),))

    def _open(self, info: ObjectInfo) -> tuple[BinaryIO, dict[str, dict[str, tarfile.TarInfo]]]:
        """The open file and its members by key and extension; the tars used last stay open."""
        if info.name not in self._indexed:
            file = open_binary(self.store, info)
            samples: dict[str, dict[str, tarfile.TarInfo]] = {}
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        key, extension = _split(member.name)
                        samples.setdefault(key, {})[extension] = member
            except tarfile.TarError as error:
                raise ValueError(f"{info.name} in {self.store.uri} is not a whole tar: {error}") from error
            self._indexed[info.name] = (file, samples)
            while len(self._indexed) > _OPEN_TARS:
                self._indexed.popitem(last=False)[1][0].close()
        self._indexed.move_to_end(info.name)
        return self._indexed[info.name]


def _needed(member: str, parts: Set[str]) -> bool:
    users = {"semseg": {"semseg", "panoptic"}, "instances": {"panoptic", "objects"}}
    return bool(users.get(member, {member}) & parts)


def _metadata(source: Mapping[str, Any]) -> Mapping[str, Any]:
    found = source.get("metadata")
    return found if isinstance(found, Mapping) else {}


def _split(name: str) -> tuple[str, str]:
    """WebDataset's key and extension: the first dot of the last part divides."""
    folder, slash, leaf = name.removeprefix("./").rpartition("/")
    stem, _, extension = leaf.partition(".")
    return folder + slash + stem, extension


def _bytes(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    if not member.isreg() or member.size > _MAX_MEMBER:
        raise ValueError(f"{member.name}: no file of at most {_MAX_MEMBER} bytes")
    file.seek(member.offset_data)
    return file.read(member.size)


def _npy(data: bytes) -> np.ndarray:
    """A float array of `numpy.save`; its header is checked against what is there before anything is allocated."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not an array of numpy.save, format 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    rest = data[file.tell() :]
    if fortran or dtype.kind != "f" or len(rest) != int(np.prod(shape, dtype=np.float64)) * dtype.itemsize:
        raise ValueError(f"an array of {dtype} {shape} that {len(rest)} bytes do not hold in rows of floats")
    return np.frombuffer(rest, dtype).reshape(shape)


def _png(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        if image.mode != "L" or max(image.size) > _MAX_SIDE:
            raise ValueError(f"a class map must be 8-bit grey and at most {_MAX_SIDE} a side, not {image.mode}")
        return np.array(image)


def _objects(boxes: Sequence[tuple[str, Any]], instances: np.ndarray) -> tuple[TrueObject, ...]:
    """Objects in the order of their numbers in `instances`, which begin with 1."""
    numbers = [n for n in np.unique(instances).tolist() if n]
    if len(numbers) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes for {len(numbers)} instances")
    return tuple(
        TrueObject(name, (float(b[0]), float(b[1]), float(b[2]), float(b[3])), instances == number)
        for number, (name, b) in zip(numbers, boxes, strict=True)
    )


def _panoptic(semantic: np.ndarray, instances: np.ndarray) -> tuple[np.ndarray, tuple[TrueSegment, ...]]:
    """Instances keep their numbers; each class of the background becomes one segment behind them."""
    numbers = instances.astype(np.int32)
    segments = [TrueSegment(n, CLASSES[int(semantic[instances == n][0])]) for n in np.unique(instances).tolist() if n]
    background = instances == 0
    for class_id in np.unique(semantic[background]).tolist():
        number = 256 + int(class_id)
        numbers[background & (semantic == class_id)] = number
        segments.append(TrueSegment(number, CLASSES[int(class_id)]))
    return numbers, tuple(segments)
