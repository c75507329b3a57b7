"""The one catalogue of modalities: what each view of a sample is called, holds, and costs to store.

Everything that reads or writes a shard asks this table; no other module knows how a modality is encoded or
whether it has one value per sample or one per crop. A name may carry a variant, `tok_depth@448`: the part after
`@` only keeps two versions of one modality apart in a dataset, the catalogue looks up the part before it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Kind(str, Enum):
    """What a value of the modality is in memory."""

    IMAGE = "image"  # bytes of a picture file, as the corpus had them
    TEXT = "text"  # str
    JSON = "json"  # dict or list of plain values
    MAP = "map"  # float32 (H, W) or (C, H, W)
    CLASSES = "classes"  # uint8 (H, W)
    EDGES = "edges"  # uint8 (H, W), 0 no edge, 255 an edge
    FEATURES = "features"  # float32 (C, h, w), or (C,) for a global vector
    CROP = "crop"  # int32 (5,): top, left, height, width, flip
    GRID = "grid"  # integer tokens (L,), L the same in every row; those of a global vector are a grid of one row
    SEQUENCE = "sequence"  # integer tokens (n,), n differs


@dataclass(frozen=True)
class Modality:
    """One line of the catalogue.

    `per_crop`: one value for each recorded crop of the sample, else one for the sample.
    `codec`: how a value becomes bytes (see `fourmill.pipeline.codecs`, which states each error bound).
    `source`: for tokens, the modality they stand for.
    `vocabulary`, `tokens`: 4M's published sizes at 224 pixels; a dataset's own sizes are in its records.
    """

    name: str
    kind: Kind
    per_crop: bool
    codec: str
    summary: str
    source: str | None = None
    vocabulary: int | None = None
    tokens: int | None = None

    @property
    def is_tokens(self) -> bool:
        return self.kind in (Kind.GRID, Kind.SEQUENCE)


def _grid(source: str, vocabulary: int, tokens: int = 196) -> Modality:
    summary = f"{source} as {'a row' if source.endswith('_global') else 'a grid'} of discrete tokens"
    return Modality(f"tok_{source}", Kind.GRID, True, "tokens", summary, source, vocabulary, tokens)


def _sequence(source: str, per_crop: bool, tokens: int = 256) -> Modality:
    summary = f"{source} as text tokens, without end marker"
    return Modality(f"tok_{source}", Kind.SEQUENCE, per_crop, "tokens", summary, source, 30_000, tokens)


CATALOGUE: dict[str, Modality] = {
    m.name: m
    for m in (
        # Made by ingest.
        Modality("rgb", Kind.IMAGE, False, "verbatim", "the picture, its file's bytes untouched"),
        Modality("alt_text", Kind.TEXT, False, "utf8", "the text that came with the picture"),
        Modality("source", Kind.JSON, False, "json", "where the sample came from, its size, its own metadata"),
        # Made by labelers.
        Modality("crop_settings", Kind.CROP, True, "int32", "top, left, height, width, flip in upright pixels"),
        Modality("caption", Kind.TEXT, False, "utf8", "a captioning network's description"),
        Modality("captions", Kind.JSON, False, "json", "all texts of a sample: {text, source, style}, alt text first"),
        Modality("depth", Kind.MAP, True, "float16", "depth (H, W): metric, relative or inverse, as its spec states"),
        Modality("normal", Kind.MAP, True, "float16", "unit normals (3, H, W), x right, y down, z forward"),
        Modality("semseg", Kind.CLASSES, True, "png8", "class id of each pixel; 255 is void"),
        Modality("panoptic", Kind.JSON, True, "json", "segments: {class_name, is_thing, score, box, area, mask}"),
        Modality("instance", Kind.JSON, True, "json", "things: {class_name, score, box, area, mask}"),
        Modality("sam_instance", Kind.JSON, True, "json", "masks: {score, stability, point, box, area, mask}"),
        Modality("clip", Kind.FEATURES, True, "float16", "CLIP patch features after projection (C, h, w)"),
        Modality("clip_global", Kind.FEATURES, True, "float16", "CLIP image embedding (C,)"),
        Modality("dinov2", Kind.FEATURES, True, "float16", "DINOv2 patch features (C, h, w)"),
        Modality("dinov2_global", Kind.FEATURES, True, "float16", "DINOv2 image embedding (C,)"),
        Modality("imagebind", Kind.FEATURES, True, "float16", "ImageBind patch features (C, h, w)"),
        Modality("imagebind_global", Kind.FEATURES, True, "float16", "ImageBind image embedding (C,)"),
        Modality("det", Kind.JSON, True, "json", "objects: {class_name, score, box}, best first"),
        Modality("human_poses", Kind.JSON, True, "json", "persons: {box, orientation, pose, camera, shape}"),
        Modality("canny_edge", Kind.EDGES, True, "png8", "Canny edges: 255 on an edge, else 0"),
        Modality(
            "color_palette", Kind.JSON, True, "json", "for each n of 1 to 7, the n dominant colours: {n: [[r, g, b]]}"
        ),
        Modality(
            "metadata", Kind.JSON, False, "json", "numbers on picture, text and objects, by 4M's names: {name: number}"
        ),
        # Made by tokenizers.
        _grid("rgb", 16_384),
        _grid("depth", 8_192),
        _grid("normal", 8_192),
        _grid("semseg", 4_096),
        _grid("clip", 8_192),
        _grid("dinov2", 8_192, 256),
        _grid("imagebind", 8_192, 256),
        _grid("canny_edge", 8_192),
        _grid("clip_global", 8_192, 16),
        _grid("dinov2_global", 8_192, 16),
        _grid("imagebind_global", 8_192, 16),
        _sequence("alt_text", per_crop=False),
        _sequence("caption", per_crop=False),
        _sequence("metadata", per_crop=False, tokens=40),
        _sequence("det", per_crop=True),
        _sequence("instance", per_crop=True),
        _sequence("color_palette", per_crop=True, tokens=23),
        _sequence("human_poses", per_crop=True, tokens=275),
        _sequence("sam_instance", per_crop=True, tokens=290),
    )
}


def modality(name: str) -> Modality:
    """The catalogue's entry for `name`, with or without an `@variant`. ValueError names the nearest known one."""
    base = name.split("@", 1)[0]
    if base not in CATALOGUE:
        raise ValueError(unknown("modality", base, CATALOGUE))
    return CATALOGUE[base]


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not known: what was given, the nearest known one, and all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {what} {name!r}{hint} known: {', '.join(known)}"
