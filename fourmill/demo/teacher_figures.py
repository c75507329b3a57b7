"""Figures of merit of the demo teachers, from arrays of what they said and what is there.

Shape legend: N pictures or masks, S side of a picture, K objects of a picture, C channels.
Invariant: a figure depends on its arguments only; where a scene has an exact truth, no threshold is tuned on it.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fourmill.scenes import CLASSES, RGB, SHAPES

_PHRASE = re.compile(rf"\b({'|'.join(RGB)}) ({'|'.join(SHAPES)})\b")
Figures = dict[str, float]
# Least expected IoU and stability of a SAM mask: its generator's own defaults, and those of the demo's configuration.
FILTERS = {"kept": (0.88, 0.95), "demo": (0.5, 0.6)}


def depth_figures(predicted: NDArray[np.floating], truth: NDArray[np.floating]) -> Figures:
    """AbsRel and delta1 of (N, S, S) metres, as they are and with each picture's median aligned; RMSE in metres."""
    predicted, truth = predicted.reshape(len(predicted), -1), truth.reshape(len(truth), -1)
    scale = np.median(truth, axis=1, keepdims=True) / np.median(predicted, axis=1, keepdims=True)
    figures = {}
    for name, metres in (("", predicted), ("aligned_", predicted * scale)):
        guess = np.maximum(metres, 1e-3)
        figures[f"{name}absrel"] = float(np.mean(np.abs(guess - truth) / truth))
        figures[f"{name}delta1"] = float(np.mean(np.maximum(guess / truth, truth / guess) < 1.25))
    figures["rmse_m"] = float(np.sqrt(np.mean((predicted - truth) ** 2)))
    return figures


def normal_figures(predicted: NDArray[np.floating], truth: NDArray[np.floating]) -> Figures:
    """Angles between (N, S, S, 3) vectors of any length: degrees over all pixels, and the usual shares."""
    lengths = np.linalg.norm(predicted, axis=-1) * np.linalg.norm(truth, axis=-1)
    cosine = (predicted * truth).sum(axis=-1) / np.maximum(lengths, 1e-6)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    shares = {f"within_{bound:g}": float((angle <= bound).mean()) for bound in (11.25, 22.5, 30)}
    return {"median_deg": float(np.median(angle)), "mean_deg": float(angle.mean())} | shares


def semseg_figures(predicted: NDArray[np.integer], truth: NDArray[np.integer]) -> Figures:
    """Intersection over union per class, pooled over all pictures, their mean, and the share of correct pixels."""
    pairs = np.bincount(truth.ravel().astype(np.int64) * 256 + predicted.ravel(), minlength=65536).reshape(256, 256)
    count = len(CLASSES)
    both = np.diag(pairs)[:count]
    union = pairs.sum(axis=0)[:count] + pairs.sum(axis=1)[:count] - both
    ious = both / np.maximum(union, 1)
    figures = {"miou": float(ious.mean()), "pixel_accuracy": float(both.sum() / pairs.sum())}
    return figures | {f"iou_{name}": float(iou) for name, iou in zip(CLASSES, ious, strict=True)}


def retrieval_figures(images: torch.Tensor, texts: torch.Tensor) -> Figures:
    """Recall at 1 and 5 in both directions; row i of both (N, C) belongs together. Texts must be distinct."""
    images, texts = torch.nn.functional.normalize(images, dim=1), torch.nn.functional.normalize(texts, dim=1)
    similar = images @ texts.T
    figures = {}
    for name, table in (("image_to_text", similar), ("text_to_image", similar.T)):
        rank = (table > table.diagonal()[:, None]).sum(dim=1)
        for depth in (1, 5):
            figures[f"{name}_r{depth}"] = float((rank < depth).float().mean())
    return figures


def caption_figures(predicted: Sequence[str], truth: Sequence[str]) -> Figures:
    """F1 of words and of 'colour shape' phrases as multisets, pooled, and the share of captions that are exact."""
    words = _f1([re.findall(r"\w+", t) for t in predicted], [re.findall(r"\w+", t) for t in truth])
    phrases = _f1([_PHRASE.findall(t) for t in predicted], [_PHRASE.findall(t) for t in truth])
    exact = np.mean([one.strip() == other for one, other in zip(predicted, truth, strict=True)])
    return {"phrase_f1": phrases, "word_f1": words, "exact": float(exact)}


def panoptic_figures(
    predicted: Sequence[dict[str, Any]], truth: Sequence[tuple[NDArray[np.bool_], list[int]]]
) -> Figures:
    """Panoptic, segmentation and recognition quality (Kirillov et al. 2019), the mean of the classes' values.

    `predicted` are the processor's {segmentation, segments_info}; `truth` masks (K, S, S) and their classes.
    """
    count = len(CLASSES)
    matched, overlap, said, there = np.zeros(count), np.zeros(count), np.zeros(count), np.zeros(count)
    for one, (masks, classes) in zip(predicted, truth, strict=True):
        segmentation = np.asarray(one["segmentation"])
        np.add.at(there, classes, 1)
        for segment in one["segments_info"]:
            mask, label = segmentation == segment["id"], segment["label_id"]
            said[label] += 1
            both = (masks & mask).sum(axis=(1, 2))
            ious = np.where(np.array(classes) == label, both / (masks | mask).sum(axis=(1, 2)), 0)
            if ious.max() > 0.5:  # above one half at most one pair can match
                matched[label] += 1
                overlap[label] += ious.max()
    quality = overlap / np.maximum((said + there) / 2, 1)
    names = {f"pq_{name}": float(value) for name, value in zip(CLASSES, quality, strict=True)}
    sq = overlap / np.maximum(matched, 1)
    rq = matched / np.maximum((said + there) / 2, 1)
    return {"pq": float(quality.mean()), "sq": float(sq.mean()), "rq": float(rq.mean())} | names


