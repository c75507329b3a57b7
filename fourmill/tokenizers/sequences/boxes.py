"""Detected objects as text and back: `v0=12 v1=40 v2=55 v3=99 box`, 4M's serialisation.

Parsing is total: any text gives objects, and a list of what could not be read. A box survives the round trip within
half a bin; its score does not travel, so parsed objects have score 1. A class name comes back as the vocabulary writes
it: in lower case and, unless it is a token of its own, with spaces around its signs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from fourmill.tokenizers.sequences.bins import fraction_word, number_of, plain, sentence

Order = Literal["distance", "score", "area"]
MIN_SCORE = 0.6  # 4M drops detections below it
NUM_COORDINATES = 4


def serialise(
    objects: Sequence[dict[str, Any]], bins: int, min_score: float = MIN_SCORE, order: Order = "distance"
) -> list[str]:
    """One phrase for each object of sufficient score, nearest to the top left corner first, or as `order` says.

    `objects`: {box: [x0, y0, x1, y1] in 0..1, class_name, score}. Coordinates outside 0..1 are clipped, as detectors
    overshoot the border; ValueError for other boxes.
    """
    kept = sorted_objects([o for o in objects if float(o.get("score", 1.0)) >= min_score], order)
    return [" ".join([*box_words(box_of(o), bins), name_of(o)]) for o in kept]


def sorted_objects(objects: Sequence[dict[str, Any]], order: Order) -> list[dict[str, Any]]:
    """4M's three orders: distance of the top left corner from the picture's; falling score; falling area of the box.
    Equal ones keep the order given."""
    if order == "score":
        return sorted(objects, key=lambda o: -float(o.get("score", 1.0)))
    boxes = [(box_of(o), o) for o in objects]
    if order == "area":
        boxes.sort(key=lambda pair: -(pair[0][2] - pair[0][0]) * (pair[0][3] - pair[0][1]))
    else:
        boxes.sort(key=lambda pair: pair[0][0] ** 2 + pair[0][1] ** 2)
    return [item for _, item in boxes]


def box_words(box: Sequence[float], bins: int) -> list[str]:
    """The four numbers of a box in 0..1."""
    return [fraction_word(i, value, bins) for i, value in enumerate(box)]


def box_of(item: dict[str, Any]) -> list[float]:
    """The item's box, clipped to 0..1; ValueError if it is none."""
    box = [float(value) for value in item["box"]]
    if len(box) != NUM_COORDINATES or not all(map(math.isfinite, box)):
        raise ValueError(f"bad box {item['box']!r}: four finite numbers x0, y0, x1, y1 in 0..1 are needed")
    return [min(max(value, 0.0), 1.0) for value in box]


def name_of(item: dict[str, Any]) -> str:
    """The item's class name as words; ValueError for none, and for names that hold a number word."""
    words = str(item["class_name"]).split()
    if not words or any(number_of(word) for word in words):
        raise ValueError(f"bad class name {item['class_name']!r}: words that are not coordinates are needed")
    return plain(" ".join(words))


def parse(text: str, bins: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Objects found in `text`, in its order, and one sentence for each piece that is not an object."""
    objects: list[dict[str, Any]] = []
    problems: list[str] = []
    for words in _pieces(text.split()):
        numbers = [number for word in words if (number := number_of(word))]
        problem = box_problem(numbers, bins) or ("no class name" if len(words) == NUM_COORDINATES else None)
        if problem:
            problems.append(sentence(words, problem))
            continue
        box = [value / (bins - 1) for _, value in numbers]
        objects.append({"box": box, "class_name": " ".join(words[NUM_COORDINATES:]), "score": 1.0})
    return objects, problems


def _pieces(words: Sequence[str]) -> list[list[str]]:
    """Cut where a coordinate follows a name, and before every v0: a broken object does not spoil the next."""
    pieces: list[list[str]] = []
    for i, word in enumerate(words):
        number = number_of(word)
        after_name = i > 0 and number_of(words[i - 1]) is None
        if i == 0 or (number and (after_name or number[0] == 0)):
            pieces.append([])
        pieces[-1].append(word)
    return pieces


def box_problem(numbers: Sequence[tuple[int, int] | None], bins: int) -> str | None:
    """Why these (kind, value) pairs are not the four coordinates of a box; None if they are."""
    if [number and number[0] for number in numbers] != [0, 1, 2, 3]:
        return "not the four coordinates v0 v1 v2 v3"
    values = [number[1] for number in numbers if number]
    if max(values) >= bins:
        return f"coordinate {max(values)} is not below {bins}"
    if values[2] < values[0] or values[3] < values[1]:
        return "the box is inside out"
    return None
