"""The 4M network: an encoder over any subset of tokens and a decoder that predicts masked ones.

Mizrahi et al. 2023, arXiv 2312.06647; Bachmann et al. 2024, arXiv 2406.09406. State-dict names and shapes are those of
the published checkpoints. Only tokens that are used are embedded, and logits are made only for the targets of each
modality. Where a batch brings its counts, nothing here makes a GPU's host wait. Every parameter has a gradient after
every backward pass, zero where a batch had no use for it.

Legend: B samples, N input tokens, M target tokens, D width, K tokens of one modality in the batch, V vocabulary,
P numbers in a patch of pixels, R register tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from fourmill.model.batch import Inputs, Targets
from fourmill.model.blocks import DecoderBlock, EncoderBlock, LayerNorm, as_bias, initialise
from fourmill.model.config import Architecture, ModalityInfo
from fourmill.model.loss import cross_entropy

PIXEL_MEAN = (0.485, 0.456, 0.406)  # ImageNet's, which 4M normalises RGB with
PIXEL_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Loss:
    """`total`: the modalities' cross-entropies in nats, weighted and summed, float32; it carries the gradient.

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
    """One modality on one side of the network: positions, the modality's own vector, and what its tokens hold."""

    pos_emb: torch.Tensor

    def __init__(self, name: str, info: ModalityInfo, dim: int, patch_size: int, output: bool) -> None:
        super().__init__()
        self.name, self.info, self.patch_size = name, info, patch_size
        self.mod_emb = nn.Parameter(torch.empty(1, 1, dim))
        if info.kind == "grid" and not info.has_layout:
            self.pos_emb = nn.Parameter(torch.empty(1, info.positions, dim))
        else:
            self.register_buffer("pos_emb", position_table(info, dim))
        if info.kind == "pixels":
            self.proj = nn.Linear(3 * patch_size**2, dim, bias=False)
            self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN), persistent=False)
            self.register_buffer("pixel_std", torch.tensor(PIXEL_STD), persistent=False)
        elif info.kind == "vectors":
            self.emb_proj = nn.Linear(info.width, dim)
        else:
            self.token_emb = nn.Embedding(info.vocabulary, dim)
        if output:
            self.to_logits = nn.Linear(dim, info.vocabulary, bias=False)

    def places(self, position_K: torch.Tensor) -> torch.Tensor:
        """(K, D): where the tokens stand and of which modality they are."""
        return functional.embedding(position_K, self.pos_emb[0]) + self.mod_emb[0]

    def content(
        self, ids_K: torch.Tensor, position_K: torch.Tensor, sample_K: torch.Tensor, inputs: Inputs
    ) -> torch.Tensor:
        """(K, D): what the tokens are."""
        out_KD: torch.Tensor
        if self.info.kind == "pixels":
            out_KD = self.proj(self._patches(sample_K, position_K, inputs.pixels_B3SS))
        elif self.info.kind == "vectors":
            vectors_BTV = (inputs.vectors or {}).get(self.name)
            if vectors_BTV is None and len(ids_K):
                raise ValueError(f"the inputs name tokens of {self.name!r} but hold no vectors of it")
            none_KV = self.emb_proj.weight.new_zeros(0, self.info.width)
            out_KD = self.emb_proj(none_KV if vectors_BTV is None else vectors_BTV[sample_K, ids_K])
        else:
            out_KD = self.token_emb(ids_K)
        return out_KD

    def _patches(
        self, sample_K: torch.Tensor, position_K: torch.Tensor, images: torch.Tensor | dict[str, torch.Tensor] | None
    ) -> torch.Tensor:
        """(K, P): the patches asked for, in the order row, column, channel; bytes are normalised, floats are so."""
        pixels = images.get(self.name) if isinstance(images, dict) else images
        if pixels is None and len(sample_K):
            raise ValueError("the inputs name patches of pixels but hold no pixels")
        if pixels is None:
            return self.proj.weight.new_zeros(0, self.proj.in_features)
        assert self.info.grid is not None
        side, columns = self.patch_size, self.info.grid[1]
        tiles = pixels.unflatten(3, (columns, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
        patches = tiles[sample_K, position_K // columns, position_K % columns]
        if not patches.is_floating_point():
            patches = (patches.float() / 255 - self.pixel_mean) / self.pixel_std
        return patches.flatten(1)


class FourM(nn.Module):
    """The network for one architecture. Modality numbers in batches count in `architecture.names`."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.encoder_embeddings = nn.ModuleDict(
            {n: Embedding(n, a.modalities[n], a.dim, a.patch_size, output=False) for n in a.domains_in}
        )
        self.decoder_embeddings = nn.ModuleDict(
            {n: Embedding(n, a.modalities[n], a.dim, a.patch_size, output=True) for n in a.domains_out}
        )
        self.mask_token = nn.Parameter(torch.empty(1, 1, a.dim))
        if a.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, a.num_register_tokens, a.dim))
        self.encoder = nn.ModuleList([EncoderBlock(a) for _ in range(a.encoder_depth)])
        self.encoder_norm = LayerNorm(a.dim, a.norm_bias)
        self.decoder_proj_context = nn.Linear(a.dim, a.dim)
        self.decoder = nn.ModuleList([DecoderBlock(a) for _ in range(a.decoder_depth)])
        self.decoder_norm = LayerNorm(a.dim, a.norm_bias)
        is_grid = [a.modalities[n].kind == "grid" and not a.decoder_causal_mask for n in a.names]
        self.register_buffer("sees_later", torch.tensor([*is_grid, False]), persistent=False)  # -1 takes the last
        self._initialise()
        self._share()

    def _initialise(self) -> None:
        initialise(self)
        drawn = ("mask_token", "register_tokens", "mod_emb", "pos_emb", "token_emb.weight", "to_logits.weight")
        for name, parameter in self.named_parameters():
            if name.endswith(drawn):
                nn.init.normal_(parameter, std=0.02)

    def _share(self) -> None:
        """One vector for a modality on both sides, and one matrix for its output tokens and logits."""
        for name, output in self.decoder_embeddings.items():
            if self.architecture.tie_logits:
                output.to_logits.weight = output.token_emb.weight  # type: ignore[union-attr]
            if name in self.encoder_embeddings and self.architecture.share_modality_embeddings:
                self.encoder_embeddings[name].mod_emb = output.mod_emb

    def forward(self, inputs: Inputs, targets: Targets, weights: torch.Tensor | None = None) -> Loss:
        """The training loss: the sum over `domains_out` of weight · summed cross-entropy of the modality.

        `weights`: float32, one for each of `domains_out`, on the model's device; None: the mean over the modalities
        that the batch asks for of their mean cross-entropy. Raises nothing on a batch without targets; its loss is 0.
        """
        hidden_BMD = self.decode(self.encode(inputs), None if inputs.is_full else inputs.valid_BN, targets)
        names = self.architecture.domains_out
        rows = self._rows(targets.modality_BM, targets.counts)
        present = sum(len(rows[n]) > 0 for n in names)
        total, sums = hidden_BMD.new_zeros((), dtype=torch.float32), {}
        for number, name in enumerate(names):
            index_K = rows[name]
            hidden_KD = hidden_BMD.flatten(0, 1).index_select(0, index_K)
            label_K = targets.label_BM.flatten()[index_K]
            nats = cross_entropy(hidden_KD, self.decoder_embeddings[name].to_logits.weight, label_K)
            total = total + nats * (1 / max(present * len(index_K), 1) if weights is None else weights[number])
            sums[name] = nats.detach()
        counts = {n: len(rows[n]) for n in names if len(rows[n])}
        return Loss(total, {n: sums[n] for n in counts}, counts)

    def encode(self, inputs: Inputs) -> torch.Tensor:
        """Context (B, R + N, D) for the decoder; register tokens stand first."""
        shape, rows = inputs.ids_BN.shape, self._rows(inputs.modality_BN, inputs.counts)
        places, contents, flat = [], [], []
        for name in self.architecture.domains_in:
            embedding, index_K = self.encoder_embeddings[name], rows[name]
            ids_K, position_K = inputs.ids_BN.flatten()[index_K], inputs.position_BN.flatten()[index_K]
            flat.append(index_K)
            places.append(embedding.places(position_K))
            contents.append(embedding.content(ids_K, position_K, index_K // shape[1], inputs))
        where_BND = _scatter(flat, places, shape)
        x_BND = where_BND + _scatter(flat, contents, shape)
        if registers := self.architecture.num_register_tokens:
            x_BND = torch.cat([self.register_tokens.expand(len(x_BND), -1, -1), x_BND], 1)
            where_BND = functional.pad(where_BND, (0, 0, registers, 0))
        mask = as_bias(self._visible(None if inputs.is_full else inputs.valid_BN), x_BND)
        for block in self.encoder:
            x_BND = block(x_BND, mask)
        context_BND: torch.Tensor = self.decoder_proj_context(self.encoder_norm(x_BND)) + where_BND
        return context_BND

    def decode(self, context_BND: torch.Tensor, valid_BN: torch.Tensor | None, targets: Targets) -> torch.Tensor:
        """Normalised hidden states (B, M, D), of which `logits` makes the predictions.

        `valid_BN`: which inputs there are, without register tokens; None: all.
        """
        shape, rows = targets.ids_BM.shape, self._rows(targets.modality_BM, targets.counts)
        queries, flat, unused = [], [], [self.mask_token[0, :0]]  # unused parameters are in the graph too
        for name in self.architecture.domains_out:
            embedding, index_K = self.decoder_embeddings[name], rows[name]
            places_KD = embedding.places(targets.position_BM.flatten()[index_K])
            ids_K, text = targets.ids_BM.flatten()[index_K], self.architecture.modalities[name].kind == "sequence"
            flat.append(index_K)
            queries.append(places_KD + (embedding.token_emb(ids_K) if text else self.mask_token[0]))
            if not (text or self.architecture.tie_logits):
                unused.append(embedding.token_emb(ids_K[:0]))
        x_BMD = _scatter(flat, [*queries, *unused], shape)
        mask, context_mask = as_bias(self._target_mask(targets), x_BMD), as_bias(self._visible(valid_BN), x_BMD)
        for block in self.decoder:
            x_BMD = block(x_BMD, context_BND, mask, context_mask)
        hidden_BMD: torch.Tensor = self.decoder_norm(x_BMD)
        return hidden_BMD

    def logits(self, hidden_KD: torch.Tensor, name: str) -> torch.Tensor:
        """(K, V) for targets of modality `name`."""
        out: torch.Tensor = self.decoder_embeddings[name].to_logits(hidden_KD)
        return out

    def _rows(self, modality_BN: torch.Tensor, counts: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
        """For each modality the places of its tokens in the flattened batch, in order, (K,)."""
        names, kind = self.architecture.names, modality_BN.flatten()
        if counts is None:
            counts = tuple(torch.bincount(kind + 1, minlength=len(names) + 1)[1:].tolist())
        # One sort of bytes for all modalities; places without a token, -1, come first.
        order = kind.to(torch.int8).argsort(stable=True)
        parts = order.split([len(kind) - sum(counts), *counts])
        return dict(zip(names, parts[1:], strict=True))

    def _target_mask(self, targets: Targets) -> torch.Tensor:
        """(B, 1, M, M): a target sees its own modality only: all of it in a grid, what came before in a text."""
        kind_BM = targets.modality_BM
        same_BMM = kind_BM[:, :, None] == kind_BM[:, None, :]  # places without a token see each other, harmlessly
        earlier_MM = torch.ones(kind_BM.shape[1], kind_BM.shape[1], dtype=torch.bool, device=kind_BM.device).tril()
        seen_BMM = earlier_MM | same_BMM & self.sees_later[kind_BM][:, :, None]
        return (seen_BMM & same_BMM if self.architecture.decoder_sep_mask else seen_BMM)[:, None]

    def _visible(self, valid_BN: torch.Tensor | None) -> torch.Tensor | None:
        """(B, 1, 1, R + N): what may be looked at; a sample without anything lets its first, empty place be seen."""
        if valid_BN is None or not valid_BN.shape[1] or (valid_BN.device.type == "cpu" and valid_BN.all()):
            return None  # attention without a mask is faster; on a GPU asking would cost more than it saves
        seen_BN = functional.pad(valid_BN, (self.architecture.num_register_tokens, 0), value=True)
        first_N = torch.arange(seen_BN.shape[1], device=seen_BN.device) == 0
        return (seen_BN | first_N & ~seen_BN.any(1, keepdim=True))[:, None, None, :]


def _scatter(index: list[torch.Tensor], values: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """Rows (K, D) of all modalities to their places in (B, N, D); zeros elsewhere."""
    rows_KD = torch.cat(values)
    out = rows_KD.new_zeros(shape.numel(), rows_KD.shape[1])
    return out.index_copy(0, torch.cat(index), rows_KD).unflatten(0, shape)
