"""Spatial tokenizer: a picture, map or feature map becomes a grid of discrete tokens, and back.

A checkpoint folder holds `config.json` (`SpatialCheckpointConfig`) and `model.safetensors`. Vocabulary and grid come
from the first alone, so planning needs no torch. On a CPU every sample is computed by itself: its tokens are the same
whatever batch it comes in. On a GPU, kernels for other batch sizes round differently, and a latent between two codes
may fall either way.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from fourmill.pipeline.codecs import token_dtype
from fourmill.tokenizers.base import Tokenizer
from fourmill.tokenizers.config import SpatialCheckpointConfig
from fourmill.tokenizers.files import read_file

if TYPE_CHECKING:
    from fourmill.tokenizers.networks import SpatialNetwork
    from fourmill.tokenizers.sources import Source

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class SpatialCodec:
    """A loaded network with its source's own ways, on one device: values to tokens and back."""

    settings: SpatialCheckpointConfig
    network: SpatialNetwork
    source: Source
    device: str

    def encode(self, values: Any) -> list[np.ndarray]:
        """B values, rgb as uint8 (B, 3, S, S) -> B arrays (L,), uint16 or uint32. ValueError for other shapes."""
        import torch

        dtype = token_dtype(self.settings.network.vocabulary)
        tokens: list[np.ndarray] = []
        with torch.inference_mode():
            for part in self._parts(values):
                ids_BL = self.network.tokens(self.source.prepare(part).to(self.device))
                tokens += list(ids_BL.cpu().numpy().astype(dtype))
        return tokens

    def decode(self, tokens: Sequence[np.ndarray]) -> list[Any]:
        """B arrays (L,) of ids -> B values; rgb as uint8 (S, S, 3). ValueError for ids or lengths that cannot be."""
        import torch

        values: list[Any] = []
        with torch.inference_mode():
            for part in self._parts(self._checked(tokens)):
                values += self.source.restore(self.network.values(torch.from_numpy(part).to(self.device)))
        return values

    def _parts(self, values: Any) -> Iterator[Any]:
        """One sample at a time on a CPU (1.5 times the time of a batch for the demo's networks, less for larger ones);
        the whole batch elsewhere."""
        step = 1 if self.device == "cpu" else max(1, len(values))
        for start in range(0, len(values), step):
            yield values[start : start + step]

    def _checked(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        rows, columns = self.settings.network.grid
        length, vocabulary = rows * columns, self.settings.network.vocabulary
        for row in tokens:
            if np.shape(row) != (length,):
                raise ValueError(f"{self.settings.source}: tokens of shape {np.shape(row)}; ({length},) is needed")
        ids_BL = np.array([np.asarray(row).astype(np.int64) for row in tokens], dtype=np.int64).reshape(-1, length)
        if ids_BL.size and not 0 <= ids_BL.min() <= ids_BL.max() < vocabulary:
            raise ValueError(
                f"{self.settings.source}: ids {ids_BL.min()}..{ids_BL.max()}; 0..{vocabulary - 1} are known"
            )
        return ids_BL


class SpatialTokenizer(Tokenizer):
    """Tokens of rgb, depth, normal, semseg and feature maps by a ViT VQ autoencoder."""

    version = 1
    codec: SpatialCodec

    @functools.cached_property
    def settings(self) -> SpatialCheckpointConfig:
        """The checkpoint's own configuration; ValueError if it is broken or for another modality."""
        data = read_file(self.checkpoint, CONFIG)
        try:
            settings = SpatialCheckpointConfig.model_validate_json(data)
        except ValidationError as error:
            raise ValueError(f"bad {CONFIG} in checkpoint {self.config.checkpoint!r}: {error}") from error
        if settings.source != self.source:
            raise ValueError(f"checkpoint {self.config.checkpoint!r} tokenizes {settings.source}, not {self.source}")
        return settings

    @property
    def vocabulary(self) -> int:
        return self.settings.network.vocabulary

    @property
    def grid(self) -> tuple[int, int]:
        return self.settings.network.grid

    def load(self, device: str) -> None:
        """Load the weights; from then on `codec` is there."""
        from fourmill.tokenizers.networks import unpack
        from fourmill.tokenizers.sources import source_of

        data = read_file(self.checkpoint, WEIGHTS)
        network = unpack(self.settings, data, f"{WEIGHTS} of checkpoint {self.config.checkpoint!r}").to(device)
        self.codec = SpatialCodec(self.settings, network, source_of(self.settings), device)

    def encode(self, values: Any) -> list[np.ndarray]:
        return self.codec.encode(values)

    def decode(self, tokens: Sequence[np.ndarray]) -> list[Any]:
        return self.codec.decode(tokens)
