"""What pretraining is worth when labels are few: fine-tuning from a 4M encoder beside the same network from scratch.

    python benchmarks/finetune.py --checkpoint runs/scenes20k/model --out figures.json
    python benchmarks/finetune.py --checkpoint runs/scenes20k/model --tasks depth --seeds 0 --steps 100    # a look

It renders scenes that no training has seen (seed 900), with their exact truth as labels, and brings them into a dataset
of its own. Each task is then learned from few of them, by `fourmill finetune`: from the pretrained encoder and from
random weights, everything else equal, for several seeds, which also draw the samples. The figures are of scenes that
were never trained on. Task `classification`: how many objects there are.
"""

from __future__ import annotations

import sys

# Import from the root: benchmarks/tokenize.py, beside this file, would hide the standard library's.
sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))

import argparse
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fourmill.modalities import modality
from fourmill.model.finetune.config import FinetuneConfig
from fourmill.model.finetune.train import finetune
from fourmill.pipeline import codecs
from fourmill.pipeline.manifest import Update, update_manifest
from fourmill.pipeline.shards import Spec, commit, write_shard
from fourmill.pipeline.store import open_store
from fourmill.scenes import CLASSES, render

SCENES = 900  # the seed of the scenes; the demo's and the recipes' are far below
SPECS = {
    "rgb": Spec(),
    "crop_settings": Spec(),
    "semseg": Spec(classes=CLASSES),
    "depth": Spec(convention="metric"),
    "normal": Spec(convention="opencv"),
    "source": Spec(),
}
TASKS = ("semseg", "depth", "normal", "classification")


def make_dataset(folder: Path, count: int, size: int) -> str:
    """One shard of scenes with truth."""
    values: dict[str, list[Any]] = {name: [] for name in SPECS}
    for index in range(count):
        scene, file = render(SCENES, index, size), io.BytesIO()
        Image.fromarray(scene.image).save(file, "JPEG", quality=92)
        values["rgb"].append(file.getvalue())
        values["crop_settings"].append(np.array([0, 0, size, size, 0], np.int32))
        values["semseg"].append(scene.semantic)
        values["depth"].append(scene.depth)
        values["normal"].append(np.ascontiguousarray(scene.normals.transpose(2, 0, 1)))
        values["source"].append({"objects": len(scene.objects)})
    store, keys = open_store(folder), [f"scene-{SCENES}-{index}" for index in range(count)]
    producer = {"class": "fourmill.scenes", "version": 1}
    records = []
    for name, spec in SPECS.items():
        column = [codecs.encode(modality(name), value) for value in values[name]]
        records.append(commit(store, write_shard(name, 0, "0" * 16, keys, [column], spec, producer, {})))
    update_manifest(store, lambda _: Update(records, {r.producer: producer for r in records}))
    return str(folder)


def config_of(args: argparse.Namespace, dataset: str, out: Path, **chosen: Any) -> FinetuneConfig:
    """One run."""
    field: dict[str, Any] = {"label_field": "objects"} if chosen["task"] == "classification" else {}
    return FinetuneConfig(
        **field,
        **chosen,
        out=str(out),
        checkpoint=args.checkpoint,
        dataset=dataset,
        image_size=args.size,
        train_samples=args.samples,
        held_out=args.held_out / args.scenes,
        batch_size=args.batch,
        steps=args.steps,
        warmup=args.steps // 10,
        lr=args.lr,
        head_width=48,
        head_depth=1,
        num_threads=args.threads,
        eval_every=args.steps,
        checkpoint_every=args.steps,
        tensorboard=False,
    )


def compare(args: argparse.Namespace) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Held-out figures by task and by the encoder's initial weights, one for each seed."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder) / "dataset", args.scenes, args.size)
        for task in args.tasks:
            found[task] = {"pretrained": [], "random": []}
            for seed in args.seeds:
                for start in found[task]:
                    out = Path(folder) / f"{task}-{start}-{seed}"
                    # A network from scratch has no layers to be spared: it learns at one rate.
                    given: dict[str, Any] = {"layer_decay": 0.75} if start == "pretrained" else {"layer_decay": 1.0}
                    config = config_of(
                        args, dataset, out, task=task, seed=seed, random_weights=start == "random", **given
                    )
                    result = finetune(config)
                    found[task][start].append(result.figures)
                    print(f"{task} {start} seed {seed}: {result.headline} {result.figures}", flush=True)
    return found


def table(found: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Markdown: the mean over the seeds and their range, for each figure."""
    lines = ["| task | figure | pretrained | from scratch |", "|---|---|---|---|"]
    for task, starts in found.items():
        for name in starts["pretrained"][0]:
            cells = []
            for runs in starts.values():
                values = [figures[name] for figures in runs]
                cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            lines.append(f"| {task} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print a table; with --out also write it with every run's figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a pretrained 4M that reads RGB as pixels")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["semseg", "depth", "normal"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=256, help="labelled scenes to train on")
    parser.add_argument("--scenes", type=int, default=1024, help="rendered in all")
    parser.add_argument("--held-out", type=int, default=512, help="of them, about so many are never trained on")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    found = compare(args)
    print(table(found))
    if args.out:
        Path(args.out).write_text(json.dumps({"arguments": vars(args), "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
