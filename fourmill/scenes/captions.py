"""Sentences about a scene, in a small closed vocabulary, true by the scene's geometry.

Invariants: every visible object is mentioned, with its colour; every count, texture, size, relation and background word
is true; relations are only stated where they hold by a clear margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

NUMBERS = ("no", "a", "two", "three", "four")
# Margins below which no relation is stated: centres 12 % of the picture apart, or 0.6 m nearer.
SIDE_MARGIN, DEPTH_MARGIN = 0.12, 0.6
_OPENINGS = ("", "", "a picture of ", "a photo of ", "a rendering of ", "a view of ", "we see ", "an image of ")


class Thing(Protocol):
    """What a caption needs to know of an object."""

    @property
    def class_name(self) -> str: ...
    @property
    def colour(self) -> str: ...
    @property
    def texture(self) -> str: ...
    @property
    def size(self) -> str: ...
    @property
    def centre(self) -> tuple[float, float, float]: ...
    @property
    def middle(self) -> float: ...


def holds(relation: str, one: Thing, other: Thing) -> bool:
    """Whether `one` stands in `relation` ('left of', 'right of', 'in front of', 'behind') to `other`, clearly."""
    aside = one.middle - other.middle
    deeper = one.centre[2] - other.centre[2]
    if relation == "left of":
        return aside < -SIDE_MARGIN
    if relation == "right of":
        return aside > SIDE_MARGIN
    if relation == "in front of":
        return deeper < -DEPTH_MARGIN
    if relation == "behind":
        return deeper > DEPTH_MARGIN
    raise ValueError(f"unknown relation {relation!r}; known: left of, right of, in front of, behind")


def summary(things: Sequence[Thing], floor: str, wall: str) -> str:
    """The plainest caption: objects from left to right, colours and shapes only, then the room."""
    ordered = sorted(things, key=lambda thing: thing.middle)
    phrases = [f"a {thing.colour} {thing.class_name}" for thing in ordered]
    return f"{_join([_article(phrase) for phrase in phrases])} on a {floor} floor before a {wall} wall"


def describe(rng: np.random.Generator, things: Sequence[Thing], floor: tuple[str, str], wall: tuple[str, str]) -> str:
    """One of many true captions. `floor` and `wall` are (colour, texture)."""
    sizes, textures = rng.random() < 0.5, rng.random() < 0.85
    relate = len(things) > 1 and rng.random() < 0.45
    body = _related(rng, things, sizes, textures) if relate else None
    if body is None:
        body = _listed(rng, things, sizes, textures)
    return str(rng.choice(_OPENINGS)) + body + _background(rng, floor, wall, textures)


def _words(thing: Thing, sizes: bool, textures: bool) -> str:
    parts = [thing.size if sizes else "", thing.colour]
    if textures and thing.texture != "plain":
        parts.insert(1, thing.texture)
    return " ".join([part for part in parts if part] + [thing.class_name])


def _listed(rng: np.random.Generator, things: Sequence[Thing], sizes: bool, textures: bool) -> str:
    counts: dict[str, int] = {}
    for number in rng.permutation(len(things)):
        words = _words(things[number], sizes, textures)
        counts[words] = counts.get(words, 0) + 1
    return _join([_counted(words, count) for words, count in counts.items()])


def _related(rng: np.random.Generator, things: Sequence[Thing], sizes: bool, textures: bool) -> str | None:
    """'a b left of a c, with ...'; None where no clear relation between differently worded objects holds."""
    options = []
    for one in range(len(things)):
        for other in range(len(things)):
            if one == other or _words(things[one], sizes, textures) == _words(things[other], sizes, textures):
                continue
            for relation in ("left of", "right of", "in front of", "behind"):
                if holds(relation, things[one], things[other]):
                    options.append((one, relation, other))
    if not options:
        return None
    one, relation, other = options[rng.integers(len(options))]
    first, second = (_article("a " + _words(things[number], sizes, textures)) for number in (one, other))
    rest = [thing for number, thing in enumerate(things) if number not in (one, other)]
    verb = str(rng.choice(("", "", "standing "))) if relation != "in front of" else ""
    text = f"{first} {verb}{relation} {second}"
    return f"{text}, with {_listed(rng, rest, sizes, textures)}" if rest else text


def _background(rng: np.random.Generator, floor: tuple[str, str], wall: tuple[str, str], textures: bool) -> str:
    ground = _room_words(floor, textures) + " floor"
    behind = _room_words(wall, textures) + " wall"
    if rng.random() < 0.1:
        return f" on {_article('a ' + ground)}"
    form = rng.integers(3)
    if form == 0:
        return f" on {_article('a ' + ground)} before {_article('a ' + behind)}"
    if form == 1:
        return f", {ground}, {behind}"
    return f" in a room with {_article('a ' + behind)} and {_article('a ' + ground)}"


def _room_words(look: tuple[str, str], textures: bool) -> str:
    return f"{look[1]} {look[0]}" if textures and look[1] != "plain" else look[0]


def _counted(words: str, count: int) -> str:
    if count == 1:
        return _article("a " + words)
    return f"{NUMBERS[count]} {words}es" if words.endswith("box") else f"{NUMBERS[count]} {words}s"


def _article(phrase: str) -> str:
    return "an" + phrase[1:] if phrase[2:].startswith("orange") else phrase


def _join(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
