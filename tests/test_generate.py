"""Generation: what is drawn is what was meant, caches change nothing, and each pass sees exactly its conditions.

Legend: B samples, L cells of a grid, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_model import REFERENCE, needs_reference, seeded, tiny

from benchmarks.loader_ml4m import stand_ins
from fourmill.model.batch import Targets
from fourmill.model.config import EOS, ModalityInfo
from fourmill.model.generate.cache import TextDecoder
from fourmill.model.generate.contexts import FIRST, Contexts
from fourmill.model.generate.generate import generate
from fourmill.model.generate.grids import grid_logits
from fourmill.model.generate.guidance import guided
from fourmill.model.generate.plan import Target, default_target, plan_of
from fourmill.model.generate.sampling import Noise, draw, kept, pick, probabilities
from fourmill.model.generate.schedules import decided, temperatures
from fourmill.model.network import FourM
from fourmill.model.predict import predict
from fourmill.model.weights import load_model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pixels(count: int = 1, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sharp(**changes: object) -> FourM:
    """A tiny model whose random predictions differ clearly between inputs."""
    return sharpen(seeded(tiny(**changes)))


@torch.no_grad()
def sharpen(model: Any) -> Any:
    """The same with larger random weights."""
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and "norm" not in name:
            parameter.mul_(3 if parameter.ndim == 2 and "emb" not in name else 20)
    return model


def texts(found: Any) -> list[list[int]]:
    return [row.tolist() for row in found]


# ------------------------------------------------------------------------------------------------- schedules


def test_cells_decided_after_each_step() -> None:
    assert [decided(64, s, 4, "cosine") for s in range(1, 5)] == [4, 18, 39, 64]
    assert [decided(64, s, 4, "linear") for s in range(1, 5)] == [16, 32, 48, 64]
    assert [decided(64, s, 4, "raised-cosine") for s in range(1, 5)] == [9, 32, 54, 64]
    assert [decided(4, s, 4, "cosine") for s in range(1, 5)] == [1, 2, 3, 4], "at least one a step"
    assert [decided(5, s, 5, "raised-cosine") for s in range(1, 6)] == [1, 2, 3, 4, 5], "and one for each to come"


def test_temperature_of_each_step() -> None:
    assert temperatures(3.0, 4, 64, "linear", "constant", 0.5, 0.5) == [3.0] * 4
    assert temperatures(2.0, 4, 64, "linear", "linear", 0.5, 0.5) == [2.0, 1.5, 1.0, 0.5]
    # x = 1, 100: 1/x^0.5 is 1 and 0.1, of which 1 and 0 are left; times the shares still open, 1/2 and 0.
    assert temperatures(4.0, 2, 2, "linear", "onex", 0.5, 0.5) == [2.25, 0.5]
    assert temperatures(0.0, 3, 9, "linear", "onex", 0.5, 0.5) == [0.0] * 3, "greedy stays greedy"


def their_schedules() -> Any:
    """ml-4m's utils/generation.py, which needs NumPy only; skipped without a checkout."""
    checkout = os.environ.get("FOURMILL_ML4M")
    if not checkout:
        pytest.skip("FOURMILL_ML4M names no checkout of apple/ml-4m")
    path = Path(checkout) / "fourm" / "utils" / "generation.py"
    spec = importlib.util.spec_from_file_location("their_generation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("steps", "tokens"), [(4, 64), (7, 196), (25, 200)])
def test_schedules_are_those_of_ml4m(steps: int, tokens: int) -> None:
    theirs = their_schedules()
    ours = [decided(tokens, s, steps, "raised-cosine") for s in range(1, steps + 1)]
    # Theirs rounds each step's share and gives the last one the rest.
    assert (
        max(abs(a - b) for a, b in zip(ours, theirs.cosine_schedule(steps, tokens).cumsum(), strict=True)) <= steps / 2
    )
    if tokens % steps == 0:  # else theirs does the larger steps first
        schedule = theirs.linear_schedule(steps, tokens)
        assert [decided(tokens, s, steps, "linear") for s in range(1, steps + 1)] == schedule.cumsum().tolist()
        want = theirs.onex_temp_schedule(3.0, 0.5, schedule, power=0.5)
        assert temperatures(3.0, steps, tokens, "linear", "onex", 0.5, 0.5) == pytest.approx(want.tolist())
        want = theirs.linear_temp_schedule(3.0, schedule)
        assert temperatures(3.0, steps, tokens, "linear", "linear", 0.5, 0.5) == pytest.approx(want.tolist())


# -------------------------------------------------------------------------------------------------- sampling


LOGITS = torch.tensor([0.4, 0.1, 0.3, 0.15, 0.05]).log()


@pytest.mark.parametrize(
    ("top_k", "top_p", "want"),
    [
        (None, None, {0, 1, 2, 3, 4}),
        (2, None, {0, 2}),
        (None, 0.39, {0}),
        (None, 0.69, {0, 2}),
        (None, 0.71, {0, 2, 3}),
        (None, 1e-9, {0}),
        (3, 0.5, {0, 2}),  # of 0.4 0.3 0.15 the first is 0.47 of the whole: the second is needed
        (2, 0.5, {0}),  # of 0.4 0.3 it is 0.57
        (9, 1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_exactly_the_likeliest_tokens_are_kept(top_k: int | None, top_p: float | None, want: set[int]) -> None:
    assert set(kept(LOGITS, top_k, top_p).nonzero()[:, 0].tolist()) == want
    rows = kept(LOGITS.expand(2, 3, 5), top_k, top_p)
    assert (rows == kept(LOGITS, top_k, top_p)).all(), "rows are alike"


def test_of_equal_logits_top_k_keeps_the_first() -> None:
    assert kept(torch.zeros(5), 2, None).tolist() == [True, True, False, False, False]


def test_top_p_looks_at_the_distribution_before_or_after_the_temperature() -> None:
    before = probabilities(LOGITS, 4.0, None, 0.6, "before")
    after = probabilities(LOGITS, 4.0, None, 0.6, "after")
    assert (before > 0).tolist() == [True, False, True, False, False], "0.4 + 0.3"
    assert (after > 0).tolist() == [True, False, True, True, False], "flattened, two reach 0.48 only"
    hot = (LOGITS[[0, 2]].double() / 4).softmax(0)
    torch.testing.assert_close(before[[0, 2]], hot)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_with_exactly_the_tempered_probabilities(temperature: float) -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, 0.5])
    want = torch.tensor([math.exp(v / temperature) for v in logits.tolist()]).double()
    want /= want.sum()
    torch.testing.assert_close(probabilities(logits, temperature, None, None), want)
    count = 20_000
    noise = Noise(7, [0], 0).uniform(count, torch.device("cpu"))[0]
    drawn, sure = pick(logits.expand(count, 5), noise, temperature)
    seen = torch.bincount(drawn, minlength=5).double()
    chi_square = float(((seen - want * count) ** 2 / (want * count)).sum())
    assert chi_square < 18.5, "0.1 % of true samplers exceed it (4 degrees of freedom)"
    torch.testing.assert_close(sure, want[drawn].float())


def test_draws_invert_the_cumulative_distribution_and_never_give_the_impossible() -> None:
    chances = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    for uniform, want in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.9999, 3), (1.0, 3)):
        assert draw(chances, torch.tensor([uniform], dtype=torch.float64)).tolist() == [want], uniform


