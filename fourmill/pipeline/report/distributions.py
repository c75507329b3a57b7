"""How the values of each modality are distributed, from the sums of statistics in the manifest: of all shards, not of a
sample. Tokens: use of codes. Labels: whatever their statistics count, drawn by the form that it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from fourmill.pipeline.distributions import bins, mean, quantile
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.report.charts import Axis, Series, histogram, line_chart, short
from fourmill.pipeline.statistics import BY_NAME, code_counts, entropy_bits

_POINTS = 64  # of a curve over ranks, spread evenly over their logarithm
_BARS = 40  # of a histogram
_TAILS = 0.002  # of the values at either end are left out of a histogram's range
_NAMES = 12  # classes in a list of bars; the rest together
_CHARTED = 4  # of more distributions in one modality a table is made


@dataclass(frozen=True)
class Spread:
    """A row of the table of distributions: 1 %, median and 99 % of one number."""

    name: str
    quantiles: tuple[float, float, float]


@dataclass(frozen=True)
class Shares:
    """Counts by name as bars: (name, count, share of all, share of the longest)."""

    name: str
    bars: tuple[tuple[str, int, float, float], ...]


@dataclass(frozen=True)
class Distribution:
    """One modality by one recipe. `figures`: (what, value); `charts`: (caption, drawing). `code_share`: perplexity over
    the smaller of vocabulary and tokens, `constant`: maps of one value; None where it was not counted."""

    name: str
    recipe: str
    figures: tuple[tuple[str, str], ...] = ()
    charts: tuple[tuple[str, Markup], ...] = ()
    shares: tuple[Shares, ...] = ()
    spreads: tuple[Spread, ...] = ()
    code_share: float | None = None
    constant: int | None = None


def distributions(manifest: Manifest) -> dict[str, list[Distribution]]:
    """What is known of every modality that has statistics, by modality."""
    found = {
        name: [_described(manifest, name, recipe, s) for recipe, s in manifest.statistics(name).items() if s]
        for name in manifest.modalities
    }
    return {name: each for name, each in found.items() if each}


def _described(manifest: Manifest, name: str, recipe: str, sums: Mapping[str, Any]) -> Distribution:
    return _codes(name, recipe, sums) if "tokens" in sums else _labels(name, recipe, sums, _unit(manifest, name))


def _unit(manifest: Manifest, name: str) -> str:
    """Of depth, as the first shard's record states it."""
    if name.partition("@")[0] != "depth":
        return ""
    record = manifest.record(name, min(info.first for info in manifest.blocks[name].values()))
    convention = record.spec.get("convention") if record else None
    return "metres" if convention == "metric" else str(convention or "")


# Tokens


def _codes(name: str, recipe: str, sums: Mapping[str, Any]) -> Distribution:
    counts = code_counts(sums)
    vocabulary, tokens = len(counts), int(counts.sum())
    if not tokens:
        return Distribution(name, recipe, (("tokens", "0"),))
    ranked = np.sort(counts[counts > 0])[::-1]
    shares = ranked / tokens
    entropy = entropy_bits(counts)
    figures = [
        ("codes used", f"{len(ranked):,} of {vocabulary:,} ({len(ranked) / vocabulary:.1%})"),
        ("perplexity", f"{2**entropy:,.1f}"),
        ("entropy", f"{entropy:.2f} of {math.log2(vocabulary):.2f} bits"),
        ("tokens", f"{tokens:,}"),
        *_of_values(sums),
    ]
    chart = ("", _ranks(name, shares, vocabulary))
    share = 2**entropy / min(vocabulary, tokens)
    constant = None if "lengths" in sums else int(sums.get("constant", 0))  # of grids
    return Distribution(name, recipe, tuple(figures), (chart,), code_share=share, constant=constant)


