"""A tokenizer's training small enough for a test: tilted planes of depth, a network of one block each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fourmill.tokenizers.training.config import TrainTokenizerConfig
from fourmill.tokenizers.training.examples import ArrayExamples
from fourmill.tokenizers.training.fitting import SpatialTraining
from fourmill.tokenizers.training.run import settings_of

NETWORK: dict[str, Any] = {
    "size": 16,
    "patch_size": 4,
    "dim": 32,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "heads": 2,
    "latent_dim": 8,
    "codebook_size": 32,
}


def ramps(count: int, seed: int, side: int = 16) -> list[np.ndarray]:
    """Depth maps of tilted planes, 1 to 9 metres."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] / side
    return [(1 + 4 * abs(a * rows + b * columns)).astype(np.float32) for a, b in rng.uniform(-1, 1, (count, 2))]


def config(out: Path, **fields: Any) -> TrainTokenizerConfig:
    network = {**NETWORK, **fields.pop("network", {})}
    base = {"dataset": "none", "modality": "tok_depth", "out": str(out), "steps": 20, "batch_size": 16, "lr": 3e-3}
    base |= {"warmup": 0, "unquantized": 8, "report_every": 5, "min_perplexity": 0, "device": "cpu", "num_threads": 1}
    return TrainTokenizerConfig.model_validate({**base, "network": network, **fields})


def examples_of(chosen: TrainTokenizerConfig) -> ArrayExamples:
    return ArrayExamples([str(i) for i in range(48)], ramps(48, 3, chosen.largest))


def training(chosen: TrainTokenizerConfig, **fields: Any) -> SpatialTraining:
    examples, rows = examples_of(chosen), list(range(48))
    return SpatialTraining(examples, rows, chosen, settings_of(examples, rows, chosen, 0), **fields)
