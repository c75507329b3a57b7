"""Query points and the masks at them as text and back, 4M-21's serialisation of `sam_instance`:

    point v0=y v1=x none
    point v0=y v1=x polygon v0=x0 v1=y0 v2=x1 v3=y1 and 16 ids of the mask inside the box

Coordinates are pixels of 4M's 224 x 224 crop, whatever the side of ours: a point is its pixel's index, a box its edges.
(4M's boxes come from polygons of pixel centres and so may end a pixel earlier.) A vocabulary of fewer than 225 bins has
a coarser grid. Parsing is total.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fourmill.tokenizers.sequences.bins import id_words, level, levels, number_of, pieces, read_ids, sentence, value_of
from fourmill.tokenizers.sequences.boxes import box_problem

SIDE = 224  # pixels of the grid
CODE = 16  # ids of a mask: 4 x 4 patches of 16 x 16 of its 64 x 64 cells
_STARTS = ("point", "polygon", "none")


@dataclass(frozen=True)
class CodedMask:
    """`box`: x0, y0, x1, y1 on the grid; `ids`: what the mask network made of the mask inside it."""

    box: tuple[float, float, float, float]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Query:
    """A point on the grid and the masks that it lies in; none says that it lies in no mask."""

    x: float
    y: float
    masks: list[CodedMask] = field(default_factory=list)


def serialise(queries: Sequence[Query], bins: int) -> list[str]:
    """One phrase for each mask, or for a point in none; a point's first mask shares its phrase, so that no row ends in
    a point that says nothing."""
    phrases: list[str] = []
    for query in queries:
        point = f"point v0={level(query.y, SIDE, bins)} v1={level(query.x, SIDE, bins)} "
        found = [_mask_phrase(mask, bins) for mask in query.masks] or ["none"]
        phrases += [point + found[0], *found[1:]]
    return phrases


def _mask_phrase(mask: CodedMask, bins: int) -> str:
    box = [f"v{i}={level(value, SIDE, bins)}" for i, value in enumerate(mask.box)]
    return " ".join(["polygon", *box, *id_words(mask.ids, bins)])


def parse(text: str, bins: int, vocabulary: int) -> tuple[list[Query], list[str]]:
    """The queries found, and one sentence for each piece that is none. `vocabulary`: of the mask network."""
    queries: list[Query] = []
    problems: list[str] = []
    unanswered: list[str] = []  # the last point's words, until something is said of it
    known = False  # whether the last point could be read
    for words in pieces(text.split(), _STARTS):
        if words[0] == "point":
            problems += [sentence(unanswered, "nothing is said of the point")] if unanswered else []
            found: Query | CodedMask | str = _point(words, bins)
            known, unanswered = isinstance(found, Query), []
            if isinstance(found, Query):
                queries.append(found)
                unanswered = words
        elif words == ["none"] and unanswered:
            unanswered = []
            continue
        else:
            found = _mask(words, bins, vocabulary) if known else "no point before it"
            unanswered = []
        if isinstance(found, CodedMask):
            queries[-1].masks.append(found)
        elif isinstance(found, str):
            problems.append(sentence(words, found))
    problems += [sentence(unanswered, "nothing is said of the point")] if unanswered else []
    return queries, problems


def _point(words: Sequence[str], bins: int) -> Query | str:
    numbers = [number for word in words if (number := number_of(word))]
    if len(words) != 3 or [kind for kind, _ in numbers] != [0, 1]:
        return "not a point v0 v1"
    (_, y), (_, x) = numbers
    if max(x, y) > levels(SIDE, bins):
        return f"coordinate {max(x, y)} is above {levels(SIDE, bins)}"
    return Query(value_of(x, SIDE, bins), value_of(y, SIDE, bins))


def _mask(words: Sequence[str], bins: int, vocabulary: int) -> CodedMask | str:
    if words[0] != "polygon":
        return "neither point nor polygon"
    numbers = [number_of(word) for word in words[1:5]]
    problem = box_problem(numbers, levels(SIDE, bins) + 1)
    if problem:
        return problem
    x0, y0, x1, y1 = (value_of(number[1], SIDE, bins) for number in numbers if number)
    if x0 == x1 or y0 == y1:
        return "the box is empty"
    ids = read_ids(words[5:], CODE, vocabulary, bins)
    return ids if isinstance(ids, str) else CodedMask((x0, y0, x1, y1), tuple(ids))
