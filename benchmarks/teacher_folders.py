"""Checkpoint folders of published architectures with random weights, for benchmarks that need the real size.

A folder loads as a download of the published checkpoint would: the same classes, configuration and processor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import teacher_costs

_NAMES = {i: f"class {i}" for i in range(133)}


def save(labeler: str, folder: Path) -> dict[str, Any]:
    """Save one teacher for `labeler` in `folder`; returns the labeler's options. ValueError for an unknown labeler."""
    if labeler not in _SAVERS:
        raise ValueError(f"no published architecture for {labeler!r}; known: {', '.join(_SAVERS)}")
    torch.manual_seed(0)
    options = _SAVERS[labeler](folder)
    return {"checkpoint": str(folder), **options}


def _hub(network: str, processor: Any, folder: Path) -> None:
    model, _ = teacher_costs.NETWORKS[network]()
    model.save_pretrained(folder)  # type: ignore[operator]
    processor.save_pretrained(folder)


def _depth(folder: Path) -> dict[str, Any]:
    from transformers import DPTImageProcessor

    _hub("dpt-hybrid", DPTImageProcessor(size={"height": 384, "width": 384}), folder)
    return {"output": "inverse"}


def _normal(folder: Path) -> dict[str, Any]:
    from transformers import Tipsv2DptConfig, Tipsv2DptForNormalEstimation, Tipsv2DptImageProcessor

    Tipsv2DptForNormalEstimation(Tipsv2DptConfig()).save_pretrained(folder)
    Tipsv2DptImageProcessor().save_pretrained(folder)
    return {}


def _segmentation(folder: Path) -> dict[str, Any]:
    from transformers import Mask2FormerImageProcessor

    _hub("mask2former-swin-b", Mask2FormerImageProcessor(size={"height": 384, "width": 384}), folder)
    return {"outputs": ["semseg", "panoptic", "instance"], "stuff": []}


def _detection(folder: Path) -> dict[str, Any]:
    from transformers import RTDetrImageProcessor

    _hub("rtdetr-v2-r50", RTDetrImageProcessor(), folder)
    return {}


def _clip(folder: Path) -> dict[str, Any]:
    import open_clip
    from safetensors.torch import save_file

    model = open_clip.create_model("ViT-B-16-quickgelu")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    pixels = {"size": [224, 224], "mean": list(model.visual.image_mean), "std": list(model.visual.image_std)}
    described = {
        "model_cfg": open_clip.get_model_config("ViT-B-16-quickgelu"),
        "preprocess_cfg": {**pixels, "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return {}


def _caption(folder: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BlipImageProcessor, BlipProcessor, PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102}
    words |= {f"word{i}": i for i in range(1, 30524) if i not in words.values()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    _hub("blip-base", BlipProcessor(BlipImageProcessor(size={"height": 384, "width": 384}), fast), folder)
    return {"max_new_tokens": 20}


def _sam(folder: Path) -> dict[str, Any]:
    from transformers import SamImageProcessor, SamProcessor

    _hub("sam-vit-b", SamProcessor(SamImageProcessor()), folder)
    return {"points_per_side": 8}


_SAVERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "depth": _depth,
    "normal": _normal,
    "segmentation": _segmentation,
    "detection": _detection,
    "clip": _clip,
    "sam": _sam,
    "caption": _caption,
}
