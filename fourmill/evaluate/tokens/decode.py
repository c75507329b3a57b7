"""`fourmill decode`: the tokens of one sample back to pictures, boxes and texts, as files beside those of its labels.

    image.png              the crop that the labels and tokens are of, where the dataset has the picture
    tok_depth.png          what the tokens say, drawn as people expect it
    tok_depth.npy          the decoded value itself: .npy, .json or .txt
    tok_depth.label.png    the stored label, drawn the same way in the same colours; written out if it cannot be drawn

Pieces of a sequence that are malformed are told, never fatal.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fourmill.config import Config
from fourmill.evaluate.tokens.rebuild import Checkpoints, RebuildError, producers_of, rebuild
from fourmill.evaluate.tokens.rows import Rows
from fourmill.evaluate.tokens.sources import Backdrop, painted, reference_of, written
from fourmill.modalities import modality
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.manifest.lookup import Place, find_key
from fourmill.pipeline.store import Store, open_store

_GREY = 128  # of the backdrop where a dataset has no pictures
_SIDE = 224


@dataclass(frozen=True)
class Decoded:
    """One token modality of the sample: the number of its tokens, the files made, and what was wrong."""

    modality: str
    tokens: int
    files: tuple[str, ...] = ()
    malformed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    failed: str = ""


def decode_sample(
    dataset: str,
    key: str,
    out: str,
    modalities: Sequence[str] | None = None,
    crop: int = 0,
    config: Config | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[Decoded]:
    """Decode the tokens of one sample into files at `out`, a folder or s3:// URI; what lies there is replaced.

    ValueError for a key, modality or crop that is not there. RebuildError if no tokenizer can be brought back, or not
    one of `modalities`; otherwise those are told in `failed`.
    """
    manifest = read_manifest(open_store(dataset))
    place = find_key(manifest, key)
    return decode_place(manifest, place, Folder(open_store(out)), modalities, crop, config, checkpoints)


def decode_place(
    manifest: Manifest,
    place: Place,
    folder: Folder,
    modalities: Sequence[str] | None = None,
    crop: int = 0,
    config: Config | None = None,
    checkpoints: Checkpoints | None = None,
    labels: bool = True,
) -> list[Decoded]:
    """The same for the sample at one place of an open snapshot; `labels`: whether their files go beside the tokens'."""
    names = dict.fromkeys(name for name, _ in producers_of(manifest, modalities))
    rows = Rows(manifest.store, manifest, place.shard)
    _check_crop(rows, names, crop)
    values: dict[str, _Value] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            found = _restored(rows, name, place.row, crop, config, checkpoints)
        except RebuildError as error:
            if modalities:
                raise
            found = str(error)
        if isinstance(found, _Value):
            values[name] = found
        else:
            failed[name] = found
    if not values:
        nothing = f"{manifest.store.uri} holds no tokens: `fourmill tokenize` makes them"
        raise RebuildError("; ".join(failed.values()) or nothing)
    image = _backdrop(rows, place.row, crop, values)
    if (picture := rows.picture(place.row, crop)) is not None:
        folder.picture("image", picture)
    made = [_write(folder, name, rows, place.row, crop, values[name], image, labels) for name in values]
    return [*made, *(Decoded(name, 0, failed=reason) for name, reason in failed.items())]


def _restored(
    rows: Rows, name: str, row: int, crop: int, config: Config | None, checkpoints: Checkpoints | None
) -> _Value | str:
    """The value of one row of tokens, or why there is none."""
    record, tokens = rows.manifest.record(name, rows.number), rows.value(name, row, crop)
    if record is None or tokens is None:
        return _absent(rows, name, row)
    rebuilt = rebuild(rows.manifest, name, record.producer, config, checkpoints)
    (restored,) = rebuilt.restore_each([tokens])
    if isinstance(restored, Exception):
        return f"its {len(tokens)} tokens cannot be decoded: {restored}"
    return _Value(len(tokens), restored[0], tuple(restored[1]), rebuilt.notes)


@dataclass(frozen=True)
class _Value:
    """A decoded row of tokens, what of it was malformed, and what else must be known."""

    tokens: int
    value: Any
    malformed: tuple[str, ...]
    notes: tuple[str, ...]


def _check_crop(rows: Rows, names: Mapping[str, None], crop: int) -> None:
    for name in names:
        shard = rows.shard(name)
        if shard is not None and shard.entry.per_crop and not 0 <= crop < shard.spec.crops:
            raise ValueError(f"crop {crop}: {name} has crops 0 to {shard.spec.crops - 1}")


def _absent(rows: Rows, name: str, row: int) -> str:
    shard = rows.shard(name)
    if shard is None:
        return f"shard {rows.number} has no {name} yet"
    return shard.quarantine.get(shard.keys[row], "this sample has no such tokens")


def _backdrop(rows: Rows, row: int, crop: int, values: Mapping[str, _Value]) -> np.ndarray:
    """What boxes and masks are drawn on: the picture, else the one in the tokens, else grey."""
    picture = rows.picture(row, crop)
    if picture is not None:
        return picture
    decoded = next((v.value for name, v in values.items() if modality(name).source == "rgb"), None)
    side = rows.size or _SIDE
    return np.full((side, side, 3), _GREY, np.uint8) if decoded is None else decoded


def _write(
    folder: Folder, name: str, rows: Rows, row: int, crop: int, found: _Value, image: np.ndarray, labels: bool
) -> Decoded:
    source = str(modality(name).source)
    label = rows.label(source, row, crop)
    on = Backdrop(image, reference_of(source, [v for v in (label, found.value) if v is not None]))
    folder.files = []
    suffix, data = written(found.value)
    if (picture := painted(source, found.value, on)) is not None:
        folder.picture(name, picture)
    folder.put(f"{name}.{suffix}", data)
    if labels and label is not None and source != "rgb":  # of which image.png is the label
        if (picture := painted(source, label, on)) is not None:
            folder.picture(f"{name}.label", picture)
        else:
            suffix, data = written(label)
            folder.put(f"{name}.label.{suffix}", data)
    return Decoded(name, found.tokens, tuple(folder.files), found.malformed, found.notes)


class Folder:
    """Where files go; `files` are the names since it was last emptied."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.files: list[str] = []

    def put(self, name: str, data: bytes) -> None:
        path = self.store.local_path(name)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        elif not self.store.create(name, data):  # of an earlier decode
            self.store.delete(name)
            self.store.create(name, data)
        self.files.append(name)

    def picture(self, name: str, pixels: np.ndarray) -> None:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        self.put(f"{name}.png", file.getvalue())
