"""`fourmill manifest sample`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourmill.cli.manifest import manifest_app
from fourmill.cli.options import AsJson, At, Dataset, OnlyModalities, console, parse_names

if TYPE_CHECKING:
    from fourmill.pipeline.manifest import Manifest
    from fourmill.pipeline.manifest.lookup import Place
    from fourmill.pipeline.manifest.sample import SampleReport


@manifest_app.command("sample")
def manifest_sample(
    dataset: Dataset,
    key: Annotated[str | None, typer.Argument(help="The sample's key.")] = None,
    shard: Annotated[int | None, typer.Option(help="With --row instead of a key.", min=0)] = None,
    row: Annotated[int | None, typer.Option(help="Row of the shard, from 0.", min=0)] = None,
    row_number: Annotated[int | None, typer.Option(help="Row of the whole dataset, from 0.", min=0)] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="Folder or s3:// URI for pictures and values.")] = None,
    modality: OnlyModalities = None,
    crop: Annotated[int, typer.Option(help="Which of the sample's crops is drawn.", min=0)] = 0,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="Configuration that names tokenizers; else the lineage's.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option("--checkpoint", help="Where weights lie now: tok_depth=PATH; may be repeated.")
    ] = None,
    at: At = None,
    as_json: AsJson = False,
) -> int:
    """Everything about one sample: labels, tokens, reasons, lineage, licences; with -o also pictures.

    Exit code 1 if tokens could not be decoded back into the folder.

    fourmill manifest sample runs/demo/dataset 00000000000000000042 -o looked-at

    fourmill manifest sample s3://bucket/dataset --row-number 8412077 --json
    """
    from fourmill.pipeline.manifest import read_manifest
    from fourmill.pipeline.manifest.sample import describe_sample
    from fourmill.pipeline.store import open_store

    manifest = read_manifest(open_store(dataset), at)
    place = _place(manifest, key, shard, row, row_number)
    names = parse_names(modality)
    found = describe_sample(manifest, place, names)
    files, notes = _files(manifest, place, out, names, crop, config, checkpoint or ()) if out else ([], [])
    if as_json:
        print(json.dumps({**asdict(found), "files": files, "notes": notes}, indent=1))
    else:
        _print(found)
        _print_files(out, files, notes)
    return 1 if notes else 0


def _place(manifest: Manifest, key: str | None, shard: int | None, row: int | None, row_number: int | None) -> Place:
    """The one sample that was asked for, in one of three ways."""
    from fourmill.pipeline.manifest.lookup import Place, find_key, place_of_row

    by_shard = shard is not None or row is not None
    if (key is not None) + by_shard + (row_number is not None) != 1:
        raise ValueError("name one sample: by its KEY, by --shard and --row, or by --row-number")
    if key is not None:
        return find_key(manifest, key)
    if row_number is not None:
        return place_of_row(manifest, row_number)
    if shard is None or row is None:
        raise ValueError("--shard and --row go together")
    return Place(shard, row)


def _files(
    manifest: Manifest,
    place: Place,
    out: str,
    names: Sequence[str] | None,
    crop: int,
    config: str | None,
    checkpoints: Sequence[str],
) -> tuple[list[str], list[str]]:
    """What was written to the folder, and what could not be."""
    from fourmill.config import load_config
    from fourmill.evaluate.tokens.rebuild import checkpoints_of
    from fourmill.pipeline.manifest.sample_files import write_sample

    loaded = load_config(config, [f"dataset={manifest.store.uri}"]) if config else None
    return write_sample(manifest, place, out, names, crop, loaded, checkpoints_of(checkpoints, manifest))


def _print(found: SampleReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    from fourmill.pipeline.manifest.sample import NOT_COMMERCIAL

    out = console()
    where = f"shard {found.shard}, row {found.row}; row {found.row_number:,} of the dataset"
    out.print(f"[bold]{escape(_printable(found.key))}[/bold]: {where}", highlight=False)
    out.print(f"{escape(found.dataset)}, snapshot {found.snapshot}", highlight=False)
    for name, value in found.source.items():
        if value not in (None, {}, ""):
            out.print(f"  {escape(name)}: {escape(_printable(value))}", highlight=False)
    table = Table("modality", "value", "made by")
    for item in found.held:
        if item.modality == "source":
            continue  # stands above
        value = item.value if item.present else f"none: {item.reason}"
        crops = f" ({item.crops} crops)" if item.crops > 1 else ""
        bound = [line for line in item.licences if NOT_COMMERCIAL in line]
        table.add_row(*map(escape, (item.modality, value + crops, "\n".join([item.made_by, *bound]))))
    out.print(table)
    for line in found.licences:
        out.print(f"  {escape(line)}", highlight=False)
    if found.lacking:
        out.print(f"this shard has no {', '.join(found.lacking)} yet", highlight=False)


def _printable(value: Any) -> str:
    """What a stranger wrote, without its control characters."""
    if isinstance(value, str):
        return value if value.isprintable() else repr(value)
    return json.dumps(value, ensure_ascii=False)


def _print_files(folder: str | None, files: list[str], notes: list[str]) -> None:
    from rich.markup import escape

    out = console()
    if folder:
        out.print(f"{len(files)} files in {escape(folder)}: {escape(', '.join(files))}", highlight=False)
    for note in notes:
        out.print(f"not decoded: {escape(note)}", highlight=False)
