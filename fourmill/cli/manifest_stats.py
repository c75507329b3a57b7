"""`fourmill manifest stats`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fourmill.cli.manifest import manifest_app
from fourmill.cli.options import AsJson, At, Dataset, OnlyModalities, console, parse_names
from fourmill.cli.units import human_number, human_share

if TYPE_CHECKING:
    from rich.console import Console

    from fourmill.pipeline.manifest.stats import Statistics

_WIDE = 110
_TOP = 5  # names in a line; all of them where one modality was asked for
_LISTED = 40
_BAR = 24


@manifest_app.command("stats")
def manifest_stats(dataset: Dataset, at: At = None, modality: OnlyModalities = None, as_json: AsJson = False) -> None:
    """What the values are like: use of codes, histograms and quantiles, lengths of texts, objects, shares of classes.

    fourmill manifest stats runs/demo/dataset

    fourmill manifest stats s3://bucket/dataset --modality semseg

    fourmill manifest stats s3://bucket/dataset --json | jq '.statistics[] | select(.codes) | .modality, .codes.used'
    """
    from fourmill.pipeline.manifest import read_manifest
    from fourmill.pipeline.manifest.stats import statistics
    from fourmill.pipeline.store import open_store

    manifest = read_manifest(open_store(dataset), at)
    found = statistics(manifest, parse_names(modality))
    if as_json:
        tree = {"snapshot": manifest.snapshot, "statistics": [s.to_json() for s in found]}
        print(json.dumps(tree, indent=1))
        return
    out = console()
    for part in (_codes, _distributions, _shares, _counts):
        part(out, found)
    if modality:
        _listed(out, found)


def _name(one: Statistics, found: Sequence[Statistics]) -> str:
    """The modality, with its recipe where there are several."""
    mixed = sum(other.modality == one.modality for other in found) > 1
    return f"{one.modality} {one.recipe[:8]}" if mixed else one.modality


def _table(out: Console, title: str, *columns: str) -> Any:
    """The first column and the last to the left, numbers between them to the right."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title=title, title_justify="left", title_style="bold"
    )
    for place, column in enumerate(columns):
        edge = place in (0, len(columns) - 1)
        table.add_column(column, justify="left" if edge else "right", overflow="fold")
    return table


def _codes(out: Console, found: Sequence[Statistics]) -> None:
    from fourmill.pipeline.manifest.stats import sparkline

    rows = [(one, one.codes) for one in found if one.codes is not None]
    if not rows:
        return
    columns = ("modality", "tokens", "a value", "codes used", "perplexity", "bits", "by rank")
    table = _table(out, "Codes", *columns)
    step = 2 if out.width >= _WIDE else 6
    for one, codes in rows:
        each = human_number(codes.tokens / codes.values) if codes.values else ""
        used = f"{codes.used:,} ({human_share(codes.used, codes.vocabulary)})"
        figures = (f"{codes.tokens:,}", each, used, f"{codes.perplexity:,.0f}", f"{codes.entropy:.2f}")
        table.add_row(_name(one, found), *figures, sparkline(codes.ranked[::step]))
    out.print(table)


def _distributions(out: Console, found: Sequence[Statistics]) -> None:
    rows = [(one, name, spread) for one in found for name, spread in one.distributions.items()]
    if not rows:
        return
    wide = out.width >= _WIDE
    quantiles = ("0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99") if wide else ("0.01", "0.5", "0.99")
    heads = ["median" if q == "0.5" else f"{float(q) * 100:g} %" for q in quantiles]
    table = _table(out, "Values", "modality: what", *(["count"] if wide else []), "mean", *heads, "1 % to 99 %")
    for one, name, spread in rows:
        bars, _, _ = spread.bars(_BAR if wide else 16)
        figures = [human_number(spread.quantiles[q]) for q in quantiles]
        count = [f"{spread.count:,}"] if wide else []
        table.add_row(f"{_name(one, found)}: {_words(name)}", *count, human_number(spread.mean), *figures, bars)
    out.print(table)


def _shares(out: Console, found: Sequence[Statistics]) -> None:
    rows = [(one, name, counts) for one in found for name, counts in one.shares.items() if counts]
    if not rows:
        return
    from rich.markup import escape

    table = _table(out, "Names", "modality: what", "names", "commonest")
    for one, name, counts in rows:
        top = [f"{escape(n)} {human_share(c, one.whole(name))}" for n, c in list(counts.items())[:_TOP]]
        more = [f"{len(counts) - _TOP:,} more"] if len(counts) > _TOP else []
        table.add_row(f"{_name(one, found)}: {_words(name)}", f"{len(counts):,}", ", ".join(top + more))
    out.print(table)


def _counts(out: Console, found: Sequence[Statistics]) -> None:
    """Everything else that was counted, and what the figures rest on."""
    table = _table(out, "Counts", "modality", "what was counted")
    for one in found:
        pixels = one.counts.get("pixels", 0)
        words = [_counted(name, count, pixels) for name, count in one.counts.items() if name != "pixels"]
        if one.rows_read is not None:
            words.append(f"decoded for this: {one.rows_read:,} of {one.present:,} rows")
        if not (words or one.codes or one.distributions or one.shares):
            words.append("no statistics")
        if words:
            table.add_row(_name(one, found), "; ".join(words))
    if table.row_count:
        out.print(table)


def _counted(name: str, count: int, pixels: int) -> str:
    of_pixels = name in ("invalid", "void", "edges") and pixels
    return f"{_words(name)} {human_share(count, pixels)} of the pixels" if of_pixels else f"{_words(name)} {count:,}"


def _listed(out: Console, found: Sequence[Statistics]) -> None:
    """Counts by name as bars, of the modalities asked for."""
    from rich.markup import escape

    for one in found:
        for name, counts in one.shares.items():
            if len(counts) < 2:
                continue
            total, largest = one.whole(name), max(counts.values())
            table = _table(out, f"{_name(one, found)}: {_words(name)}", "name", "count", "share", "")
            for key, count in list(counts.items())[:_LISTED]:
                bar = "█" * max(round(count / largest * _BAR), 1)
                table.add_row(escape(key), f"{count:,}", human_share(count, total), bar)
            if len(counts) > _LISTED:
                rest = sum(list(counts.values())[_LISTED:])
                table.add_row(f"{len(counts) - _LISTED:,} more", f"{rest:,}", human_share(rest, total), "")
            out.print(table)


def _words(name: str) -> str:
    return name.replace("_", " ")
