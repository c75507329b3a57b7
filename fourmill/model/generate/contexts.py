"""What the encoder is shown, and what it said: its output for a set of conditions is kept until one of them changes.

Conditions are whole modalities of B samples, or parts of grids (-1 marks a cell that is not known). A text that
guidance leaves out is shown as its first sentinel, a wholly masked text, as in ml-4m; a picture or grid left out shows
nothing.

Legend: B samples, N input tokens, L cells of a grid, T longest text, D width.
"""
# ruff: noqa: N815  (tensors carry shape suffixes, as fields too)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fourmill.model.batch import Inputs, compact
from fourmill.model.config import EOS, FIRST_SENTINEL
from fourmill.model.network import FourM

FIRST = FIRST_SENTINEL + 1  # [S_1]: [S_0] is never used, as in 4M


@dataclass(frozen=True)
class Context:
    """The encoder's output (B, R + N, D), R register tokens first, and which of the N other places are of a token,
    (B, N); N is 0 if nothing was shown."""

    context_BND: torch.Tensor
    valid_BN: torch.Tensor


@dataclass(frozen=True)
class Columns:
    """One modality as the encoder is shown it, int64 (B, W) each; `shown_BW`: bool. `dense`: pixels or vectors."""

    name: str
    ids_BW: torch.Tensor
    position_BW: torch.Tensor
    shown_BW: torch.Tensor
    dense: torch.Tensor | None = None


class Contexts:
    """The conditions of one batch, and the encoder's outputs for sets of them. `passes`: how often the encoder ran."""

    def __init__(self, model: FourM, given: Mapping[str, Any], size: int) -> None:
        self.model, self.device, self.size = model, model.mask_token.device, size
        self.passes = 0
        self._columns: dict[str, Columns] = {}
        self._outputs: dict[tuple[frozenset[str], frozenset[str]], Context] = {}
        for name, value in given.items():
            self.put(name, value)

    def put(self, name: str, value: Any) -> None:
        """A condition, in place of an earlier one of that name; outputs that it had part in are forgotten."""
        self._columns[name] = columns_of(self.model, name, value)
        self._outputs = {key: output for key, output in self._outputs.items() if name not in key[0]}

    def names(self) -> list[str]:
        """The conditions there are that the model can read."""
        return [name for name in self._columns if name in self.model.architecture.domains_in]

    def output(self, names: Sequence[str], dropped: Sequence[str] = (), extra: Columns | None = None) -> Context:
        """The encoder's output for the conditions `names`. `dropped`: conditions left out, of which texts leave their
        sentinel. `extra`: cells of the grid being generated; with them nothing is kept."""
        kinds = self.model.architecture.modalities
        masked = frozenset(name for name in dropped if kinds[name].kind == "sequence")
        key = (frozenset(names), masked)
        if extra is not None:
            return self._encode(*key, [extra])
        if key not in self._outputs:
            self._outputs[key] = self._encode(*key, [])
        return self._outputs[key]

    def _encode(self, names: frozenset[str], masked: frozenset[str], extra: list[Columns]) -> Context:
        # In the order of the architecture: a sum over inputs must not depend on how a set iterates.
        order = self.model.architecture.domains_in
        parts = [self._columns[name] for name in order if name in names]
        parts += [self._sentinel(name) for name in order if name in masked] + extra
        width = int(torch.cat([p.shown_BW for p in parts], 1).sum(1).max()) if parts else 0
        if not width and not self.model.architecture.num_register_tokens:
            shape = (self.size, 0, self.model.architecture.dim)
            nothing = torch.zeros(shape, device=self.device, dtype=self.model.mask_token.dtype)
            return Context(nothing, torch.ones(shape[:2], dtype=torch.bool, device=self.device))
        inputs = assemble(self.model, parts or [self._nothing()], max(width, 1))
        self.passes += 1
        return Context(self.model.encode(inputs), inputs.valid_BN)

    def _nothing(self) -> Columns:
        """A place without a token, for the registers to stand beside."""
        zeros_B1 = torch.zeros(self.size, 1, dtype=torch.long, device=self.device)
        return Columns(self.model.architecture.names[0], zeros_B1, zeros_B1, zeros_B1 > 0)

    def _sentinel(self, name: str) -> Columns:
        ids_B1 = torch.full((self.size, 1), FIRST, device=self.device)
        return Columns(name, ids_B1, torch.zeros_like(ids_B1), torch.ones_like(ids_B1, dtype=torch.bool))


def assemble(model: FourM, parts: Sequence[Columns], width: int) -> Inputs:
    """The encoder's dense batch, (B, width)."""
    names, kinds = model.architecture.names, model.architecture.modalities
    columns = {
        "ids": [p.ids_BW for p in parts],
        "position": [p.position_BW for p in parts],
        "modality": [torch.full_like(p.ids_BW, names.index(p.name)) for p in parts],
    }
    packed = compact(columns, [p.shown_BW for p in parts], width)
    dense = {p.name: p.dense for p in parts if p.dense is not None}
    pixels = {name: value for name, value in dense.items() if kinds[name].kind == "pixels"}
    vectors = {name: value for name, value in dense.items() if kinds[name].kind == "vectors"}
    return Inputs(
        packed["ids"], packed["position"], packed["modality"], packed["valid"], pixels or None, vectors=vectors or None
    )


def columns_of(model: FourM, name: str, value: Any) -> Columns:
    """`value` as the encoder is shown it. ValueError for another number of tokens, or ids beyond the vocabulary."""
    info, device = model.architecture.modalities[name], model.mask_token.device
    if info.kind == "sequence":
        texts = [[*torch.as_tensor(text).tolist(), EOS][: info.tokens] for text in value]
        _check_ids(name, [i for text in texts for i in text], 0, info.vocabulary)
        length_B = torch.tensor([len(text) for text in texts], device=device)
        rows = [torch.tensor(text) for text in texts]
        ids_BW = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        place_BW = torch.arange(ids_BW.shape[1], device=device).expand_as(ids_BW)
        return Columns(name, ids_BW, place_BW, place_BW < length_B[:, None])
    tensor = torch.as_tensor(value).to(device)
    if info.kind == "vectors":  # ids say which of the vectors; rows of zeros fill up what is short
        place_BW = torch.arange(tensor.shape[1], device=device).expand(tensor.shape[:2])
        return Columns(name, place_BW, place_BW, tensor.abs().sum(-1) > 0, tensor.float())
    pixels = tensor if info.kind == "pixels" else None
    ids_BW = tensor.long() if pixels is None else torch.zeros(len(tensor), info.tokens, dtype=torch.long, device=device)
    if ids_BW.shape[1] != info.tokens:
        raise ValueError(f"{name}: {ids_BW.shape[1]} tokens a sample, the model has {info.tokens}")
    _check_ids(name, ids_BW.flatten().tolist(), -1, max(info.vocabulary, 1))
    place_BW = torch.arange(info.tokens, device=device).expand_as(ids_BW)
    return Columns(name, ids_BW.clamp(min=0), place_BW, ids_BW >= 0, pixels)


def _check_ids(name: str, ids: Sequence[int], lowest: int, vocabulary: int) -> None:
    if ids and not lowest <= min(ids) <= max(ids) < vocabulary:
        raise ValueError(f"{name}: ids {min(ids)}..{max(ids)}; the model knows 0..{vocabulary - 1}")
