"""How likely the model finds given tokens: loss and accuracy on held-out samples, and how sure it is of what it said.

Every modality asked for is predicted whole from whole inputs: all cells of a grid at once, each token of a text from
those before it. That is the first step of generation, and the masking in which nothing of the target is shown.

Legend: B samples, N input tokens, M target tokens, T longest text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fourmill.model.batch import Inputs, Targets, compact
from fourmill.model.config import EOS, FIRST_SENTINEL, PIXELS
from fourmill.model.network import FourM

_FIRST, _LAST = FIRST_SENTINEL + 1, FIRST_SENTINEL + 2  # what a wholly hidden text's target begins and ends with


@dataclass(frozen=True)
class Forced:
    """Of one sample's tokens of a modality: log-probabilities float32 (M,), and which were the likeliest, bool (M,)."""

    log_probability: np.ndarray
    likeliest: np.ndarray


@torch.no_grad()
def context_of(model: FourM, given: Mapping[str, Sequence[np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Context (B, N, D) and valid mask (B, N) of modalities shown whole: `rgb` as uint8 (3, S, S), else ids (n,)."""
    device = model.mask_token.device
    columns: dict[str, list[torch.Tensor]] = {"ids": [], "position": [], "modality": []}
    valid = []
    for name, rows in given.items():
        info = model.architecture.modalities[name]
        if name == PIXELS:
            rows = [np.zeros(info.tokens, np.int64)] * len(rows)  # noqa: PLW2901  (their places; content: pixels)
        if info.kind == "sequence":
            rows = [np.append(row.astype(np.int64), EOS)[: info.tokens] for row in rows]  # noqa: PLW2901
        ids, shown = _padded(rows)
        columns["ids"].append(ids)
        columns["position"].append(torch.arange(ids.shape[1]).expand_as(ids))
        columns["modality"].append(torch.full_like(ids, model.architecture.names.index(name)))
        valid.append(shown)
    packed = compact(columns, valid, int(torch.cat(valid, 1).sum(1).max()))
    pixels = torch.from_numpy(np.stack(given[PIXELS])) if PIXELS in given else None
    inputs = Inputs(packed["ids"], packed["position"], packed["modality"], packed["valid"], pixels).to(device)
    return model.encode(inputs), inputs.valid_BN


def labels_of(model: FourM, name: str, ids: np.ndarray) -> np.ndarray:
    """What is to be predicted: a grid's ids; a text with its end marker, as in training when all of it is hidden."""
    info = model.architecture.modalities[name]
    if info.kind == "grid":
        return ids.astype(np.int64)
    return np.append(np.append(ids.astype(np.int64), EOS)[: info.tokens], _LAST)


@torch.no_grad()
def forced(
    model: FourM, context_BND: torch.Tensor, valid_BN: torch.Tensor, name: str, rows: Sequence[np.ndarray | None]
) -> list[Forced | None]:
    """How likely each sample's row of ids of modality `name` is; None for None."""
    there = [i for i, row in enumerate(rows) if row is not None]
    found: list[Forced | None] = [None] * len(rows)
    if not there:
        return found
    label_BM, shown_BM = _padded([labels_of(model, name, row) for row in rows if row is not None])
    label_BM, shown_BM = label_BM.to(context_BND.device), shown_BM.to(context_BND.device)
    ids_BM = torch.zeros_like(label_BM)
    if model.architecture.modalities[name].kind == "sequence":
        ids_BM[:, 0], ids_BM[:, 1:] = _FIRST, label_BM[:, :-1]
    position_BM = torch.arange(label_BM.shape[1], device=label_BM.device).expand_as(label_BM)
    kind_BM = torch.where(shown_BM, model.architecture.names.index(name), -1)
    asked = Targets(ids_BM, torch.where(shown_BM, position_BM, 0), kind_BM, shown_BM, label_BM)
    hidden_BMD = model.decode(context_BND[there], valid_BN[there], asked)
    logits_KV = model.logits(hidden_BMD[shown_BM], name).float()
    label_K = label_BM[shown_BM]
    log_K = logits_KV.log_softmax(-1).gather(1, label_K[:, None])[:, 0].cpu().numpy()
    best_K = (logits_KV.argmax(-1) == label_K).cpu().numpy()
    ends = np.cumsum(shown_BM.sum(1).cpu().numpy())
    for i, start, end in zip(there, [0, *ends[:-1]], ends, strict=True):
        found[i] = Forced(log_K[start:end], best_K[start:end])
    return found


def _padded(rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 (B, T) with zeros after the end, and which are there."""
    length_B = torch.tensor([len(row) for row in rows])
    ids_BT = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row.astype(np.int64)) for row in rows], batch_first=True)
    return ids_BT, torch.arange(ids_BT.shape[1]) < length_B[:, None]