def test_temperature_zero_takes_the_likeliest_and_tells_how_sure_it_is() -> None:
    token, sure = pick(LOGITS[None], torch.tensor([0.99]), 0.0)
    assert token.tolist() == [0]
    assert float(sure) == pytest.approx(0.4)


def test_noise_of_a_sample_is_its_own() -> None:
    cpu = torch.device("cpu")
    both = Noise(3, [4, 9], 1).uniform(5, cpu)
    assert torch.equal(both[1:], Noise(3, [9], 1).uniform(5, cpu))
    others = [Noise(3, [9], 2), Noise(4, [9], 1), Noise(3, [8], 1)]
    assert not any(torch.equal(both[1:], other.uniform(5, cpu)) for other in others)


# -------------------------------------------------------------------------------------------------- guidance


def test_guidance_on_literal_logits() -> None:
    base, a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]), torch.tensor([0.0, 4.0])
    assert guided(base, [(1.0, a)]).tolist() == [3.0, 1.0]
    assert guided(base, [(2.0, a)]).tolist() == [5.0, 0.0]
    assert guided(base, [(0.0, a)]).tolist() == [1.0, 2.0]
    assert guided(base, [(2.0, a), (-1.0, b)]).tolist() == [6.0, -2.0]
    assert guided(None, [(2.0, a), (-1.0, b)]).tolist() == [6.0, -2.0], "weights add up to 1: the base counts nothing"


