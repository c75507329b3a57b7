"""Facts about a picture as text and back: `v1={number of the fact} v0={its value's bin}`, 4M-21's serialisation.

Ids, ranges, bins and clamps are 4M's (MetadataTransform). 4M shuffles the facts at every reading; stored rows have them
in the order of their ids. All 21 facts make 42 tokens, 43 with the end marker: 4M's own limit of 40 cuts them.

A value comes back as the middle of its bin: sizes within 16 pixels, real numbers within half of (high - low) / 49,
counts exactly, up to 999. A vocabulary of fewer bins clamps sizes and counts earlier; below 50 bins it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fourmill.modalities import unknown
from fourmill.tokenizers.sequences.bins import number_of, pieces, sentence

NAMES = (
    "original_width",
    "original_height",
    "caption_n_chars",
    "caption_n_words",
    "caption_n_sentences",
    "n_humans",
    "n_sam_instances",
    "n_coco_instances",
    "coco_instance_diversity",
    "colorfulness",
    "brightness",
    "contrast",
    "saturation",
    "entropy",
    "walkability",
    "objectness",
    "semantic_diversity",
    "geometric_complexity",
    "occlusion_score",
    "watermark_score",
    "aesthetic_score",
)  # a fact's place is its id
SIZES = ("original_width", "original_height")
SIZE_STEP = 32  # pixels of a bin
RANGES: Mapping[str, tuple[float, float]] = {
    "colorfulness": (0, 150),
    "brightness": (0, 255),
    "contrast": (0, 127),
    "saturation": (0, 255),
    "entropy": (0, 10),
    "walkability": (0, 1),
    "objectness": (0, 1),
    "geometric_complexity": (0, 0.75),
    "occlusion_score": (0, 0.25),
}
RANGE_BINS = 50
# Scores cut by hand: between bounds, and what a value between them comes back as.
BOUNDS: Mapping[str, tuple[float, ...]] = {"watermark_score": (0.5,), "aesthetic_score": (4.5, 5.5)}
MIDDLES: Mapping[str, tuple[float, ...]] = {"watermark_score": (0.25, 0.75), "aesthetic_score": (4.0, 5.0, 6.0)}
MOST = 999  # 4M clamps sizes and counts to it


def serialise(facts: Mapping[str, Any], bins: int) -> list[str]:
    """One phrase of two tokens for each fact, by id. `facts`: name -> number; ValueError for other names or values."""
    _refuse_few(bins)
    strange = [name for name in facts if name not in NAMES]
    if strange:
        raise ValueError(unknown("fact", strange[0], NAMES))
    return [f"v1={i} v0={_bin(name, facts[name], bins)}" for i, name in enumerate(NAMES) if name in facts]


def _refuse_few(bins: int) -> None:
    if bins < RANGE_BINS:
        raise ValueError(f"metadata needs {RANGE_BINS} values of v0; the vocabulary has {bins} (coordinate_bins)")


def _bin(name: str, value: Any, bins: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"bad {name} {value!r}: a finite number is needed")
    if name in RANGES:
        low, high = RANGES[name]
        share = (min(max(value, low), high) - low) / (high - low)
        return int(share * (RANGE_BINS - 1))  # cut off, not rounded, as 4M: only the maximum itself gets the last bin
    if name in BOUNDS:
        return sum(value >= bound for bound in BOUNDS[name])
    count = value // SIZE_STEP if name in SIZES else value
    return int(max(0, min(count, MOST, bins - 1)))


def parse(text: str, bins: int) -> tuple[dict[str, float], list[str]]:
    """The facts found, and one sentence for each piece that is none; of a fact that comes twice, the first counts."""
    facts: dict[str, float] = {}
    problems: list[str] = []
    words = text.split()
    for piece in pieces(words, {word for word in words if word.startswith("v1=")}):
        numbers = [number_of(word) for word in piece]
        if [number and number[0] for number in numbers] != [1, 0]:
            problems.append(sentence(piece, "not a pair v1 v0"))
            continue
        (_, which), (_, found) = (number for number in numbers if number)
        name = NAMES[which] if which < len(NAMES) else None
        value = None if name is None else _value(name, found, bins)
        if name is None or value is None:
            problems.append(sentence(piece, f"{name} has no bin {found}" if name else f"no fact has the id {which}"))
        elif name in facts:
            problems.append(sentence(piece, f"{name} for the second time"))
        else:
            facts[name] = value
    return facts, problems


def _value(name: str, found: int, bins: int) -> float | None:
    """The middle of a bin; None for a bin that the fact does not have."""
    if name in RANGES:
        low, high = RANGES[name]
        share = min((found + 0.5) / (RANGE_BINS - 1), 1.0)
        return low + share * (high - low) if found < RANGE_BINS else None
    if name in BOUNDS:
        return MIDDLES[name][found] if found < len(MIDDLES[name]) else None
    if found > min(MOST, bins - 1):
        return None
    return found * SIZE_STEP + SIZE_STEP // 2 if name in SIZES else found
