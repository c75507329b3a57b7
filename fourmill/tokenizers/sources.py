"""What differs between the modalities that a spatial tokenizer can learn: input, loss, value, figure of merit.

Invariant: `prepare` refuses a value of another shape or range by name, so that nothing is resized or wrapped silently;
`restore(prepare(value))` is the value, up to what its normalisation drops on purpose (scale of relative depth, length
of vectors).

Shapes: B batch, C channels of a value, S side in pixels (or cells), K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fourmill.tokenizers.config import SpatialCheckpointConfig

VOID = 255  # semseg's class id for pixels that have none
MIN_DEPTH = 1e-3  # metres; nearer than any lens focuses, and keeps the logarithm finite
TRUNCATED = 0.1  # share cut off at either end before 4M takes a depth map's mean and variance


class Source(ABC):
    """One modality's side of the tokenizer; made by `source_of`."""

    def __init__(self, config: SpatialCheckpointConfig) -> None:
        self.config = config

    @property
    def out_channels(self) -> int:
        """Numbers that the network gives for each pixel."""
        return self.config.channels

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one value."""
        side = self.config.network.size
        return (self.config.channels, side, side)

    def stack(self, values: Any) -> np.ndarray:
        """B values as one array (B, *shape); ValueError for a value of another shape."""
        for value in values:
            if np.shape(value) != self.shape:
                raise ValueError(
                    f"a {self.config.source} value of shape {np.shape(value)}; this tokenizer takes {self.shape}"
                )
        return np.stack([np.asarray(value) for value in values])

    @abstractmethod
    def prepare(self, values: Any) -> Tensor:
        """B values -> what the network is given: float32 (B, C, S, S), for semseg int64 (B, S, S)."""

    @abstractmethod
    def loss(self, outputs_BCSS: Tensor, inputs: Tensor) -> Tensor:
        """Scalar; `inputs` as `prepare` made them."""

    @abstractmethod
    def restore(self, outputs_BCSS: Tensor) -> list[np.ndarray]:
        """B values of the modality."""

    @abstractmethod
    def measure(self, truth: Sequence[Any], restored: Sequence[Any]) -> dict[str, float]:
        """Figures of merit of reconstructions, by name."""


class Rgb(Source):
    """uint8 (3, S, S) in, uint8 (S, S, 3) out. Loss: half L1, half L2, in units of the range -1..1."""

    def prepare(self, values: Any) -> Tensor:
        pixels = self.stack(values)
        if pixels.dtype != np.uint8:
            raise ValueError(f"rgb values of type {pixels.dtype}; uint8 is needed")
        return torch.from_numpy(pixels).float() / 127.5 - 1

    def loss(self, outputs_BCSS: Tensor, inputs: Tensor) -> Tensor:
        # L1 alone gives medians (flat textures), L2 alone blur; their sum did best by eye on scenes.
        return 0.5 * functional.l1_loss(outputs_BCSS, inputs) + 0.5 * functional.mse_loss(outputs_BCSS, inputs)

    def restore(self, outputs_BCSS: Tensor) -> list[np.ndarray]:
        pixels = ((outputs_BCSS.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return list(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def measure(self, truth: Sequence[Any], restored: Sequence[Any]) -> dict[str, float]:
        found = [_psnr(np.transpose(t, (1, 2, 0)), r) for t, r in zip(truth, restored, strict=True)]
        return {"psnr_db": float(np.mean(found))}


def _psnr(truth: np.ndarray, restored: np.ndarray) -> float:
    error = float(np.mean((truth.astype(np.float64) - restored) ** 2))
    return 10 * float(np.log10(255.0**2 / max(error, 1e-4)))  # 1e-4 caps a perfect copy at 88 dB


class Depth(Source):
    """float32 (S, S) in and out. Loss: smooth L1 of the normalised map."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.config.network.size,) * 2

    def prepare(self, values: Any) -> Tensor:
        depth = self.stack(values).astype(np.float32)
        if not np.isfinite(depth).all():
            raise ValueError("a depth map holds NaN or infinite values")
        if self.config.normalisation.kind == "standardise":
            return torch.from_numpy(np.stack([standardise(d) for d in depth])[:, None])
        norm = self.config.normalisation
        return torch.from_numpy((np.log(np.maximum(depth, MIN_DEPTH)) - norm.offset)[:, None] / norm.scale).float()

    def loss(self, outputs_BCSS: Tensor, inputs: Tensor) -> Tensor:
        # beta 0.1 of a standard deviation: linear beyond it, so object borders do not drown flat surfaces.
        return functional.smooth_l1_loss(outputs_BCSS, inputs, beta=0.1)

    def restore(self, outputs_BCSS: Tensor) -> list[np.ndarray]:
        maps = outputs_BCSS[:, 0].float().cpu().numpy()
        norm = self.config.normalisation
        if norm.kind == "log":
            # Beyond 12 deviations lies nothing but overflow of the exponential.
            maps = np.exp(np.clip(maps, -12, 12) * norm.scale + norm.offset)
        return list(maps.astype(np.float32))

    def measure(self, truth: Sequence[Any], restored: Sequence[Any]) -> dict[str, float]:
        if self.config.normalisation.kind == "standardise":
            errors = [np.abs(standardise(np.asarray(t)) - r).mean() for t, r in zip(truth, restored, strict=True)]
            return {"mean_abs_error": float(np.mean(errors))}
        pairs = [(np.maximum(t, MIN_DEPTH), r) for t, r in zip(truth, restored, strict=True)]
        return {"abs_rel": float(np.mean([np.mean(np.abs(r - t) / t) for t, r in pairs]))}


