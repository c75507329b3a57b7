"""Runs ml-4m's own save_vq_tokens.py, unmodified, on a CPU and beside today's libraries; for benchmarks/tokenize.py.

    python benchmarks/tokenize_ml4m.py CHECKOUT [--libraries FOLDER] -- --task rgb --data_root … (its own options)

ml-4m needs libraries that today's transformers cannot live with, so they go into a folder of their own:

    pip install --no-deps --target FOLDER diffusers==0.20.0 huggingface_hub==0.24.0 importlib_metadata zipp einops

What is mended before its script runs, none of it within what is timed: `transformers` is hidden from diffusers 0.20;
albumentations and OpenCV, which only other modalities call, need not be there; checkpoints, which this benchmark has
just written, are read with their argparse.Namespace as torch did before 2.6; the tokenizer is loaded onto the CPU,
where the script forgets to say so; and `vit_tiny_enc` joins its encoders.
"""

from __future__ import annotations

import sys

# Import from the root: benchmarks/tokenize.py, beside this file, would hide the standard library's.
sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))

import argparse
import functools
import os.path
import runpy
import types
from typing import Any

TINY = {"dim_tokens": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 4}  # the encoder `vit_tiny_enc`


def mend() -> None:
    """Make ml-4m importable and usable here; its folder and its libraries must be on the path."""
    sys.modules["transformers"] = None  # type: ignore[assignment]
    for unused in ("albumentations", "cv2"):
        sys.modules[unused] = types.ModuleType(unused)
    import torch

    torch.load = functools.partial(torch.load, weights_only=False)
    import fourm.utils  # type: ignore[import-not-found]
    import fourm.vq  # type: ignore[import-not-found]
    from fourm.vq.models import vit_models  # type: ignore[import-not-found]

    def vit_tiny_enc(**sizes: Any) -> Any:
        return vit_models.ViTEncoder(**TINY, qkv_bias=True, **sizes)

    vit_models.vit_tiny_enc = vit_tiny_enc
    fourm.vq.get_image_tokenizer = functools.partial(fourm.vq.get_image_tokenizer, device="cpu")
    # Only tasks of CLIP look into it, and it imports what current setuptools have dropped.
    fourm.utils.clip = sys.modules["fourm.utils.clip"] = types.ModuleType("fourm.utils.clip")


def main() -> None:
    """Everything after `--` goes to save_vq_tokens.py."""
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="folder of a checkout of apple/ml-4m")
    parser.add_argument("--libraries", help="folder with the libraries it needs, if they are not installed")
    args = parser.parse_args(sys.argv[1:cut])
    sys.path[:0] = [os.path.abspath(args.checkout), *([args.libraries] if args.libraries else [])]
    mend()
    script = os.path.join(args.checkout, "save_vq_tokens.py")
    sys.argv = [script, *sys.argv[cut + 1 :]]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
