"""How fast batches are read and masked: Fourmill against ml-4m's own loader, and against memory.

    python benchmarks/loader.py                          # ours, and how far it is from copying memory
    python benchmarks/loader.py --ml4m CHECKOUT          # also: samples per CPU second, ours ÷ ml-4m's

Both read the same samples: 4M's seven kinds of tokens (RGB, depth, normals, segmentation, CLIP, captions, boxes; ten
crops), 128 visible and 128 target tokens, the masking mixture of 4M-7. Ours go from memory-mapped shards to the tensors
that the network takes, in one thread, nothing read ahead; ml-4m's from its tars to its own, in its process, without
workers. `7 + pixels` adds raw RGB, JPEG decoded and cropped by either side. CPU seconds count, of single processes that
take turns; the least of the turns. ml-4m repeats a sample 4 times with new crops and masks in its published
configuration (`x4`), which spares it reading; ours reads each sample anew. `full`: share of both budgets that holds
tokens.

Expect at least 50 times ml-4m's samples per CPU second for tokens, and the decoding of JPEG alone with pixels.
"""

from __future__ import annotations

import sys

# Import from the root: benchmarks/tokenize.py, beside this file, would hide the standard library's.
sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loader_data import GRIDS, SIDE, export_for_ml4m, make_dataset, vocabulary_of
from fourmill.model.config import Architecture, MaskingConfig, Mixture
from fourmill.model.data import DataConfig, TokenDataset
from fourmill.model.loader import Loader
from fourmill.model.masking import Masker

BUDGET = 128
NAMES = (*GRIDS, "tok_caption", "tok_det")


def open_ours(dataset: str, rgb: bool, batch: int) -> tuple[Loader, Masker]:
    """The loader as the trainer has it, and the masking of 4M-7."""
    names = (*(("rgb",) if rgb else ()), *NAMES)
    data = TokenDataset(dataset, DataConfig(names=names, image_size=SIDE, held_out=0.0, cache_bytes=0))
    targets = tuple(n for n in names if n != "rgb")
    shape = Architecture(dim=64, num_heads=1, domains_in=names, domains_out=targets, modalities=data.infos)
    alone = Mixture(input_alphas={"rgb" if rgb else "tok_rgb": 1000}, input_default=0, target_default=0.5)
    masking = MaskingConfig(num_input_tokens=BUDGET, num_target_tokens=BUDGET, mixtures=(alone, Mixture()))
    return Loader(data, batch, seed=0), Masker(shape, masking)


