"""Masks of a point grid: ours against the original SamAutomaticMaskGenerator, the same network, points and thresholds.

    python benchmarks/sam.py [--points 8] [--images 4] [--checkpoint FOLDER] [--device cuda]

Without a checkpoint the network is small (256 pixels) and random, and the thresholds are set so that about one mask in
twenty passes, as with trained weights. Prints the share of the original's masks that ours has too (IoU above 0.9),
pictures per second of both (of CPU time on a CPU), and the ratio. Both run in float32, in one process, one after the
other.
"""

from __future__ import annotations

import sys

# Import from the root: benchmarks/tokenize.py, beside this file, would hide the standard library's.
sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourmill.labelers import LABELERS
from fourmill.labelers.sam_masks import stability
from fourmill.pipeline import masks
from fourmill.pipeline.component import Batch
from fourmill.scenes import render

SIZE = 224


def small_network() -> Any:
    """The original's architecture at an eighth of ViT-B's width, for 256 pixels."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=256, embed_dim=96, depth=4, num_heads=3, out_chans=128, window_size=14, global_attn_indexes=(3,),
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=True,
    )  # fmt: skip
    prompts = PromptEncoder(embed_dim=128, image_embedding_size=(16, 16), input_image_size=(256, 256), mask_in_chans=16)
    transformer = TwoWayTransformer(depth=2, embedding_dim=128, num_heads=8, mlp_dim=512)
    model = Sam(encoder, prompts, MaskDecoder(transformer_dim=128, transformer=transformer))
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1:
                weights.normal_(0, 1 if "_token" in name else weights[0].numel() ** -0.5)
            if "hypernetworks" in name and name.endswith("layers.2.weight"):
                weights.mul_(20)  # logits of several, so that a shift of 1 does not change everything
            if "output_upscaling" in name and weights.ndim == 4:
                weights.copy_(weights.mean((2, 3), keepdim=True).expand_as(weights) * 2)  # no noise of single pixels
    return model.eval()


def thresholds(labeler: Any, pixels: np.ndarray) -> dict[str, float]:
    """What a fifth of the masks exceeds in predicted IoU and a quarter of those in stability; duplicates may stay."""
    with torch.inference_mode():
        embedded = labeler.network.embed(torch.from_numpy(pixels).to(labeler.device))
        found = labeler.network.decode(embedded, labeler.tokens_PTC, -100.0)
    iou = float(found.score.quantile(0.8))
    stable = stability(found[found.score > iou].logits, 1.0)
    return {
        "pred_iou_thresh": iou,
        "stability_score_thresh": float(stable.quantile(0.75)),
        "box_nms_thresh": 1.0,  # random masks all reach from edge to edge
    }


def timed(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What `run` gives the second time, and how long that took, seconds."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    run()
    start = clock()
    made = run()
    return made, clock() - start  # masks have come to the host: nothing is left to wait for


def shared(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[bool]:
    """For each mask of the original generator, whether one of ours covers the same pixels to IoU 0.9."""
    if not theirs or not ours:
        return [False] * len(theirs)
    a = np.stack([r["segmentation"].ravel() for r in theirs]).astype(np.float32)
    b = np.stack([masks.decode(o["mask"]).ravel() for o in ours]).astype(np.float32)
    both = a @ b.T
    return list((both / (a.sum(1)[:, None] + b.sum(1) - both)).max(1) > 0.9)


def main() -> None:
    """Time both on the same pictures and print the comparison."""
    from segment_anything import SamAutomaticMaskGenerator

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=8, help="points per side of the grid")
    parser.add_argument("--images", type=int, default=4, help="pictures, one batch")
    parser.add_argument("--checkpoint", help="folder with one of the original's .pth files; default: a random network")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    pixels = np.stack([render(99, i, SIZE).image for i in range(options.images)]).transpose(0, 3, 1, 2)
    with tempfile.TemporaryDirectory() as folder:
        if not options.checkpoint:
            torch.save(small_network().state_dict(), Path(folder) / "small.pth")
        fixed = {"checkpoint": options.checkpoint or folder, "points_per_side": options.points, "precision": "float32"}
        labeler: Any = LABELERS.build("sam", fixed)
        labeler.load(options.device)
        chosen = {} if options.checkpoint else thresholds(labeler, pixels[:2])
        labeler.config = labeler.config.model_copy(update=chosen)
    generator = SamAutomaticMaskGenerator(labeler.network.model, points_per_side=options.points, **chosen)
    upright = [np.ascontiguousarray(p.transpose(1, 2, 0)) for p in pixels]
    theirs, their_s = timed(lambda: [generator.generate(p) for p in upright], options.device)
    batch = Batch([str(i) for i in range(len(pixels))], pixels)
    ours, our_s = timed(lambda: labeler.run(batch)["sam_instance"], options.device)
    found = [hit for t, o in zip(theirs, ours, strict=True) for hit in shared(t, o)]
    print(f"{options.points}x{options.points} points, {len(pixels)} pictures of {SIZE} px, {options.device}")
    print(
        f"masks: {len(found)} by the original, {sum(map(len, ours))} by ours; {np.mean(found):.1%} of its masks in ours"
    )
    print(
        f"original {len(pixels) / their_s:.3f} pictures/s, ours {len(pixels) / our_s:.3f}: ratio {their_s / our_s:.2f}"
    )


if __name__ == "__main__":
    main()
