"""Cross-entropy of a linear layer's logits that never holds all of them.

The logits of 4M's vocabularies are by far its largest activations: 4 KB to 30 KB a target, twice that with their
gradient. Here they are made a few rows at a time, and turned at once into the gradients of what made them; products and
results are those of the plain formula.

Legend: K targets, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from fourmill.model.blocks import product_dtype

CHUNK = 1 << 26  # logits at a time: 256 MB in float32


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: torch.Tensor,
        weight_VD: torch.Tensor,
        label_K: torch.Tensor,
        dtype: torch.dtype,
        wants_gradient: bool,
    ) -> torch.Tensor:
        nats = hidden_KD.new_zeros((), dtype=torch.float32)
        hidden, weight, rows = hidden_KD.to(dtype), weight_VD.to(dtype), max(CHUNK // len(weight_VD), 1)
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        grad_weight: torch.Tensor | None = None
        for start in range(0, len(hidden), rows):
            part, label = hidden[start : start + rows], label_K[start : start + rows, None]
            log_p = (part @ weight.T).log_softmax(1, dtype=torch.float32)
            nats -= log_p.gather(1, label).sum()
            if grad_hidden is not None:
                slope = log_p.exp_()
                slope = slope.scatter_add_(1, label, slope.new_full(label.shape, -1.0)).to(dtype)
                torch.mm(slope, weight, out=grad_hidden[start : start + rows])
                made = (slope.T @ part).to(weight_VD.dtype)
                grad_weight = made if grad_weight is None else grad_weight.add_(made)
        if grad_hidden is not None:
            grad_weight = torch.zeros_like(weight_VD) if grad_weight is None else grad_weight
            ctx.save_for_backward(grad_hidden.to(hidden_KD.dtype), grad_weight)
        return nats

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * slopes[0], grad_weight * slopes[0], None, None, None


def cross_entropy(hidden_KD: torch.Tensor, weight_VD: torch.Tensor, label_K: torch.Tensor) -> torch.Tensor:
    """The sum over targets of -log softmax(hidden · weightᵀ)[label], float32, in nats.

    The products are in autocast's dtype where it is on, softmax and sum in float32.
    """
    dtype = product_dtype(hidden_KD)
    with torch.autocast(hidden_KD.device.type, enabled=False):
        nats: torch.Tensor = _CrossEntropy.apply(hidden_KD, weight_VD, label_K, dtype, torch.is_grad_enabled())
    return nats
