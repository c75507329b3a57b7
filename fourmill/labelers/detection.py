"""Objects in boxes, by any detector of transformers or by torchvision's Mask R-CNN and Faster R-CNN (v2).

DETR and its kin (RT-DETR, D-FINE, RF-DETR, DEIMv2, Conditional, Deformable, DAB and LW-DETR, YOLOS) go through their
own processors, which know whether scores are a softmax or one sigmoid per class. The detector that labelled 4M's data,
detectron2's ViTDet-H Cascade Mask R-CNN, has no loader here: its library is not a package that pip can install.

Invariant: every box lies in the crop, has an area, and has a name that means something; whatever is dropped for lack
of either is counted in the run's report.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from pydantic import Field

from fourmill.checkpoints import Checkpoint
from fourmill.labelers.base import Teacher, TeacherConfig
from fourmill.labelers.loading import load_model, load_processor, process
from fourmill.labelers.weights import is_bare
from fourmill.modalities import unknown
from fourmill.pipeline import masks
from fourmill.pipeline.component import Batch, ComponentConfig, Failure
from fourmill.pipeline.shards import Spec

_NAMELESS = ("N/A", "__background__", "no-object", "")  # gaps in COCO's 91 ids, and what is not an object
_ALTERNATIVES = "RT-DETR, D-FINE, DETR (transformers), or torchvision's maskrcnn_resnet50_fpn_v2"


class DetectionConfig(TeacherConfig):
    """Configuration of the detector."""

    score_threshold: float = Field(default=0.05, ge=0, le=1)
    """Detections above it are stored with their scores. Low: readers filter again (4M keeps those above 0.6)."""
    max_detections: int = Field(default=100, ge=1)
    """The best so many of a crop are stored."""
    nms_iou: float | None = Field(default=None, gt=0, le=1)
    """Drop a box that overlaps a better one of its class by more than this. DETR-like detectors are trained to say each
    thing once and Mask R-CNN suppresses by itself (0.5), so by default nothing more is done."""
    masks: bool = False
    """Also make `instance`: only Mask R-CNN has masks."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Class names to write in place of the checkpoint's own."""


@dataclass(frozen=True)
class Detections:
    """What a detector found in one picture: boxes (n, 4) float32 as x0, y0, x1, y1 in 0..1, scores (n,) float32, class
    ids (n,), and masks bool (n, S, S) if it makes any."""

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor | None = None

    def __getitem__(self, rows: Any) -> Detections:
        kept = None if self.masks is None else self.masks[rows]
        return Detections(self.boxes[rows], self.scores[rows], self.labels[rows], kept)


class Detector(Protocol):
    """A loaded network: uint8 (B, 3, S, S) on its device -> B `Detections` on the CPU, or a reason why not."""

    def __call__(self, pixels_BCSS: torch.Tensor) -> Sequence[Detections | Failure]: ...


class DetectionLabeler(Teacher):
    """`det`: objects of a crop, best score first; with `masks`, `instance` as well."""

    Config: ClassVar[type[ComponentConfig]] = DetectionConfig
    config: DetectionConfig

    @property
    def makes(self) -> tuple[str, ...]:
        return ("det", "instance") if self.config.masks else ("det",)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        refuse_detectron2(self.config.checkpoint)
        return super().checkpoint

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """Name by class id, of the classes that have one."""
        return named(_class_names(self.checkpoint), self.config.rename, self.config.checkpoint)

    def spec(self, modality: str) -> Spec:
        return Spec(classes=tuple(dict.fromkeys(self.names[i] for i in sorted(self.names))))

    def load(self, device: str) -> None:
        super().load(device)
        self.dropped: Counter[str] = Counter()
        self.detector: Detector = self._torchvision() if is_bare(self.checkpoint) else self._transformers()

    def _transformers(self) -> Detector:
        from transformers import AutoModelForObjectDetection

        if self.config.masks:
            raise ValueError(
                f"{self.checkpoint.reference} has boxes only; masks come from torchvision's Mask R-CNN, or from the "
                "labelers 'segmentation' and 'sam'"
            )
        model = load_model([AutoModelForObjectDetection], self.checkpoint, "detection")
        return TransformersDetector(self.adopt(exact_boxes(model)), load_processor(self.checkpoint), self)

    def _torchvision(self) -> Detector:
        from fourmill.labelers.detection_torchvision import TorchvisionDetector, load_detector

        limits = (self.config.score_threshold, self.config.max_detections)
        model = load_detector(self.checkpoint, *limits, with_masks=self.config.masks)
        return TorchvisionDetector(self.adopt(exact_boxes(model)), self)

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        with torch.inference_mode():
            found = self.detector(self.on_device(batch))
        made: dict[str, list[Any]] = {name: [] for name in self.makes}
        for detections in found:
            objects = detections if isinstance(detections, Failure) else self._objects(detections)
            for name in self.makes:
                made[name].append(objects if isinstance(objects, Failure) else objects[name])
        return made

    def take_notes(self) -> list[str]:
        taken, self.dropped = self.dropped, Counter()
        return [f"{self.name}: dropped {count} detections: {reason}" for reason, count in taken.items()]

    def _objects(self, found: Detections) -> dict[str, list[dict[str, Any]]]:
        """The detections of one crop as the catalogue has them, by modality."""
        found = self._best(found)
        items: dict[str, list[dict[str, Any]]] = {name: [] for name in self.makes}
        for row, (box, score, label) in enumerate(
            zip(rounded(found.boxes), np.round(found.scores.tolist(), 6).tolist(), found.labels.tolist(), strict=True)
        ):
            if label not in self.names:
                self.dropped[f"class {label} has no name"] += 1
                continue
            if box[0] >= box[2] or box[1] >= box[3]:
                self.dropped["the box has no area in the crop"] += 1
                continue
            thing = {"class_name": self.names[label], "score": score}
            items["det"].append({**thing, "box": box})
            if found.masks is not None:
                self._add_instance(items["instance"], thing, found.masks[row].numpy())
        return items

    def _add_instance(self, instances: list[dict[str, Any]], thing: dict[str, Any], mask: np.ndarray) -> None:
        if not mask.any():
            self.dropped["the mask is empty"] += 1
            return
        extent = {"box": masks.box_of(mask), "area": int(mask.sum()), "mask": masks.encode(mask)}
        instances.append({**thing, **extent})

    def _best(self, found: Detections) -> Detections:
        """Above the threshold, suppressed if asked, best first, at most so many."""
        found = found[found.scores > self.config.score_threshold]
        found = found[torch.sort(found.scores, descending=True, stable=True).indices]
        if self.config.nms_iou is not None:
            from torchvision.ops import batched_nms

            found = found[batched_nms(found.boxes, found.scores, found.labels, self.config.nms_iou)]
        return found[: self.config.max_detections]


