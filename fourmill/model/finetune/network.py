"""The 4M encoder as a vision network on RGB pixels, with a head for a task.

The encoder is the pretrained one, unchanged: patches are projected, positions and the modality's vector are added, and
the blocks and the last norm follow. The decoder is not used. Heads: mean pooling and a linear layer; for dense tasks
one in the manner of MultiMAE's for segmentation (Bachmann et al. 2022, arXiv 2204.01678): each patch becomes
4 x 4 cells, ConvNeXt blocks mix them, and what they say is interpolated to the pixels.

Legend: B samples, S side in pixels, N patches, D width, C channels of the head, P numbers in a patch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from fourmill.model.config import Architecture
from fourmill.model.network import Embedding, FourM

CELLS = 4  # a side, that the dense head makes of a patch


def pixels_of(architecture: Architecture) -> str:
    """The modality that is read as RGB pixels. ValueError if there is none."""
    for name in architecture.domains_in:
        if architecture.modalities[name].kind == "pixels":
            return name
    raise ValueError(f"the model reads no pixels, only {', '.join(architecture.domains_in)}: it cannot see pictures")


def interpolated(table_1ND: torch.Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> torch.Tensor:
    """A position table of another grid, (1, N, D), bicubic; the same table if the grid is the same."""
    if grid == wanted:
        return table_1ND
    maps = table_1ND.unflatten(1, grid).permute(0, 3, 1, 2)
    return functional.interpolate(maps, wanted, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


class RgbEncoder(nn.Module):
    """(B, 3, S, S) pixels, bytes or normalised floats -> (B, N, D) normalised features of the patches, row by row."""

    positions: torch.Tensor

    def __init__(self, model: FourM, image_size: int, drop_path: float = 0.0) -> None:
        super().__init__()
        name = pixels_of(model.architecture)
        embedding, grid = model.encoder_embeddings[name], model.architecture.modalities[name].grid
        assert isinstance(embedding, Embedding)
        assert grid is not None
        if image_size % embedding.patch_size:
            raise ValueError(f"image_size {image_size} must be a multiple of the patch's side {embedding.patch_size}")
        self.embedding, self.blocks, self.norm = embedding, model.encoder, model.encoder_norm
        self.register_tokens = getattr(model, "register_tokens", None)
        self.side = image_size // embedding.patch_size
        table = interpolated(embedding.pos_emb.detach(), grid, (self.side, self.side))
        self.register_buffer("positions", table.clone(), persistent=False)
        self.drops = torch.linspace(0, drop_path, len(self.blocks)).tolist()

    def forward(self, pixels_B3SS: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """`generator`: of the dropped paths, in training."""
        x_BND = self.embedding.proj(self._patches(pixels_B3SS)) + self.positions + self.embedding.mod_emb
        registers = 0 if self.register_tokens is None else self.register_tokens.shape[1]
        if self.register_tokens is not None:
            x_BND = torch.cat([self.register_tokens.expand(len(x_BND), -1, -1), x_BND], 1)
        for block, drop in zip(self.blocks, self.drops, strict=True):
            x_BND = self._dropped(block, x_BND, drop, generator) if drop and self.training else block(x_BND, None)
        out_BND: torch.Tensor = self.norm(x_BND[:, registers:])
        return out_BND

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, N, P), in the order row, column, channel; bytes are normalised, floats are so."""
        size = self.side * self.embedding.patch_size
        if pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pictures of {tuple(pixels.shape[1:])} where (3, {size}, {size}) is due")
        cut = pixels.unflatten(3, (self.side, -1)).unflatten(2, (self.side, -1))
        patches = cut.permute(0, 2, 4, 3, 5, 1)
        if not patches.is_floating_point():
            patches = (patches.float() / 255 - self.embedding.pixel_mean) / self.embedding.pixel_std
        return patches.flatten(3).flatten(1, 2)

    def _dropped(
        self, block: nn.Module, x_BND: torch.Tensor, drop: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        """The block, each of its two branches left out for some samples and scaled up for the others."""

        def kept(branch_BND: torch.Tensor) -> torch.Tensor:
            draws_B11 = torch.rand(len(branch_BND), 1, 1, generator=generator, device=branch_BND.device)
            return branch_BND * ((draws_B11 >= drop) / (1 - drop)).to(branch_BND.dtype)

        x_BND = x_BND + kept(block.attn(block.norm1(x_BND), None))
        return x_BND + kept(block.mlp(block.norm2(x_BND)))


class ClassHead(nn.Module):
    """(B, N, D) -> (B, classes): the mean over the patches, then a linear layer."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, classes)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x_BND.mean(1))
        return out


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022 (arXiv 2201.03545), without layer scale: 7 x 7 in each channel, then an MLP at each place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        mixed = self.norm(self.spatial(x_BCHW).permute(0, 2, 3, 1))
        return x_BCHW + self.fc2(functional.gelu(self.fc1(mixed))).permute(0, 3, 1, 2)


class DenseHead(nn.Module):
    """(B, N, D) of side x side patches -> (B, outputs, S, S)."""

    def __init__(self, dim: int, outputs: int, patch_size: int, width: int, depth: int) -> None:
        super().__init__()
        self.cells, self.patch_size = min(CELLS, patch_size), patch_size
        self.spread = nn.Linear(dim, self.cells**2 * width)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(width) for _ in range(depth)])
        self.predict = nn.Conv2d(width, outputs, 1)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        side = round(x_BND.shape[1] ** 0.5)
        maps = self.spread(x_BND).transpose(1, 2).unflatten(2, (side, side))
        cells = self.predict(self.blocks(functional.pixel_shuffle(maps, self.cells)))
        size = (side * self.patch_size, side * self.patch_size)
        return functional.interpolate(cells, size, mode="bilinear", align_corners=False)


class Finetuned(nn.Module):
    """Encoder and head. With `frozen` the encoder gets no gradient and is never in training mode."""

    def __init__(self, encoder: RgbEncoder, head: nn.Module, frozen: bool = False) -> None:
        super().__init__()
        self.encoder, self.head, self.frozen = encoder, head, frozen
        for parameter in encoder.parameters():
            parameter.requires_grad_(not frozen)
        for module in head.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Finetuned:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, pixels_B3SS: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features_BND = self.encoder(pixels_B3SS, generator)
        out: torch.Tensor = self.head(features_BND)
        return out


def layer_of(name: str, depth: int) -> int:
    """0: embedding; 1 to `depth`: blocks of the encoder; `depth` + 1: the last norm and the head."""
    part, _, rest = name.removeprefix("encoder.").partition(".")
    if not name.startswith("encoder."):
        return depth + 1
    if part == "blocks":
        return int(rest.partition(".")[0]) + 1
    return depth + 1 if part == "norm" else 0


def parameter_groups(network: Finetuned, weight_decay: float, layer_decay: float) -> list[dict[str, object]]:
    """Groups for AdamW, without frozen parameters. `scale`: of the group's learning rate; see `layer_of`.

    Matrices and kernels decay; norms, biases and single vectors do not.
    """
    depth = len(network.encoder.blocks)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in _learned(network):
        decays = parameter.ndim >= 2 and name.endswith("weight")
        groups.setdefault((layer_of(name, depth), decays), []).append(parameter)
    return [
        {"params": found, "weight_decay": weight_decay * decays, "scale": layer_decay ** (depth + 1 - layer)}
        for (layer, decays), found in sorted(groups.items(), key=lambda item: item[0])
    ]


def _learned(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad)
