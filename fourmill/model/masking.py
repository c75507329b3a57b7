"""Masking: which tokens of a batch the encoder sees and which the decoder must predict (4M, sections 2.2 and 2.3).

The whole batch is masked at once, on the device where it lies, with one explicit generator: equal seeds, equal masks.
No token is both shown and asked for, and no sample exceeds its budgets. Budgets are shared out by a Dirichlet draw over
the modalities that a sample has; what a modality cannot use goes to the others in the same proportions, so that
budgets are filled where there are tokens to fill them.

Legend: B samples, K mixtures, D modalities, N input tokens, M target tokens, L cells of a grid, T longest text,
R = all texts of the batch, text modality by text modality, C = columns of all modalities side by side.
"""
# ruff: noqa: N815  (tensors carry shape suffixes, as fields too)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import torch

from fourmill.model.batch import Inputs, RawBatch, Targets
from fourmill.model.budgets import Share, log_dirichlet
from fourmill.model.config import Architecture, MaskingConfig
from fourmill.model.config.masking import ModalityMasking
from fourmill.model.spans import Spans, cut_targets, draw_drops, mask_spans, random_bits, with_end


def random_order(out: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fill each row of `out`, int32 (B, L), with a random permutation of 0 … L - 1.

    Rows of random numbers whose low bits are the positions, sorted: with 23 random bits beside 196 positions one row in
    400 holds a tie, which goes to the lower position.
    """
    length = out.shape[1]
    low = (1 << (length - 1).bit_length()) - 1
    torch.bitwise_and(random_bits(out.shape, torch.int32, generator), ~low, out=out)
    out.bitwise_or_(torch.arange(length, dtype=torch.int32, device=out.device))
    if out.device.type == "cpu":
        # numpy sorts 196 integers with vector instructions in 0.2 µs; torch, which tracks indices, in 5 µs.
        out.numpy().sort(axis=1)
    else:
        out.copy_(out.sort(1).values)
    return out.bitwise_and_(low)


@dataclass(frozen=True)
class _Constants:
    """What the configuration says of the D modalities, on one device; X counts those that are texts, E one more."""

    weight_K: torch.Tensor
    alpha_2KD: torch.Tensor
    least_2D: torch.Tensor
    most_2D: torch.Tensor
    tokens_D: torch.Tensor
    is_text_E: torch.Tensor
    text_X: torch.Tensor
    chunk_X: torch.Tensor

    def rows(self, budget_BD: torch.Tensor) -> torch.Tensor:
        """The columns of texts, one below the other, (R,)."""
        return budget_BD.index_select(1, self.text_X).T.reshape(-1)

    def with_texts(self, budget_BD: torch.Tensor, text_R: torch.Tensor) -> torch.Tensor:
        """`budget_BD` with the columns of texts replaced."""
        return budget_BD.index_copy(1, self.text_X, text_R.view(len(self.text_X), len(budget_BD)).T)


# The probability with which a text's tokens are kept, from a uniform number for each text.
_KEEP: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "random": lambda uniform_B: uniform_B,
    "all": torch.ones_like,
    "none": torch.zeros_like,
    "binary": torch.round,
}


@dataclass(frozen=True)
class _Texts:
    """All texts of a batch with their end markers, int64: `ids_RT`; `length_R` is 0 where a text is missing."""

    ids_RT: torch.Tensor
    length_R: torch.Tensor


class Masker:
    """Masks batches for one architecture. Cheap to construct; between calls it keeps constants only."""

    def __init__(self, architecture: Architecture, config: MaskingConfig) -> None:
        config.check(architecture.domains_in, architecture.domains_out)
        self.config, self.names = config, architecture.names
        self.infos = [architecture.modalities[n] for n in self.names]
        if vectors := [n for n, i in zip(self.names, self.infos, strict=True) if i.kind == "vectors"]:
            raise ValueError(f"{vectors[0]!r} enters as embeddings, which token shards do not hold; leave it out")
        self.text = [d for d, i in enumerate(self.infos) if i.kind == "sequence"]
        self.own = [config.modalities.get(n, ModalityMasking()) for n in self.names]
        self._constants = {torch.device("cpu"): self._describe(architecture.domains_in, architecture.domains_out)}

    def _describe(self, inside: Sequence[str], outside: Sequence[str]) -> _Constants:
        mixtures, unlimited = self.config.mixtures, max(i.tokens for i in self.infos)
        inputs = [[m.input_alphas.get(n, m.input_default) * (n in inside) for n in self.names] for m in mixtures]
        targets = [[m.target_alphas.get(n, m.target_default) * (n in outside) for n in self.names] for m in mixtures]
        most = [[unlimited if b is None else b for b in (m.max_input, m.max_target)] for m in self.own]
        sides = [[n in inside, n in outside] for n in self.names]
        return _Constants(
            weight_K=torch.tensor([m.weight for m in mixtures], dtype=torch.float64),
            alpha_2KD=torch.tensor([inputs, targets], dtype=torch.float64),
            least_2D=torch.tensor([[m.min_input, m.min_target] for m in self.own]).T,
            most_2D=(torch.tensor(most) * torch.tensor(sides)).T,
            tokens_D=torch.tensor([i.tokens for i in self.infos]),
            is_text_E=torch.tensor([*(d in self.text for d in range(len(self.infos))), False]),
            text_X=torch.tensor(self.text, dtype=torch.long),
            chunk_X=torch.tensor([self.own[d].chunk for d in self.text], dtype=torch.long),
        )

    def _on(self, device: torch.device) -> _Constants:
        if device not in self._constants:
            cpu = self._constants[torch.device("cpu")]
            self._constants[device] = _Constants(**{f.name: getattr(cpu, f.name).to(device) for f in fields(cpu)})
        return self._constants[device]

    def __call__(self, batch: RawBatch, generator: torch.Generator) -> tuple[Inputs, Targets]:
        """Masks for a batch on `generator`'s device: (B, num_input_tokens) and (B, num_target_tokens)."""
        count, c = len(batch), self.config
        k = self._on(next(iter(batch.present.values())).device)
        texts = self._texts(batch)
        size_BD = self._sizes(batch, texts, k)
        mixture_B = self._choose(size_BD, k, generator)

        share = self._share(0, mixture_B, (c.min_input_tokens, c.num_input_tokens), k, generator)
        shown_BD = share(size_BD)
        spans = self._spans(texts, k.rows(shown_BD), k, generator)
        used_BD = k.with_texts(shown_BD, spans.input_len_B)
        shown_BD = share(torch.where(k.is_text_E[:-1], used_BD, size_BD), used_BD)

        share = self._share(1, mixture_B, (c.min_target_tokens, c.num_target_tokens), k, generator)
        slots_R = torch.minimum(spans.slots_B, k.tokens_D[k.text_X].repeat_interleave(count))
        left_BD = k.with_texts(size_BD - shown_BD, slots_R)
        asked_BD = share(left_BD)
        start_R, count_R = cut_targets(spans, k.rows(asked_BD), generator)
        used_BD = k.with_texts(asked_BD, count_R)
        asked_BD = share(torch.where(k.is_text_E[:-1], used_BD, left_BD), used_BD)

        columns = self._columns(batch, spans, generator)
        start_BD = k.with_texts(shown_BD, start_R)  # where targets begin: after what is shown, or at a sentinel
        return self._inputs(batch, columns, shown_BD), self._targets(columns, start_BD, asked_BD, k)

    def _texts(self, batch: RawBatch) -> _Texts:
        ended = [
            with_end(batch.tokens[n].long(), batch.lengths[n], self.infos[d].tokens)
            for d, n in ((d, self.names[d]) for d in self.text)
        ]
        width = max((ids.shape[1] for ids, _ in ended), default=1)
        device = next(iter(batch.present.values())).device
        none = torch.zeros(0, width, dtype=torch.long, device=device)
        ids = [torch.nn.functional.pad(ids, (0, width - ids.shape[1])) for ids, _ in ended]
        length = [n * batch.present[self.names[d]] for (_, n), d in zip(ended, self.text, strict=True)]
        return _Texts(torch.cat([none, *ids]), torch.cat([none[:, 0], *length]))

    def _sizes(self, batch: RawBatch, texts: _Texts, k: _Constants) -> torch.Tensor:
        """Tokens that each sample has of each modality, int64 (B, D)."""
        present_BD = torch.stack([batch.present[n] for n in self.names], 1)
        return k.with_texts(present_BD * k.tokens_D, texts.length_R)

    @staticmethod
    def _choose(size_BD: torch.Tensor, k: _Constants, generator: torch.Generator) -> torch.Tensor:
        """A mixture for each sample, among those that give it both an input and a target."""
        both_2BK = (size_BD > 0).double() @ (k.alpha_2KD > 0).double().transpose(1, 2)
        weight_BK = k.weight_K * (both_2BK > 0).all(0)
        # A sample without any such mixture gets the first one, and then neither inputs nor targets.
        weight_BK[:, 0] += (weight_BK.sum(1) == 0).double()
        return torch.multinomial(weight_BK, 1, generator=generator)[:, 0]

    @staticmethod
    def _share(
        side: int, mixture_B: torch.Tensor, total: tuple[int | None, int], k: _Constants, generator: torch.Generator
    ) -> Share:
        least, most = total[1] if total[0] is None else total[0], total[1]
        return Share(
            log_dirichlet(k.alpha_2KD[side][mixture_B], generator),
            torch.randint(least, most + 1, mixture_B.shape, generator=generator, device=mixture_B.device),
            k.least_2D[side],
            k.most_2D[side],
            generator,
        )

    def _spans(self, texts: _Texts, budget_R: torch.Tensor, k: _Constants, generator: torch.Generator) -> Spans:
        own = [self.own[d] for d in self.text]
        uniform_R = torch.rand(len(budget_R), generator=generator, device=budget_R.device)
        drawn = [_KEEP[m.keep](u) for m, u in zip(own, uniform_R.chunk(max(len(own), 1)), strict=False)]
        count = len(budget_R) // max(len(own), 1)
        dropped_RT = draw_drops(
            texts.length_R,
            budget_R,
            torch.cat([uniform_R[:0], *drawn]),
            texts.ids_RT.shape[1],
            self.config.num_sentinels - 2,  # [S_0] is not used, and the target needs one more than runs
            generator,
            k.chunk_X.repeat_interleave(count) if any(m.chunk > 1 for m in own) else None,
        )
        return mask_spans(texts.ids_RT, texts.length_R, dropped_RT, budget_R == 0)

    def _columns(self, batch: RawBatch, spans: Spans, generator: torch.Generator) -> _Columns:
        count, texts = len(batch), len(self.text)
        shown, asked = spans.input_BT.split(count), spans.target_BW.split(count)[:texts]
        none = spans.input_BT.new_zeros(()).expand(count, 1)  # of pixels there are positions only
        blocks = [
            shown[self.text.index(d)]
            if d in self.text
            else none.expand(count, info.tokens)
            if info.kind == "pixels"
            else batch.tokens[name]
            for d, (name, info) in enumerate(zip(self.names, self.infos, strict=True))
        ]
        starts = list(accumulate((b.shape[1] for b in (*blocks, *asked)), initial=0))
        empty = max(self.config.num_input_tokens, self.config.num_target_tokens)
        ids_BC = torch.empty(count, starts[-1] + empty, dtype=torch.int32, device=none.device)
        order_BC = torch.empty_like(ids_BC)
        ids_BC[:, starts[-1] :] = order_BC[:, starts[-1] :] = 0
        place_C = torch.arange(max(b.shape[1] for b in (*blocks, *asked)), dtype=torch.int32, device=none.device)
        for d, (block, start) in enumerate(zip((*blocks, *asked), starts, strict=False)):
            columns = slice(start, start + block.shape[1])
            ids_BC[:, columns] = block
            if d in self.text or d >= len(blocks):
                order_BC[:, columns] = place_C[: block.shape[1]]
            else:
                random_order(order_BC[:, columns], generator)
        first = starts[: len(blocks)]
        behind = dict(zip(self.text, starts[len(blocks) :], strict=False))
        asked_first = [behind.get(d, start) for d, start in enumerate(first)]
        first_2E = torch.tensor([[*first, starts[-1]], [*asked_first, starts[-1]]])
        return _Columns(ids_BC, order_BC, first_2E.to(none.device, non_blocking=True))

    def _inputs(self, batch: RawBatch, columns: _Columns, shown_BD: torch.Tensor) -> Inputs:
        slots = _Slots.of(shown_BD, self.config.num_input_tokens)
        first_BN = slots.of_modality(columns.first_2E[0])
        position_BN = columns.order_BC.gather(1, first_BN + slots.rank_BW).long()
        ids_BN = columns.ids_BC.gather(1, first_BN + position_BN).long()
        modality_BN, valid_BN = slots.modality_and_valid()
        return Inputs(ids_BN, position_BN, modality_BN, valid_BN, pixels_B3SS=batch.pixels, counts=_counts(shown_BD))

    def _targets(self, columns: _Columns, start_BD: torch.Tensor, asked_BD: torch.Tensor, k: _Constants) -> Targets:
        """A cell of a grid is asked for as such; in a text each id is given and the next one asked for."""
        slots = _Slots.of(asked_BD, self.config.num_target_tokens)
        first_BM, text_BM = slots.of_modality(columns.first_2E[1]), slots.of_modality(k.is_text_E)
        start_BM = torch.nn.functional.pad(start_BD, (0, 1)).gather(1, slots.number_BW)
        place_BM = columns.order_BC.gather(1, first_BM + start_BM + slots.rank_BW).long()
        given_BM = columns.ids_BC.gather(1, first_BM + place_BM).long() * text_BM
        label_BM = columns.ids_BC.gather(1, first_BM + place_BM + text_BM).long()
        position_BM = torch.where(text_BM, slots.rank_BW, place_BM)
        modality_BM, valid_BM = slots.modality_and_valid()
        return Targets(given_BM, position_BM, modality_BM, valid_BM, label_BM, counts=_counts(asked_BD))


@dataclass(frozen=True)
class _Columns:
    """All modalities side by side, texts once as they are shown and once as they are asked for, and zeros at the end.

    `ids_BC`, `order_BC`: int32; modality d begins at `first_2E[0, d]` as an input and at `first_2E[1, d]` as a target,
    and its tokens are taken in the order given. E: D modalities, and the zeros that fill empty places.
    """

    ids_BC: torch.Tensor
    order_BC: torch.Tensor
    first_2E: torch.Tensor


@dataclass(frozen=True)
class _Slots:
    """Places of a dense row, filled modality by modality: the modality's number (D where empty) and which of its tokens
    stands there."""

    number_BW: torch.Tensor
    rank_BW: torch.Tensor
    none: int

    @classmethod
    def of(cls, count_BD: torch.Tensor, width: int) -> _Slots:
        end_BD = count_BD.cumsum(1)
        place_BW = torch.arange(width, device=count_BD.device).expand(len(count_BD), width)
        number_BW = torch.searchsorted(end_BD, place_BW.contiguous(), right=True)
        begin_BE = torch.nn.functional.pad(end_BD, (1, 0))
        return cls(number_BW, place_BW - begin_BE.gather(1, number_BW), count_BD.shape[1])

    def of_modality(self, value_E: torch.Tensor) -> torch.Tensor:
        """At each place the value that its modality has."""
        return value_E.expand(len(self.number_BW), -1).gather(1, self.number_BW)

    def modality_and_valid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The modality's number, -1 where empty; and where it is not."""
        valid_BW = self.number_BW < self.none
        return self.number_BW.where(valid_BW, -1), valid_BW


def _counts(budget_BD: torch.Tensor) -> tuple[int, ...]:
    return tuple(budget_BD.sum(0).tolist())
