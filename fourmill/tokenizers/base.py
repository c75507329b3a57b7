"""The tokenizer: turns a label modality into discrete tokens and back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from fourmill.modalities import Kind, modality
from fourmill.pipeline.component import Batch, ComponentConfig, Pretrained, PretrainedConfig
from fourmill.pipeline.shards import Spec


class TokenizerConfig(PretrainedConfig):
    """What every tokenizer's configuration has. Its name in the configuration is the modality it makes."""


class Tokenizer(Pretrained):
    """A component that makes one token modality from its source modality.

    Subclasses implement `load`, `vocabulary`, `encode`, `decode`, and for grids `grid`.
    """

    Config: ClassVar[type[ComponentConfig]] = TokenizerConfig
    config: TokenizerConfig

    def __init__(self, name: str, config: ComponentConfig) -> None:
        super().__init__(name, config)
        entry = modality(name)
        if not entry.is_tokens or entry.source is None:
            known = "tok_rgb, tok_depth, tok_caption, …"
            raise ValueError(f"a tokenizer is named for the token modality it makes, not {name!r}; such as {known}")
        self.entry, self.source = entry, entry.source

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def makes(self) -> tuple[str, ...]:
        return (self.name,)

    def spec(self, modality: str) -> Spec:
        if self.entry.kind is Kind.GRID:
            rows, columns = self.grid
            return Spec(vocabulary=self.vocabulary, length=rows * columns, grid=(rows, columns))
        return Spec(vocabulary=self.vocabulary)

    def run(self, batch: Batch) -> dict[str, list[Any]]:
        values = batch.pixels if self.source == "rgb" else batch.views[self.source]
        assert values is not None
        return {self.name: list(self.encode(values))}

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of distinct ids; known from the checkpoint's configuration without loading weights."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of a grid modality's tokens; known without loading weights."""
        raise TypeError(f"{self.name} is a sequence and has no grid")

    @abstractmethod
    def encode(self, values: Any) -> Sequence[np.ndarray]:
        """B values of the source modality (for `rgb`: uint8 (B, 3, S, S)) -> B integer arrays of token ids."""

    @abstractmethod
    def decode(self, tokens: Sequence[np.ndarray]) -> list[Any]:
        """B arrays of ids -> B values of the source modality (for `rgb`: uint8 (S, S, 3))."""
