"""Demo teachers of things: panoptic masks and boxes.

Shape legend: B batch, S side of the picture (128), Q queries, K objects of a picture.
Invariant: what a network is asked to find is exactly what the scene's instance map shows; boxes are its extents.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from fourmill.demo.teacher_figures import Figures, box_figures, panoptic_figures
from fourmill.demo.teacher_parts import (
    HALF,
    SIZE,
    Flip,
    Rows,
    all_rows,
    load_half,
    mirrored,
    patch_class_loss,
    pixels,
    save_half,
)
from fourmill.demo.teacher_truth import STUFF, boxes, segments
from fourmill.scenes import CLASSES, SHAPES
from fourmill.scenes.cache import SceneCache


class PanopticTask:
    """Mask2Former over a four-stage Swin; masks of 32 x 32, its own matching and losses in float32.

    While training, a linear head on the pixel embeddings also names the class of every pixel: queries find the objects
    within minutes, but learn their shapes slowly from one class an object. The head is not saved.
    """

    name, watched, size, rate = "panoptic", "pq", 16, 8e-4

    def __init__(self, cache: SceneCache) -> None:
        from transformers import (
            Mask2FormerConfig,
            Mask2FormerForUniversalSegmentation,
            Mask2FormerImageProcessor,
            SwinConfig,
        )

        names = dict(enumerate(CLASSES))
        swin = SwinConfig(
            image_size=SIZE, patch_size=4, embed_dim=24, depths=[2, 2, 4, 1], num_heads=[1, 2, 4, 8], window_size=8,
            mlp_ratio=3.0, drop_path_rate=0.0, out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        # Half as many points as a mask has pixels: the library's 12,544 are meant for masks of 256 x 256.
        config = Mask2FormerConfig(
            backbone_config=swin, feature_size=64, mask_feature_size=64, hidden_dim=64, encoder_feedforward_dim=128,
            encoder_layers=2, decoder_layers=4, dim_feedforward=192, num_attention_heads=4, num_queries=16,
            train_num_points=512, oversample_ratio=2.0, dropout=0.0, id2label=names,
            label2id={v: k for k, v in names.items()}, class_weight=4.0,
        )  # fmt: skip
        self.model = Mask2FormerForUniversalSegmentation(config).to(memory_format=torch.channels_last)
        self.model.classes = nn.Linear(64, 4 * 4 * len(CLASSES))
        self.processor = Mask2FormerImageProcessor(
            size={"height": SIZE, "width": SIZE}, image_mean=HALF, image_std=HALF, ignore_index=255
        )

    def loss(self, cache: SceneCache, rows: Rows, flip: Flip) -> torch.Tensor:
        semantic, instances = mirrored(cache.semantic[rows], flip), mirrored(cache.instances[rows], flip)
        found = [segments(*maps) for maps in zip(semantic, instances, strict=True)]
        masks = [torch.from_numpy(each).float() for each, _ in found]
        outputs = self.model(pixels(cache, rows, flip), output_auxiliary_logits=True)
        with torch.autocast("cpu", enabled=False):
            earlier = [{key: value.float() for key, value in one.items()} for one in outputs.auxiliary_logits]
            losses = self.model.get_loss_dict(
                outputs.masks_queries_logits.float(), outputs.class_queries_logits.float(), masks,
                [torch.tensor(classes) for _, classes in found], earlier,
            )  # fmt: skip
            embeddings = outputs.pixel_decoder_last_hidden_state.float().permute(0, 2, 3, 1)
            classes = patch_class_loss(self.model.classes, embeddings, semantic)
        return self.model.get_loss(losses) / (1 + len(earlier)) + 2 * classes

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        found = []
        for rows, flip in all_rows(cache):
            outputs = self.model(pixels(cache, rows, flip))
            outputs.masks_queries_logits = outputs.masks_queries_logits.float()
            outputs.class_queries_logits = outputs.class_queries_logits.float()
            found += self.processor.post_process_panoptic_segmentation(
                outputs, label_ids_to_fuse=set(STUFF), target_sizes=[(SIZE, SIZE)] * len(rows)
            )
        truth = [segments(*maps) for maps in zip(cache.semantic, cache.instances, strict=True)]
        figures = panoptic_figures(found, truth)
        return figures["pq"], figures

    def save(self, folder: Path) -> None:
        save_half(self.model, folder, drop=("classes",))
        self.processor.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        load_half(self.model, folder, extra="classes.")


class DetectionTask:
    """RT-DETRv2 over a small ResNet at strides 8, 16 and 32; its own matching, denoising and losses."""

    name, watched, size, rate = "detection", "ap50", 16, 1e-3

    def __init__(self, cache: SceneCache) -> None:
        from transformers import RTDetrImageProcessor, RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

        names = dict(enumerate(SHAPES))
        widths = [32, 64, 96, 128]
        resnet = RTDetrResNetConfig(
            embedding_size=32, hidden_sizes=widths, depths=[1, 2, 2, 1], layer_type="basic", out_indices=[2, 3, 4]
        )
        # The library freezes the backbone's norms, which presumes a trained one; this starts from nothing.
        config = RTDetrV2Config(
            backbone_config=resnet, freeze_backbone_batch_norms=False, encoder_hidden_dim=64, d_model=64,
            encoder_in_channels=widths[1:], encoder_layers=1, encoder_ffn_dim=192, encoder_attention_heads=4,
            decoder_in_channels=[64, 64, 64], decoder_ffn_dim=192, decoder_layers=3, decoder_attention_heads=4,
            hidden_expansion=0.5, num_queries=24, num_denoising=24, id2label=names,
            label2id={v: k for k, v in names.items()},
        )  # fmt: skip
        self.model = RTDetrV2ForObjectDetection(config).to(memory_format=torch.channels_last)
        self.processor = RTDetrImageProcessor(
            size={"height": SIZE, "width": SIZE}, do_normalize=True, image_mean=HALF, image_std=HALF
        )

    def loss(self, cache: SceneCache, rows: Rows, flip: Flip) -> torch.Tensor:
        semantic, instances = mirrored(cache.semantic[rows], flip), mirrored(cache.instances[rows], flip)
        labels = []
        for maps in zip(semantic, instances, strict=True):
            corners, kinds = boxes(*maps)
            middle, extent = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
            relative = torch.from_numpy(np.concatenate([middle, extent], axis=1) / SIZE)
            labels.append({"class_labels": torch.tensor(kinds, dtype=torch.long), "boxes": relative})
        return self.model(pixels(cache, rows, flip), labels=labels).loss

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        found = []
        for rows, flip in all_rows(cache):
            outputs = self.model(pixels(cache, rows, flip))
            outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
            found += self.processor.post_process_object_detection(
                outputs, threshold=0.0, target_sizes=[(SIZE, SIZE)] * len(rows)
            )
        figures = box_figures(found, [boxes(*maps) for maps in zip(cache.semantic, cache.instances, strict=True)])
        return figures["ap50"], figures

    def save(self, folder: Path) -> None:
        save_half(self.model, folder)
        self.processor.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        load_half(self.model, folder)
