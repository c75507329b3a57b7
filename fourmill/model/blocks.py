"""The transformer's parts, named as in the published 4M checkpoints: pre-norm, no biases, SwiGLU.

Legend: B samples, N queries, M keys, D width of the residual stream, H heads, E width of a head.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

EPS = 1e-6  # of every LayerNorm


class LayerNorm(nn.Module):
    """A LayerNorm without bias; the published files hold a zero bias, so there is one as a buffer."""

    bias: torch.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_buffer("bias", torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, EPS)


class _Heads(nn.Module):
    """Scaled dot-product attention over heads, with the optional norms of queries and keys."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj = nn.Linear(dim, dim, bias=False)
        self.q_norm: nn.Module = LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = LayerNorm(dim // num_heads) if qk_norm else nn.Identity()

    def attend(
        self, q_BND: torch.Tensor, k_BMD: torch.Tensor, v_BMD: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """`mask`: bool, broadcastable to (B, H, N, M), True where a query may look; each query must see something."""
        q_BHNE, k_BHME, v_BHME = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q_BND, k_BMD, v_BMD))
        q_BHNE, k_BHME = self.q_norm(q_BHNE), self.k_norm(k_BHME)
        out_BHNE = functional.scaled_dot_product_attention(
            q_BHNE.to(v_BHME.dtype), k_BHME.to(v_BHME.dtype), v_BHME, mask
        )
        mixed_BND: torch.Tensor = self.proj(out_BHNE.transpose(1, 2).flatten(2))
        return mixed_BND


def attention(
    q_BHNE: torch.Tensor, k_BHME: torch.Tensor, v_BHME: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q k / sqrt(E)) v, (B, H, N, E); torch's fused kernel, but for bfloat16 on a CPU.

    There the fused kernel with its gradient took 26 ms of one core against 8 ms for two plain products
    (torch 2.15, AVX-512, B=32, H=3, N=M=E=64).
    """
    if q_BHNE.device.type != "cpu" or q_BHNE.dtype != torch.bfloat16:
        return functional.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME, mask)
    score_BHNM = (q_BHNE * q_BHNE.shape[-1] ** -0.5) @ k_BHME.transpose(-1, -2)
    if mask is not None:
        score_BHNM = score_BHNM.masked_fill(~mask, -torch.inf)
    return score_BHNM.float().softmax(-1).to(v_BHME.dtype) @ v_BHME


class SelfAttention(_Heads):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__(dim, num_heads, qk_norm)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, x_BND: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q_BND, k_BND, v_BND = self.qkv(x_BND).chunk(3, dim=2)
        return self.attend(q_BND, k_BND, v_BND, mask)


class CrossAttention(_Heads):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__(dim, num_heads, qk_norm)
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)

    def forward(self, x_BND: torch.Tensor, context_BMD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        k_BMD, v_BMD = self.kv(context_BMD).chunk(2, dim=2)
        return self.attend(self.q(x_BND), k_BMD, v_BMD, mask)


class SwiGLU(nn.Module):
    """fc2(silu(fc1 x) · fc3 x), hidden width 2/3 of a plain MLP's, so that both have equal parameters."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(2 * mlp_ratio * dim / 3)
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.fc3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(functional.silu(self.fc1(x)) * self.fc3(x))
        return out


class Mlp(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(mlp_ratio * dim), bias=False)
        self.fc2 = nn.Linear(int(mlp_ratio * dim), dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


def _mlp(dim: int, mlp_ratio: float, gated: bool) -> nn.Module:
    return SwiGLU(dim, mlp_ratio) if gated else Mlp(dim, mlp_ratio)


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, gated: bool, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.attn = LayerNorm(dim), SelfAttention(dim, num_heads, qk_norm)
        self.norm2, self.mlp = LayerNorm(dim), _mlp(dim, mlp_ratio, gated)

    def forward(self, x_BND: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND), mask)
        out_BND: torch.Tensor = x_BND + self.mlp(self.norm2(x_BND))
        return out_BND


class DecoderBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, gated: bool, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.self_attn = LayerNorm(dim), SelfAttention(dim, num_heads, qk_norm)
        self.query_norm, self.context_norm = LayerNorm(dim), LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, num_heads, qk_norm)
        self.norm2, self.mlp = LayerNorm(dim), _mlp(dim, mlp_ratio, gated)

    def forward(
        self,
        x_BND: torch.Tensor,
        context_BMD: torch.Tensor,
        mask: torch.Tensor | None,
        context_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        x_BND = x_BND + self.self_attn(self.norm1(x_BND), mask)
        x_BND = x_BND + self.cross_attn(self.query_norm(x_BND), self.context_norm(context_BMD), context_mask)
        out_BND: torch.Tensor = x_BND + self.mlp(self.norm2(x_BND))
        return out_BND


@torch.no_grad()
def initialise(block: nn.Module) -> None:
    """Xavier-uniform, as MAE; stacked q, k, v (and k, v) are three (two) matrices, each with its own fan."""
    for name, linear in block.named_modules():
        if isinstance(linear, nn.Linear):
            parts = 3 if name.endswith("qkv") else 2 if name.endswith("kv") else 1
            bound = (6 / (linear.in_features + linear.out_features / parts)) ** 0.5
            linear.weight.uniform_(-bound, bound)
            if linear.bias is not None:
                linear.bias.zero_()
