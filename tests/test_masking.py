"""Masking: exact layouts on literal tokens, and distributions against a plain loop over single samples.

Legend: B samples, D modalities, T longest text, W places of the target stream.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fourmill.model.batch import RawBatch
from fourmill.model.budgets import fill, log_dirichlet
from fourmill.model.config import Architecture, MaskingConfig, Mixture, ModalityInfo
from fourmill.model.config.masking import ModalityMasking
from fourmill.model.masking import Masker, random_order
from fourmill.model.spans import Spans, cut_targets, draw_drops, limit_runs, mask_spans, with_end

EOS, S1, S2, S3, S4 = 3, 5, 6, 7, 8
GRIDS = {"tok_rgb": 50, "tok_depth": 60}
TEXTS = ("tok_caption", "tok_det")
NAMES = ("rgb", *GRIDS, *TEXTS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spans_of(tokens: list[int], dropped: list[int], hidden: bool = False) -> Spans:
    ids, drops = torch.tensor([tokens]), torch.tensor([dropped], dtype=torch.bool)
    return mask_spans(ids, torch.tensor([len(tokens)]), drops, torch.tensor([hidden]))


def layout(spans: Spans, row: int = 0) -> tuple[list[int], list[int]]:
    """(input ids, target ids) of one text."""
    slots = int(spans.slots_B[row])
    target = spans.target_BW[row].tolist()
    used = target[: slots + 1] if target[0] else []
    assert not any(target[len(used) :]), "ids after the end of the target"
    return spans.input_BT[row, : int(spans.input_len_B[row])].tolist(), used


def test_end_marker_is_appended_and_long_texts_are_cut() -> None:
    ids = torch.tensor([[11, 12, 13, 14], [21, 0, 0, 0], [0, 0, 0, 0]])
    ended, length = with_end(ids, torch.tensor([4, 1, 0]), 4)
    assert ended.tolist() == [[11, 12, 13, 14], [21, EOS, 0, 0], [EOS, 0, 0, 0]]
    assert length.tolist() == [4, 2, 1]


@pytest.mark.parametrize(
    ("dropped", "shown", "target"),
    [
        ([0, 1, 1, 0, 1], [11, S1, 14, S2], [S1, 12, 13, S2, EOS, S3]),
        ([1, 0, 0, 0, 0], [S1, 12, 13, 14, EOS], [S1, 11, S2]),
        ([1, 0, 1, 0, 1], [S1, 12, S2, 14, S3], [S1, 11, S2, 13, S3, EOS, S4]),
        ([1, 1, 1, 1, 1], [S1], [S1, 11, 12, 13, 14, EOS, S2]),
        ([0, 0, 0, 0, 0], [11, 12, 13, 14, EOS], [S1]),
    ],
)
def test_each_run_of_dropped_tokens_becomes_one_sentinel(
    dropped: list[int], shown: list[int], target: list[int]
) -> None:
    assert layout(spans_of([11, 12, 13, 14, EOS], dropped)) == (shown, target)


def test_hidden_text_shows_no_sentinel_and_asks_for_everything() -> None:
    assert layout(spans_of([11, 12, EOS], [1, 1, 1], hidden=True)) == ([], [S1, 11, 12, EOS, S2])


def test_more_runs_than_sentinels_extends_the_last_run_to_the_end() -> None:
    drops = torch.tensor([[1, 0, 1, 0, 1, 0, 0]], dtype=torch.bool)
    assert limit_runs(drops, torch.tensor([6]), 2).int().tolist() == [[1, 0, 1, 1, 1, 1, 0]]
    assert limit_runs(drops, torch.tensor([6]), 3).int().tolist() == [[1, 0, 1, 0, 1, 1, 0]]
    assert limit_runs(drops, torch.tensor([6]), 4).int().tolist() == [[1, 0, 1, 0, 1, 0, 0]]


def plain_layout(tokens: list[int], dropped: list[bool]) -> tuple[list[int], list[int]]:
    """The same for one text, token by token."""
    shown: list[int] = []
    target: list[int] = []
    sentinel, before = 4, False
    for token, drop in zip(tokens, dropped, strict=True):
        if drop and not before:
            sentinel += 1
            shown.append(sentinel)
            target.append(sentinel)
        (target if drop else shown).append(token)
        before = drop
    return shown, [*target, sentinel + 1]


def test_layout_of_random_texts_equals_a_loop_over_tokens() -> None:
    rng = np.random.default_rng(0)
    length = torch.from_numpy(rng.integers(1, 13, size=300))
    ids = torch.from_numpy(rng.integers(100, 200, size=(300, 12)))
    dropped = torch.from_numpy(rng.random((300, 12)) < 0.5) & (torch.arange(12) < length[:, None])
    spans = mask_spans(ids, length, dropped, torch.zeros(300, dtype=torch.bool))
    for row in range(300):
        n = int(length[row])
        assert layout(spans, row) == plain_layout(ids[row, :n].tolist(), dropped[row, :n].tolist())


def test_target_within_its_budget_is_not_cut() -> None:
    spans = spans_of([11, 12, 13, 14, EOS], [0, 1, 1, 0, 1])
    start, count = cut_targets(spans, torch.tensor([5]), seeded())
    assert (start.tolist(), count.tolist()) == ([0], [5])


def test_target_over_its_budget_starts_at_a_run_and_wastes_nothing() -> None:
    # Target [S1 12 13 S2 15 EOS S3], 6 slots; runs begin at slots 0 and 3.
    spans = spans_of([11, 12, 13, 14, 15, EOS], [0, 1, 1, 0, 1, 1])
    seen = set()
    for seed in range(20):
        start, count = cut_targets(spans, torch.tensor([3]), seeded(seed))
        seen.add((int(start), int(count)))
    assert seen == {(0, 3), (3, 3)}
    # Of 4 slots, the second run would fill 3 only, but it is the first from which everything fits.
    starts = {tuple(int(x) for x in cut_targets(spans, torch.tensor([4]), seeded(s))) for s in range(20)}
    assert starts == {(0, 4), (3, 3)}


def plain_shown_share(length: int, budget: int, rng: np.random.Generator) -> tuple[float, int]:
    """Kept share of one text and its input length, by 4M's rule: draw again with 0.9 of the probability."""
    keep = rng.random()
    while True:
        kept = rng.random(length) < keep
        size = len(plain_layout([9] * length, [not k for k in kept])[0])
        if size <= budget:
            return kept.mean(), size
        keep *= 0.9


