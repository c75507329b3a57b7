"""Health at a glance: what a reader asks before trusting a dataset, each answered in words and marked.

Everything is from the root and the sums of statistics; objects are not read: that is what `manifest verify` is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fourmill.modalities import Kind, modality
from fourmill.pipeline.fingerprints import INGESTED
from fourmill.pipeline.manifest import Manifest
from fourmill.pipeline.report.distributions import Distribution
from fourmill.pipeline.report.facts import many
from fourmill.pipeline.report.makers import Maker

GOOD, LOOK, BAD, NONE = "good", "look", "bad", "none"
VERDICTS = {GOOD: "✓ good", LOOK: "! look", BAD: "✗ bad", NONE: "– not known"}
SUMMARY = {
    GOOD: "✓ nothing stands out",
    LOOK: "! something to look at",
    BAD: "✗ not as it should be",
    NONE: "– nothing is known",
}
_MANY_QUARANTINED = 0.01  # share of rows; the default failure budget of a run
# Perplexity over the smaller of vocabulary and tokens. Trained codebooks are at 0.2 to 0.9; below a few per cent most
# codes never occur, which is how a collapsed codebook, or input in another form than it was trained on, shows.
_LOW_USE, _COLLAPSED = 0.05, 0.01
_SHOWN, _LONGEST = 6, 200  # particulars of an answer, and letters of each


@dataclass(frozen=True)
class Check:
    """One question. `level`: good, look, bad, or none where it was not asked; `items`: the particulars."""

    title: str
    level: str
    words: str
    items: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        return VERDICTS[self.level]


def checks(
    manifest: Manifest,
    found: Sequence[Maker],
    distributions: Mapping[str, Sequence[Distribution]],
    verified: Check | None = None,
) -> list[Check]:
    """All questions, in the order in which they are asked. `verified`: what a journal of `manifest verify` says."""
    unverified = Check(
        "Objects verified",
        NONE,
        "Nobody has said: run `fourmill manifest verify --json` and give its output to the report.",
    )
    return [
        _complete(manifest),
        _aligned(manifest),
        _generations(manifest, found),
        _quarantined(manifest),
        verified or unverified,
        _codes(distributions),
        _constant(distributions),
        _corpus(manifest),
        _attempts(manifest),
        _licences(found),
    ]


def worst(all_checks: Sequence[Check]) -> str:
    return next((level for level in (BAD, LOOK, GOOD) if any(c.level == level for c in all_checks)), NONE)


def tally(all_checks: Sequence[Check]) -> str:
    """How many answers of each kind there are."""
    counts = {words[2:]: sum(c.level == level for c in all_checks) for level, words in VERDICTS.items()}
    return ", ".join(f"{n} {words}" for words, n in counts.items() if n)


def _complete(manifest: Manifest) -> Check:
    wanted = len(manifest.shards)
    lacking = {m: wanted - manifest.num_shards(m) for m in manifest.modalities}
    items = [f"{m}: lacks {n:,} of {many(wanted, 'shard')}" for m, n in lacking.items() if n > 0]
    if not items:
        return Check("Complete", GOOD, f"{many(len(lacking), 'modality')}, each with all of {many(wanted, 'shard')}.")
    level = BAD if any(lacking.get(m, 0) > 0 for m in INGESTED) else LOOK
    return Check("Complete", level, f"{len(items)} of {many(len(lacking), 'modality')} lack shards.", _few(items))


def _aligned(manifest: Manifest) -> Check:
    """By the digests of keys that roots hold: equal for modalities that have the same shards of a block."""
    items = []
    reference = manifest.blocks.get("rgb") or next(iter(manifest.blocks.values()), {})
    for name, blocks in manifest.blocks.items():
        other = [b for b, i in blocks.items() if _covers(i, reference.get(b)) and i.keys != reference[b].keys]
        if other:
            items.append(f"{name}: other keys than rgb in {len(other):,} of {many(len(blocks), 'block')} of shards")
    if items:
        return Check("Rows aligned", BAD, "Rows do not stand for the same samples everywhere.", _few(items))
    return Check(
        "Rows aligned", GOOD, "Where shards are complete, every modality records the same keys in the same order."
    )


def _covers(info: Any, reference: Any) -> bool:
    return reference is not None and (info.shards, info.first, info.last) == (
        reference.shards,
        reference.first,
        reference.last,
    )


def _generations(manifest: Manifest, found: Sequence[Maker]) -> Check:
    mixed = {m: manifest.totals(m).recipes for m in manifest.modalities}
    items = [
        f"{m}: {' + '.join(f'{n:,}' for n in recipes.values())} shards by {len(recipes)} recipes"
        for m, recipes in mixed.items()
        if len(recipes) > 1 and m not in INGESTED
    ]
    items += [
        f"{maker.shown}: made from a {name} that the dataset no longer holds"
        for maker in found
        if maker.modalities
        for name, recipe in maker.inputs.items()
        if name in mixed and name not in INGESTED and recipe not in mixed[name]
    ]
    if items:
        return Check("One generation", BAD, "Shards of different making are mixed.", _few(items))
    return Check("One generation", GOOD, "Every modality was made by one recipe, from what is stored here.")


def _quarantined(manifest: Manifest) -> Check:
    sums = {m: manifest.totals(m) for m in manifest.modalities}
    shares = {m: sum(t.quarantined.values()) / t.rows for m, t in sums.items() if t.rows and t.quarantined}
    if not shares:
        return Check("Quarantine", GOOD, "No row of any modality is in quarantine.")
    ordered = sorted(shares, key=lambda m: -shares[m])
    items = [f"{m}: {many(sum(sums[m].quarantined.values()), 'row')} ({shares[m]:.2%})" for m in ordered]
    level = BAD if shares[ordered[0]] > _MANY_QUARANTINED else LOOK
    return Check("Quarantine", level, f"Rows of {many(len(items), 'modality')} could not be made.", _few(items))


def _codes(distributions: Mapping[str, Sequence[Distribution]]) -> Check:
    grids = {m: d for m, d in distributions.items() if _kind(m) is Kind.GRID}
    use = {
        m: min(shares) for m, d in grids.items() if (shares := [x.code_share for x in d if x.code_share is not None])
    }
    if not use:
        return Check("Code use", NONE, "The dataset holds no grids of tokens.")
    low = [m for m in use if use[m] < _LOW_USE]
    items = [f"{m}: {use[m]:.1%} of what it could use" for m in sorted(low, key=lambda m: use[m])]
    if not items:
        lowest = min(use, key=lambda m: use[m])
        return Check("Code use", GOOD, f"No codebook has collapsed; the least used is {lowest} at {use[lowest]:.0%}.")
    level = BAD if min(use.values()) < _COLLAPSED else LOOK
    return Check(
        "Code use", level, "By perplexity, few codes are used: a collapsed codebook looks like this.", _few(items)
    )


def _kind(name: str) -> Kind | None:
    """None of what this version's catalogue does not know."""
    try:
        return modality(name).kind
    except ValueError:
        return None


