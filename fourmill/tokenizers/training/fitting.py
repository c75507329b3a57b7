"""One training run of a spatial tokenizer: the loop, its state, and the watch over its codebook.

Invariants: the weights are a function of configuration and examples; a run that was interrupted goes on from its saved
state to the same weights; a collapsed codebook stops the run.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourmill.tokenizers.config import SpatialCheckpointConfig, TrainTokenizerConfig
from fourmill.tokenizers.examples import Examples, Order
from fourmill.tokenizers.networks import SpatialNetwork
from fourmill.tokenizers.sources import Source, source_of

log = logging.getLogger(__name__)

_FIRST = 64  # samples whose patches start the projections: some thousands of patches


class CodebookCollapseError(RuntimeError):
    """The codebook has come to a few codes; no checkpoint was written."""


class SpatialTraining:
    """The state of one run: network, optimizer, step. `fit` brings it to the last step."""

    def __init__(
        self, examples: Examples, rows: Sequence[int], config: TrainTokenizerConfig, settings: SpatialCheckpointConfig
    ) -> None:
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        torch.manual_seed(config.seed)
        self.config, self.settings, self.examples = config, settings, examples
        self.order = Order(rows, examples.groups, config.seed, config.shards_in_memory)
        self.device = _device(config.device)
        self.source: Source = source_of(settings)
        grid = settings.network.grid
        # 4M: a code is dead when used less than a 32nd of its fair share.
        dead = config.batch_size * grid[0] * grid[1] / settings.network.vocabulary / 32
        self.network = SpatialNetwork(settings, dead).to(self.device).train()
        self.optimizer = torch.optim.AdamW(_groups(self.network, config.weight_decay), config.lr, betas=(0.9, 0.99))
        self.step, self.seconds, self.losses = 0, 0.0, list[float]()
        self._window: list[float] = []
        self._counts = np.zeros(settings.network.vocabulary, dtype=np.int64)
        if not self._restore():
            self.network.start_from(self._inputs(self.order.batch(0, _FIRST)))

    def fit(self, until: int | None = None) -> None:
        """Run to step `until`, or to the end; saves the state on the way where the configuration wants it."""
        last = self.config.steps if until is None else until
        while self.step < last:
            started = time.perf_counter()
            self._advance()
            self.seconds += time.perf_counter() - started
            if self.step % self.config.report_every == 0 or self.step == self.config.steps:
                self._report()
            if self.step % self.config.save_every == 0:
                self.save()

    def _advance(self) -> None:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        inputs = self._inputs(self.order.batch(self.step, config.batch_size))
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=config.autocast):
            if self.step < config.unquantized:
                outputs_BCSS, ids_BL, commitment = self.network.unquantized(inputs), None, 0.0
            else:
                outputs_BCSS, ids_BL, commitment = self.network(inputs)
        loss = self.source.loss(outputs_BCSS.float(), inputs) + commitment
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        self.optimizer.step()
        self.step += 1
        self._window.append(float(loss.detach()))
        if ids_BL is not None:
            self._counts += np.bincount(ids_BL.flatten().cpu().numpy(), minlength=len(self._counts))

    def _inputs(self, rows: Sequence[int]) -> torch.Tensor:
        return self.source.prepare(self.examples.values(rows)).to(self.device)

    def _report(self) -> None:
        loss = float(np.mean(self._window))
        perplexity = perplexity_of(self._counts)
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of {self.config.modality} is {loss} at step {self.step}; lower lr")
        codes = f"{perplexity:.0f} codes in effect" if self._counts.any() else "not quantized yet"
        where = f"{self.config.modality} step {self.step}/{self.config.steps}"
        log.info("%s: loss %.4f, %s, %.0f s", where, loss, codes, self.seconds)
        self.losses.append(loss)
        self._window.clear()
        self._counts[:] = 0
        if self.step >= max(self.config.warmup, self.config.unquantized) + self.config.report_every:
            refuse_collapse(perplexity, self.config, self.step)

    def save(self) -> None:
        """Replace the saved state by the present one; whole or not at all."""
        if self.config.state is None:
            return
        path = Path(self.config.state) / "state.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "run": _identity(self.config, self.settings),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": torch.get_rng_state(),  # dead codes are restarted from it
            "cuda": torch.cuda.get_rng_state_all() if self.device.startswith("cuda") else [],
            "progress": [self.step, self.seconds, self.losses, self._window, self._counts.tolist()],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        waiting = path.with_suffix(".partial")
        waiting.write_bytes(buffer.getvalue())
        os.replace(waiting, path)

    def _restore(self) -> bool:
        """Whether there was a state to go on from."""
        path = Path(self.config.state or "") / "state.pt"
        if self.config.state is None or not path.is_file():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["run"] != _identity(self.config, self.settings):
            raise ValueError(f"{path} is of another run; remove it or give another `state` folder")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"].cpu())
        if state["cuda"]:
            torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])
        self.step, self.seconds, self.losses, self._window, counts = state["progress"]
        self._counts = np.asarray(counts, dtype=np.int64)
        log.info("%s goes on from step %d", self.config.modality, self.step)
        return True


def _identity(config: TrainTokenizerConfig, settings: SpatialCheckpointConfig) -> str:
    """What must be equal for a state to be gone on from; where files lie and how often is reported is not."""
    chosen = config.model_dump_json(exclude={"out", "state", "save_every", "eval_samples", "licence", "num_threads"})
    return hashlib.sha256((chosen + settings.model_dump_json()).encode()).hexdigest()


def learning_rate(step: int, config: TrainTokenizerConfig) -> float:
    """Linear warm-up, then a cosine to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _groups(network: SpatialNetwork, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in network.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def perplexity_of(counts: np.ndarray) -> float:
    """exp(entropy) of a histogram: the number of equally used codes that would be as varied."""
    shares = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def refuse_collapse(perplexity: float, config: TrainTokenizerConfig, step: int) -> None:
    """Raise `CodebookCollapseError` if fewer codes than configured are in effective use."""
    if perplexity < config.min_perplexity:
        raise CodebookCollapseError(
            f"the codebook of {config.modality} has collapsed: {perplexity:.1f} of {config.network.vocabulary} codes "
            f"in effective use at step {step}, fewer than min_perplexity={config.min_perplexity:g}. Look at the "
            f"labels (all alike?), lower lr or latent_dim, or set a smaller codebook"
        )
