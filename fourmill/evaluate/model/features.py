"""Feature maps: how near to the teacher's they are, and whether they find their own picture and its caption.

There is no truth for features, so the teacher's are the reference, and its own row is 1 by definition.

    cosine                      over all cells, with the teacher's cell
    own_picture_r1, r5, r10     how often the teacher's features of the same picture are the nearest to the predicted
                                ones among those of all N pictures, or among the nearest five, ten
    image_to_text, text_to_image    the same between predicted features and the texts of captions by the teacher's own
                                text tower, both ways

Maps are pooled for retrieval: the mean of their cells as unit vectors (a map is in the space of CLIP's embeddings).
Equal similarities share the ranks between them, so that a constant comes out at chance, k / N, and not at 1.

Legend: N pictures, E width of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fourmill.evaluate.model.spread import Draws, means
from fourmill.evaluate.tokens.dense import FeatureFidelity
from fourmill.evaluate.tokens.measure import same_shape
from fourmill.evaluate.words import TextEncoder

GALLERY = 1000
"""Pictures among which is looked, as in COCO's 1K test."""
_DEPTHS = (1, 5, 10)


def pooled(features: np.ndarray) -> np.ndarray:
    """(E,) float32 of unit length, from (E, h, w) or (E,)."""
    value = features.astype(np.float64).reshape(len(features), -1)
    cells = value / np.maximum(np.linalg.norm(value, axis=0), 1e-9)
    mean = cells.mean(axis=1)
    unit: np.ndarray = (mean / max(float(np.linalg.norm(mean)), 1e-9)).astype(np.float32)
    return unit


def recalls(similar_NN: np.ndarray) -> dict[int, np.ndarray]:
    """By depth k, float64 (N,): the chance that query i's own entry, column i, is among its k most similar, if those
    that are equally similar are in random order."""
    own_N1 = np.diagonal(similar_NN)[:, None]
    above_N = (similar_NN > own_N1).sum(axis=1)
    tied_N = (similar_NN == own_N1).sum(axis=1)
    return {k: np.clip((k - above_N) / tied_N, 0.0, 1.0) for k in _DEPTHS}


class FeatureTally:
    """The features of one predictor, in the order of the samples."""

    protocol = (
        "cosine of cells with the teacher's; recall of the own picture by pooled features, and of the own caption by "
        f"the teacher's text tower, among the first {GALLERY} pictures"
    )

    def __init__(self, setting: Any) -> None:
        self._fidelity = FeatureFidelity(setting)
        self._cosines: list[float] = []
        self.vectors: list[np.ndarray] = []

    def add(self, value: np.ndarray, teacher: np.ndarray) -> float:
        """Take in one value; returns how wrong it is."""
        same_shape(value, teacher)
        badness = self._fidelity.add(value, teacher)
        self._cosines.append(1.0 - badness)
        self.vectors.append(pooled(value))
        return badness

    def figures(self, weights_RN: np.ndarray, hits: dict[str, np.ndarray]) -> Draws:
        """Cosine, and the means of each query's hits (N or fewer,)."""
        found = means({"cosine": np.array(self._cosines)}, weights_RN)
        for name, hit_N in hits.items():
            found |= means({name: hit_N}, np.maximum(weights_RN[:, : len(hit_N)], 1e-12))
        return found


def own_picture(vectors: Sequence[np.ndarray], teachers: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Whether pooled features find their own picture among the teacher's, by figure; (N,) each."""
    similar_NN = _similar(np.stack(vectors[:GALLERY]), np.stack(teachers[:GALLERY]))
    return {f"own_picture_r{k}": hit_N for k, hit_N in recalls(similar_NN).items()}


def own_caption(vectors: Sequence[np.ndarray], texts_NE: np.ndarray) -> dict[str, np.ndarray]:
    """Whether pooled features and the texts of captions, unit rows (N, E), find each other."""
    similar_NN = _similar(np.stack(vectors[: len(texts_NE)]), texts_NE)
    both = (("image_to_text", similar_NN), ("text_to_image", similar_NN.T))
    return {f"{name}_r{k}": hit for name, table in both for k, hit in recalls(table).items()}


def _similar(first_NE: np.ndarray, second_NE: np.ndarray) -> np.ndarray:
    """Cosines, float64, rounded, so that those of equal vectors are equal whatever order they were summed in."""
    similar: np.ndarray = np.round(first_NE.astype(np.float64) @ second_NE.T.astype(np.float64), 9)
    return similar


def text_vectors(encode: TextEncoder, captions: Sequence[str]) -> np.ndarray:
    """float32 (N, E), unit rows."""
    texts_NE = np.asarray(encode(list(captions)), np.float32)
    unit: np.ndarray = texts_NE / np.maximum(np.linalg.norm(texts_NE, axis=1, keepdims=True), 1e-9)
    return unit
