"""The dataset's own tokens as the model predicts them from the inputs alone, beside token frequencies.

The yardstick knows how common each token is in training samples, and nothing of the picture.

Legend: V vocabulary, N samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fourmill.evaluate.model.forced import Forced, labels_of
from fourmill.evaluate.model.results import TokenScore
from fourmill.evaluate.model.spread import means
from fourmill.evaluate.model.tallies import interval
from fourmill.model.network import FourM

_SMOOTHING = 0.1  # added to each count: an id that training samples do not have is not impossible


class TokenTally:
    """One modality: losses and hits of each sample, and those of frequencies on the same tokens."""

    def __init__(self, model: FourM, name: str, training_rows: Iterable[np.ndarray]) -> None:
        self.model, self.name = model, name
        counts_V = np.zeros(model.architecture.modalities[name].vocabulary, np.float64)
        for row in training_rows:
            counts_V += np.bincount(labels_of(model, name, row), minlength=len(counts_V))
        self.counted = float(counts_V.sum())
        self._log_V = np.log((counts_V + _SMOOTHING) / (counts_V + _SMOOTHING).sum())
        self._frequent = int(counts_V.argmax())
        self.rows: list[tuple[int, float, int, float, int]] = []  # tokens, loss, hits, and both by frequencies

    def add(self, ids: np.ndarray, found: Forced) -> None:
        """The tokens of one sample, and what the model thinks of them."""
        label = labels_of(self.model, self.name, ids)
        loss, hits = -float(found.log_probability.sum(dtype=np.float64)), int(found.likeliest.sum())
        by_frequency = -float(self._log_V[label].sum())
        self.rows.append((len(label), loss, hits, by_frequency, int((label == self._frequent).sum())))

    def score(self, weights_of: Mapping[int, np.ndarray]) -> TokenScore:
        """Means over tokens; intervals by drawing samples again. Nothing may be asked of no samples."""
        table = np.array(self.rows, np.float64)
        tokens, loss, hits, frequency_loss, frequent = table.sum(axis=0)
        drawn = means({"tokens": table[:, 0], "loss": table[:, 1], "hits": table[:, 2]}, weights_of[len(table)])
        none = float("nan")
        return TokenScore(
            self.name,
            len(table),
            int(tokens),
            loss / tokens,
            hits / tokens,
            frequency_loss / tokens if self.counted else none,
            frequent / tokens if self.counted else none,
            interval(drawn["loss"] / drawn["tokens"]),
            interval(drawn["hits"] / drawn["tokens"]),
        )
