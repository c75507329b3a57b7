"""How well the demo teachers do on scenes they never saw, measured through the path that labeling uses.

Every figure comes from a saved folder, loaded by its library's own `from_pretrained`, fed uint8 pictures through its
own processor. Invariant: nothing here reads a training seed, and nothing trains.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fourmill.scenes import CLASSES, RGB, SHAPES, Scene

_PHRASE = re.compile(rf"\b({'|'.join(RGB)}) ({'|'.join(SHAPES)})\b")
_BATCH = 32
Figures = dict[str, float]


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


def _f1(predicted: Sequence[list[Any]], truth: Sequence[list[Any]]) -> float:
    common = sum((Counter(p) & Counter(t)).total() for p, t in zip(predicted, truth, strict=True))
    return 2 * common / max(sum(map(len, predicted)) + sum(map(len, truth)), 1)


def distinct(scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes whose caption did not occur before."""
    return list({scene.caption: scene for scene in reversed(scenes)}.values())[::-1]


def _batches(scenes: Sequence[Scene]) -> list[list[torch.Tensor]]:
    """uint8 (3, S, S) tensors, a batch at a time."""
    pictures = [torch.from_numpy(scene.image).permute(2, 0, 1).contiguous() for scene in scenes]
    return [pictures[start : start + _BATCH] for start in range(0, len(pictures), _BATCH)]


def _measure_depth(folder: Path, scenes: Sequence[Scene]) -> Figures:
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForDepthEstimation.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[NDArray[np.floating]] = []
    for batch in _batches(scenes):
        outputs = model(**processor(images=batch, return_tensors="pt"))
        sizes = [tuple(batch[0].shape[1:])] * len(batch)
        maps = processor.post_process_depth_estimation(outputs, target_sizes=sizes)
        found += [one["predicted_depth"].numpy() for one in maps]
    return depth_figures(np.stack(found), np.stack([scene.depth for scene in scenes]))


def _measure_semseg(folder: Path, scenes: Sequence[Scene]) -> Figures:
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[NDArray[np.integer]] = []
    for batch in _batches(scenes):
        outputs = model(**processor(images=batch, return_tensors="pt"))
        sizes = [tuple(batch[0].shape[1:])] * len(batch)
        found += [m.numpy() for m in processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)]
    return semseg_figures(np.stack(found), np.stack([scene.semantic for scene in scenes]))


def _measure_clip(folder: Path, scenes: Sequence[Scene]) -> Figures:
    import open_clip
    from torch.nn.functional import interpolate

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    visual, scenes = model.visual, distinct(scenes)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (visual.image_mean, visual.image_std))
    images = []
    for batch in _batches(scenes):
        pixels = interpolate(torch.stack(batch).float(), visual.image_size, mode="bicubic", antialias=True)
        images.append(model.encode_image((pixels.clamp(0, 255) / 255 - mean) / std))
    texts = model.encode_text(tokenizer([scene.caption for scene in scenes]))
    return retrieval_figures(torch.cat(images), texts) | {"gallery": float(len(scenes))}


def _measure_caption(folder: Path, scenes: Sequence[Scene]) -> Figures:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[str] = []
    for batch in _batches(scenes):
        ids = model.generate(**processor(images=batch, return_tensors="pt"), max_new_tokens=40, do_sample=False)
        found += processor.batch_decode(ids, skip_special_tokens=True)
    return caption_figures(found, [scene.summary for scene in scenes])


_MEASURES: dict[str, Callable[[Path, Sequence[Scene]], Figures]] = {
    "depth": _measure_depth,
    "semseg": _measure_semseg,
    "clip": _measure_clip,
    "caption": _measure_caption,
}


@torch.inference_mode()
def measure(name: str, folder: str | Path, scenes: Sequence[Scene]) -> Figures:
    """Figures of the teacher `name` (depth, semseg, clip, caption) saved in `folder`, on these scenes."""
    if name not in _MEASURES:
        raise ValueError(f"unknown teacher {name!r}; known: {', '.join(_MEASURES)}")
    return _MEASURES[name](Path(folder), scenes)
