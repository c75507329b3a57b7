"""Reconstructed texts, palettes and metadata against their labels."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fourmill.evaluate.measure import Figures, share
from fourmill.evaluate.tokens.measure import Fidelity, Setting

_NEAR = 8.0  # grey levels: colours that close are told apart only side by side


class TextFidelity(Fidelity):
    """str. Case, accents and spaces are no difference: the vocabulary has none."""

    protocol = "words and signs in lower case without accents; word errors: edits of all words of the labels"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._texts = self._exact = self._words = self._edits = 0

    def add(self, restored: str, label: str) -> float:
        here, there = words(restored), words(label)
        edits = edit_distance(here, there)
        self._texts += 1
        self._exact += edits == 0
        self._words += len(there)
        self._edits += edits
        return share(edits, len(there)) if there else float(edits)

    def figures(self) -> Figures:
        return {"exact": share(self._exact, self._texts), "word_errors": share(self._edits, self._words)}


def words(text: str) -> list[str]:
    """Words and signs in lower case, accents dropped."""
    plain = unicodedata.normalize("NFD", text.lower())
    return re.findall(r"\w+|[^\w\s]", "".join(c for c in plain if unicodedata.category(c) != "Mn"))


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Insertions, deletions and replacements that lead from one to the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            previous, row[j] = row[j], min(previous + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


class PaletteFidelity(Fidelity):
    """{"n": [[r, g, b], …]}: the palettes that came back, each with the label's of as many colours, in order."""

    protocol = f"distance of colours in red, green, blue of 0..255; near: within {_NEAR:g}"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._colours = self._near = 0
        self._distance = 0.0

    def add(self, restored: Mapping[str, Any], label: Mapping[str, Any]) -> float:
        if not restored:
            raise ValueError("no palette came back")
        if lost := sorted(set(restored) - set(label)):
            raise ValueError(f"a palette of {lost[0]} colours came back; the label has {', '.join(sorted(label))}")
        distances = []
        for number, colours in restored.items():
            here, there = (np.asarray(found, np.float64).reshape(-1, 3) for found in (colours, label[number]))
            if len(here) != len(there):
                raise ValueError(f"{len(here)} colours came back of {len(there)}")
            distances += np.linalg.norm(here - there, axis=1).tolist()
        self._colours += len(distances)
        self._near += sum(d <= _NEAR for d in distances)
        self._distance += sum(distances)
        return float(np.mean(distances))

    def figures(self) -> Figures:
        return {
            "colour_distance": share(self._distance, self._colours),
            "near": share(self._near, self._colours),
        }


class MetadataFidelity(Fidelity):
    """{name: number}. Within its bin is a number that is tokenized just as the label's is."""

    protocol = "entries of all values; in bin: the number that came back has the label's tokens"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._names: dict[str, list[float]] = {}  # entries, lost, exact, in bin, sum of absolute errors

    def add(self, restored: Mapping[str, float], label: Mapping[str, float]) -> float:
        wrong = 0
        for name, there in label.items():
            counts = self._names.setdefault(name, [0.0] * 5)
            counts[0] += 1
            if name not in restored:
                counts[1] += 1
                wrong += 1
                continue
            here = float(restored[name])
            right = self._same_tokens(name, here, float(there))
            counts[2] += here == float(there)
            counts[3] += right
            counts[4] += abs(here - float(there))
            wrong += not right
        return share(wrong, len(label)) if label else 0.0

    def _same_tokens(self, name: str, here: float, there: float) -> bool:
        first, second = self.setting.tokenizer.encode([{name: here}, {name: there}])
        return np.array_equal(first, second)

    def figures(self) -> Figures:
        entries, lost, exact, inside = (sum(c[i] for c in self._names.values()) for i in range(4))
        return {"in_bin": share(inside, entries), "exact": share(exact, entries), "lost": share(lost, entries)}

    def per_class(self) -> dict[str, Figures]:
        return {
            name: {"in_bin": share(inside, entries), "mean_error": share(error, entries - lost), "entries": entries}
            for name, (entries, lost, _, inside, error) in sorted(self._names.items())
        }
