"""Trains the demo teachers on rendered scenes, on a CPU, and measures them on scenes they never saw.

    python -m fourmill.demo.teachers depth semseg clip caption --minutes 9      # train and save
    python -m fourmill.demo.teachers --measure --count 512                      # figures of the shipped folders

Invariant: `TRAIN_SEED` is learnt from, `VALIDATION_SEED` chooses the weights that are kept, `EVALUATION_SEED` is only
measured on, and the demo's own corpus (`DEMO_SEED`) is none of them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fourmill.demo.teacher_figures import Figures, measure
from fourmill.demo.teacher_tasks import SIZE, TASKS, Task
from fourmill.scenes import render
from fourmill.scenes.cache import SceneCache, open_cache

TRAIN_SEED, VALIDATION_SEED, EVALUATION_SEED, DEMO_SEED = 1, 8, 9, 7
CHECKPOINTS = Path(__file__).parent / "checkpoints"
_CHECKS = 12  # validations in a run
_AVERAGE = 0.995  # of the running mean of the weights that is validated and saved: about the last 200 steps


@dataclass(frozen=True)
class Settings:
    """Of one training run. `steps` makes it repeatable; without it a run ends after `minutes` of CPU time."""

    steps: int | None = None
    minutes: float = 9.0
    scenes: int = 32_000
    validation: int = 256
    seed: int = 0
    workers: int = 1
    cache: str = str(Path(tempfile.gettempdir()) / "fourmill-scenes")


@dataclass(frozen=True)
class Outcome:
    """What a run did, and the validation figures of the weights that it kept."""

    steps: int
    images: int
    cpu_seconds: float
    parameters: int
    validation: Figures


def train(name: str, out: str | Path, settings: Settings) -> Outcome:
    """Train the teacher `name` and save it in the folder `out`, which is replaced."""
    if name not in TASKS:
        raise ValueError(f"unknown teacher {name!r}; known: {', '.join(TASKS)}")
    torch.manual_seed(settings.seed)
    cache = open_cache(settings.cache, TRAIN_SEED, settings.scenes, SIZE, settings.workers)
    validation = open_cache(settings.cache, VALIDATION_SEED, settings.validation, SIZE, settings.workers)
    task: Task = TASKS[name](cache)
    outcome = _fit(task, cache, validation, settings)
    shutil.rmtree(out, ignore_errors=True)
    task.save(Path(out))
    for path in Path(out).iterdir():
        path.chmod(0o644)  # safetensors leaves its files readable by their owner only
    return outcome


def _fit(task: Task, cache: SceneCache, validation: SceneCache, settings: Settings) -> Outcome:
    """One training run, told straight; leaves the best validated mean weights in `task.model`."""
    model = task.model
    rng = np.random.default_rng(settings.seed)
    mean = [weight.detach().clone() for weight in model.parameters()]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=task.rate, betas=(0.9, 0.98))
    best, kept, figures = -math.inf, mean, Figures()
    step, started, next_check, order = 0, time.process_time(), 1, np.empty(0, dtype=np.intp)
    progress, total = 0.0, 0.0
    while progress < 1:
        if len(order) < task.size:
            order = rng.permutation(len(cache))
        rows, order = np.sort(order[: task.size]), order[task.size :]
        _set_rate(optimizer, task.rate, step, progress)
        with _fast():
            loss = task.loss(cache, rows, rng.random(len(rows)) < 0.5)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, total = step + 1, total + loss.item()
        keep = min(_AVERAGE, (1 + step) / (10 + step))
        torch._foreach_lerp_(mean, [weight.detach() for weight in model.parameters()], 1 - keep)
        seconds = time.process_time() - started
        progress = step / settings.steps if settings.steps else seconds / (60 * settings.minutes)
        if progress >= next_check / _CHECKS or progress >= 1:
            score, found = _validate(task, validation, mean)
            print(f"{task.name}: {progress:.0%} {seconds:.0f} s, step {step}, loss {total / step:.3f} ", end="")
            print({key: round(value, 4) for key, value in found.items()}, flush=True)
            next_check = int(progress * _CHECKS) + 1
            if score > best:
                best, kept, figures = score, [weight.clone() for weight in mean], found
    _assign(model, kept)
    parameters = sum(weight.numel() for weight in model.parameters())
    return Outcome(step, step * task.size, time.process_time() - started, parameters, figures)


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, progress: float) -> None:
    """Warm-up over 100 steps, then a cosine to 2 % of the peak."""
    rate = peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    for group in optimizer.param_groups:
        group["lr"] = rate


@contextlib.contextmanager
def _fast() -> Iterator[None]:
    """bfloat16 autocast where the CPU multiplies it natively; elsewhere it is slower than float32.

    Plain attention: for these short sequences it trains CLIP 1.3 times as fast as the fused CPU kernel.
    """
    native = "avx512_bf16" in _cpu_flags()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=native), sdpa_kernel(SDPBackend.MATH):
        yield


@functools.cache
def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


@torch.inference_mode()
def _validate(task: Task, cache: SceneCache, mean: list[torch.Tensor]) -> tuple[float, Figures]:
    """Score the mean weights in evaluation mode, then put the current ones back."""
    model = task.model
    current = [weight.detach().clone() for weight in model.parameters()]
    _assign(model, mean)
    model.eval()
    with _fast():
        score = task.score(cache)
    model.train()
    _assign(model, current)
    return score


@torch.no_grad()
def _assign(model: nn.Module, weights: list[torch.Tensor]) -> None:
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.copy_(weight)


def evaluate(name: str, folder: str | Path, count: int, size: int = SIZE) -> Figures:
    """Figures of a saved teacher on `count` scenes of `EVALUATION_SEED`, rendered at `size` pixels.

    For CLIP more scenes are drawn where captions repeat, so that the gallery holds `count` distinct ones.
    """
    scenes = [render(EVALUATION_SEED, index, size) for index in range(count)]
    if name == "clip":
        captions = {scene.caption for scene in scenes}
        while len(captions) < count:
            scenes.append(render(EVALUATION_SEED, len(scenes), size))
            captions.add(scenes[-1].caption)
    return measure(name, folder, scenes)


_CLASSES = {
    "depth": "`transformers.DPTForDepthEstimation`: z-depth in metres",
    "semseg": "`transformers.SegformerForSemanticSegmentation`: floor, wall, sphere, box, cylinder, cone",
    "clip": "`open_clip` (`local-dir:`): ViT of 8 x 8 patches, 128 channels, a tokenizer of its own",
    "caption": "`transformers.BlipForConditionalGeneration`: plain captions of what stands in the room",
}
_CARD = """---
license: apache-2.0
---

