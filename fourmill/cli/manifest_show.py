"""`fourmill manifest show`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourmill.cli.manifest import manifest_app
from fourmill.cli.options import AsJson, At, Dataset, console
from fourmill.cli.units import human_bytes, human_seconds, human_share

if TYPE_CHECKING:
    from rich.tree import Tree

    from fourmill.pipeline.manifest import Manifest
    from fourmill.pipeline.manifest.show import Ancestor, Change, ModalitySummary

_WIDE = 110  # columns from which the table has everything


@manifest_app.command("show")
def manifest_show(
    dataset: Dataset,
    at: At = None,
    lineage: Annotated[
        str | None, typer.Option("--lineage", help="What made this modality, back to the corpus, as a tree.")
    ] = None,
    history: Annotated[bool, typer.Option("--history", help="Snapshots: when they came, and what changed.")] = False,
    last: Annotated[int, typer.Option("--last", help="With --history: so many, the newest first.", min=1)] = 20,
    tables: Annotated[bool, typer.Option("--tables", help="The Parquet files, for DuckDB or pandas.")] = False,
    as_json: AsJson = False,
) -> None:
    """What the dataset holds: modalities, shards, presence, size, cost, what made it, under which licences.

    fourmill manifest show s3://bucket/dataset --json | jq '.modalities[].present'

    fourmill manifest show s3://bucket/dataset --lineage tok_depth

    fourmill manifest show s3://bucket/dataset --history --last 5
    """
    from fourmill.pipeline.manifest import read_manifest
    from fourmill.pipeline.store import open_store

    if sum((lineage is not None, history, tables)) > 1:
        raise ValueError("--lineage, --history and --tables are three questions: ask one at a time")
    manifest = read_manifest(open_store(dataset), at)
    if lineage is not None:
        _show_lineage(manifest, lineage, as_json)
    elif history:
        _show_history(manifest, last, as_json)
    elif tables:
        _show_tables(manifest, as_json)
    else:
        _show_totals(dataset, manifest, as_json)


def _show_totals(dataset: str, manifest: Manifest, as_json: bool) -> None:
    from rich.markup import escape

    from fourmill.pipeline.manifest.show import restricted, summarise

    found, bound = summarise(manifest), restricted(manifest)
    if as_json:
        head = {"snapshot": manifest.snapshot, "created": manifest.created, "corpus": manifest.corpus}
        print(json.dumps({**head, "modalities": [m.to_json() for m in found], "non_commercial": bound}, indent=1))
        return
    out = console()
    corpus = manifest.corpus
    sources = ", ".join(map(str, corpus.get("sources", ["?"])))
    samples = corpus.get("samples", "?")
    count = f"{samples:,}" if isinstance(samples, int) else str(samples)
    out.print(f"{escape(dataset)}: snapshot {manifest.snapshot} of {manifest.created or '?'}", highlight=False)
    out.print(f"corpus: {count} samples, {escape(_corpus(corpus))}from {escape(sources)}", highlight=False)
    out.print(_totals_table(found, out.width >= _WIDE))
    out.print(_makers_table(found, out.width >= _WIDE))
    if mixed := [m.name for m in found if len(m.recipes) > 1]:
        out.print(f"MIXED GENERATIONS in {', '.join(mixed)}: run the job again, or see `manifest plan`")
    if bound:
        out.print(f"NOT FOR COMMERCIAL USE, by the licence of the weights: {escape('; '.join(bound))}")


def _corpus(corpus: Mapping[str, Any]) -> str:
    """Format and digest, where they are known."""
    parts = [str(corpus[name])[:16] for name in ("format", "digest") if corpus.get(name)]
    return f"{', digest '.join(parts)}, " if parts else ""


def _totals_table(found: Sequence[ModalitySummary], wide: bool) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("modality", overflow="fold")
    names = ["shards", *(["rows"] if wide else []), "present", "quarantined", "size", "time", "GPU"]
    for name in [*names, *(["attempts", "codes used"] if wide else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    for m in found:
        shards = f"{m.shards:,}" if not m.missing else f"{m.shards:,} of {m.shards + m.missing:,}"
        bad = sum(m.quarantined.values())
        present = f"{m.present:,} ({human_share(m.present, m.rows)})" if wide else human_share(m.present, m.rows)
        cells = [
            shards,
            *([f"{m.rows:,}"] if wide else []),
            present,
            f"{bad:,}" if bad else "",
            human_bytes(m.num_bytes),
        ]
        cells += [human_seconds(m.spent.get("seconds", 0)), human_seconds(m.spent.get("gpu_seconds", 0))]
        table.add_row(m.name, *cells, *([f"{m.spent.get('attempts', 0):,.0f}", _codes(m)] if wide else []))
    _add_sums(table, found, wide)
    return table


def _codes(m: ModalitySummary) -> str:
    return f"{m.used:,} of {m.vocabulary:,}" if m.used is not None and m.vocabulary else ""


def _add_sums(table: Any, found: Sequence[ModalitySummary], wide: bool) -> None:
    table.add_section()
    spent = {name: sum(m.spent.get(name, 0) for m in found) for name in ("seconds", "gpu_seconds", "attempts")}
    cells = [f"{sum(m.shards for m in found):,}", *([""] if wide else []), ""]
    cells += [f"{bad:,}" if (bad := sum(sum(m.quarantined.values()) for m in found)) else ""]
    cells += [human_bytes(sum(m.num_bytes for m in found)), human_seconds(spent["seconds"])]
    table.add_row("all", *cells, human_seconds(spent["gpu_seconds"]), *([f"{spent['attempts']:,.0f}"] if wide else []))


def _makers_table(found: Sequence[ModalitySummary], wide: bool) -> Any:
    """One line for each recipe: those of a component that makes several modalities are one line."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from fourmill.pipeline.manifest.show import described, licences

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("modality", "made by", *(["recipe"] if wide else []), "licence of code, of weights"):
        table.add_column(name, overflow="fold")
    makers: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for m in found:
        for (recipe, shards), producer in zip(m.recipes.items(), m.producers, strict=True):
            share = f" ({shards:,} shards)" if len(m.recipes) > 1 else ""
            makers.setdefault(recipe, (producer, []))[1].append(f"{m.name}{share}")
    for recipe, (producer, names) in makers.items():
        bound = ", ".join(filter(None, licences(producer)))
        cells = (", ".join(names), described(producer), *([recipe] if wide else []), bound)
        table.add_row(*map(escape, cells))
    return table