@pytest.mark.parametrize("budget", [3, 8, 20])
def test_keep_probability_and_input_length_are_those_of_the_plain_rule(budget: int) -> None:
    rng = np.random.default_rng(1)
    plain = np.array([plain_shown_share(20, budget, rng) for _ in range(4000)])
    length = torch.full((4000,), 20)
    drops = draw_drops(length, torch.full((4000,), budget), torch.rand(4000, generator=seeded(3)), 20, 100, seeded(2))
    spans = mask_spans(torch.full((4000, 20), 9), length, drops, torch.zeros(4000, dtype=torch.bool))
    assert int(spans.input_len_B.max()) <= budget
    ours = torch.stack([1 - drops.double().mean(1), spans.input_len_B.double()], 1).numpy()
    error = np.sqrt(plain.var(0) / len(plain) + ours.var(0) / len(ours))
    assert (np.abs(ours.mean(0) - plain.mean(0)) < 4.5 * error).all(), (ours.mean(0), plain.mean(0), error)


@pytest.mark.parametrize("alphas", [[0.5, 0.5, 0.5], [0.05, 5.0, 1.0], [1000.0, 500.0, 500.0]])
def test_dirichlet_draws_have_the_moments_of_numpy(alphas: list[float]) -> None:
    ours = log_dirichlet(torch.tensor(alphas, dtype=torch.float64).expand(20_000, 3), seeded()).softmax(1).numpy()
    theirs = np.random.default_rng(0).dirichlet(alphas, 20_000)
    error = np.sqrt((ours.var(0) + theirs.var(0)) / 20_000)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4.5 * error + 1e-6).all()
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.12, atol=1e-4)  # alpha 0.05: a heavy tail


def test_alpha_0_leaves_a_modality_out_even_beside_tiny_alphas() -> None:
    alphas = torch.tensor([[0.0, 0.01, 0.01]], dtype=torch.float64).expand(1000, 3)
    share = log_dirichlet(alphas, seeded()).softmax(1)
    assert share[:, 0].max() == 0
    torch.testing.assert_close(share.sum(1), torch.ones(1000, dtype=torch.float64))


