"""What passes from the loader to the masking and from the masking to the network.

Legend: B samples, N input tokens, M target tokens, L cells of a grid, T longest text, S side in pixels.
Every tensor is dense: the tokens of all modalities of a sample stand in one row, valid ones first.
"""
# ruff: noqa: N815  (tensors carry shape suffixes, as fields too)

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

_T = TypeVar("_T", bound="_Movable")


class _Movable:
    def to(self: _T, device: torch.device | str) -> _T:
        """The same with every tensor on `device`."""
        assert isinstance(self, RawBatch | Inputs | Targets)
        moved = {f.name: _move(getattr(self, f.name), device) for f in fields(self)}
        return replace(self, **moved)


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {k: _move(v, device) for k, v in value.items()}
    return value


@dataclass(frozen=True)
class RawBatch(_Movable):
    """B samples as the dataset has them.

    `tokens`: by modality, uint16 or uint32, (B, L) for grids and (B, T) for sequences, zero after the end.
    `lengths`: by sequence modality, int64 (B,), tokens without end marker. `present`: by modality, bool (B,).
    `pixels`: uint8 (B, 3, S, S) if the model reads RGB. `state`: the loader's state after this batch.
    """

    keys: list[str]
    tokens: dict[str, torch.Tensor]
    lengths: dict[str, torch.Tensor]
    present: dict[str, torch.Tensor]
    pixels: torch.Tensor | None
    state: dict[str, int]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Inputs(_Movable):
    """Visible tokens. int64 (B, N) each: ids, positions, modality numbers (-1: no token here); bool `valid_BN`.

    `pixels_B3SS`: uint8, or floats that are normalised already, by modality where there are several sizes of pixels;
    the patches to take are those named by position. `vectors`: by modality of embedded inputs, floats (B, T, V); the id
    of a token is its row there. `counts`: tokens of each modality number in the batch, where whoever made it knows
    them: on a GPU, asking a tensor for its size makes the host wait. Wrong counts give wrong results.
    """

    ids_BN: torch.Tensor
    position_BN: torch.Tensor
    modality_BN: torch.Tensor
    valid_BN: torch.Tensor
    pixels_B3SS: torch.Tensor | dict[str, torch.Tensor] | None = None
    counts: tuple[int, ...] | None = None
    vectors: dict[str, torch.Tensor] | None = None

    @property
    def is_full(self) -> bool:
        """Every place holds a token, as far as the host knows without asking the device."""
        return self.counts is not None and sum(self.counts) == self.ids_BN.numel()


@dataclass(frozen=True)
class Targets(_Movable):
    """Tokens to predict. int64 (B, M) each, bool `valid_BM`.

    `ids_BM`: what the decoder is given at this place: the previous id in a sequence, unused in a grid.
    `label_BM`: the id to be predicted there. `counts` as of `Inputs`.
    """

    ids_BM: torch.Tensor
    position_BM: torch.Tensor
    modality_BM: torch.Tensor
    valid_BM: torch.Tensor
    label_BM: torch.Tensor
    counts: tuple[int, ...] | None = None


def compact(columns: dict[str, list[torch.Tensor]], valid: list[torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """Lists of (B, W_i) columns -> (B, width) each, the valid entries first in their order; also 'valid', bool.

    Places without an entry hold 0, and -1 in 'modality'. No sample may have more than `width` valid entries.
    """
    valid_BW = torch.cat(valid, 1)
    place_BW = torch.where(valid_BW, valid_BW.cumsum(1) - 1, width)  # the rest goes to one surplus place
    packed = {}
    for name, parts in columns.items():
        values_BW = torch.cat(parts, 1)
        empty = values_BW.new_full((len(values_BW), width + 1), -1 if name == "modality" else 0)
        packed[name] = empty.scatter_(1, place_BW, values_BW)[:, :width]
    return {**packed, "valid": torch.arange(width, device=valid_BW.device) < valid_BW.sum(1, keepdim=True)}