# Demo teacher: {name}

{what}. {parameters:,} parameters, {size} px, float16 on disk. Code and weights: Apache-2.0.

**It understands only the procedural rooms of `fourmill.scenes`**, and nothing else: it exists so that every path of
Fourmill runs for real, offline and on a CPU, with exact truth to compare with. Do not label photographs with it.

Trained from scratch on {scenes:,} scenes (seed {train}) for {seconds:.0f} CPU seconds ({steps:,} steps, {images:,}
images, torch seed {seed}); weights chosen on scenes of seed {validation}. Figures on {count} scenes of seed
{evaluation}, never trained on, loaded from this folder:

| figure | value |
|---|---|
{rows}

    python -m fourmill.demo.teachers {name} {budget}                  # train again
    python -m fourmill.demo.teachers {name} --steps {steps}                # as long, and repeatable
    python -m fourmill.demo.teachers {name} --measure --count {count}      # these figures
"""


def write_card(name: str, folder: Path, outcome: Outcome, figures: Figures, settings: Settings, *, count: int) -> None:
    """README.md of a checkpoint folder: what it is, what made it, how good it is, its licence."""
    card = _CARD.format(
        name=name,
        what=_CLASSES[name],
        parameters=outcome.parameters,
        size=SIZE,
        scenes=settings.scenes,
        train=TRAIN_SEED,
        seconds=outcome.cpu_seconds,
        steps=outcome.steps,
        images=outcome.images,
        seed=settings.seed,
        validation=VALIDATION_SEED,
        count=count,
        evaluation=EVALUATION_SEED,
        rows="\n".join(f"| {key} | {value:.3f} |" for key, value in figures.items()),
        budget=f"--minutes {settings.minutes:g}",
    )
    (folder / "README.md").write_text(card)


def _arguments() -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TEACHER", help=f"{', '.join(TASKS)}; all by default")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="folder of the checkpoint folders")
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="CPU minutes for each teacher")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--scenes", type=int, default=defaults.scenes, help="training scenes, rendered once")
    parser.add_argument("--cache", default=defaults.cache, help="where rendered scenes lie (100 KB each)")
    parser.add_argument("--workers", type=int, default=defaults.workers, help="processes that render the cache")
    parser.add_argument("--measure", action="store_true", help="train nothing: print the figures of what is there")
    parser.add_argument("--count", type=int, default=512, help="unseen scenes to measure on")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels at which those are rendered")
    return parser.parse_args()


def main() -> None:
    """Train, or with `--measure` only measure."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # two threads in a process lose to two processes
    args = _arguments()
    for name in args.names or list(TASKS):
        folder = args.out / name
        if args.measure:
            print(json.dumps({name: evaluate(name, folder, args.count, args.size)}, indent=2))
            continue
        settings = Settings(
            steps=args.steps, minutes=args.minutes, scenes=args.scenes, workers=args.workers, cache=args.cache
        )
        outcome = train(name, folder, settings)
        figures = evaluate(name, folder, args.count)
        write_card(name, folder, outcome, figures, settings, count=args.count)
        print(json.dumps({name: asdict(outcome), "figures": figures}, indent=2))


if __name__ == "__main__":
    main()
