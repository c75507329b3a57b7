"""Which rows of which modality are there, and how fast they were made, along the numbers of the shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.report.bins import Bins
from fourmill.pipeline.report.charts import strip

_NEARLY = 0.99  # share from which on a cell does not stand out: the default failure budget of a run
_SLIVER = 0.14  # height of a mark that must be seen though its share is next to nothing


@dataclass(frozen=True)
class Presence:
    """One row of the matrix. `share`: of the corpus's rows that are there; `null`: rows that are null; `shards`: that
    are missing."""

    name: str
    strip: Markup
    share: float
    null: int
    shards: int


def presence(manifest: Manifest, bins: Mapping[str, Bins], order: Sequence[str]) -> list[Presence]:
    """The matrix, a line a modality."""
    reference = bins["rgb"] if "rgb" in bins else next(iter(bins.values()), None)
    if reference is None:
        return []
    return [_line(manifest, name, bins[name], reference) for name in order]


def _line(manifest: Manifest, name: str, found: Bins, reference: Bins) -> Presence:
    expected, present = reference.sums["rows"], found.sums["present"]
    share = np.divide(present, expected, out=np.zeros(len(found)), where=expected > 0)
    styles = ["full" if s >= _NEARLY else "part" if s > 0 else "none" for s in share]
    heights = [float(max(min(s, 1.0), _SLIVER)) if e > 0 else 0.0 for s, e in zip(share, expected, strict=True)]
    totals = manifest.totals(name)
    missing = max(len(manifest.shards) - totals.shards, 0)
    whole = float(present.sum() / max(expected.sum(), 1))
    words = f"{name}: {whole:.1%} of rows present; {_worst_run(share, found.edges)}"
    return Presence(name, strip(heights, styles, words), whole, totals.rows - totals.present, missing)


def _worst_run(share: np.ndarray, edges: np.ndarray) -> str:
    """Where most is lacking, in words."""
    if not len(share) or share.min() >= 1:
        return "nothing is lacking"
    worst = int(np.argmin(share))
    return f"least in shards {edges[worst]} to {edges[worst + 1] - 1}: {share[worst]:.1%}"