# Lineage


def _show_lineage(manifest: Manifest, name: str, as_json: bool) -> None:
    from fourmill.pipeline.manifest.show import lineage

    trees = lineage(manifest, name)
    if as_json:
        found = {"snapshot": manifest.snapshot, "corpus": manifest.corpus, "lineage": [t.to_json() for t in trees]}
        print(json.dumps(found, indent=1))
        return
    out = console()
    for tree in trees:
        out.print(_drawn(tree, manifest.corpus, set()), highlight=False)


def _drawn(node: Ancestor, corpus: Mapping[str, Any], seen: set[str], parent: Tree | None = None) -> Tree:
    """What a modality was made of below it; what occurs twice is spelt out once."""
    from rich.markup import escape
    from rich.tree import Tree

    again = node.recipe in seen
    words = f"[bold]{escape(node.modality)}[/bold] {escape(_by(node))}{' (as above)' if again else ''}"
    tree = Tree(words) if parent is None else parent.add(words)
    if again:
        return tree
    seen.add(node.recipe)
    for line in _facts(node, corpus):
        tree.add(f"[dim]{escape(line)}[/dim]")
    for part in node.inputs:
        _drawn(part, corpus, seen, tree)
    return tree


def _by(node: Ancestor) -> str:
    from fourmill.pipeline.manifest.show import described

    shards = f", {node.shards:,} shards" if node.shards is not None else ""
    return f"by {described(node.producer)}, recipe {node.recipe}{shards}" if node.producer else "of unknown making"


def _facts(node: Ancestor, corpus: Mapping[str, Any]) -> list[str]:
    """Everything that a lineage says besides class, version and inputs, and of an ingested modality, the corpus."""
    producer = node.producer
    checkpoint = producer.get("checkpoint")
    lines = [f"licence of the code: {producer['licence']}"] if producer.get("licence") else []
    if isinstance(checkpoint, Mapping):
        lines.append(f"weights: {checkpoint.get('reference', '?')}, licence: {checkpoint.get('licence', 'unknown')}")
        lines.append(f"digest of the weights: {checkpoint.get('digest', '?')}")
    known = ("class", "version", "inputs", "licence", "checkpoint")
    for name, value in sorted(producer.items()):
        if name not in known:
            lines.append(f"{name}: {value if isinstance(value, str) else json.dumps(value, sort_keys=True)}")
    if not node.inputs:
        lines += [
            f"corpus {name}: {_short(corpus[name])}" for name in ("sources", "digest", "settings") if name in corpus
        ]
    return lines


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


# History and tables


def _show_history(manifest: Manifest, last: int, as_json: bool) -> None:
    from rich.markup import escape
    from rich.padding import Padding

    from fourmill.pipeline.manifest.show import history

    found = history(manifest.store, last, manifest.snapshot)
    if as_json:
        print(json.dumps({"snapshots": [change.to_json() for change in found]}, indent=1))
        return
    out = console()
    for change in found:
        out.print(_headline(change), highlight=False)
        for words, names in (change.changes or {"nothing that is counted": []}).items():
            line = escape(f"{words}{': ' if names else ''}{', '.join(names)}")
            out.print(Padding(line, (0, 0, 0, 4), expand=False), highlight=False)


def _headline(change: Change) -> str:
    return (
        f"[bold]snapshot {change.snapshot}[/bold] {change.created}: {change.samples:,} samples, "
        f"{change.shards:,} shard objects, {human_bytes(change.num_bytes)}"
    )


def _show_tables(manifest: Manifest, as_json: bool) -> None:
    from fourmill.pipeline.manifest.samples import table_uris

    found = table_uris(manifest)
    if as_json:
        print(json.dumps({"snapshot": manifest.snapshot, **found}, indent=1))
        return
    for kind, uris in found.items():
        print(f"{kind}:")
        for uri in uris:
            print(f"  {uri}")
