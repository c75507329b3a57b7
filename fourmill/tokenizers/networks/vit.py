"""The transformers of a spatial tokenizer: patches to latents, and codes to patches; names and shapes are ml-4m's.

Position embeddings are stored for one grid and interpolated bicubically to any other, so one network takes pictures of
many sizes.

Shapes: B batch, C channels, S side in pixels, P patch side, h x w grid, L = h*w tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fourmill.tokenizers.config import NetworkConfig

# Of the position embedding, beside patches of unit variance: at 1 it hides them, and learning takes twice the steps.
POSITION_SCALE = 0.2


def patchify(maps_BCSS: Tensor, patch: int) -> Tensor:
    """(B, C, S, S) -> (B, L, C*P*P), patches in rows."""
    return functional.pixel_unshuffle(maps_BCSS, patch).flatten(2).transpose(1, 2)


def unpatchify(patches_BLD: Tensor, patch: int) -> Tensor:
    """(B, L, C*P*P) -> (B, C, S, S): the reverse of `patchify`."""
    return functional.pixel_shuffle(to_grid(patches_BLD), patch)


def to_grid(tokens_BLD: Tensor) -> Tensor:
    """(B, L, D) of a square grid -> (B, D, h, w)."""
    batch, length, dim = tokens_BLD.shape
    side = math.isqrt(length)
    return tokens_BLD.transpose(1, 2).reshape(batch, dim, side, side)


def position_embedding(side: int, dim: int) -> Tensor:
    """Fixed sines and cosines (1, D, side, side): half the channels for the row, half for the column; base 10,000."""
    rates = 1e-4 ** (torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(side)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line.repeat_interleave(side, 0), line.repeat(side, 1)
    return to_grid(POSITION_SCALE * torch.cat([rows, columns], dim=1)[None])


class Attention(nn.Module):
    """Multi-head attention of all tokens to all."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, dim = x_BLD.shape
        qkv = self.qkv(x_BLD).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(_attend(query, key, value).transpose(1, 2).reshape(batch, length, dim))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over (B, heads, L, D/heads). Torch's fused backward on a CPU took 36 % of a training step at 64 tokens;
    written out it takes 5 %."""
    if query.device.type != "cpu" or not query.requires_grad:
        return functional.scaled_dot_product_attention(query, key, value)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.softmax(dim=-1).to(value.dtype) @ value


class Mlp(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, dim: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), activation, nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, sizes: NetworkConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(sizes.dim, eps=1e-6), nn.LayerNorm(sizes.dim, eps=1e-6)
        self.attn = Attention(sizes.dim, sizes.heads)
        self.mlp = Mlp(sizes.dim, int(sizes.dim * sizes.mlp_ratio), nn.GELU())

    @property
    def starts_at_zero(self) -> tuple[nn.Linear, ...]:
        return self.attn.proj, self.mlp.fc2

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        return x_BLD + self.mlp(self.norm2(x_BLD))


class _Transformer(nn.Module):
    """What encoder and decoder share: positions, blocks, and the MLP after them."""

    def __init__(self, sizes: NetworkConfig, blocks: int) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(position_embedding(sizes.grid[0], sizes.dim), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(sizes) for _ in range(blocks)])
        if sizes.post_mlp:
            self.norm_mlp = nn.LayerNorm(sizes.dim, eps=1e-6)
            self.post_mlp = Mlp(sizes.dim, int(sizes.dim * sizes.mlp_ratio), nn.Tanh())
        self.has_post_mlp = sizes.post_mlp

    @property
    def starts_at_zero(self) -> tuple[nn.Linear, ...]:
        return (self.post_mlp.fc2,) if self.has_post_mlp else ()

    def transform(self, x_BLD: Tensor, grid: tuple[int, int]) -> Tensor:
        positions = functional.interpolate(self.pos_emb, size=grid, mode="bicubic", align_corners=False)
        x_BLD = self.blocks(x_BLD + positions.flatten(2).transpose(1, 2))
        if not self.has_post_mlp:
            return x_BLD
        with torch.autocast(x_BLD.device.type, enabled=False):
            x_BLD = x_BLD.float()
            return x_BLD + self.post_mlp(self.norm_mlp(x_BLD))


class ViTEncoder(_Transformer):
    """Maps (B, C, S, S) -> (B, D, h, w)."""

    def __init__(self, sizes: NetworkConfig, channels: int) -> None:
        super().__init__(sizes, sizes.encoder_blocks)
        self.patch = sizes.patch_size
        self.proj = nn.Conv2d(channels, sizes.dim, self.patch, self.patch)

    def forward(self, maps_BCSS: Tensor) -> Tensor:
        grid = maps_BCSS.shape[-2] // self.patch, maps_BCSS.shape[-1] // self.patch
        # As a product of matrices, which is what a convolution by steps of its own width is.
        patches_BLD = functional.linear(patchify(maps_BCSS, self.patch), self.proj.weight.flatten(1), self.proj.bias)
        return to_grid(self.transform(patches_BLD, grid))


class ViTDecoder(_Transformer):
    """Maps (B, D, h, w) -> (B, C, S, S)."""

    def __init__(self, sizes: NetworkConfig, channels: int) -> None:
        super().__init__(sizes, sizes.decoder_blocks)
        self.patch = sizes.patch_size
        self.out_proj = nn.Linear(sizes.dim, channels * self.patch**2)
        self.out_conv = nn.Sequential(ConvNeXtBlock(channels), ConvNeXtBlock(channels)) if sizes.out_conv else None

    def forward(self, hidden_BDhw: Tensor) -> Tensor:
        grid = hidden_BDhw.shape[-2], hidden_BDhw.shape[-1]
        hidden_BLD = self.transform(hidden_BDhw.flatten(2).transpose(1, 2), grid)
        maps_BCSS = unpatchify(self.out_proj(hidden_BLD), self.patch)
        return maps_BCSS if self.out_conv is None else self.out_conv(maps_BCSS)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7 convolution and MLP over channels, scaled by a vector that starts near 0 (arXiv 2201.03545)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x_BCSS: Tensor) -> Tensor:
        hidden_BSSC = self.norm(self.dwconv(x_BCSS).permute(0, 2, 3, 1))
        hidden_BSSC = self.gamma * self.pwconv2(functional.gelu(self.pwconv1(hidden_BSSC)))
        return x_BCSS + hidden_BSSC.permute(0, 3, 1, 2)
