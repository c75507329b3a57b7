"""What a dataset is: where it came from, what it holds, under which licences. All from the root of its snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fourmill.modalities import modality
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.report.makers import Maker, without_secrets


@dataclass(frozen=True)
class Line:
    """One modality in the table."""

    name: str
    kind: str
    summary: str
    shards: int
    rows: int
    present: int
    num_bytes: int
    makers: tuple[Maker, ...]

    @property
    def share(self) -> float:
        return self.present / self.rows if self.rows else 0.0


def lines(manifest: Manifest, found: Sequence[Maker]) -> list[Line]:
    """Every modality; ingested ones first, then labels, then tokens."""
    return sorted((_line(manifest, name, found) for name in manifest.modalities), key=_order)


def _line(manifest: Manifest, name: str, found: Sequence[Maker]) -> Line:
    totals, (kind, summary) = manifest.totals(name), described(name)
    made_by = tuple(m for m in found if name in m.modalities)
    return Line(name, kind, summary, totals.shards, totals.rows, totals.present, totals.num_bytes, made_by)


def _order(line: Line) -> tuple[int, str]:
    ingested = all(not m.inputs for m in line.makers)
    return (2 if line.kind in ("grid", "sequence") else int(not ingested)), line.name


def described(name: str) -> tuple[str, str]:
    """Kind and summary by the catalogue; a dataset of a newer version may hold what it does not know."""
    try:
        entry = modality(name)
    except ValueError:
        return "unknown", "not in this version's catalogue"
    return entry.kind.value, entry.summary


def tiles(manifest: Manifest) -> list[tuple[str, str]]:
    """(figure, what it is): the size of the dataset at a glance."""
    first = "rgb" if "rgb" in manifest.blocks else next(iter(manifest.modalities), None)
    rows = manifest.totals(first).rows if first else 0
    sums = [manifest.totals(name) for name in manifest.modalities]
    seconds, gpu = (sum(float(t.spent.get(n, 0.0)) for t in sums) for n in ("seconds", "gpu_seconds"))
    found = [
        (count(rows), "samples"),
        (count(manifest.num_shards(first) if first else 0), "shards"),
        (str(len(sums)), "modalities"),
        (size(sum(t.num_bytes for t in sums)), "in objects"),
    ]
    spent = [(duration(seconds), "of worker time"), (duration(gpu), "of GPU time")]
    return [*found, *(part for part, total in zip(spent, (seconds, gpu), strict=True) if total > 0)]


def provenance(manifest: Manifest) -> list[tuple[str, str]]:
    """(what, value) of the corpus, as ingest recorded it."""
    corpus = manifest.corpus
    settings = ", ".join(f"{k} {v}" for k, v in sorted(corpus.get("settings", {}).items()) if v is not None)
    found = [
        ("source", ", ".join(map(str, corpus.get("sources", [])))),
        ("layout", str(corpus.get("format", ""))),
        ("read with", settings),
        ("samples read", f"{corpus['samples']:,}" if isinstance(corpus.get("samples"), int) else ""),
        ("left out", _counted(corpus.get("ignored"))),
        ("could not be used", _counted(corpus.get("quarantined"))),
        ("damaged archives", "; ".join(map(str, corpus.get("damaged", [])[:5]))),
        ("keys that were renamed", str(corpus.get("renamed") or "")),
        ("digest", str(corpus.get("digest", ""))),
    ]
    return [(what, without_secrets(value)) for what, value in found if value]


def _counted(counts: Any) -> str:
    return ", ".join(f"{n:,} × {what}" for what, n in counts.items()) if isinstance(counts, dict) else ""


def count(number: float) -> str:
    """1,234, or 12.3 M where digits would not be read."""
    for unit, suffix in ((1e9, "G"), (1e6, "M")):
        if number >= 10 * unit:
            return f"{number / unit:,.1f}".removesuffix(".0") + f" {suffix}"
    return f"{number:,.0f}"


def many(number: int, noun: str) -> str:
    """1 shard, 2,000 shards, 3 modalities."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def size(num_bytes: float) -> str:
    for unit, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return (
                f"{num_bytes / unit:,.3g} {suffix}" if num_bytes < 1000 * unit else f"{num_bytes / unit:,.0f} {suffix}"
            )
    return f"{num_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    for unit, suffix in ((86400 * 2, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            length = 86400 if suffix == "days" else unit
            return f"{seconds / length:,.1f} {suffix}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def percent(share: float) -> str:
    """100 % only where nothing is lacking, 0 % only where nothing is there."""
    for digits in (0, 1, 2, 3):
        text = f"{share:.{digits}%}"
        if share in (0, 1) or text not in (f"{0:.{digits}%}", f"{1:.{digits}%}"):
            return text
    return "<0.001%" if share < 0.5 else ">99.999%"
