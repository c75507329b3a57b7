"""Fine-tuning: from a pretrained 4M and labelled pictures to a network for one task, measured on held-out samples.

    model.safetensors, config.json   the network (see `fourmill.model.finetune.checkpoint`)
    finetune.json                    the resolved configuration and the digest of keys, written first
    metrics.json                     curve and held-out figures; written last
    tensorboard/                     scalars
    state/                           while the run lasts

Stopped in whatever way, the same command goes on from the newest state and, on a CPU, ends with the same weights:
order, crops and dropped paths are functions of seed and step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourmill.model.finetune.checkpoint import build, drop_states, read_state, save_finetuned, write_state
from fourmill.model.finetune.config import FREE, FinetuneConfig
from fourmill.model.finetune.network import Finetuned, parameter_groups
from fourmill.model.finetune.samples import Samples, open_samples
from fourmill.model.finetune.tasks import Task, task_of
from fourmill.model.memory import keep_memory
from fourmill.model.network import FourM
from fourmill.model.optimizer import learning_rate
from fourmill.model.train import seed_of
from fourmill.model.weights import load_model
from fourmill.pipeline.shards import digest
from fourmill.pipeline.store import LocalStore, Store, open_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneProgress:
    """One report. `loss`: mean since the last one; `figures`: on held-out samples, when just measured."""

    step: int
    steps: int
    loss: float
    lr: float
    samples_per_s: float
    eta_s: float
    figures: dict[str, float] | None = None

    def __str__(self) -> str:
        head = f"step {self.step}/{self.steps}  loss {self.loss:.4f}  lr {self.lr:.1e}"
        tail = "  ".join(f"{name} {value:.4f}" for name, value in (self.figures or {}).items())
        return f"{head}  {self.samples_per_s:.0f} samples/s  {self.eta_s:.0f} s left" + (tail and f"  held out: {tail}")


@dataclass(frozen=True)
class FinetuneResult:
    """What a run came to. `figures`: of the task, on held-out samples; `headline`: the one to look at."""

    out: str
    task: str
    steps: int
    parameters: int
    trained_parameters: int
    seconds: float
    train_samples: int
    held_out_samples: int
    headline: str
    figures: dict[str, float]
    curve: list[dict[str, Any]]

    def __str__(self) -> str:
        counts = f"{self.trained_parameters / 1e6:.2f} of {self.parameters / 1e6:.2f} M parameters trained"
        figures = "  ".join(f"{name} {value:.4f}" for name, value in self.figures.items())
        return (
            f"{self.task}: {counts} on {self.train_samples} samples, {self.steps} steps in {self.seconds:.0f} s\n"
            f"  {self.held_out_samples} held-out samples: {figures}\ncheckpoint: {self.out}"
        )


def finetune(config: FinetuneConfig, progress: Callable[[FinetuneProgress], None] | None = None) -> FinetuneResult:
    """Train encoder and head, or the head alone, and write the network to `config.out`.

    A finished run is not repeated: its result is read. ValueError if `out` holds a run of another configuration or of
    other samples, or if the checkpoint or the labels are unfit.
    """
    store, samples = open_store(config.out, config.storage), open_samples(config)
    _claim(store, config, samples)
    if store.head("metrics.json"):
        return FinetuneResult(**json.loads(store.get("metrics.json")))
    before = torch.get_num_threads()
    torch.set_num_threads(config.num_threads or before)
    try:
        return _Run(store, samples, config).fit(progress or (lambda report: log.info("%s", report)))
    finally:
        torch.set_num_threads(before)


class _Run:
    """One run: what it works with, and the steps."""

    def __init__(self, store: Store, samples: Samples, config: FinetuneConfig) -> None:
        self.store, self.samples, self.config = store, samples, config
        name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        self.device = torch.device(name)
        if self.device.type == "cpu":
            keep_memory()
        self.task = task_of(config, len(samples.classes))
        self.network, self.facts = _network(config, self.task, samples)
        self.network.to(self.device)
        groups = parameter_groups(self.network, config.weight_decay, config.layer_decay)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
        self.curve: list[dict[str, Any]] = []

    def fit(self, progress: Callable[[FinetuneProgress], None]) -> FinetuneResult:
        """All steps that are left."""
        c, started = self.config, time.monotonic()
        state = read_state(self.store, self.network, self.optimizer) or {"step": 0, "curve": [], "losses": []}
        first, self.curve = state["step"], state["curve"]
        recent = [torch.tensor(loss, device=self.device) for loss in state["losses"]]
        with _scalars(self.store, c) as scalars, contextlib.closing(self._batches(first)) as batches:
            for step, (pixels, labels) in enumerate(batches, first):
                lr, loss = self._advance(step, pixels, labels)
                recent.append(loss)
                done, last = step + 1, step + 1 == c.steps
                measured = last or done % c.eval_every == 0
                if measured or done % c.log_every == 0:
                    figures = measure(self.network, self.task, self.samples, c, self.device) if measured else None
                    rate = (done - first) / max(time.monotonic() - started, 1e-9)
                    mean = _finite(float(torch.stack(recent).mean()), done, c)
                    left = (c.steps - done) / rate
                    report = FinetuneProgress(done, c.steps, mean, lr, rate * c.batch_size, left, figures)
                    self.curve.append({"step": done, "loss": mean, **({"held_out": figures} if figures else {})})
                    progress(report)
                    scalars(report)
                    recent = []
                if not last and done % c.checkpoint_every == 0:
                    facts = {"step": done, "curve": self.curve, "losses": [float(loss) for loss in recent]}
                    write_state(self.store, self.network, self.optimizer, facts)
        return self._finish(time.monotonic() - started)

    def _batches(self, first: int) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """The batches from step `first` on, one read ahead."""
        with ThreadPoolExecutor(1, "batch") as reader:
            ahead = reader.submit(self._batch, first)
            for step in range(first, self.config.steps):
                batch = ahead.result()
                if step + 1 < self.config.steps:
                    ahead = reader.submit(self._batch, step + 1)
                yield batch

    def _batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, epochs = order(self.samples.train, step, self.config)
        return self.samples.batch(numbers.tolist(), epochs.tolist())

    def _advance(self, step: int, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
        """One step; the head's learning rate and the loss."""
        c, device = self.config, self.device
        lr = learning_rate(step, lr=c.lr, warmup=c.warmup, steps=c.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.network.train()
        generator = torch.Generator(device).manual_seed(seed_of(c.seed, "drop", step))
        with torch.autocast(device.type, torch.bfloat16, enabled=c.autocast):
            out = self.network(pixels.to(device), generator)
        loss = self.task.loss(out.float(), labels.to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        if c.clip is not None:
            learned = [p for p in self.network.parameters() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(learned, c.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return lr, loss.detach()

    def _finish(self, seconds: float) -> FinetuneResult:
        parameters = list(self.network.parameters())
        result = FinetuneResult(
            out=self.config.out,
            task=self.config.task,
            steps=self.config.steps,
            parameters=sum(p.numel() for p in parameters),
            trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            seconds=round(seconds, 3),
            train_samples=len(self.samples.train),
            held_out_samples=len(self.samples.held_out),
            headline=self.task.headline,
            figures=self.curve[-1]["held_out"],
            curve=self.curve,
        )
        save_finetuned(self.network, self.facts, self.store)
        self.store.create("metrics.json", json.dumps(asdict(result), indent=1).encode())
        drop_states(self.store)
        return result


def _network(config: FinetuneConfig, task: Task, samples: Samples) -> tuple[Finetuned, dict[str, Any]]:
    """The checkpoint's encoder, or one with random weights, with a new head; and what config.json says of them."""
    model = load_model(config.checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, "weights"))
        if config.random_weights:
            model = FourM(model.architecture)
        torch.manual_seed(seed_of(config.seed, "head"))
        facts = {
            "config": config.model_dump(mode="json", exclude=set(FREE)),
            "classes": list(samples.classes),
            "outputs": task.outputs,
            "architecture": model.architecture.model_dump(mode="json"),
        }
        return build(model, facts), facts


def order(train: np.ndarray, step: int, config: FinetuneConfig) -> tuple[np.ndarray, np.ndarray]:
    """The samples of a step (B,), and the epoch that each belongs to: each epoch is one permutation of all."""
    places = np.arange(step * config.batch_size, (step + 1) * config.batch_size)
    epochs = places // len(train)
    permutations = {e: np.random.default_rng([config.seed, e]).permutation(train) for e in np.unique(epochs).tolist()}
    chosen = [permutations[e][p % len(train)] for p, e in zip(places.tolist(), epochs.tolist(), strict=True)]
    return np.array(chosen, dtype=np.int64), epochs


@torch.no_grad()
def measure(
    network: Finetuned, task: Task, samples: Samples, config: FinetuneConfig, device: torch.device
) -> dict[str, float]:
    """The task's figures on the held-out samples, each seen as its centre square; the network is left evaluating."""
    network.eval()
    task.reset()
    for start in range(0, len(samples.held_out), config.batch_size):
        pixels, labels = samples.batch(samples.held_out[start : start + config.batch_size].tolist())
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            out = network(pixels.to(device))
        task.add(out.float().cpu(), labels)
    return task.figures()


def _finite(loss: float, step: int, config: FinetuneConfig) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} near step {step}; lower lr ({config.lr:g}) or clip ({config.clip})"
        )
    return loss


def _claim(store: Store, config: FinetuneConfig, samples: Samples) -> None:
    """Write finetune.json, or find that the one there is of the same run."""
    fields = config.model_dump(mode="json")
    keys = digest(*(samples.keys[i] for i in (*samples.train, *samples.held_out)), *samples.classes)
    if store.create("finetune.json", json.dumps({"samples_digest": keys, "config": fields}, indent=1).encode()):
        return
    theirs = json.loads(store.get("finetune.json"))
    differ = [
        f"{name}: {theirs['config'].get(name)!r} there, {value!r} here"
        for name, value in fields.items()
        if name not in FREE and theirs["config"].get(name) != value
    ]
    if theirs["samples_digest"] != keys:
        differ.append("the samples have changed since")
    if differ:
        raise ValueError(f"{config.out} holds another run ({'; '.join(differ)}); choose another `out` or delete it")


@contextlib.contextmanager
def _scalars(store: Store, config: FinetuneConfig) -> Iterator[Callable[[FinetuneProgress], None]]:
    """A function that writes a report as TensorBoard scalars, or does nothing."""
    local = isinstance(store, LocalStore)
    if config.tensorboard and not local:
        log.warning("tensorboard: true has no effect: %s is not a local folder", config.out)
    if config.tensorboard is False or not local:
        yield lambda report: None
        return
    from torch.utils.tensorboard import SummaryWriter

    assert isinstance(store, LocalStore)
    writer = SummaryWriter(str(Path(store.root) / "tensorboard"))

    def write(report: FinetuneProgress) -> None:
        writer.add_scalar("train/loss", report.loss, report.step)
        writer.add_scalar("train/lr", report.lr, report.step)
        for name, value in (report.figures or {}).items():
            writer.add_scalar(f"held_out/{name}", value, report.step)

    try:
        yield write
    finally:
        writer.close()
