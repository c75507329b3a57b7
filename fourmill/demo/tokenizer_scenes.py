"""What the demo tokenizers learn and are measured on: their recipes, and rendered scenes as numbered examples.

Labels are learnt from what the demo teachers say, as that is what the demo tokenizes, and where there is a truth from
it as well. Invariant: `TRAIN_SEED` is learnt from, `EVALUATION_SEED` is only measured on, and the demo's own corpus is
neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.checkpoints import DEMO_FOLDER, resolve
from fourmill.labelers import LABELERS
from fourmill.modalities import CATALOGUE
from fourmill.pipeline.codecs import settle
from fourmill.pipeline.component import Batch
from fourmill.pipeline.masks import decode
from fourmill.scenes import CLASSES
from fourmill.scenes.cache import SceneCache, open_cache
from fourmill.tokenizers import TOKENIZERS
from fourmill.tokenizers.published import read_settings
from fourmill.tokenizers.sam_instance import inside
from fourmill.tokenizers.spatial import SpatialCodec, open_codec
from fourmill.tokenizers.training.fitting import perplexity_of

TRAIN_SEED, EVALUATION_SEED = 1, 9
DEMO_SIZE, SIZE = 128, 224  # pixels of the demo's crops, and of 4M's; the tokenizers are trained at both
MASK_SIZE = 64  # pixels; 4M's side of an instance within its box
MIN_AREA = 32  # pixels of a segment at 128 that is learnt: fewer are specks
SAM_SHARE = 4  # one scene in so many is shown to SAM, which takes its time


@dataclass(frozen=True)
class Recipe:
    """How one tokenizer is trained. `network` and `fields` go into its configurations; `steps` without --minutes.

    `labeler`: what labels its examples, and its configuration; `truth`: whether the scenes hold it too.
    `cache_size`: side of the scenes that it learns from.
    """

    what: str
    network: dict[str, Any]
    steps: int
    lr: float = 2e-3
    labeler: str | None = None
    teacher: dict[str, Any] = field(default_factory=dict)
    truth: bool = True
    cache_size: int = SIZE
    sizes: tuple[int, ...] = (DEMO_SIZE, SIZE)
    fields: dict[str, Any] = field(default_factory=dict)


_SMALL = {
    "size": SIZE,
    "patch_size": 16,
    "dim": 128,
    "heads": 4,
    "encoder_blocks": 2,
    "decoder_blocks": 3,
    "post_mlp": False,
    "decay": 0.9,
    "latent_dim": 16,
    "codebook_size": 512,
}
_BOTH = "at 128 and 224 pixels"
RECIPES = {
    "rgb": Recipe(
        f"pictures, uint8 (3, S, S) {_BOTH}",
        {**_SMALL, "dim": 144, "decoder_blocks": 4, "codebook_size": 1024},
        steps=2092,
    ),
    "depth": Recipe(
        f"metric depth, float32 (S, S) {_BOTH}",
        {**_SMALL, "dim": 96},
        steps=1555,
        labeler="depth",
        teacher={"checkpoint": "demo:depth", "output": "metric"},
    ),
    "normal": Recipe(
        f"unit normals, float32 (3, S, S) {_BOTH}",
        {**_SMALL, "dim": 96},
        steps=1431,
        labeler="normal",
        teacher={"checkpoint": "demo:normal"},
    ),
    "semseg": Recipe(
        f"class maps, uint8 (S, S) {_BOTH}: " + ", ".join(CLASSES),
        {**_SMALL, "dim": 96},
        steps=1223,
        labeler="semseg",
        teacher={"kind": "segmentation", "checkpoint": "demo:semseg"},
    ),
    "canny_edge": Recipe(
        f"Canny edges, uint8 (S, S) {_BOTH}",
        {**_SMALL, "dim": 96},
        steps=2015,
        labeler="canny_edge",
        truth=False,
    ),
    "clip": Recipe(
        "unit feature maps of the demo CLIP teacher, float32 (128, 8, 8)",
        {**_SMALL, "size": 8, "patch_size": 1, "decoder_blocks": 1, "latent_dim": 32},
        steps=5139,
        labeler="clip",
        teacher={"checkpoint": "demo:clip", "outputs": ["clip"]},
        truth=False,
        cache_size=DEMO_SIZE,
        sizes=(),
    ),
    "clip_global": Recipe(
        "unit image embeddings of the demo CLIP teacher, float32 (128,)",
        {
            "architecture": "mlp",
            "size": 1,
            "patch_size": 1,
            "dim": 128,
            "encoder_blocks": 2,
            "decoder_blocks": 2,
            "quantizer": "memcodes",
            "latent_dim": 128,
            "codebook_size": 256,
            "num_codebooks": 16,
        },
        steps=2899,
        labeler="clip",
        teacher={"checkpoint": "demo:clip", "outputs": ["clip_global"]},
        truth=False,
        cache_size=DEMO_SIZE,
        sizes=(),
        fields={"batch_size": 256},
    ),
    "sam_instance": Recipe(
        "masks of segments within their boxes, uint8 (64, 64)",
        {**_SMALL, "size": MASK_SIZE, "dim": 96, "encoder_blocks": 2, "decoder_blocks": 2, "out_conv": True},
        steps=622,
        labeler="sam",
        teacher={  # as configs/demo.yaml
            "checkpoint": "demo:sam",
            "points_per_side": 8,
            "pred_iou_thresh": 0.5,
            "stability_score_thresh": 0.6,
        },
        cache_size=DEMO_SIZE,
        sizes=(),
        fields={"batch_size": 128},
    ),
}


class Scenes:
    """Numbered values of one modality of rendered scenes: the truth, then, where there is a teacher, what it says."""

    def __init__(self, name: str, cache: SceneCache, seed: int, said: Sequence[np.ndarray] = ()) -> None:
        self.name, self.cache, self.said = name, cache, said
        # As many of either: what the demo tokenizes is what teachers say, what it should say is the truth.
        self.num_true = min(len(cache), len(said) or len(cache)) if RECIPES[name].truth else 0
        # Truth and teacher of one scene share its key, so both are held out or neither.
        self.keys = [f"{seed}/{i}" for i in [*range(self.num_true), *range(len(said))]]
        self.groups = [0] * len(self.keys)

    def values(self, rows: Sequence[int]) -> list[Any]:
        return [true_value(self.name, self.cache, i) if i < self.num_true else self._said(i) for i in rows]

    def _said(self, row: int) -> np.ndarray:
        value = self.said[row - self.num_true]
        return value if value.dtype == np.uint8 else value.astype(np.float32)


def true_value(name: str, cache: SceneCache, row: int) -> np.ndarray:
    """The modality's value of one scene, as a tokenizer takes it."""
    if name == "rgb":
        return np.asarray(cache.images[row]).transpose(2, 0, 1)
    if name == "depth":
        return cache.depth[row].astype(np.float32)
    if name == "normal":
        vectors = cache.normals[row].astype(np.float32).transpose(2, 0, 1)
        return vectors / np.linalg.norm(vectors, axis=0)
    return np.asarray(cache.semantic[row])


