"""Any-to-any generation: a plan of targets, each from what is given and what was generated before it.

Invariants: what is given stays as it is (cells of a partly known grid, the beginning of a text). A sample's result
depends on the seed and the sample's number, not on which samples share its batch (up to the rounding of other shapes).
The encoder runs again only if what it is shown has changed.

Legend: B samples, L cells of a grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fourmill.modalities import unknown
from fourmill.model.generate.contexts import Contexts
from fourmill.model.generate.grids import fill_grid
from fourmill.model.generate.plan import Target, check_plan
from fourmill.model.generate.sampling import Noise
from fourmill.model.generate.texts import write_text
from fourmill.model.network import FourM


@torch.no_grad()
def generate(
    model: FourM,
    inputs: Mapping[str, Any],
    plan: Sequence[Target],
    generator: torch.Generator | None = None,
    *,
    samples: Sequence[int] | None = None,
    contexts: Contexts | None = None,
) -> dict[str, Any]:
    """Generate the targets of `plan`, one after another, for a batch on the model's device.

    `inputs`: `rgb` as uint8 (B, 3, S, S), grids as integers (B, L), texts as B arrays of ids without end marker. A
    target may be given in part: a grid with -1 for the cells to fill, a text as its beginning. `generator` draws the
    seed; `samples`: the numbers of the samples, by default 0 to B-1. `contexts`: of the same model and inputs, to count
    or share encoder passes. Returns int64 (B, L) for grids and B tensors of ids for texts. ValueError says what does
    not fit.
    """
    _check(model, inputs, plan)
    asked = {target.name for target in plan}
    if contexts is None:
        whole = {name: value for name, value in inputs.items() if name not in asked}
        contexts = Contexts(model, whole, len(next(iter(inputs.values()))))
    device = generator.device if generator is not None else "cpu"
    seed = int(torch.randint(1 << 62, (1,), generator=generator, device=device))
    numbers = range(contexts.size) if samples is None else samples
    found: dict[str, Any] = {}
    for place, target in enumerate(plan):
        noise, part = Noise(seed, numbers, place), inputs.get(target.name)
        grid = model.architecture.modalities[target.name].kind == "grid"
        found[target.name] = (fill_grid if grid else write_text)(contexts, target, part, noise)
        if target.name in model.architecture.domains_in:
            contexts.put(target.name, found[target.name])
    return found


def _check(model: FourM, inputs: Mapping[str, Any], plan: Sequence[Target]) -> None:
    asked = [target.name for target in plan]
    again = [name for name in asked if asked.count(name) > 1]
    if again:
        raise ValueError(f"{again[0]!r} is twice among the targets")
    for name in inputs:
        if name not in model.architecture.domains_in and name not in asked:
            raise ValueError(f"input: {unknown('modality', name, list(model.architecture.domains_in))}")
    if not inputs:
        raise ValueError("no inputs: give at least one modality")
    sizes = {name: len(value) for name, value in inputs.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"inputs of different numbers of samples: {sizes}")
    check_plan(model.architecture, plan, [name for name in inputs if name not in asked])
