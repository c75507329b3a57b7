"""`fourmill evaluate labels`, `evaluate tokens`, `decode`: what the commands do, once their arguments are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fourmill.config import Config
from fourmill.evaluate.labels import evaluate_labels
from fourmill.evaluate.results import print_table
from fourmill.evaluate.truth import DepthFiles
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.store import open_store


def run_evaluate_labels(
    dataset: str,
    truth: str | None = None,
    labels: Sequence[str] | None = None,
    count: int | None = None,
    out: str | None = None,
    as_json: bool = False,
    depth_per_metre: float = 1000.0,
    eigen_crop: bool = True,
) -> int:
    """Print figures as a table or as JSON, write the page at `out`; 1 if nothing could be compared, else 0."""
    files = DepthFiles(depth_per_metre, eigen_crop)
    evaluation = evaluate_labels(dataset, truth, labels, count, depth_files=files)
    if as_json:
        print(json.dumps(evaluation.to_json(), indent=1))
    else:
        print_table(evaluation)
    if out:
        from fourmill.evaluate.page import write_page

        page = write_page(evaluation, out, truth, files)
        if not as_json:
            print(f"report: {page}")
    return 0 if evaluation.ok else 1


def run_evaluate_tokens(
    dataset: str,
    truth: str | None = None,
    modalities: Sequence[str] | None = None,
    count: int | None = None,
    config: Config | None = None,
    checkpoints: Sequence[str] = (),
    rfid_network: str | None = None,
    json_file: str | None = None,
    html_file: str | None = None,
) -> int:
    """Print figures as a table, write them as JSON ('-': print that instead) and as a page; 1 if nothing could be
    compared, else 0."""
    from fourmill.evaluate.tokens.rebuild import checkpoints_of, producers_of
    from fourmill.evaluate.tokens.results import print_tokens
    from fourmill.evaluate.tokens.run import evaluate_tokens, rebuild_all

    manifest = read_manifest(open_store(dataset))
    loaded = rebuild_all(manifest, producers_of(manifest, modalities), config, checkpoints_of(checkpoints, manifest))
    evaluation = evaluate_tokens(
        dataset, truth, modalities, count, config, rfid_network=rfid_network, rebuilt=loaded, snapshot=manifest.snapshot
    )
    text = json.dumps(evaluation.to_json(), indent=1)
    if json_file == "-":
        print(text)
    else:
        print_tokens(evaluation)
    if json_file not in (None, "-"):
        _write(str(json_file), text + "\n")
    if html_file:
        from fourmill.evaluate.tokens.page import page_of

        _write(html_file, page_of(evaluation, loaded))
        if json_file != "-":
            print(f"report: {html_file}")
    return 0 if evaluation.ok else 1


def _write(file: str, text: str) -> None:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def run_decode(
    dataset: str,
    key: str,
    out: str,
    modalities: Sequence[str] | None = None,
    crop: int = 0,
    config: Config | None = None,
    checkpoints: Sequence[str] = (),
) -> int:
    """Decode one sample's tokens into files and print what was made; 1 if some tokens could not be decoded, else 0."""
    from fourmill.evaluate.tokens.decode import decode_sample
    from fourmill.evaluate.tokens.rebuild import checkpoints_of

    places = checkpoints_of(checkpoints, read_manifest(open_store(dataset)))
    found = decode_sample(dataset, key, out, modalities, crop, config, places)
    table = Table("modality", "tokens", f"files in {escape(out)}", "malformed, notes", show_lines=True)
    for item in found:
        told = [item.failed, *item.malformed, *item.notes]
        table.add_row(
            escape(item.modality), str(item.tokens), *(escape("\n".join(filter(None, t))) for t in (item.files, told))
        )
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
    return 1 if any(item.failed for item in found) else 0