def raw_logits(model: FourM, seen: dict[str, Any], name: str) -> torch.Tensor:
    """Logits (1, L, V) for a whole grid, from these conditions alone."""
    info = model.architecture.modalities[name]
    context = Contexts(model, seen, 1).output(list(seen))
    place = torch.arange(info.tokens)[None]
    number = torch.full_like(place, model.architecture.names.index(name))
    asked = Targets(torch.zeros_like(place), place, number, number >= 0, place)
    with torch.no_grad():
        return model.logits(model.decode(context.context_BND, context.valid_BN, asked), name)


def passes_of(model: FourM, inputs: dict[str, Any], target: Target) -> torch.Tensor:
    """The guided logits (1, L, V) of a grid's first pass."""
    contexts = Contexts(model, inputs, 1)
    place = torch.arange(model.architecture.modalities[target.name].tokens)[None]
    none = torch.zeros_like(place, dtype=torch.bool)
    with torch.no_grad():
        return grid_logits(contexts, target, torch.zeros_like(place), none, place, ~none)


def test_joint_guidance_drops_all_conditions_together() -> None:
    model, inputs = sharp(), {"rgb": pixels(), "tok_caption": [[20, 21, 22]]}
    got = passes_of(model, inputs, Target(name="tok_depth", guidance=3.0))
    # What is left of a text that is dropped is its sentinel, a wholly masked text.
    contexts = Contexts(model, inputs, 1)
    base = contexts.output([], dropped=["rgb", "tok_caption"])
    assert base.valid_BN.shape == (1, 1)
    want_base = _decoded(model, base, "tok_depth")
    torch.testing.assert_close(got, want_base + 3 * (raw_logits(model, inputs, "tok_depth") - want_base))
    assert not torch.allclose(got, raw_logits(model, inputs, "tok_depth"), atol=1e-2)


def _decoded(model: FourM, context: Any, name: str) -> torch.Tensor:
    place = torch.arange(model.architecture.modalities[name].tokens)[None]
    number = torch.full_like(place, model.architecture.names.index(name))
    asked = Targets(torch.zeros_like(place), place, number, number >= 0, place)
    with torch.no_grad():
        return model.logits(model.decode(context.context_BND, context.valid_BN, asked), name)


def test_guidance_by_condition_keeps_the_others_behind_every_pass() -> None:
    fields = {"modalities": {**tiny().modalities, "tok_normal": tiny().modalities["tok_depth"]}}
    model = sharp(domains_in=("rgb", "tok_depth", "tok_normal"), domains_out=("tok_depth",), **fields)
    inputs = {"rgb": pixels(), "tok_normal": torch.arange(9)[None]}
    got = passes_of(model, inputs, Target(name="tok_depth", guidance={"tok_normal": -0.5}))
    base = raw_logits(model, {"rgb": inputs["rgb"]}, "tok_depth")
    torch.testing.assert_close(got, base - 0.5 * (raw_logits(model, inputs, "tok_depth") - base))
    got = passes_of(model, inputs, Target(name="tok_depth", guidance={"tok_normal": 2.0, "rgb": 0.5}))
    parts = [raw_logits(model, {name: inputs[name]}, "tok_depth") for name in ("tok_normal", "rgb")]
    nothing = _decoded(model, Contexts(model, inputs, 1).output([]), "tok_depth")
    torch.testing.assert_close(got, nothing + 2.0 * (parts[0] - nothing) + 0.5 * (parts[1] - nothing))


