"""ml-4m's own training loader, unmodified, on a CPU and beside today's libraries; for benchmarks/loader.py.

    python benchmarks/loader_ml4m.py CHECKOUT TARS [--rgb] [--repeats 4] [--samples 2048] [--batch 256]

The calls are those of run_training_4m.py's `setup_data`, in this process (no workers: copies between processes would
cost it more). Stood in for, as they are pinned to versions that today's numpy cannot live with: three calls on boxes of
albumentations, and OpenCV, which is not called. Without --rgb the tars of pictures are not read; boxes need the
picture's size, which is then told instead of read.
"""

from __future__ import annotations

import sys

# Import from the root: benchmarks/tokenize.py, beside this file, would hide the standard library's.
sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))

import argparse
import json
import os
import time
import types
from typing import Any

from benchmarks.loader_data import GRIDS, HEIGHT, SIDE, WIDTH

BUDGET = 128
TEXTS = ("caption", "det")


def stand_ins() -> dict[str, types.ModuleType]:
    """The part of albumentations 1.4.0 that ml-4m's boxes need, and an empty OpenCV."""
    boxes: Any = types.ModuleType("albumentations")

    def crop(box: Any, x_min: int, y_min: int, x_max: int, y_max: int, rows: int, cols: int) -> tuple[float, ...]:
        x0, y0, x1, y1 = box
        w, h = x_max - x_min, y_max - y_min
        return (x0 * cols - x_min) / w, (y0 * rows - y_min) / h, (x1 * cols - x_min) / w, (y1 * rows - y_min) / h

    def kept(found: Any, rows: int, cols: int, min_visibility: float) -> list[Any]:
        cut = [(*(min(max(v, 0), 1) for v in box[:4]), *box[4:]) for box in found]
        return [box for box in cut if box[0] < box[2] and box[1] < box[3]]

    boxes.bbox_crop, boxes.bbox_hflip = crop, lambda box, rows, cols: (1 - box[2], box[1], 1 - box[0], box[3])
    boxes.core = types.SimpleNamespace(bbox_utils=types.SimpleNamespace(filter_bboxes=kept))
    return {"albumentations": boxes, "cv2": types.ModuleType("cv2")}


def make_loader(checkout: str, tars: str, rgb: bool, repeats: int, batch: int) -> Any:
    """An iterator of ml-4m's batches."""
    sys.path.insert(0, checkout)
    for name, module in stand_ins().items():
        sys.modules.setdefault(name, module)
    from fourm.data import modality_info as table  # type: ignore[import-not-found]
    from fourm.data import pretrain_utils, unified_datasets
    from tokenizers import Tokenizer

    if not rgb:
        _tell_the_size(pretrain_utils)
    grids = [f"{name}@{SIDE}" for name in GRIDS]
    domains = [*([f"rgb@{SIDE}"] if rgb else []), *grids, *TEXTS]
    info = {name: {**table.MODALITY_INFO[name]} for name in domains}
    for name, entry in info.items():
        # The mixture of 4M-7: half of the samples show RGB (pixels, or here its tokens) alone.
        first = name == (f"rgb@{SIDE}" if rgb else f"tok_rgb@{SIDE}")
        target = 0.0 if name == f"rgb@{SIDE}" else 0.5
        entry.update(input_alphas=[1000.0 * first, 0.5], target_alphas=[target, target], keep=["random", "random"])
        if name not in TEXTS:
            entry["max_tokens"] = 196
    folders = ",".join([*(["rgb"] if rgb else []), *TEXTS, *grids, "crop_settings"])
    last = len([f for f in os.listdir(os.path.join(tars, "crop_settings")) if f.endswith(".tar")]) - 1
    settings = {
        "type": "multimodal",
        "use_wds": True,
        "data_path": f"{tars}/[{folders}]/shard-{{00000..{last:05d}}}.tar",
        "in_domains": "-".join(domains),
        "out_domains": "-".join(d for d in domains if not d.startswith("rgb")),
        "main_augment_domain": f"rgb@{SIDE}",
        "wds_n_repeats": repeats,
        "wds_shuffle_buffer_tar": 1000,
        "wds_shuffle_buffer_repeat": 1000,
    }
    vocabulary = os.path.join(checkout, "fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json")
    tokenizer = Tokenizer.from_file(vocabulary)
    loader = pretrain_utils.get_train_dataloader(
        settings, info, None, tokenizer, SIDE, BUDGET, BUDGET, BUDGET, BUDGET, num_tasks=1, num_workers=1
    )
    mixture = unified_datasets.MixtureDataset([loader], [1.0], info)
    collate = unified_datasets.default_collate
    return unified_datasets.wds.DataPipeline(mixture, unified_datasets.wds.batched(batch, collation_fn=collate))


def _tell_the_size(pretrain_utils: Any) -> None:
    own = pretrain_utils.PreTokenizedImageAugmenter

    class Told(own):  # type: ignore[misc, valid-type]
        def __call__(self, mod_dict: Any, crop_settings: Any) -> Any:
            coordinates, flip, _, target, index = super().__call__(mod_dict, crop_settings)
            return coordinates, flip, (HEIGHT, WIDTH), target, index

    pretrain_utils.PreTokenizedImageAugmenter = Told


def main() -> None:
    """Prints JSON: CPU seconds a sample, and the share of the token budgets that hold tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout")
    parser.add_argument("tars")
    parser.add_argument("--rgb", action="store_true")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    batches = iter(make_loader(args.checkout, args.tars, args.rgb, args.repeats, args.batch))
    # As many as the two shuffle buffers hold are read before the first one comes out, and stay inside at the end.
    for _ in range(max(1, 2048 // args.batch)):
        next(batches)
    start, filled, steps = time.process_time(), [0, 0], max(1, args.samples // args.batch)
    for _ in range(steps):
        made = next(batches)
        for side, mask in enumerate(("input_mask", "target_mask")):
            filled[side] += sum(int((~entry[mask]).sum()) for entry in made.values() if mask in entry)
    seconds = time.process_time() - start
    count = steps * args.batch
    found = {"cpu_s": seconds / count, "inputs": filled[0] / count / BUDGET, "targets": filled[1] / count / BUDGET}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
