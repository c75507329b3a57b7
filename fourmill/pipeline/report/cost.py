"""What making a dataset cost: worker time, GPU time and attempts of each component, by shard and by snapshot.

Figures are of the shards that the snapshot holds; work that was thrown away is counted by attempts only.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from fourmill.pipeline.manifest import Manifest, read_manifest, snapshots
from fourmill.pipeline.report.bins import Bins
from fourmill.pipeline.report.charts import Axis, Series, line_chart, short, strip
from fourmill.pipeline.report.makers import Maker
from fourmill.pipeline.store import Store

_HISTORY = 60  # snapshots that are looked into; of more, so many spread evenly
_ABOVE = 1.08  # the last and the highest point of a curve stay inside of the frame


@dataclass(frozen=True)
class Cost:
    """One component, or those whose generations are mixed. `makes`: modalities; `seconds`, `gpu_seconds`: summed over
    their shards; `attempts`: units it took; `rate`: samples a second of worker time; `strip`: that rate by shard, from
    0 to `fastest`; `share`: of the time of all."""

    title: str
    makes: tuple[str, ...]
    shards: int
    rows: int
    seconds: float
    gpu_seconds: float
    attempts: int
    rate: float
    share: float
    strip: Markup
    fastest: float


def costs(found: Sequence[Maker], bins: Mapping[str, Bins]) -> list[Cost]:
    """What took time, dearest first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in bins:
        titles = dict.fromkeys(maker.title for maker in found if name in maker.modalities)
        recipes = tuple(maker.recipe for maker in found if name in maker.modalities)
        groups.setdefault((" + ".join(titles), *recipes), []).append(name)
    seconds = {name: float(part.sums["seconds"].sum()) for name, part in bins.items()}
    total = sum(seconds.values())
    spent = {key: names for key, names in groups.items() if sum(seconds[n] for n in names) > 0}
    lines = [_cost(title, names, [bins[n] for n in names], total) for (title, *_), names in spent.items()]
    return sorted(lines, key=lambda cost: -cost.seconds)


def _cost(title: str, names: Sequence[str], parts: Sequence[Bins], total: float) -> Cost:
    rows, spent = parts[0].sums["rows"], np.sum([b.sums["seconds"] for b in parts], axis=0)
    rates = np.divide(rows, spent, out=np.zeros(len(rows)), where=spent > 0)
    seconds, fastest, makes = float(spent.sum()), float(rates.max()), ", ".join(names)
    words = f"{makes}: {short(rows.sum() / seconds)} samples a second of worker time, at most {short(fastest)}"
    return Cost(
        title=title,
        makes=tuple(names),
        shards=int(parts[0].sums["shards"].sum()),
        rows=int(rows.sum()),
        seconds=seconds,
        gpu_seconds=sum(float(b.sums["gpu_seconds"].sum()) for b in parts),
        attempts=int(max(b.sums["attempts"].sum() for b in parts)),
        rate=float(rows.sum() / seconds),
        share=seconds / total,
        strip=strip((rates / max(fastest, 1e-12)).tolist(), ["area"] * len(rates), words),
        fastest=fastest,
    )


@dataclass(frozen=True)
class Moment:
    """What one snapshot held. `created`: UTC, as its root says; `changed`: (modality, shards more than before)."""

    snapshot: int
    created: str
    present: int
    num_bytes: int
    seconds: float
    gpu_seconds: float
    changed: tuple[tuple[str, int], ...]


def history(store: Store, manifest: Manifest) -> list[Moment]:
    """Snapshots up to this one, oldest first, from their roots; those that can no longer be read are left out."""
    numbers = [n for n in snapshots(store) if n <= manifest.snapshot]
    chosen = sorted({numbers[round(i)] for i in np.linspace(0, len(numbers) - 1, min(_HISTORY, len(numbers)))})
    found: list[Moment] = []
    shards: dict[str, int] = {}
    for number in chosen:
        try:
            then = manifest if number == manifest.snapshot else read_manifest(store, number)
        except (FileNotFoundError, ValueError):  # collected meanwhile, or of another format
            continue
        now = {m: then.num_shards(m) for m in then.modalities}
        found.append(_moment(then, shards, now))
        shards = now
    return found


def _moment(then: Manifest, before: Mapping[str, int], now: Mapping[str, int]) -> Moment:
    sums = [then.totals(m) for m in then.modalities]
    spent = [sum(float(t.spent.get(name, 0.0)) for t in sums) for name in ("seconds", "gpu_seconds")]
    names = sorted({*before, *now})
    changed = tuple((m, n) for m in names if (n := now.get(m, 0) - before.get(m, 0)))
    present, num_bytes = sum(t.present for t in sums), sum(t.num_bytes for t in sums)
    return Moment(then.snapshot, then.created, present, num_bytes, spent[0], spent[1], changed)


def over_time(moments: Sequence[Moment]) -> list[tuple[str, Markup]]:
    """(caption, chart) of what was there when; none where there are not two moments to compare."""
    when = [_seconds(m.created) for m in moments]
    dated = [(w - when[0], m) for w, m in zip(when, moments, strict=True) if w is not None and when[0] is not None]
    if len(dated) < 2 or dated[-1][0] <= 0:
        return []
    x, unit = _time_axis(dated[-1][0])
    times = [t / unit for t, _ in dated]
    present = [float(m.present) for _, m in dated]
    y = Axis("values present", 0, max(present) * _ABOVE or 1)
    words = f"values present grew from {short(present[0])} to {short(present[-1])}"
    drawn = [
        (
            "values present, all modalities together",
            line_chart([Series("values", times, present)], x, y, words, stairs=True),
        )
    ]
    return [*drawn, *_time_spent(dated, times, x)]


def _time_spent(dated: Sequence[tuple[float, Moment]], times: Sequence[float], x: Axis) -> list[tuple[str, Markup]]:
    spent = {
        name: [float(getattr(m, field)) for _, m in dated]
        for name, field in (("worker", "seconds"), ("GPU", "gpu_seconds"))
    }
    known = {name: values for name, values in spent.items() if max(values) > 0}
    if not known:
        return []
    unit, divisor = _unit(max(map(max, known.values())))
    y = Axis(unit, 0, max(map(max, known.values())) / divisor * _ABOVE)
    curves = [
        Series(name, times, [v / divisor for v in values], f"s{i}") for i, (name, values) in enumerate(known.items())
    ]
    words = "; ".join(f"{name} time grew to {short(values[-1] / divisor)} {unit}" for name, values in known.items())
    colours = dict(zip(known, (" (blue)", " (orange)") if len(known) > 1 else ("",), strict=True))
    caption = " and ".join(f"{name} time{colour}" for name, colour in colours.items())
    return [(f"{caption} behind what is there", line_chart(curves, x, y, words, stairs=True))]


def _seconds(created: str) -> float | None:
    try:
        return (
            datetime.datetime.strptime(created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc).timestamp()
        )
    except ValueError:
        return None


def _time_axis(span: float) -> tuple[Axis, float]:
    """The axis, and the seconds in its unit."""
    name, unit = _unit(span)
    return Axis(f"{name} since the first snapshot", 0, span / unit * _ABOVE), unit


def _unit(seconds: float) -> tuple[str, float]:
    """The largest unit of time of which there are at least two."""
    units = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0))
    return next(((name, unit) for name, unit in units if seconds >= 2 * unit), ("seconds", 1.0))
