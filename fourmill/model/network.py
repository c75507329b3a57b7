"""The 4M network: an encoder over any subset of tokens and a decoder that predicts masked ones.

Mizrahi et al. 2023, arXiv 2312.06647; Bachmann et al. 2024, arXiv 2406.09406. State-dict names and shapes are those of
the published checkpoints. Only tokens that are used are embedded, and logits are made only for the targets of each
modality.

Legend: B samples, N input tokens, M target tokens, D width, K tokens of one modality in the batch, V vocabulary,
P numbers in a patch of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from fourmill.model.batch import Inputs, Targets
from fourmill.model.blocks import DecoderBlock, EncoderBlock, LayerNorm, initialise
from fourmill.model.config import Architecture, ModalityInfo

PIXEL_MEAN = (0.485, 0.456, 0.406)  # ImageNet's, which 4M normalises RGB with
PIXEL_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Loss:
    """`total`: mean over the modalities in the batch of their mean cross-entropy, in nats; it carries the gradient.

    `sums`, `counts`: by modality, detached, over the batch's tokens; modalities without targets are left out.
    """

    total: torch.Tensor
    sums: dict[str, torch.Tensor]
    counts: dict[str, int]


def sincos(dim: int, position_N: torch.Tensor) -> torch.Tensor:
    """(N, dim): sines, then cosines, at frequencies from 1 down to nearly 1/10000."""
    frequency = 10_000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = position_N.double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1).float()


def position_table(info: ModalityInfo, dim: int) -> torch.Tensor:
    """(1, positions, dim). In two dimensions the first half of the width encodes the row, the second the column."""
    if info.grid is None:
        return sincos(dim, torch.arange(info.positions))[None]
    rows, columns = info.grid
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    return torch.cat([sincos(dim // 2, row), sincos(dim // 2, column)], 1)[None]


class Embedding(nn.Module):
    """One modality on one side of the network: positions, the modality's own vector, and its tokens or patches."""

    pos_emb: torch.Tensor

    def __init__(self, info: ModalityInfo, dim: int, patch_size: int, output: bool) -> None:
        super().__init__()
        self.info, self.patch_size = info, patch_size
        self.mod_emb = nn.Parameter(torch.empty(1, 1, dim))
        if info.kind == "grid" and info.grid is None:  # global tokens have no layout: positions are learned
            self.pos_emb = nn.Parameter(torch.empty(1, info.positions, dim))
        else:
            self.register_buffer("pos_emb", position_table(info, dim))
        if info.kind == "pixels":
            self.proj = nn.Linear(3 * patch_size**2, dim, bias=False)
        else:
            self.token_emb = nn.Embedding(info.vocabulary, dim)
        if output:
            self.to_logits = nn.Linear(dim, info.vocabulary, bias=False)

    def places(self, position_K: torch.Tensor) -> torch.Tensor:
        """(K, D): where the tokens stand and of which modality they are."""
        return self.pos_emb[0, position_K] + self.mod_emb[0]

    def content(
        self, ids_K: torch.Tensor, sample_K: torch.Tensor, position_K: torch.Tensor, pixels: torch.Tensor | None
    ) -> torch.Tensor:
        """(K, D): what the tokens are."""
        if self.info.kind != "pixels":
            embedded: torch.Tensor = self.token_emb(ids_K)
            return embedded
        if pixels is None and len(ids_K):
            raise ValueError("the inputs name patches of pixels but hold no pixels")
        none_KP = self.proj.weight.new_zeros(0, self.proj.in_features)
        projected: torch.Tensor = self.proj(none_KP if pixels is None else self._patches(sample_K, position_K, pixels))
        return projected

    def _patches(self, sample_K: torch.Tensor, position_K: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """(K, P): the patches asked for, in the order row, column, channel; bytes are normalised, floats are so."""
        assert self.info.grid is not None
        side, columns = self.patch_size, self.info.grid[1]
        tiles = pixels.unflatten(3, (columns, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
        patches = tiles[sample_K, position_K // columns, position_K % columns]
        if not patches.is_floating_point():
            mean, std = (torch.tensor(v, device=pixels.device) for v in (PIXEL_MEAN, PIXEL_STD))
            patches = (patches.float() / 255 - mean) / std
        return patches.flatten(1)


class FourM(nn.Module):
    """The network for one architecture. Modality numbers in batches count in `architecture.names`."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        shape = (a.dim, a.num_heads, a.mlp_ratio, a.gated_mlp, a.qk_norm)
        self.encoder_embeddings = nn.ModuleDict(
            {n: Embedding(a.modalities[n], a.dim, a.patch_size, output=False) for n in a.domains_in}
        )
        self.decoder_embeddings = nn.ModuleDict(
            {n: Embedding(a.modalities[n], a.dim, a.patch_size, output=True) for n in a.domains_out}
        )
        self.mask_token = nn.Parameter(torch.empty(1, 1, a.dim))
        self.encoder = nn.ModuleList([EncoderBlock(*shape) for _ in range(a.encoder_depth)])
        self.encoder_norm = LayerNorm(a.dim)
        self.decoder_proj_context = nn.Linear(a.dim, a.dim)
        self.decoder = nn.ModuleList([DecoderBlock(*shape) for _ in range(a.decoder_depth)])
        self.decoder_norm = LayerNorm(a.dim)
        self._is_text = [a.modalities[n].kind == "sequence" for n in a.names]
        self._initialise()
        self._share()

    def _initialise(self) -> None:
        initialise(self)
        for name, parameter in self.named_parameters():
            if name == "mask_token" or name.endswith(("mod_emb", "pos_emb", "token_emb.weight", "to_logits.weight")):
                nn.init.normal_(parameter, std=0.02)

    def _share(self) -> None:
        """One vector for a modality on both sides, and one matrix for its output tokens and logits."""
        for name, output in self.decoder_embeddings.items():
            if self.architecture.tie_logits:
                output.to_logits.weight = output.token_emb.weight  # type: ignore[union-attr]
            if name in self.encoder_embeddings and self.architecture.share_modality_embeddings:
                self.encoder_embeddings[name].mod_emb = output.mod_emb

    def forward(self, inputs: Inputs, targets: Targets) -> Loss:
        """The training loss. Raises nothing on a batch without targets; its loss is 0."""
        hidden_BMD = self.decode(self.encode(inputs), inputs.valid_BN, targets)
        losses, sums, counts = [], {}, {}
        for name in self.architecture.domains_out:
            chosen_BM = self._chosen(targets.modality_BM, name)
            if count := int(chosen_BM.sum()):
                logits_KV = self.logits(hidden_BMD[chosen_BM], name)
                losses.append(functional.cross_entropy(logits_KV.float(), targets.label_BM[chosen_BM]))
                sums[name], counts[name] = losses[-1].detach() * count, count
        total = torch.stack(losses).mean() if losses else hidden_BMD.sum() * 0.0
        return Loss(total, sums, counts)

    def encode(self, inputs: Inputs) -> torch.Tensor:
        """Context (B, N, D) for the decoder."""
        shape = inputs.ids_BN.shape
        places, contents, flat = [], [], []
        for name in self.architecture.domains_in:
            index_K = self._chosen(inputs.modality_BN, name).flatten().nonzero()[:, 0]
            embedding = self.encoder_embeddings[name]
            position_K = inputs.position_BN.flatten()[index_K]
            ids_K, sample_K = inputs.ids_BN.flatten()[index_K], index_K // shape[1]
            flat.append(index_K)
            places.append(embedding.places(position_K))
            contents.append(embedding.content(ids_K, sample_K, position_K, inputs.pixels_B3SS))
        where_BND = _scatter(flat, places, shape)
        x_BND = where_BND + _scatter(flat, contents, shape)
        mask = _visible(inputs.valid_BN)
        for block in self.encoder:
            x_BND = block(x_BND, mask)
        context_BND: torch.Tensor = self.decoder_proj_context(self.encoder_norm(x_BND)) + where_BND
        return context_BND

    def decode(self, context_BND: torch.Tensor, valid_BN: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Normalised hidden states (B, M, D), of which `logits` makes the predictions."""
        shape = targets.ids_BM.shape
        queries, flat = [], []
        for name in self.architecture.domains_out:
            index_K = self._chosen(targets.modality_BM, name).flatten().nonzero()[:, 0]
            embedding = self.decoder_embeddings[name]
            places_KD = embedding.places(targets.position_BM.flatten()[index_K])
            text = self.architecture.modalities[name].kind == "sequence"
            known = embedding.token_emb(targets.ids_BM.flatten()[index_K]) if text else self.mask_token[0]
            flat.append(index_K)
            queries.append(places_KD + known)
        x_BMD = _scatter(flat, queries, shape)
        mask, context_mask = self._target_mask(targets), _visible(valid_BN)
        for block in self.decoder:
            x_BMD = block(x_BMD, context_BND, mask, context_mask)
        hidden_BMD: torch.Tensor = self.decoder_norm(x_BMD)
        return hidden_BMD

    def logits(self, hidden_KD: torch.Tensor, name: str) -> torch.Tensor:
        """(K, V) for targets of modality `name`."""
        out: torch.Tensor = self.decoder_embeddings[name].to_logits(hidden_KD)
        return out

    def _chosen(self, modality: torch.Tensor, name: str) -> torch.Tensor:
        return modality == self.architecture.names.index(name)

    def _target_mask(self, targets: Targets) -> torch.Tensor:
        """(B, 1, M, M): a target sees its own modality only: all of it in a grid, what came before in a text."""
        kind_BM = targets.modality_BM
        same_BMM = kind_BM[:, :, None] == kind_BM[:, None, :]  # places without a token see each other, harmlessly
        is_text = torch.tensor([*self._is_text, False], device=kind_BM.device)[kind_BM]  # -1 takes the last
        earlier_MM = torch.ones(kind_BM.shape[1], kind_BM.shape[1], dtype=torch.bool, device=kind_BM.device).tril()
        return (same_BMM & (earlier_MM | ~is_text[:, :, None]))[:, None]


def _visible(valid_BN: torch.Tensor) -> torch.Tensor | None:
    """(B, 1, 1, N): which inputs may be looked at; a sample without any lets its first, empty place be seen."""
    if valid_BN.device.type == "cpu" and valid_BN.all():
        return None  # attention without a mask is faster; on a GPU asking would cost more than it saves
    seen_BN = valid_BN.clone()
    seen_BN[:, 0] |= ~valid_BN.any(1)
    return seen_BN[:, None, None, :]


def _scatter(index: list[torch.Tensor], values: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """Rows (K, D) of all modalities to their places in (B, N, D); zeros elsewhere."""
    rows_KD = torch.cat(values)
    out = rows_KD.new_zeros(shape.numel(), rows_KD.shape[1])
    return out.index_copy(0, torch.cat(index), rows_KD).unflatten(0, shape)
