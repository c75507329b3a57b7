"""What was generated, as files: pictures as people expect them, the values themselves, and the tokens.

    depth.png depth.npy depth.tokens.npy     a picture to look at, the metric map, the ids (texts: .json)
    caption.txt caption.tokens.json
    overview.png                             all samples, what was given and what was made of it
    generate.json                            checkpoint, plan, seed, what of the tokens was malformed

Files of one sample lie in the folder itself, those of several each in a folder of its own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourmill.evaluate.tokens.decode import Folder
from fourmill.evaluate.tokens.sources import Backdrop, painted, reference_of, written
from fourmill.model.generate.command.inputs import Sample
from fourmill.model.generate.names import label_name, source_name
from fourmill.model.generate.tokenizers import Tokenizers
from fourmill.pipeline.pictures import FeaturePainter, contact_sheet, text_picture

_GREY, _CELL = 128, 224
Ids = np.ndarray | list[int]  # of a grid; of a text


@dataclass(frozen=True)
class Value:
    """One sample's value of one modality; `problems`: what of its tokens was malformed. None could not be decoded."""

    value: Any
    problems: tuple[str, ...] = ()


def decode_rows(tokenizers: Tokenizers, name: str, rows: Sequence[Ids]) -> list[Value]:
    """The values that rows of tokens stand for."""
    found = tokenizers.get(name).restore_each([np.asarray(row, dtype=np.int64) for row in rows])
    return [
        Value(None, (f"cannot be decoded: {one}",)) if isinstance(one, Exception) else Value(one[0], tuple(one[1]))
        for one in found
    ]


class Gallery:
    """The samples with what was generated for each, `tokens[name][sample]` and `values[name][sample]`."""

    def __init__(
        self, samples: Sequence[Sample], tokens: Mapping[str, list[Ids]], values: Mapping[str, list[Value]]
    ) -> None:
        self.samples, self.tokens, self.values = samples, tokens, values
        labels = [label_name(name) for name in tokens]
        self.stems = {n: label_name(n) if labels.count(label_name(n)) == 1 else n.replace("@", "_") for n in tokens}
        self._references: dict[str, Any] = {}
        self.images = [self._image(number) for number in range(len(samples))]

    def _image(self, number: int) -> np.ndarray:
        """What boxes and masks are drawn on: the photo, else the picture that was generated, else grey."""
        shown = {source_name(name): value for name, value in self.samples[number].shown.items()}
        made = {source_name(name): found[number].value for name, found in self.values.items()}
        picture = shown.get("rgb", made.get("rgb"))
        return np.full((_CELL, _CELL, 3), _GREY, np.uint8) if picture is None else picture

    def picture(self, name: str, number: int) -> np.ndarray | None:
        """A generated value as a picture; of features in colours shared by all samples."""
        return self._painted(source_name(name), self.values[name][number].value, number, self._reference(name, number))

    def _reference(self, name: str, number: int) -> Any:
        """What fixes the colours: of features all samples together, of anything else the value itself."""
        if name not in self._references:
            values = [found.value for found in self.values[name] if found.value is not None]
            self._references[name] = reference_of(source_name(name), values)
        shared = self._references[name]
        return shared if isinstance(shared, FeaturePainter) else self.values[name][number].value

    def _painted(self, source: str, value: Any, number: int, reference: Any) -> np.ndarray | None:
        if value is None:
            return None
        return painted(source, value, Backdrop(self.images[number], reference))

    def problems(self, number: int) -> dict[str, list[str]]:
        """What of a sample's tokens was malformed, by modality."""
        return {name: list(found[number].problems) for name, found in self.values.items() if found[number].problems}

    def write(self, folder: Folder, name: str, number: int) -> list[str]:
        """The files of one value of one sample; their names."""
        place = f"{self.samples[number].key}/" if len(self.samples) > 1 else ""
        stem, folder.files = f"{place}{self.stems[name]}", []
        ids = self.tokens[name][number]
        if name in self.values and self.values[name][number].value is not None:
            if (picture := self.picture(name, number)) is not None:
                folder.picture(stem, picture)
            suffix, data = written(self.values[name][number].value)
            folder.put(f"{stem}.{suffix}", data)
        suffix, data = _ids_file(ids)
        folder.put(f"{stem}.tokens.{suffix}", data)
        return list(folder.files)

    def overview(self) -> bytes:
        """A PNG: a row for each sample, what was given and what was generated in columns."""
        given = list(self.samples[0].shown)
        headings = [f"{label_name(n)} (given)" for n in given] + [self.stems[n] for n in self.values]
        rows = []
        for number, sample in enumerate(self.samples):
            row = [self._tile(source_name(n), sample.shown[n], number, None) for n in given]
            row += [
                self._tile(source_name(n), self.values[n][number].value, number, self._reference(n, number))
                for n in self.values
            ]
            rows.append(row)
        file = io.BytesIO()
        contact_sheet(rows, headings, _CELL).save(file, "PNG")
        return file.getvalue()

    def _tile(self, source: str, value: Any, number: int, reference: Any) -> np.ndarray:
        picture = self._painted(source, value, number, reference)
        if picture is not None:
            return picture
        if isinstance(value, str):
            return text_picture(value or "(an empty text)", _CELL)
        words = "tokens" if value is None else f"{source} {np.shape(value)}"
        return text_picture(words, _CELL)


def _ids_file(ids: Ids) -> tuple[str, bytes]:
    """A grid's ids as .npy, a text's as JSON."""
    return written(ids) if isinstance(ids, np.ndarray) else ("json", (json.dumps(ids) + "\n").encode())
