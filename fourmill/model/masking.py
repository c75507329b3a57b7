"""Masking: which tokens of a batch the encoder sees and which the decoder must predict (4M, sections 2.2 and 2.3).

The whole batch is masked at once, on the device where it lies, with one explicit generator: equal seeds, equal masks.
No token is both shown and asked for, and no sample exceeds its budgets. Budgets are shared out by a Dirichlet draw over
the modalities that a sample has; what a modality cannot use goes to the others in the same proportions, so that
budgets are filled where there are tokens to fill them.

Legend: B samples, K mixtures, D modalities, N input tokens, M target tokens, L cells of a grid, T longest text.
"""

from __future__ import annotations

import torch

from fourmill.model.batch import Inputs, RawBatch, Targets, compact
from fourmill.model.config import Architecture, MaskingConfig
from fourmill.model.spans import Spans, cut_targets, draw_drops, mask_spans, with_end


def log_dirichlet(alpha_BD: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Logarithms of unnormalised Dirichlet draws, -inf where alpha is 0; float64.

    Drawn as Gamma(a + 1) · U^(1/a) in logarithms, because Gamma(0.01) itself is mostly below the smallest double.
    """
    safe_BD = alpha_BD.clamp(min=1e-9)
    # The public Gamma distribution takes no generator; this is the sampler below it.
    gamma_BD = torch._standard_gamma(safe_BD + 1, generator=generator)
    uniform_BD = torch.rand(alpha_BD.shape, generator=generator, dtype=alpha_BD.dtype, device=alpha_BD.device)
    return (gamma_BD.log() + uniform_BD.log() / safe_BD).masked_fill(alpha_BD == 0, -torch.inf)


def fill(
    budget_BD: torch.Tensor,
    logits_BD: torch.Tensor,
    total_B: torch.Tensor,
    cap_BD: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Raise budgets to a total of `total_B`, in proportion to exp(logits), none above its cap; int64 (B, D).

    Fractions are rounded at random so that each expectation is exact (systematic sampling). Each round fills the
    total or meets another cap, so there are at most D rounds.
    """
    for _ in range(budget_BD.shape[1]):
        left_B = (total_B - budget_BD.sum(1)).clamp(min=0)
        open_BD = (budget_BD < cap_BD) & logits_BD.isfinite()
        share_BD = torch.softmax(logits_BD.masked_fill(~open_BD, -torch.inf), 1).nan_to_num(0.0)
        edges_BD = (share_BD * left_B[:, None]).cumsum(1)
        offset_B1 = torch.rand(len(left_B), 1, generator=generator, dtype=edges_BD.dtype, device=edges_BD.device)
        marks_BD = (edges_BD + offset_B1).floor()
        add_BD = torch.diff(marks_BD, dim=1, prepend=torch.zeros_like(offset_B1)).long()
        budget_BD = torch.minimum(budget_BD + add_BD, cap_BD)
    return budget_BD


class _Side:
    """Columns for `compact`, gathered modality by modality; `number` is that of the one at hand."""

    def __init__(self, *names: str) -> None:
        self.columns: dict[str, list[torch.Tensor]] = {name: [] for name in (*names, "modality")}
        self.valid: list[torch.Tensor] = []
        self.number = torch.tensor(-1)

    def add(self, valid: torch.Tensor, **columns: torch.Tensor) -> None:
        self.valid.append(valid)
        for name, column in {**columns, "modality": self.number}.items():
            self.columns[name].append(column.expand_as(valid))


class Masker:
    """Masks batches for one architecture. Cheap to construct; holds no state between calls."""

    def __init__(self, architecture: Architecture, config: MaskingConfig) -> None:
        config.check(architecture.domains_in, architecture.domains_out)
        self.config, self.names = config, architecture.names
        self.infos = [architecture.modalities[n] for n in self.names]
        inside, outside = architecture.domains_in, architecture.domains_out
        self.readable = torch.tensor([n in inside for n in self.names])
        self.predictable = torch.tensor([n in outside for n in self.names])
        self.text = torch.tensor([i.kind == "sequence" for i in self.infos])
        self.weight_K = torch.tensor([m.weight for m in config.mixtures], dtype=torch.float64)
        inputs = [[m.input_alphas.get(n, m.input_default) * (n in inside) for n in self.names] for m in config.mixtures]
        targets = [
            [m.target_alphas.get(n, m.target_default) * (n in outside) for n in self.names] for m in config.mixtures
        ]
        self.alpha_in_KD = torch.tensor(inputs, dtype=torch.float64)
        self.alpha_out_KD = torch.tensor(targets, dtype=torch.float64)

    def __call__(self, batch: RawBatch, generator: torch.Generator) -> tuple[Inputs, Targets]:
        """Masks for a batch on `generator`'s device: (B, num_input_tokens) and (B, num_target_tokens)."""
        device = next(iter(batch.present.values())).device
        readable, predictable, text = (t.to(device) for t in (self.readable, self.predictable, self.text))
        ends = self._with_end(batch)
        size_BD = self._sizes(batch, ends)
        mixture_B = self._choose(size_BD, generator)

        logits_BD = log_dirichlet(self.alpha_in_KD.to(device)[mixture_B], generator)
        total_B = self._total(self.config.min_input_tokens, self.config.num_input_tokens, size_BD, generator)
        cap_BD = size_BD * readable
        shown_BD = fill(torch.zeros_like(size_BD), logits_BD, total_B, cap_BD, generator)
        spans = {d: self._spans(*ends[d], shown_BD[:, d], generator) for d in ends}
        used_BD = self._used({d: s.input_len_B for d, s in spans.items()}, shown_BD)
        shown_BD = fill(used_BD, logits_BD, total_B, torch.where(text, used_BD, cap_BD), generator)

        logits_BD = log_dirichlet(self.alpha_out_KD.to(device)[mixture_B], generator)
        total_B = self._total(self.config.min_target_tokens, self.config.num_target_tokens, size_BD, generator)
        slots_BD = self._used({d: s.slots_B.clamp(max=self.infos[d].tokens) for d, s in spans.items()}, size_BD)
        cap_BD = torch.where(text, slots_BD, size_BD - shown_BD) * predictable
        asked_BD = fill(torch.zeros_like(size_BD), logits_BD, total_B, cap_BD, generator)
        cuts = {d: cut_targets(s, asked_BD[:, d], generator) for d, s in spans.items()}
        used_BD = self._used({d: count_B for d, (_, count_B) in cuts.items()}, asked_BD)
        asked_BD = fill(used_BD, logits_BD, total_B, torch.where(text, used_BD, cap_BD), generator)
        return self._assemble(batch, generator, spans=spans, cuts=cuts, shown_BD=shown_BD, asked_BD=asked_BD)

    def _with_end(self, batch: RawBatch) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Each sequence modality's ids (B, T) and lengths with the end marker; length 0 where the text is missing."""
        ends = {}
        for d, (name, info) in enumerate(zip(self.names, self.infos, strict=True)):
            if info.kind == "sequence":
                ids_BT, length_B = with_end(batch.tokens[name].long(), batch.lengths[name], info.tokens)
                ends[d] = (ids_BT, length_B * batch.present[name])
        return ends

    def _sizes(self, batch: RawBatch, ends: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Tokens that each sample has of each modality, int64 (B, D)."""
        columns = [
            ends[d][1] if d in ends else batch.present[name].long() * info.tokens
            for d, (name, info) in enumerate(zip(self.names, self.infos, strict=True))
        ]
        return torch.stack(columns, 1)

    def _choose(self, size_BD: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A mixture for each sample, among those that give it both an input and a target."""
        has_BD = (size_BD > 0).double()
        inputs_BK = has_BD @ (self.alpha_in_KD.to(size_BD.device) > 0).double().T
        targets_BK = has_BD @ (self.alpha_out_KD.to(size_BD.device) > 0).double().T
        weight_BK = self.weight_K.to(size_BD.device) * (inputs_BK > 0) * (targets_BK > 0)
        # A sample without any such mixture gets the first one, and then neither inputs nor targets.
        weight_BK[:, 0] += (weight_BK.sum(1) == 0).double()
        return torch.multinomial(weight_BK, 1, generator=generator)[:, 0]

    def _total(self, least: int | None, most: int, size_BD: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        shape = (len(size_BD),)
        low = most if least is None else least
        return torch.randint(low, most + 1, shape, generator=generator, device=size_BD.device)

    def _spans(
        self, ids_BT: torch.Tensor, length_B: torch.Tensor, budget_B: torch.Tensor, generator: torch.Generator
    ) -> Spans:
        most_runs = self.config.num_sentinels - 2  # [S_0] is not used, and the target needs one more than runs
        dropped_BT = draw_drops(length_B, budget_B, ids_BT.shape[1], most_runs, generator)
        return mask_spans(ids_BT, length_B, dropped_BT, budget_B == 0)

    @staticmethod
    def _used(text: dict[int, torch.Tensor], other_BD: torch.Tensor) -> torch.Tensor:
        """`other_BD` with the columns of texts replaced."""
        return torch.stack([text.get(d, other_BD[:, d]) for d in range(other_BD.shape[1])], 1)

    def _assemble(
        self,
        batch: RawBatch,
        generator: torch.Generator,
        *,
        spans: dict[int, Spans],
        cuts: dict[int, tuple[torch.Tensor, torch.Tensor]],
        shown_BD: torch.Tensor,
        asked_BD: torch.Tensor,
    ) -> tuple[Inputs, Targets]:
        inputs, targets = _Side("ids", "position"), _Side("ids", "position", "label")
        for d, name in enumerate(self.names):
            inputs.number = targets.number = shown_BD.new_tensor(d)
            if d in spans:
                _add_text(inputs, targets, spans[d], *cuts[d])
            else:
                ids_BL = self._grid_ids(batch, name, d)
                noise_BL = torch.rand(ids_BL.shape, generator=generator, device=ids_BL.device)
                _add_grid(inputs, targets, ids_BL, noise_BL, shown_BD[:, d], asked_BD[:, d])
        shown = compact(inputs.columns, inputs.valid, self.config.num_input_tokens)
        asked = compact(targets.columns, targets.valid, self.config.num_target_tokens)
        return (
            Inputs(shown["ids"], shown["position"], shown["modality"], shown["valid"], batch.pixels),
            Targets(asked["ids"], asked["position"], asked["modality"], asked["valid"], asked["label"]),
        )

    def _grid_ids(self, batch: RawBatch, name: str, d: int) -> torch.Tensor:
        """Ids (B, L); pixels have positions only."""
        if self.infos[d].kind == "pixels":
            present_B = batch.present[name]
            return torch.zeros(len(present_B), self.infos[d].tokens, dtype=torch.long, device=present_B.device)
        return batch.tokens[name].long()


def _add_grid(
    inputs: _Side,
    targets: _Side,
    ids_BL: torch.Tensor,
    noise_BL: torch.Tensor,
    shown_B: torch.Tensor,
    asked_B: torch.Tensor,
) -> None:
    """A random permutation of the cells: the first are shown, the next are asked for."""
    rank_BL = noise_BL.argsort(1).argsort(1)
    position_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    shown_BL = rank_BL < shown_B[:, None]
    asked_BL = ~shown_BL & (rank_BL < (shown_B + asked_B)[:, None])
    inputs.add(shown_BL, ids=ids_BL, position=position_L)
    targets.add(asked_BL, ids=torch.zeros_like(ids_BL), position=position_L, label=ids_BL)


def _add_text(inputs: _Side, targets: _Side, spans: Spans, start_B: torch.Tensor, count_B: torch.Tensor) -> None:
    """Positions count what is visible, not where it stood in the text: 4M's dense re-positioning."""
    place_T = torch.arange(spans.input_BT.shape[1], device=start_B.device)
    inputs.add(place_T < spans.input_len_B[:, None], ids=spans.input_BT, position=place_T)
    last = spans.target_BW.shape[1] - 1
    place_W = torch.arange(last, device=start_B.device)
    given_BW = (start_B[:, None] + place_W).clamp(max=last)
    following_BW = (given_BW + 1).clamp(max=last)
    targets.add(
        place_W < count_B[:, None],
        ids=spans.target_BW.gather(1, given_BW),
        position=place_W,
        label=spans.target_BW.gather(1, following_BW),
    )
