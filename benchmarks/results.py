"""Writes docs/results.md: what a model trained on the factory's tokens of scenes has learnt, beside its teachers.

    python benchmarks/results.py MODEL EVALUATION.json --out docs

MODEL is the folder that `fourmill pretrain --config configs/scenes20k.yaml` leaves; EVALUATION.json comes from
`fourmill evaluate model MODEL DATASET --json EVALUATION.json`. Every figure on the page is one of theirs, and the page
names the commands in order.
"""

from __future__ import annotations

import sys

# Import from the root: benchmarks/tokenize.py, beside this file, would hide the standard library's.
sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TEXT = Path(__file__).with_name("results.md.txt")  # the words around the tables
_KEPT: dict[str, tuple[str, ...]] = {
    "depth": ("absrel", "delta1"),
    "normal": ("mean", "below_30"),
    "semseg": ("miou",),
    "det": ("ap50", "f1_50"),
}
"""The figures of the first table; the second one has all that the evaluation prints."""


def plot(metrics: dict[str, Any], path: Path) -> None:
    """Held-out loss by modality over training, dashed the loss of predicting token frequencies."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    curve = [point for point in metrics["curve"] if point.get("held_out")]
    names = list(metrics["held_out"])
    columns = 4
    figure, axes = pyplot.subplots(2, columns, figsize=(12, 5.2), sharex=True, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        axis.plot([p["step"] for p in curve], [p["held_out"][name] for p in curve], marker="o", markersize=3)
        axis.axhline(metrics["frequencies"][name], color="grey", linestyle="--", linewidth=1)
        axis.set_title(name, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    last = axes.flat[len(names)]
    last.plot([p["step"] for p in metrics["curve"]], [p["loss"] for p in metrics["curve"]], linewidth=1)
    last.set_title("training loss, mean of modalities", fontsize=10)
    last.set_ylim(bottom=0)
    last.grid(alpha=0.3)
    for axis in axes.flat[len(names) + 1 :]:
        axis.set_visible(False)
    figure.supxlabel("steps", fontsize=10)
    figure.supylabel("nats a token on held-out scenes", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def figures(evaluation: dict[str, Any], kept: dict[str, tuple[str, ...]] | None) -> str:
    """One row a figure: constant, 4M, ceiling of the tokens, teacher, share of the way."""
    from fourmill.evaluate.model.results import HEADINGS, ModalityScore, Row, cells, figure_title

    rows = []
    for score in evaluation["scores"]:
        of = ModalityScore(score["modality"], score["tokens"], score["protocol"])
        for tree in score["rows"]:
            if kept is not None and tree["figure"] not in kept.get(score["modality"], ()):
                continue
            row = Row(**{name: _typed(name, tree[name]) for name in Row.__dataclass_fields__})
            rows.append([score["modality"], figure_title(of, row), *cells(row)])
    return table(["", "figure", *HEADINGS], rows)


def _typed(name: str, value: Any) -> Any:
    """JSON has lists for intervals, and null where a figure could not be taken."""
    if name.endswith("_interval"):
        return None if value is None else tuple(value)
    return float("nan") if value is None else value


def tokens(metrics: dict[str, Any]) -> str:
    """Held-out loss of training beside token frequencies."""
    rows = [[name, f"{loss:.3f}", f"{metrics['frequencies'][name]:.3f}"] for name, loss in metrics["held_out"].items()]
    return table(["tokens", "4M, nats a token", "token frequencies"], rows)


def main() -> None:
    """Writes the page and its curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.md and images/results-curves.png")
    args = parser.parse_args()
    metrics = json.loads((args.model / "metrics.json").read_text())
    evaluation = json.loads(args.evaluation.read_text())
    plot(metrics, args.out / "images" / "results-curves.png")
    page = TEXT.read_text(encoding="utf-8").format(
        main=figures(evaluation, _KEPT),
        whole=figures(evaluation, None),
        tokens=tokens(metrics),
        samples=evaluation["samples"],
        steps=metrics["steps"],
        millions=f"{metrics['parameters'] / 1e6:.1f}",
        hours=f"{metrics['seconds'] / 3600:.1f}",
    )
    (args.out / "results.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
