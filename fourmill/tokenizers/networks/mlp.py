"""The network of a vector tokenizer: residual MLPs (arXiv 2306.13575); names and shapes are ml-4m's."""

from __future__ import annotations

from torch import Tensor, nn


class ResidualMlp(nn.Module):
    """(B, C, 1, 1) -> (B, D, 1, 1): widen to `dim`, pre-norm GELU blocks, project to `dim_out`."""

    def __init__(self, dim_in: int, dim: int, dim_out: int, blocks: int, mlp_ratio: float) -> None:
        super().__init__()
        self.linear_in, self.linear_out = nn.Linear(dim_in, dim), nn.Linear(dim, dim_out)
        self.layernorms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(blocks))
        self.blocks = nn.ModuleList(_Bottleneck(dim, int(dim * mlp_ratio)) for _ in range(blocks))

    def forward(self, vectors_BC11: Tensor) -> Tensor:
        x_BD = self.linear_in(vectors_BC11[:, :, 0, 0])
        for norm, block in zip(self.layernorms, self.blocks, strict=True):
            x_BD = x_BD + block(norm(x_BD))
        return self.linear_out(x_BD)[:, :, None, None]


class _Bottleneck(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    @property
    def starts_at_zero(self) -> tuple[nn.Module, ...]:
        return (self.block[2],)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.block(x_BD)
