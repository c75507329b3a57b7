"""Checkpoints of every detector and SAM family that the labelers name, with random weights and a few thousand of them.

`SAVERS[name](folder)` saves one as its library would, with the processor that its family uses, and gives the folder.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NAMES = {0: "sphere", 1: "box", 2: "cone"}
_LABELS: dict[str, Any] = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
_SMALL = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 32, "num_queries": 7, **_LABELS}
_HEADS = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_PYRAMID = {"encoder_in_channels": [16, 24, 32], "encoder_hidden_dim": 32, "decoder_in_channels": [32] * 3}
_TOP_K = {"num_denoising": 0, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2}
_TOP_K = {**_TOP_K, "decoder_attention_heads": 2, "decoder_n_points": 2}


def _save(folder: Path, model: Any, processor: Any) -> Path:
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if any(part in name for part in ("class_", "enc_score", "bbox_")):  # heads of zeros detect nothing
                weights.normal_(0, 0.2 if "bbox_" in name else 0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _resnet(*stages: str) -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=list(stages),
    )


def _hgnet() -> Any:
    from transformers import HGNetV2Config

    return HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 16, 24], stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 24, 32], stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True], stage_light_block=[False] * 4, stage_kernel_size=[3] * 4,
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], embedding_size=8,
        out_features=["stage2", "stage3", "stage4"], use_learnable_affine_block=True,
    )  # fmt: skip


def save_rt_detr_v2(folder: Path) -> Path:
    """Its processor only divides by 255, and resizes to a fixed square."""
    from transformers import RTDetrImageProcessor, RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrV2Config(backbone_config=backbone, **_SMALL, **_PYRAMID, **_TOP_K)
    processor = RTDetrImageProcessor(size={"height": 64, "width": 64})
    return _save(folder, RTDetrV2ForObjectDetection(config), processor)


def save_d_fine(folder: Path) -> Path:
    from transformers import DFineConfig, DFineForObjectDetection, RTDetrImageProcessor

    torch.manual_seed(0)
    options = {**_SMALL, **_PYRAMID, **_TOP_K, "decoder_n_points": [2, 2, 2]}
    processor = RTDetrImageProcessor(size={"height": 64, "width": 64})
    return _save(folder, DFineForObjectDetection(DFineConfig(backbone_config=_hgnet(), **options)), processor)


def save_deimv2(folder: Path) -> Path:
    from transformers import Deimv2Config, Deimv2ForObjectDetection, RTDetrImageProcessor

    torch.manual_seed(0)
    options = {**_SMALL, **_PYRAMID, **_TOP_K, "decoder_n_points": [2, 2, 2]}
    processor = RTDetrImageProcessor(size={"height": 64, "width": 64})
    return _save(folder, Deimv2ForObjectDetection(Deimv2Config(backbone_config=_hgnet(), **options)), processor)


def save_rf_detr(folder: Path) -> Path:
    from transformers import RfDetrConfig, RfDetrDinov2Config, RfDetrForObjectDetection, RfDetrImageProcessor

    torch.manual_seed(0)
    backbone = RfDetrDinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, num_windows=2,
        out_features=["stage1", "stage2"],
    )  # fmt: skip
    config = RfDetrConfig(
        backbone_config=backbone, d_model=32, decoder_ffn_dim=32, decoder_layers=2, decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2, decoder_n_points=2, num_queries=7, group_detr=2, **_LABELS,
    )  # fmt: skip
    return _save(folder, RfDetrForObjectDetection(config), RfDetrImageProcessor(size={"height": 56, "width": 56}))


def save_detr(folder: Path) -> Path:
    """Its scores are a softmax with a class for no object, and its processor makes a mask of padded pixels."""
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor

    torch.manual_seed(0)
    config = DetrConfig(use_timm_backbone=False, backbone_config=_resnet("stage4"), **_SMALL, **_HEADS)
    return _save(folder, DetrForObjectDetection(config), DetrImageProcessor(size=_edges()))


def save_conditional_detr(folder: Path) -> Path:
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor

    torch.manual_seed(0)
    config = ConditionalDetrConfig(use_timm_backbone=False, backbone_config=_resnet("stage4"), **_SMALL, **_HEADS)
    return _save(folder, ConditionalDetrForObjectDetection(config), ConditionalDetrImageProcessor(size=_edges()))


def save_deformable_detr(folder: Path) -> Path:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, DeformableDetrImageProcessor

    torch.manual_seed(0)
    backbone = _resnet("stage2", "stage3", "stage4")
    config = DeformableDetrConfig(use_timm_backbone=False, backbone_config=backbone, **_SMALL, **_HEADS)
    return _save(folder, DeformableDetrForObjectDetection(config), DeformableDetrImageProcessor(size=_edges(96)))


def save_yolos(folder: Path) -> Path:
    """Its processor makes a mask of padded pixels too, which its network does not take."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=[64, 64],
        patch_size=16, num_detection_tokens=7, **_LABELS,
    )  # fmt: skip
    return _save(folder, YolosForObjectDetection(config), YolosImageProcessor(size=_edges()))


def _edges(shortest: int = 64) -> dict[str, int]:
    return {"shortest_edge": shortest, "longest_edge": 128}


