"""torchvision's Faster R-CNN and Mask R-CNN (ResNet-50 FPN, v2) from a bare file of weights.

The tensors say which network it is and how many classes it has. A config.json beside them may hold `id2label`,
`min_size` and `max_size`; without it, 91 classes are COCO's as torchvision numbers them, and pictures become 800 pixels
wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from fourmill.checkpoints import Checkpoint
from fourmill.labelers.detection import Detections
from fourmill.labelers.weights import json_config, read_tensors, read_weights, weights_file
from fourmill.pipeline.component import Failure

_COCO = 91  # background, 80 classes and the gaps between their ids


class _Teacher(Protocol):
    """The part of a labeler that runs a network in its precision."""

    def autocast(self) -> Any: ...


class TorchvisionDetector:
    """A loaded Faster or Mask R-CNN; it resizes, normalises and suppresses duplicates by itself."""

    def __init__(self, model: Any, teacher: _Teacher) -> None:
        self.model, self.teacher = model, teacher

    def __call__(self, pixels_BCSS: torch.Tensor) -> list[Detections | Failure]:
        with self.teacher.autocast():
            results = self.model(list(pixels_BCSS.float() / 255))
        counts = [len(r["scores"]) for r in results]
        size = pixels_BCSS.shape[-1]
        parts = [
            _host(results, "boxes").float() / size,
            _host(results, "scores").float(),
            _host(results, "labels"),
        ]
        if "masks" in results[0]:
            parts.append(torch.cat([r["masks"][:, 0] > 0.5 for r in results]).cpu())
        found = [Detections(*of_one) for of_one in zip(*(p.split(counts) for p in parts), strict=True)]
        return [_finite(f) for f in found]


def _finite(found: Detections) -> Detections | Failure:
    finite = bool(found.boxes.isfinite().all() and found.scores.isfinite().all())
    return found if finite else Failure("not finite: the network gave NaN")


def _host(results: Sequence[Mapping[str, torch.Tensor]], name: str) -> torch.Tensor:
    """One output of all pictures, one after another, on the CPU in one copy."""
    return torch.cat([r[name] for r in results]).cpu()


def load_detector(checkpoint: Checkpoint, score_threshold: float, max_detections: int, with_masks: bool) -> Any:
    """The network that the tensors fit, on the CPU; all of them must fit."""
    import torchvision

    state = read_weights(checkpoint)
    family = "maskrcnn" if any(k.startswith("roi_heads.mask_predictor.") for k in state) else "fasterrcnn"
    if with_masks and family == "fasterrcnn":
        raise ValueError(f"{checkpoint.reference} is a Faster R-CNN, which has no masks; they need a Mask R-CNN")
    classes = state.get("roi_heads.box_predictor.cls_score.weight")
    if classes is None or "rpn.head.conv.1.0.weight" not in state:
        raise ValueError(
            f"{checkpoint.reference} holds no weights of torchvision's fasterrcnn_resnet50_fpn_v2 or "
            f"maskrcnn_resnet50_fpn_v2; it begins with {', '.join(sorted(state)[:3])}"
        )
    sizes = {k: v for k, v in json_config(checkpoint).items() if k in ("min_size", "max_size")}
    build = getattr(torchvision.models.detection, f"{family}_resnet50_fpn_v2")
    model = build(
        weights=None,
        weights_backbone=None,
        num_classes=len(classes),
        box_score_thresh=score_threshold,
        box_detections_per_img=max_detections,
        **sizes,
    )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.reference} does not fit {family}_resnet50_fpn_v2: {error}") from error
    if not with_masks:
        model.roi_heads.mask_roi_pool = None  # how torchvision says that there is no mask branch to run
    return model


def class_names(checkpoint: Checkpoint) -> dict[int, str]:
    """Name by class id: of config.json, else torchvision's for COCO. Id 0 is the background."""
    if given := json_config(checkpoint).get("id2label"):
        return {int(i): str(name) for i, name in given.items()}
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights

    rows = _num_classes(weights_file(checkpoint))
    if rows != _COCO:
        raise ValueError(
            f"{checkpoint.reference} has {rows} classes, COCO as torchvision numbers it has {_COCO}: name them by "
            "id2label in a config.json beside the weights"
        )
    return dict(enumerate(MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]))


def _num_classes(file: Path) -> int:
    name = "roi_heads.box_predictor.cls_score.weight"
    state = read_tensors(file)
    if name not in state:
        raise ValueError(f"{file} holds no torchvision detector: there is no {name}")
    return len(state[name])
