"""Demo teacher that segments whatever a point stands on: a tiny SAM.

Shape legend: B batch, S side of the picture (128), P points of a picture,
M masks of a point (3), H side of a mask (64).
Invariant: the mask of a point is the whole visible part of the object, floor or wall that the point's pixel shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fourmill.demo.teacher_figures import Figures, grid_points, mask_figures
from fourmill.demo.teacher_parts import HALF, SIZE, Flip, Rows, load_half, mirrored, patch_class_loss, pixels, save_half
from fourmill.demo.teacher_truth import STUFF
from fourmill.scenes import CLASSES
from fourmill.scenes.cache import SceneCache

_POINTS = 8  # of a training picture: one on each object (at most four), the others anywhere
_PATCH = 8


def surfaces(semantic: NDArray[np.uint8], instances: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One number for each thing a point can stand on: floor 0, wall 1, objects from 2 on."""
    return np.where(instances > 0, instances + np.uint8(len(STUFF) - 1), semantic).astype(np.uint8)


class SamTask:
    """`SamModel` with global attention over 16 x 16 patches; focal and dice loss of the best of three masks.

    While training, a linear head on the picture's embedding also names the classes at 4 x 4 points of each patch, which
    teaches the encoder what an object is long before points do. The head is not saved.
    """

    name, watched, size, rate = "sam", "best_iou", 8, 1e-3

    def __init__(self, cache: SceneCache) -> None:
        from transformers import SamConfig, SamImageProcessor, SamModel

        width, channels = 128, 96
        # The library's initial weights of 1e-10 presume a checkpoint: with them a fresh encoder never starts to learn.
        vision = {"hidden_size": width, "output_channels": channels, "num_hidden_layers": 5, "num_attention_heads": 4,
                  "image_size": SIZE, "patch_size": _PATCH, "mlp_dim": 384, "window_size": 0, "use_rel_pos": False,
                  "global_attn_indexes": [0, 1, 2, 3, 4], "num_pos_feats": channels // 2,
                  "initializer_range": 0.02}  # fmt: skip
        prompts = {"hidden_size": channels, "image_size": SIZE, "patch_size": _PATCH, "mask_input_channels": 8}
        masks = {"hidden_size": channels, "mlp_dim": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "iou_head_hidden_dim": 96}  # fmt: skip
        config = SamConfig(
            vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks, initializer_range=0.02
        )
        self.model = SamModel(config)
        _initialise(self.model)
        self.model.classes = nn.Linear(channels, 4 * 4 * len(CLASSES))
        self.processor = SamImageProcessor(
            size={"longest_edge": SIZE}, pad_size={"height": SIZE, "width": SIZE},
            mask_size={"longest_edge": SIZE // 2}, mask_pad_size={"height": SIZE // 2, "width": SIZE // 2},
            image_mean=HALF, image_std=HALF,
        )  # fmt: skip
        self._rng = np.random.default_rng(0)

    def loss(self, cache: SceneCache, rows: Rows, flip: Flip) -> torch.Tensor:
        semantic = mirrored(cache.semantic[rows], flip)
        ground = surfaces(semantic, mirrored(cache.instances[rows], flip))
        points = np.stack([_points(each, self._rng) for each in ground])  # (B, P, 2) as row, column
        on = ground[np.arange(len(rows))[:, None], points[..., 0], points[..., 1]]
        masks = torch.from_numpy(ground[:, None] == on[:, :, None, None]).float()
        embedding = self.model.vision_encoder(pixels(cache, rows, flip)).last_hidden_state
        where = torch.from_numpy(points[:, :, None, ::-1].copy()).float()
        outputs = self.model(image_embeddings=embedding, input_points=where)
        # Half resolution, as the network's masks: shares of each 2 x 2 pixels.
        best = _point_loss(outputs.pred_masks.float(), outputs.iou_scores.float(), functional.avg_pool2d(masks, 2))
        return best + 0.5 * patch_class_loss(self.model.classes, embedding.permute(0, 2, 3, 1), semantic)

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        """The first 32 scenes with an 8 x 8 grid: every point costs a pass of the decoder."""
        rows = np.arange(min(32, len(cache)))
        grid = grid_points(8, SIZE).expand(len(rows), -1, -1, -1)
        outputs = self.model(pixels(cache, rows, np.zeros(len(rows), bool)), input_points=grid)
        logits, scores = outputs.pred_masks.float(), outputs.iou_scores.float()
        full = [functional.interpolate(each, (SIZE, SIZE), mode="bilinear").flatten(0, 1).numpy() for each in logits]
        figures = mask_figures(full, scores.flatten(1).numpy(), cache.instances[rows])
        return figures["best_iou"] + figures["kept_best_iou"], figures

    def save(self, folder: Path) -> None:
        from transformers import SamProcessor

        save_half(self.model, folder, drop=("classes",))
        SamProcessor(self.processor).save_pretrained(folder)

    def load(self, folder: Path) -> None:
        load_half(self.model, folder, extra="classes.")


def _initialise(model: Any) -> None:
    """Initial weights of Kirillov et al. (2023), where the library's own presume a checkpoint.

    Its positions would get frequencies of 64 turns across the picture instead of about one, a pixel beside a patch's
    middle then says nothing about the patch; and its decoder weights are too small to start from.
    """
    nn.init.trunc_normal_(model.vision_encoder.pos_embed, std=0.02)
    frequencies = model.shared_image_embedding.positional_embedding
    nn.init.normal_(frequencies, std=1.0)
    frequencies.requires_grad_(False)
    for module in model.mask_decoder.modules():
        if isinstance(module, nn.Linear | nn.ConvTranspose2d):
            module.reset_parameters()


def _points(ground: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.intp]:
    """(P, 2) rows and columns: a pixel of each object, the rest from the whole picture."""
    numbers = [n for n in np.unique(ground) if n >= len(STUFF)]
    chosen = [rng.choice(np.flatnonzero(ground == number)) for number in numbers]
    chosen += list(rng.integers(ground.size, size=_POINTS - len(chosen)))
    return np.stack(np.unravel_index(np.array(chosen), ground.shape), axis=1)


def _point_loss(logits: torch.Tensor, scores: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross-entropy and dice of the best mask (B, P, M, H, H), and the squared error of the IoU scores.

    Kirillov et al. (2023) have focal loss here; it leaves logits small, and too few masks of small objects then pass
    SAM's stability filter (0.4 against 0.95 in the middle). A tenth of the mean over the masks keeps all three alive:
    in these rooms one mask is the right one.
    """
    wanted = truth[:, :, None].expand_as(logits)
    cross = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=(3, 4))
    share = logits.sigmoid()
    both, total = (share * wanted).sum(dim=(3, 4)), (share + wanted).sum(dim=(3, 4))
    each = 10 * cross + 1 - (2 * both + 1) / (total + 1)
    with torch.no_grad():
        said, true = logits > 0, wanted >= 0.5
        ious = (said & true).sum(dim=(3, 4)) / (said | true).sum(dim=(3, 4)).clamp(min=1)
    return each.amin(dim=2).mean() + 0.1 * each.mean() + 2 * (scores - ious).square().mean()
