"""From candidate masks to the masks that are kept, on the device: stability, duplicates, upscaling, area.

Stability and duplicates are judged on the decoder's own low-resolution logits (256 pixels wide for an input of 1,024),
where a mask costs a sixteenth; the original generator upscales all masks first. Invariant: the pixels of a mask that is
kept are those of its library's own post-processing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fourmill.labelers.sam_networks import Candidates

_AT_ONCE = 64  # masks upscaled at once: 268 MB of float32 at 1,024 pixels


@dataclass(frozen=True)
class KeptMask:
    """One mask at the picture's size, bool (S, S); `score` is its predicted IoU, `point` the index of its prompt."""

    mask: np.ndarray
    score: float
    stability: float
    point: int


def stability(logits_mHW: torch.Tensor, offset: float) -> torch.Tensor:
    """How little a mask depends on its threshold: its area at +offset over that at -offset, (m,), in 0..1."""
    inner = (logits_mHW > offset).sum((1, 2))
    outer = (logits_mHW > -offset).sum((1, 2))
    return inner / outer.clamp(min=1)


def extents(masks_mHW: torch.Tensor) -> torch.Tensor:
    """Boxes (m, 4) float32 of bool masks, half-open pixel edges. An empty mask's box has no positive area."""
    edges = []
    for along in (masks_mHW.any(1), masks_mHW.any(2)):  # columns, then rows
        last = along.shape[1] - along.flip(1).int().argmax(1)
        edges.append((along.int().argmax(1), last * along.any(1)))
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def without_duplicates(found: Candidates, iou_thresh: float) -> Candidates:
    """The best of all candidates of a picture whose boxes overlap by more than the threshold; best first."""
    from torchvision.ops import batched_nms

    return found[batched_nms(extents(found.logits > 0), found.score, found.picture, iou_thresh)]


def masks_of(
    found: Candidates,
    pictures: int,
    sizes: Sequence[int],
    offset: float,
    min_area: int,
    mask_nms_thresh: float | None,
) -> Iterator[list[KeptMask]]:
    """For each picture, the candidates at its size, best first; too small ones and duplicates are gone.

    `sizes`: the sides through which logits are resized, the picture's own last.
    """
    masks = torch.cat([_upscaled(logits, sizes) for logits in found.logits.split(_AT_ONCE)])
    stable = stability(found.logits, offset)
    numbers = torch.stack([found.picture.float(), found.point.float(), found.score, stable, masks.sum((1, 2)).float()])
    picture, point, score, stable_, area = numbers.cpu().numpy()
    solid = masks.cpu().numpy()
    for index in range(pictures):
        rows = np.flatnonzero((picture == index) & (area >= min_area))
        rows = rows[np.argsort(-score[rows], kind="stable")]
        if mask_nms_thresh is not None:
            rows = _distinct(masks, rows, mask_nms_thresh)
        yield [KeptMask(solid[r], float(score[r]), float(stable_[r]), int(point[r])) for r in rows]


def _upscaled(logits_mHW: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    resized = logits_mHW[:, None]
    for size in sizes:
        resized = torch.nn.functional.interpolate(resized, (size, size), mode="bilinear", align_corners=False)
    return resized[:, 0] > 0


def _distinct(masks: torch.Tensor, rows: np.ndarray, thresh: float) -> np.ndarray:
    """The rows, best first, whose mask overlaps none of the better ones kept by more than `thresh`."""
    flat = masks[torch.from_numpy(rows).to(masks.device)].flatten(1).float()
    shared = flat @ flat.T
    area = shared.diagonal()
    overlap = (shared / (area[:, None] + area[None] - shared)).cpu().numpy()
    kept: list[int] = []
    for row in range(len(rows)):
        if (overlap[row, kept] <= thresh).all():
            kept.append(row)
    return rows[kept]
