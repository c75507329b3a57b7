"""What benchmarks/loader.py reads: 4M's modalities on made-up samples, as our dataset and as ml-4m's tars of it.

Tokens are random: how long reading takes does not depend on them. Texts have the lengths of alt texts and of a
detector's lists; both sides get the very same samples, as the tars are this dataset's export.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from fourmill.modalities import modality
from fourmill.pipeline import codecs
from fourmill.pipeline.exchange import ExportOptions, export_dataset
from fourmill.pipeline.fingerprints import content_of
from fourmill.pipeline.manifest import Update, update_manifest
from fourmill.pipeline.shards import Spec, commit, digest, producer_id, write_shard
from fourmill.pipeline.store import open_store

GRIDS = {"tok_rgb": 16_384, "tok_depth": 8_192, "tok_normal": 8_192, "tok_semseg": 4_096, "tok_clip": 8_192}
SIDE, CROPS, WIDTH, HEIGHT = 224, 10, 340, 256  # pixels and crops as 4M's CC12M
_PICTURES = 64  # distinct ones, of about 20 kB
_CLASSES = ("bicycle", "bird", "boat", "book", "bottle", "bus", "car", "cat", "chair", "dog", "person", "tv")
_WORDS = tuple(
    word
    for line in (
        "a the red old small two dogs house on in of",
        "with man woman street photo view green and sea tree near",
    )
    for word in line.split()
)
_VOCABULARY = 30_000


def make_dataset(uri: str, vocabulary: str, shards: int, rows: int) -> None:
    """`shards` x `rows` samples with labels and tokens; texts tokenized with the vocabulary file given."""
    store, tokenizer = open_store(uri), Tokenizer.from_file(vocabulary)
    pictures = [_picture(np.random.default_rng(i)) for i in range(_PICTURES)]
    specs = _specs()
    records = []
    for shard in range(shards):
        keys = [f"{shard:06d}-{row:06d}" for row in range(rows)]
        values = _values(np.random.default_rng([1, shard]), rows, pictures, tokenizer)
        for name, columns in values.items():
            content = content_of(_producer(name))
            fingerprint = digest(name, str(shard))[:16]
            records.append(
                commit(store, write_shard(name, shard, fingerprint, keys, columns, specs[name], content, {}))
            )
    producers = {producer_id(content_of(_producer(name))): _producer(name) for name in specs}
    corpus = {"sources": ["made up"], "samples": shards * rows, "digest": "made up"}
    update_manifest(store, lambda old: Update(records, producers, corpus))


def export_for_ml4m(uri: str, out: str) -> None:
    """The same samples as tars, one folder for each modality, with 1,000 samples a tar."""
    names = ("rgb", "crop_settings", "caption", "det", *GRIDS)
    export_dataset(uri, out, ExportOptions("ml4m", modalities=names, workers=2))


def _specs() -> dict[str, Spec]:
    grids = {name: Spec(CROPS, vocabulary=v, length=196, grid=(14, 14)) for name, v in GRIDS.items()}
    texts = {"tok_caption": Spec(vocabulary=_VOCABULARY), "tok_det": Spec(CROPS, vocabulary=_VOCABULARY)}
    labels = {"rgb": Spec(), "crop_settings": Spec(CROPS), "caption": Spec(), "det": Spec(CROPS, classes=_CLASSES)}
    return {**labels, **grids, **texts}


def _producer(name: str) -> dict[str, Any]:
    config = {"crops": {"size": SIDE}} if name == "crop_settings" else {}
    return {"class": f"MadeUp_{name}", "version": 1, "licence": "CC0-1.0", "config": config}


def _picture(rng: np.random.Generator) -> bytes:
    coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(image + rng.integers(-8, 9, image.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=80)
    return file.getvalue()


def _values(
    rng: np.random.Generator, rows: int, pictures: Sequence[bytes], tokenizer: Any
) -> dict[str, list[list[Any]]]:
    """By modality, one column per crop, one encoded value per row."""
    captions = [" ".join(rng.choice(_WORDS, rng.integers(6, 25))) for _ in range(rows)]
    boxes = [_boxes(rng) for _ in range(rows)]
    settings = [[_crop(rng) for _ in range(rows)] for _ in range(CROPS)]
    made: dict[str, list[list[Any]]] = {
        "rgb": [[pictures[i] for i in rng.integers(0, len(pictures), rows)]],
        "crop_settings": settings,
        "caption": [captions],
        "det": [boxes] * CROPS,
        **{name: list(rng.integers(0, v, (CROPS, rows, 196))) for name, v in GRIDS.items()},
        "tok_caption": [[tokenizer.encode(text).ids for text in captions]],
        "tok_det": [[tokenizer.encode(_serialised(found)).ids for found in boxes]] * CROPS,
    }
    return {n: [[codecs.encode(modality(n), v) for v in column] for column in cs] for n, cs in made.items()}


def _boxes(rng: np.random.Generator) -> list[dict[str, Any]]:
    found = []
    for _ in range(rng.integers(0, 9)):
        x0, y0 = rng.uniform(0, 0.7, 2)
        box = [x0, y0, x0 + rng.uniform(0.1, 0.3), y0 + rng.uniform(0.1, 0.3)]
        found.append({"box": [round(v, 4) for v in box], "class_name": str(rng.choice(_CLASSES)), "score": 0.9})
    return sorted(found, key=lambda b: b["box"][0] ** 2 + b["box"][1] ** 2)


def _serialised(boxes: Sequence[dict[str, Any]]) -> str:
    corners = [" ".join(f"v{i}={round(999 * v)}" for i, v in enumerate(b["box"])) for b in boxes]
    return " ".join(f"{c} {b['class_name']}" for c, b in zip(corners, boxes, strict=True))


def _crop(rng: np.random.Generator) -> list[int]:
    side = int(rng.integers(HEIGHT // 2, HEIGHT + 1))
    top, left = int(rng.integers(0, HEIGHT - side + 1)), int(rng.integers(0, WIDTH - side + 1))
    return [top, left, side, side, int(rng.integers(0, 2))]


def vocabulary_of(checkout: str | None) -> str:
    """ml-4m's own vocabulary of 30,000, or the small one of its layout that ships with Fourmill."""
    if checkout:
        return str(Path(checkout) / "fourm/utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json")
    from fourmill.tokenizers.text import FILE

    return str(Path(__file__).parents[1] / "fourmill/demo/checkpoints/text_4m" / FILE)
