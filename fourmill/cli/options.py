"""Arguments and options that several commands share, and what they print with."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

OPEN_END = 1 << 62
"""Above every shard number."""
ConfigOption = Annotated[str, typer.Option("--config", "-c", help="YAML configuration.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides: a.b=value.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, do nothing.")]
Recheck = Annotated[
    bool,
    typer.Option("--recheck", help="Ask the store for every object; make again what was lost."),
]
Dataset = Annotated[str, typer.Argument(help="Dataset: a path or s3://bucket/prefix.")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
At = Annotated[int | None, typer.Option("--at", help="An older snapshot, by number.", min=1)]
OnlyModalities = Annotated[str | None, typer.Option("--modality", help="Only these: depth,tok_depth,…")]


def console() -> Console:
    """Where tables go: as wide as the terminal, or 160 columns where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def parse_names(text: str | None) -> tuple[str, ...] | None:
    """'depth, det' as names; None for all."""
    return tuple(name.strip() for name in text.split(",")) if text else None


def parse_shards(text: str) -> range:
    """'12', or '10:20', the end left out; either end may be open."""
    start, colon, stop = text.partition(":")
    wanted = f"--shards {text!r}: A:B with shard numbers is needed, such as 0:100, 500: or 17"
    try:
        first = int(start or 0)
        last = (int(stop) if stop else OPEN_END) if colon else first + 1
    except ValueError as error:
        raise ValueError(wanted) from error
    if first < 0 or last <= first:
        raise ValueError(f"{wanted}, and A below B")
    return range(first, last)


WithConfig = Annotated[
    str | None, typer.Option("--config", "-c", help="Configuration that names tokenizers; else the manifest's lineage.")
]
