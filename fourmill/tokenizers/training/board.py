"""TensorBoard of a tokenizer's training: scalars of each report, and labels beside their reconstructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fourmill.pipeline.pictures import FeaturePainter, class_picture, depth_picture, normal_picture
from fourmill.tokenizers.config import FEATURES
from fourmill.tokenizers.sources.maps import standardise
from fourmill.tokenizers.spatial import SpatialCodec

SAMPLING_STEPS = 5  # of a diffusion decoder's pictures: a report must not take longer than the steps between


class Board:
    """Writes to a local folder; after an interruption it goes on at `step`."""

    def __init__(self, folder: str, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("tensorboard: the package is not there; `pip install tensorboard`") from error
        self.writer = SummaryWriter(folder, purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a run may end at any report

    def pictures(self, step: int, codec: SpatialCodec, values: Sequence[Any]) -> None:
        """Labels in the upper row, what comes back from their tokens in the lower one; nothing for vectors."""
        paint = painter(codec, values)
        if paint is None:
            return
        steps = SAMPLING_STEPS if codec.settings.network.diffusion else None
        restored = codec.decode(codec.encode(values), steps=steps)
        rows = [np.concatenate([paint(v) for v in vs], axis=1) for vs in (labels_of(codec, values), restored)]
        self.writer.add_image("label_and_reconstruction", np.concatenate(rows), step, dataformats="HWC")
        self.writer.flush()


def labels_of(codec: SpatialCodec, values: Sequence[Any]) -> list[np.ndarray]:
    """Labels as decoding gives values back: pictures channels last, relative depth standardised."""
    if codec.settings.source == "rgb":
        return [np.transpose(value, (1, 2, 0)) for value in values]
    if codec.settings.normalisation.kind == "standardise":
        return [standardise(np.asarray(value)) for value in values]
    return [np.asarray(value) for value in values]


def painter(codec: SpatialCodec, values: Sequence[Any]) -> Callable[[np.ndarray], np.ndarray] | None:
    """How a value of the codec's source is drawn, as uint8 (S, S, 3); None for vectors. `values`: some to go by."""
    source = codec.settings.source
    if source in FEATURES:
        features = FeaturePainter(values)
        return lambda value: features.paint(value, 8 * value.shape[-1])
    if source == "depth":
        low, high = np.percentile(np.stack(labels_of(codec, values)), [2, 98])
        return lambda value: depth_picture(value, float(low), float(high))
    drawn: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "rgb": lambda value: value,
        "normal": normal_picture,
        "semseg": class_picture,
        "canny_edge": _grey,
        "mask": lambda value: _grey(value * 255),
    }
    return drawn.get(source)


def _grey(value: np.ndarray) -> np.ndarray:
    return np.repeat(value.astype(np.uint8)[..., None], 3, axis=2)