def standardise(depth: np.ndarray) -> np.ndarray:
    """4M's truncated standardisation of one map: mean and variance of its middle 80 %."""
    values = np.sort(depth, axis=None).astype(np.float64)
    cut = int(len(values) * TRUNCATED)
    middle = values[cut : len(values) - cut]
    return ((depth - middle.mean()) / np.sqrt(middle.var() + 1e-6)).astype(np.float32)


class Directions(Source):
    """Unit vectors float32 (C, S, S): normals, or features whose length is dropped. Loss: 1 - cosine, plus L2."""

    def prepare(self, values: Any) -> Tensor:
        vectors = torch.from_numpy(self.stack(values).astype(np.float32))
        if not torch.isfinite(vectors).all():
            raise ValueError(f"a {self.config.source} value holds NaN or infinite numbers")
        return functional.normalize(vectors, dim=1)

    def loss(self, outputs_BCSS: Tensor, inputs: Tensor) -> Tensor:
        cosine = functional.cosine_similarity(outputs_BCSS, inputs, dim=1).mean()
        # L2 (summed over channels: in units of the unit vector) keeps the length near 1, where cosine is blind.
        return (1 - cosine) + 0.5 * (outputs_BCSS - inputs).square().sum(1).mean()

    def restore(self, outputs_BCSS: Tensor) -> list[np.ndarray]:
        return list(functional.normalize(outputs_BCSS.float(), dim=1).cpu().numpy())

    def measure(self, truth: Sequence[Any], restored: Sequence[Any]) -> dict[str, float]:
        cosines = [_cosine(np.asarray(t), r) for t, r in zip(truth, restored, strict=True)]
        return {"cosine": float(np.mean(cosines))}


def _cosine(truth: np.ndarray, restored: np.ndarray) -> float:
    lengths = np.linalg.norm(truth, axis=0) * np.linalg.norm(restored, axis=0)
    return float(np.mean((truth * restored).sum(0) / np.maximum(lengths, 1e-8)))


class Semseg(Source):
    """uint8 (S, S) class ids in and out; void (255) is an input of its own and is never asked for. Cross-entropy."""

    @property
    def out_channels(self) -> int:
        return self.config.classes

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.config.network.size,) * 2

    def prepare(self, values: Any) -> Tensor:
        ids = torch.from_numpy(self.stack(values).astype(np.int64))
        wrong = ids[((ids < 0) | (ids >= self.config.classes)) & (ids != VOID)]
        if len(wrong):
            raise ValueError(f"class id {int(wrong[0])} in a semseg value; known: 0..{self.config.classes - 1} and 255")
        return ids

    def loss(self, outputs_BCSS: Tensor, inputs: Tensor) -> Tensor:
        known = (inputs != VOID).sum().clamp(min=1)  # a batch of void only must give 0, not NaN
        return functional.cross_entropy(outputs_BCSS.float(), inputs, ignore_index=VOID, reduction="sum") / known

    def restore(self, outputs_BCSS: Tensor) -> list[np.ndarray]:
        return list(outputs_BCSS.argmax(1).to(torch.uint8).cpu().numpy())

    def measure(self, truth: Sequence[Any], restored: Sequence[Any]) -> dict[str, float]:
        num = self.config.classes
        counts_KK = np.zeros((num, num), dtype=np.int64)
        for t, r in zip(truth, restored, strict=True):
            known = np.asarray(t) != VOID
            pairs = np.asarray(t)[known].astype(np.int64) * num + r[known]
            counts_KK += np.bincount(pairs, minlength=num * num).reshape(num, num)
        hits = np.diag(counts_KK)
        union = counts_KK.sum(0) + counts_KK.sum(1) - hits
        present = union > 0
        accuracy = hits.sum() / max(int(counts_KK.sum()), 1)
        return {"pixel_accuracy": float(accuracy), "miou": float((hits[present] / union[present]).mean())}


def source_of(config: SpatialCheckpointConfig) -> Source:
    """The side of the tokenizer that belongs to the checkpoint's source modality."""
    kinds: dict[str, type[Source]] = {"rgb": Rgb, "depth": Depth, "semseg": Semseg}
    return kinds.get(config.source, Directions)(config)