def box_figures(
    predicted: Sequence[dict[str, torch.Tensor]], truth: Sequence[tuple[NDArray[np.floating], list[int]]]
) -> Figures:
    """COCO average precision (mean of the shapes), by pycocotools.

    `predicted` are the processor's {scores, labels, boxes}, boxes as (xmin, ymin, xmax, ymax) pixels; `truth` are boxes
    (K, 4) of that kind and their labels.
    """
    found = [
        {"image_id": image, "category_id": int(label), "bbox": _extent(box), "score": float(score)}
        for image, one in enumerate(predicted)
        for score, label, box in zip(one["scores"], one["labels"], one["boxes"].tolist(), strict=True)
    ]
    there = [
        (image, box, label)
        for image, (corners, labels) in enumerate(truth)
        for box, label in zip(corners.tolist(), labels, strict=True)
    ]
    annotations = [
        {"id": number, "image_id": image, "category_id": label, "bbox": _extent(box), "iscrowd": 0,
         "area": (box[2] - box[0]) * (box[3] - box[1])}
        for number, (image, box, label) in enumerate(there, 1)
    ]  # fmt: skip
    return _coco(found, annotations, len(truth))


def mask_figures(
    logits: Sequence[NDArray[np.floating]], scores: Sequence[NDArray[np.floating]], truth: NDArray[np.uint8]
) -> Figures:
    """Best IoU of any mask with each object, the mean over all objects of all pictures.

    `logits` (N, S, S) and `scores` (N) of each picture, all masks of all points; `truth` (pictures, S, S) instance
    numbers. `FILTERS` name which masks are kept by expected IoU and by stability, the IoU of the masks at logits of
    plus and minus one. `score_error` is the mean distance of expected and true IoU over the masks that overlap an
    object by one half.
    """
    found: dict[str, list[float]] = {"best_iou": [], "score_error": []}
    found |= {f"{name}_{figure}": [] for name in FILTERS for figure in ("best_iou", "share")}
    for maps, expected, instances in zip(logits, scores, truth, strict=True):
        ious = _ious(maps > 0, np.stack([instances == number for number in np.unique(instances) if number]))
        found["best_iou"] += list(ious.max(axis=0))
        nearest, steady = ious.max(axis=1), stability(maps)
        found["score_error"] += list(np.abs(expected - nearest)[nearest > 0.5])
        for name, (least_iou, least_stability) in FILTERS.items():
            keep = (expected > least_iou) & (steady >= least_stability)
            found[f"{name}_best_iou"] += list(np.where(keep[:, None], ious, 0).max(axis=0))
            found[f"{name}_share"].append(float(keep.mean()))
    recall = float(np.mean(np.array(found["best_iou"]) > 0.5))
    return {name: float(np.mean(values)) if values else math.nan for name, values in found.items()} | {
        "recall_50": recall
    }


def grid_points(side: int, size: int) -> torch.Tensor:
    """(1, side * side, 1, 2) points x, y in pixels: the middles of the cells of a grid over a picture of `size`."""
    line = (torch.arange(side) + 0.5) * size / side
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).view(1, -1, 1, 2)


def stability(logits: NDArray[np.floating], offset: float = 1.0) -> NDArray[np.floating]:
    """IoU (N) of the masks (N, S, S) at `offset` above and below zero."""
    inner, outer = (logits > offset).sum(axis=(1, 2)), (logits > -offset).sum(axis=(1, 2))
    return inner / np.maximum(outer, 1)


def _ious(masks: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.floating]:
    """IoU (N, K) of (N, S, S) with (K, S, S) masks, as one matrix product."""
    rows, columns = masks.reshape(len(masks), -1).astype(np.float32), truth.reshape(len(truth), -1).astype(np.float32)
    both = rows @ columns.T
    return both / np.maximum(rows.sum(axis=1)[:, None] + columns.sum(axis=1) - both, 1)


def _extent(box: Sequence[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _coco(found: list[dict[str, Any]], annotations: list[dict[str, Any]], count: int) -> Figures:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        categories = [{"id": number, "name": name} for number, name in enumerate(SHAPES)]
        truth.dataset = {
            "images": [{"id": n} for n in range(count)],
            "annotations": annotations,
            "categories": categories,
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # precision: (10 IoU thresholds from 0.5 on, 101 recalls, shapes, areas, numbers of detections)
    at_half = evaluation.eval["precision"][0, :, :, 0, 2].mean(axis=0)
    names = {f"ap50_{name}": float(value) for name, value in zip(SHAPES, at_half, strict=True)}
    return {"ap": float(evaluation.stats[0]), "ap50": float(evaluation.stats[1])} | names


def _f1(predicted: Sequence[list[Any]], truth: Sequence[list[Any]]) -> float:
    common = sum((Counter(p) & Counter(t)).total() for p, t in zip(predicted, truth, strict=True))
    return 2 * common / max(sum(map(len, predicted)) + sum(map(len, truth)), 1)
