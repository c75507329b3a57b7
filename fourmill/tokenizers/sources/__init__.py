"""What differs between the modalities that a network's tokenizer can learn; `source_of` is the table."""

from __future__ import annotations

from fourmill.tokenizers.config import VECTORS, CheckpointConfig
from fourmill.tokenizers.sources.base import Source
from fourmill.tokenizers.sources.maps import Depth, Edges, Mask, Rgb, Semseg
from fourmill.tokenizers.sources.vectors import Directions, Raw, UnitVector

_KINDS: dict[str, type[Source]] = {
    "rgb": Rgb,
    "depth": Depth,
    "normal": Directions,
    "semseg": Semseg,
    "canny_edge": Edges,
    "mask": Mask,
    "human_pose": Raw,
}


def source_of(config: CheckpointConfig, size: int | None = None) -> Source:
    """The side of the tokenizer that belongs to the checkpoint's source; `size`: side of its values."""
    unit = UnitVector if config.source in VECTORS else Directions
    features = unit if config.normalisation.kind == "unit" else Raw
    return _KINDS.get(config.source, features)(config, size)