def fill_one(weights: list[float], total: int, caps: list[int], seed: int = 0) -> list[int]:
    logits = torch.tensor([weights], dtype=torch.float64).log()
    zeros = torch.zeros(1, len(caps), dtype=torch.long)
    return fill(zeros, logits, torch.tensor([total]), torch.tensor([caps]), seeded(seed))[0].tolist()


def test_budget_that_a_modality_cannot_use_goes_to_the_others() -> None:
    assert fill_one([1, 1], 8, [2, 10]) == [2, 6]
    assert fill_one([1, 1, 1], 9, [1, 2, 100]) == [1, 2, 6]
    assert fill_one([1, 0, 1], 9, [1, 100, 2]) == [1, 0, 2], "a modality of weight 0 gets nothing"
    assert fill_one([1, 1], 9, [2, 3]) == [2, 3], "no more than there is"


def test_fractions_are_rounded_without_bias() -> None:
    drawn = np.array([fill_one([0.25, 0.65, 0.1], 3, [9, 9, 9], seed) for seed in range(1500)])
    assert (drawn.sum(1) == 3).all()
    np.testing.assert_allclose(drawn.mean(0), [0.75, 1.95, 0.3], atol=0.05)


def architecture() -> Architecture:
    return Architecture(
        dim=16,
        num_heads=1,
        image_size=64,
        domains_in=NAMES,
        domains_out=NAMES[1:],
        modalities={
            "rgb": ModalityInfo(kind="pixels", tokens=16, grid=(4, 4)),
            **{n: ModalityInfo(kind="grid", vocabulary=v, tokens=16, grid=(4, 4)) for n, v in GRIDS.items()},
            **{n: ModalityInfo(kind="sequence", vocabulary=300, tokens=12) for n in TEXTS},
        },
    )


def raw(count: int, seed: int = 0, absent: dict[str, list[int]] | None = None) -> RawBatch:
    """Grids of ids that name their cell, texts of 1 to 14 ids from 100 up that name their place."""
    rng = np.random.default_rng(seed)
    lengths = {n: torch.from_numpy(rng.integers(1, 15, size=count)) for n in TEXTS}
    tokens = {n: torch.arange(16, dtype=torch.int32).expand(count, 16).to(torch.uint16) for n in GRIDS}
    for name in TEXTS:
        place = torch.arange(14)
        tokens[name] = ((100 + place) * (place < lengths[name][:, None])).to(torch.uint16)
    present = {n: torch.ones(count, dtype=torch.bool) for n in NAMES}
    for name, rows in (absent or {}).items():
        present[name][rows] = False
        if name in TEXTS:
            lengths[name] = lengths[name] * present[name]
    pixels = torch.zeros(count, 3, 64, 64, dtype=torch.uint8)
    return RawBatch([str(i) for i in range(count)], tokens, lengths, present, pixels, {})


def config(*mixtures: Mixture, inputs: int = 20, targets: int = 24, **more: Any) -> MaskingConfig:
    return MaskingConfig(num_input_tokens=inputs, num_target_tokens=targets, mixtures=mixtures, **more)


def test_inputs_and_targets_are_disjoint_within_budget_and_true_to_the_data() -> None:
    masker = Masker(architecture(), config(Mixture(), Mixture(input_default=0.05, target_default=5), num_sentinels=20))
    for seed in range(10):
        inputs, targets = masker(raw(64, seed), seeded(seed))
        assert inputs.ids_BN.shape == (64, 20)
        assert targets.ids_BM.shape == (64, 24)
        assert (inputs.valid_BN == (inputs.modality_BN >= 0)).all()
        assert (inputs.valid_BN.long().diff(dim=1) <= 0).all(), "valid tokens come first"
        for number in (1, 2):  # the grids, whose ids name their cells
            shown, asked = inputs.modality_BN == number, targets.modality_BM == number
            assert (inputs.ids_BN[shown] == inputs.position_BN[shown]).all()
            assert (targets.label_BM[asked] == targets.position_BM[asked]).all()
            for row in range(64):
                cells = [*inputs.position_BN[row][shown[row]].tolist(), *targets.position_BM[row][asked[row]].tolist()]
                assert len(cells) == len(set(cells)), "a cell is shown or asked for twice"


