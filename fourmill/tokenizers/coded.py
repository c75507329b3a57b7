"""Text tokenizers that have a network of their own for a part of each value: its ids are written as number words.

The fingerprint has both checkpoints: the vocabulary's entry in the lineage carries the digest of the two and, by the
name of the setting, the network's own entry.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from fourmill.checkpoints import Checkpoint, resolve
from fourmill.pipeline.shards import digest
from fourmill.tokenizers.config import CheckpointConfig
from fourmill.tokenizers.published import read_settings
from fourmill.tokenizers.sequences.bins import most_ids
from fourmill.tokenizers.spatial import SpatialCodec, open_codec
from fourmill.tokenizers.text import SequenceTokenizer


class CodedTokenizer(SequenceTokenizer):
    """Subclasses say which setting names the network, which part of a value it codes, and how many ids a code has."""

    gpus = 1.0
    setting: ClassVar[str]
    part: ClassVar[str]
    code_length: ClassVar[int]
    codec: SpatialCodec
    device: str

    @functools.cached_property
    def part_checkpoint(self) -> Checkpoint:
        return resolve(getattr(self.config, self.setting))

    @functools.cached_property
    def settings(self) -> CheckpointConfig:
        """The network's own configuration; ValueError if the rows cannot have its codes."""
        settings = read_settings(self.part_checkpoint, self.part)
        rows, columns = settings.network.grid
        if rows * columns != self.code_length:
            raise ValueError(
                f"{self.name}: the network of {self.setting} makes {rows * columns} ids of a value; "
                f"the text has {self.code_length}"
            )
        most = most_ids(self.bins)
        if settings.network.vocabulary > most:
            raise ValueError(
                f"{self.name}: the network of {self.setting} has {settings.network.vocabulary} codes; the number words "
                f"of the vocabulary, {self.bins} of each kind, can say {most} (512 of each kind are as many as 4M uses)"
            )
        return settings

    def lineage(self) -> dict[str, Any]:
        lineage = super().lineage()
        lineage["config"].pop(self.setting)
        words, part = lineage["checkpoint"], self.part_checkpoint.lineage()
        licences = dict.fromkeys((words["licence"], part["licence"]))
        both = {"digest": digest(words["digest"], part["digest"]), "licence": " and ".join(licences)}
        return {**lineage, "checkpoint": {**words, **both, self.setting: part}}

    def load(self, device: str) -> None:
        """Load vocabulary and encoder; the decoder comes with the first code that is decoded."""
        super().load(device)
        self.device = device
        self.codec = open_codec(self.part_checkpoint, self.settings, device, decoder=False)

    def code(self, parts: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
        """Parts of values -> the ids of each."""
        return [tuple(row.tolist()) for row in self.codec.encode(parts)] if parts else []

    def decoded(self, codes: Iterable[Sequence[int]]) -> list[np.ndarray]:
        """Ids -> the part that each row of them stands for."""
        rows = [np.array(ids) for ids in codes]
        if rows and not self.codec.network.decodes:
            self.codec = open_codec(self.part_checkpoint, self.settings, self.device)
        return self.codec.decode(rows) if rows else []
