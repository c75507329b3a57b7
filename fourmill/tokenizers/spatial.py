"""Spatial tokenizer: a picture, map or feature map becomes a grid of discrete tokens, and back.

A checkpoint folder holds `config.json` (`CheckpointConfig`, or that of a tokenizer published by ml-4m's authors) and
`model.safetensors`. Vocabulary and grid come from the first alone, so planning needs no torch. On a CPU a sample's
tokens are the same whatever batch it comes in: samples are computed together only where that was seen to change no bit.
On a GPU, kernels for other batch sizes round differently, and a latent between two codes may fall either way.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fourmill.modalities import modality
from fourmill.pipeline.codecs import token_dtype
from fourmill.pipeline.component import ComponentConfig
from fourmill.tokenizers.base import Tokenizer, TokenizerConfig
from fourmill.tokenizers.config import CheckpointConfig
from fourmill.tokenizers.files import read_file
from fourmill.tokenizers.published import read_settings

if TYPE_CHECKING:
    from torch import Tensor

    from fourmill.checkpoints import Checkpoint
    from fourmill.tokenizers.networks.vq import VQNetwork
    from fourmill.tokenizers.sources.base import Source

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Samples that a CPU computes at once. ViT-B: 5 % faster than one by one, 16 no faster; small networks gain up to 30 %.
CPU_SAMPLES = 4


@dataclass(frozen=True)
class SpatialCodec:
    """A loaded network with its source's own ways, on one device: values to tokens and back."""

    settings: CheckpointConfig
    network: VQNetwork
    source: Source
    device: str
    precision: str = "float32"

    def encode(self, values: Any) -> list[np.ndarray]:
        """B values, rgb as uint8 (B, 3, S, S) -> B arrays (L,), uint16 or uint32. ValueError for other shapes."""
        import torch

        dtype = token_dtype(self.settings.network.vocabulary)
        tokens: list[np.ndarray] = []
        with torch.inference_mode():
            start = 0
            while start < len(values):
                stop = start + self._together(len(values) - start)
                tokens += [row.astype(dtype) for row in self._ids(values[start:stop])]
                start = stop
        return tokens

    def _ids(self, values: Any) -> np.ndarray:
        """ids (B, L) of samples that are computed together."""
        import torch

        if self.device != "cpu":
            latents_BZhw = self._latents(self.source.prepare(values).to(self.device))
            return self.network.quantize(latents_BZhw)[1].flatten(1).cpu().numpy()
        prepared = [self.source.prepare(values[i : i + 1]) for i in range(len(values))]
        latents_BZhw = self._latents(torch.cat(prepared))
        # One by one: 196 latents have 13 MB of similarities to 16,384 codes; those of four samples fit no cache.
        ids = [self.network.quantize(latents_BZhw[i : i + 1])[1].flatten(1) for i in range(len(prepared))]
        return torch.cat(ids).numpy()

    def _latents(self, inputs: Tensor) -> Tensor:
        """Prepared values -> latents float32 (B, Z, h, w), in the precision asked for."""
        import torch

        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.network.latents(inputs).float()

    def _together(self, left: int) -> int:
        """How many of the samples left are computed at once."""
        if self.device != "cpu":
            return left
        return CPU_SAMPLES if left >= CPU_SAMPLES and self._batches_are_exact else 1

    @functools.cached_property
    def _batches_are_exact(self) -> bool:
        """Whether this CPU gives a sample in a batch of `CPU_SAMPLES` the same bits as alone.

        What kernels do depends on shapes, not on values, so one sample of noise at every place of a batch shows it.
        """
        import torch

        side, classes = self.source.size, self.settings.classes
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, self.settings.channels, side, side, generator=generator)
        if classes:
            noise = torch.randint(0, classes + 1, (1, side, side), generator=generator)
        alone = self._latents(noise)[0]
        return all(torch.equal(alone, one) for one in self._latents(torch.cat([noise] * CPU_SAMPLES)))

    def decode(self, tokens: Sequence[np.ndarray], steps: int | None = None) -> list[Any]:
        """B arrays (L,) of ids -> B values; rgb as uint8 (S, S, 3). ValueError for ids or lengths that cannot be.

        `steps`: of a diffusion decoder; by default what its checkpoint says.
        """
        import torch

        values: list[Any] = []
        with torch.inference_mode():
            for part in self._parts(self._checked(tokens)):
                values += self.source.restore(self.network.values(torch.from_numpy(part).to(self.device), steps=steps))
        return values

    def _parts(self, values: Any) -> Iterator[Any]:
        """For decoding: one sample at a time on a CPU, the whole batch elsewhere."""
        step = 1 if self.device == "cpu" else max(1, len(values))
        for start in range(0, len(values), step):
            yield values[start : start + step]

    def _checked(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        rows, columns = self.settings.network.grid_of(self.source.size)
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


def open_codec(
    checkpoint: Checkpoint,
    settings: CheckpointConfig,
    device: str,
    size: int | None = None,
    decoder: bool = True,
    precision: str = "float32",
) -> SpatialCodec:
    """The checkpoint's weights on `device`; without `decoder` it only encodes, and holds no decoder. `precision`: of
    encoding, 'float32' or 'bfloat16'."""
    from fourmill.tokenizers.networks.weights import unpack
    from fourmill.tokenizers.sources import source_of

    data = read_file(checkpoint, WEIGHTS)
    network = unpack(settings, data, f"{WEIGHTS} of checkpoint {checkpoint.reference!r}", decoder).to(device)
    return SpatialCodec(settings, network, source_of(settings, size), device, precision)


class SpatialTokenizerConfig(TokenizerConfig):
    """Configuration of a tokenizer with a network."""

    size: int | None = Field(default=None, ge=1)
    """Side of the values, in pixels (cells for feature maps); by default that of the checkpoint. Any multiple of its
    patch: one checkpoint of 4M's serves 224 and 448."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the encoder's matrix products; weights, latents and codes stay float32. 'bfloat16' took 0.6 of the time of
    ViT-B on a CPU that has it, and changed 1.7 % of the tokens."""


class SpatialTokenizer(Tokenizer):
    """Tokens of rgb, depth, normals, semseg, edges and feature maps by a ViT VQ autoencoder."""

    Config: ClassVar[type[ComponentConfig]] = SpatialTokenizerConfig
    version = 2
    architecture = "vit"
    config: SpatialTokenizerConfig  # type: ignore[assignment]
    codec: SpatialCodec
    device: str

    @functools.cached_property
    def settings(self) -> CheckpointConfig:
        """The checkpoint's own configuration; ValueError if it is broken or for another modality."""
        settings = read_settings(self.checkpoint, modality(self.source).name)
        if settings.network.architecture != self.architecture:
            kind = "vector" if settings.network.architecture == "mlp" else "spatial"
            raise ValueError(f"checkpoint {self.config.checkpoint!r} is of kind {kind!r}; set `kind: {kind}`")
        return settings

    @property
    def vocabulary(self) -> int:
        return self.settings.network.vocabulary

    @property
    def grid(self) -> tuple[int, int]:
        return self.settings.network.grid_of(self.config.size or self.settings.network.size)

    def load(self, device: str) -> None:
        """Load the encoder; from then on `codec` is there. The decoder comes with the first `decode`."""
        self.device = device
        self.codec = self._open(decoder=False)

    def encode(self, values: Any) -> list[np.ndarray]:
        return self.codec.encode(values)

    def decode(self, tokens: Sequence[np.ndarray]) -> list[Any]:
        if not self.codec.network.decodes:
            self.codec = self._open(decoder=True)
        return self.codec.decode(tokens)

    def _open(self, decoder: bool) -> SpatialCodec:
        options = self.config
        return open_codec(self.checkpoint, self.settings, self.device, options.size, decoder, options.precision)
