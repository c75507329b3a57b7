"""How a sample's token budget is shared out between its modalities (4M, section 2.3).

A Dirichlet draw gives the proportions; what a modality cannot use goes to the others in the same proportions, so that
budgets are filled where there are tokens to fill them.

Legend: B samples, D modalities.
"""
# ruff: noqa: N815  (tensors carry shape suffixes, as fields too)

from __future__ import annotations

from dataclasses import dataclass

import torch


def log_dirichlet(alpha_BD: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Logarithms of unnormalised Dirichlet draws, -inf where alpha is 0; float64.

    Drawn as Gamma(a + 1) · U^(1/a) in logarithms, because Gamma(0.01) itself is mostly below the smallest double.
    """
    safe_BD = alpha_BD.clamp(min=1e-9)
    # The public Gamma distribution takes no generator; this is the sampler below it.
    gamma_BD = torch._standard_gamma(safe_BD + 1, generator=generator)
    uniform_BD = torch.rand(alpha_BD.shape, generator=generator, dtype=alpha_BD.dtype, device=alpha_BD.device)
    return (gamma_BD.log() + uniform_BD.log() / safe_BD).masked_fill(alpha_BD == 0, -torch.inf)


def fill(
    budget_BD: torch.Tensor,
    logits_BD: torch.Tensor,
    total_B: torch.Tensor,
    cap_BD: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Raise budgets to a total of `total_B`, in proportion to exp(logits), none above its cap; int64 (B, D).

    Fractions are rounded at random so that each expectation is exact (systematic sampling). Each round fills the
    total or meets another cap, so there are at most D rounds.
    """
    for _ in range(budget_BD.shape[1]):
        left_B = (total_B - budget_BD.sum(1)).clamp(min=0)
        open_BD = (budget_BD < cap_BD) & logits_BD.isfinite()
        if budget_BD.device.type == "cpu" and not (open_BD & (left_B > 0)[:, None]).any():
            break  # on a GPU asking would cost more than the rounds that are left
        share_BD = torch.softmax(logits_BD.masked_fill(~open_BD, -torch.inf), 1).nan_to_num(0.0)
        edges_BD = (share_BD * left_B[:, None]).cumsum(1)
        offset_B1 = torch.rand(len(left_B), 1, generator=generator, dtype=edges_BD.dtype, device=edges_BD.device)
        marks_BD = (edges_BD + offset_B1).floor()
        add_BD = torch.diff(marks_BD, dim=1, prepend=torch.zeros_like(offset_B1)).long()
        budget_BD = torch.minimum(budget_BD + add_BD, cap_BD)
    return budget_BD


@dataclass(frozen=True)
class Share:
    """One side's Dirichlet draw and total for each sample; called, it shares the total out."""

    logits_BD: torch.Tensor
    total_B: torch.Tensor
    least_D: torch.Tensor
    most_D: torch.Tensor
    generator: torch.Generator

    def __call__(self, has_BD: torch.Tensor, used_BD: torch.Tensor | None = None) -> torch.Tensor:
        """Budgets within what there is, int64 (B, D): anew, or raised from those that are used already."""
        cap_BD = torch.minimum(has_BD, self.most_D)
        if used_BD is None:
            used_BD = torch.minimum(cap_BD, self.least_D) * self.logits_BD.isfinite()
        return fill(used_BD, self.logits_BD, self.total_B, cap_BD, self.generator)
