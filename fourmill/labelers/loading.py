"""Loading transformers teachers: any hub id or folder of the right family, whole or not at all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from fourmill.checkpoints import Checkpoint

log = logging.getLogger("fourmill.labelers")

# Which labeler takes what each Auto class builds, for the error that a checkpoint of another family gets.
_TAKERS = {
    "AutoModelForDepthEstimation": "depth",
    "AutoModelForNormalEstimation": "normal",
    "AutoModelForUniversalSegmentation": "segmentation",
    "AutoModelForSemanticSegmentation": "segmentation",
    "AutoModelForInstanceSegmentation": "segmentation",
    "AutoModelForObjectDetection": "detection",
    "AutoModelForMaskGeneration": "sam",
    "AutoModelForZeroShotImageClassification": "clip",
    "AutoModelForImageTextToText": "caption",
}


def load_model(auto_classes: Sequence[Any], checkpoint: Checkpoint, labeler: str) -> Any:
    """The checkpoint through the first Auto class that knows its type, in float32 on the CPU.

    Weights that the class wants and the checkpoint lacks are fatal: they would be random. Weights that it does not
    want are listed in a warning. ValueError for a checkpoint of another family says which labeler takes it.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.location, revision=checkpoint.revision)
    chosen = _matching(auto_classes, config)
    if chosen is None:
        raise ValueError(_misfit(config, checkpoint, labeler))
    return load_class(chosen, checkpoint)


def load_class(model_class: Any, checkpoint: Checkpoint, **options: Any) -> Any:
    """`model_class.from_pretrained` on the checkpoint in float32; missing weights fatal, unexpected ones listed."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # dtype: transformers 5 would keep a float16 file in float16, which a CPU cannot run at speed. On a GPU autocast
    # does the products in half precision.
    model, info = model_class.from_pretrained(
        checkpoint.location, revision=checkpoint.revision, dtype=torch.float32, output_loading_info=True, **options
    )
    check_keys(checkpoint, type(model).__name__, info["missing_keys"], info["unexpected_keys"])
    return model


def check_keys(checkpoint: Checkpoint, wanted: str, missing: Any, unexpected: Any) -> None:
    """ValueError if weights are missing; a warning that lists those which nothing uses."""
    if missing := sorted(missing):
        raise ValueError(f"{checkpoint.reference} lacks {len(missing)} weights of {wanted}: {_some(missing)}")
    if unexpected := sorted(unexpected):
        log.warning("%s: %d weights are not used: %s", checkpoint.reference, len(unexpected), _some(unexpected))


def _some(names: Sequence[str], limit: int = 10) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _matching(auto_classes: Sequence[Any], config: Any) -> Any:
    """The Auto class that would build what the checkpoint was saved from. A type alone does not tell: DPT networks
    exist for depth and for classes."""
    architectures = set(getattr(config, "architectures", None) or [])
    for auto in auto_classes:
        if type(config) in auto._model_mapping:
            entry = auto._model_mapping[type(config)]
            names = {c.__name__ for c in (entry if isinstance(entry, tuple) else (entry,))}
            if not architectures or names & architectures:
                return auto
    return None


def _misfit(config: Any, checkpoint: Checkpoint, labeler: str) -> str:
    """The sentence for a checkpoint that this labeler cannot load: what it holds, and who takes it."""
    import transformers

    held = ", ".join(getattr(config, "architectures", None) or [config.model_type])
    known = [(taker, getattr(transformers, auto, None)) for auto, taker in _TAKERS.items() if taker != labeler]
    found = next((taker for taker, auto in known if auto is not None and _matching([auto], config)), None)
    hint = f"the labeler {found!r} takes it" if found else "no labeler takes it"
    return f"{checkpoint.reference} holds {held}, which the labeler {labeler!r} does not take; {hint}"


def load_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own image processor, told not to keep aspect ratios: crops are square, batches must stack."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(checkpoint.location, revision=checkpoint.revision)
    if getattr(processor, "keep_aspect_ratio", False):
        processor.keep_aspect_ratio = False
    return processor


def process(processor: Any, pixels_BCSS: torch.Tensor, **options: Any) -> Any:
    """The network's inputs for uint8 pictures (B, 3, S, S), made on the device that they lie on.

    A list of tensors is the processors' fastest input; those of one size are resized and normalised as one batch.
    """
    return processor(images=list(pixels_BCSS), return_tensors="pt", **options).to(pixels_BCSS.device)
