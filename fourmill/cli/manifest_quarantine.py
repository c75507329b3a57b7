"""`fourmill manifest quarantine`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from fourmill.cli.manifest import manifest_app
from fourmill.cli.options import AsJson, At, Dataset, OnlyModalities, console, parse_names, parse_shards
from fourmill.cli.units import human_count, human_share, plain

if TYPE_CHECKING:
    from fourmill.pipeline.manifest import Manifest
    from fourmill.pipeline.manifest.quarantine import Choice, Retry


@manifest_app.command("quarantine")
def manifest_quarantine(
    dataset: Dataset,
    at: At = None,
    modality: OnlyModalities = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Only these, by first words: decode,…")] = None,
    shards: Annotated[str | None, typer.Option("--shards", help="Only these: 12, or 10:20.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every row with its key and full reason.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Put the shards of these rows back into the plan.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --retry: say what it would do.")] = False,
    as_json: AsJson = False,
) -> None:
    """Rows that could not be made: how many, and why; --keys: which; --retry: put them back into the plan.

    fourmill manifest quarantine s3://bucket/dataset

    fourmill manifest quarantine s3://bucket/dataset --modality depth --reason "out of memory" --keys

    fourmill manifest quarantine s3://bucket/dataset --modality depth --retry --dry-run
    """
    from fourmill.pipeline.manifest import read_manifest
    from fourmill.pipeline.manifest.quarantine import Choice
    from fourmill.pipeline.store import open_store

    if dry_run and not retry:
        raise ValueError("--dry-run says what --retry would do: give both")
    if retry and (keys or at is not None):
        raise ValueError("--retry changes the newest snapshot and lists no rows: leave --at and --keys away")
    choice = Choice(parse_names(modality), parse_names(reason), parse_shards(shards) if shards else None)
    store = open_store(dataset)
    if retry:
        _retry(dataset, choice, dry_run, as_json)
    elif keys:
        _list_rows(read_manifest(store, at), choice, as_json)
    else:
        _count(dataset, read_manifest(store, at), choice, as_json)


def _count(dataset: str, manifest: Manifest, choice: Choice, as_json: bool) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from fourmill.pipeline.manifest.quarantine import reasons

    found = reasons(manifest, choice)
    if as_json:
        print(json.dumps({"snapshot": manifest.snapshot, "quarantined": [r.to_json() for r in found]}, indent=1))
        return
    out = console()
    if not found:
        out.print(f"{escape(dataset)}: nothing is in quarantine", highlight=False)
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("modality", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("of its rows", justify="right")
    table.add_column("reason", overflow="fold")
    for line in found:
        share = human_share(line.rows, manifest.totals(line.modality).rows)
        table.add_row(line.modality, f"{line.rows:,}", share, escape(line.reason))
    out.print(table)
    out.print("--keys lists the rows; --retry puts their shards back into the plan")


def _list_rows(manifest: Manifest, choice: Choice, as_json: bool) -> None:
    """Line by line, since there can be millions."""
    from fourmill.pipeline.manifest.quarantine import rows

    found = rows(manifest, choice)
    if not as_json:
        for row in found:
            print(f"{row.modality} shard {row.shard} {plain(row.key)}: {plain(row.reason)}")
        return
    print(f'{{"snapshot": {manifest.snapshot}, "rows": [')
    separator = ""
    for row in found:
        print(separator + json.dumps(row.to_json()), end="")
        separator = ",\n"
    print("\n]}")


def _retry(dataset: str, choice: Choice, dry_run: bool, as_json: bool) -> None:
    from fourmill.pipeline.manifest import read_manifest
    from fourmill.pipeline.manifest.quarantine import plan_retry, retry
    from fourmill.pipeline.store import open_store

    store = open_store(dataset)
    if dry_run:
        manifest = read_manifest(store)
        plan = plan_retry(manifest, choice)
    else:
        plan, manifest = retry(store, choice)
    if as_json:
        print(json.dumps({"snapshot": manifest.snapshot, "dry_run": dry_run, **plan.to_json()}, indent=1))
        return
    _print_retry(plan, manifest, dry_run)


def _print_retry(plan: Retry, manifest: Manifest, dry_run: bool) -> None:
    out = console()
    for name, count in plan.rows.items():
        shards = human_count(len(plan.shards[name]), "shard")
        out.print(f"{name}: to be tried again: {human_count(count, 'row')} in {shards}", highlight=False)
    for name, count in plan.pending.items():
        shards = human_count(count, "shard")
        out.print(f"{name}: waiting to be made again already: {shards}: run the job", highlight=False)
    for name, count in plan.refused.items():
        out.print(
            f"{name}: {human_count(count, 'row')} cannot be tried again here, but came so with the corpus: mend it and "
            "ingest it into another dataset",
            highlight=False,
        )
    for name, (number, rows) in plan.redone.items():
        numbers = f"{human_count(number, 'shard')}, {human_count(rows, 'row')}"
        out.print(f"  makes again {name}: {numbers}", highlight=False)
    if not plan.shards:
        out.print("nothing to put back into the plan")
    elif dry_run:
        out.print("nothing was changed (--dry-run)")
    else:
        out.print(f"snapshot {manifest.snapshot} is published; run the job again to make them", highlight=False)
