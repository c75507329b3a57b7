"""Pictures and maps of one number a pixel: rgb, depth, classes, edges, masks.

Shapes: B batch, C channels of a value, S side in pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fourmill.tokenizers.sources.base import Source

VOID = 255  # semseg's class id for pixels that have none; row 0 of the network's classes
MIN_DEPTH = 1e-3  # metres; nearer than any lens focuses, and keeps the logarithm finite
UNKNOWN = -10.0  # normalised depth of a pixel that has none: ten deviations nearer than the mean, where nothing is
TRUNCATED = 0.1  # share cut off at either end before 4M takes a depth map's mean and variance
EDGE_WEIGHT = 8.0  # edges are 1 to 5 % of the pixels; at weight 1 the least error is a map that is all black


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
    """float32 (S, S) in and out. Loss: smooth L1 of the normalised map, where depth is known.

    Metric depth of 0 is not known: the network is given `UNKNOWN`, and is not asked for it.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,) * 2

    def prepare(self, values: Any) -> Tensor:
        depth = self.stack(values).astype(np.float32)
        if not np.isfinite(depth).all():
            raise ValueError("a depth map holds NaN or infinite values")
        if self.config.normalisation.kind == "standardise":
            return torch.from_numpy(np.stack([standardise(d) for d in depth])[:, None])
        norm = self.config.normalisation
        logs = (np.log(np.maximum(depth, MIN_DEPTH)) - norm.offset) / norm.scale
        logs = np.where(depth > 0, np.maximum(logs, UNKNOWN + 1), UNKNOWN)
        return torch.from_numpy(logs[:, None]).float()

    def loss(self, outputs_BCSS: Tensor, inputs: Tensor) -> Tensor:
        known = inputs > UNKNOWN + 0.5 if self.config.normalisation.kind == "log" else torch.ones_like(inputs).bool()
        # beta 0.1 of a standard deviation: linear beyond it, so object borders do not drown flat surfaces.
        errors = functional.smooth_l1_loss(outputs_BCSS, inputs, beta=0.1, reduction="none")
        return (errors * known).sum() / known.sum().clamp(min=1)

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
        known = [(t[t > 0], r[t > 0]) for t, r in zip(map(np.asarray, truth), restored, strict=True)]
        errors = [np.mean(np.abs(r - t) / np.maximum(t, MIN_DEPTH)) for t, r in known if len(t)]
        return {"abs_rel": float(np.mean(errors)) if errors else 0.0}


def standardise(depth: np.ndarray) -> np.ndarray:
    """4M's truncated standardisation of one map: mean and variance of its middle 80 %."""
    values = np.sort(depth, axis=None).astype(np.float64)
    cut = int(len(values) * TRUNCATED)
    middle = values[cut : len(values) - cut]
    return ((depth - middle.mean()) / np.sqrt(middle.var() + 1e-6)).astype(np.float32)


class Semseg(Source):
    """uint8 (S, S) class ids in and out. Void (255) is an input of its own, is never asked for, and never given.
    Cross-entropy."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,) * 2

    def prepare(self, values: Any) -> Tensor:
        ids = torch.from_numpy(self.stack(values).astype(np.int64))
        wrong = ids[((ids < 0) | (ids >= self.config.classes)) & (ids != VOID)]
        if len(wrong):
            raise ValueError(f"class id {int(wrong[0])} in a semseg value; known: 0..{self.config.classes - 1} and 255")
        return torch.where(ids == VOID, 0, ids + 1)

    def resize(self, inputs: Tensor, size: int) -> Tensor:
        """By the nearest pixel: classes have no mean."""
        return functional.interpolate(inputs[:, None].float(), size=(size, size), mode="nearest-exact")[:, 0].long()

    def loss(self, outputs_BCSS: Tensor, inputs: Tensor) -> Tensor:
        known = (inputs != 0).sum().clamp(min=1)  # a batch of void only must give 0, not NaN
        return functional.cross_entropy(outputs_BCSS.float(), inputs, ignore_index=0, reduction="sum") / known

    def restore(self, outputs_BCSS: Tensor) -> list[np.ndarray]:
        return list(outputs_BCSS[:, 1:].argmax(1).to(torch.uint8).cpu().numpy())

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


class Edges(Source):
    """uint8 (S, S), 0 to 255, in and out. Loss: L2 in units of the range -1..1, edges counting `EDGE_WEIGHT` times."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,) * 2

    def prepare(self, values: Any) -> Tensor:
        edges = self.stack(values)
        if edges.dtype != np.uint8:
            raise ValueError(f"{self.config.source} values of type {edges.dtype}; uint8 is needed")
        return torch.from_numpy(edges)[:, None].float() / 127.5 - 1

    def loss(self, outputs_BCSS: Tensor, inputs: Tensor) -> Tensor:
        weights = 1 + (EDGE_WEIGHT - 1) * (inputs + 1) / 2
        return (weights * (outputs_BCSS - inputs).square()).sum() / weights.sum()

    def restore(self, outputs_BCSS: Tensor) -> list[np.ndarray]:
        pixels = ((outputs_BCSS[:, 0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return list(pixels.cpu().numpy())

    def measure(self, truth: Sequence[Any], restored: Sequence[Any]) -> dict[str, float]:
        pairs = [(np.asarray(t) > 127, np.asarray(r) > 127) for t, r in zip(truth, restored, strict=True)]
        return {"edge_f1_1px": _f1(pairs)}


class Mask(Edges):
    """uint8 (S, S), 0 and 1, in and out: an instance within its box (4M: 64 x 64). Binary cross-entropy."""

    def prepare(self, values: Any) -> Tensor:
        masks = self.stack(values).astype(np.uint8)
        if masks.max(initial=0) > 1:
            raise ValueError(f"a mask holds {masks.max()}; 0 and 1 are known")
        return torch.from_numpy(masks)[:, None].float()

    def loss(self, outputs_BCSS: Tensor, inputs: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs_BCSS.float(), inputs)

    def restore(self, outputs_BCSS: Tensor) -> list[np.ndarray]:
        return list((outputs_BCSS[:, 0] > 0).to(torch.uint8).cpu().numpy())

    def measure(self, truth: Sequence[Any], restored: Sequence[Any]) -> dict[str, float]:
        pairs = [(np.asarray(t) > 0, np.asarray(r) > 0) for t, r in zip(truth, restored, strict=True)]
        return {"mask_iou": float(np.mean([(t & r).sum() / max((t | r).sum(), 1) for t, r in pairs]))}


def _f1(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Harmonic mean of precision and recall over all pixels, an edge within a pixel of one counting as found; 1 where
    there is nothing to find and nothing found."""
    wanted, found = (sum(int(x.sum()) for x in side) for side in zip(*pairs, strict=True))
    if not wanted or not found:
        return float(wanted == found)
    precision = sum(int((r & _grown(t)).sum()) for t, r in pairs) / found
    recall = sum(int((t & _grown(r)).sum()) for t, r in pairs) / wanted
    return 2 * precision * recall / max(precision + recall, 1e-9)


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its eight neighbours."""
    padded = np.pad(mask, 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    return np.asarray(windows.any(axis=(2, 3)))