def _constant(distributions: Mapping[str, Sequence[Distribution]]) -> Check:
    known = {m: [x for x in d if x.constant is not None] for m, d in distributions.items()}
    known = {m: d for m, d in known.items() if d}
    if not known:
        return Check("Constant maps", NONE, "Records say nothing of it.")
    counts = {m: n for m, d in known.items() if (n := sum(x.constant or 0 for x in d))}
    items = _few([f"{m}: {n:,}" for m, n in counts.items()])
    if not counts:
        return Check("Constant maps", GOOD, f"None among those looked at in {many(len(known), 'modality')}.")
    if all(_kind(m.removeprefix("tok_")) in (Kind.EDGES, Kind.CLASSES) for m in counts):
        return Check("Constant maps", GOOD, "Only where a picture may have no edge, or one class.", items)
    return Check("Constant maps", LOOK, "Some maps are one value everywhere.", items)


def _corpus(manifest: Manifest) -> Check:
    damaged, unusable = manifest.corpus.get("damaged", []), manifest.corpus.get("quarantined", {})
    items = [str(what) for what in damaged] + [f"{n:,} × {reason}" for reason, n in dict(unusable).items()]
    if not manifest.corpus:
        return Check("Corpus", NONE, "The manifest says nothing of a corpus.")
    if items:
        return Check("Corpus", LOOK, "Parts of the corpus could not be used.", _few(items))
    return Check("Corpus", GOOD, "Every sample of the corpus was read.")


def _attempts(manifest: Manifest) -> Check:
    """Shards that were tried more than once lost a worker, or met a transient error."""
    items = []
    for name in manifest.modalities:
        totals = manifest.totals(name)
        again = int(totals.spent.get("attempts", 0)) - totals.shards
        if again > 0:
            items.append(f"{name}: {again:,} more attempts than shards")
    back = sum(n for counts in manifest.retries.counts.values() for n in counts.values())
    items += [f"{many(back, 'shard')} put back into the plan"] if back else []
    if items:
        return Check("Attempts", LOOK, "Some work was done more than once.", _few(items))
    return Check("Attempts", GOOD, "Every shard was made at the first attempt.")


def _licences(found: Sequence[Maker]) -> Check:
    rules: list[tuple[Callable[[Maker], bool], str]] = [
        (lambda m: m.non_commercial, "NON-COMMERCIAL"),
        (lambda m: m.licence_unknown and not m.non_commercial, "licence unknown"),
    ]
    told = (f"{maker.shown}: {words}, {_weights(maker)}" for rule, words in rules for maker in found if rule(maker))
    items = list(dict.fromkeys(told))  # generations share weights
    if not any(maker.weights for maker in found):
        return Check("Licences", GOOD, "No weights took part in making this dataset.")
    if items:
        return Check("Licences", LOOK, "Not every use is allowed by the licences of the weights.", _few(items))
    return Check("Licences", GOOD, "All weights state a licence, and none excludes commercial use by its name.")


def _weights(maker: Maker) -> str:
    return "; ".join(f"{w.reference} ({w.licence or 'unknown'})" for w in maker.weights) or maker.licence


def _few(items: Sequence[str]) -> tuple[str, ...]:
    """The first few, each cut off where it is a stranger's novel."""
    cut = [item if len(item) <= _LONGEST else f"{item[: _LONGEST - 1]}…" for item in items[:_SHOWN]]
    rest = len(items) - _SHOWN
    return (*cut, f"… and {rest:,} more") if rest > 0 else tuple(cut)
