"""A vocabulary like 4M's, masks and a mask network that can be followed by hand, for tests of sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fourmill.pipeline import masks
from fourmill.tokenizers import TOKENIZERS
from fourmill.tokenizers.text import MARKERS, train_text_tokenizer

BINS = 1000


def write_vocabulary(folder: Path) -> Path:
    """4M's 1,000 numbers of each kind, and class names and markers that are one token each."""
    data = train_text_tokenizer(["a red cone before a box"] * 3, 5000, 4, BINS, ["cone", "wine glass"], MARKERS)
    (folder / "tokenizer.json").write_bytes(data)
    return folder


def build(name: str, vocabulary: Path | str, kind: str = "text", **options: Any) -> Any:
    """The loaded tokenizer."""
    tokenizer = TOKENIZERS.build(name, {"kind": kind, "checkpoint": str(vocabulary), **options})
    tokenizer.load("cpu")
    return tokenizer


def square(top: int, left: int, side: int, size: int = 32) -> np.ndarray:
    """A bool (size, size) mask of side x side pixels."""
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def star(radii: list[float], size: int) -> np.ndarray:
    """The mask around the middle that reaches as far as `radii` say, in sides of the picture, one direction each."""
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    corners = 0.5 + np.array(radii)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return masks.from_polygons([corners.ravel().tolist()], (size, size))


def instance(name: str, mask: np.ndarray, score: float = 1.0) -> dict[str, Any]:
    """An object as labelers store it."""
    item = {"box": masks.box_of(mask), "area": int(mask.sum()), "mask": masks.encode(mask)}
    return {"class_name": name, "score": score, **item}


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Of two bool masks."""
    return float((one & other).sum() / (one | other).sum())


class Quarters:
    """A mask network that keeps of each of 16 x 16 cells whether most of it is covered: id 1023 if so, else 5."""

    class network:  # noqa: N801
        decodes = True

    def encode(self, values: Any) -> list[np.ndarray]:
        shares = [np.reshape(v, (4, 16, 4, 16)).mean(axis=(1, 3)) for v in values]
        return [np.where(share.ravel() > 0.5, 1023, 5) for share in shares]

    def decode(self, tokens: Any) -> list[np.ndarray]:
        return [np.kron((row.reshape(4, 4) == 1023).astype(np.uint8), np.ones((16, 16), np.uint8)) for row in tokens]
