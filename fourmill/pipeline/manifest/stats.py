"""What a dataset's values are like, for `fourmill manifest stats`: from the sums that the manifest keeps.

So they are of all rows (of maps: of those that were decoded for it), and the same after any number of resumes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from fourmill.modalities import unknown
from fourmill.pipeline import distributions
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.manifest.show import described
from fourmill.pipeline.statistics import BY_NAME, code_counts, entropy_bits

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_OF_CODES = ("values", "tokens", "min", "max", "vocabulary")
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Codes:
    """Use of a token modality's codes. `entropy`: bits of a single id, without context; `values`: one a crop; `ranked`:
    share of tokens of the codes, commonest first, in at most 64 groups of equally many codes."""

    values: int
    tokens: int
    vocabulary: int
    used: int
    perplexity: float
    entropy: float
    min: int | None
    max: int | None
    ranked: tuple[float, ...]


@dataclass(frozen=True)
class Distribution:
    """Of some number. `min`, `max`: None where the shard that had them was made again. `bins`: (low, high, count)."""

    count: int
    mean: float
    min: float | None
    max: float | None
    quantiles: dict[str, float]
    not_finite: int
    bins: tuple[tuple[float, float, int], ...]

    def bars(self, width: int) -> tuple[str, float, float]:
        """A text histogram of equally wide columns, and its ends: all but the outermost 2 % of the values."""
        low, high = self.quantiles["0.01"], self.quantiles["0.99"]
        if high <= low:
            return sparkline(np.arange(width) == width // 2), low, high
        heights = np.zeros(width)
        for start, stop, count in self.bins:
            heights += count * _overlap(start, stop, low, high, width)
        return sparkline(heights), low, high


@dataclass(frozen=True)
class Statistics:
    """One modality by one recipe. `rows`, `present`: of the whole modality. `rows_read`: rows that were decoded for
    this, None if all were looked at. `counts`: what else was counted; `shares`: counts by name, the largest first."""

    modality: str
    recipe: str
    producer: str
    shards: int
    rows: int
    present: int
    rows_read: int | None = None
    codes: Codes | None = None
    distributions: dict[str, Distribution] = field(default_factory=dict)
    shares: dict[str, dict[str, int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def whole(self, name: str) -> int:
        """What `shares[name]` are parts of: a map has several classes, all else has one name each."""
        counts = self.shares.get("shapes", {}) if name == "maps" else self.shares[name]
        return sum(counts.values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def statistics(manifest: Manifest, names: Iterable[str] | None = None) -> list[Statistics]:
    """Of these modalities, or all: one entry for each recipe in use."""
    wanted = manifest.modalities if names is None else list(names)
    for name in wanted:
        if name not in manifest.blocks:
            raise ValueError(unknown("modality", name, manifest.modalities))
    return [found for name in wanted for found in _of(manifest, name)]


def _of(manifest: Manifest, name: str) -> list[Statistics]:
    totals, sums = manifest.totals(name), manifest.statistics(name)
    return [
        _described(
            sums.get(recipe, {}),
            Statistics(
                name, recipe, described(manifest.producers.get(recipe, {})), shards, totals.rows, totals.present
            ),
        )
        for recipe, shards in totals.recipes.items()
    ]


def _described(sums: Mapping[str, Any], known: Statistics) -> Statistics:
    spread: dict[str, Distribution] = {}
    shares: dict[str, dict[str, int]] = {}
    counts: dict[str, int] = {}
    is_tokens = "vocabulary" in sums or "tokens" in sums
    for name, value in {**sums, **sums.get("facts", {})}.items():
        if name in BY_NAME:
            shares[name] = dict(sorted(value.items(), key=lambda item: (-item[1], item[0])))
        elif isinstance(value, Mapping) and value.get("count"):
            spread[name] = _distribution(value)
        elif isinstance(value, int) and not (is_tokens and name in _OF_CODES) and name != "rows_read":
            counts[name] = value
    codes = _codes(sums) if is_tokens else None
    rows_read = sums.get("rows_read")
    return replace(known, codes=codes, distributions=spread, shares=shares, counts=counts, rows_read=rows_read)


def _codes(sums: Mapping[str, Any]) -> Codes:
    counts = code_counts(sums)
    entropy, tokens = entropy_bits(counts), int(sums.get("tokens", 0))
    ranked = np.sort(counts)[::-1] / max(counts.sum(), 1)
    groups = np.array_split(ranked, min(64, len(ranked))) if len(ranked) else []
    return Codes(
        values=int(sums.get("values", 0)),
        tokens=tokens,
        vocabulary=int(sums.get("vocabulary", len(counts))),
        used=int(np.count_nonzero(counts)),
        perplexity=2**entropy if tokens else 0.0,
        entropy=entropy,
        min=sums.get("min"),
        max=sums.get("max"),
        ranked=tuple(float(group.sum()) for group in groups),
    )


def _distribution(sums: Mapping[str, Any]) -> Distribution:
    quantiles = {f"{share:g}": distributions.quantile(sums, share) for share in QUANTILES}
    return Distribution(
        count=int(sums["count"]),
        mean=distributions.mean(sums) or 0.0,
        min=sums.get("min"),
        max=sums.get("max"),
        quantiles={name: value for name, value in quantiles.items() if value is not None},
        not_finite=int(sums.get("not_finite", 0)),
        bins=tuple(distributions.bins(sums)),
    )


def _overlap(start: float, stop: float, low: float, high: float, width: int) -> np.ndarray:
    """(width,): the share of start..stop, evenly spread, that falls into each column of low..high."""
    edges = np.linspace(low, high, width + 1)
    if stop <= start:
        column = int((start - low) / (high - low) * width)
        return np.eye(width)[min(column, width - 1)] if low <= start <= high else np.zeros(width)
    return np.asarray(np.diff(np.clip(edges, start, stop)) / (stop - start))


def sparkline(heights: Iterable[float]) -> str:
    """One block character a number, the highest full; a blank for nothing at all."""
    values = np.asarray(list(heights), dtype=np.float64)
    top = values.max(initial=0)
    steps = np.ceil(values / top * len(_BLOCKS)).astype(int) if top > 0 else np.zeros(len(values), int)
    return "".join(_BLOCKS[step - 1] if step else " " for step in steps)