def _of_values(sums: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How long sequences are, and what should not be there."""
    found = []
    if sums.get("lengths", {}).get("bins"):
        low, middle, high = (quantile(sums["lengths"], share) or 0.0 for share in (0.01, 0.5, 0.99))
        found.append(("tokens a value", f"{short(middle)} ({short(low)} to {short(high)})"))
    odd = (("beyond the vocabulary", "beyond"), ("grids of one code", "constant"))
    return found + [(words, f"{sums[name]:,}") for words, name in odd if sums.get(name)]


def _ranks(name: str, shares: np.ndarray, vocabulary: int) -> Markup:
    """Share of tokens over the rank of their code, both logarithmic; dashed: all codes alike."""
    ranks = np.unique(np.geomspace(1, len(shares), _POINTS).round().astype(int))
    even = 1 / vocabulary
    low = 10.0 ** math.floor(math.log10(min(float(shares[-1]), even)))
    high = 10.0 ** math.ceil(math.log10(max(float(shares[0]), even)))
    x = Axis("rank of the code", 1, max(vocabulary, 2), log=True, format=short)
    y = Axis("share of tokens", low, high, log=True, format=lambda v: f"{v * 100:g}%")
    curve = Series("codes", ranks.tolist(), shares[ranks - 1].tolist())
    alike = Series("all alike", [1, vocabulary], [even, even], "dash")
    words = f"{name}: the commonest code takes {shares[0]:.2%} of tokens, {len(shares)} of {vocabulary} codes occur"
    return line_chart([alike, curve], x, y, words)


# Labels


@dataclass
class _Sorted:
    """A modality's statistics by their form. Numbers and names that are always the same are told, not drawn."""

    figures: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    names: dict[str, Mapping[str, int]] = field(default_factory=dict)

    def add(self, name: str, value: Any, pixels: int = 0) -> None:
        """`pixels`: how many there are, of which some figures are shares."""
        if isinstance(value, Mapping) and name in BY_NAME:  # first: a class may be called "bits"
            if len(value) == 1:
                self.figures[name] = str(next(iter(value)))
            elif value:
                self.names[name] = value
        elif isinstance(value, Mapping) and "bits" in value:
            self._number(name, value)
        elif isinstance(value, Mapping):
            for part, inner in value.items():
                self.add(part, inner)
        elif isinstance(value, int | float):
            self.figures[name] = f"{value / pixels:.2%} of pixels" if name in _OF_PIXELS and pixels else f"{value:,}"

    def _number(self, name: str, value: Mapping[str, Any]) -> None:
        low, high = value.get("min"), value.get("max")
        if value.get("not_finite"):
            self.figures[f"{name}, not finite"] = f"{value['not_finite']:,}"
        if low is not None and low == high:
            self.figures[name] = f"always {short(low)}"
        elif value.get("bins"):
            self.numbers[name] = value


_OF_PIXELS = ("invalid", "void", "edges")
_AXES = {
    "values": "value",
    "areas": "area of the box, share of the crop",
    "scores": "score",
    "objects": "objects in a sample",
    "texts": "texts of a sample",
    "shares": "share of pixels on an edge",
    "bytes": "size of the file, bytes",
    "height": "height, pixels",
    "width": "width, pixels",
    "short_side": "shorter side, pixels",
    **{axis: f"{axis} of the normal" for axis in "xyz"},
}


def _labels(name: str, recipe: str, sums: Mapping[str, Any], unit: str) -> Distribution:
    found = _Sorted()
    for part, value in sums.items():
        found.add(part, value, int(sums.get("pixels", 0)))
    charted = found.numbers if len(found.numbers) <= _CHARTED else {}
    charts = tuple((_caption(part, d), _histogram(name, part, d, unit)) for part, d in charted.items())
    spreads = tuple(_spread(part, d) for part, d in found.numbers.items() if part not in charted)
    shares = tuple(_shares(part, counts) for part, counts in found.names.items())
    counted = "rows_read" in sums or "constant" in sums  # a number that is not there is 0
    constant = int(sums.get("constant", 0)) if counted else None
    figures = tuple((part.replace("_", " "), words) for part, words in found.figures.items())
    return Distribution(name, recipe, figures, charts, shares, spreads, constant=constant)


def _caption(name: str, distribution: Mapping[str, Any]) -> str:
    average, middle = mean(distribution), quantile(distribution, 0.5)
    return f"{name.replace('_', ' ')}: median {short(middle or 0.0)}, mean {short(average or 0.0)}"


def _histogram(name: str, part: str, distribution: Mapping[str, Any], unit: str) -> Markup:
    """Values in at most 40 bins of one width over all but the extreme ones."""
    whole, rows = bool(distribution.get("whole")), _within(distribution)
    low, high = (float(quantile(distribution, share) or 0.0) for share in (_TAILS, 1 - _TAILS))
    edges = _bin_edges(low, high, whole)
    shares = _spread_over(rows, edges, whole) / max(float(sum(n for _, _, n in rows)), 1.0)
    words = _AXES.get(part, part.replace("_", " "))
    x = Axis(f"{words}, {unit}" if unit and part == "values" else words, float(edges[0]), float(edges[-1]))
    y = Axis("share", 0, float(shares.max()) * 1.08 or 1.0, format=lambda v: f"{v * 100:g}%")
    told = f"{name}, {words}: {short(low)} to {short(high)}, most often {short(float(edges[int(shares.argmax())]))}"
    return histogram(edges.tolist(), shares.tolist(), x, y, told, "f2")


def _within(distribution: Mapping[str, Any]) -> list[tuple[float, float, int]]:
    """The bins, the outer ones cut off at the least and the greatest value where these are known."""
    least, most = distribution.get("min"), distribution.get("max")
    low, high = -math.inf if least is None else float(least), math.inf if most is None else float(most)
    return [(min(max(a, low), high), max(min(b, high), low), n) for a, b, n in bins(distribution)]


def _bin_edges(low: float, high: float, whole: bool) -> np.ndarray:
    """Of whole numbers every bin holds equally many of them, from half below to half above."""
    if whole:
        step = max(1, math.ceil((high - low + 1) / _BARS))
        bars = math.ceil((high - low + 1) / step)
        return math.floor(low) - 0.5 + step * np.arange(max(bars, 1) + 1)
    if high <= low:
        return np.array([low - 0.5, low + 0.5])
    return np.linspace(low, high, _BARS + 1)


def _spread_over(rows: Sequence[tuple[float, float, int]], edges: np.ndarray, whole: bool) -> np.ndarray:
    """Counts of other bins spread evenly over ours; what lies outside is left out."""
    counts = np.zeros(len(edges) - 1)
    for low, high, count in rows:
        start, stop = (low - 0.5, high + 0.5) if whole else (low, high)
        if stop <= start:  # the bin of zero has no width
            cell = int(np.searchsorted(edges, start, side="right")) - 1
            counts[min(max(cell, 0), len(counts) - 1)] += count if edges[0] <= start <= edges[-1] else 0
            continue
        inside = np.clip(edges, start, stop)
        counts += count * np.diff(inside) / (stop - start)
    return counts


def _spread(name: str, distribution: Mapping[str, Any]) -> Spread:
    low, middle, high = (float(quantile(distribution, share) or 0.0) for share in (0.01, 0.5, 0.99))
    return Spread(name.replace("_", " "), (low, middle, high))


def _shares(name: str, counts: Mapping[str, int]) -> Shares:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ranked[_NAMES:])
    rows = [*ranked[:_NAMES], *([(f"{len(ranked) - _NAMES} others", rest)] if rest else [])]
    total, longest = max(sum(counts.values()), 1), max((count for _, count in rows), default=1) or 1
    return Shares(name.replace("_", " "), tuple((n, c, c / total, c / longest) for n, c in rows))
