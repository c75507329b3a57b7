"""The values of one shard object: that each can be decoded and is what its modality promises.

The same conventions that labels had to meet before they were stored (`pipeline/conventions.py`), and what only shows in
the object: token ranges, lengths of grids, maps of one shape. A value that is one number everywhere is a warning: a
blank wall has one normal, a black picture one token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.modalities import Kind
from fourmill.pipeline import conventions, images
from fourmill.pipeline.shards import Shard

_CONSTANT = (Kind.MAP, Kind.FEATURES, Kind.GRID)
_MAPS = (Kind.MAP, Kind.CLASSES, Kind.EDGES, Kind.FEATURES)
_CODES = {"not finite": "not-finite", "constant output": "constant-value", "wrong shape": "wrong-shape"}


@dataclass(frozen=True)
class Flaw:
    """What is wrong with one value, or with the whole column where there is no row."""

    code: str
    what: str
    row: int | None = None
    warning: bool = False


def flaws(shard: Shard) -> Iterator[Flaw]:
    """Everything wrong with the values of a whole shard object."""
    for crop in range(shard.spec.crops if shard.entry.per_crop else 1):
        place = f" (crop {crop})" if shard.spec.crops > 1 else ""
        if shard.entry.is_tokens:
            found = _token_flaws(shard, crop)
        elif shard.entry.kind is Kind.CROP:
            found = _crop_flaws(shard, crop)
        else:
            found = _label_flaws(shard, crop)
        for flaw in found:
            yield Flaw(flaw.code, flaw.what + place, flaw.row, flaw.warning)


def _token_flaws(shard: Shard, crop: int) -> Iterator[Flaw]:
    column, spec = shard.column(crop), shard.spec
    if shard.entry.kind is Kind.GRID:
        if column.type.list_size != spec.length:
            yield Flaw("wrong-length", f"rows of {column.type.list_size} tokens; its spec says {spec.length}")
            return
        if spec.grid is not None and int(np.prod(spec.grid)) != spec.length:
            yield Flaw("wrong-length", f"rows of {spec.length} tokens are no grid of {spec.grid[0]} x {spec.grid[1]}")
    if spec.vocabulary is not None:
        yield from _ranges(column, spec.vocabulary)
    if shard.entry.kind is Kind.GRID and (spec.length or 0) > 1:
        tokens = shard.tokens(crop)
        for row in np.flatnonzero(shard.valid(crop) & (tokens == tokens[:, :1]).all(axis=1)).tolist():
            yield Flaw("constant-value", f"every token is {int(tokens[row, 0])}", row, warning=True)


def _ranges(column: pa.Array, vocabulary: int) -> Iterator[Flaw]:
    """Tokens that the vocabulary lacks: the first of each row. Nulls hold no tokens."""
    flat = np.asarray(column.drop_null().flatten())
    if not len(flat) or int(flat.max()) < vocabulary:
        return
    for row in range(len(column)):
        if column[row].is_valid and (wrong := np.flatnonzero(np.asarray(column[row].values) >= vocabulary)).size:
            token = int(np.asarray(column[row].values)[wrong[0]])
            yield Flaw("token-range", f"token {token} at {int(wrong[0])}; the vocabulary has {vocabulary} ids", row)


def _crop_flaws(shard: Shard, crop: int) -> Iterator[Flaw]:
    for row, value in enumerate(shard.values(crop)):
        if value is None:
            continue
        top, left, height, width, flip = (int(v) for v in value)
        if top < 0 or left < 0 or height <= 0 or width <= 0 or flip not in (0, 1):
            yield Flaw("bad-value", f"{value.tolist()} is no crop (top, left, height, width, flip)", row)


def _label_flaws(shard: Shard, crop: int) -> Iterator[Flaw]:
    shapes: dict[int, tuple[int, ...]] = {}
    for row in np.flatnonzero(shard.valid(crop)).tolist():
        try:
            value = shard.value(row, crop)
            _check_picture(shard, value)
        except Exception as error:  # codecs let through whatever damaged bytes make their libraries stumble over
            # A picture's bytes are as the corpus had them: if they cannot be decoded, that is not the dataset's fault.
            what = f"cannot be decoded: {error or type(error).__name__}"
            yield Flaw("undecodable-value", what, row, warning=shard.entry.kind is Kind.IMAGE)
            continue
        if shard.entry.kind in _MAPS:
            shapes[row] = value.shape
        yield from _unconventional(shard, value, row)
    usual = Counter(shapes.values()).most_common(1)
    for row, shape in shapes.items():
        if shape != usual[0][0]:
            yield Flaw("wrong-shape", f"is of shape {shape}, most of the shard are {usual[0][0]}", row)


def _check_picture(shard: Shard, value: Any) -> None:
    if shard.entry.kind is Kind.IMAGE:
        images.decode(value)


def _unconventional(shard: Shard, value: Any, row: int) -> Iterator[Flaw]:
    try:
        conventions.check(shard.entry, shard.spec, value)
    except conventions.ConventionError as error:
        kind, _, rest = str(error).partition(": ")
        code = _CODES.get(kind, "bad-value")
        words = rest if code in ("constant-value", "not-finite") else str(error)
        yield Flaw(code, words, row, warning=code == "constant-value" and shard.entry.kind in _CONSTANT)
    except Exception as error:  # a value of another structure: a missing name, a text for a number
        yield Flaw("bad-value", f"is not what {shard.entry.name} promises: {type(error).__name__}: {error}", row)
