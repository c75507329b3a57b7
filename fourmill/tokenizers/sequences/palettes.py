"""Colour palettes as text and back: `v1=2 v0=255 v0=0 v0=0 v0=8 v0=8 v0=90`, 4M's serialisation of two RGB colours.

4M draws how many of 1 to 7 colours it reads, anew at every reading. A stored row stays the same, so `varied` lets the
palette's own content decide: over a dataset all lengths come up. Bytes need 256 bins; in fewer they are rounded to
steps of 255 / (bins - 1). Parsing is total.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fourmill.tokenizers.sequences.bins import draws, level, levels, number_of, pieces, sentence, value_of

MOST = 7  # colours of a palette
TOP = 255


def serialise(
    palettes: Mapping[str, Any], bins: int, colors: int | Literal["varied"] = "varied", max_tokens: int = 256
) -> list[str]:
    """One phrase, or none without colours. `palettes`: {"1": [[r, g, b]], …}, for each n the n main colours, 0..255.

    `colors`: which n, at most; smaller ones are taken where the label or `max_tokens` has no place for it. ValueError
    for what is no palette.
    """
    lengths = sorted(int(n) for n in palettes)
    if not lengths:
        return []
    limit = (max_tokens - 1) // 3
    wanted = draws(palettes, 1, MOST)[0] + 1 if colors == "varied" else colors
    chosen = max((n for n in lengths if n <= min(wanted, limit)), default=min(lengths))
    found = [_color(color) for color in palettes[str(chosen)]]
    if len(found) != chosen:
        raise ValueError(f"bad palette {chosen!r}: it holds {len(found)} colours")
    return [" ".join([f"v1={chosen}", *(f"v0={level(v, TOP, bins)}" for color in found for v in color)])]


def _color(color: Sequence[float]) -> Sequence[float]:
    if len(color) != 3 or not all(0 <= value <= TOP for value in color):
        raise ValueError(f"bad colour {color!r}: three numbers r, g, b in 0..{TOP} are needed")
    return color


def parse(text: str, bins: int) -> tuple[dict[str, list[list[int]]], list[str]]:
    """The palettes found, by their number of colours, and one sentence for each piece that is none."""
    found: dict[str, list[list[int]]] = {}
    problems: list[str] = []
    words = text.split()
    for piece in pieces(words, {word for word in words if word.startswith("v1=")}):
        numbers = [number_of(word) for word in piece]
        problem = _problem(numbers, bins)
        if problem is None and str(numbers[0][1]) in found:  # type: ignore[index]
            problem = "a second palette of as many colours"
        if problem:
            problems.append(sentence(piece, problem))
            continue
        values = [round(value_of(number[1], TOP, bins)) for number in numbers[1:] if number]
        found[str(len(values) // 3)] = [values[i : i + 3] for i in range(0, len(values), 3)]
    return found, problems


def _problem(numbers: Sequence[tuple[int, int] | None], bins: int) -> str | None:
    first, *rest = numbers
    if first is None or first[0] != 1 or not 1 <= first[1] <= MOST:
        return f"no number of colours v1=1 to v1={MOST}"
    if [number and number[0] for number in rest] != [0] * (3 * first[1]):
        return f"not {first[1]} colours of three v0 each"
    highest = max(number[1] for number in rest if number)
    if highest > levels(TOP, bins):
        return f"colour value {highest} is above {levels(TOP, bins)}"
    return None
