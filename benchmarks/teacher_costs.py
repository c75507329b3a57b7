"""What one picture costs each published architecture: parameters, FLOPs, activations. Random weights, nothing fetched.

    python benchmarks/teacher_costs.py                # all: about two CPU minutes
    python benchmarks/teacher_costs.py dpt-hybrid detr

The figures of `fourmill labelers` (fourmill/labelers/catalogue.py) are this script's.
"""

from __future__ import annotations

import sys

# Import from the root: benchmarks/tokenize.py, beside this file, would hide the standard library's.
sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))

import gc
from collections.abc import Callable
from typing import Any

import torch

from fourmill.labelers.cost import measure

Network = tuple[torch.nn.Module, Callable[[Any], Any]]


def _picture(size: int) -> torch.Tensor:
    return torch.zeros(1, 3, size, size)


def _called(model: torch.nn.Module, size: int, **inputs: Any) -> Network:
    return model, lambda m: m(pixel_values=_picture(size), **inputs)


def dpt_hybrid() -> Network:
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        is_hybrid=True, neck_hidden_sizes=[256, 512, 768, 768], backbone_out_indices=[2, 5, 8, 11],
        neck_ignore_stages=[0, 1],
    )  # fmt: skip
    return _called(DPTForDepthEstimation(config), 384)


def dpt_large() -> Network:
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        backbone_out_indices=[5, 11, 17, 23],
        neck_hidden_sizes=[256, 512, 1024, 1024],
    )
    return _called(DPTForDepthEstimation(config), 384)


def depth_anything_v2_small() -> Network:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, out_indices=[3, 6, 9, 12],
        reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=384, neck_hidden_sizes=[48, 96, 192, 384],
        fusion_hidden_size=64, head_hidden_size=32,
    )  # fmt: skip
    return _called(DepthAnythingForDepthEstimation(config), 518)


def zoedepth() -> Network:
    from transformers import ZoeDepthConfig, ZoeDepthForDepthEstimation

    bins = [{"name": n, "n_bins": 64, "min_depth": 1e-3, "max_depth": m} for n, m in (("nyu", 10.0), ("kitti", 80.0))]
    heads = {
        "bin_configurations": bins, "num_patch_transformer_layers": 4, "patch_transformer_hidden_size": 128,
        "patch_transformer_intermediate_size": 1024, "patch_transformer_num_attention_heads": 4,
    }  # fmt: skip
    return _called(ZoeDepthForDepthEstimation(ZoeDepthConfig(**heads)), 384)


def tipsv2_b14() -> Network:
    from transformers import Tipsv2DptConfig, Tipsv2DptForDensePrediction

    return _called(Tipsv2DptForDensePrediction(Tipsv2DptConfig()), 448)


def mask2former_swin_b() -> Network:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        image_size=384, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    names = {i: str(i) for i in range(133)}
    return _called(
        Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, id2label=names)), 384
    )


def eomt_large() -> Network:
    from transformers import EomtConfig, EomtForUniversalSegmentation

    return _called(EomtForUniversalSegmentation(EomtConfig(id2label={i: str(i) for i in range(133)})), 640)


def segformer_b5() -> Network:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        depths=[3, 6, 40, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768,
        id2label={i: str(i) for i in range(150)},
    )  # fmt: skip
    return _called(SegformerForSemanticSegmentation(config), 640)


def rtdetr_v2_r50() -> Network:
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    return _called(RTDetrV2ForObjectDetection(RTDetrV2Config(id2label={i: str(i) for i in range(80)})), 640)


def dfine_large() -> Network:
    from transformers import DFineConfig, DFineForObjectDetection

    return _called(DFineForObjectDetection(DFineConfig(id2label={i: str(i) for i in range(80)})), 640)


def detr_r50() -> Network:
    from transformers import DetrConfig, DetrForObjectDetection

    config = DetrConfig(use_pretrained_backbone=False, id2label={i: str(i) for i in range(91)})
    return _called(DetrForObjectDetection(config), 800)