def save_maskrcnn(folder: Path, family: str = "maskrcnn") -> Path:
    """torchvision's own network (46 million parameters: it has no smaller form), for pictures of 64 pixels."""
    import torchvision
    from safetensors.torch import save_file

    torch.manual_seed(0)
    build = getattr(torchvision.models.detection, f"{family}_resnet50_fpn_v2")
    model = build(weights=None, weights_backbone=None, num_classes=4)
    folder.mkdir(parents=True)
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, folder / "w.safetensors"
    )
    names = {0: "__background__", **{i + 1: name for i, name in NAMES.items()}}
    (folder / "config.json").write_text(json.dumps({"id2label": names, "min_size": 64, "max_size": 64}))
    return folder


DETECTORS: dict[str, Callable[[Path], Path]] = {
    "rt_detr_v2": save_rt_detr_v2,
    "d_fine": save_d_fine,
    "deimv2": save_deimv2,
    "rf_detr": save_rf_detr,
    "detr": save_detr,
    "conditional_detr": save_conditional_detr,
    "deformable_detr": save_deformable_detr,
    "yolos": save_yolos,
}


def tiny_segment_anything(size: int = 64) -> Any:
    """The original's network, two blocks deep, one of them windowed; eight heads in the decoder as in its own files."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    torch.manual_seed(0)
    grid = size // 8
    encoder = ImageEncoderViT(
        img_size=size, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, out_chans=32, window_size=3,
        global_attn_indexes=(1,), norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=True,
    )  # fmt: skip
    prompts = PromptEncoder(
        embed_dim=32, image_embedding_size=(grid, grid), input_image_size=(size, size), mask_in_chans=4
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=32, num_heads=8, mlp_dim=32)
    decoder = MaskDecoder(transformer_dim=32, transformer=transformer, iou_head_depth=3, iou_head_hidden_dim=32)
    return _lively(Sam(encoder, prompts, decoder).eval())


def _lively(model: Any) -> Any:
    """Random weights so large that masks differ from point to point and predicted IoUs spread around a half."""
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1:
                weights.normal_(0, 1 if "_token" in name else weights[0].numel() ** -0.5)
            if "hypernetworks" in name and name.endswith(("layers.2.weight", "proj_out.weight")):
                weights.mul_(20)  # logits of several, so that masks are stable under a shift of 1
            if "iou_prediction_head" in name and any(part in name for part in ("layers.2.", "proj_out.")):
                weights.mul_(0.05) if weights.ndim > 1 else weights.fill_(0.5)
    return model


def save_segment_anything(folder: Path) -> Path:
    """A bare `.pth`, as the original publishes."""
    folder.mkdir(parents=True)
    torch.save(tiny_segment_anything().state_dict(), folder / "sam_vit_tiny.pth")
    return folder


def save_sam(folder: Path) -> Path:
    from transformers import SamConfig, SamImageProcessor, SamModel

    torch.manual_seed(0)
    config = SamConfig(
        vision_config={"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 64, "patch_size": 8, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 64,
                       "num_pos_feats": 16},
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 8, "iou_head_hidden_dim": 32},
    )  # fmt: skip
    _lively(SamModel(config)).save_pretrained(folder)
    SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def _sam2_parts() -> dict[str, Any]:
    from transformers import Sam2HieraDetConfig, Sam2VisionConfig

    backbone = Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[64, 64], blocks_per_stage=[1, 2, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 4],
        window_size_per_stage=[4, 2, 2, 2], global_attention_blocks=[4],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    vision = Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=32,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )  # fmt: skip
    prompts = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 8, "iou_head_hidden_dim": 32}
    return {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": decoder}


def save_sam2(folder: Path) -> Path:
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model

    torch.manual_seed(0)
    _lively(Sam2Model(Sam2Config(**_sam2_parts()))).save_pretrained(folder)
    Sam2ImageProcessor(size={"height": 64, "width": 64}, mask_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


SAMS: dict[str, Callable[[Path], Path]] = {
    "segment_anything": save_segment_anything,
    "sam": save_sam,
    "sam2": save_sam2,
}
SAVERS = {**DETECTORS, "maskrcnn": save_maskrcnn, **SAMS}


def save_sam2_video(folder: Path) -> Path:
    """The network for films, whose checkpoints are what is published as SAM 2."""
    from transformers import Sam2ImageProcessor, Sam2VideoConfig, Sam2VideoModel

    torch.manual_seed(0)
    memory = {
        "memory_attention_hidden_size": 32,
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 32,
    }
    config = Sam2VideoConfig(**_sam2_parts(), image_size=64, **memory)
    _lively(Sam2VideoModel(config)).save_pretrained(folder)
    Sam2ImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def save_sam_hq(folder: Path) -> Path:
    """A family that the labeler does not take."""
    from transformers import SamHQConfig, SamHQModel, SamImageProcessor

    config = SamHQConfig(
        vision_config={"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 64, "patch_size": 8, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 64,
                       "num_pos_feats": 16},
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 8, "iou_head_hidden_dim": 32,
                             "vit_dim": 32},
    )  # fmt: skip
    SamHQModel(config).save_pretrained(folder)
    SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder
