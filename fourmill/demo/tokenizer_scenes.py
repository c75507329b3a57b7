"""What the demo tokenizers learn and are measured on: their recipes, and rendered scenes as numbered examples.

Depth, semseg and CLIP are learnt from what the demo teachers say, as that is what the demo tokenizes, and depth and
semseg from the truth as well. Invariant: `TRAIN_SEED` is learnt from, `EVALUATION_SEED` is only measured on, and the
demo's own corpus is neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.checkpoints import DEMO_FOLDER
from fourmill.labelers import LABELERS
from fourmill.modalities import CATALOGUE
from fourmill.pipeline.codecs import settle
from fourmill.pipeline.component import Batch
from fourmill.scenes import CLASSES
from fourmill.scenes.cache import SceneCache, open_cache
from fourmill.tokenizers import TOKENIZERS
from fourmill.tokenizers.fitting import perplexity_of

TRAIN_SEED, EVALUATION_SEED = 1, 9
SIZE = 128  # pixels, as the demo's crops


@dataclass(frozen=True)
class Recipe:
    """How one tokenizer is trained. `network` and `fields` go into its configurations; `steps` without --minutes."""

    what: str
    network: dict[str, Any]
    steps: int
    lr: float = 2e-3
    teacher: dict[str, Any] = field(default_factory=dict)


_SMALL = {
    "size": SIZE,
    "patch_size": 16,
    "dim": 128,
    "heads": 4,
    "encoder_blocks": 2,
    "decoder_blocks": 3,
    "decay": 0.9,
}
RECIPES = {
    "rgb": Recipe(
        "pictures, uint8 (3, 128, 128)",
        {**_SMALL, "dim": 160, "decoder_blocks": 4, "latent_dim": 16, "codebook_size": 1024},
        steps=1030,
    ),
    "depth": Recipe(
        "metric depth, float32 (128, 128)",
        {**_SMALL, "latent_dim": 16, "codebook_size": 512},
        steps=1550,
        teacher={"output": "metric"},
    ),
    "semseg": Recipe(
        "class maps, uint8 (128, 128): " + ", ".join(CLASSES),
        {**_SMALL, "latent_dim": 16, "codebook_size": 512},
        steps=913,
        teacher={"kind": "segmentation"},
    ),
    "clip": Recipe(
        "unit feature maps of the demo CLIP teacher, float32 (128, 8, 8)",
        {**_SMALL, "size": 8, "patch_size": 1, "decoder_blocks": 2, "latent_dim": 32, "codebook_size": 512},
        steps=1485,
    ),
}


class Scenes:
    """Numbered values of one modality of rendered scenes: the truth, then, where there is a teacher, what it says."""

    def __init__(self, name: str, cache: SceneCache, seed: int, said: Sequence[np.ndarray] = ()) -> None:
        self.name, self.cache, self.said = name, cache, said
        # As many of either: what the demo tokenizes is what teachers say, what it should say is the truth.
        self.num_true = 0 if name == "clip" else min(len(cache), len(said) or len(cache))
        # Truth and teacher of one scene share its key, so both are held out or neither.
        self.keys = [f"{seed}/{i}" for i in [*range(self.num_true), *range(len(said))]]
        self.groups = [0] * len(self.keys)

    def values(self, rows: Sequence[int]) -> list[Any]:
        return [self._true(row) if row < self.num_true else self._said(row - self.num_true) for row in rows]

    def _true(self, row: int) -> np.ndarray:
        if self.name == "rgb":
            return np.asarray(self.cache.images[row]).transpose(2, 0, 1)
        if self.name == "depth":
            return self.cache.depth[row].astype(np.float32)
        return np.asarray(self.cache.semantic[row])

    def _said(self, row: int) -> np.ndarray:
        return self.said[row].astype(np.uint8 if self.name == "semseg" else np.float32)


def labels(name: str, cache: SceneCache, count: int) -> list[np.ndarray]:
    """What the demo teacher says of the first `count` scenes, as a stored label is read; nothing if it is not there."""
    if name == "rgb" or not (DEMO_FOLDER / name).is_dir():
        return []
    teacher = LABELERS.build(name, {"checkpoint": f"demo:{name}", **RECIPES[name].teacher})
    teacher.load("cpu")
    found: list[np.ndarray] = []
    for start in range(0, min(count, len(cache)), 32):
        pixels = np.ascontiguousarray(cache.images[start : start + 32].transpose(0, 3, 1, 2))[: count - start]
        values = teacher.run(Batch([str(i) for i in range(len(pixels))], pixels=pixels))[name]
        found += [settle(CATALOGUE[name], v).astype(np.uint8 if name == "semseg" else np.float16) for v in values]
    return found


def measure(name: str, folder: Path, cache_folder: str, count: int) -> dict[str, float]:
    """Figures of a saved tokenizer on `count` scenes of `EVALUATION_SEED`."""
    cache = open_cache(cache_folder, EVALUATION_SEED, count, SIZE)
    if name == "text":
        return _measure_text(folder, [*cache.captions, *cache.summaries])
    tokenizer: Any = TOKENIZERS.build(f"tok_{name}", {"kind": "spatial", "checkpoint": str(folder)})
    tokenizer.load("cpu")
    figures: dict[str, float] = {}
    used = np.zeros(tokenizer.vocabulary, dtype=np.int64)
    for what, values in _values_to_measure(name, cache, count):
        tokens = tokenizer.encode(values)
        used += np.bincount(np.concatenate(tokens), minlength=len(used))
        found = tokenizer.codec.source.measure(values, tokenizer.decode(tokens))
        figures |= {f"{key} ({what})": value for key, value in found.items()}
    return {**figures, "codes used": float((used > 0).mean()), "codes in effect": perplexity_of(used)}


def _values_to_measure(name: str, cache: SceneCache, count: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    true, said = Scenes(name, cache, EVALUATION_SEED), labels(name, cache, count)
    if true.num_true:
        yield "truth", true.values(range(count))
    if said:
        taught = Scenes(name, cache, EVALUATION_SEED, said)
        yield "teacher", taught.values(range(taught.num_true, taught.num_true + len(said)))


def _measure_text(folder: Path, texts: list[str]) -> dict[str, float]:
    tokenizer: Any = TOKENIZERS.build("tok_caption", {"kind": "text", "checkpoint": str(folder)})
    rows = tokenizer.encode(texts)
    back = tokenizer.decode(rows)
    return {
        "entries": float(tokenizer.vocabulary),
        "captions restored exactly": float(np.mean([a == b for a, b in zip(texts, back, strict=True)])),
        "mean tokens a caption": float(np.mean([len(row) for row in rows])),
        "longest caption, tokens": float(max(len(row) for row in rows)),
    }
