"""People's bodies as text and back, 4M-21's serialisation of `human_poses`, 39 tokens a person:

    human v0=x0 v1=y0 v2=x1 v3=y1 pose (8 ids) global (9) camera (3) shape (10)

`global`, `camera` and `shape` are followed by v0 words: entries of the rotation matrix in -1..1, the camera in -1..19,
shape coefficients in -3..3, each over all bins. 4M shuffles the four groups at every reading; stored rows have them in
this order, and any order is read. 4M takes boxes in the whole picture, ours are in the crop like every other label, and
numbers beyond their range, for which 4M has no word, are clipped. Nobody is `none`. Parsing is total.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fourmill.tokenizers.sequences.bins import id_words, number_of, pieces, read_ids, sentence
from fourmill.tokenizers.sequences.boxes import box_of, box_problem, box_words

CODE = 8  # ids of a pose
POSE = 207  # numbers of a pose: 23 joints' rotation matrices
NOBODY = "none"
# Group -> field of a person, how many numbers, their range.
GROUPS: Mapping[str, tuple[str, int, tuple[float, float]]] = {
    "global": ("orientation", 9, (-1.0, 1.0)),
    "camera": ("camera", 3, (-1.0, 19.0)),
    "shape": ("shape", 10, (-3.0, 3.0)),
}

_WORDS = 1 + 4 + 1 + CODE + sum(1 + count for _, count, _ in GROUPS.values())  # 39


def serialise(people: Sequence[Mapping[str, Any]], codes: Sequence[Sequence[int]], bins: int) -> list[str]:
    """One phrase for each person, in their order. `people`: {box, orientation (9,), camera (3,), shape (10,)};
    `codes`: the ids of their poses. ValueError for other lengths or numbers that are not finite."""
    phrases = []
    for person, ids in zip(people, codes, strict=True):
        words = ["human", *box_words(box_of(dict(person)), bins), "pose", *id_words(ids, bins)]
        for group, (name, count, bounds) in GROUPS.items():
            words += [group, *_number_words(numbers_of(person, name, count), bounds, bins)]
        phrases.append(" ".join(words))
    return phrases or [NOBODY]


def numbers_of(person: Mapping[str, Any], name: str, count: int) -> np.ndarray:
    """float64 (count,) of one field of a person; ValueError if it is not that."""
    numbers = np.asarray(person[name], dtype=np.float64).ravel()
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError(f"bad {name} of a person: {numbers.shape}; {count} finite numbers are needed")
    return numbers


def _number_words(numbers: np.ndarray, bounds: tuple[float, float], bins: int) -> list[str]:
    low, high = bounds
    scale = (bins - 1) / (high - low)  # with 1,000 bins 4M's 499.5, 49.95 and 166.5
    return [f"v0={round(scale * float(value) - scale * low)}" for value in np.clip(numbers, low, high)]


def parse(text: str, bins: int, vocabulary: int) -> tuple[list[dict[str, Any]], list[str]]:
    """People with their pose's ids as `code` in place of the pose, and one sentence for each piece that is none.

    `vocabulary`: of the pose network.
    """
    people: list[dict[str, Any]] = []
    problems: list[str] = []
    words = text.split()
    for piece in [] if words == [NOBODY] else _pieces(words):
        found = _person(piece, bins, vocabulary)
        if isinstance(found, str):
            problems.append(sentence(piece, found))
        else:
            people.append(found)
    return people, problems


def _pieces(words: Sequence[str]) -> Iterator[list[str]]:
    """Cut before every `human` and behind every 39 words that follow it: a lost `human` spoils one person, not two."""
    for piece in pieces(words, {"human", NOBODY}):
        yield piece[:_WORDS]
        if piece[_WORDS:]:
            yield piece[_WORDS:]


def _person(words: Sequence[str], bins: int, vocabulary: int) -> dict[str, Any] | str:
    if words[0] != "human":
        return "no person"
    head, *groups = pieces(words, {"pose", *GROUPS})
    numbers = [number_of(word) for word in head[1:]]
    problem = box_problem(numbers, bins)
    if problem:
        return problem
    if sorted(group[0] for group in groups) != sorted(["pose", *GROUPS]):
        return "not one each of pose, global, camera, shape"
    person: dict[str, Any] = {"box": [number[1] / (bins - 1) for number in numbers if number]}
    for group, *rest in groups:
        found = read_ids(rest, CODE, vocabulary, bins) if group == "pose" else _numbers(group, rest, bins)
        if isinstance(found, str):
            return f"{group}: {found}"
        person["code" if group == "pose" else GROUPS[group][0]] = found
    return person


def _numbers(group: str, words: Sequence[str], bins: int) -> list[float] | str:
    _, count, (low, high) = GROUPS[group]
    numbers = [number for word in words if (number := number_of(word))]
    if len(words) != count or [kind for kind, _ in numbers] != [0] * count:
        return f"not {count} numbers v0"
    highest = max(value for _, value in numbers)
    if highest >= bins:
        return f"number {highest} is not below {bins}"
    return [low + value * (high - low) / (bins - 1) for _, value in numbers]
