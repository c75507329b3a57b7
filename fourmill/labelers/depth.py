"""Depth by any monocular depth network of transformers, or by DPT-hybrid as MiDaS and Omnidata publish it.

What the numbers are, each network as its authors trained it; depth is always along the optical axis, never along the
ray (Depth Anything's and ZoeDepth's training code converts ray distances first):

    metric    metres                            DepthPro, ZoeDepth, GLPN, TIPSv2-DPT, Depth Anything Metric, demo
    relative  depth up to one unknown factor    DepthPro without its field-of-view head; Omnidata (4M's teacher: up to a
                                                shift as well, its values are between 0 and 1)
    inverse   larger is nearer, up to scale     DPT and MiDaS, Depth Anything V1 and V2
              and shift

Where the checkpoint itself says which it is, a configuration that says otherwise is an error. Metres refer to the crop
as the network sees it: one that guesses the lens from the picture takes a smaller crop for a longer lens.

Labels are stored as they come. 4M's truncated standardisation loses metres for good and is not the only normalisation
of use, so it is the depth tokenizer's first step (`fourmill.tokenizers.sources.standardise`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.nn import functional

from fourmill.checkpoints import Checkpoint
from fourmill.labelers import midas
from fourmill.labelers.base import Teacher, TeacherConfig
from fourmill.labelers.loading import load_class, load_model, load_processor, process
from fourmill.pipeline.component import Batch, ComponentConfig
from fourmill.pipeline.shards import Spec

Kind = Literal["metric", "relative", "inverse"]

_METRIC = ("zoedepth", "glpn", "tipsv2_dpt")
_BICUBIC = ("dpt", "depth_anything", "glpn")  # families whose processor only resizes, and how
_BILINEAR = ("tipsv2_dpt",)


class DepthConfig(TeacherConfig):
    """Configuration of the depth labeler."""

    output: Kind
    """What the network's numbers are: 'metric' (metres), 'relative' (depth up to a factor) or 'inverse' (larger is
    nearer, up to scale and shift)."""


class DepthLabeler(Teacher):
    """`depth`: float32 (S, S), resized from the network's own resolution as its own processor does."""

    Config: ClassVar[type[ComponentConfig]] = DepthConfig
    config: DepthConfig
    version: ClassVar[int] = 2

    @property
    def makes(self) -> tuple[str, ...]:
        return ("depth",)

    def spec(self, modality: str) -> Spec:
        return Spec(convention=self.config.output)

    def load(self, device: str) -> None:
        super().load(device)
        file = midas.weights_file(self.checkpoint)
        if file is not None:
            model = midas.load_dpt_hybrid(self.checkpoint, file, channels=1)
            self.processor = midas.processor(model.config.image_size, normalise=True)
        else:
            self.processor = load_processor(self.checkpoint)
            model = _from_transformers(self.checkpoint)
        stated = stated_kind(model.config)
        if stated is not None and stated != self.config.output:
            raise ValueError(f"{self.checkpoint.reference} gives {stated} depth; output says {self.config.output!r}")
        self.model = self.adopt(model)

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, list[Any]]:
        pixels = self.on_device(batch)
        inputs = process(self.processor, pixels)
        with self.autocast():
            outputs = self.model(**inputs)
        depth = post_process(outputs, self.processor, self.model.config.model_type, pixels.shape[-1])
        if self.config.output != "inverse":
            depth = depth.clamp(min=0)  # bicubic resizing overshoots at edges; 0 means no depth
        return {"depth": list(depth.cpu().numpy())}


def stated_kind(config: Any) -> Kind | None:
    """What a network of transformers gives, where its configuration tells; DPT's does not."""
    if config.model_type in _METRIC:
        return "metric"
    if config.model_type == "depth_pro":
        return "metric" if config.use_fov_model else "relative"
    if config.model_type == "depth_anything":
        return "metric" if config.depth_estimation_type == "metric" else "inverse"
    return None


def post_process(outputs: Any, processor: Any, family: str, size: int) -> torch.Tensor:
    """float32 (B, size, size): the processor's own `post_process_depth_estimation`, as one operation for the batch."""
    raw = outputs.predicted_depth.float()
    if family in _BICUBIC:
        return _resized(raw, size, "bicubic")
    if family in _BILINEAR:
        return _resized(raw, size, "bilinear")
    if family == "zoedepth":
        pad = int(np.sqrt(size / 2) * 3) if processor.do_pad else 0  # the border that it added, by its own formula
        return _resized(raw, size + 2 * pad, "bicubic")[:, pad : pad + size, pad : pad + size]
    if family == "depth_pro":
        return _depth_pro(raw, outputs.field_of_view, size)
    sizes = [(size, size)] * len(raw)
    maps = processor.post_process_depth_estimation(outputs, target_sizes=sizes)
    return torch.stack([m["predicted_depth"].float() for m in maps])


def _depth_pro(inverse_BHW: torch.Tensor, field_of_view_B: torch.Tensor | None, size: int) -> torch.Tensor:
    """DepthPro gives inverse depth for a lens as long as the picture is wide; its field of view (degrees) scales it."""
    if field_of_view_B is not None:
        width_over_focal = 2 * torch.tan(torch.deg2rad(field_of_view_B.float()) / 2)
        inverse_BHW = inverse_BHW * width_over_focal.view(-1, 1, 1)
    return 1 / _resized(inverse_BHW, size, "bilinear").clamp(1e-4, 1e4)


def _resized(maps_BHW: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    return functional.interpolate(maps_BHW[:, None], (size, size), mode=mode, align_corners=False)[:, 0]


def _from_transformers(checkpoint: Checkpoint) -> Any:
    """A depth network in transformers' format, on the CPU."""
    from transformers import AutoConfig, AutoModelForDepthEstimation

    config = AutoConfig.from_pretrained(checkpoint.location, revision=checkpoint.revision)
    if midas.is_saved_dpt(config):
        return midas.load_saved_dpt(checkpoint, channels=1)
    if config.model_type == "tipsv2_dpt":  # also where the file holds the heads of normals and classes
        return load_class(AutoModelForDepthEstimation, checkpoint)
    return load_model([AutoModelForDepthEstimation], checkpoint, "depth")
