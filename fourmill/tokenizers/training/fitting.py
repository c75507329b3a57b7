"""One training run of a tokenizer's network: the loop, its state, and the watch over its codebook.

Invariants: the weights are a function of configuration, examples and number of processes; a run that was interrupted
goes on from its saved state to the same weights; a collapsed codebook or a loss that is no number stops the run before
the state is saved.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourmill.tokenizers.config import CheckpointConfig
from fourmill.tokenizers.networks.vq import VQNetwork
from fourmill.tokenizers.sources import source_of
from fourmill.tokenizers.sources.base import Source
from fourmill.tokenizers.spatial import SpatialCodec
from fourmill.tokenizers.training.average import WeightAverage
from fourmill.tokenizers.training.board import Board
from fourmill.tokenizers.training.config import TrainTokenizerConfig
from fourmill.tokenizers.training.examples import Examples, Order
from fourmill.tokenizers.training.health import CodebookCollapseError, CodebookHealth, perplexity_of, refuse_collapse
from fourmill.tokenizers.training.objective import FIXED_CODES, Objective
from fourmill.tokenizers.training.progress import Interruption, Meter
from fourmill.tokenizers.training.starting import spread_latents, start_from_checkpoint
from fourmill.tokenizers.training.state import read_state, write_state
from fourmill.tokenizers.training.workers import Workers, join_workers

__all__ = ["CodebookCollapseError", "Report", "SpatialTraining", "learning_rate", "perplexity_of", "size_at"]

_FIRST = 64  # samples whose patches start the projections: some thousands of patches


@dataclass(frozen=True)
class Report:
    """How far a run is. Loss, gradient norm and `health` of the codes: since the last report, the latter None as long
    as nothing is quantized. `samples_per_s`: of the whole run, all processes together."""

    modality: str
    step: int
    steps: int
    loss: float
    grad_norm: float
    lr: float
    samples_per_s: float
    eta_s: float
    health: CodebookHealth | None

    def __str__(self) -> str:
        return (
            f"{self.modality} step {self.step}/{self.steps}: loss {self.loss:.4f}, "
            f"{self.health or 'not quantized yet'}, {self.samples_per_s:.0f} samples/s, {self.eta_s:.0f} s left"
        )


class SpatialTraining:
    """The state of one run: network, optimizer, step. `fit` brings it to the last step."""

    def __init__(
        self,
        examples: Examples,
        rows: Sequence[int],
        config: TrainTokenizerConfig,
        settings: CheckpointConfig,
        progress: Callable[[Report], None] | None = None,
        shown: Sequence[int] = (),
    ) -> None:
        """`rows` are learned from, `shown` drawn in TensorBoard."""
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        torch.manual_seed(config.seed)
        self.config, self.settings, self.examples = config, settings, examples
        self.order = Order(rows, examples.groups, config.seed, config.shards_in_memory)
        self.workers: Workers = join_workers(config.device, config.batch_size, config.accumulate)
        if self.workers.count > 1 and settings.network.quantizer == "lfq":
            # vector-quantize-pytorch 1.32 throws the sum over processes of its code frequencies away.
            raise ValueError("quantizer 'lfq' learns in one process only; take 'fsq' or 'vq' for several")
        self.device = self.workers.device
        self.source: Source = source_of(settings, config.largest)
        self.network = VQNetwork(settings, _dead_below(config)).to(self.device)
        self.objective = Objective(self.network, self.source, config).to(self.device)
        self.optimizer = torch.optim.AdamW(_groups(self.network, config.weight_decay), config.lr, betas=(0.9, 0.99))
        self.average = WeightAverage(self.network, config.ema)
        self.unquantized = 0 if config.init else config.unquantized
        self.step, self.seconds, self.losses = 0, 0.0, list[float]()
        self.meter = Meter(settings.network, self.workers)
        if not self._restore():
            self._start()
        sizes = settings.network  # memories before quantizing, the embedding of dropped codes in diffusion
        self.wrapped = self.workers.wrap(self.objective, sizes.quantizer == "memcodes" or sizes.diffusion is not None)
        self.progress = progress or (lambda report: None)
        self.board = Board(config.tensorboard, self.step) if config.tensorboard and self.workers.is_first else None
        self.shown = examples.values(shown) if self.board else []

    def _start(self) -> None:
        """The first weights; every process has the same."""
        if self.config.init:
            start_from_checkpoint(self.network, self.config)
        else:
            first = self.source.prepare(self.examples.values(self.order.batch(0, _FIRST)))
            self.network.start_from(first.to(self.device))
            if self.network.sizes.quantizer in FIXED_CODES:
                spread_latents(self.network, first.to(self.device))
        self.average = WeightAverage(self.network, self.config.ema)
        if self.workers.rank:  # random numbers of its own from here on; those of the first follow from the seed as ever
            torch.manual_seed(_seed(self.config.seed, self.workers.rank))

    def fit(self, until: int | None = None) -> None:
        """Run to step `until`, or to the end; saves the state on the way where the configuration wants it.

        SIGTERM or Ctrl-C ends the step, saves the state and raises KeyboardInterrupt.
        """
        last = self.config.steps if until is None else until
        with ThreadPoolExecutor(1) as reader, Interruption() as interruption:
            ahead = reader.submit(self._inputs, self.step)
            while self.step < last:
                started = time.perf_counter()
                ahead = self._advance(ahead, reader)
                self.seconds += time.perf_counter() - started
                if self.step % self.config.report_every == 0 or self.step == self.config.steps:
                    self._report()
                stopped = self.workers.agree(interruption.asked)
                if self.step % self.config.save_every == 0 or stopped:
                    self.save()
                if stopped:
                    raise KeyboardInterrupt(f"{self.config.modality} was stopped at step {self.step}")

    def _advance(self, ahead: Future[list[Tensor]], reader: ThreadPoolExecutor) -> Future[list[Tensor]]:
        """One step on the examples that `ahead` brings; begins to read those of the next."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        parts, ahead = ahead.result(), reader.submit(self._inputs, self.step + 1)
        self.optimizer.zero_grad()
        for number, inputs in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else self.workers.only_here(self.wrapped):
                seed = _seed(config.seed, self.step, number, self.workers.rank)
                loss, ids = self.wrapped(inputs.to(self.device), self.step >= self.unquantized, seed)
                (loss / len(parts)).backward()
            self.meter.add(loss.detach() / len(parts), ids)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        self.optimizer.step()
        self.step += 1
        self.average.update(self.step)
        self.meter.end_step(norm)
        return ahead

    def _inputs(self, step: int) -> list[Tensor]:
        """This process's prepared values of a step, part by part."""
        rows, parts = self.order.batch(step, self.config.batch_size), self.config.accumulate
        size = size_at(step, self.config)
        mine = [self.workers.share(rows, part, parts) for part in range(parts)]
        return [self.source.resize(self.source.prepare(self.examples.values(part)), size) for part in mine]

    def _report(self) -> None:
        config = self.config
        losses, norms, health = self.meter.drain(self.step, config)
        report = Report(
            modality=config.modality,
            step=self.step,
            steps=config.steps,
            loss=float(np.mean(losses)),
            grad_norm=float(np.mean(norms)),
            lr=learning_rate(self.step - 1, config),
            samples_per_s=config.batch_size * self.step / max(self.seconds, 1e-9),
            eta_s=(config.steps - self.step) * self.seconds / self.step,
            health=health,
        )
        self.losses.append(report.loss)
        if self.workers.is_first:
            self.progress(report)
        if self.board:
            self._draw(report)
        if health and self.step >= max(config.warmup, self.unquantized) + config.report_every:
            refuse_collapse(health, config, self.step)

    def _draw(self, report: Report) -> None:
        assert self.board is not None
        names = ("loss", "lr", "grad_norm", "samples_per_s")
        values = {f"train/{name}": getattr(report, name) for name in names}
        if report.health:
            values |= {f"codebook/{name}": getattr(report.health, name) for name in ("usage", "perplexity", "entropy")}
        self.board.scalars(report.step, values)
        if self.shown and report.health:
            with self.average.applied():
                codec = SpatialCodec(self.settings, self.network.eval(), self.source, self.device)
                self.board.pictures(report.step, codec, self.shown)
            self.objective.train()

    def save(self) -> None:
        """Replace the saved state by the present one; whole or not at all. All processes take part."""
        if self.config.state is None:
            return
        self.meter.check(self.step, self.config)
        generators = self.workers.gather(
            [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if "cuda" in self.device else [])]
        )
        progress = [self.step, self.seconds, self.losses, *self.meter.state_dict()]
        if not self.workers.is_first:
            return
        facts = {"average": self.average.state_dict(), "generators": generators, "progress": progress}
        write_state(self.config, self.settings, self.network, self.optimizer, facts)

    def _restore(self) -> bool:
        """Whether there was a state to go on from."""
        facts = read_state(self.config, self.settings, self.network, self.optimizer, self.device)
        if facts is None:
            return False
        self.average.load_state_dict(facts["average"])
        self.step, self.seconds, self.losses, *meter = facts["progress"]
        self.meter.load_state_dict(meter, self.workers.is_first)
        if self.workers.rank >= len(facts["generators"]):  # there are more processes than when it was saved
            torch.manual_seed(_seed(self.config.seed, self.workers.rank, self.step))
            return True
        generator, *cuda = facts["generators"][self.workers.rank]
        torch.set_rng_state(generator.cpu())
        if cuda and "cuda" in self.device:
            torch.cuda.set_rng_state(cuda[0].cpu(), self.device)
        return True


def size_at(step: int, config: TrainTokenizerConfig) -> int:
    """Side of the values of a step: one of `sizes`, a function of seed and step."""
    if not config.sizes:
        return config.network.size
    return int(config.sizes[np.random.default_rng([config.seed, step]).integers(len(config.sizes))])


def learning_rate(step: int, config: TrainTokenizerConfig) -> float:
    """Linear warm-up, then a cosine to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _dead_below(config: TrainTokenizerConfig) -> float:
    """Uses at one move of the codebook's averages below which a code is dead: a 32nd of its fair share, as 4M's."""
    rows, columns = config.network.grid_of(config.largest)
    return config.batch_size * rows * columns / config.network.vocabulary / 32 / config.accumulate


def _groups(network: VQNetwork, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in network.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _seed(*parts: int) -> int:
    """A seed of 63 bits from numbers."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0] >> 1)
