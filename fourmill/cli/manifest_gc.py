"""`fourmill manifest gc`."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated

import typer

from fourmill.cli.manifest import manifest_app
from fourmill.cli.options import AsJson, Dataset, console

if TYPE_CHECKING:
    from fourmill.pipeline.manifest.gc import Collection

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_MEANING = {
    "orphan": "no snapshot names it",
    "stale": "only dropped snapshots name it",
    "temporary": "half-written, its writer is gone",
    "young": "no snapshot names it yet; left for unfinished runs",
    "foreign": "not Fourmill's; never touched",
    "used": "in use",
}


@manifest_app.command("gc")
def manifest_gc(
    dataset: Dataset,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the garbage; else it is only told.")] = False,
    older_than: Annotated[
        str, typer.Option(help="Leave what no snapshot names yet and is younger: 30m, 12h, 7d; 0 if no job runs.")
    ] = "7d",
    keep: Annotated[int | None, typer.Option(help="Drop all but so many of the newest snapshots.", min=1)] = None,
    names: Annotated[bool, typer.Option("--names", help="Name the first objects of each kind.")] = False,
    as_json: AsJson = False,
) -> int:
    """What the store holds that no snapshot needs, by reason and size; with --delete it is removed.

    Snapshots are all kept unless --keep says otherwise. Exit code 1 if a job that ran meanwhile lost an object.

    fourmill manifest gc s3://bucket/dataset

    fourmill manifest gc runs/demo/dataset --keep 1 --older-than 1h --delete
    """
    from fourmill.pipeline.manifest.gc import collect
    from fourmill.pipeline.store import open_store

    found = collect(open_store(dataset), seconds(older_than), keep, delete)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        _print(dataset, found, names)
    return 1 if found.lost else 0


def seconds(text: str) -> float:
    """'7d', '12h', '30m', '90s' or '0' as seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None and text.strip() != "0":
        raise ValueError(f"--older-than {text!r}: give a number and a unit, such as 90s, 30m, 12h or 7d")
    return float(match[1]) * _UNITS[match[2]] if match else 0.0


def _print(dataset: str, found: Collection, names: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    dropped = f", dropped: {len(found.dropped)}" if found.dropped else ""
    out.print(f"{escape(dataset)}: snapshots kept: {len(found.snapshots)}{dropped}", highlight=False)
    table = Table("kind", "objects", "MB", "meaning", "")
    for reason, tally in found.found.items():
        if tally.objects:
            size = f"{tally.num_bytes / 1e6:,.2f}"
            table.add_row(reason, f"{tally.objects:,}", size, _MEANING[reason], _fate(reason, found))
    out.print(table)
    if names:
        for reason, tally in found.found.items():
            if reason != "used":
                for name in tally.names:
                    out.print(f"{reason}: {escape(name)}", highlight=False, soft_wrap=True)
    if found.spared:
        out.print(f"{found.spared} objects came into use meanwhile and were left")
    for name in found.lost:
        out.print(f"LOST: {escape(name)}: a job adopted it just as it was removed; run that job again", highlight=False)
    for note in found.notes:
        out.print(f"note: {escape(note)}", highlight=False)
    if not found.deleted:
        out.print("nothing was removed; --delete removes orphans, stale and temporary objects")


def _fate(reason: str, found: Collection) -> str:
    if reason not in ("orphan", "stale", "temporary"):
        return "kept"
    return "removed" if found.deleted else "would be removed"
