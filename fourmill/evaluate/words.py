"""Captions against truth, and whether CLIP embeddings find the caption of their own picture.

Scenes have a closed vocabulary in which every visible object is named with its colour: precision, recall and F1 of
those phrases say whether a caption is true. Free captions, several a picture, get BLEU-4 and ROUGE-L from torchmetrics.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fourmill.evaluate.measure import Figures, IncomparableError, Measure, share
from fourmill.evaluate.truth import Truth, TruthSource
from fourmill.pipeline.shards import Spec
from fourmill.scenes import RGB, SHAPES
from fourmill.scenes.captions import NUMBERS

_GALLERY = 1000  # pictures among which a caption is looked for, as in COCO's 1K test
_COUNTS = {"an": 1, "one": 1} | {word: number for number, word in enumerate(NUMBERS)}


def phrases(text: str) -> Counter[tuple[str, str]]:
    """How often each (colour, shape) is named: 'two small striped red boxes and a cone' is two red boxes.

    Between colour and shape may stand a texture; a shape without a colour counts as ('', shape).
    """
    words = re.findall(r"[a-z]+", text.lower())
    found: Counter[tuple[str, str]] = Counter()
    for place, word in enumerate(words):
        shape = _singular(word)
        if shape is None:
            continue
        before = words[max(0, place - 5) : place]
        colour = next((w for w in before[:-3:-1] if w in RGB), "")
        count = next((_COUNTS[w] for w in reversed(before) if w in _COUNTS), 1) if word != shape else 1
        found[colour, shape] += count
    return found


def _singular(word: str) -> str | None:
    return next((s for s in (word, word.removesuffix("s"), word.removesuffix("es")) if s in SHAPES), None)


class CaptionMeasure(Measure):
    """`caption` texts: object phrases for scenes, BLEU-4 and ROUGE-L for the rest."""

    parts = frozenset({"captions"})

    def __init__(self, spec: Spec, source: TruthSource, size: int) -> None:
        super().__init__(spec, source, size)
        self._named = self._right = self._there = self._texts = 0
        self.protocol = (
            "object phrases (colour and shape), pooled" if source.closed_captions else "against all captions"
        )
        if not source.closed_captions:
            from torchmetrics.text import BLEUScore, ROUGEScore

            self._bleu, self._rouge = BLEUScore(n_gram=4), ROUGEScore(rouge_keys="rougeL", accumulate="best")

    def add(self, label: str, truth: Truth) -> float | None:
        if not truth.captions:
            return None
        self._texts += 1
        return self._add_phrases(label, truth) if self.source.closed_captions else self._add_free(label, truth)

    def _add_phrases(self, label: str, truth: Truth) -> float:
        mine, theirs = phrases(label), phrases(truth.captions[0])
        right = (mine & theirs).total()
        self._right += right
        self._named += mine.total()
        self._there += theirs.total()
        return 1.0 - 2 * right / max(mine.total() + theirs.total(), 1)

    def _add_free(self, label: str, truth: Truth) -> float:
        references = [list(truth.captions)]
        self._bleu.update([label], references)
        before = len(self._rouge.rougeL_fmeasure)
        self._rouge.update([label], references)
        return 1.0 - float(self._rouge.rougeL_fmeasure[before])

    def figures(self) -> Figures:
        if self.source.closed_captions:
            precision, recall = share(self._right, self._named), share(self._right, self._there)
            return {
                "phrase_f1": share(2 * self._right, self._named + self._there),
                "phrase_precision": precision,
                "phrase_recall": recall,
            }
        if not self._texts:
            return {"bleu4": float("nan"), "rouge_l": float("nan")}
        return {"bleu4": float(self._bleu.compute()), "rouge_l": float(self._rouge.compute()["rougeL_fmeasure"])}


class CaptionsMeasure(Measure):
    """`captions`, several a sample: each source and style measured by itself; the corpus's own texts are left out."""

    parts = frozenset({"captions"})

    def __init__(self, spec: Spec, source: TruthSource, size: int) -> None:
        super().__init__(spec, source, size)
        self._measures: dict[str, CaptionMeasure] = {}
        self.protocol = (
            CaptionMeasure(spec, source, size).protocol + "; the first figures are those of the first source"
        )

    def add(self, label: Sequence[Mapping[str, Any]], truth: Truth) -> float | None:
        worst = None
        for caption in label:
            if caption["source"] == "alt_text":
                continue
            name = f"{caption['source']}, {caption['style']}"
            if name not in self._measures:
                self._measures[name] = CaptionMeasure(self.spec, self.source, self.size)
            wrong = self._measures[name].add(str(caption["text"]), truth)
            worst = wrong if worst is None or (wrong is not None and wrong > worst) else worst
        return worst

    def figures(self) -> Figures:
        return next((m.figures() for m in self._measures.values()), {})

    def per_class(self) -> dict[str, Figures]:
        return {name: measure.figures() for name, measure in self._measures.items()}