def test_texts_are_guided_too() -> None:
    model, inputs = sharp(), {"rgb": pixels(), "tok_depth": torch.arange(9)[None]}
    got = texts(generate(model, inputs, [Target(name="tok_caption", guidance=4.0)])["tok_caption"])
    contexts = Contexts(model, inputs, 1)
    decoders = [TextDecoder(model, "tok_caption", contexts.output(names)) for names in ([], ["rgb", "tok_depth"])]
    ids, want = torch.tensor([FIRST]), []
    with torch.no_grad():
        for place in range(12):
            base, seen = (decoder.step(ids, place) for decoder in decoders)
            ids = (base + 4 * (seen - base)).argmax(1)
            if int(ids) in (EOS, FIRST + 1):
                break
            want.append(int(ids))
    assert got == [[i for i in want if i]]
    assert got != texts(predict(model, inputs, ["tok_caption"])["tok_caption"])


# ---------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "gated_mlp": False, "tie_logits": False},
        {"num_register_tokens": 2, "proj_bias": True},
    ],
)
def test_kept_keys_and_values_change_no_logit(changes: dict[str, bool]) -> None:
    model = sharp(**changes)
    given = {"rgb": pixels(2), "tok_caption": [[20, 21], [22, 23, 24, 25, 26]]}  # padded inputs in the first sample
    context = Contexts(model, given, 2).output(list(given))
    ids = torch.tensor([[FIRST, 30, 31, 32, 33], [FIRST, 12, 7, 9, 30]])
    place = torch.arange(5).expand_as(ids)
    number = torch.full_like(ids, model.architecture.names.index("tok_caption"))
    with torch.no_grad():
        asked = Targets(ids, place, number, number >= 0, ids)
        want = model.logits(model.decode(context.context_BND, context.valid_BN, asked), "tok_caption")
        decoder = TextDecoder(model, "tok_caption", context)
        got = torch.stack([decoder.step(ids[:, i], i) for i in range(5)], 1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("registers", [0, 2])
def test_nothing_but_guidance_is_left_of_a_model_shown_nothing(registers: int) -> None:
    model = sharp(num_register_tokens=registers)
    contexts = Contexts(model, {"rgb": pixels(2)}, 2)
    context = contexts.output([])
    assert context.context_BND.shape[1] == context.valid_BN.shape[1] + registers
    assert contexts.passes == (1 if registers else 0)
    ids = torch.tensor([[FIRST, 30], [FIRST, 30]])
    number = torch.full_like(ids, model.architecture.names.index("tok_caption"))
    with torch.no_grad():
        asked = Targets(ids, torch.arange(2).expand_as(ids), number, number >= 0, ids)
        want = model.logits(model.decode(context.context_BND, context.valid_BN, asked), "tok_caption")
        decoder = TextDecoder(model, "tok_caption", context)
        got = torch.stack([decoder.step(ids[:, i], i) for i in range(2)], 1)
    assert want.isfinite().all()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_embedded_text_is_a_condition_up_to_its_last_row() -> None:
    infos = {**tiny().modalities, "t5_caption": ModalityInfo(kind="vectors", width=8, tokens=5)}
    model = sharp(domains_in=("t5_caption", "rgb", "tok_depth"), domains_out=("tok_depth",), modalities=infos)
    vectors = torch.randn(1, 5, 8, generator=rng())
    vectors[:, 3:] = 0
    contexts = Contexts(model, {"t5_caption": vectors, "rgb": pixels()}, 1)
    assert contexts.output(["t5_caption", "rgb"]).valid_BN.shape == (1, 3 + 4)
    short = Contexts(model, {"t5_caption": vectors[:, :3], "rgb": pixels()}, 1)
    both = [one.output(["t5_caption", "rgb"]).context_BND for one in (contexts, short)]
    assert torch.equal(*both)
    vectors[0, 1] += 1
    contexts.put("t5_caption", vectors)
    assert not torch.allclose(contexts.output(["t5_caption", "rgb"]).context_BND, both[0])


def test_text_is_that_of_decoding_the_whole_text_at_every_token() -> None:
    model, given = sharp(), {"rgb": pixels(3)}
    got = texts(predict(model, given, ["tok_caption"])["tok_caption"])
    context = Contexts(model, given, 3).output(["rgb"])
    ids = torch.full((3, 1), FIRST)
    for _ in range(12):
        number = torch.full_like(ids, model.architecture.names.index("tok_caption"))
        asked = Targets(ids, torch.arange(ids.shape[1]).expand_as(ids), number, number >= 0, ids)
        with torch.no_grad():
            hidden = model.decode(context.context_BND, context.valid_BN, asked)
            ids = torch.cat([ids, model.logits(hidden[:, -1], "tok_caption").argmax(1, keepdim=True)], 1)
    want = [_until_end(row[1:].tolist()) for row in ids]
    assert got == want
    assert len({tuple(row) for row in got}) > 1, "the samples are told apart"


def _until_end(row: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in (EOS, FIRST + 1)]
    return [token for token in row[: ends[0] if ends else None] if token]


@pytest.mark.parametrize(
    ("plan", "passes"),
    [
        ([Target(name="tok_caption")], 1),
        ([Target(name="tok_caption", guidance=2.0)], 1),  # the base of a guided pass is shown nothing: no encoder
        ([Target(name="tok_depth", order="roar")], 1),
        ([Target(name="tok_depth", order="maskgit", steps=4)], 4),
        ([Target(name="tok_depth", steps=3, guidance=2.0)], 1 + 2 * 2),  # later bases are shown the cells decided
        ([Target(name="tok_depth", conditions=("rgb",)), Target(name="tok_caption", conditions=("rgb",))], 1),
        ([Target(name="tok_depth"), Target(name="tok_caption")], 2),  # chained: the text sees the depth
    ],
)
def test_encoder_runs_only_when_its_inputs_change(plan: list[Target], passes: int) -> None:
    model, given = sharp(), {"rgb": pixels(2)}
    contexts = Contexts(model, given, 2)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    hook = model.encoder_norm.register_forward_hook(count)
    generate(model, given, plan, contexts=contexts)
    hook.remove()
    assert (runs, contexts.passes) == (passes, passes)


def test_output_is_forgotten_when_a_condition_is_replaced() -> None:
    model = sharp()
    contexts = Contexts(model, {"rgb": pixels()}, 1)
    before = contexts.output(["rgb"]).context_BND
    assert contexts.output(["rgb"]).context_BND is before
    contexts.put("rgb", pixels(seed=6))
    assert not torch.equal(contexts.output(["rgb"]).context_BND, before)


# ------------------------------------------------------------------------------------- what is given is kept


def test_grid_known_in_part_is_completed_around_what_is_known() -> None:
    model = sharp()
    part = torch.tensor([[3, -1, 5, -1, -1, -1, -1, -1, 10], [-1, 7, -1, -1, -1, -1, -1, 1, 2]])
    part[1, 2:7] = torch.arange(5)
    for order in ("maskgit", "roar"):
        target = Target(name="tok_depth", order=order, steps=3, temperature=2.0)
        got = generate(model, {"rgb": pixels(2), "tok_depth": part}, [target], rng())["tok_depth"]
        assert torch.equal(got[part >= 0], part[part >= 0])
        assert 0 <= int(got.min()) <= int(got.max()) < 11
    other = part.clone()
    other[0, 0] = 4
    greedy = [generate(model, {"tok_depth": p}, [Target(name="tok_depth")])["tok_depth"][0] for p in (part, other)]
    assert not torch.equal(greedy[0][1:], greedy[1][1:]), "the encoder is shown the cells that are known"


def test_grid_that_is_known_whole_stays_and_needs_no_pass() -> None:
    model = sharp()
    contexts = Contexts(model, {"rgb": pixels()}, 1)
    whole = torch.arange(9)[None]
    given = {"rgb": pixels(), "tok_depth": whole}
    assert torch.equal(generate(model, given, [Target(name="tok_depth")], contexts=contexts)["tok_depth"], whole)
    assert contexts.passes == 0


def test_text_goes_on_from_its_beginning() -> None:
    model = sharp()
    begun = [[30, 31], []]
    got = texts(generate(model, {"rgb": pixels(2), "tok_caption": begun}, [Target(name="tok_caption")])["tok_caption"])
    free = texts(predict(model, {"rgb": pixels(2)}, ["tok_caption"])["tok_caption"])
    assert got[0][:2] == [30, 31]
    assert got[1] == free[1], "a text without a beginning is as before"
    context = Contexts(model, {"rgb": pixels(2)}, 2).output(["rgb"])
    decoder = TextDecoder(model, "tok_caption", context)
    with torch.no_grad():
        for place, token in enumerate((FIRST, 30, 31)):
            logits = decoder.step(torch.tensor([token, FIRST]), place)
    assert got[0][2:3] == _until_end([int(logits[0].argmax())])


def test_longest_text_is_obeyed() -> None:
    got = generate(sharp(), {"rgb": pixels()}, [Target(name="tok_caption", max_tokens=3)])["tok_caption"]
    assert len(got[0]) <= 3


# -------------------------------------------------------------------------------------------- independence


def test_sample_is_the_same_in_any_batch_and_at_any_place() -> None:
    model, three = sharp(), pixels(3)
    plan = [
        Target(name="tok_depth", order="roar", steps=3, temperature=2.0, top_k=8),
        Target(name="tok_caption", temperature=3.0, top_p=0.9),
    ]
    together = generate(model, {"rgb": three}, plan, rng(1))
    alone = generate(model, {"rgb": three[2:]}, plan, rng(1), samples=[2])
    assert torch.equal(together["tok_depth"][2], alone["tok_depth"][0])
    assert texts(together["tok_caption"])[2] == texts(alone["tok_caption"])[0]
    again = generate(model, {"rgb": three}, plan, rng(1))
    other = generate(model, {"rgb": three}, plan, rng(2))
    assert torch.equal(together["tok_depth"], again["tok_depth"])
    assert not torch.equal(together["tok_depth"], other["tok_depth"])


def test_partly_known_neighbour_changes_nothing_for_a_sample() -> None:
    model, two = sharp(), pixels(2)
    part = torch.full((2, 9), -1)
    part[1, :5] = 4
    target = Target(name="tok_depth", order="maskgit", steps=4, temperature=1.5, decay="linear", gumbel=2.0)
    both = generate(model, {"rgb": two, "tok_depth": part}, [target], rng(3))["tok_depth"]
    for i in (0, 1):
        given = {"rgb": two[i : i + 1], "tok_depth": part[i : i + 1]}
        assert torch.equal(both[i], generate(model, given, [target], rng(3), samples=[i])["tok_depth"][0])


def test_roar_decides_cells_in_random_order_and_maskgit_the_surest_first() -> None:
    model, given = sharp(), {"rgb": pixels()}
    first: dict[str, set[int]] = {"roar": set(), "maskgit": set()}
    for order, cells in first.items():
        for seed in range(7):
            contexts = _Watched(model, given, 1)
            target = Target(name="tok_depth", order=order, steps=9)
            generate(model, given, [target], rng(seed), contexts=contexts)
            (cell,) = contexts.shown[0]
            cells.add(cell)
    sure = raw_logits(model, given, "tok_depth").softmax(-1).max(-1).values[0]
    assert first["maskgit"] == {int(sure.argmax())}
    assert len(first["roar"]) > 2


class _Watched(Contexts):
    """Remembers which cells of the grid each pass was shown."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.shown: list[list[int]] = []

    def output(self, names: Any, dropped: Any = (), extra: Any = None) -> Any:
        if extra is not None:
            self.shown.append(extra.shown_BW[0].nonzero()[:, 0].tolist())
        return super().output(names, dropped, extra)


def test_gumbel_noise_loosens_the_order_and_is_gone_at_the_last_step() -> None:
    model, given = sharp(), {"rgb": pixels()}
    first = set()
    for seed in range(7):
        contexts = _Watched(model, given, 1)
        generate(model, given, [Target(name="tok_depth", steps=9, gumbel=50.0)], rng(seed), contexts=contexts)
        first.add(contexts.shown[0][0])
    assert len(first) > 2
    plain = generate(model, given, [Target(name="tok_depth")], rng(0))["tok_depth"]
    noisy = generate(model, given, [Target(name="tok_depth", gumbel=50.0)], rng(0))["tok_depth"]
    assert torch.equal(plain, noisy)


# ------------------------------------------------------------------------------------------- plans and errors


def test_defaults_follow_the_kind_of_target_and_whether_there_is_a_picture() -> None:
    a = tiny()
    assert default_target(a, "tok_depth", pictured=True).model_dump(exclude_unset=True) == {
        "name": "tok_depth",
        "order": "roar",
        "steps": 1,
        "temperature": 0.0,
    }
    blind = default_target(a, "tok_depth", pictured=False)
    assert (blind.order, blind.steps, blind.temperature, blind.decay, blind.guidance) == ("roar", 8, 3.0, "onex", 2.0)
    assert default_target(a, "tok_caption", pictured=True).temperature == 0.3


def test_plan_takes_labels_and_changes_and_its_own_settings_win() -> None:
    entries = ["depth", {"name": "caption", "temperature": 0.7, "guidance": {"depth": 2}}]
    depth, caption = plan_of(tiny(), entries, True, steps=4, temperature=1.0, top_p=None)
    assert (depth.name, depth.order, depth.steps, depth.temperature) == ("tok_depth", "maskgit", 4, 1.0)
    assert (caption.name, caption.temperature, caption.guidance) == ("tok_caption", 0.7, {"tok_depth": 2.0})
    (depth,) = plan_of(tiny(), [{"name": "depth", "conditions": ["rgb", "caption"]}], False, guidance={"caption": 3})
    assert (depth.conditions, depth.guidance) == (("rgb", "tok_caption"), {"tok_caption": 3.0})


@pytest.mark.parametrize(
    ("given", "plan", "message"),
    [
        ({"rgb": 1}, [{"name": "tok_depth", "order": "autoregressive"}], "tok_depth is a grid and cannot"),
        ({"rgb": 1}, [{"name": "tok_caption", "order": "roar"}], "tok_caption is a text and cannot"),
        ({"rgb": 1}, [{"name": "tok_depth", "guidance": {"tok_caption": 2}}], "'tok_caption' is neither given nor"),
        (
            {"rgb": 1, "tok_caption": 1},
            [{"name": "tok_depth", "conditions": ["rgb"], "guidance": {"tok_caption": 2}}],
            "'tok_caption' has a guidance weight and is not among",
        ),
        ({"rgb": 1}, [{"name": "tok_dpeth"}], "did you mean 'tok_depth'"),
        ({"rgb": 1}, [{"name": "tok_depth"}, {"name": "tok_depth"}], "'tok_depth' is twice"),
        ({"rgb": 1, "texts": 2}, [{"name": "tok_depth"}], "different numbers of samples"),
        ({"tok_depth": 11}, [{"name": "tok_caption"}], r"tok_depth: ids 0\.\.11; the model knows 0\.\.10"),
    ],
)
def test_plans_that_cannot_be_followed_are_refused(given: Any, plan: list[dict[str, Any]], message: str) -> None:
    values: dict[str, Any] = {"rgb": pixels(), "tok_caption": [[7]], "texts": [[7]] * 2}
    values["tok_depth"] = torch.tensor([[0] * 8 + [11]])
    with pytest.raises(ValueError, match=message):
        generate(
            sharp(),
            {name.replace("texts", "tok_caption"): values[name] for name in given},
            [Target(**entry) for entry in plan],
        )


def test_modality_that_is_no_input_is_predicted_in_one_step_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    model = sharp(domains_in=("rgb",))
    got = generate(model, {"rgb": pixels()}, [Target(name="tok_depth", steps=3)])["tok_depth"]
    assert torch.equal(got, predict(model, {"rgb": pixels()}, ["tok_depth"])["tok_depth"])
    assert "predicted in one step (asked for: 3)" in caplog.text


# ---------------------------------------------------------------------------------------------------- ml-4m


@needs_reference
def test_one_maskgit_pass_with_and_without_guidance_is_that_of_ml4m() -> None:
    folder = REFERENCE / "fm_swiglu_nobias"
    model, data = load_model(folder), load_file(folder / "ref.safetensors")
    given = {"rgb@224": data["gen.rgb"]}
    got = generate(model, given, [Target(name="tok_semseg@224")])["tok_semseg@224"]
    assert torch.equal(data["gen.maskgit.pos"], torch.arange(196)[None])
    assert torch.equal(got, data["gen.maskgit.argmax"])
    for weight, key in ((1.0, "cond"), (2.0, "cfg2")):
        logits = passes_of(model, given, Target(name="tok_semseg@224", guidance=weight))[:, :8]
        torch.testing.assert_close(logits, data[f"gen.maskgit.logits_{key}"], atol=1e-4, rtol=1e-4)


def their_sampler() -> tuple[Any, Any]:
    """ml-4m's modules `fm` and `generate` from a checkout; OpenCV and albumentations, which they import and generation
    does not use, are left empty. Skipped without."""
    if not os.environ.get("FOURMILL_ML4M"):
        pytest.skip("FOURMILL_ML4M names no checkout of apple/ml-4m")
    for name in ("einops", "webdataset", "braceexpand", "datasets"):
        pytest.importorskip(name)
    for name, module in stand_ins().items():
        sys.modules.setdefault(name, module)
    return importlib.import_module("fourm.models.fm"), importlib.import_module("fourm.models.generate")


@needs_reference
@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_greedy_text_is_that_of_ml4ms_sampler(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = REFERENCE / "fm_swiglu_nobias"
    monkeypatch.syspath_prepend(os.environ.get("FOURMILL_ML4M", "."))
    fm, theirs = their_sampler()
    model, data = load_model(folder), load_file(folder / "ref.safetensors")
    their_model = fm.FM(json.loads((folder / "config.json").read_text()))
    their_model.load_state_dict(load_file(folder / "model_with_metadata.safetensors"))
    for network in (model, their_model):  # random weights say nearly the same of every input: sharpened, they do not
        sharpen(network)
    sampler, cpu, info = theirs.GenerationSampler(their_model.eval()), torch.device("cpu"), their_model.modality_info
    sample = {"rgb@224": {"tensor": data["gen.rgb"]}}
    sample = theirs.init_full_input_modality(sample, info, "rgb@224", cpu)
    sample = theirs.init_empty_target_modality(sample, info, "caption", 1, 40, cpu)
    drawn: list[int] = []
    monkeypatch.setattr(sampler, "merge_sequences_batched", lambda s, ids, *_: drawn.extend(ids[0].tolist()) or s)
    step = sampler.guided_autoregressive_step_batched if weight != 1 else sampler.autoregressive_step_batched
    options = {"conditioning": ["rgb@224"], "guidance_scale": weight} if weight != 1 else {}
    with torch.no_grad():
        step(sample, "caption", temperature=0.0, top_k=0.0, top_p=0.0, text_tokenizer=None, **options)
    target = Target(name="caption", sentinel=True, guidance=weight, max_tokens=39)
    got = generate(model, {"rgb@224": data["gen.rgb"]}, [target])["caption"][0].tolist()
    assert drawn[0] == FIRST
    assert got == _until_end(drawn[1:])
    assert len(got) > 3


@needs_reference
@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_greedy_roar_passes_are_those_of_ml4ms_sampler(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, name = REFERENCE / "fm_swiglu_nobias", "tok_semseg@224"
    monkeypatch.syspath_prepend(os.environ.get("FOURMILL_ML4M", "."))
    fm, theirs = their_sampler()
    model, data = load_model(folder), load_file(folder / "ref.safetensors")
    their_model = fm.FM(json.loads((folder / "config.json").read_text()))
    their_model.load_state_dict(load_file(folder / "model_with_metadata.safetensors"))
    for network in (model, their_model):  # random weights say nearly the same of every input: sharpened, they do not
        sharpen(network)
    sampler, cpu, info = theirs.GenerationSampler(their_model.eval()), torch.device("cpu"), their_model.modality_info
    sample = theirs.init_full_input_modality({"rgb@224": {"tensor": data["gen.rgb"]}}, info, "rgb@224", cpu)
    sample = theirs.init_empty_target_modality(sample, info, name, 1, 196, cpu)
    step = sampler.guided_roar_step_batched if weight != 1 else sampler.roar_step_batched
    options = {"conditioning": ["rgb@224"], "guidance_scale": weight} if weight != 1 else {}
    passes = torch.full((1, 196), 9.0)  # in which of the passes each cell was decided
    for number in range(4):
        with torch.no_grad():
            sample = step(sample, name, 49, temperature=0.0, top_k=0.0, top_p=0.0, seed=number, **options)
        passes = torch.where(~sample[name]["input_mask"] & (passes == 9), number, passes)
    assert (passes == 3).sum() == 49
    monkeypatch.setattr(Noise, "uniform", lambda self, count, device: passes.double() / 9)  # the order of its cells
    target = Target(name=name, order="roar", steps=4, guidance=weight)
    got = generate(model, {"rgb@224": data["gen.rgb"]}, [target])[name]
    assert torch.equal(got, sample[name]["tensor"])
    assert len(set(got[0].tolist())) > 3
