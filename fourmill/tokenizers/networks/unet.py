"""The UNet denoiser of a diffusion decoder: OpenAI's (arXiv 2105.05233) on patches, codes laid beside them.

Submodules stand at the places that ml-4m's checkpoints name (`input_blocks.<i>.<j>.in_layers.0` and so on), which is
why activations without weights are modules here. Every sample is computed by itself.

Shapes: B batch, C channels, S side in pixels, Z latent channels, h x w the codes' grid; within the UNet D channels and
H x W positions, each a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fourmill.tokenizers.networks.diffusion_config import UNetConfig


def timestep_embedding(timesteps_B: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of timesteps (B,) at dim/2 rates from 1 down to 1/10,000 -> (B, dim); dim is even."""
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=timesteps_B.device) / (dim // 2)
    angles = timesteps_B[:, None].float() * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention over (B, heads, L, D/heads); `bias` is added to the scores."""
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)


class ResBlock(nn.Module):
    """Two convolutions with the timestep's embedding added between them, and a way round."""

    def __init__(self, width_in: int, width_out: int, embedding: int, sizes: UNetConfig) -> None:
        super().__init__()
        first, second = nn.GroupNorm(sizes.groups, width_in), nn.GroupNorm(sizes.groups, width_out)
        self.in_layers = nn.Sequential(first, nn.SiLU(), nn.Conv2d(width_in, width_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, width_out))
        last = _zero(nn.Conv2d(width_out, width_out, 3, padding=1))
        self.out_layers = nn.Sequential(second, nn.SiLU(), nn.Dropout(sizes.dropout), last)
        self.skip_connection = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x_BDHW: Tensor, embedding_BE: Tensor) -> Tensor:
        hidden = self.in_layers(x_BDHW) + self.emb_layers(embedding_BE)[..., None, None]
        return self.skip_connection(x_BDHW) + self.out_layers(hidden)


class AttentionBlock(nn.Module):
    """Attention of all positions to all. Query, key and value of a head lie side by side in `qkv`'s rows."""

    def __init__(self, width: int, sizes: UNetConfig) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.norm = nn.GroupNorm(sizes.groups, width)
        self.qkv, self.proj_out = nn.Conv1d(width, 3 * width, 1), _zero(nn.Conv1d(width, width, 1))

    def forward(self, x_BDHW: Tensor) -> Tensor:
        batch, width, *sides = x_BDHW.shape
        x_BDL = x_BDHW.flatten(2)
        qkv = self.qkv(self.norm(x_BDL)).view(batch, self.heads, 3, width // self.heads, -1)
        query, key, value = qkv.transpose(-1, -2).unbind(2)
        attended_BDL = attend(query, key, value).transpose(-1, -2).reshape(batch, width, -1)
        return (x_BDL + self.proj_out(attended_BDL)).view(batch, width, *sides)


class Downsample(nn.Module):
    """Half the side, by a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        return self.op(x_BDHW)


class Upsample(nn.Module):
    """Twice the side: every position four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x_BDHW, scale_factor=2.0, mode="nearest"))


class Stage(nn.ModuleList):
    """Layers one after the other, of which the residual blocks are told the timestep."""

    def forward(self, x_BDHW: Tensor, embedding_BE: Tensor) -> Tensor:
        for layer in self:
            x_BDHW = layer(x_BDHW, embedding_BE) if isinstance(layer, ResBlock) else layer(x_BDHW)
        return x_BDHW


class UNet(nn.Module):
    """Noised values (B, C, S, S), timesteps (B,) and codes (B, Z, h, w) -> the schedule's target (B, C, S, S)."""

    def __init__(self, sizes: UNetConfig, channels: int, latent_dim: int) -> None:
        super().__init__()
        self.sizes, self.channels = sizes, channels
        embedding, pixels = 4 * sizes.dim, channels * sizes.patch_size**2
        self.time_embed = nn.Sequential(nn.Linear(sizes.dim, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        first, last = sizes.widths[0], sizes.widths[-1]
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(pixels + latent_dim, first, 3, padding=1)])])
        kept = self._go_down(first, embedding)
        middle = [ResBlock(last, last, embedding, sizes), AttentionBlock(last, sizes)]
        self.middle_block = Stage([*middle, ResBlock(last, last, embedding, sizes)])
        self.output_blocks = nn.ModuleList()
        self._go_up(kept, embedding)
        out = _zero(nn.Conv2d(first, pixels, 3, padding=1))
        self.out = nn.Sequential(nn.GroupNorm(sizes.groups, first), nn.SiLU(), out)

    def _go_down(self, width: int, embedding: int) -> list[int]:
        """Append the levels of the way down; -> the widths of what each input block hands to the way up."""
        sizes, kept = self.sizes, [width]
        for level, wider in enumerate(sizes.widths):
            if level:
                self.input_blocks.append(Stage([Downsample(width)]))
                kept.append(width)
            for _ in range(sizes.blocks):
                self.input_blocks.append(self._stage(level, width, embedding))
                width = wider
                kept.append(width)
        return kept

    def _go_up(self, kept: list[int], embedding: int) -> None:
        width = self.sizes.widths[-1]
        for level in reversed(range(len(self.sizes.widths))):
            for block in range(self.sizes.blocks + 1):
                stage = self._stage(level, width + kept.pop(), embedding)
                width = self.sizes.widths[level]
                if level and block == self.sizes.blocks:
                    stage.append(Upsample(width))
                self.output_blocks.append(stage)

    def _stage(self, level: int, width_in: int, embedding: int) -> Stage:
        width = self.sizes.widths[level]
        stage = Stage([ResBlock(width_in, width, embedding, self.sizes)])
        if 2**level in self.sizes.attention_at:
            stage.append(AttentionBlock(width, self.sizes))
        return stage

    def forward(
        self, noised_BCSS: Tensor, timesteps_B: Tensor, codes_BZhw: Tensor, cond_mask: Tensor | None = None
    ) -> Tensor:
        """`cond_mask`, bool (B, h, w): codes that are not to be seen; they become 0."""
        patches = functional.pixel_unshuffle(noised_BCSS, self.sizes.patch_size)
        if cond_mask is not None:
            codes_BZhw = codes_BZhw.masked_fill(cond_mask[:, None], 0.0)
        beside = functional.interpolate(codes_BZhw, patches.shape[-2:], mode="nearest")
        hidden = torch.cat([patches, beside.to(patches.dtype)], dim=1)
        weight = self.time_embed[0].weight
        embedding_BE = self.time_embed(timestep_embedding(timesteps_B, self.sizes.dim).to(weight.dtype))
        kept = []
        for stage in self.input_blocks:
            hidden = stage(hidden, embedding_BE)
            kept.append(hidden)
        hidden = self.middle_block(hidden, embedding_BE)
        for stage in self.output_blocks:
            hidden = stage(torch.cat([hidden, kept.pop()], dim=1), embedding_BE)
        return functional.pixel_shuffle(self.out(hidden), self.sizes.patch_size)


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
