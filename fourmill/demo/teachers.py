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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fourmill.demo.teacher_cards import (
    EVALUATION_SEED,
    TRAIN_SEED,
    VALIDATION_SEED,
    Outcome,
    history,
    record,
)
from fourmill.demo.teacher_figures import Figures
from fourmill.demo.teacher_measures import measure
from fourmill.demo.teacher_parts import SIZE, Task
from fourmill.demo.teacher_tasks import TASKS
from fourmill.scenes import render
from fourmill.scenes.cache import SceneCache, open_cache

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
    rate: float = 1.0  # times the task's own peak learning rate
    start: str | None = None  # folder of a saved teacher to go on from; its weights, not its optimizer
    cache: str = str(Path(tempfile.gettempdir()) / "fourmill-scenes")


def train(name: str, out: str | Path, settings: Settings) -> Outcome:
    """Train the teacher `name` into the folder `out`.

    The folder is replaced, whole, at every validation that is better than those before it in this run.
    """
    if name not in TASKS:
        raise ValueError(f"unknown teacher {name!r}; known: {', '.join(TASKS)}")
    torch.manual_seed(settings.seed)
    cache = open_cache(settings.cache, TRAIN_SEED, settings.scenes, SIZE, settings.workers)
    validation = open_cache(settings.cache, VALIDATION_SEED, settings.validation, SIZE, settings.workers)
    task: Task = TASKS[name](cache)
    if settings.start:
        task.load(Path(settings.start))
    return _fit(task, cache, validation, settings, Path(out))


def _fit(task: Task, cache: SceneCache, validation: SceneCache, settings: Settings, out: Path) -> Outcome:
    """One training run, told straight; leaves the best validated mean weights in the folder `out`."""
    model = task.model
    rng = np.random.default_rng(settings.seed)
    mean = [values.detach().clone() for values in _values(model)]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=task.rate * settings.rate, betas=(0.9, 0.98))
    best, figures, curve = -math.inf, Figures(), []
    step, started, next_check, order = 0, time.process_time(), 1, np.empty(0, dtype=np.intp)
    progress, total = 0.0, 0.0
    while progress < 1:
        if len(order) < task.size:
            order = rng.permutation(len(cache))
        rows, order = np.sort(order[: task.size]), order[task.size :]
        _set_rate(optimizer, task.rate * settings.rate, step, progress)
        with _fast():
            loss = task.loss(cache, rows, rng.random(len(rows)) < 0.5)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, total = step + 1, 0.99 * total + 0.01 * loss.item()
        keep = min(_AVERAGE, (1 + step) / (10 + step))
        torch._foreach_lerp_(mean, [values.detach() for values in _values(model)], 1 - keep)
        seconds = time.process_time() - started
        progress = step / settings.steps if settings.steps else seconds / (60 * settings.minutes)
        if progress >= next_check / _CHECKS or progress >= 1:
            next_check = int(progress * _CHECKS) + 1
            with _assigned(model, mean):
                score, found = _score(task, validation)
                curve.append((step, found[task.watched]))
                if score > best:
                    best, figures = score, found
                    _publish(task, out)
            _report(task.name, progress, seconds, step, total / (1 - 0.99**step), found)
    # The class heads only help training and are not saved.
    parameters = sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith("classes."))
    seconds = time.process_time() - started
    return Outcome(task.name, task.watched, step, step * task.size, seconds, parameters, settings.seed, curve, figures)


def _report(name: str, progress: float, seconds: float, step: int, loss: float, figures: Figures) -> None:
    """One line a validation; `loss` is a mean over about the last hundred steps."""
    rounded = {key: round(value, 4) for key, value in figures.items()}
    print(f"{name}: {progress:.0%} {seconds:.0f} s, step {step}, loss {loss:.3f} {rounded}", flush=True)


def _publish(task: Task, out: Path) -> None:
    """Save beside `out`, then rename: a reader finds the old folder or the new one."""
    fresh, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    task.save(fresh)
    for path in fresh.iterdir():
        path.chmod(0o644)  # safetensors leaves its files readable by their owner only
    if out.exists():
        for name in ("README.md", "training.json"):  # of the run before, until this one has ended
            if (out / name).exists():
                shutil.copy(out / name, fresh / name)
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


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


def _values(model: nn.Module) -> list[torch.Tensor]:
    """What is averaged: the weights, and the running statistics of batch norms."""
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]


@contextlib.contextmanager
def _assigned(model: nn.Module, values: list[torch.Tensor]) -> Iterator[None]:
    """Evaluation mode with these weights; afterwards training goes on with its own."""
    current = [value.detach().clone() for value in _values(model)]
    _assign(model, values)
    model.eval()
    yield
    model.train()
    _assign(model, current)


@torch.no_grad()
def _assign(model: nn.Module, values: list[torch.Tensor]) -> None:
    for target, value in zip(_values(model), values, strict=True):
        target.copy_(value)


@torch.inference_mode()
def _score(task: Task, cache: SceneCache) -> tuple[float, Figures]:
    with _fast():
        return task.score(cache)


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


def _arguments() -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TEACHER", help=f"{', '.join(TASKS)}; all by default")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="folder of the checkpoint folders")
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="CPU minutes for each teacher")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--from", dest="start", help="go on from the weights of this teacher folder")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="times the usual learning rate")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of torch and of the order of scenes")
    parser.add_argument("--scenes", type=int, default=defaults.scenes, help="training scenes, rendered once")
    parser.add_argument("--cache", default=defaults.cache, help="where rendered scenes lie (165 KB each)")
    parser.add_argument("--workers", type=int, default=defaults.workers, help="processes that render the cache")
    parser.add_argument("--measure", action="store_true", help="train nothing: print the figures of what is there")
    parser.add_argument("--card", action="store_true", help="with --measure: write the figures into the card")
    parser.add_argument("--count", type=int, default=1000, help="unseen scenes to measure on")
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
            figures = evaluate(name, folder, args.count, args.size)
            print(json.dumps({name: figures}, indent=2))
            if args.card:
                record(name, folder, history(folder), figures, args.count)
            continue
        settings = Settings(
            steps=args.steps, minutes=args.minutes, scenes=args.scenes, workers=args.workers, cache=args.cache,
            rate=args.rate, seed=args.seed, start=args.start,
        )  # fmt: skip
        before = history(args.start) if args.start else []
        outcome = train(name, folder, settings)
        record(name, folder, [*before, outcome], evaluate(name, folder, args.count), args.count)
        print((folder / "README.md").read_text())


if __name__ == "__main__":
    main()
