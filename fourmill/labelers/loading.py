"""Loading transformers teachers: any hub id or folder of the right family, whole or not at all."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import numpy as np
import torch

from fourmill.checkpoints import Checkpoint

log = logging.getLogger("fourmill.labelers")


def load_model(auto_classes: list[Any], checkpoint: Checkpoint, device: str) -> Any:
    """The checkpoint through the first Auto class that knows its type: float32, evaluation mode, on `device`.

    Weights that the class wants and the checkpoint lacks are fatal: they would be random. ValueError says which
    classes were tried for a checkpoint of another family.
    """
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(checkpoint.location, revision=checkpoint.revision)
    chosen = _matching(auto_classes, type(config), getattr(config, "architectures", None) or [])
    if chosen is None:
        held = ", ".join(config.architectures or [config.model_type])
        names = " or ".join(a.__name__ for a in auto_classes)
        raise ValueError(f"{checkpoint.reference} holds {held}, which is not one for {names}")
    # dtype: transformers 5 would keep a float16 file in float16, which a CPU cannot run at speed.
    model, info = chosen.from_pretrained(
        checkpoint.location, revision=checkpoint.revision, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{checkpoint.reference} lacks {len(missing)} weights of {type(model).__name__}: {missing[:5]}"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        log.warning("%s: %d weights are not used: %s", checkpoint.reference, len(unexpected), unexpected[:5])
    return model.eval().to(device)


def _matching(auto_classes: list[Any], config_type: type, architectures: list[str]) -> Any:
    """The Auto class that would build what the checkpoint was saved from. A type alone does not tell: DPT networks
    exist for depth and for classes."""
    for auto in auto_classes:
        if config_type in auto._model_mapping:
            entry = auto._model_mapping[config_type]
            names = {c.__name__ for c in (entry if isinstance(entry, tuple) else (entry,))}
            if not architectures or names & set(architectures):
                return auto
    return None


def load_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own image processor, told not to keep aspect ratios: crops are square, batches must stack."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(checkpoint.location, revision=checkpoint.revision)
    if getattr(processor, "keep_aspect_ratio", False):
        processor.keep_aspect_ratio = False
    return processor


def tensors(pixels: np.ndarray) -> list[torch.Tensor]:
    """uint8 (B, 3, S, S) -> B tensors (3, S, S), the processors' fastest input."""
    return list(torch.from_numpy(np.ascontiguousarray(pixels)))


def forward(model: Any, processor: Any, pixels: np.ndarray | None, autocast: bool) -> Any:
    """The network's outputs for uint8 (B, 3, S, S), through its own processor."""
    assert pixels is not None
    inputs = processor(images=tensors(pixels), return_tensors="pt").to(model.device)
    with precision(model.device.type, autocast):
        return model(**inputs)


def precision(device: str, autocast: bool) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast where asked for, else nothing."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
