"""The transformer's parts, named as in the published 4M checkpoints: pre-norm, with or without biases, SwiGLU or GELU.

Every block maps (B, N, D) to (B, N, D) and reads nothing but its arguments, so that blocks can be compiled, sharded and
recomputed one by one.

Legend: B samples, N queries, M keys, D width of the residual stream, H heads, E width of a head.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fourmill.model.config import ModelConfig

EPS = 1e-6  # of every LayerNorm


class LayerNorm(nn.Module):
    """A LayerNorm whose bias may be left out; the published files then hold a zero bias, so it is there as a buffer."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias: torch.Tensor
        if bias:
            self.bias = nn.Parameter(torch.zeros(dim))
        else:
            self.register_buffer("bias", torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, EPS)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that matrix products of `x` are computed in: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def as_bias(mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """0 where a bool `mask` is True, else -inf, in the dtype that attention over `x` computes in.

    Made once for all blocks: torch would do it again in each.
    """
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=product_dtype(x), device=mask.device).masked_fill_(~mask, -torch.inf)


def attention(
    q_BHNE: torch.Tensor, k_BHME: torch.Tensor, v_BHME: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q k / sqrt(E) + mask) v, (B, H, N, E); torch's fused kernel, but on a CPU.

    There, with its gradient, the fused kernel took 79 ms of one core against 60 ms for two plain products in float32,
    and 83 against 30 ms in bfloat16 (torch 2.15, AVX-512, B=32, H=6, N=M=128, E=64, with or without mask).
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = as_bias(mask, q_BHNE)
    if mask is not None:
        mask = mask.to(q_BHNE.dtype)
    if q_BHNE.device.type != "cpu":
        return functional.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME, mask)
    score_BHNM = (q_BHNE * q_BHNE.shape[-1] ** -0.5) @ k_BHME.transpose(-1, -2)
    if mask is not None:
        score_BHNM += mask
    return score_BHNM.softmax(-1) @ v_BHME


class _Heads(nn.Module):
    """Scaled dot-product attention over heads, with the optional norms of queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.proj = nn.Linear(config.dim, config.dim, bias=config.proj_bias)
        head_dim, bias = config.dim // config.num_heads, config.norm_bias
        self.q_norm: nn.Module = LayerNorm(head_dim, bias) if config.qk_norm else nn.Identity()
        self.k_norm: nn.Module = LayerNorm(head_dim, bias) if config.qk_norm else nn.Identity()

    def attend(
        self, q_BND: torch.Tensor, k_BMD: torch.Tensor, v_BMD: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """`mask`: broadcastable to (B, H, N, M); bool, True where a query may look, or floats added to the scores (see
        `as_bias`). Each query must see something."""
        q_BHNE, k_BHME, v_BHME = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q_BND, k_BMD, v_BMD))
        q_BHNE, k_BHME = self.q_norm(q_BHNE), self.k_norm(k_BHME)
        out_BHNE = attention(q_BHNE.to(v_BHME.dtype), k_BHME.to(v_BHME.dtype), v_BHME, mask)
        mixed_BND: torch.Tensor = self.proj(out_BHNE.transpose(1, 2).flatten(2))
        return mixed_BND


class SelfAttention(_Heads):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)

    def forward(self, x_BND: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q_BND, k_BND, v_BND = self.qkv(x_BND).chunk(3, dim=2)
        return self.attend(q_BND, k_BND, v_BND, mask)


class CrossAttention(_Heads):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.q = nn.Linear(config.dim, config.dim, bias=config.qkv_bias)
        self.kv = nn.Linear(config.dim, 2 * config.dim, bias=config.qkv_bias)

    def forward(self, x_BND: torch.Tensor, context_BMD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        k_BMD, v_BMD = self.kv(context_BMD).chunk(2, dim=2)
        return self.attend(self.q(x_BND), k_BMD, v_BMD, mask)


class SwiGLU(nn.Module):
    """fc2(silu(fc1 x) · fc3 x), hidden width 2/3 of a plain MLP's, so that both have equal parameters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = int(2 * int(config.mlp_ratio * config.dim) / 3)
        self.fc1 = nn.Linear(config.dim, hidden, bias=config.mlp_bias)
        self.fc2 = nn.Linear(hidden, config.dim, bias=config.mlp_bias)
        self.fc3 = nn.Linear(config.dim, hidden, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(product_dtype(x))  # once for both products: a twentieth of the MLP's time in bfloat16 on a CPU
        out: torch.Tensor = self.fc2(functional.silu(self.fc1(x)) * self.fc3(x))
        return out


class Mlp(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = int(config.mlp_ratio * config.dim)
        self.fc1 = nn.Linear(config.dim, hidden, bias=config.mlp_bias)
        self.fc2 = nn.Linear(hidden, config.dim, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


def _mlp(config: ModelConfig) -> nn.Module:
    return SwiGLU(config) if config.gated_mlp else Mlp(config)


def _norm(config: ModelConfig) -> LayerNorm:
    return LayerNorm(config.dim, config.norm_bias)


class EncoderBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.attn = _norm(config), SelfAttention(config)
        self.norm2, self.mlp = _norm(config), _mlp(config)

    def forward(self, x_BND: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND), mask)
        out_BND: torch.Tensor = x_BND + self.mlp(self.norm2(x_BND))
        return out_BND


class DecoderBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.self_attn = _norm(config), SelfAttention(config)
        self.query_norm, self.context_norm = _norm(config), _norm(config)
        self.cross_attn = CrossAttention(config)
        self.norm2, self.mlp = _norm(config), _mlp(config)

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


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, EncoderBlock | DecoderBlock)]


def checkpoint_blocks(model: nn.Module) -> None:
    """Let each block forget its activations and compute them again for the gradient; call before `compile_blocks`."""
    for block in _blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def compile_blocks(model: nn.Module) -> None:
    """Compile each block in place. Parameters keep their names; equal blocks share one compilation."""
    for block in _blocks(model):
        block.compile(dynamic=False)


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Xavier-uniform, as MAE; stacked q, k, v (and k, v) are three (two) matrices, each with its own fan."""
    for name, linear in module.named_modules():
        if isinstance(linear, nn.Linear):
            parts = 3 if name.endswith("qkv") else 2 if name.endswith("kv") else 1
            bound = (6 / (linear.in_features + linear.out_features / parts)) ** 0.5
            linear.weight.uniform_(-bound, bound)
            if linear.bias is not None:
                linear.bias.zero_()
