"""`fourmill manifest diff`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from fourmill.cli.manifest import manifest_app
from fourmill.cli.options import AsJson, Dataset, OnlyModalities, console, parse_names

if TYPE_CHECKING:
    from fourmill.pipeline.manifest import Manifest
    from fourmill.pipeline.manifest.diff import ManifestDiff, ModalityDiff
    from fourmill.pipeline.manifest.diff_samples import SampleDiff


@manifest_app.command("diff")
def manifest_diff(
    a: Dataset,
    b: Annotated[str | None, typer.Argument(help="The other dataset; else two snapshots of the same.")] = None,
    at: Annotated[
        int | None, typer.Option("--at", help="Snapshot of A; with one dataset the one before B's if not given.", min=1)
    ] = None,
    to: Annotated[int | None, typer.Option("--to", help="Snapshot of B; the newest if not given.", min=1)] = None,
    samples: Annotated[
        int, typer.Option("--samples", help="Read changed shards; list so many differing samples a modality.", min=0)
    ] = 0,
    modality: OnlyModalities = None,
    as_json: AsJson = False,
) -> int:
    """What differs between two snapshots or two datasets. Exit code 0 if nothing does, 1 if something does.

    fourmill manifest diff runs/demo/dataset

    fourmill manifest diff s3://bucket/dataset --at 3 --to 5 --samples 10

    fourmill manifest diff /data/before s3://bucket/after --modality depth,tok_depth --json
    """
    from fourmill.pipeline.manifest.diff import diff

    one, two = _opened(a, b, at, to)
    found = diff(one, two, parse_names(modality), samples)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        _print(found)
    return 0 if found.equal else 1


def _opened(a: str, b: str | None, at: int | None, to: int | None) -> tuple[Manifest, Manifest]:
    from fourmill.pipeline.manifest import read_manifest, snapshots
    from fourmill.pipeline.store import open_store

    two = read_manifest(open_store(b or a), to)
    if b is None and at is None:
        before = [n for n in snapshots(two.store) if n < two.snapshot]
        if not before:
            raise ValueError(f"snapshot {two.snapshot} of {a} is the first there is: name another dataset, or --at N")
        at = before[-1]
    return read_manifest(open_store(a), at), two


def _print(found: ManifestDiff) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    for letter, (uri, snapshot) in (("A", found.a), ("B", found.b)):
        out.print(f"{letter}: {escape(uri)}, snapshot {snapshot}", highlight=False)
    for words in found.corpus:
        out.print(f"corpus: {escape(words)}", highlight=False)
    if found.retried:
        out.print(f"put back into the plan: {found.retried} shards whose quarantined rows are to be tried again")
    if found.modalities:
        table = Table("modality", "shards", "what", show_lines=True)
        for item in found.modalities:
            table.add_row(escape(item.name), _counts(item), escape(_words(item)))
        out.print(table)
    for item in found.modalities:
        if item.samples is not None:
            _print_samples(item.name, item.samples)
    same = f"the same: {', '.join(found.same)}" if found.same else "no modality is the same"
    out.print(f"{same} ({found.tables_read} record tables read)", highlight=False)


def _counts(item: ModalityDiff) -> str:
    """'4 changed (0, 1, 2, 3)', a line for each kind of change, with the first shards' numbers."""
    lines = []
    for what in ("changed", "added", "removed"):
        if count := getattr(item.shards, what):
            first = item.shards.first[what]
            lines.append(f"{count:,} {what} ({', '.join(map(str, first))}{', …' if count > len(first) else ''})")
    lines += [f"{item.shards.same:,} the same"] if item.shards.same else []
    return "\n".join(lines)


def _words(item: ModalityDiff) -> str:
    lines = [f"the modality is {item.kind}"] if item.kind != "changed" else []
    lines += item.producers
    if item.present[0] != item.present[1]:
        lines.append(f"present: {item.present[0]:,} → {item.present[1]:,} samples")
    if item.shards.other_keys:
        lines.append(f"{item.shards.other_keys:,} shards hold other keys, or in another order")
    lines += [f"quarantined, {reason}: {old:,} → {new:,}" for reason, (old, new) in item.quarantined.items()]
    return "\n".join(lines)


def _print_samples(name: str, found: SampleDiff) -> None:
    from rich.markup import escape
    from rich.table import Table

    read = f"{found.rows_changed:,} of {found.rows_same + found.rows_changed:,} samples differ"
    read += f"; changed shards read: {found.shards_read:,}"
    if found.shards_left:
        read += f", not read: {found.shards_left:,}"
    out = console()
    out.print(f"{escape(name)}: {read}", highlight=False)
    for problem in found.problems:
        out.print(f"  not compared: {escape(problem)}", highlight=False)
    if found.changes:
        table = Table("key", "shard", "row", "difference")
        for change in found.changes:
            table.add_row(escape(change.key), str(change.shard), str(change.row), escape(change.what))
        out.print(table)
