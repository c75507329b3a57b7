"""Masks and classes of queries -> panoptic segments and instances, by the inference of the Mask2Former paper (Cheng et
al., 2022, arXiv:2112.01527).

A panoptic pixel goes to the query whose mask probability times score is largest, if it lies in that query's mask; a
query that keeps too small a share of its mask is dropped, and the queries of one stuff class are fused. Instances are
the best (query, thing class) pairs, scored by class probability times the mean probability of the mask's pixels.

Everything is decided where the network runs; one copy of each array per batch goes to the host, where masks are
encoded. Shape legend: b pictures of a chunk, Q queries, C classes, S side of the crop, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from fourmill.pipeline import masks

Chunk = tuple[torch.Tensor, torch.Tensor]  # class logits (b, Q, C + 1), mask logits (b, Q, S, S)


def panoptic_of(
    chunks: Iterable[Chunk],
    names: Sequence[str],
    stuff: frozenset[int],
    threshold: float,
    mask_threshold: float,
    overlap_threshold: float,
) -> list[list[dict[str, Any]]]:
    """For each picture its segments, largest first: {class_name, is_thing, score, box, area, mask}."""
    parts = [_owners(*chunk, threshold, mask_threshold, overlap_threshold) for chunk in chunks]
    owners, scores, labels = (torch.cat(arrays).cpu().numpy() for arrays in zip(*parts, strict=True))
    return [_segments(o, s, c, names, stuff) for o, s, c in zip(owners, scores, labels, strict=True)]


def _owners(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    threshold: float,
    mask_threshold: float,
    overlap_threshold: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int16 (b, S, S): the query that owns each pixel, or -1; score and class of each query, (b, Q)."""
    num_classes = class_logits.shape[-1] - 1
    scores, labels = class_logits.softmax(dim=-1).max(dim=-1)
    kept = (labels != num_classes) & (scores > threshold)
    probabilities = mask_logits.sigmoid()
    weighted = probabilities * torch.where(kept, scores, -1.0)[..., None, None]
    winners = weighted.argmax(dim=1)  # (b, S, S)
    inside = probabilities.gather(1, winners[:, None])[:, 0] >= mask_threshold
    area = _counts(winners, torch.ones_like(inside), kept.shape[1])
    final_area = _counts(winners, inside, kept.shape[1])
    full_area = (probabilities >= mask_threshold).sum(dim=(-2, -1))
    valid = kept & (final_area > 0) & (area >= overlap_threshold * full_area)
    owned = inside & valid.gather(1, winners.flatten(1)).view_as(inside)
    return torch.where(owned, winners, -1).to(torch.int16), scores, labels.to(torch.int16)


def _counts(winners: torch.Tensor, chosen: torch.Tensor, queries: int) -> torch.Tensor:
    """(b, Q): how many of the chosen pixels each query won."""
    counts = torch.zeros((len(winners), queries), dtype=torch.int64, device=winners.device)
    return counts.scatter_add_(1, winners.flatten(1), chosen.flatten(1).to(torch.int64))


def _segments(
    owner: np.ndarray, scores: np.ndarray, labels: np.ndarray, names: Sequence[str], stuff: frozenset[int]
) -> list[dict[str, Any]]:
    groups: dict[tuple[int, int], list[int]] = {}  # stuff by class, things by query
    for query in np.unique(owner[owner >= 0]).tolist():
        label = int(labels[query])
        groups.setdefault((label, -1 if label in stuff else query), []).append(query)
    found = []
    for (label, _), queries in groups.items():
        score = max(float(scores[q]) for q in queries)
        item = {"class_name": names[label], "is_thing": label not in stuff, "score": round(score, 6)}
        found.append({**item, **_extent(np.isin(owner, queries))})
    return sorted(found, key=lambda item: -item["area"])


def instances_of(
    chunks: Iterable[Chunk], names: Sequence[str], stuff: frozenset[int], threshold: float, limit: int
) -> list[list[dict[str, Any]]]:
    """For each picture its things, best first: {class_name, score, box, area, mask}; they may overlap."""
    parts = [_candidates(*chunk, stuff, limit) for chunk in chunks]
    scores, labels = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    chosen = scores >= threshold
    kept = [part[2][chosen[start : start + len(part[2])]] for part, start in zip(parts, _starts(parts), strict=True)]
    flat_masks, counts = torch.cat(kept).cpu().numpy(), chosen.sum(dim=1).cpu().tolist()
    flat_scores, flat_labels = scores[chosen].cpu().tolist(), labels[chosen].cpu().tolist()
    items = [
        {"class_name": names[label], "score": round(score, 6), **_extent(mask)}
        for mask, score, label in zip(flat_masks, flat_scores, flat_labels, strict=True)
    ]
    ends = np.cumsum(counts).tolist()
    return [items[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _starts(parts: Sequence[tuple[torch.Tensor, ...]]) -> list[int]:
    lengths = [len(part[0]) for part in parts]
    return [sum(lengths[:i]) for i in range(len(lengths))]


def _candidates(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, stuff: frozenset[int], limit: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best (query, thing) pairs by falling score: scores and classes (b, K), masks bool (b, K, S, S)."""
    chances = class_logits.softmax(dim=-1)[..., :-1].clone()
    chances[..., sorted(stuff)] = -1.0
    num_classes = chances.shape[-1]
    count = min(chances.shape[1], limit)
    best, places = chances.flatten(1).topk(count, dim=1)
    rows = torch.arange(len(best), device=best.device)[:, None]
    logits = mask_logits[rows, places // num_classes]
    inside = logits > 0
    pixels = inside.sum(dim=(-2, -1))
    mean = (logits.sigmoid() * inside).sum(dim=(-2, -1)) / pixels.clamp(min=1)
    scores = torch.where(pixels > 0, best * mean, -1.0)  # an empty mask is no instance
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores, (places % num_classes).gather(1, order), inside[rows, order]


def _extent(mask: np.ndarray) -> dict[str, Any]:
    return {"box": masks.box_of(mask), "area": int(mask.sum()), "mask": masks.encode(mask)}
