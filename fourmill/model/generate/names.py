"""What users call the modalities of a model: `depth` for `tok_depth`, `rgb` for its pixels, with or without `@224`.

Three vocabularies meet here: a model's own names (`tok_depth`, or in published checkpoints `tok_depth@224` and
`caption`), the catalogue's token modalities (`tok_caption`), and labels (`depth`, `caption`), which users think in.
"""

from __future__ import annotations

from collections.abc import Sequence

from fourmill.modalities import CATALOGUE, unknown

_SAME = {"tok_sam_edge": "tok_canny_edge"}  # 4M-21 tokenizes the outlines of SAM's masks with the tokenizer of edges


def token_name(name: str) -> str:
    """The catalogue's token modality for a model's: `tok_depth@224` -> `tok_depth`, `caption` -> `tok_caption`."""
    base = name.split("@", 1)[0]
    base = base if base.startswith("tok_") else f"tok_{base}"
    return _SAME.get(base, base)


def label_name(name: str) -> str:
    """What the user calls it: `tok_depth@224` -> `depth`; it is also the name of the files that are written."""
    return name.split("@", 1)[0].removeprefix("tok_")


def source_name(name: str) -> str:
    """The catalogue's label modality that a model's modality stands for. ValueError for one it does not have."""
    token = token_name(name)
    if token not in CATALOGUE:
        raise ValueError(unknown("modality", name, CATALOGUE))
    return str(CATALOGUE[token].source)


def resolve_name(name: str, known: Sequence[str], what: str = "modality") -> str:
    """The one of a model's modalities that `name` means: itself, its tokens, or either at some resolution.

    ValueError names the nearest label if there is none, and the candidates if there are several.
    """
    for group in (
        [m for m in known if m == name],
        [m for m in known if m == f"tok_{name}"],
        [m for m in known if m.split("@", 1)[0] == name],
        [m for m in known if m.split("@", 1)[0] == f"tok_{name}"],
    ):
        if len(group) == 1:
            return group[0]
        if group:
            raise ValueError(f"{what} {name!r} can be {' or '.join(group)}: give the whole name")
    raise ValueError(unknown(what, name, known if name.startswith("tok_") else set(map(label_name, known))))
