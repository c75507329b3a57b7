"""One sample as files to look at: its picture, its labels drawn and as values, its tokens as ids and decoded back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fourmill.config import Config
from fourmill.evaluate.tokens.decode import Folder, decode_place
from fourmill.evaluate.tokens.rebuild import Checkpoints, RebuildError
from fourmill.evaluate.tokens.rows import Rows
from fourmill.evaluate.tokens.sources import Backdrop, painted, reference_of, written
from fourmill.modalities import Kind, Modality, modality
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.manifest.lookup import Place
from fourmill.pipeline.store import open_store


def write_sample(
    manifest: Manifest,
    place: Place,
    out: str,
    names: Sequence[str] | None = None,
    crop: int = 0,
    config: Config | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[list[str], list[str]]:
    """Files of one sample in a folder or below an s3:// URI: (their names, what could not be made and why).

    The picture as it came and its crop, every label drawn and as its value, every row of tokens as ids and decoded
    back with the weights that made it, where those can be found.
    """
    folder, rows = Folder(open_store(out)), Rows(manifest.store, manifest, place.shard)
    chosen = list(names or manifest.modalities)
    image = rows.picture(place.row, crop)
    if image is not None:
        folder.picture("image", image)
    files: list[str] = list(folder.files)
    for name in chosen:
        folder.files = []
        _put(folder, rows, name, place.row, crop, image)
        files += folder.files
    tokens = [name for name in chosen if modality(name).is_tokens]
    decoded, notes = _decoded(manifest, place, folder, tokens, crop, config, checkpoints)
    return list(dict.fromkeys([*files, *decoded])), notes


def _put(folder: Folder, rows: Rows, name: str, row: int, crop: int, image: np.ndarray | None) -> None:
    """One modality's value: verbatim, as numbers or text, and drawn where it can be."""
    entry, value = modality(name), rows.value(name, row, crop)
    if value is None:
        return
    if entry.kind is Kind.IMAGE:
        folder.put(f"{name}.{_suffix(rows.described(row))}", value)
        return
    suffix, data = written(value)
    folder.put(f"{name}.ids.{suffix}" if entry.is_tokens else f"{name}.{suffix}", data)
    if _is_drawn(entry):
        canvas = image if image is not None else np.full((224, 224, 3), 128, np.uint8)
        kind = "instance" if entry.name == "panoptic" else name  # segments too, though no tokenizer reads them
        picture = painted(kind, value, Backdrop(canvas, reference_of(kind, [value])))
        if picture is not None:
            folder.picture(name, picture)


def _is_drawn(entry: Modality) -> bool:
    return not entry.is_tokens and entry.kind not in (Kind.IMAGE, Kind.TEXT, Kind.CROP)


def _suffix(source: Mapping[str, Any]) -> str:
    """Of a picture's file; anything but a plain format name is 'bin'."""
    name = str(source.get("format") or "bin").lower()
    return {"jpeg": "jpg", "mpo": "jpg"}.get(name, name) if name.isalnum() else "bin"


def _decoded(
    manifest: Manifest,
    place: Place,
    folder: Folder,
    names: list[str],
    crop: int,
    config: Config | None,
    checkpoints: Checkpoints | None,
) -> tuple[list[str], list[str]]:
    """Tokens decoded back, one modality at a time: a tokenizer that cannot be brought back costs only its own."""
    files: list[str] = []
    notes: list[str] = []
    for name in names:
        try:
            # Colours of features mean something only beside the label's in the same colours.
            beside = modality(str(modality(name).source)).kind is Kind.FEATURES
            found = decode_place(manifest, place, folder, [name], crop, config, checkpoints, labels=beside)
        except RebuildError as error:
            notes.append(f"{name}: {error}")
            continue
        for item in found:
            files += item.files
            notes += [f"{name}: {words}" for words in (item.failed, *item.malformed, *item.notes) if words]
    return files, notes
