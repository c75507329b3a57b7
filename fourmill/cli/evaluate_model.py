"""`fourmill evaluate model`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from fourmill.cli.options import Dataset, parse_names

_EVERY_S = 5.0


def evaluate_model(
    checkpoint: Annotated[str, typer.Argument(help="The model: a folder, s3:// URI or hub id.")],
    dataset: Dataset,
    truth: Annotated[
        str | None, typer.Option(help="Truth as of `evaluate labels`; else scenes rendered again.")
    ] = None,
    given: Annotated[str, typer.Option("--from", help="What the model sees: rgb, or rgb,caption,…")] = "rgb",
    targets: Annotated[
        str | None, typer.Option("--to", help="What it predicts: depth,normal,semseg,det,clip,caption; else all.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Samples, chosen by the hash of their keys; else all of the split.", min=1)
    ] = None,
    split: Annotated[
        Literal["held-out", "all"],
        typer.Option(help="Which samples; 'all' is for datasets that were not trained on, and refused for others."),
    ] = "held-out",
    fit: Annotated[int, typer.Option(help="Training samples that constants are fitted on, at most.", min=1)] = 2048,
    steps: Annotated[int, typer.Option(help="Passes to fill a grid.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest tokens; else they are drawn.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, and of drawn tokens.", min=0)] = 0,
    tokenizer: Annotated[
        list[str] | None, typer.Option("--tokenizer", help="Where a tokenizer lies now: depth=PATH; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    depth_unit: Annotated[float, typer.Option(help="16-bit depth: units in a metre (1000: millimetres).")] = 1000.0,
    eigen_crop: Annotated[bool, typer.Option(help="480 x 640 depth counts inside Eigen's crop only.")] = True,
    json_file: Annotated[
        str | None, typer.Option("--json", help="JSON file; - prints it instead of the table.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("-o", "--out", "--html", help="HTML page: the table, worst, median and best samples.")
    ] = None,
    picture: Annotated[str | None, typer.Option("--picture", help="PNG contact sheet of some samples.")] = None,
) -> int:
    """What a trained model predicts of samples it never saw, against truth, beside the best constant and the teacher.

    Exit code 1 if nothing could be compared, 2 for samples that were trained on.

    fourmill evaluate model runs/demo/model runs/demo/dataset --truth runs/demo/corpus -o model.html

    fourmill evaluate model runs/4m runs/nyu --truth /data/nyu --split all --to depth --json nyu.json
    """
    from fourmill.evaluate.model.page import page_of
    from fourmill.evaluate.model.results import print_model
    from fourmill.evaluate.model.run import Settings
    from fourmill.evaluate.model.run import evaluate_model as run_evaluation
    from fourmill.evaluate.model.sheet import sheet_of
    from fourmill.evaluate.truth import DepthFiles

    settings = Settings(
        parse_names(given) or (),
        parse_names(targets),
        count,
        fit,
        split,
        steps,
        temperature,
        seed,
        tokenizers=tuple(tokenizer or ()),
        device=device,
        depth_files=DepthFiles(depth_unit, eigen_crop),
    )
    found = run_evaluation(checkpoint, dataset, truth, settings, _progress())
    text = json.dumps(found.evaluation.to_json(), indent=1)
    if json_file == "-":
        print(text)
    else:
        print_model(found.evaluation)
    if json_file not in (None, "-"):
        _file(str(json_file)).write_text(text + "\n", encoding="utf-8")
    if out:
        _file(out).write_text(page_of(found), encoding="utf-8")
    if picture:
        sheet_of(found).save(_file(picture), "PNG")
    return 0 if found.evaluation.ok else 1


def _file(name: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _progress() -> Callable[[int, int], None]:
    """Lines on stderr, every few seconds. Rates are from the first report on: before it, all is loaded and fitted."""
    told: list[tuple[float, int]] = []

    def tell(done: int, total: int) -> None:
        now = time.monotonic()
        if told and now - told[-1][0] < _EVERY_S and done < total:
            return
        told.append((now, done))
        (began, first), rest = told[0], ""
        if done > first:
            rate = (done - first) / max(now - began, 1e-9)
            left = (total - done) / rate
            rest = f", {rate:.1f} samples/s, ETA {left // 60:.0f}:{left % 60:02.0f}"
        print(f"{done}/{total} samples{rest}", file=sys.stderr)

    return tell
