"""Statistics of a shard's values, as sums: a snapshot adds them up by recipe, and takes away those of a replaced shard.

Counts are exact whatever the order of adding, so that they stay true after any number of resumes. A tree of statistics
has whole numbers, which are added; packed histograms, which are added; counts by name (`classes`, `bins`, …); `min` and
`max`, which are null once a shard that had them was taken away; and constants. A number that is not there is 0.
`fourmill.pipeline.counting` says what is counted of each kind of value.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fourmill.pipeline.distributions import mean

if TYPE_CHECKING:
    from fourmill.pipeline.shards import Shard

Tree = dict[str, Any]

_CONSTANTS = ("bits", "whole", "vocabulary")
_BOUNDS = ("min", "max")
# Their names are data (a class may be called "min"), so nothing in them has a meaning but its count.
BY_NAME = ("bins", "classes", "maps", "formats", "sources", "shapes")


def compute(shard: Shard) -> Tree:
    """The statistics of one shard, as JSON."""
    from fourmill.pipeline.counting import counted  # it reads shards, and shards are recorded with this

    return _packed(_pruned(counted(shard)))


def add(total: Mapping[str, Any], one: Mapping[str, Any]) -> Tree:
    """Both together."""
    return merged([total, one])


def subtract(total: Mapping[str, Any], one: Mapping[str, Any]) -> Tree:
    """`total` without `one`, which was added before. A bound that `one` had is not known any more: null."""
    return merged([total], [one])


def merged(parts: Iterable[Mapping[str, Any]], without: Iterable[Mapping[str, Any]] = ()) -> Tree:
    """The sum of many, less that of others which are in it. Packed histograms are packed once, at the end."""
    total: Tree = {}
    for part in parts:
        _include(total, part, 1)
    for part in without:
        _include(total, part, -1)
    return _packed(_pruned(total))


def brief(one: Mapping[str, Any]) -> Tree:
    """The scalars, and the means of distributions: what stands in a record table. Empty only of empty statistics."""
    scalars = {name: value for name, value in one.items() if isinstance(value, int | float)}
    spread = {f"mean_{name}": mean(value) for name, value in one.items() if _is_distribution(name, value)}
    return scalars | {name: float(f"{value:.6g}") for name, value in spread.items() if value is not None}


def _is_distribution(name: str, value: Any) -> bool:
    return isinstance(value, Mapping) and name not in BY_NAME and "bins" in value


def _include(total: Tree, part: Mapping[str, Any], sign: int) -> None:
    for name, value in part.items():
        if name in _CONSTANTS:
            total[name] = value
        elif name in _BOUNDS:
            total[name] = _bound(name, total[name], value, sign) if name in total else value
        elif name in BY_NAME:
            counts = total.setdefault(name, {})
            for key, count in value.items():
                counts[key] = counts.get(key, 0) + sign * count
        elif isinstance(value, Mapping):
            _include(total.setdefault(name, {}), value, sign)
        elif isinstance(value, str):
            total[name] = _sum(total.get(name), sign * unpack_counts(value).astype(np.int64))
        else:
            total[name] = total.get(name, 0) + sign * value


def _bound(name: str, old: float | None, new: float | None, sign: int) -> float | None:
    """None: not known, whatever is added."""
    if old is None or new is None:
        return None
    if sign > 0:
        return min(old, new) if name == "min" else max(old, new)
    return None if old == new else old


def _sum(total: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
    if total is None:
        return counts
    longer, shorter = (total, counts) if len(total) >= len(counts) else (counts, total)
    longer[: len(shorter)] += shorter
    return longer


def _pruned(tree: Mapping[str, Any]) -> Tree:
    """Without zeros, and without what describes nothing: constants and bounds of no values."""
    found: Tree = {}
    for name, value in tree.items():
        if name in BY_NAME:
            kept = {key: count for key, count in value.items() if count}
        else:
            kept = _pruned(value) if isinstance(value, Mapping) else value
        if name in _BOUNDS or (kept.any() if isinstance(kept, np.ndarray) else kept):
            found[name] = kept
    return found if set(found) - {*_CONSTANTS, *_BOUNDS} else {}


def _packed(tree: Tree) -> Tree:
    packed = {n: pack_counts(v) if isinstance(v, np.ndarray) else v for n, v in tree.items()}
    return {n: _packed(v) if isinstance(v, dict) else v for n, v in packed.items()}


def code_counts(tokens: Mapping[str, Any]) -> np.ndarray:
    """int64 (vocabulary,): how often each id occurs, from the statistics of a token modality."""
    found = unpack_counts(tokens["histogram"]) if "histogram" in tokens else np.zeros(0, np.uint64)
    counts = np.zeros(max(int(tokens.get("vocabulary", 0)), len(found)), np.int64)
    counts[: len(found)] = found
    return counts


def entropy_bits(counts: np.ndarray) -> float:
    """Of the shares of a histogram; 0 of nothing."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return max(float(-(shares * np.log2(shares)).sum()), 0.0)


def pack_counts(counts: np.ndarray) -> str:
    """A histogram as text, zeros at its end left out: little-endian uint64, zlib, base64."""
    used = int(counts.nonzero()[0].max(initial=-1)) + 1
    return base64.b64encode(zlib.compress(counts[:used].astype("<u8").tobytes(), 6)).decode()


def unpack_counts(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u8")
