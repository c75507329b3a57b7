"""Surface normals: TIPSv2-DPT and Sapiens2 by transformers, and Omnidata's DPT-hybrid (4M's teacher), in its published
files and in transformers' format.

Every network has its own axes; labels have one frame: OpenCV's camera, x right, y down, z forward, pointing towards
the camera (n . ray < 0), unit length. What the networks emit was read off the authors' own pictures, where floors,
walls to the left and right, and walls in front show each axis and its sign:

    Omnidata   RGB code (n + 1) / 2 of exactly this frame: a wall in front is z = -1, a floor y = -1, a wall on the left
               x = +1 (its issue 13 says z points to the viewer; the published pictures, MonoSDF and DN-Splatter do not)
    TIPSv2     the opposite of it, as in NYUv2's outward normals: floor y = +1, left wall x = -1, front wall z = +1
    Sapiens2   camera coordinates, the axes' signs are not documented: `frame` must be said
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional

from fourmill.checkpoints import Checkpoint
from fourmill.labelers import midas
from fourmill.labelers.base import Teacher, TeacherConfig
from fourmill.labelers.loading import load_class, load_model, load_processor, process
from fourmill.pipeline.component import Batch, ComponentConfig
from fourmill.pipeline.shards import Spec

Frame = Literal["opencv", "opengl", "pytorch3d", "outward"]

# By what to multiply x, y, z of a normal to have it in OpenCV's frame, towards the camera.
_SIGNS: dict[str, tuple[int, int, int]] = {
    "opencv": (1, 1, 1),
    "opengl": (1, -1, -1),
    "pytorch3d": (-1, -1, 1),
    "outward": (-1, -1, -1),
}
_FRAMES: dict[str, Frame] = {"dpt": "opencv", "tipsv2_dpt": "outward"}


class NormalConfig(TeacherConfig):
    """Configuration of the normal labeler."""

    frame: Literal["auto", "opencv", "opengl", "pytorch3d", "outward"] = "auto"
    """Axes of the network's normals: 'opencv' (right, down, forward), 'opengl' (right, up, backward), 'pytorch3d'
    (left, up, forward), each towards the camera, or 'outward' (right, down, forward, away from the camera: NYUv2,
    DSINE). 'auto': what the checkpoint's config.json states as `normal_frame`, else its family's; an error where that
    is not known."""


class NormalLabeler(Teacher):
    """`normal`: float32 (3, S, S), unit vectors, resized bilinearly from the network's own resolution."""

    Config: ClassVar[type[ComponentConfig]] = NormalConfig
    config: NormalConfig

    @property
    def makes(self) -> tuple[str, ...]:
        return ("normal",)

    def spec(self, modality: str) -> Spec:
        return Spec(convention="opencv")

    def load(self, device: str) -> None:
        super().load(device)
        file = midas.weights_file(self.checkpoint)
        if file is not None:
            model = midas.load_dpt_hybrid(self.checkpoint, file, channels=3)
            self.processor = midas.processor(model.config.image_size, normalise=False)
        else:
            self.processor = load_processor(self.checkpoint)
            model = _from_transformers(self.checkpoint)
        self.frame = frame_of(self.config.frame, model.config, self.checkpoint.reference)
        self.model = self.adopt(model)

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, list[Any]]:
        pixels = self.on_device(batch)
        inputs = process(self.processor, pixels)
        with self.autocast():
            outputs = self.model(**inputs)
        normals = unit_normals(self._vectors(outputs, pixels.shape[-1]), pixels.shape[-1], self.frame)
        return {"normal": list(normals.cpu().numpy())}

    def _vectors(self, outputs: Any, size: int) -> torch.Tensor:
        """(B, 3, h, w) vectors in the network's axes, of any length."""
        if self.model.config.model_type == "dpt":  # of three channels, under the name of the one that it was made for
            return outputs.predicted_depth.float().clamp(0, 1) * 2 - 1
        if getattr(self.processor, "do_pad", False):
            sizes = [(size, size)] * len(outputs.normals)
            outputs.normals = outputs.normals.float()
            found = self.processor.post_process_normal_estimation(outputs, source_sizes=sizes)
            return torch.stack([item["normals"] for item in found])
        return outputs.normals


def frame_of(asked: str, config: Any, reference: str) -> Frame:
    """The network's axes: as asked, as its config states, or as its family's are known to be."""
    stated = getattr(config, "normal_frame", None)
    frame = (stated or _FRAMES.get(config.model_type)) if asked == "auto" else asked
    if frame not in _SIGNS:
        raise ValueError(
            f"{reference}: the axes of {config.model_type} normals are not known ({frame!r}); "
            f"set `frame` to one of {', '.join(_SIGNS)}"
        )
    return frame  # type: ignore[return-value]  # one of the literal's names


def unit_normals(vectors_B3HW: torch.Tensor, size: int, frame: Frame) -> torch.Tensor:
    """float32 (B, 3, size, size) unit normals in OpenCV's frame. Lengths are dropped before resizing, as the networks'
    own processors do, and restored to one after it; no direction stays (0, 0, 0)."""
    normals = functional.normalize(vectors_B3HW.float(), dim=1)
    if normals.shape[-2:] != (size, size):
        normals = functional.interpolate(normals, (size, size), mode="bilinear", align_corners=False)
        normals = functional.normalize(normals, dim=1)
    return normals * normals.new_tensor(_SIGNS[frame]).view(1, 3, 1, 1)


def _from_transformers(checkpoint: Checkpoint) -> Any:
    """A network of normals in transformers' format, on the CPU."""
    from transformers import AutoConfig, AutoModelForNormalEstimation

    config = AutoConfig.from_pretrained(checkpoint.location, revision=checkpoint.revision)
    if midas.is_saved_dpt(config):
        return midas.load_saved_dpt(checkpoint, channels=3)
    if config.model_type == "tipsv2_dpt":  # also where the file holds the heads of depth and classes
        return load_class(AutoModelForNormalEstimation, checkpoint)
    return load_model([AutoModelForNormalEstimation], checkpoint, "normal")