def test_text_tokens_are_shown_or_asked_for_but_never_both() -> None:
    masker = Masker(architecture(), config(Mixture(), inputs=60, targets=90))
    inputs, targets = masker(raw(200), seeded())
    for row in range(200):
        shown = inputs.ids_BN[row][inputs.modality_BN[row] == 3]
        asked = targets.label_BM[row][targets.modality_BM[row] == 3]
        words = [*shown[shown >= 100].tolist(), *asked[asked >= 100].tolist()]
        assert len(words) == len(set(words))
        given = targets.ids_BM[row][targets.modality_BM[row] == 3]
        assert given[1:].tolist() == asked[:-1].tolist(), "the decoder is given each label at the next place"
        assert not len(given) or 5 <= int(given[0]) < 204, "a target begins with a sentinel"


def test_budgets_are_filled_where_there_are_tokens_for_them() -> None:
    masker = Masker(architecture(), config(Mixture(), Mixture(input_default=10)))
    inputs, targets = masker(raw(500), seeded())
    assert inputs.valid_BN.all()
    assert targets.valid_BM.float().mean() > 0.99  # ml-4m's own rule fills 0.88


def test_mean_budget_of_each_modality_is_its_share_of_the_alphas() -> None:
    alphas = {"rgb": 2.0, "tok_rgb": 1.0, "tok_depth": 1.0}
    mixture = Mixture(input_alphas=alphas, input_default=0, target_alphas={"tok_rgb": 3}, target_default=1)
    inputs, targets = Masker(architecture(), config(mixture, inputs=8, targets=4))(raw(4000), seeded())
    shown = np.array([(inputs.modality_BN == d).sum(1).double().mean() for d in range(5)])
    asked = np.array([(targets.modality_BM == d).sum(1).double().mean() for d in range(5)])
    np.testing.assert_allclose(shown, [4, 2, 2, 0, 0], atol=0.15)  # 8 tokens, 16 cells each: never clamped
    np.testing.assert_allclose(asked, [0, 2, 2 / 3, 2 / 3, 2 / 3], atol=0.1)


def test_mixtures_are_drawn_by_weight_and_one_for_absent_inputs_never() -> None:
    only = {n: Mixture(input_alphas={n: 1000}, input_default=0, weight=w) for n, w in (("rgb", 3), ("tok_depth", 1))}
    masker = Masker(architecture(), config(*only.values(), inputs=8))
    inputs, _ = masker(raw(2000, absent={"rgb": list(range(1000))}), seeded())
    kinds = inputs.modality_BN.max(1).values
    assert (inputs.modality_BN.min(1).values == kinds).all(), "one modality a sample"
    assert (kinds[:1000] == 2).all()
    assert 0.70 < (kinds[1000:] == 0).double().mean() < 0.80


def test_absent_modalities_have_no_tokens_and_a_sample_without_any_is_empty() -> None:
    # Sample 0 lacks two modalities, sample 1 has nothing but its picture, sample 2 nothing at all.
    absent = {"rgb": [2], "tok_rgb": [0, 1, 2], "tok_depth": [1, 2], "tok_caption": [0, 1, 2], "tok_det": [1, 2]}
    batch = raw(3, absent=absent)
    masker = Masker(architecture(), config(Mixture(), inputs=60, targets=60))
    inputs, targets = masker(batch, seeded())
    assert set(inputs.modality_BN[0].tolist()) | set(targets.modality_BM[0].tolist()) <= {-1, 0, 2, 4}
    assert not targets.valid_BM[1].any()
    assert not inputs.valid_BN[2].any()
    assert not targets.valid_BM[2].any()


def test_equal_seeds_give_equal_masks_and_other_seeds_others() -> None:
    masker = Masker(architecture(), config(Mixture(), min_input_tokens=2, min_target_tokens=3))
    (a, ta), (b, tb), (c, _) = (masker(raw(16), seeded(seed)) for seed in (7, 7, 8))
    assert torch.equal(a.ids_BN, b.ids_BN)
    assert torch.equal(ta.label_BM, tb.label_BM)
    assert not torch.equal(a.ids_BN, c.ids_BN)
    sizes = a.valid_BN.sum(1)
    assert sizes.min() >= 2
    assert len(sizes.unique()) > 3, "budgets vary from min to num"


