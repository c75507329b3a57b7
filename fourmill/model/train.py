"""Pretraining: from a dataset of tokens to a checkpoint folder.

    model.safetensors, config.json   the model (see `fourmill.model.weights`)
    pretrain.json                    the resolved configuration and the digest of the data, written first
    metrics.json                     curve, held-out loss by modality, the yardstick beside it; written last
    tensorboard/                     scalars
    state/                           while the run lasts

Stopped in whatever way, the same command goes on from the newest state and, on a CPU, ends with the same weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fourmill.model.config import FREE, Architecture, PretrainConfig
from fourmill.model.data import DataConfig, TokenDataset
from fourmill.model.evaluate import HeldOut, count_tokens
from fourmill.model.loader import Loader, read_ahead
from fourmill.model.masking import Masker
from fourmill.model.network import FourM
from fourmill.model.state import drop_states, read_state, write_state
from fourmill.model.weights import save_model
from fourmill.pipeline.store import LocalStore, Store, StoreSettings, open_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """One report. `loss`: mean since the last one, nats a token; `held_out`: by modality, when just evaluated."""

    step: int
    steps: int
    loss: float
    samples_per_s: float
    eta_s: float
    held_out: dict[str, float] | None = None

    def __str__(self) -> str:
        head = f"step {self.step}/{self.steps}  loss {self.loss:.3f}"
        tail = "  ".join(f"{name} {value:.3f}" for name, value in (self.held_out or {}).items())
        return f"{head}  {self.samples_per_s:.0f} samples/s  {self.eta_s:.0f} s left" + (tail and f"  held out: {tail}")


@dataclass(frozen=True)
class PretrainResult:
    """What a run came to. Losses in nats a token on held-out samples, by modality.

    `frequencies`: the loss of predicting each token with its frequency in the training samples, on the same targets.
    `curve`: one entry per report. `missing`: rows of the dataset without a label, by modality.
    """

    out: str
    steps: int
    parameters: int
    seconds: float
    samples_per_s: float
    held_out_samples: int
    held_out: dict[str, float]
    frequencies: dict[str, float]
    missing: dict[str, int]
    curve: list[dict[str, Any]]

    @property
    def beats_frequencies(self) -> bool:
        """Whether the model is better than token frequencies in every modality."""
        return all(loss < self.frequencies[name] for name, loss in self.held_out.items())

    def __str__(self) -> str:
        head = (
            f"{self.parameters / 1e6:.1f} M parameters, {self.steps} steps in {self.seconds:.0f} s "
            f"({self.samples_per_s:.0f} samples/s); nats a token on {self.held_out_samples} held-out samples:"
        )
        lines = [
            f"  {name:14} {loss:.3f}   (token frequencies {self.frequencies[name]:.3f})"
            for name, loss in self.held_out.items()
        ]
        return "\n".join([head, *lines, f"checkpoint: {self.out}"])


def pretrain(
    dataset: str,
    config: PretrainConfig,
    progress: Callable[[Progress], None] | None = None,
    storage: StoreSettings | None = None,
) -> PretrainResult:
    """Train a model on `dataset` (path or s3:// URI) and write its checkpoint to `config.out`.

    A finished run is not repeated: its result is read. ValueError if `out` holds a run of another configuration or of
    other data, or if the dataset is unfit.
    """
    store = open_store(config.out, storage)
    data = TokenDataset(dataset, _data_config(config), storage)
    _claim(store, config, data, dataset)
    if store.head("metrics.json"):
        return PretrainResult(**json.loads(store.get("metrics.json")))
    with _threads(config.num_threads):
        return _train(store, data, config, progress or (lambda report: log.info("%s", report)))


def _train(
    store: Store, data: TokenDataset, config: PretrainConfig, progress: Callable[[Progress], None]
) -> PretrainResult:
    device = _device(config.device)
    architecture = Architecture(
        **dict(config.model), domains_in=config.inputs, domains_out=config.targets, modalities=data.infos
    )
    masker = Masker(architecture, config.masking)
    held_out = HeldOut(data, masker, config.eval_samples, config.batch_size, config.crop)
    counts = count_tokens(data, masker, architecture.names, architecture.domains_out)
    frequencies = held_out.frequency_loss(architecture.names, counts)

    model = _new_model(architecture, config.seed).to(device)
    optimizer = _optimizer(model, config, device)
    loader = Loader(data, config.batch_size, config.seed, crop=config.crop)
    facts = read_state(store, model, optimizer) or {"step": 0, "loader": loader.state_dict(), "curve": []}
    loader.load_state_dict(facts["loader"])
    curve: list[dict[str, Any]] = facts["curve"]
    first = facts["step"]
    if first:
        log.info("continuing at step %d of %d", first, config.steps)

    generator = torch.Generator(device)
    batches = read_ahead(loader)
    recent: list[torch.Tensor] = []
    started = time.monotonic()
    with _scalars(store, config) as scalars, contextlib.closing(batches):
        for step in range(first, config.steps):
            batch = next(batches)
            inputs, targets = masker(batch.to(device), generator.manual_seed(seed_of(config.seed, "mask", step)))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
                loss = model(inputs, targets)
            loss.total.backward()
            if config.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append(loss.total.detach())

            done, last = step + 1, step + 1 == config.steps
            evaluated = last or done % config.eval_every == 0
            if evaluated or done % config.log_every == 0:
                losses = held_out.loss(model, device, config.autocast) if evaluated else None
                report = _report(done, first, started, recent=recent, held_out=losses, config=config)
                curve.append({"step": done, "loss": report.loss, **({} if losses is None else {"held_out": losses})})
                progress(report)
                scalars(report)
                recent = []
            if last or done % config.checkpoint_every == 0:
                write_state(store, model, optimizer, {"step": done, "loader": batch.state, "curve": curve})

    seconds = time.monotonic() - started
    result = PretrainResult(
        out=config.out,
        steps=config.steps,
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=round(seconds, 3),
        samples_per_s=round((config.steps - first) * config.batch_size / max(seconds, 1e-9), 1),
        held_out_samples=held_out.samples,
        held_out=curve[-1]["held_out"],
        frequencies=frequencies,
        missing=data.missing(),
        curve=curve,
    )
    save_model(model, store)
    store.create("metrics.json", json.dumps(asdict(result), indent=1).encode())
    drop_states(store)
    return result


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything that can be spelled: the run's seed, a purpose, a step."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Linear warm-up to `lr`, then half a cosine down to 0 at `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _new_model(architecture: Architecture, seed: int) -> FourM:
    """Initial weights are a function of the seed; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        return FourM(architecture)


def _optimizer(model: FourM, config: PretrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW as 4M's: matrices and embeddings decay; norms, biases and single vectors do not."""
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # One fused kernel for all parameters: without it the update is a tenth of a small model's step.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=1e-8, fused=device.type in ("cpu", "cuda"))


def _report(
    done: int,
    first: int,
    started: float,
    *,
    recent: list[torch.Tensor],
    held_out: dict[str, float] | None,
    config: PretrainConfig,
) -> Progress:
    loss = float(torch.stack(recent).mean()) if recent else math.nan
    if recent and not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} near step {done}; lower lr ({config.lr:g}) or clip ({config.clip})"
        )
    rate = (done - first) / max(time.monotonic() - started, 1e-9)
    return Progress(done, config.steps, loss, rate * config.batch_size, (config.steps - done) / rate, held_out)