def measure_ours(dataset: str, rgb: bool, samples: int, batch: int) -> dict[str, float]:
    """CPU seconds a sample, of which reading; and the share of the token budgets that hold tokens."""
    loader, masker = open_ours(dataset, rgb, batch)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        masker(next(loader)[0], generator)
    steps, reading, filled = max(1, samples // batch), 0.0, [0, 0]
    start = time.process_time()
    for _ in range(steps):
        begun = time.process_time()
        (raw,) = next(loader)
        reading += time.process_time() - begun
        inputs, targets = masker(raw, generator)
        filled[0] += sum(inputs.counts or ())
        filled[1] += sum(targets.counts or ())
    count, seconds = steps * batch, time.process_time() - start
    shares = {"inputs": filled[0] / count / BUDGET, "targets": filled[1] / count / BUDGET}
    return {"cpu_s": seconds / count, "reading_s": reading / count, **shares}


def memory_seconds(batch: int) -> dict[str, float]:
    """What moving a sample's bytes would cost: its tokens once in, its masked tensors once out."""
    stored = sum(2 * 196 for _ in GRIDS) + 2 * 60
    written = BUDGET * (3 * 8 + 1) + BUDGET * (4 * 8 + 1)  # ids, positions, modalities (and labels), validity
    block = np.ones(1 << 26, np.uint8)
    target = np.empty_like(block)
    per_byte = _least(lambda: np.copyto(target, block), 5) / (2 * block.size)
    return {"bytes": stored + written, "cpu_s": per_byte * (stored + written), "gb_per_s": 1e-9 / per_byte}


def _least(call: Callable[[], Any], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def child(arguments: list[str]) -> dict[str, float]:
    """One measurement in a process of its own."""
    done = subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(folder: Path, args: argparse.Namespace, rgb: bool, repeats: int) -> dict[str, Any]:
    """Turns of ours and of ml-4m's; the least CPU seconds of each, and the ratio of every turn."""
    common = ["--samples", str(args.samples // (8 if rgb else 1)), "--batch", str(args.batch)]
    common += ["--rgb"] if rgb else []
    turns = []
    for _ in range(args.turns):
        ours = child([__file__, "--child", str(folder / "dataset"), *common])
        theirs = ["benchmarks/loader_ml4m.py", args.ml4m, str(folder / "tars"), "--repeats", str(repeats), *common]
        theirs[theirs.index("--samples") + 1] = str(args.ml4m_samples // (4 if rgb else 1))
        turns.append((ours, child(theirs)))
    least = [min((turn[i] for turn in turns), key=lambda t: t["cpu_s"]) for i in (0, 1)]
    ratios = sorted(theirs["cpu_s"] / ours["cpu_s"] for ours, theirs in turns)
    return {"ours": least[0], "ml-4m": least[1], "ratio": least[1]["cpu_s"] / least[0]["cpu_s"], "ratios": ratios}


def print_ours(folder: Path, args: argparse.Namespace) -> None:
    """Our own figures at several batch sizes, beside memory."""
    print(f"{'modalities':<12}{'batch':>6}{'µs a sample':>13}{'reading':>9}{'masking':>9}{'x memory':>10}")
    for batch in (32, 128, 256, 512):
        found = child([__file__, "--child", str(folder / "dataset"), "--samples", "16384", "--batch", str(batch)])
        memory = memory_seconds(batch)
        read, whole = found["reading_s"] * 1e6, found["cpu_s"] * 1e6
        times = whole / memory["cpu_s"] / 1e6
        print(f"{'7 tokens':<12}{batch:>6}{whole:>13.1f}{read:>9.1f}{whole - read:>9.1f}{times:>10.0f}", flush=True)
    print(f"memory: {memory['bytes']:.0f} bytes a sample at {memory['gb_per_s']:.1f} GB/s and thread")


def print_against(folder: Path, args: argparse.Namespace) -> None:
    """The comparison."""
    export_for_ml4m(str(folder / "dataset"), str(folder / "tars"))
    print("\nsamples per CPU second, and the share of both budgets that holds tokens")
    print(f"{'modalities':<12}{'ml-4m':>10}{'full':>12}{'ours':>10}{'full':>12}{'ratio':>8}  turns", flush=True)
    for rgb, repeats in ((False, 1), (False, 4), (True, 1), (True, 4)):
        found = compare(folder, args, rgb, repeats)
        cells = [f"{'7 + pixels' if rgb else '7 tokens'} x{repeats}".ljust(13)]
        for side in ("ml-4m", "ours"):
            cells.append(f"{1 / found[side]['cpu_s']:>9.0f}")
            cells.append(f"{found[side]['inputs']:>6.2f}{found[side]['targets']:>6.2f}")
        print(*cells, f"{found['ratio']:>6.1f} ", " ".join(f"{r:.1f}" for r in found["ratios"]), flush=True)


def main() -> None:
    """Makes the samples in a temporary folder and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ml4m", help="folder of a checkout of apple/ml-4m; without it that part is skipped")
    parser.add_argument("--shards", type=int, default=8, help="of 1,000 samples")
    parser.add_argument("--samples", type=int, default=32_768, help="samples that ours is timed on")
    parser.add_argument("--ml4m-samples", type=int, default=4096, help="samples that ml-4m's is timed on")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rgb", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)  # the dataset, in a process that measures
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(measure_ours(args.child, args.rgb, args.samples, args.batch)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_dataset(str(folder / "dataset"), vocabulary_of(args.ml4m), args.shards, 1000)
        print_ours(folder, args)
        if args.ml4m is None:
            print("against ml-4m: skipped, as --ml4m names no checkout of github.com/apple/ml-4m")
            return
        print_against(folder, args)


if __name__ == "__main__":
    main()