class Masks:
    """Every segment of rendered scenes, then every mask that SAM finds in some of them, as 64 x 64 cells of its box."""

    def __init__(self, cache: SceneCache, seed: int, count: int) -> None:
        true = [(i, mask) for i in range(min(count, len(cache))) for mask in segments_of(cache, i)]
        said = [(i, mask) for i, masks in enumerate(_sam_masks(cache, count // SAM_SHARE)) for mask in masks]
        self.num_true = len(true)
        self.keys = [f"{seed}/{i}" for i, _ in [*true, *said]]
        self.array = [mask for _, mask in [*true, *said]]
        self.groups = [0] * len(self.keys)

    def values(self, rows: Sequence[int]) -> list[Any]:
        return [self.array[row] for row in rows]


def segments_of(cache: SceneCache, row: int) -> list[np.ndarray]:
    """Each object of a scene, its floor and its walls, as masks uint8 (64, 64) within their boxes; specks left out."""
    things, classes = np.asarray(cache.instances[row]), np.asarray(cache.semantic[row])
    found = [things == number for number in np.unique(things[things > 0])]
    found += [(things == 0) & (classes == number) for number in np.unique(classes[things == 0])]
    return [inside(mask, MASK_SIZE) for mask in found if mask.sum() >= MIN_AREA]


def _sam_masks(cache: SceneCache, count: int) -> list[list[np.ndarray]]:
    """What the demo's SAM labeler says of the first `count` scenes, mask by mask."""
    recipe = RECIPES["sam_instance"]
    found = []
    for objects in _said_of(recipe, "sam_instance", cache, count):
        masks = [decode(item["mask"]).astype(bool) for item in objects]
        found.append([inside(mask, MASK_SIZE) for mask in masks if mask.sum() >= MIN_AREA])
    return found


def labels(name: str, cache: SceneCache, count: int) -> list[np.ndarray]:
    """What the labeler says of the first `count` scenes, as a stored label is read; nothing if there is none."""
    settled = (np.asarray(settle(CATALOGUE[name], value)) for value in _said_of(RECIPES[name], name, cache, count))
    return [value if value.dtype == np.uint8 else value.astype(np.float16) for value in settled]


def _said_of(recipe: Recipe, name: str, cache: SceneCache, count: int) -> Iterator[Any]:
    if recipe.labeler is None or not _is_there(recipe):
        return
    labeler = LABELERS.build(recipe.labeler, recipe.teacher)
    labeler.load("cpu")
    for start in range(0, min(count, len(cache)), 32):
        pixels = np.ascontiguousarray(cache.images[start : start + 32].transpose(0, 3, 1, 2))[: count - start]
        yield from labeler.run(Batch([str(i) for i in range(len(pixels))], pixels=pixels))[name]


def _is_there(recipe: Recipe) -> bool:
    checkpoint = recipe.teacher.get("checkpoint")
    return checkpoint is None or (DEMO_FOLDER / checkpoint.removeprefix("demo:")).is_dir()


def examples_of(name: str, cache: SceneCache, seed: int, taught: int) -> Scenes | Masks:
    """What the tokenizer of `name` learns from, or is measured on: `taught` labels, and as many truths."""
    if name == "sam_instance":
        return Masks(cache, seed, taught)
    said = labels(name, cache, taught)
    if not said and not RECIPES[name].truth:
        raise ValueError(f"the demo teacher of {name} is not there; train it first: python -m fourmill.demo.teachers")
    return Scenes(name, cache, seed, said)


def measure(name: str, folder: Path, cache_folder: str, count: int) -> dict[str, float]:
    """Figures of a saved tokenizer on `count` scenes of `EVALUATION_SEED`, at every size that it was trained at."""
    if name == "text":
        cache = open_cache(cache_folder, EVALUATION_SEED, count, DEMO_SIZE)
        return _measure_text(folder, [*cache.captions, *cache.summaries])
    recipe, figures = RECIPES[name], dict[str, float]()
    for size in recipe.sizes or (recipe.cache_size,):
        cache = open_cache(cache_folder, EVALUATION_SEED, count, size)
        found = _measure_at(name, _open(name, folder, size if recipe.sizes else None), cache, count)
        figures |= {f"{key}, {size} px" if recipe.sizes else key: value for key, value in found.items()}
    return figures


def _measure_at(name: str, codec: SpatialCodec, cache: SceneCache, count: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    used = np.zeros(codec.settings.network.vocabulary, dtype=np.int64)
    for what, values in _values_to_measure(name, cache, count):
        tokens = codec.encode(values)
        used += np.bincount(np.concatenate(tokens), minlength=len(used))
        found = codec.source.measure(values, codec.decode(tokens))
        figures |= {f"{key} ({what})": value for key, value in found.items()}
    return {**figures, "codes used": float((used > 0).mean()), "codes in effect": perplexity_of(used)}


def _open(name: str, folder: Path, size: int | None) -> SpatialCodec:
    """The codec of a saved tokenizer, for values of this side."""
    checkpoint = resolve(str(folder))
    settings = read_settings(checkpoint, "mask" if name == "sam_instance" else name)
    return open_codec(checkpoint, settings, "cpu", size)


def _values_to_measure(name: str, cache: SceneCache, count: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    examples = examples_of(name, cache, EVALUATION_SEED, count)
    num_true = examples.num_true
    if num_true:
        yield "truth", examples.values(range(num_true))
    if num_true < len(examples.keys):
        yield "label", examples.values(range(num_true, len(examples.keys)))


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
