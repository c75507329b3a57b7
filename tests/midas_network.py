"""DPT-hybrid as MiDaS and Omnidata build it, small: the reference that their converted files are compared with.

The ResNet and the transformer are timm's own classes, as there; the decoder around them is written from the paper
(Ranftl et al., 2021) with the key names of the published files.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def midas_network(channels: int = 3) -> Any:
    """DPT-hybrid as MiDaS and Omnidata build it around timm's ResNet and transformer, with their key names; small."""
    from timm.layers import StdConv2dSame
    from timm.models.resnetv2 import ResNetV2
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_hybrid import HybridEmbed

    torch.manual_seed(0)
    backbone = ResNetV2(
        layers=(1, 1, 2), channels=(128, 256, 512), num_classes=0, global_pool="", preact=False, stem_type="same",
        conv_layer=functools.partial(StdConv2dSame, eps=1e-8),
    )  # fmt: skip
    vit = VisionTransformer(
        img_size=64, patch_size=1, embed_dim=64, depth=12, num_heads=1, num_classes=10,
        embed_layer=functools.partial(HybridEmbed, backbone=backbone),
    )  # fmt: skip
    return Midas(vit, stages=(128, 256), width=64, features=32, channels=channels).eval()


class Midas(nn.Module):
    """The decoder around the hybrid transformer; `forward` gives (B, channels, H, W)."""

    def __init__(self, vit: nn.Module, stages: tuple[int, int], width: int, features: int, channels: int) -> None:
        super().__init__()
        self.pretrained, self.scratch = nn.Module(), nn.Module()
        self.pretrained.model = vit
        self.pretrained.act_postprocess3 = nn.Sequential(
            Readout(width), nn.Identity(), nn.Identity(), nn.Conv2d(width, width, 1)
        )
        self.pretrained.act_postprocess4 = nn.Sequential(
            Readout(width), nn.Identity(), nn.Identity(), nn.Conv2d(width, width, 1),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
        )  # fmt: skip
        for i, size in enumerate((*stages, width, width), 1):
            setattr(self.scratch, f"layer{i}_rn", nn.Conv2d(size, features, 3, padding=1, bias=False))
            setattr(self.scratch, f"refinenet{i}", Fusion(features))
        self.scratch.output_conv = nn.Sequential(
            nn.Conv2d(features, features // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, channels, 1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        vit, seen = self.pretrained.model, []
        places = [*vit.patch_embed.backbone.stages[:2], vit.blocks[8], vit.blocks[11]]
        hooks = [place.register_forward_hook(lambda _m, _i, output: seen.append(output)) for place in places]
        vit.forward_features(images)
        for hook in hooks:
            hook.remove()
        maps = [*seen[:2], self.pretrained.act_postprocess3(seen[2]), self.pretrained.act_postprocess4(seen[3])]
        path = None
        for i in (4, 3, 2, 1):
            found = getattr(self.scratch, f"layer{i}_rn")(maps[i - 1])
            path = getattr(self.scratch, f"refinenet{i}")(
                found if path is None else path, None if path is None else found
            )
        return self.scratch.output_conv(path)


class Readout(nn.Module):
    """Tokens and the class token, projected together and laid out as a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(2 * width, width), nn.GELU())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        patches = tokens[:, 1:]
        mixed = self.project(torch.cat([patches, tokens[:, :1].expand_as(patches)], dim=-1))
        side = int(patches.shape[1] ** 0.5)
        return mixed.transpose(1, 2).unflatten(2, (side, side))


class Fusion(nn.Module):
    """Two residual units and an upsampling, as in RefineNet."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        self.resConfUnit1, self.resConfUnit2 = Residual(features), Residual(features)

    def forward(self, path: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        mixed = self.resConfUnit2(path if skip is None else path + self.resConfUnit1(skip))
        return self.out_conv(functional.interpolate(mixed, scale_factor=2, mode="bilinear", align_corners=True))


class Residual(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps + self.conv2(self.conv1(maps.relu()).relu())
