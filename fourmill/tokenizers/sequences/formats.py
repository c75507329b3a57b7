"""The table of text formats: source modality -> how its values become phrases, and how text becomes values again.

A format is a pair of functions and the names of the settings that each takes. Adding one is a module and a line here.
Invariant: `parse` is total; whatever text a model writes gives a value, and a sentence for each piece that is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fourmill.tokenizers.sequences import boxes, metadata, palettes, polygons
from fourmill.tokenizers.sequences.bins import plain


@dataclass(frozen=True)
class Format:
    """`serialise(value, bins, **settings) -> phrases`, `parse(text, bins, **settings) -> (value, problems)`.

    `writes`, `reads`: names of the settings that each takes. `whole`: a row is cut between two phrases, never in one.
    """

    serialise: Callable[..., list[str]]
    parse: Callable[..., tuple[Any, list[str]]]
    writes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    whole: bool = True


def _serialise_text(text: Any, bins: int) -> list[str]:
    if not isinstance(text, str):
        raise ValueError(f"a text of type {type(text).__name__}; str is needed")
    return [plain(text)]


def _parse_text(text: str, bins: int) -> tuple[str, list[str]]:
    return text, []


_TEXT = Format(_serialise_text, _parse_text, whole=False)
FORMATS = {
    "alt_text": _TEXT,
    "caption": _TEXT,
    "det": Format(boxes.serialise, boxes.parse, ("min_score", "order")),
    "instance": Format(
        polygons.serialise, polygons.parse, ("min_score", "order", "tolerance", "max_outlines"), ("size",)
    ),
    "color_palette": Format(palettes.serialise, palettes.parse, ("colors", "max_tokens")),
    "metadata": Format(metadata.serialise, metadata.parse),
}
