"""Vectors: normals and features of each place, and one vector for the whole picture.

Shapes: B batch, C channels of a value, S side in pixels or cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fourmill.tokenizers.config import VECTORS
from fourmill.tokenizers.sources.base import Source


class Directions(Source):
    """Unit vectors float32 (C, S, S): normals, or features whose length is dropped. Loss: 1 - cosine, plus L2.

    A vector of length 0 (a normal that is not known) is given as zeros and not asked for.
    """

    def prepare(self, values: Any) -> Tensor:
        vectors = torch.from_numpy(self.stack(values).astype(np.float32))
        if not torch.isfinite(vectors).all():
            raise ValueError(f"a {self.config.source} value holds NaN or infinite numbers")
        return _unit(vectors)

    def loss(self, outputs_BCSS: Tensor, inputs: Tensor) -> Tensor:
        known_BSS = (inputs.square().sum(1) > 0.01).float()  # averaging over areas shortens vectors, far less than so
        cosine = functional.cosine_similarity(outputs_BCSS, inputs, dim=1)
        # L2 (summed over channels: in units of the unit vector) keeps the length near 1, where cosine is blind.
        distance = (outputs_BCSS - inputs).square().sum(1)
        return ((1 - cosine + 0.5 * distance) * known_BSS).sum() / known_BSS.sum().clamp(min=1)

    def restore(self, outputs_BCSS: Tensor) -> list[np.ndarray]:
        return list(functional.normalize(outputs_BCSS.float(), dim=1).cpu().numpy())

    def measure(self, truth: Sequence[Any], restored: Sequence[Any]) -> dict[str, float]:
        cosines = [_cosine(np.asarray(t), r) for t, r in zip(truth, restored, strict=True)]
        figures = {"cosine": float(np.mean(cosines))}
        if self.config.source == "normal":
            angles = [_angles(np.asarray(t), r) for t, r in zip(truth, restored, strict=True)]
            figures["median_angle_deg"] = float(np.median(np.concatenate(angles)))
        return figures


def _unit(vectors_BCSS: Tensor) -> Tensor:
    """Vectors of length 1 along C; zeros stay zeros. Torch's own `normalize` takes fifty times as long along dim 1."""
    return vectors_BCSS / vectors_BCSS.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)


def _angles(truth: np.ndarray, restored: np.ndarray) -> np.ndarray:
    """Degrees between the unit vectors of each known pixel."""
    known = np.linalg.norm(truth, axis=0) > 0.5
    return np.degrees(np.arccos(np.clip((truth * restored).sum(0)[known], -1, 1)))


class Raw(Source):
    """Vectors whose length counts, float32 (C, S, S) or (C,): features as a teacher gives them. Loss: smooth L1."""

    def prepare(self, values: Any) -> Tensor:
        vectors = torch.from_numpy(self.stack(values).astype(np.float32))
        if not torch.isfinite(vectors).all():
            raise ValueError(f"a {self.config.source} value holds NaN or infinite numbers")
        return vectors if vectors.ndim == 4 else vectors[:, :, None, None]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.config.channels,) if self.config.source in VECTORS else super().shape

    def loss(self, outputs_BCSS: Tensor, inputs: Tensor) -> Tensor:
        return functional.smooth_l1_loss(outputs_BCSS, inputs)

    def restore(self, outputs_BCSS: Tensor) -> list[np.ndarray]:
        values = outputs_BCSS.float().cpu().numpy()
        return [value.reshape(self.shape) for value in values] if self.config.source in VECTORS else list(values)

    def measure(self, truth: Sequence[Any], restored: Sequence[Any]) -> dict[str, float]:
        pairs = [(np.asarray(t), r) for t, r in zip(truth, restored, strict=True)]
        return {
            "cosine": float(np.mean([_cosine(t, r) for t, r in pairs])),
            "rmse": float(np.sqrt(np.mean([np.mean((t - r) ** 2) for t, r in pairs]))),
        }


class UnitVector(Raw):
    """One global vector float32 (C,) whose length is dropped. Loss: 1 - cosine, plus L2."""

    def prepare(self, values: Any) -> Tensor:
        return _unit(super().prepare(values))

    def loss(self, outputs_BCSS: Tensor, inputs: Tensor) -> Tensor:
        cosine = functional.cosine_similarity(outputs_BCSS, inputs, dim=1)
        return (1 - cosine + 0.5 * (outputs_BCSS - inputs).square().sum(1)).mean()

    def restore(self, outputs_BCSS: Tensor) -> list[np.ndarray]:
        return super().restore(functional.normalize(outputs_BCSS.float(), dim=1))

    def measure(self, truth: Sequence[Any], restored: Sequence[Any]) -> dict[str, float]:
        return {"cosine": super().measure(truth, restored)["cosine"]}  # lengths are dropped on purpose


def _cosine(truth: np.ndarray, restored: np.ndarray) -> float:
    lengths = np.linalg.norm(truth, axis=0) * np.linalg.norm(restored, axis=0)
    return float(np.mean((truth * restored).sum(0) / np.maximum(lengths, 1e-8)))