def _data_config(config: PretrainConfig) -> DataConfig:
    return DataConfig(
        names=tuple(dict.fromkeys((*config.inputs, *config.targets))),
        image_size=config.model.image_size,
        patch_size=config.model.patch_size,
        held_out=config.held_out,
        missing=config.missing,
        mixed_generations=config.mixed_generations,
        max_tokens=config.max_tokens,
        num_sentinels=config.masking.num_sentinels,
        cache_bytes=config.cache_bytes,
    )


def _claim(store: Store, config: PretrainConfig, data: TokenDataset, dataset: str) -> None:
    """Write pretrain.json, or find that the one there is of the same run."""
    fields = config.model_dump(mode="json")
    ours = {"dataset": dataset, "dataset_digest": data.digest, "config": fields}
    if store.create("pretrain.json", json.dumps(ours, indent=1).encode()):
        return
    theirs = json.loads(store.get("pretrain.json"))
    differ = [
        f"{name}: {theirs['config'].get(name)!r} there, {value!r} here"
        for name, value in fields.items()
        if name not in FREE and theirs["config"].get(name) != value
    ]
    if theirs["dataset_digest"] != data.digest:
        differ.append("the dataset has changed since")
    if differ:
        raise ValueError(f"{config.out} holds another run ({'; '.join(differ)}); choose another `out` or delete it")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _scalars(store: Store, config: PretrainConfig) -> Iterator[Callable[[Progress], None]]:
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

    def write(report: Progress) -> None:
        writer.add_scalar("train/loss", report.loss, report.step)
        writer.add_scalar("train/samples_per_s", report.samples_per_s, report.step)
        for name, value in (report.held_out or {}).items():
            writer.add_scalar(f"held_out/{name}", value, report.step)

    try:
        yield write
    finally:
        writer.close()
