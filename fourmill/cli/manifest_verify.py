"""`fourmill manifest verify`."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Annotated

import typer

from fourmill.cli.manifest import manifest_app
from fourmill.cli.options import AsJson, At, Dataset, OnlyModalities, parse_names, parse_shards

_PLAIN_EVERY_S = 10.0
_SMALL = 256 << 20  # bytes that one process has read before others have started


@manifest_app.command("verify")
def manifest_verify(
    dataset: Dataset,
    deep: Annotated[bool, typer.Option("--deep", help="Read every object: digests, keys, values.")] = False,
    modality: OnlyModalities = None,
    shards: Annotated[str | None, typer.Option(help="Only shards A:B, from A up to, not with, B.")] = None,
    sample: Annotated[float, typer.Option(help="Only this share of the shards, the same at every call.")] = 1.0,
    resume: Annotated[
        str | None, typer.Option(help="With --deep: a local file that remembers what was sound, to go on from.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="With --deep: processes; one for each core if not given.", min=1)
    ] = None,
    at: At = None,
    as_json: AsJson = False,
) -> int:
    """Whether the dataset is what its manifest says. Exit code 1 if it is not; warnings do not count.

    Quick by default: the manifest against itself, and existence and size of every object. Examples:

    fourmill manifest verify s3://bucket/x

    fourmill manifest verify /data/x --deep --resume x.journal

    fourmill manifest verify /data/x --deep --modality depth,tok_depth --sample 0.01 --json
    """
    from fourmill.pipeline.manifest import read_manifest
    from fourmill.pipeline.manifest.verify import Options, Selection, verify
    from fourmill.pipeline.store import open_store

    if resume and not deep:
        raise ValueError("--resume without --deep has nothing to resume: the quick verification reads no object")
    store = open_store(dataset)
    manifest = read_manifest(store, at)
    names = parse_names(modality)
    selection = Selection(names, _run_of(shards), sample)
    totals = [manifest.totals(name) for name in selection.names(manifest)]
    small = sum(t.num_bytes for t in totals) * sample < _SMALL
    workers = processes or (1 if small else os.cpu_count() or 1)
    progress = _Progress(sum(t.shards for t in totals))
    outcome = verify(store, manifest, Options(deep, selection, workers, resume=resume), progress.tick)
    progress.end()
    print(json.dumps(outcome.to_json(), indent=1) if as_json else outcome)
    return 0 if outcome.ok else 1


def _run_of(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    shards = parse_shards(text)
    return shards.start, shards.stop


class _Progress:
    """Objects done and bytes read, on stderr: one line that is written anew, or a line now and then in a log."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.num_bytes = total, 0, 0
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def tick(self, objects: int, num_bytes: int) -> None:
        self.done += objects
        self.num_bytes += num_bytes
        if time.monotonic() - self.shown > (0.2 if self.live else _PLAIN_EVERY_S):
            self.shown = time.monotonic()
            print(self._line(), end="\r" if self.live else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.live and self.shown > self.started:
            print(" " * len(self._line()), end="\r", file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self.started
        rate = self.num_bytes / 1e6 / seconds
        left = (self.total - self.done) * seconds / max(self.done, 1)
        return (
            f"{self.done:,} of {self.total:,} objects, {rate:,.0f} MB/s, {seconds:,.0f} s, at most {left:,.0f} s left"
        )
