"""`fourmill labelers`, `labelers check` and `tokenizers`: what a configuration can name."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fourmill.cli.options import AsJson

labelers_app = typer.Typer(invoke_without_command=True, help="The teachers: what can be named, at what cost; try one.")


@labelers_app.callback()
def labelers(context: typer.Context, as_json: AsJson = False) -> None:
    """List labelers and teachers: checkpoint, licences, cost of an image, whether it is on this machine.

    fourmill labelers check demo:depth
    """
    if context.invoked_subcommand is None:
        _list_teachers(as_json)


@labelers_app.command("check")
def labelers_check(
    id: Annotated[str, typer.Argument(help="A teacher of the table, or a labeler with checkpoint=… after it.")],
    options: Annotated[list[str] | None, typer.Argument(help="Options of the labeler: name=value.")] = None,
    image: Annotated[str | None, typer.Option(help="A photo; by default a rendered scene.")] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="PNG: the photo and its labels.")] = None,
    size: Annotated[int, typer.Option(help="Side of the crop in pixels.", min=16)] = 224,
    batch: Annotated[int, typer.Option(help="Pictures in the batch that is timed.", min=1)] = 4,
    as_json: AsJson = False,
) -> int:
    """Load one teacher, run it on one photo, time it, check what it gives, draw it. Exit code 1 if the output is bad.

    fourmill labelers check depth checkpoint=/models/dpt output=inverse --image photo.jpg -o depth.png
    """
    from dataclasses import asdict

    from fourmill.labelers.check import check

    checked = check(id, image, out, _options(options or []), size, batch)
    print(json.dumps(asdict(checked), indent=1) if as_json else checked)
    return 1 if checked.problems else 0


def _options(texts: Sequence[str]) -> dict[str, Any]:
    import yaml

    pairs = [text.partition("=") for text in texts]
    if bad := [text for text, pair in zip(texts, pairs, strict=True) if not pair[1]]:
        raise ValueError(f"option {bad[0]!r}: give name=value")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def _list_teachers(as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from fourmill.labelers import LABELERS
    from fourmill.labelers.catalogue import rows

    found = rows()
    if as_json:
        print(json.dumps({"labelers": list(LABELERS.table), "teachers": found}, indent=1))
        return
    _list_components(LABELERS.table)
    table = Table()
    for heading in ("teacher", "labeler", "makes", "checkpoint", "code", "weights", "M", "px", "GFLOP", "MB", "here"):
        table.add_column(heading, overflow="fold")  # whole names, so that they can be copied
    for r in found:
        numbers = [f"{r[n]:g}" if r[n] is not None else "" for n in ("millions", "pixels", "gflops", "megabytes")]
        makes = " ".join(r["makes"])
        here = "yes" if r["present"] else ""
        table.add_row(r["id"], r["labeler"], makes, r["checkpoint"], r["code"], r["weights"], *numbers, here)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print("code, weights: licences. M: million parameters. px: side of the network's input. GFLOP and MB of")
    console.print("activations: for one image, float32. here: the checkpoint is on this machine.")


def tokenizers() -> None:
    """List the tokenizers that a configuration can name."""
    from fourmill.tokenizers import TOKENIZERS

    _list_components(TOKENIZERS.table)


def _list_components(table: dict[str, str]) -> None:
    import importlib

    for kind, path in table.items():
        doc = importlib.import_module(path.partition(":")[0]).__doc__ or ""
        print(f"{kind:16} {doc.splitlines()[0]}")
