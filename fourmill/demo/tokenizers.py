"""Trains the demo tokenizers on rendered scenes, on a CPU, and measures them on scenes they never saw.

    python -m fourmill.demo.tokenizers rgb depth semseg clip text --minutes 7   # train and save
    python -m fourmill.demo.tokenizers --measure                                # figures of the shipped folders

Invariant: a folder is replaced only by a whole checkpoint; its figures are of the files as they lie there.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fourmill.checkpoints import DEMO_FOLDER
from fourmill.demo.tokenizer_scenes import (
    DEMO_SIZE,
    EVALUATION_SEED,
    RECIPES,
    SIZE,
    TRAIN_SEED,
    examples_of,
    measure,
)
from fourmill.scenes import CLASSES, SHAPES
from fourmill.scenes.cache import open_cache
from fourmill.tokenizers.config import NetworkConfig
from fourmill.tokenizers.text import FILE, MARKERS, train_text_tokenizer
from fourmill.tokenizers.training.config import TrainTokenizerConfig, VocabularyConfig
from fourmill.tokenizers.training.fitting import SpatialTraining
from fourmill.tokenizers.training.run import TrainResult, settings_of, train_spatial

# Two vocabularies: a small one for what the demo's 4M learns, and one with 4M's numbers for everything else.
VOCABULARIES = {
    "text": VocabularyConfig(vocabulary_size=1200, num_sentinels=20, coordinate_bins=100, class_names=SHAPES),
    "text_4m": VocabularyConfig(vocabulary_size=5200, class_names=SHAPES, markers=MARKERS),
}
CACHE = str(Path(tempfile.gettempdir()) / "fourmill-scenes")


@dataclass(frozen=True)
class Settings:
    """Of one training run. `minutes` of CPU time, where given, decide the number of steps. `scenes`: rendered at 224
    pixels, `small_scenes` at 128; `taught`: how many of them a teacher labels."""

    minutes: float | None = None
    scenes: int = 6_000
    small_scenes: int = 32_000
    taught: int = 3_000
    batch_size: int = 24
    seed: int = 0
    cache: str = CACHE

    def scenes_of(self, size: int) -> int:
        return self.scenes if size == SIZE else self.small_scenes


def train(name: str, out: Path, settings: Settings) -> TrainResult:
    """Train the tokenizer of the modality `name` and save it in the folder `out`, which is replaced."""
    if name not in RECIPES:
        raise ValueError(f"unknown tokenizer {name!r}; known: {', '.join([*RECIPES, *VOCABULARIES])}")
    recipe = RECIPES[name]
    cache = open_cache(settings.cache, TRAIN_SEED, settings.scenes_of(recipe.cache_size), recipe.cache_size)
    examples = examples_of(name, cache, TRAIN_SEED, settings.taught)
    num_classes = len(CLASSES) if name == "semseg" else 0
    steps = recipe.steps
    with tempfile.TemporaryDirectory() as folder:
        if settings.minutes is not None:
            trial = _configuration(name, folder, settings, steps=15, unquantized=5)
            rows = range(min(1000, len(examples.keys)))
            chosen = settings_of(examples, rows, trial, num_classes)
            steps = _steps_in(settings.minutes, SpatialTraining(examples, rows, trial, chosen))
        result = train_spatial(examples, _configuration(name, folder, settings, steps=steps), num_classes)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for file in (path for path in Path(folder).iterdir() if path.is_file()):
            shutil.copyfile(file, out / file.name)  # not its mode: a temporary folder is its owner's alone
    return result


def _steps_in(minutes: float, trial: SpatialTraining) -> int:
    """How many steps fit into so many minutes of CPU time, by the time of ten."""
    trial.fit(until=5)
    started = time.process_time()
    trial.fit(until=15)
    return max(100, int(60 * minutes / ((time.process_time() - started) / 10)))


def _configuration(name: str, out: str, settings: Settings, *, steps: int, **fields: Any) -> TrainTokenizerConfig:
    chosen: dict[str, Any] = {
        "dataset": "fourmill.scenes",
        "modality": name if name == "sam_instance" else f"tok_{name}",
        "out": out,
        "network": NetworkConfig.model_validate(RECIPES[name].network),
        "sizes": RECIPES[name].sizes,
        "steps": steps,
        "batch_size": settings.batch_size,
        "lr": RECIPES[name].lr,
        "warmup": min(100, steps // 10),
        "unquantized": min(200, steps // 5),
        "seed": settings.seed,
        "device": "cpu",
        "num_threads": 1,
        "autocast": _native_bfloat16(),
        "held_out": 0.02,
        "licence": "apache-2.0",
    }
    return TrainTokenizerConfig.model_validate({**chosen, **RECIPES[name].fields, **fields})


def _native_bfloat16() -> bool:
    """Elsewhere bfloat16 is slower than float32 on a CPU."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "avx512_bf16" in info.read_text()


