"""The transformer in the middle of a UViT, told the timestep by adaLN-Zero (arXiv 2212.09748).

Codes are added to its input ('concat', ml-4m's name) or attended to ('xattn'). Names and shapes are those of ml-4m's
checkpoints.

Shapes: B batch, Z latent channels, h x w the codes' grid, D channels, H x W positions, L = H*W, M = h*w, E channels of
the timestep's embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fourmill.tokenizers.networks.diffusion_config import UViTConfig
from fourmill.tokenizers.networks.unet import attend


class Attention(nn.Module):
    """Multi-head attention of all tokens to all."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        query, key, value = (_split(part, self.heads) for part in self.qkv(x_BLD).chunk(3, dim=-1))
        return self.proj_drop(self.proj(_join(attend(query, key, value))))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to codes."""

    def __init__(self, dim: int, latent_dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(latent_dim, 2 * dim)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, codes_BMZ: Tensor, bias: Tensor | None) -> Tensor:
        key, value = (_split(part, self.heads) for part in self.kv(codes_BMZ).chunk(2, dim=-1))
        query = _split(self.q(x_BLD), self.heads)
        return self.proj_drop(self.proj(_join(attend(query, key, value, bias))))


class Mlp(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.drop(self.fc2(functional.gelu(self.fc1(x_BLD))))


class Block(nn.Module):
    """Transformer block whose norms are shifted and scaled, and whose branches are gated, by the timestep (adaLN-Zero,
    arXiv 2212.09748). With `latent_dim` it attends to codes between its two branches."""

    def __init__(self, sizes: UViTConfig, embedding: int, latent_dim: int | None, joins: bool) -> None:
        super().__init__()
        dim = sizes.dim
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        attention = Attention(dim, sizes.heads, sizes.dropout)
        self.crosses = latent_dim is not None
        if latent_dim is None:
            self.attn = attention
        else:
            self.self_attn = attention
            self.cross_attn = CrossAttention(dim, latent_dim, sizes.heads, sizes.dropout)
            self.query_norm, self.context_norm = nn.LayerNorm(dim), nn.LayerNorm(latent_dim)
        self.mlp = Mlp(dim, int(dim * sizes.mlp_ratio), sizes.dropout)
        branches = 3 if self.crosses else 2
        self.adaLN_modulation = nn.Linear(embedding, 2 * branches * dim)
        self.adaLN_gate = nn.Linear(embedding, branches * dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if joins else None

    def forward(
        self, x_BLD: Tensor, embedding_BE: Tensor, codes_BMZ: Tensor, bias: Tensor | None, skip_BLD: Tensor | None
    ) -> Tensor:
        if self.skip_linear is not None:
            x_BLD = self.skip_linear(torch.cat([x_BLD, skip_BLD], dim=-1))
        active = functional.silu(embedding_BE)[:, None]
        gates = list(self.adaLN_gate(active).chunk(3 if self.crosses else 2, dim=-1))
        moves = list(self.adaLN_modulation(active).chunk(2 * len(gates), dim=-1))  # shift and scale of each branch
        attention = self.self_attn if self.crosses else self.attn
        x_BLD = x_BLD + gates[0] * attention(_modulate(self.norm1(x_BLD), *moves[:2]))
        if self.crosses:
            query = _modulate(self.query_norm(x_BLD), *moves[2:4])
            x_BLD = x_BLD + gates[1] * self.cross_attn(query, self.context_norm(codes_BMZ), bias)
        return x_BLD + gates[-1] * self.mlp(_modulate(self.norm2(x_BLD), *moves[-2:]))


class Middle(nn.Module):
    """The transformer between the convolutions: (B, D, H, W) -> the same shape."""

    def __init__(self, sizes: UViTConfig, latent_dim: int, embedding: int) -> None:
        super().__init__()
        self.sizes, self.adds = sizes, sizes.conditioning == "concat"
        width = sizes.widths[-1]
        self.register_buffer("mid_pos_emb", position_embedding(sizes.position_grid, sizes.dim))
        joins = [sizes.long_skip and i > sizes.layers // 2 for i in range(sizes.layers)]
        to_codes = None if self.adds else latent_dim
        self.mid_block = nn.ModuleList([Block(sizes, embedding, to_codes, join) for join in joins])
        self.mid_proj_in, self.mid_proj_out = nn.Linear(width, sizes.dim), nn.Linear(sizes.dim, width)
        if self.adds:
            self.mid_cond_proj = nn.Linear(latent_dim, sizes.dim)
            self.mask_token = nn.Parameter(torch.zeros(sizes.dim))

    def forward(self, x_BDHW: Tensor, embedding_BE: Tensor, codes_BZhw: Tensor, cond_mask: Tensor | None) -> Tensor:
        grid = x_BDHW.shape[-2:]
        # ml-4m interpolates the positions of cross-attending transformers to the nearest.
        how: dict[str, Any] = {"mode": "bicubic", "align_corners": False} if self.adds else {"mode": "nearest"}
        positions = functional.interpolate(self.mid_pos_emb, grid, **how)
        x_BLD = self.mid_proj_in(_to_tokens(x_BDHW)) + _to_tokens(positions)
        bias = None
        if self.adds:
            x_BLD = x_BLD + self._added(codes_BZhw, cond_mask, grid)
        elif cond_mask is not None:
            # The least float, not minus infinity: a sample all of whose codes are masked attends to them equally.
            bias = cond_mask.flatten(1)[:, None, None].to(x_BLD.dtype) * torch.finfo(x_BLD.dtype).min
        x_BLD = self._transform(x_BLD, embedding_BE, _to_tokens(codes_BZhw), bias)
        return self.mid_proj_out(x_BLD).transpose(1, 2).unflatten(2, grid)

    def _added(self, codes_BZhw: Tensor, cond_mask: Tensor | None, grid: torch.Size) -> Tensor:
        """What codes add to each token (B, L, D); a masked one the mask token."""
        added_BLD = self.mid_cond_proj(_to_tokens(functional.interpolate(codes_BZhw, grid, mode="nearest")))
        if cond_mask is None:
            return added_BLD
        mask = functional.interpolate(cond_mask[:, None].float(), grid, mode="nearest") > 0.5
        return torch.where(_to_tokens(mask), self.mask_token.to(added_BLD.dtype), added_BLD)

    def _transform(self, x_BLD: Tensor, embedding_BE: Tensor, codes_BMZ: Tensor, bias: Tensor | None) -> Tensor:
        kept: list[Tensor] = []
        for i, block in enumerate(self.mid_block):
            skip_BLD = kept.pop() if block.skip_linear is not None else None
            x_BLD = block(x_BLD, embedding_BE, codes_BMZ, bias, skip_BLD)
            if self.sizes.long_skip and i < len(self.mid_block) // 2:
                kept.append(x_BLD)
        return x_BLD


def position_embedding(side: int, dim: int) -> Tensor:
    """Fixed waves (1, dim, side, side): a quarter each of the row's sines and cosines and the column's; base 10,000."""
    angles = torch.arange(side)[:, None] / 10_000 ** (torch.arange(dim // 4) / (dim // 4))
    line_DS = torch.cat([angles.sin(), angles.cos()], dim=1).T
    rows, columns = line_DS[:, :, None].expand(-1, -1, side), line_DS[:, None].expand(-1, side, -1)
    return torch.cat([rows, columns])[None]


def _modulate(x_BLD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x_BLD * (1.0 + scale) + shift


def _split(x_BLD: Tensor, heads: int) -> Tensor:
    return x_BLD.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join(x_BhLd: Tensor) -> Tensor:
    return x_BhLd.transpose(1, 2).flatten(2)


def _to_tokens(x_BDHW: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, H*W, D)."""
    return x_BDHW.flatten(2).transpose(1, 2)
