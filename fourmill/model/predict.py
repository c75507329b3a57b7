"""Any-to-any prediction with the same settings for every target: a thin front of `fourmill.model.generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from fourmill.modalities import unknown
from fourmill.model.generate.generate import generate
from fourmill.model.generate.plan import Target
from fourmill.model.network import FourM
from fourmill.model.weights import load_model

__all__ = ["load_model", "predict"]


def predict(
    model: FourM,
    inputs: Mapping[str, Any],
    targets: Sequence[str],
    *,
    steps: int = 1,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    order: Literal["confident", "random"] = "confident",
    chained: bool = False,
) -> dict[str, Any]:
    """Predict `targets` for a batch from `inputs`, on the model's device.

    `inputs`: `rgb` as uint8 (B, 3, S, S), grids as integers (B, L), texts as B arrays of ids without end marker.
    `steps`: passes to fill a grid, 1 to L. `temperature`: 0 takes the likeliest token; else samples are drawn with
    `generator`. `chained`: each predicted target is an input of the next; else all are predicted from the inputs alone.
    Returns int64 (B, L) for grids and B tensors of ids for texts.
    """
    a = model.architecture
    for name in targets:
        if name not in a.domains_out:
            raise ValueError(f"target: {unknown('modality', name, list(a.domains_out))}")
        if name in inputs:
            raise ValueError(f"{name!r} is given and cannot be a target too")
    if steps < 1:
        raise ValueError(f"steps {steps}: at least 1 is needed")
    conditions = None if chained else tuple(name for name in inputs if name in a.domains_in)
    fill: Literal["maskgit", "roar"] = "roar" if order == "random" else "maskgit"
    plan = [
        Target(
            name=name,
            order=fill if a.modalities[name].kind == "grid" else "autoregressive",
            steps=steps,
            temperature=temperature,
            conditions=conditions,
        )
        for name in targets
    ]
    return generate(model, inputs, plan, generator)
