"""How good a model is on held-out samples, beside the best that can be done without looking at anything.

The masks are drawn once, on the CPU, from a fixed seed, so that every evaluation of every run asks for the very same
tokens. The yardstick predicts each token with its frequency in the training samples: a model that has learnt only how
common tokens are does not beat it.

Legend: V vocabulary, K targets of one modality.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from fourmill.model.batch import Inputs, Targets
from fourmill.model.data import Mixture, TokenDataset
from fourmill.model.loader import in_order
from fourmill.model.masking import Masker
from fourmill.model.network import FourM
from fourmill.tokenizers.training.workers import Workers

_SEED = 20_240_613  # any constant; not the run's seed, so that runs can be compared
_COUNTED = 8192  # training samples that frequencies are counted on: half a million tokens of each 64-token grid
_SMOOTHING = (1.0, 0.1, 0.01)  # added to each count; whichever serves the yardstick best


class HeldOut:
    """Masked batches of held-out samples, made once."""

    def __init__(
        self,
        dataset: TokenDataset | Mixture,
        masker: Masker,
        most: int,
        batch_size: int,
        crop: int | Literal["random"],
    ) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        samples = dataset.some("held_out", most, np.random.default_rng(_SEED))
        batches = in_order(dataset, samples, batch_size, 0 if crop == "random" else crop)
        self.samples = len(samples)
        self.batches: list[tuple[Inputs, Targets]] = [masker(batch, generator) for batch in batches]

    def loss(
        self, model: FourM, device: torch.device, autocast: bool, workers: Workers | None = None
    ) -> dict[str, float]:
        """Mean cross-entropy by modality, in nats a token. `workers`: processes that share the batches out."""
        names = model.architecture.domains_out
        rank, count = (workers.rank, workers.count) if workers else (0, 1)
        found_2M = torch.zeros(2, len(names), dtype=torch.float64, device=device)
        model.eval()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            for start in range(0, len(self.batches), count):
                # One without a batch of its own computes too, since models in shards do so together.
                mine = start + rank < len(self.batches)
                inputs, targets = self.batches[start + rank if mine else 0]
                loss = model(inputs.to(device), targets.to(device))
                for number, name in enumerate(names if mine else ()):
                    found_2M[0, number] += loss.sums.get(name, 0.0)
                    found_2M[1, number] += loss.counts.get(name, 0)
        model.train()
        sums, counts = (workers.total(found_2M) if workers else found_2M).tolist()
        return {name: s / n for name, s, n in zip(names, sums, counts, strict=True) if n}

    def frequency_loss(self, names: Sequence[str], counts: dict[str, np.ndarray]) -> dict[str, float]:
        """The same for the predictor that gives each token its frequency, by modality with held-out targets."""
        found = {}
        for name, number in ((n, names.index(n)) for n in counts):
            labels_K = np.concatenate(
                [t.label_BM[t.modality_BM == number].numpy() for _, t in self.batches] or [np.zeros(0, int)]
            )
            if len(labels_K):
                found[name] = min(_constant_loss(counts[name], labels_K, extra) for extra in _SMOOTHING)
        return found


def _constant_loss(counts_V: np.ndarray, labels_K: np.ndarray, extra: float) -> float:
    smoothed_V = counts_V + extra
    return float(-np.log(smoothed_V[labels_K] / smoothed_V.sum()).mean())


def count_tokens(
    dataset: TokenDataset | Mixture, masker: Masker, names: Sequence[str], outputs: Sequence[str]
) -> dict[str, np.ndarray]:
    """How often each id is a label on training samples, by modality: (V,) each.

    All cells of a grid count, masked or not: every one is a target equally often. For texts it is the targets of one
    masking, with their sentinels and end markers.
    """
    generator = torch.Generator().manual_seed(_SEED + 1)
    samples = dataset.some("train", _COUNTED, np.random.default_rng(_SEED + 1))
    counts = {name: np.zeros(dataset.infos[name].vocabulary, dtype=np.int64) for name in outputs}
    for start in range(0, len(samples), 256):
        part = samples[start : start + 256]
        batch = dataset.batch(part, np.zeros(len(part), dtype=np.int64), with_pixels=False)
        _, targets = masker(batch, generator)
        for name in outputs:
            if name in batch.lengths:
                ids_K = targets.label_BM[targets.modality_BM == names.index(name)].numpy()
            else:
                ids_K = batch.tokens[name].numpy()[batch.present[name].numpy()].ravel()
            counts[name] += np.bincount(ids_K, minlength=len(counts[name]))
    return counts
