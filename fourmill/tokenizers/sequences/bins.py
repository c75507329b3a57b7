"""Numbers as words: `v0=12`, and the values they stand for.

A vocabulary has four kinds of number word, v0 to v3, with as many values each: 4M's have 1,000. Invariants: with 1,000
bins every word is 4M's; with fewer, a range that fits (bytes into 256 bins) is 4M's all the same, and a wider one is
spread over the bins there are, so that a value comes back within half a bin. Rounding is half to even, as 4M's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

NUMBER = re.compile(r"v([0-3])=([0-9]{1,9})")
HALF = 512  # ids of networks: v0 holds those below it, v1 the next as many (4M's mask and pose networks have 1,024)
_SHOWN = 12  # words of a broken piece that its sentence quotes
# Control tokens as a stranger might write them; splitting the word keeps the letters and breaks the spell.
_CONTROL = re.compile(r"\[(?=(?:PAD|UNK|SOS|EOS|S_[0-9]+)\])|(?<=v[0-3])=(?=[0-9])")


def plain(text: str) -> str:
    """`text` with words that spell a control token or a number taken apart."""
    return _CONTROL.sub(lambda match: f"{match[0]} ", text)


def number_of(word: str) -> tuple[int, int] | None:
    """(kind, value) of a number word, None for other words."""
    match = NUMBER.fullmatch(word)
    return (int(match[1]), int(match[2])) if match else None


def fraction_word(kind: int, value: float, bins: int) -> str:
    """A number in 0..1; what lies outside is clipped."""
    return f"v{kind}={round((bins - 1) * min(max(value, 0.0), 1.0))}"


def levels(top: int, bins: int) -> int:
    """The highest value used for a range 0..top: `top` itself where the vocabulary holds it, else its last bin."""
    return min(top, bins - 1)


def level(value: float, top: int, bins: int) -> int:
    """A number in 0..top, clipped, as one of `levels`: rounded, and scaled only where it must be."""
    highest = levels(top, bins)
    clipped = min(max(value, 0), top)
    return round(clipped if highest == top else clipped * highest / top)


def value_of(found: int, top: int, bins: int) -> float:
    """The number that a `level` stands for."""
    highest = levels(top, bins)
    return float(found) if highest == top else found * top / highest


def most_ids(bins: int) -> int:
    """How many different ids of a network the number words can say."""
    return 4 * min(HALF, bins)


def id_words(ids: Iterable[int], bins: int) -> list[str]:
    """A network's ids: the quotient by 512 is the kind (4M: v0, v1; here up to v3), the rest the value. Vocabularies
    with fewer bins divide by their number of bins."""
    half = min(HALF, bins)
    return [f"v{i // half}={i % half}" for i in map(int, ids)]


def read_ids(words: Sequence[str], count: int, vocabulary: int, bins: int) -> list[int] | str:
    """The ids of exactly `count` words, or the sentence that says why they are none."""
    half = min(HALF, bins)
    numbers = [number_of(word) for word in words]
    if len(words) != count or None in numbers:
        return f"not the {count} numbers of a code"
    found = [kind * half + value for kind, value in numbers if value < half]  # type: ignore[misc]
    if len(found) != count or max(found) >= vocabulary:
        return f"a code that is not below {vocabulary}"
    return found


def pieces(words: Sequence[str], starts: Collection[str]) -> list[list[str]]:
    """`words` cut before every word of `starts`; what stands before the first is a piece of its own."""
    found: list[list[str]] = []
    for i, word in enumerate(words):
        if i == 0 or word in starts:
            found.append([])
        found[-1].append(word)
    return found


def sentence(words: Sequence[str], problem: str) -> str:
    """What is reported of a piece that is no object."""
    more = f" … ({len(words)} words)" if len(words) > _SHOWN else ""
    return f"{' '.join(words[:_SHOWN])!r}{more}: {problem}"


def draws(content: Any, count: int, below: int) -> list[int]:
    """`count` numbers below `below` that only the content decides: what 4M draws anew at every reading."""
    seed = json.dumps(content, sort_keys=True).encode()
    digests = (hashlib.sha256(b"%d " % i + seed).digest() for i in range(count))
    return [int.from_bytes(found[:8], "big") % below for found in digests]
