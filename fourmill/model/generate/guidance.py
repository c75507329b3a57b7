"""Which conditions each pass of a guided target sees, and the logits that follow from all passes.

Guidance is classifier-free: weights act on the difference that a condition makes. One weight drops all conditions
together; weights by name drop each alone, the conditions without a weight stand behind every pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from fourmill.model.generate.contexts import Columns, Context, Contexts
from fourmill.model.generate.plan import Target

_T = TypeVar("_T")


@dataclass(frozen=True)
class Passes(Generic[_T]):
    """Something for each pass: the base (None if its weight is 0) and the weighted branches."""

    base: _T | None
    branches: list[tuple[float, _T]]

    def logits(self, of: Callable[[_T], torch.Tensor]) -> torch.Tensor:
        """The guided logits, from those `of` each pass."""
        base = of(self.base) if self.base is not None else None
        return guided(base, [(weight, of(one)) for weight, one in self.branches])


def guided(base: torch.Tensor | None, branches: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """base + sum of w (branch - base): classifier-free guidance (Ho and Salimans, arXiv 2207.12598) with one branch;
    with several, a conjunction of conditions, of which negative weights negate (Liu et al., arXiv 2206.01714).

    `base` may be None where the weights add up to 1: it would count nothing.
    """
    rest = 1 - sum(weight for weight, _ in branches)
    found = sum(weight * logits for weight, logits in branches)
    if base is None:
        assert abs(rest) < 1e-9, f"guidance weights leave {rest} to logits that were not computed"
        return torch.as_tensor(found)
    return torch.as_tensor(found + rest * base)


def passes(contexts: Contexts, target: Target, extra: Columns | None, make: Callable[[Context], _T]) -> Passes[_T]:
    """What `make` makes of the encoder's output for each pass. `extra`: cells that all passes are shown."""
    behind, branches = _branches(contexts, target)
    every = {name for _, names in branches for name in names}
    readable = target.name in contexts.model.architecture.domains_in
    sentinel = [target.name] if target.sentinel and readable else []

    def made(names: tuple[str, ...]) -> _T:
        return make(contexts.output(names, [*(every - set(names)), *sentinel], extra))

    needed = abs(1 - sum(weight for weight, _ in branches)) > 1e-9
    return Passes(made(behind) if needed else None, [(weight, made(names)) for weight, names in branches])


def _branches(contexts: Contexts, target: Target) -> tuple[tuple[str, ...], list[tuple[float, tuple[str, ...]]]]:
    """The conditions behind all passes; by weight, those of each branch."""
    names = contexts.names() if target.conditions is None else list(target.conditions)
    names = [name for name in names if name != target.name]
    if isinstance(target.guidance, dict):
        behind = tuple(name for name in names if name not in target.guidance)
        return behind, [(weight, (*behind, name)) for name, weight in target.guidance.items() if weight]
    return (), [(target.guidance, tuple(names))] if target.guidance and names else []
