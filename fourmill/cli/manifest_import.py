"""`fourmill manifest import`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fourmill.cli.manifest import manifest_app
from fourmill.cli.manifest_export import progress
from fourmill.cli.options import AsJson, console

if TYPE_CHECKING:
    from fourmill.pipeline.exchange import ImportReport


@manifest_app.command("import")
def manifest_import(
    src: Annotated[str, typer.Argument(help="An export of ours, or an ml-4m folder: a path or s3://bucket/prefix.")],
    dataset: Annotated[str, typer.Argument(help="The dataset to make: a path or s3://bucket/prefix.")],
    rename: Annotated[
        list[str] | None, typer.Option(help="What an ml-4m folder holds: FOLDER=MODALITY. May be repeated.")
    ] = None,
    skip_unknown: Annotated[bool, typer.Option("--skip-unknown", help="Leave folders that match no modality.")] = False,
    keep_misaligned: Annotated[
        bool, typer.Option("--keep-misaligned", help="Samples that a modality lacks become nulls, not an error.")
    ] = False,
    map_size: Annotated[int, typer.Option(help="Side of maps that are cut out of whole pictures.", min=16)] = 224,
    shard_size: Annotated[int, typer.Option(help="Samples per shard of what comes as single files.", min=1)] = 1000,
    workers: Annotated[int | None, typer.Option(help="Shards at a time; default 4, or the CPUs.", min=1)] = None,
    as_json: AsJson = False,
) -> int:
    """Make a dataset of an export or of an ml-4m folder. Exit code 1 if it contradicts itself or holds unreadable
    values.

    fourmill manifest import /data/cc12m-4m s3://bucket/dataset --rename caption=alt_text --skip-unknown
    """
    from fourmill.pipeline.exchange import ImportOptions, ReadOptions, WrongDataError, import_dataset

    read = ReadOptions(_renames(rename or []), skip_unknown, keep_misaligned, map_size, shard_size)
    options = ImportOptions(read) if workers is None else ImportOptions(read, workers)
    try:
        report = import_dataset(src, dataset, options, None if as_json else progress)
    except WrongDataError as error:
        print(f"fourmill: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps({**asdict(report), "ok": report.ok}, indent=1))
    else:
        _show(report)
    return 0 if report.ok else 1


def _renames(texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        folder, equals, name = text.partition("=")
        if not (folder and equals and name):
            raise ValueError(f"bad --rename {text!r}: FOLDER=MODALITY is needed")
        found[folder] = name
    return found


def _show(report: ImportReport) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "", "count", title=Text(f"{report.src} ({report.layout}) -> {report.dataset} snapshot {report.snapshot}")
    )
    table.add_row("modalities", ", ".join(report.modalities))
    table.add_row("samples", str(report.samples))
    table.add_row("shards", str(report.shards))
    if report.renamed:
        table.add_row("keys renamed: taken or unfit", str(report.renamed))
    for reason, count in report.quarantined.items():
        table.add_row(Text(f"quarantined: {reason}"), str(count))
    for folder, why in report.skipped.items():
        table.add_row(Text(f"skipped: {folder}"), Text(why))
    console().print(table)
