"""What each task minimises and how it is measured on held-out samples, in the figures of its field.

Classification: top-1 and top-5. Classes of pixels: mIoU. Depth: AbsRel, RMSE and delta, the mean over pictures.
Normals: angles in degrees over all pixels. Pixels without a label count nowhere: class 255, depth 0, a zero vector.

Legend: B samples, S side in pixels, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch.nn import functional

from fourmill.evaluate.dense import angles, class_iou, confusion, depth_errors
from fourmill.model.finetune.config import FinetuneConfig

VOID = 255
_MIN_DEPTH = 1e-3  # metres, as in every evaluation on NYUv2


class Task(ABC):
    """`outputs`: channels of the head. `headline`: the figure to look at; `rises`: whether more of it is better."""

    headline: str
    rises: bool

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs
        self.reset()

    @abstractmethod
    def loss(self, out: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Scalar, of float32 outputs."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what was added."""

    @abstractmethod
    def add(self, out: torch.Tensor, label: torch.Tensor) -> None:
        """Count a batch of outputs, on the CPU."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """Of what was added since the reset; NaN where nothing was."""


class Classification(Task):
    """(B, K) against (B,)."""

    headline, rises = "top1", True

    def __init__(self, classes: int, smoothing: float = 0.0) -> None:
        super().__init__(classes)
        self.smoothing = smoothing

    def loss(self, out: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(out, label, label_smoothing=self.smoothing)

    def reset(self) -> None:
        self._hits = {1: 0, 5: 0}
        self._seen = 0

    def add(self, out: torch.Tensor, label: torch.Tensor) -> None:
        best = out.topk(min(5, out.shape[1]), 1).indices == label[:, None]
        for first in self._hits:
            self._hits[first] += int(best[:, :first].any(1).sum())
        self._seen += len(label)

    def figures(self) -> dict[str, float]:
        return {f"top{first}": _share(hits, self._seen) for first, hits in self._hits.items()}


class Semseg(Task):
    """(B, K, S, S) against (B, S, S) of class ids."""

    headline, rises = "miou", True

    def loss(self, out: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        known = (label != VOID).sum().clamp(min=1)
        return functional.cross_entropy(out, label, ignore_index=VOID, reduction="sum") / known

    def reset(self) -> None:
        self._counts = np.zeros((self.outputs, self.outputs + 1), np.int64)

    def add(self, out: torch.Tensor, label: torch.Tensor) -> None:
        found, truth = out.argmax(1).numpy(), label.numpy()
        known = truth < self.outputs
        self._counts += confusion(found[known], truth[known], self.outputs)

    def figures(self) -> dict[str, float]:
        ious = class_iou(self._counts)
        seen = ious[~np.isnan(ious)]
        accuracy = _share(np.trace(self._counts), self._counts.sum())
        return {"miou": float(seen.mean()) if len(seen) else float("nan"), "pixel_accuracy": accuracy}


class Depth(Task):
    """(B, 1, S, S), the logarithm of metres, against (B, S, S) metres: the mean absolute difference of logarithms."""

    headline, rises = "absrel", False

    def __init__(self) -> None:
        super().__init__(1)

    def loss(self, out: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        known = label > _MIN_DEPTH
        distance = (out[:, 0] - label.clamp(min=_MIN_DEPTH).log()).abs()
        return (distance * known).sum() / known.sum().clamp(min=1)

    def reset(self) -> None:
        self._sums: dict[str, float] = {}
        self._pictures = 0

    def add(self, out: torch.Tensor, label: torch.Tensor) -> None:
        for depth, truth in zip(out[:, 0].exp().numpy(), label.numpy(), strict=True):
            if (known := truth > _MIN_DEPTH).any():
                self._pictures += 1
                for name, value in depth_errors(depth[known], truth[known]).items():
                    self._sums[name] = self._sums.get(name, 0.0) + value

    def figures(self) -> dict[str, float]:
        return {n: _share(self._sums.get(n, 0.0), self._pictures) for n in ("absrel", "rmse", "log10", "delta1")}


class Normal(Task):
    """(B, 3, S, S), of any length, against unit vectors (B, 3, S, S): the mean of 1 - cosine."""

    headline, rises = "mean", False

    def __init__(self) -> None:
        super().__init__(3)

    def loss(self, out: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        known = label.abs().sum(1) > 0
        distance = 1 - functional.cosine_similarity(out, label, dim=1, eps=1e-6)
        return (distance * known).sum() / known.sum().clamp(min=1)

    def reset(self) -> None:
        self._angles: list[np.ndarray] = []

    def add(self, out: torch.Tensor, label: torch.Tensor) -> None:
        found, truth = (t.transpose(0, 1).flatten(1).numpy() for t in (out, label))
        known = np.any(truth != 0, axis=0)
        self._angles.append(angles(found[:, known], truth[:, known]).astype(np.float32))

    def figures(self) -> dict[str, float]:
        angle = np.concatenate(self._angles) if self._angles else np.zeros(0, np.float32)
        if not len(angle):
            return dict.fromkeys(("mean", "median", "below_11.25"), float("nan"))
        below = float((angle < 11.25).mean())
        return {"mean": float(angle.mean()), "median": float(np.median(angle)), "below_11.25": below}


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else float("nan")


def task_of(config: FinetuneConfig, classes: int) -> Task:
    """The task of a configuration, for so many classes."""
    if config.task == "classification":
        return Classification(classes, config.label_smoothing)
    if config.task == "semseg":
        return Semseg(classes)
    return Depth() if config.task == "depth" else Normal()