def test_alpha_of_an_unknown_modality_is_refused_with_the_nearest_name() -> None:
    bad = config(Mixture(target_alphas={"tok_dpeth": 1.0}))
    with pytest.raises(ValueError, match="target_alphas: unknown modality 'tok_dpeth'; did you mean 'tok_depth'"):
        Masker(architecture(), bad)


def test_modality_that_is_no_input_or_no_target_is_never_there() -> None:
    inputs, targets = Masker(architecture(), config(Mixture(), inputs=60, targets=60))(raw(50), seeded())
    assert set(targets.modality_BM.unique().tolist()) == {-1, 1, 2, 3, 4}, "raw pixels are no target"
    assert set(inputs.modality_BN.unique().tolist()) == {-1, 0, 1, 2, 3, 4}


def test_bounds_of_a_modality_hold_on_both_sides() -> None:
    own = {
        "tok_rgb": ModalityMasking(min_input=3, max_input=5, min_target=2, max_target=4),
        "tok_det": ModalityMasking(max_input=0, max_target=2),
    }
    settings = config(Mixture(input_default=0.1, target_default=0.1), modalities=own)
    inputs, targets = Masker(architecture(), settings)(raw(400), seeded())
    shown, asked = ((m == 1).sum(1) for m in (inputs.modality_BN, targets.modality_BM))
    assert (int(shown.min()), int(shown.max())) == (3, 5)
    assert (int(asked.min()), int(asked.max())) == (2, 4)
    assert not (inputs.modality_BN == 4).any()
    assert int((targets.modality_BM == 4).sum(1).max()) == 2


def test_minimum_is_for_samples_whose_mixture_has_the_modality() -> None:
    own = {"tok_rgb": ModalityMasking(min_input=3)}
    mixture = Mixture(input_alphas={"tok_rgb": 0})
    inputs, _ = Masker(architecture(), config(mixture, modalities=own))(raw(50), seeded())
    assert not (inputs.modality_BN == 1).any()


def test_minima_beyond_the_budget_are_refused() -> None:
    own = {"tok_rgb": ModalityMasking(min_input=15), "tok_depth": ModalityMasking(min_input=6)}
    with pytest.raises(ValueError, match="min_input of all modalities is 21 together; num_input_tokens is 20"):
        config(Mixture(), inputs=20, modalities=own)
    with pytest.raises(ValueError, match="min_target 5 is above max_target 4"):
        ModalityMasking(min_target=5, max_target=4)
    with pytest.raises(ValueError, match="unknown modality 'tok_rbg'; did you mean 'tok_rgb'"):
        Masker(architecture(), config(Mixture(), modalities={"tok_rbg": ModalityMasking()}))


@pytest.mark.parametrize(
    ("keep", "shown"), [("all", {True}), ("none", {False}), ("binary", {True, False}), ("random", None)]
)
def test_keep_scheme_says_how_much_of_a_text_is_shown_where_it_fits(keep: str, shown: set[bool] | None) -> None:
    settings = config(Mixture(), inputs=200, targets=200, modalities={"tok_caption": ModalityMasking(keep=keep)})
    inputs, _ = Masker(architecture(), settings)(raw(300), seeded())
    whole = set()
    for row in range(300):
        words = inputs.ids_BN[row][inputs.modality_BN[row] == 3]
        kept, hidden = (words >= 100) | (words == EOS), (words >= 5) & (words < 100)
        whole.add(True if not hidden.any() else False if not kept.any() else None)
    assert whole == shown if shown else None in whole


def test_chunks_are_shown_or_hidden_together() -> None:
    def torn_pairs(**more: Any) -> int:
        batch = raw(300)
        inputs, _ = Masker(architecture(), config(Mixture(), inputs=200, targets=200, **more))(batch, seeded())
        torn = 0
        for row, length in enumerate(batch.lengths["tok_caption"].tolist()):
            words = set(inputs.ids_BN[row][inputs.modality_BN[row] == 3].tolist())
            torn += sum((100 + i in words) != (101 + i in words) for i in range(0, min(length, 12) - 1, 2))
        return torn

    assert torn_pairs(modalities={"tok_caption": ModalityMasking(chunk=2)}) == 0
    assert torn_pairs() > 100