def deformable_detr_r50() -> Network:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    config = DeformableDetrConfig(use_pretrained_backbone=False, id2label={i: str(i) for i in range(91)})
    return _called(DeformableDetrForObjectDetection(config), 800)


def mask_rcnn_v2() -> Network:
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    return maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None), lambda m: m([_picture(800)[0]])


def clip_vit_b16() -> Network:
    import open_clip

    model = open_clip.create_model("ViT-B-16-quickgelu").visual
    return model, lambda m: m(_picture(224))


def _sam(hidden: int, layers: int, heads: int, global_layers: list[int]) -> Network:
    from transformers import SamConfig, SamModel, SamVisionConfig

    vision = SamVisionConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, global_attn_indexes=global_layers,
        mlp_dim=4 * hidden,
    )  # fmt: skip
    model = SamModel(SamConfig(vision_config=vision))
    points = torch.zeros(1, 256, 1, 2)  # a grid of 16 x 16
    return model, lambda m: m(pixel_values=_picture(1024), input_points=points)


def sam_vit_b() -> Network:
    return _sam(768, 12, 12, [2, 5, 8, 11])


def sam_vit_l() -> Network:
    return _sam(1024, 24, 16, [5, 11, 17, 23])


def sam_vit_h() -> Network:
    return _sam(1280, 32, 16, [7, 15, 23, 31])


def _captioner(model: Any, size: int, **inputs: Any) -> Network:
    """Twenty tokens, greedily; an end token would shorten a random network's sentence."""
    return model, lambda m: m.generate(
        pixel_values=_picture(size), max_new_tokens=20, min_new_tokens=20, do_sample=False, **inputs
    )


def blip_base() -> Network:
    from transformers import BlipConfig, BlipForConditionalGeneration

    return _captioner(BlipForConditionalGeneration(BlipConfig()), 384)


def git_base() -> Network:
    from transformers import GitConfig, GitForCausalLM

    return _captioner(GitForCausalLM(GitConfig()), 224)


NETWORKS: dict[str, Callable[[], Network]] = {
    name.replace("_", "-"): globals()[name]
    for name in (
        "dpt_hybrid", "dpt_large", "depth_anything_v2_small", "zoedepth", "tipsv2_b14",
        "mask2former_swin_b", "eomt_large", "segformer_b5", "rtdetr_v2_r50", "dfine_large", "detr_r50",
        "deformable_detr_r50", "mask_rcnn_v2", "clip_vit_b16", "sam_vit_b", "sam_vit_l", "sam_vit_h", "blip_base",
        "git_base",
    )
}  # fmt: skip


NEED_VALUES = {
    "zoedepth", "mask2former-swin-b", "eomt-large", "rtdetr-v2-r50", "dfine-large", "detr-r50", "deformable-detr-r50",
    "mask-rcnn-v2", "clip-vit-b16", "blip-base", "git-base",
}  # fmt: skip


def main() -> None:
    names = sys.argv[1:] or list(NETWORKS)
    if unknown := set(names) - set(NETWORKS):
        raise SystemExit(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(NETWORKS)}")
    torch.set_num_threads(1)
    print(f"{'network':<26}{'parameters':>12}{'GFLOP':>10}{'activations':>14}", flush=True)
    for name in names:
        torch.manual_seed(0)
        # On the meta device only shapes are computed; some networks ask for values on their way, and run for real.
        with torch.device("cpu" if name in NEED_VALUES else "meta"):
            model, call = NETWORKS[name]()
            model = model.eval().requires_grad_(False).to("cpu" if name in NEED_VALUES else "meta")
            cost = measure(lambda m=model, c=call: c(m))  # type: ignore[misc]
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name:<26}{millions:>10.1f} M{cost.flops / 1e9:>10.0f}{cost.peak_bytes / 1e6:>11.0f} MB", flush=True)
        del model, call
        gc.collect()


if __name__ == "__main__":
    main()
