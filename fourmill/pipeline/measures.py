"""How far predictions are from what they should be, for the report's table.

Labels and tokens are measured by `fourmill.evaluate`. Depth: AbsRel = mean |d - t| / t, and delta1 = share of pixels
with max(d/t, t/d) < 1.25 (Eigen et al., 2014), after aligning the median as is usual for depth without scale.
Segmentation: pixel accuracy and mIoU over the classes that occur. Features: mean cosine. RGB: PSNR in dB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

VOID = 255


def absrel(depth: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """(AbsRel, delta1) of one map (H, W) against positive truth, medians aligned."""
    depth = depth * (np.median(truth) / max(float(np.median(depth)), 1e-9))
    depth = np.maximum(depth, 1e-6)
    ratio = np.maximum(depth / truth, truth / depth)
    return float(np.mean(np.abs(depth - truth) / truth)), float(np.mean(ratio < 1.25))


def confusion(ids: np.ndarray, truth: np.ndarray, classes: int = 255) -> np.ndarray:
    """(classes, classes) counts of pixels, rows by truth; pixels void in the truth are left out."""
    keep = truth != VOID
    pairs = truth[keep].astype(np.int64) * 256 + ids[keep]
    return np.bincount(pairs, minlength=256 * 256).reshape(256, 256)[:classes]


def mean_iou(counts: np.ndarray) -> float:
    """Mean over the classes that occur in the truth of intersection over union."""
    hit = np.diagonal(counts).astype(float)
    union = counts.sum(axis=1) + counts.sum(axis=0)[: len(counts)] - hit
    occurs = counts.sum(axis=1) > 0
    return float((hit[occurs] / union[occurs]).mean()) if occurs.any() else float("nan")


def cosine(features: np.ndarray, truth: np.ndarray) -> float:
    """Mean cosine of the cells of two maps (C, h, w)."""
    norms = np.linalg.norm(features, axis=0) * np.linalg.norm(truth, axis=0)
    return float(((features * truth).sum(axis=0) / np.maximum(norms, 1e-9)).mean())


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal to noise ratio of uint8 pictures in dB."""
    error = float(np.mean((image.astype(np.float64) - truth.astype(np.float64)) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def table(samples: Sequence[Any]) -> list[dict[str, str]]:
    """One line for each comparison that the samples allow: what, against what, and the figures."""
    rows = []
    for what, source, against in _COMPARISONS:
        pairs = [(s.get(what, source), s.get(what, against)) for s in samples]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        if pairs:
            line = {"what": what, "source": source, "against": against, "samples": str(len(pairs))}
            rows.append({**line, "figures": _FIGURES[what](pairs)})
    return rows


def _depth_figures(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    errors, shares = zip(*(absrel(a, b) for a, b in pairs), strict=True)
    return f"AbsRel {np.mean(errors):.3f}, δ1 {np.mean(shares):.3f} (medians aligned)"


def _class_figures(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    counts = np.stack([confusion(a, b) for a, b in pairs]).sum(axis=0)
    return f"mIoU {mean_iou(counts):.3f}, pixel accuracy {np.trace(counts) / max(int(counts.sum()), 1):.3f}"


def _cosine_figures(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    return f"cosine {np.mean([cosine(a, b) for a, b in pairs]):.3f}"


def _psnr_figures(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    return f"PSNR {np.mean([psnr(a, b) for a, b in pairs]):.1f} dB"


_FIGURES: dict[str, Callable[[Any], str]] = {
    "depth": _depth_figures,
    "semseg": _class_figures,
    "clip": _cosine_figures,
    "rgb": _psnr_figures,
}
_COMPARISONS = [
    ("depth", "predicted", "truth"),
    ("semseg", "predicted", "truth"),
    ("clip", "predicted", "label"),
    ("rgb", "predicted", "label"),
]