def train_text(name: str, out: Path, settings: Settings, count: int) -> dict[str, float]:
    """Learn a vocabulary from scene captions and save it in the folder `out`, which is replaced."""
    cache = open_cache(settings.cache, TRAIN_SEED, settings.small_scenes, DEMO_SIZE)
    layout = VOCABULARIES[name]
    data = train_text_tokenizer(
        [*cache.captions, *cache.summaries],
        layout.vocabulary_size,
        layout.num_sentinels,
        layout.coordinate_bins,
        layout.class_names,
        layout.markers,
    )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / FILE).write_bytes(data)
    return measure("text", out, settings.cache, count)


_CARD = """---
license: apache-2.0
---

# Demo tokenizer: {name}

{what}.
{entries} ids{grid}. Code and weights: Apache-2.0.

**It understands only the procedural rooms of `fourmill.scenes`**, and nothing else: it exists so that every path of
Fourmill runs for real, offline and on a CPU. Do not tokenize photographs with it.

{training}.
Figures on {count} scenes of seed {evaluation}, never trained on, loaded from this folder:

| figure | value |
|---|---|
{rows}

    python -m fourmill.demo.tokenizers {name}     # train again
    python -m fourmill.demo.tokenizers {name} --measure --count {count}     # these figures
"""


def write_card(name: str, folder: Path, figures: dict[str, float], training: str, count: int) -> None:
    """README.md of a checkpoint folder: what it is, what made it, how good it is, its licence."""
    if name in VOCABULARIES:
        layout = VOCABULARIES[name]
        sizes = f"{layout.num_sentinels} sentinels, {layout.coordinate_bins} numbers a kind"
        what = f"Text vocabulary in 4M's layout: {sizes}"
        entries, grid = int(figures["entries"]), ""
    else:
        network = NetworkConfig.model_validate(RECIPES[name].network)
        kind = "Vector" if network.architecture == "mlp" else "Spatial"
        what = f"{kind} VQ tokenizer (ml-4m's layout) of {RECIPES[name].what}"
        sides = RECIPES[name].sizes or (network.size,)
        grids = " or ".join("{} x {}".format(*network.grid_of(side)) for side in sides)
        entries, grid = network.vocabulary, f", {grids} of them a sample"
    rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in figures.items())
    card = _CARD.format(
        name=name,
        what=what,
        entries=entries,
        grid=grid,
        training=training,
        count=count,
        evaluation=EVALUATION_SEED,
        rows=rows,
    )
    (folder / "README.md").write_text(card)


def _learnt_from(name: str, settings: Settings) -> str:
    recipe = RECIPES[name]
    if name == "sam_instance":
        return f"the true segments of {settings.taught:,} scenes and what the demo's SAM finds in a quarter of them"
    if recipe.labeler is None:
        return f"{settings.scenes:,} pictures"
    said = f"{settings.taught:,} values as the demo's {recipe.labeler} labeler gives them"
    return f"{settings.taught:,} true maps and {said}" if recipe.truth else said


def _make(name: str, out: Path, settings: Settings, count: int) -> dict[str, float]:
    """Train one tokenizer, measure it, write its card."""
    started = time.process_time()
    if name in VOCABULARIES:
        figures = train_text(name, out, settings, count)
        training = f"Learnt from the captions of {settings.small_scenes:,} scenes (seed {TRAIN_SEED})"
    else:
        learnt_from = _learnt_from(name, settings)
        result = train(name, out, settings)
        training = (
            f"Trained from scratch on {learnt_from}\n(scenes of seed {TRAIN_SEED}): {result.steps:,} steps of "
            f"{RECIPES[name].fields.get('batch_size', settings.batch_size)}, "
            f"{time.process_time() - started:.0f} CPU seconds, torch seed {settings.seed}"
        )
        figures = measure(name, out, settings.cache, count)
    write_card(name, out, figures, training, count)
    return figures


def _arguments() -> argparse.Namespace:
    defaults = Settings()
    known = [*RECIPES, *VOCABULARIES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TOKENIZER", help=f"{', '.join(known)}; all by default")
    parser.add_argument("--out", type=Path, default=DEMO_FOLDER, help="folder of the checkpoint folders")
    parser.add_argument("--minutes", type=float, help="CPU minutes for each, instead of the recipe's steps")
    parser.add_argument("--scenes", type=int, default=defaults.scenes, help="training scenes of 224 pixels")
    parser.add_argument("--cache", default=defaults.cache, help="where rendered scenes lie (400 KB each at 224 px)")
    parser.add_argument("--measure", action="store_true", help="train nothing: print the figures of what is there")
    parser.add_argument("--count", type=int, default=256, help="unseen scenes to measure on")
    return parser.parse_args()


def main() -> None:
    """Train, or with `--measure` only measure."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fourmill").setLevel(logging.INFO)
    torch.set_num_threads(1)
    args = _arguments()
    settings = Settings(minutes=args.minutes, scenes=args.scenes, cache=args.cache)
    for name in args.names or [*RECIPES, *VOCABULARIES]:
        folder = args.out / (name if name in VOCABULARIES else f"tok_{name}")
        if args.measure:
            found = measure("text" if name in VOCABULARIES else name, folder, settings.cache, args.count)
        else:
            found = _make(name, folder, settings, args.count)
        print(json.dumps({name: found}, indent=2), flush=True)


if __name__ == "__main__":
    main()
