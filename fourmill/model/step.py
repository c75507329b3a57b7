"""One step of training: what it computes, what it changes, and what it finds.

Invariant: a step is a function of the weights, the optimizer's averages, the step's number and its slices; who computes
which slice changes nothing but the rounding of sums.

Legend: D modalities, M target modalities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from fourmill.model.batch import Inputs, Targets
from fourmill.model.config import Architecture, PretrainConfig
from fourmill.model.distributed import Workers, gradients_stay_here, prepare
from fourmill.model.network import FourM, Loss
from fourmill.model.optimizer import Ema, adamw, learning_rate
from fourmill.model.progress import StepFigures
from fourmill.model.watch import Watch
from fourmill.tokenizers.training.progress import Interruption

Slice = tuple[Inputs, Targets]


class Training:
    """The model with all that a step changes. `step`: how many are done."""

    def __init__(self, architecture: Architecture, config: PretrainConfig, workers: Workers) -> None:
        self.architecture, self.config, self.workers = architecture, config, workers
        self.device = torch.device(workers.device)
        self.model = new_model(architecture, config.seed).to(self.device)
        self.network = prepare(self.model, config, workers)
        self.optimizer = adamw(self.model, config.lr, config.weight_decay, config.betas, self.device)
        self.ema = Ema(self.model, config.ema)
        self.watch = Watch(config)
        self.step = 0

    def advance(self, slices: Sequence[Slice], interruption: Interruption) -> tuple[StepFigures, bool]:
        """One step of the optimizer. Its figures, and whether any process was asked to stop."""
        lr = self.lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        tokens_2D = self._count(slices)
        weights = self._weights(tokens_2D[1])
        found = torch.zeros(2 + len(weights), dtype=torch.float64, device=self.device)
        for number, (inputs, targets) in enumerate(slices, 1):
            with gradients_stay_here(self.network, stay=number < len(slices)):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
                    loss: Loss = self.network(inputs, targets, weights)
                loss.total.backward()
            found[1] += loss.total.detach() / self.workers.count
            found[2:] += torch.stack([loss.sums.get(n, weights.new_zeros(())) for n in self.architecture.domains_out])
        found[0] = interruption.asked
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or torch.inf)
        figures, stopped = self._read(tokens_2D, self.workers.total(found), norm)
        self.step += 1
        if self.watch.accepts(self.step, figures):
            self.optimizer.step()
            self.ema.update(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        return figures, stopped

    def lr(self, step: int) -> float:
        c = self.config
        return learning_rate(
            step,
            lr=c.lr,
            warmup=c.warmup,
            steps=c.steps,
            schedule=c.schedule,
            decay_steps=c.decay_steps,
            decay=c.decay,
        )

    def _count(self, slices: Sequence[Slice]) -> torch.Tensor:
        """Tokens of each modality that this step shows and asks for, of all processes: (2, D), on the device."""
        assert all(side.counts is not None for pair in slices for side in pair)
        sides = [torch.tensor([side.counts for side in column]).sum(0) for column in zip(*slices, strict=True)]
        return self.workers.total(torch.stack(sides).to(self.device, torch.float64, non_blocking=True))

    def _weights(self, tokens_D: torch.Tensor) -> torch.Tensor:
        """What each target modality's summed loss counts for, float32: see `PretrainConfig.loss`.

        Gradients of several processes are averaged afterwards, so each one's loss is taken as many times.
        """
        names = self.architecture.names
        asked_M = torch.stack([tokens_D[names.index(name)] for name in self.architecture.domains_out])
        if self.config.loss == "token":
            share_M = (1 / asked_M.sum().clamp(min=1)).expand(len(asked_M))
        else:
            share_M = (asked_M > 0) / ((asked_M > 0).sum() * asked_M).clamp(min=1)
        return (share_M * self.workers.count).float()

    def _read(self, tokens_2D: torch.Tensor, found: torch.Tensor, norm: torch.Tensor) -> tuple[StepFigures, bool]:
        """The step's figures, of all processes, in the one transfer that waits for the device.

        The batch is held until then, so its memory, of another stream, is free to be used again.
        """
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        shown, asked, (grad_norm, stop, loss, *sums) = _split(
            torch.cat([tokens_2D.flatten(), whole.double().view(1), found]).tolist(), len(self.architecture.names)
        )
        out = dict(zip(self.architecture.names, asked, strict=True))
        figures = StepFigures(
            loss=loss,
            grad_norm=grad_norm,
            sums=dict(zip(self.architecture.domains_out, sums, strict=True)),
            targets={name: int(out[name]) for name in self.architecture.domains_out},
            inputs={name: int(n) for name, n in zip(self.architecture.names, shown, strict=True) if n},
        )
        return figures, stop > 0


def new_model(architecture: Architecture, seed: int) -> FourM:
    """Initial weights are a function of the seed; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        return FourM(architecture)


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything that can be spelled: the run's seed, a purpose, a step."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _split(values: list[float], count: int) -> tuple[list[float], list[float], list[float]]:
    return values[:count], values[count : 2 * count], values[2 * count :]
