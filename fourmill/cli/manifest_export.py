"""`fourmill manifest export`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fourmill.cli.manifest import manifest_app
from fourmill.cli.options import OPEN_END, AsJson, At, Dataset, OnlyModalities, console, parse_names, parse_shards

if TYPE_CHECKING:
    from fourmill.pipeline.exchange import ExportReport

_FORMATS = "ml4m (tars), ml4m-files, ml4m-crops, webdataset, energon, parquet"


@manifest_app.command("export")
def manifest_export(
    dataset: Dataset,
    out: Annotated[str, typer.Argument(help="Empty place for the export: a path or s3://bucket/prefix.")],
    format_name: Annotated[str, typer.Option("--format", "-f", help=f"Layout: {_FORMATS}.")],
    modality: OnlyModalities = None,
    shards: Annotated[str, typer.Option(help="Only shards A:B, B left out; either may be missing.")] = ":",
    shard_size: Annotated[int | None, typer.Option(help="Samples per output shard; else the dataset's.", min=1)] = None,
    incomplete: Annotated[
        str | None, typer.Option(help="Samples that lack a modality: drop or keep. ml4m and energon hold none.")
    ] = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="Also modalities that several generations have made.")] = False,
    split: Annotated[str, typer.Option(help="What the samples are called in Parquet and Energon.")] = "train",
    workers: Annotated[int | None, typer.Option(help="Shards at a time; default 4, or the CPUs.", min=1)] = None,
    at: At = None,
    as_json: AsJson = False,
) -> int:
    """Write a snapshot in a layout that other tools read, with its lineage and licences. Run again, it goes on where
    it stopped. Exit code 1 if no sample is left to export, or the dataset's objects are not what its records say.

    fourmill manifest export s3://bucket/dataset /data/4m --format ml4m --modality rgb,caption,det,tok_depth

    fourmill manifest export DATASET s3://bucket/hf --format parquet --incomplete keep --json | jq .dropped
    """
    from fourmill.pipeline.exchange import ExportOptions, WrongDataError, export_dataset

    start, stop = _range(shards)
    names = parse_names(modality)
    options = ExportOptions(
        format_name, names, start, stop, shard_size, _keep(incomplete), at, mixed, split, **_given(workers)
    )
    try:
        report = export_dataset(dataset, out, options, None if as_json else progress)
    except WrongDataError as error:
        print(f"fourmill: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps({**asdict(report), "ok": report.ok}, indent=1))
    else:
        _show(report)
    return 0 if report.ok else 1


def _given(workers: int | None) -> dict[str, int]:
    return {} if workers is None else {"workers": workers}


def progress(shards: int, samples: int) -> None:
    """A line that renews itself, where there is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{shards} shards, {samples} samples", end="", file=sys.stderr, flush=True)


def _range(text: str) -> tuple[int, int | None]:
    if ":" not in text:
        raise ValueError(f"bad --shards {text!r}: A:B is needed, such as 0:100, :100 or 100:")
    shards = parse_shards(text)
    return shards.start, None if shards.stop == OPEN_END else shards.stop


def _keep(text: str | None) -> bool | None:
    if text not in (None, "drop", "keep"):
        raise ValueError(f"bad --incomplete {text!r}: drop or keep")
    return None if text is None else text == "keep"


def _show(report: ExportReport) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "", "count", title=Text(f"{report.dataset} snapshot {report.snapshot} -> {report.out} ({report.format})")
    )
    table.add_row("modalities", ", ".join(report.modalities))
    table.add_row("samples", str(report.samples))
    resumed = f" ({report.resumed} stood there already)" if report.resumed else ""
    table.add_row("shards", f"{report.shards}{resumed}")
    table.add_row("MB", f"{report.num_bytes / 1e6:.2f}")
    for title, counts in (("dropped", report.dropped), ("changed", report.notes)):
        for reason, count in counts.items():
            table.add_row(Text(f"{title}: {reason}"), str(count))
    console().print(table)