class TransformersDetector:
    """A DETR-like network of transformers and its processor."""

    def __init__(self, model: Any, processor: Any, teacher: DetectionLabeler) -> None:
        self.model, self.processor, self.teacher = model, processor, teacher
        # DETR's mask of padded pixels is an input of some of its kin and unknown to others; squares have no padding.
        self._inputs = set(inspect.signature(model.forward).parameters)
        # Deformable and Conditional DETR keep 100 unless told otherwise; RF-DETR as many as it has queries (None).
        top_k = inspect.signature(processor.post_process_object_detection).parameters.get("top_k")
        limited = top_k is not None and isinstance(top_k.default, int)
        self._options = {"top_k": max(top_k.default, teacher.config.max_detections)} if top_k and limited else {}

    def __call__(self, pixels_BCSS: torch.Tensor) -> list[Detections | Failure]:
        inputs = process(self.processor, pixels_BCSS)
        with self.teacher.autocast():
            outputs = self.model(**{k: v for k, v in inputs.items() if k in self._inputs})
        # The raw outputs are small (300 queries x 80 classes: 96 KB a picture) and cross in one piece; thresholds on a
        # GPU would wait for it once a picture.
        host = SimpleNamespace(logits=outputs.logits.float().cpu(), pred_boxes=outputs.pred_boxes.float().cpu())
        results = self.processor.post_process_object_detection(
            host, threshold=self.teacher.config.score_threshold, **self._options
        )
        sick = (host.logits.isnan().flatten(1).any(1) | host.pred_boxes.isnan().flatten(1).any(1)).tolist()
        found = [Detections(r["boxes"], r["scores"], r["labels"]) for r in results]
        return [Failure("not finite: the network gave NaN") if s else f for s, f in zip(sick, found, strict=True)]


def exact_boxes(model: torch.nn.Module) -> torch.nn.Module:
    """The network with its box heads in float32 under autocast.

    bfloat16 has 8 bits: a coordinate near 1 would move in steps of 1/256, a pixel at 224, four of 4M's coordinate bins.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "bbox" in name:
            module.forward = functools.partial(_in_float32, module.forward)  # type: ignore[method-assign]
    return model


def _in_float32(forward: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    with torch.autocast(values.device.type, enabled=False):
        return forward(values.float())


def rounded(boxes: torch.Tensor) -> list[list[float]]:
    """Boxes clipped to the crop, six digits: a thousandth of a pixel at 1,000 pixels."""
    return [[round(v, 6) for v in box] for box in boxes.double().clamp(0, 1).tolist()]


def named(labels: Mapping[int, str], rename: Mapping[str, str], reference: str) -> dict[int, str]:
    """The names to write. Ids that only have a placeholder ("N/A", "LABEL_7") are left out.

    ValueError if no class has a name, or if `rename` speaks of a class that the checkpoint does not have.
    """
    if strangers := sorted(set(rename) - set(labels.values())):
        raise ValueError(f"rename: {unknown('class', strangers[0], labels.values())} (of {reference})")
    names = {i: rename.get(name, name) for i, name in labels.items()}
    names = {i: name for i, name in names.items() if name not in _NAMELESS and name != f"LABEL_{i}"}
    if not names:
        raise ValueError(
            f"{reference} does not name its {len(labels)} classes (they are called LABEL_0, LABEL_1, …); name them by "
            "id2label in its config.json, or by rename: {LABEL_0: person, …}"
        )
    return names


def refuse_detectron2(reference: str) -> None:
    """ValueError for a checkpoint of detectron2, by its scheme, its name or its pickled weights."""
    folder = Path(reference).expanduser()
    pickles = [folder] if folder.suffix == ".pkl" else sorted(folder.glob("*.pkl")) if folder.is_dir() else []
    if "detectron2" in reference.lower() or pickles:
        raise ValueError(
            f"{reference} is a detectron2 checkpoint (4M's own detector was detectron2's ViTDet-H Cascade Mask R-CNN); "
            f"there is no loader for it. Use {_ALTERNATIVES}"
        )


def _class_names(checkpoint: Checkpoint) -> dict[int, str]:
    """The checkpoint's own name for each class id, without loading its weights."""
    if is_bare(checkpoint):
        from fourmill.labelers.detection_torchvision import class_names

        return class_names(checkpoint)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.location, revision=checkpoint.revision)
    return {int(i): str(name) for i, name in config.id2label.items()}
