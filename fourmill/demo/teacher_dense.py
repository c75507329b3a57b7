"""Demo teachers of maps: depth, surface normals and classes for every pixel.

Shape legend: B batch, S side of the picture (128).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fourmill.demo.teacher_figures import Figures, depth_figures, normal_figures, semseg_figures
from fourmill.demo.teacher_parts import HALF, SIZE, Flip, Rows, all_rows, load_half, mirrored, pixels, save_half
from fourmill.scenes import CLASSES
from fourmill.scenes.cache import SceneCache


class DepthTask:
    """DPT over 8 x 8 patches; metres, from an L1 loss on log depth and on its gradients."""

    name, watched, size, rate = "depth", "aligned_absrel", 8, 8e-4

    def __init__(self, cache: SceneCache) -> None:
        from transformers import DPTConfig, DPTForDepthEstimation

        # Patches of 8 px did no better for the same CPU time; widths in multiples of 32 suit bfloat16 kernels.
        config = DPTConfig(
            image_size=SIZE, patch_size=16, hidden_size=160, num_hidden_layers=5, num_attention_heads=4,
            intermediate_size=480, backbone_out_indices=[1, 2, 3, 4], neck_hidden_sizes=[32, 64, 64, 96],
            reassemble_factors=[4, 2, 1, 0.5], fusion_hidden_size=64, readout_type="ignore",
            use_auxiliary_head=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.model = DPTForDepthEstimation(config).to(memory_format=torch.channels_last)
        # The last ReLU starts at the mean depth of the scenes: at zero it could die.
        nn.init.constant_(self.model.head.head[-2].bias, 4.0)

    def loss(self, cache: SceneCache, rows: Rows, flip: Flip) -> torch.Tensor:
        truth = torch.from_numpy(mirrored(cache.depth[rows].astype(np.float32), flip)).log()
        guess = self.model(pixels(cache, rows, flip)).predicted_depth.float().clamp(min=0.05).log()
        off = guess - truth
        edges = off.diff(dim=1).abs().mean() + off.diff(dim=2).abs().mean()
        return off.abs().mean() + edges

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        found = [self.model(pixels(cache, *batch)).predicted_depth.float().numpy() for batch in all_rows(cache)]
        figures = depth_figures(np.concatenate(found), cache.depth.astype(np.float32))
        return -figures["absrel"], figures

    def save(self, folder: Path) -> None:
        from transformers import DPTImageProcessor

        save_half(self.model, folder)
        DPTImageProcessor(
            size={"height": SIZE, "width": SIZE}, keep_aspect_ratio=False, image_mean=HALF, image_std=HALF
        ).save_pretrained(folder)

    def load(self, folder: Path) -> None:
        load_half(self.model, folder)


class NormalTask:
    """DPT over 16 x 16 patches; unit vectors in the camera frame (x right, y down, z forward), facing the camera.

    Loss: one minus the cosine, plus the angle's own gradient near zero (an L1 on the unit vectors), as the cosine alone
    is flat where the angle is small.
    """

    name, watched, size, rate = "normal", "mean_deg", 16, 1e-3

    def __init__(self, cache: SceneCache) -> None:
        from transformers import Tipsv2DptConfig, Tipsv2DptForNormalEstimation, Tipsv2VisionConfig

        vision = Tipsv2VisionConfig(
            image_size=SIZE, patch_size=16, hidden_size=128, num_hidden_layers=5, num_attention_heads=4, mlp_ratio=3,
            out_indices=[2, 3, 4, 5], reshape_hidden_states=False,
        )  # fmt: skip
        config = Tipsv2DptConfig(
            backbone_config=vision, neck_hidden_sizes=[32, 64, 64, 96], fusion_hidden_size=48,
            reassemble_factors=[4, 2, 1, 0.5], normal_frame="opencv",  # the published networks' is the opposite
        )  # fmt: skip
        self.model = Tipsv2DptForNormalEstimation(config).to(memory_format=torch.channels_last)

    def _normals(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) unit vectors."""
        found = functional.interpolate(self.model(images).normals.float(), images.shape[-2:], mode="bilinear")
        return functional.normalize(found, dim=1)

    def loss(self, cache: SceneCache, rows: Rows, flip: Flip) -> torch.Tensor:
        truth = mirrored(cache.normals[rows], flip)
        truth[flip, :, :, 0] *= -1  # a mirrored picture's normals point the other way across
        target = functional.normalize(torch.from_numpy(truth).permute(0, 3, 1, 2).float(), dim=1)
        found = self._normals(pixels(cache, rows, flip))
        return (1 - (found * target).sum(dim=1)).mean() + (found - target).abs().mean()

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        found = [self._normals(pixels(cache, *batch)).permute(0, 2, 3, 1).numpy() for batch in all_rows(cache)]
        figures = normal_figures(np.concatenate(found), cache.normals.astype(np.float32))
        return -figures["mean_deg"], figures

    def save(self, folder: Path) -> None:
        from transformers import Tipsv2DptImageProcessor

        save_half(self.model, folder)
        Tipsv2DptImageProcessor(
            size={"height": SIZE, "width": SIZE}, do_normalize=True, image_mean=HALF, image_std=HALF
        ).save_pretrained(folder)

    def load(self, folder: Path) -> None:
        load_half(self.model, folder)


class SemsegTask:
    """Segformer; cross-entropy at full resolution, the two background classes at half weight."""

    name, watched, size, rate = "semseg", "miou", 16, 1.5e-3

    def __init__(self, cache: SceneCache) -> None:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        names = dict(enumerate(CLASSES))
        config = SegformerConfig(
            depths=[2, 2, 2, 1], hidden_sizes=[32, 64, 128, 160], num_attention_heads=[1, 2, 4, 5],
            mlp_ratios=[3, 3, 3, 3], decoder_hidden_size=96, drop_path_rate=0.0, classifier_dropout_prob=0.0,
            id2label=names, label2id={name: number for number, name in names.items()},
        )  # fmt: skip
        self.model = SegformerForSemanticSegmentation(config).to(memory_format=torch.channels_last)
        self.weight = torch.tensor([0.5, 0.5, 1, 1, 1, 1])

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(self.model(images).logits.float(), images.shape[-2:], mode="bilinear")

    def loss(self, cache: SceneCache, rows: Rows, flip: Flip) -> torch.Tensor:
        truth = torch.from_numpy(mirrored(cache.semantic[rows], flip)).long()
        return functional.cross_entropy(self._logits(pixels(cache, rows, flip)), truth, self.weight)

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        found = [self._logits(pixels(cache, *batch)).argmax(dim=1).numpy() for batch in all_rows(cache)]
        figures = semseg_figures(np.concatenate(found), cache.semantic)
        return figures["miou"], figures

    def save(self, folder: Path) -> None:
        from transformers import SegformerImageProcessor

        save_half(self.model, folder)
        SegformerImageProcessor(
            size={"height": SIZE, "width": SIZE}, image_mean=HALF, image_std=HALF, do_reduce_labels=False
        ).save_pretrained(folder)

    def load(self, folder: Path) -> None:
        load_half(self.model, folder)
