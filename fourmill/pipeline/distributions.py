"""Distributions of numbers as counts that add up exactly: a log-linear histogram, the number of values, their sum.

A bin is the leading bits of a float32: sign, exponent, and `bits` bits of the mantissa. So it is at most 2^-bits of its
own edge wide whatever the scale, and no range has to be known before (as in HdrHistogram). With four bits each whole
number below 32 has its own bin. A bin is named by its edge that is nearer to zero: {"0.5": 12, "0.625": 3}.

The sum is kept as a whole number of 2^-24, the smallest step of float16, so that it does not depend on the order of
adding, and is exact for maps (which are stored in float16) and for whole numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COARSE, FINE = 2, 4  # bits of the mantissa: for maps and facts, and for lengths, counts and scores
_STEP = 1 << 24
_MANTISSA = 23
_LARGEST = np.finfo(np.float32).max
_HALVES = 1 << 16  # float16 has so many values that a whole map is counted in one table


def of_numbers(values: Sequence[float] | np.ndarray, bits: int = FINE, whole: bool = False) -> dict[str, Any]:
    """The distribution of a few numbers; `whole` if they count something. Numbers beyond float32 are `not_finite`."""
    exact = np.asarray(values, dtype=np.float64).reshape(-1)
    with np.errstate(over="ignore"):
        finite = np.isfinite(exact.astype(np.float32))
    kept = exact[finite] + 0  # -0 is 0
    found: dict[str, Any] = {"bits": bits, "not_finite": int(len(exact) - len(kept))}
    if not len(kept):
        return found
    names, counts = np.unique(_edges(kept.astype(np.float32), bits), return_counts=True)
    return found | {
        **({"whole": 1} if whole else {}),
        "count": len(kept),
        "scaled_sum": sum(round(value * _STEP) for value in kept.tolist()),
        "min": float(kept.min()),
        "max": float(kept.max()),
        "bins": {_name(edge): int(count) for edge, count in zip(names, counts, strict=True)},
    }


def count_halves(map_: np.ndarray) -> np.ndarray:
    """int64 (65536,): how often each float16 occurs in an array of float16 values."""
    return np.bincount(map_.astype(np.float16).view(np.uint16).reshape(-1), minlength=_HALVES)


def of_halves(counts: np.ndarray, bits: int = COARSE) -> dict[str, Any]:
    """The distribution of maps, from `count_halves` summed over them."""
    finite, values, steps, bin_of, edges = _halves(bits)
    found: dict[str, Any] = {"bits": bits, "not_finite": int(counts[~finite].sum())}
    there = np.flatnonzero((counts > 0) & finite)
    if not len(there):
        return found
    some, steps = counts[there], steps[there]
    # The product may pass 64 bits: 2^40 steps in the largest float16. Its halves do not.
    scaled = (int((some * (steps >> 20)).sum()) << 20) + int((some * (steps & 0xFFFFF)).sum())
    in_bin = np.bincount(bin_of[there], weights=some, minlength=len(edges))  # float64: exact below 2^53
    return found | {
        "count": int(some.sum()),
        "scaled_sum": scaled,
        "min": float(values[there].min()),
        "max": float(values[there].max()),
        "bins": {_name(edges[i]): int(in_bin[i]) for i in np.flatnonzero(in_bin)},
    }


@functools.lru_cache(maxsize=4)
def _halves(bits: int) -> tuple[np.ndarray, ...]:
    """Of every float16: is it finite, value, value in steps of 2^-24, number of its bin; and the bins' edges."""
    values = np.arange(_HALVES, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.where(np.isfinite(values) & (values != 0), values, np.float32(0))  # -0 is 0
    edges, bin_of = np.unique(_edges(finite, bits), return_inverse=True)
    steps = (finite.astype(np.float64) * _STEP).astype(np.int64)
    return np.isfinite(values), finite, steps, bin_of.reshape(-1), edges


def _edges(values: np.ndarray, bits: int) -> np.ndarray:
    """For each float32 the edge, nearer to zero, of its bin."""
    mask = np.int32(-1) << np.int32(_MANTISSA - bits)
    edges: np.ndarray = (np.ascontiguousarray(values).view(np.int32) & mask).view(np.float32)
    return edges + np.float32(0)  # -0 and 0 are one bin


def _name(edge: np.float32) -> str:
    return f"{float(edge):.9g}"  # nine digits name every float32


def mean(distribution: Mapping[str, Any]) -> float | None:
    """None of nothing."""
    count = distribution.get("count", 0)
    return distribution.get("scaled_sum", 0) / _STEP / count if count else None


def bins(distribution: Mapping[str, Any]) -> list[tuple[float, float, int]]:
    """(low, high, count) of the bins that hold something, ascending; of whole numbers the first and the last."""
    found = []
    for name, count in distribution.get("bins", {}).items():
        near = np.float32(name)
        far = _outer(near, distribution["bits"])
        if distribution.get("whole") and near > 0:
            near, far = np.ceil(near), np.ceil(far) - 1
        low, high = sorted((float(near), float(far)))
        found.append((low, high, int(count)))
    return sorted(found)


def _outer(near: np.float32, bits: int) -> np.float32:
    """The edge farther from zero; of the bin of zero, zero: nothing that is stored is so small."""
    if near == 0:
        return near
    code = near.view(np.int32) + (np.int32(1) << np.int32(_MANTISSA - bits))
    return np.clip(code.view(np.float32), -_LARGEST, _LARGEST)


def quantile(distribution: Mapping[str, Any], share: float) -> float | None:
    """The value below which `share` of them lie, to the width of a bin; inside of a bin they count as evenly spread."""
    rows = bins(distribution)
    target, passed = share * sum(count for _, _, count in rows), 0.0
    for low, high, count in rows:
        if passed + count >= target:
            inside = low + (high - low) * max(target - passed, 0) / count
            return _within(distribution, round(inside) if distribution.get("whole") else inside)
        passed += count
    return None


def _within(distribution: Mapping[str, Any], value: float) -> float:
    """`value` between the bounds, where they are known."""
    low, high = distribution.get("min"), distribution.get("max")
    value = value if low is None else max(value, low)
    return float(value if high is None else min(value, high))
