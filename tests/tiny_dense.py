"""Tiny random checkpoints of every family of depth, normal and segmentation networks, saved as their libraries would.

`save_xxx(folder)` writes a folder that a labeler loads by path; the tables name them by what they give.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from midas_network import midas_network

Saver = Callable[[Path], Path]
NAMES = {0: "cat", 1: "dog", 2: "sky", 3: "sea"}
VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}


def _saved(folder: Path, model: Any, processor: Any, spread: float = 1.5) -> Path:
    """Weights are drawn wider than the libraries' own start, whose outputs are the same number everywhere."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=spread / (parameter[0].numel() ** 0.5))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def dpt_config(**options: Any) -> Any:
    from transformers import DPTConfig

    return DPTConfig(
        **VIT, intermediate_size=64, image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 16, 16], fusion_hidden_size=16, reassemble_factors=[4, 2, 1, 0.5], is_hybrid=False,
        use_auxiliary_head=False, **options,
    )  # fmt: skip


def save_dpt(folder: Path) -> Path:
    from transformers import DPTForDepthEstimation, DPTImageProcessor

    torch.manual_seed(0)
    model = DPTForDepthEstimation(dpt_config())
    torch.nn.init.constant_(model.head.head[-2].bias, 1.0)  # a last ReLU of zeros would hide every difference
    return _saved(folder, model, DPTImageProcessor(size=_square(32), keep_aspect_ratio=True))


def save_dpt_of_normals(folder: Path) -> Path:
    """DPT whose head ends in three maps, in transformers' format: how Omnidata's network was converted."""
    from transformers import DPTForDepthEstimation, DPTImageProcessor

    torch.manual_seed(0)
    model = DPTForDepthEstimation(dpt_config())
    model.head.head[4] = torch.nn.Conv2d(32, 3, kernel_size=1)
    torch.nn.init.constant_(model.head.head[4].bias, 0.3)
    return _saved(folder, model, DPTImageProcessor(size=_square(32), keep_aspect_ratio=False, do_normalize=False))


def save_dpt_semseg(folder: Path) -> Path:
    from transformers import DPTForSemanticSegmentation, DPTImageProcessor

    torch.manual_seed(0)
    model = DPTForSemanticSegmentation(dpt_config(id2label=NAMES))
    return _saved(folder, model, DPTImageProcessor(size=_square(32), keep_aspect_ratio=False))


def save_depth_anything(folder: Path, kind: str = "relative") -> Path:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    torch.manual_seed(0)
    backbone = Dinov2Config(
        **VIT, image_size=28, patch_size=14, out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False
    )
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=32, neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16, head_hidden_size=16, depth_estimation_type=kind,
        max_depth=1 if kind == "relative" else 20,
    )  # fmt: skip
    processor = DPTImageProcessor(size=_square(56), keep_aspect_ratio=True, ensure_multiple_of=14)
    return _saved(folder, DepthAnythingForDepthEstimation(config), processor)


def save_depth_anything_metric(folder: Path) -> Path:
    return save_depth_anything(folder, "metric")


def save_glpn(folder: Path) -> Path:
    from transformers import GLPNConfig, GLPNForDepthEstimation, GLPNImageProcessor

    torch.manual_seed(0)
    config = GLPNConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )
    # Wider weights make it chaotic: half precision would then say nothing.
    return _saved(folder, GLPNForDepthEstimation(config), GLPNImageProcessor(size_divisor=32), spread=0.5)


