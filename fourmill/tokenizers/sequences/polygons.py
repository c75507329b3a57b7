"""Named objects with outlines as text and back: `cone v0=10 v1=12 v0=30 v1=12 v0=20 v1=40 polygon v0=…`.

4M has no such modality; the words are its own: the class name, then the corners of its outline as pairs x, y. An object
in several pieces has the word `polygon` before each further outline. Holes are filled, as in COCO's polygons.

Outlines are simplified (Douglas & Peucker, 1973): every point of the outline lies within `tolerance` of the simplified
one, and rounding to bins moves a corner by at most half a bin each way. An object that is too small for an outline
is written as its box, so none is lost here. Parsing is total.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fourmill.pipeline import masks
from fourmill.tokenizers.sequences.bins import fraction_word, number_of, sentence
from fourmill.tokenizers.sequences.boxes import Order, box_of, name_of, sorted_objects

MARKER = "polygon"
Ring = list[tuple[int, int]]


def serialise(
    objects: Sequence[dict[str, Any]],
    bins: int,
    tolerance: float = 0.005,
    max_outlines: int = 4,
    min_score: float = 0.0,
    order: Order = "distance",
) -> list[str]:
    """One phrase for each object of sufficient score.

    `objects`: {class_name, box, mask, score}, the mask as run lengths. `tolerance`: in sides of the picture.
    `max_outlines`: the longest so many of an object are written. ValueError for names that are no class name.
    """
    kept = sorted_objects([o for o in objects if float(o.get("score", 1.0)) >= min_score], order)
    return [_phrase(item, bins, tolerance, max_outlines) for item in kept]


def _phrase(item: dict[str, Any], bins: int, tolerance: float, max_outlines: int) -> str:
    name = name_of(item)
    if name.lower() == MARKER:
        raise ValueError(f"bad class name {item['class_name']!r}: the word marks a further outline")
    outlines = masks.polygons(masks.decode(item["mask"]))[:max_outlines]
    rings = [_corners(simplify(np.reshape(outline, (-1, 2)), tolerance), bins) for outline in outlines]
    rings = [ring for ring in rings if len(ring) >= 3] or [_corners(_box_corners(box_of(item)), bins, distinct=False)]
    return f"{name} " + f" {MARKER} ".join(" ".join(ring) for ring in rings)


def _box_corners(box: Sequence[float]) -> np.ndarray:
    x0, y0, x1, y1 = box
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _corners(points_N2: np.ndarray, bins: int, distinct: bool = True) -> list[str]:
    """The points as words, `v0=x v1=y` each; of neighbours in the same bins one, where they are to be distinct."""
    found = [f"{fraction_word(0, x, bins)} {fraction_word(1, y, bins)}" for x, y in points_N2.tolist()]
    return [word for i, word in enumerate(found) if word != found[i - 1]] if distinct else found


def simplify(points_N2: np.ndarray, tolerance: float) -> np.ndarray:
    """The corners of a closed outline that are left when all others lie within `tolerance` of the lines between them.

    (N, 2) -> (n, 2), n <= N; the first point and the one farthest from it always stay.
    """
    closed = np.concatenate([points_N2, points_N2[:1]])
    farthest = int(np.square(points_N2 - points_N2[0]).sum(axis=1).argmax())
    kept = np.zeros(len(closed), dtype=bool)
    kept[[0, farthest]] = True
    parts = [(0, farthest), (farthest, len(points_N2))]
    while parts:
        first, last = parts.pop()
        distances = _to_line(closed[first + 1 : last], closed[first], closed[last])
        if distances.size and distances.max() > tolerance:
            middle = first + 1 + int(distances.argmax())
            kept[middle] = True
            parts += [(first, middle), (middle, last)]
    return points_N2[kept[:-1]]


def _to_line(points_N2: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distances (N,) to the line between two points, ends included."""
    along = end - start
    length = float(np.dot(along, along))
    shares = np.clip((points_N2 - start) @ along / length, 0, 1) if length else np.zeros(len(points_N2))
    return np.hypot(*(points_N2 - start - shares[:, None] * along).T)


def parse(text: str, bins: int, size: int = 224) -> tuple[list[dict[str, Any]], list[str]]:
    """Objects found in `text` with score 1, masks of size x size pixels, and one sentence for each broken piece.

    An object less than half a pixel large is the pixel it lies in.
    """
    named: list[tuple[str, list[Ring]]] = []
    problems: list[str] = []
    for name, words in _outlines(text.split()):
        ring = _ring(words, bins)
        if name != MARKER:
            named.append((name, []))
        if isinstance(ring, str):
            problems.append(sentence([*name.split(), *words], ring))
        elif not named or not named[-1][0]:
            problems.append(sentence([*name.split(), *words], "an outline without a class name"))
        else:
            named[-1][1].append(ring)
    return [_object(name, rings, bins, size) for name, rings in named if rings], problems


def _outlines(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Pairs of what is no number, joined, and the numbers that follow it."""
    found: list[tuple[list[str], list[str]]] = []
    for word in words:
        if number_of(word):
            found = found or [([], [])]
            found[-1][1].append(word)
            continue
        if not found or found[-1][1]:
            found.append(([], []))
        found[-1][0].append(word)
    return [(" ".join(name), numbers) for name, numbers in found]


def _ring(words: Sequence[str], bins: int) -> Ring | str:
    numbers = [number for word in words if (number := number_of(word))]
    if len(numbers) < 6 or [kind for kind, _ in numbers] != [0, 1] * (len(numbers) // 2):
        return "not three or more pairs v0 v1"
    highest = max(value for _, value in numbers)
    if highest >= bins:
        return f"coordinate {highest} is not below {bins}"
    values = [value for _, value in numbers]
    return list(zip(values[::2], values[1::2], strict=True))


def _object(name: str, rings: Sequence[Ring], bins: int, size: int) -> dict[str, Any]:
    points = [np.array(ring) / (bins - 1) for ring in rings]
    mask = masks.from_polygons([ring.ravel().tolist() for ring in points], (size, size))
    if not mask.any():
        x, y = np.minimum(np.concatenate(points).mean(axis=0) * size, size - 1).astype(int)
        mask[y, x] = True
    item = {"box": masks.box_of(mask), "area": int(mask.sum()), "mask": masks.encode(mask)}
    return {"class_name": name, "score": 1.0, **item}
