"""Small 4M architectures and batches written out by hand, for the tests of the network."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fourmill.model.batch import Inputs, Targets, compact
from fourmill.model.config import Architecture, ModalityInfo
from fourmill.model.network import FourM


def tiny(**changes: object) -> Architecture:
    """One pixel, one grid and one text modality, 32 wide, 2 + 2 blocks."""
    fields: dict[str, object] = {
        "dim": 32,
        "encoder_depth": 2,
        "decoder_depth": 2,
        "num_heads": 2,
        "image_size": 32,
        "domains_in": ("rgb", "tok_depth", "tok_caption"),
        "domains_out": ("tok_depth", "tok_caption"),
        "modalities": {
            "rgb": ModalityInfo(kind="pixels", tokens=4, grid=(2, 2)),
            "tok_depth": ModalityInfo(kind="grid", vocabulary=11, tokens=9, grid=(3, 3)),
            "tok_caption": ModalityInfo(kind="sequence", vocabulary=40, tokens=12),
        },
        **changes,
    }
    return Architecture(**fields)


def seeded(architecture: Architecture, seed: int = 0) -> FourM:
    torch.manual_seed(seed)
    return FourM(architecture).eval()


def inputs_of(rows: list[list[tuple[int, int, int]]], width: int, pixels: torch.Tensor | None = None) -> Inputs:
    """Rows of (modality number, position, id), padded to `width`."""
    table = torch.tensor([[*row, *[(-1, 0, 0)] * (width - len(row))] for row in rows])
    return Inputs(table[..., 2], table[..., 1], table[..., 0], table[..., 0] >= 0, pixels)


def targets_of(rows: list[list[tuple[int, int, int, int]]], width: int) -> Targets:
    """Rows of (modality number, position, given id, label), padded to `width`."""
    table = torch.tensor([[*row, *[(-1, 0, 0, 0)] * (width - len(row))] for row in rows])
    return Targets(table[..., 2], table[..., 1], table[..., 0], table[..., 0] >= 0, table[..., 3])


def ml4m_batch(architecture: Architecture, data: Mapping[str, Mapping[str, torch.Tensor]]) -> tuple[Inputs, Targets]:
    """ml-4m's per-modality tensors and masks (True is hidden) as one dense batch of ours, as wide as it needs."""
    sides: tuple[dict[str, list[torch.Tensor]], ...] = ({}, {})
    valid: tuple[list[torch.Tensor], ...] = ([], [])
    for number, name in enumerate(architecture.names):
        kind, tensor, hide_in = architecture.modalities[name].kind, data[name]["tensor"], data[name]["input_mask"]
        place = torch.arange(hide_in.shape[1]).expand_as(hide_in)
        ids = {"pixels": place, "vectors": place}.get(kind, tensor)
        text = kind in ("sequence", "vectors")
        shown = {"ids": ids.long(), "position": (~hide_in).cumsum(1) - 1 if text else place}
        made = [(0, shown, ~hide_in)] if name in architecture.domains_in else []
        if name in architecture.domains_out:
            hide_out, asked = data[name]["target_mask"], {"ids": ids, "position": place, "label": ids}
            if text:
                hide_out = hide_out[:, :-1] | hide_out[:, 1:]
                asked = {"ids": ids[:, :-1], "position": (~hide_out).cumsum(1) - 1, "label": ids[:, 1:]}
            made.append((1, asked, ~hide_out))
        for side, columns, which in made:
            for key, column in {**columns, "modality": torch.full_like(which, number, dtype=torch.long)}.items():
                sides[side].setdefault(key, []).append(column.clamp(min=0).long())
            valid[side].append(which)
    a, b = (compact(c, v, int(torch.cat(v, 1).sum(1).max())) for c, v in zip(sides, valid, strict=True))
    tensors = {
        kind: {n: data[n]["tensor"] for n in architecture.names if architecture.modalities[n].kind == kind}
        for kind in ("pixels", "vectors")
    }
    inputs = Inputs(a["ids"], a["position"], a["modality"], a["valid"], tensors["pixels"], vectors=tensors["vectors"])
    return inputs, Targets(b["ids"], b["position"], b["modality"], b["valid"], b["label"])