def test_order_of_cells_is_uniform() -> None:
    order = random_order(torch.empty(60_000, 4, dtype=torch.int32), seeded())
    assert (order.sort(1).values == torch.arange(4)).all()
    _, counts = torch.unique(order, dim=0, return_counts=True)
    assert len(counts) == 24
    assert float(((counts - 2500.0) ** 2 / 2500).sum()) < 50.0  # chi-square, 23 degrees: 49.7 at one in a thousand


def plain_masks(rng: np.random.Generator, sizes: dict[str, int], budget: int) -> dict[str, int]:
    """Tokens that one sample shows of each modality, by a loop: whole budgets, what is too much goes to the others."""
    shares = dict(zip(sizes, rng.dirichlet([0.5] * len(sizes)), strict=True))
    shown = dict.fromkeys(sizes, 0)
    while budget > sum(shown.values()):
        room = [n for n in sizes if shown[n] < sizes[n]]
        if not room:
            break
        weight = np.array([shares[n] for n in room])
        shown[room[rng.choice(len(room), p=weight / weight.sum())]] += 1
    return shown


def test_budgets_are_distributed_as_a_loop_over_samples_and_tokens_distributes_them() -> None:
    """The loop draws every token's modality by itself, so that only means are equal, not the rounding's variance."""
    rng = np.random.default_rng(4)
    sizes = {"rgb": 16, "tok_rgb": 16, "tok_depth": 16}
    mixture = Mixture(input_alphas={"tok_caption": 0, "tok_det": 0})
    plain = np.array([list(plain_masks(rng, sizes, 24).values()) for _ in range(4000)])
    inputs, _ = Masker(architecture(), config(mixture, inputs=24))(raw(4000), seeded(5))
    ours = np.array([(inputs.modality_BN == d).sum(1).numpy() for d in range(3)]).T
    assert (plain.sum(1) == 24).all()
    assert (ours.sum(1) == 24).all()
    error = np.sqrt((plain.var(0) + ours.var(0)) / 4000)
    assert (np.abs(plain.mean(0) - ours.mean(0)) < 4.5 * error).all()
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):  # the whole distribution, not only its mean
        assert np.abs(np.quantile(plain, share, axis=0) - np.quantile(ours, share, axis=0)).max() <= 1


def test_target_of_a_text_has_no_more_places_than_the_model_has_for_it() -> None:
    # A text of 12 tokens dropped one by one has a target of 12 + 6 slots; its modality has 12 positions.
    settings = config(Mixture(), inputs=200, targets=200)
    _, targets = Masker(architecture(), settings)(raw(400), seeded())
    longest = [(targets.position_BM * (targets.modality_BM == d)).max() for d in (3, 4)]
    assert [int(p) for p in longest] == [11, 11]


def test_places_of_a_target_count_from_where_it_was_cut() -> None:
    settings = config(Mixture(), inputs=20, targets=8)
    _, targets = Masker(architecture(), settings)(raw(300), seeded())
    begun_late = 0
    for row in range(300):
        asked = targets.modality_BM[row] == 3
        assert targets.position_BM[row][asked].tolist() == list(range(int(asked.sum())))
        begun_late += bool(asked.any()) and int(targets.ids_BM[row][asked][0]) > S1
    assert begun_late > 10, "some targets begin at a later sentinel"


def test_text_that_never_fits_its_budget_is_wholly_hidden() -> None:
    # After 50 attempts 0.5 % of 2,000 tokens are still kept, about ten, each between runs: one place is never enough.
    length, one = torch.full((20,), 2000), torch.ones(20, dtype=torch.long)
    assert draw_drops(length, one, torch.ones(20), 2000, 2000, seeded()).all()


def test_model_without_texts_is_masked_too() -> None:
    info = {n: ModalityInfo(kind="grid", vocabulary=v, tokens=16, grid=(4, 4)) for n, v in GRIDS.items()}
    shape = Architecture(dim=16, num_heads=1, domains_in=tuple(info), domains_out=tuple(info), modalities=info)
    inputs, targets = Masker(shape, config(Mixture(), inputs=12, targets=12))(raw(40), seeded())
    assert inputs.valid_BN.all()
    assert targets.valid_BM.all()
    assert (inputs.ids_BN == inputs.position_BN).all()
    assert (targets.label_BM == targets.position_BM).all()