def save_zoedepth(folder: Path) -> Path:
    from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation, ZoeDepthImageProcessor

    torch.manual_seed(0)
    backbone = BeitConfig(
        **VIT, intermediate_size=64, image_size=64, patch_size=16, reshape_hidden_states=False,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = ZoeDepthConfig(
        backbone_config=backbone, backbone_hidden_size=32, neck_hidden_sizes=[16, 16, 16, 16], fusion_hidden_size=16,
        bottleneck_features=16, num_relative_features=8, bin_embedding_dim=8, num_attractors=[4, 2, 1, 1],
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
    )  # fmt: skip
    return _saved(folder, ZoeDepthForDepthEstimation(config), ZoeDepthImageProcessor(size=_square(64)))


def save_depth_pro(folder: Path, use_fov_model: bool = True) -> Path:
    from transformers import DepthProConfig, DepthProForDepthEstimation, DepthProImageProcessor, Dinov2Config

    torch.manual_seed(0)
    part = Dinov2Config(**VIT, image_size=32, patch_size=8, use_mask_token=False)
    config = DepthProConfig(
        fusion_hidden_size=16, patch_size=32, intermediate_hook_ids=[2, 1], intermediate_feature_dims=[16, 16],
        scaled_images_ratios=[0.25, 0.5, 1.0], scaled_images_overlap_ratios=[0.0, 0.5, 0.25],
        scaled_images_feature_dims=[16, 16, 16], use_fov_model=use_fov_model, num_fov_head_layers=1,
        image_model_config=part, patch_model_config=part, fov_model_config=part,
    )  # fmt: skip
    processor = DepthProImageProcessor(size=_square(128))
    model = DepthProForDepthEstimation(config)
    if use_fov_model:
        torch.nn.init.constant_(model.fov_model.head.layers[-1].bias, 50.0)  # degrees
    return _saved(folder, model, processor)


def save_depth_pro_without_fov(folder: Path) -> Path:
    return save_depth_pro(folder, use_fov_model=False)


def save_omnidata(folder: Path, channels: int = 3, **extra: Any) -> Path:
    """A PyTorch-Lightning checkpoint as Omnidata publishes it: `state_dict`, names with a prefix `model.`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": value for name, value in midas_network(channels).state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, **extra}, folder / "omnidata_dpt_normal_v2.ckpt")
    return folder


def save_omnidata_depth(folder: Path) -> Path:
    return save_omnidata(folder, channels=1)


def tips_config(**options: Any) -> Any:
    from transformers import Tipsv2DptConfig, Tipsv2VisionConfig

    vision = Tipsv2VisionConfig(
        **VIT, image_size=56, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False
    )
    return Tipsv2DptConfig(
        backbone_config=vision, neck_hidden_sizes=[16, 16, 16, 16], fusion_hidden_size=16, num_depth_bins=8,
        id2label=NAMES, **options,
    )  # fmt: skip


def save_tips(folder: Path, head: str = "Tipsv2DptForNormalEstimation", **options: Any) -> Path:
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, head)(tips_config(**options))
    return _saved(folder, model, transformers.Tipsv2DptImageProcessor(size=_square(56)))


def save_tips_dense(folder: Path) -> Path:
    return save_tips(folder, "Tipsv2DptForDensePrediction")


def save_sapiens2(folder: Path) -> Path:
    from transformers import Sapiens2Config, Sapiens2ForNormalEstimation, Sapiens2ImageProcessor

    torch.manual_seed(0)
    head = {
        "upsample_out_channels": [16, 16], "upsample_kernel_sizes": [4, 4], "conv_out_channels": [16],
        "conv_kernel_sizes": [1], "use_pixel_shuffle": True,
    }  # fmt: skip
    config = Sapiens2Config(
        **VIT, intermediate_size=64, image_size=[64, 48], patch_size=16, num_key_value_attention_heads=2,
        out_indices=[4], head_config=head, num_labels=3,
    )  # fmt: skip
    processor = Sapiens2ImageProcessor(size={"height": 64, "width": 48}, do_pad=True)
    return _saved(folder, Sapiens2ForNormalEstimation(config), processor)


def save_segformer(folder: Path, names: dict[int, str] | None = None) -> Path:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
        id2label=names or NAMES,
    )  # fmt: skip
    return _saved(folder, SegformerForSemanticSegmentation(config), SegformerImageProcessor(size=_square(64)))


def save_upernet(folder: Path) -> Path:
    from transformers import SegformerImageProcessor, UperNetConfig, UperNetForSemanticSegmentation

    torch.manual_seed(0)
    config = UperNetConfig(
        backbone_config=_swin(), hidden_size=16, pool_scales=[1, 2], use_auxiliary_head=False, id2label=NAMES
    )
    return _saved(folder, UperNetForSemanticSegmentation(config), SegformerImageProcessor(size=_square(64)))


def save_beit(folder: Path) -> Path:
    from transformers import BeitConfig, BeitForSemanticSegmentation, BeitImageProcessor

    torch.manual_seed(0)
    config = BeitConfig(
        **VIT, intermediate_size=64, image_size=64, patch_size=16, out_indices=[1, 2, 3, 4], pool_scales=[1, 2],
        use_auxiliary_head=False, id2label=NAMES,
    )  # fmt: skip
    processor = BeitImageProcessor(size=_square(64), do_center_crop=False)
    return _saved(folder, BeitForSemanticSegmentation(config), processor)


def _swin() -> Any:
    from transformers import SwinConfig

    return SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def save_mask2former(folder: Path, names: dict[int, str] | None = None) -> Path:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=_swin(), feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=2, decoder_layers=3, num_attention_heads=2, num_queries=5,
        id2label=names or NAMES,
    )  # fmt: skip
    processor = Mask2FormerImageProcessor(size=_square(64))
    return _saved(folder, Mask2FormerForUniversalSegmentation(config), processor)


def save_maskformer(folder: Path, names: dict[int, str] | None = None) -> Path:
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation, MaskFormerImageProcessor

    torch.manual_seed(0)
    decoder = DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5,
    )  # fmt: skip
    config = MaskFormerConfig(
        backbone_config=_swin(), decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32,
        id2label=names or NAMES,
    )  # fmt: skip
    return _saved(folder, MaskFormerForInstanceSegmentation(config), MaskFormerImageProcessor(size=_square(64)))


def save_eomt(folder: Path, dinov3: bool = False) -> Path:
    import transformers

    torch.manual_seed(0)
    name = "EomtDinov3" if dinov3 else "Eomt"
    config = getattr(transformers, f"{name}Config")(
        **VIT, image_size=64, patch_size=16, num_queries=5, num_blocks=1, num_upscale_blocks=1, id2label=NAMES,
        intermediate_size=64, mlp_ratio=2,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForUniversalSegmentation")(config)
    processor = transformers.EomtImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}, do_pad=True)
    return _saved(folder, model, processor)


def save_eomt_dinov3(folder: Path) -> Path:
    return save_eomt(folder, dinov3=True)


def save_oneformer(folder: Path) -> Path:
    """With a tokenizer of its few words, and its classes beside it."""
    from transformers import (
        OneFormerConfig,
        OneFormerForUniversalSegmentation,
        OneFormerImageProcessor,
        OneFormerProcessor,
    )

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    info = {str(i): {"name": name, "isthing": int(i < 2)} for i, name in NAMES.items()}
    (folder / "classes.json").write_text(json.dumps(info), encoding="utf-8")
    config = OneFormerConfig(
        backbone_config=_swin(), num_queries=5, hidden_dim=32, conv_dim=32, mask_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, text_encoder_width=32,
        text_encoder_vocab_size=49408, text_encoder_num_layers=1, text_encoder_context_length=77, task_seq_len=77,
        max_seq_len=77, query_dec_layers=1, use_task_norm=True, is_training=False, num_classes=4, id2label=NAMES,
        text_encoder_n_ctx=0, strides=[4, 8, 16, 32],
    )  # fmt: skip
    image = OneFormerImageProcessor(
        size=_square(64), repo_path=str(folder), class_info_file="classes.json", num_text=5, num_labels=4
    )
    model = OneFormerForUniversalSegmentation(config)
    return _saved(folder, model, OneFormerProcessor(image, _clip_tokenizer(folder)))


def _clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    letters = sorted(set("the task is semantic panoptic instance") - {" "})
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, merges=[])


DEPTH: dict[str, tuple[Saver, str]] = {
    "dpt": (save_dpt, "inverse"),
    "depth_anything": (save_depth_anything, "inverse"),
    "depth_anything_metric": (save_depth_anything_metric, "metric"),
    "glpn": (save_glpn, "metric"),
    "zoedepth": (save_zoedepth, "metric"),
    "depth_pro": (save_depth_pro, "metric"),
    "depth_pro_without_fov": (save_depth_pro_without_fov, "relative"),
    "tips_dense": (save_tips_dense, "metric"),
    "omnidata_depth": (save_omnidata_depth, "relative"),
}
NORMAL: dict[str, Saver] = {
    "tips": save_tips,
    "tips_dense": save_tips_dense,
    "dpt_of_normals": save_dpt_of_normals,
    "sapiens2": save_sapiens2,
    "omnidata": save_omnidata,
}
SEMANTIC: dict[str, Saver] = {
    "segformer": save_segformer,
    "upernet": save_upernet,
    "beit": save_beit,
    "dpt_semseg": save_dpt_semseg,
}
UNIVERSAL: dict[str, Saver] = {
    "mask2former": save_mask2former,
    "maskformer": save_maskformer,
    "eomt": save_eomt,
    "eomt_dinov3": save_eomt_dinov3,
    "oneformer": save_oneformer,
}
SAVERS: dict[str, Saver] = {name: saver for name, (saver, _) in DEPTH.items()} | NORMAL | SEMANTIC | UNIVERSAL
