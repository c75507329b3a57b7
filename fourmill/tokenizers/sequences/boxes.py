"""Detected objects as text and back: `v0=12 v1=40 v2=55 v3=99 box`, 4M's serialisation.

Parsing is total: any text gives objects, and a list of what could not be read. A box survives the round trip within
half a bin; its score does not travel, so parsed objects have score 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

MIN_SCORE = 0.6  # 4M drops detections below it
NUM_COORDINATES = 4
_COORDINATE = re.compile(r"v([0-3])=([0-9]{1,9})")


def serialise(objects: Sequence[dict[str, Any]], bins: int, min_score: float = MIN_SCORE) -> list[str]:
    """One phrase for each object of sufficient score, nearest to the top left corner first.

    `objects`: {box: [x0, y0, x1, y1] in 0..1, class_name, score}. Coordinates outside 0..1 are clipped, as detectors
    overshoot the border; ValueError for other boxes. Equal distances keep the order given.
    """
    kept = [(_box(o), _name(o)) for o in objects if float(o.get("score", 1.0)) >= min_score]
    kept.sort(key=lambda pair: pair[0][0] ** 2 + pair[0][1] ** 2)
    return [" ".join([*_coordinates(box, bins), name]) for box, name in kept]


def _coordinates(box: Sequence[float], bins: int) -> list[str]:
    return [f"v{i}={round((bins - 1) * value)}" for i, value in enumerate(box)]  # round: half to even, as 4M


def _box(item: dict[str, Any]) -> list[float]:
    box = [float(value) for value in item["box"]]
    if len(box) != NUM_COORDINATES or not all(map(math.isfinite, box)):
        raise ValueError(f"bad box {item['box']!r}: four finite numbers x0, y0, x1, y1 in 0..1 are needed")
    return [min(max(value, 0.0), 1.0) for value in box]


def _name(item: dict[str, Any]) -> str:
    name = " ".join(str(item["class_name"]).split())
    if not name or any(_COORDINATE.fullmatch(word) for word in name.split()):
        raise ValueError(f"bad class name {item['class_name']!r}: words that are not coordinates are needed")
    return name


def parse(text: str, bins: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Objects found in `text`, in its order, and one sentence for each piece that is not an object."""
    objects: list[dict[str, Any]] = []
    problems: list[str] = []
    for words in _pieces(text.split()):
        problem = _problem(words, bins)
        if problem:
            problems.append(f"{' '.join(words)!r}: {problem}")
            continue
        box = [int(word.split("=")[1]) / (bins - 1) for word in words[:NUM_COORDINATES]]
        objects.append({"box": box, "class_name": " ".join(words[NUM_COORDINATES:]), "score": 1.0})
    return objects, problems


def _pieces(words: Sequence[str]) -> list[list[str]]:
    """Cut where a coordinate follows a name, and before every v0: a broken object does not spoil the next."""
    pieces: list[list[str]] = []
    for i, word in enumerate(words):
        match = _COORDINATE.fullmatch(word)
        after_name = i > 0 and _COORDINATE.fullmatch(words[i - 1]) is None
        if i == 0 or (match and (after_name or match[1] == "0")):
            pieces.append([])
        pieces[-1].append(word)
    return pieces


def _problem(words: Sequence[str], bins: int) -> str | None:
    matches = [_COORDINATE.fullmatch(word) for word in words]
    found = [(int(m[1]), int(m[2])) for m in matches if m]
    if [index for index, _ in found] != [0, 1, 2, 3]:
        return "not the four coordinates v0 v1 v2 v3"
    if len(words) == NUM_COORDINATES:
        return "no class name"
    values = [value for _, value in found]
    if max(values) >= bins:
        return f"coordinate {max(values)} is not below {bins}"
    if values[2] < values[0] or values[3] < values[1]:
        return "the box is inside out"
    return None
