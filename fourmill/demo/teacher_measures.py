"""How well saved demo teachers do on scenes they never saw, measured through the path that labeling uses.

Every figure comes from a saved folder, loaded by its library's own `from_pretrained`, fed uint8 pictures through its
own processor. Invariant: nothing here reads a training seed, and nothing trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fourmill.demo.teacher_figures import (
    Figures,
    box_figures,
    caption_figures,
    depth_figures,
    grid_points,
    mask_figures,
    normal_figures,
    panoptic_figures,
    retrieval_figures,
    semseg_figures,
)
from fourmill.demo.teacher_truth import STUFF, boxes, segments
from fourmill.scenes import Scene

_BATCH = 32


def distinct(scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes whose caption did not occur before."""
    return list({scene.caption: scene for scene in reversed(scenes)}.values())[::-1]


def _batches(scenes: Sequence[Scene]) -> list[list[torch.Tensor]]:
    """uint8 (3, S, S) tensors, a batch at a time."""
    pictures = [torch.from_numpy(scene.image).permute(2, 0, 1).contiguous() for scene in scenes]
    return [pictures[start : start + _BATCH] for start in range(0, len(pictures), _BATCH)]


def _sizes(batch: list[torch.Tensor]) -> list[tuple[int, int]]:
    return [(picture.shape[1], picture.shape[2]) for picture in batch]


def _measure_depth(folder: Path, scenes: Sequence[Scene]) -> Figures:
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForDepthEstimation.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[NDArray[np.floating]] = []
    for batch in _batches(scenes):
        outputs = model(**processor(images=batch, return_tensors="pt"))
        maps = processor.post_process_depth_estimation(outputs, target_sizes=_sizes(batch))
        found += [one["predicted_depth"].numpy() for one in maps]
    return depth_figures(np.stack(found), np.stack([scene.depth for scene in scenes]))


def _measure_normal(folder: Path, scenes: Sequence[Scene]) -> Figures:
    from transformers import AutoImageProcessor, AutoModelForNormalEstimation

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForNormalEstimation.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[NDArray[np.floating]] = []
    for batch in _batches(scenes):
        outputs = model(**processor(images=batch, return_tensors="pt"))
        maps = processor.post_process_normal_estimation(outputs, target_sizes=_sizes(batch))
        found += [one["normals"].permute(1, 2, 0).numpy() for one in maps]
    return normal_figures(np.stack(found), np.stack([scene.normals for scene in scenes]))


def _measure_panoptic(folder: Path, scenes: Sequence[Scene]) -> Figures:
    """Panoptic quality, and the mean IoU of the same network's semantic post-processing."""
    from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForUniversalSegmentation.from_pretrained(folder, dtype=torch.float32).eval()
    found, maps = [], []
    for batch in _batches(scenes):
        outputs = model(**processor(images=batch, return_tensors="pt"))
        found += processor.post_process_panoptic_segmentation(
            outputs, label_ids_to_fuse=set(STUFF), target_sizes=_sizes(batch)
        )
        maps += processor.post_process_semantic_segmentation(outputs, target_sizes=_sizes(batch))
    semantic = semseg_figures(np.stack(maps), np.stack([scene.semantic for scene in scenes]))
    truth = [segments(scene.semantic, scene.instances) for scene in scenes]
    return panoptic_figures(found, truth) | {"semantic_miou": semantic["miou"]}


def _measure_detection(folder: Path, scenes: Sequence[Scene]) -> Figures:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for batch in _batches(scenes):
        outputs = model(**processor(images=batch, return_tensors="pt"))
        found += processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=_sizes(batch))
    return box_figures(found, [boxes(scene.semantic, scene.instances) for scene in scenes])


def _measure_sam(folder: Path, scenes: Sequence[Scene]) -> Figures:
    """8 x 8 points in every scene, and 16 x 16 (`grid16_...`) in the first sixteenth: decoding them is slow."""
    from transformers import SamModel, SamProcessor

    processor = SamProcessor.from_pretrained(folder)
    model = SamModel.from_pretrained(folder, dtype=torch.float32).eval()
    figures = Figures()
    for side, prefix, some in ((8, "", scenes), (16, "grid16_", scenes[: -(-len(scenes) // 16)])):
        logits, scores = zip(*(_sam_masks(model, processor, scene, side) for scene in some), strict=True)
        found = mask_figures(logits, scores, np.stack([scene.instances for scene in some]))
        figures |= {prefix + key: value for key, value in found.items()}
    return figures


def _sam_masks(model: Any, processor: Any, scene: Scene, side: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logits (N, S, S), in float16 as there are many, and expected IoUs (N) of the three masks of every grid point."""
    size = len(scene.image)
    picture = torch.from_numpy(scene.image).permute(2, 0, 1).contiguous()
    points = grid_points(side, size)
    inputs = processor(images=[picture], input_points=points.numpy().tolist(), return_tensors="pt")
    outputs = model(pixel_values=inputs["pixel_values"], input_points=inputs["input_points"].float())
    logits = processor.image_processor.post_process_masks(
        outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False
    )[0]
    return logits.flatten(0, 1).half().numpy(), outputs.iou_scores.flatten().numpy()


def _measure_semseg(folder: Path, scenes: Sequence[Scene]) -> Figures:
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[NDArray[np.integer]] = []
    for batch in _batches(scenes):
        outputs = model(**processor(images=batch, return_tensors="pt"))
        found += [m.numpy() for m in processor.post_process_semantic_segmentation(outputs, target_sizes=_sizes(batch))]
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
    "normal": _measure_normal,
    "semseg": _measure_semseg,
    "panoptic": _measure_panoptic,
    "detection": _measure_detection,
    "sam": _measure_sam,
    "clip": _measure_clip,
    "caption": _measure_caption,
}


@torch.inference_mode()
def measure(name: str, folder: str | Path, scenes: Sequence[Scene]) -> Figures:
    """Figures of the teacher `name` saved in `folder`, on these scenes."""
    if name not in _MEASURES:
        raise ValueError(f"unknown teacher {name!r}; known: {', '.join(_MEASURES)}")
    return _MEASURES[name](Path(folder), scenes)