TextEncoder = Callable[[Sequence[str]], np.ndarray]


class RetrievalMeasure(Measure):
    """`clip_global`: how often a picture's own caption is the nearest of a gallery's, or among the nearest five."""

    parts = frozenset({"captions"})

    def __init__(self, spec: Spec, source: TruthSource, size: int, encode: TextEncoder) -> None:
        super().__init__(spec, source, size)
        self._encode, self._pictures, self._captions = encode, list[np.ndarray](), dict[str, None]()
        self.protocol = f"recall in both directions among the first {_GALLERY} pictures with captions of their own"

    def add(self, label: np.ndarray, truth: Truth) -> float | None:
        if not truth.captions:
            return None
        if len(self._pictures) < _GALLERY and truth.captions[0] not in self._captions:
            self._captions[truth.captions[0]] = None
            self._pictures.append(label)
        return 0.0

    def figures(self) -> Figures:
        if not self._pictures:
            return {}
        texts = _unit(self._encode(list(self._captions)))
        pictures = _unit(np.stack(self._pictures))
        if texts.shape != pictures.shape:
            raise IncomparableError(
                f"embeddings of {pictures.shape} and texts of {texts.shape} are of different networks"
            )
        similar = pictures @ texts.T
        figures: Figures = {}
        for name, table in (("image_to_text", similar), ("text_to_image", similar.T)):
            rank = (table > np.diagonal(table)[:, None]).sum(axis=1)
            figures |= {f"{name}_r{depth}": float((rank < depth).mean()) for depth in (1, 5)}
        return {**figures, "gallery": float(len(pictures))}


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def text_encoder(producer: Mapping[str, Any]) -> TextEncoder:
    """The text tower of the open_clip checkpoint that made the embeddings. `IncomparableError` where there is none."""
    from fourmill.checkpoints import resolve

    stated = producer.get("checkpoint")
    if not isinstance(stated, Mapping):
        raise IncomparableError("no text encoder: the embeddings' producer names no checkpoint")
    try:
        checkpoint = resolve(str(stated["reference"]))
    except (ValueError, OSError) as error:
        raise IncomparableError(f"no text encoder at hand: {error}") from error
    if checkpoint.digest != stated["digest"]:
        raise IncomparableError(f"no text encoder at hand: {stated['reference']} has other weights now")
    return _open_clip_texts(checkpoint.location)


def _open_clip_texts(location: str) -> TextEncoder:
    from pathlib import Path

    import open_clip
    import torch

    if not (Path(location) / "open_clip_config.json").is_file():
        raise IncomparableError(f"no text encoder at hand: {location} is not a local folder of open_clip")
    model = open_clip.create_model(f"local-dir:{location}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{location}")

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> np.ndarray:
        parts = [model.encode_text(tokenizer(list(texts[i : i + 64]))) for i in range(0, len(texts), 64)]
        return np.asarray(torch.cat(parts).float())

    return encode
