"""What training asks of the network: its loss and gradients, known counts, recomputed and compiled blocks, FLOPs."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_models import inputs_of, seeded, targets_of, tiny
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fourmill.model import loss as loss_module
from fourmill.model.batch import Inputs, Targets
from fourmill.model.blocks import as_bias, attention, checkpoint_blocks, compile_blocks
from fourmill.model.config import Architecture, ModalityInfo, ModelConfig
from fourmill.model.flops import flops_per_sample
from fourmill.model.loss import cross_entropy
from fourmill.model.network import FourM, Loss

FAMILIES = [
    {},
    {"tie_logits": False, "share_modality_embeddings": False},
    {"num_register_tokens": 2, "qk_norm": True},
    {"gated_mlp": False, **dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias", "norm_bias"), True)},
]


def batch() -> tuple[Inputs, Targets]:
    """Two samples of `tiny()`, the second with a place less on both sides."""
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    inputs = inputs_of([[(0, 0, 0), (0, 3, 0), (1, 2, 7), (2, 0, 33)], [(2, 0, 5), (0, 1, 0), (1, 8, 2)]], 4, pixels)
    asked = [[(1, 0, 0, 4), (1, 5, 0, 9), (2, 0, 5, 20)], [(2, 0, 5, 8), (2, 1, 8, 3)]]
    return inputs, targets_of(asked, 3)


def gradients(model: FourM, loss: Loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.total.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert None not in found.values(), [n for n, g in found.items() if g is None]
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_known_counts_change_nothing() -> None:
    model, (inputs, targets) = seeded(tiny()), batch()
    known = replace(inputs, counts=(3, 2, 2)), replace(targets, counts=(0, 2, 3))
    want, got = model(inputs, targets), model(*known)
    assert torch.equal(got.total, want.total)
    assert got.counts == want.counts == {"tok_depth": 2, "tok_caption": 3}
    assert not known[0].is_full
    full = Inputs(*(getattr(inputs, f)[:1] for f in ("ids_BN", "position_BN", "modality_BN", "valid_BN")))
    assert replace(full, counts=(2, 1, 1)).is_full
    assert not full.is_full, "unknown without asking"


@pytest.mark.parametrize("changes", FAMILIES)
def test_every_parameter_has_a_gradient_whatever_a_batch_lacks(changes: dict[str, object]) -> None:
    model, (inputs, targets) = seeded(tiny(**changes)), batch()
    gradients(model, model(inputs, targets))
    only_text = inputs_of([[(2, 0, 5)]], 1), targets_of([[(2, 0, 5, 8)]], 1)
    found = gradients(model, model(*only_text))
    assert not found["encoder_embeddings.rgb.proj.weight"].any()
    assert not found["mask_token"].any()
    assert (
        found["decoder_embeddings.tok_caption.to_logits.weight" if "tie_logits" in changes else "mask_token"]
        is not None
    )
    nothing = gradients(model, model(only_text[0], targets_of([[]], 1)))
    assert all(not gradient.any() for gradient in nothing.values())


def test_weights_are_of_summed_cross_entropies() -> None:
    model, (inputs, targets) = seeded(tiny()), batch()
    plain = model(inputs, targets)
    weights = torch.tensor([0.25, 2.0])
    got = model(inputs, targets, weights)
    torch.testing.assert_close(got.total, 0.25 * plain.sums["tok_depth"] + 2 * plain.sums["tok_caption"])
    same = model(inputs, targets, torch.tensor([1 / (2 * 2), 1 / (2 * 3)]))
    torch.testing.assert_close(same.total, plain.total)
    assert_close(gradients(model, same), gradients(model, model(inputs, targets)))


def test_slices_of_a_batch_with_its_weights_add_up_to_its_gradient() -> None:
    model, (inputs, targets) = seeded(tiny()), batch()
    want = gradients(model, model(inputs, targets))
    weights, total = torch.tensor([1 / (2 * 2), 1 / (2 * 3)]), dict.fromkeys(want, torch.tensor(0.0))
    for i in range(2):
        fields = [
            {f: getattr(side, f)[i : i + 1] for f in names}
            for side, names in (
                (inputs, ("ids_BN", "position_BN", "modality_BN", "valid_BN", "pixels_B3SS")),
                (targets, ("ids_BM", "position_BM", "modality_BM", "valid_BM", "label_BM")),
            )
        ]
        one = gradients(model, model(Inputs(**fields[0]), Targets(**fields[1]), weights))
        total = {name: total[name] + one[name] for name in want}
    assert_close(total, want)


@pytest.mark.parametrize("chunk", [1, 40, 200, 1 << 26])  # 1, 2, 10 and all 30 rows of 20 logits at a time
def test_cross_entropy_and_its_gradients_are_the_plain_formulas(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(30, 8, generator=rng), torch.randn(20, 8, generator=rng)
    label = torch.randint(0, 20, (30,), generator=rng)
    sides = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        nats = cross_entropy(h, w, label) if ours else functional.cross_entropy(h @ w.T, label, reduction="sum")
        (nats * 0.3).backward()
        sides.append({"nats": nats.detach(), "hidden": h.grad, "weight": w.grad})
    assert_close(sides[0], sides[1], atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(hidden, weight, label), sides[1]["nats"])
    with torch.autocast("cpu", torch.bfloat16):
        h = hidden.clone().requires_grad_()
        nats = cross_entropy(h, weight, label)
    nats.backward()
    assert (nats.dtype, h.grad.dtype) == (torch.float32, torch.float32)  # type: ignore[union-attr]
    torch.testing.assert_close(nats.detach(), sides[1]["nats"], rtol=0.02, atol=0)


def test_attention_takes_masks_as_bools_or_as_additions() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=rng) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5, generator=rng) < 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    want = functional.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(attention(q, k, v, mask), want)
    torch.testing.assert_close(attention(q, k, v, as_bias(mask, q)), want)
    torch.testing.assert_close(attention(q, k, v, None), functional.scaled_dot_product_attention(q, k, v))
    assert as_bias(None, q) is None


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_blocks_give_the_same_gradients(autocast: bool) -> None:
    model, (inputs, targets) = seeded(tiny()), batch()
    again = copy.deepcopy(model)
    checkpoint_blocks(again)
    assert again.state_dict().keys() == model.state_dict().keys()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want, got = model(inputs, targets), again(inputs, targets)
    assert torch.equal(got.total, want.total)
    saved = dict.fromkeys(("plain", "recomputed"), 0)

    def count(name: str, tensor: torch.Tensor) -> torch.Tensor:
        saved[name] += 1
        return tensor

    for name, which in (("plain", model), ("recomputed", again)):
        with torch.autograd.graph.saved_tensors_hooks(partial(count, name), lambda tensor: tensor):
            which(inputs, targets)
    assert saved["recomputed"] < saved["plain"] / 2
    assert_close(gradients(again, got), gradients(model, want), atol=0 if not autocast else 1e-3)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_numbers_under_the_same_names() -> None:
    model, (inputs, targets) = seeded(tiny()), batch()
    compiled = copy.deepcopy(model)
    checkpoint_blocks(compiled)
    compile_blocks(compiled)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    want, got = model(inputs, targets), compiled(inputs, targets)
    torch.testing.assert_close(got.total, want.total)
    assert_close(gradients(compiled, got), gradients(model, want), atol=1e-5)


def test_register_tokens_are_seen_and_stand_first() -> None:
    model, (inputs, targets) = seeded(tiny(num_register_tokens=3)), batch()
    normed: list[torch.Tensor] = []
    hook = model.encoder_norm.register_forward_hook(lambda *call: normed.append(call[2]))
    context = model.encode(inputs)
    hook.remove()
    assert context.shape == (2, 3 + 4, 32)
    places = context - model.decoder_proj_context(normed[0])
    torch.testing.assert_close(places[:, :3], torch.zeros(2, 3, 32), msg="registers have no place of their own")
    assert (places[:, 3:].abs().amax(2) > 0.1).tolist() == [[True] * 4, [True] * 3 + [False]]
    before = model.decode(context, inputs.valid_BN, targets)
    moved = context.clone()
    moved[1, 6, 0] += 1  # the second sample's empty place
    assert torch.equal(model.decode(moved, inputs.valid_BN, targets), before)
    moved[:, 0, 0] += 1
    assert not torch.allclose(model.decode(moved, inputs.valid_BN, targets), before)
    with torch.no_grad():
        model.register_tokens[0, 1, 0] += 1
    assert not torch.allclose(model.encode(inputs)[:, 3:], context[:, 3:])


def test_masks_of_the_decoder_follow_the_architecture() -> None:
    kinds = torch.tensor([[1, 1, 2, 2, -1]])  # two cells, two words, an empty place
    empty = torch.zeros_like(kinds)
    targets = Targets(empty, empty, kinds, kinds >= 0, empty)
    wanted = {
        (True, False): ["11000", "11000", "00100", "00110"],
        (True, True): ["10000", "11000", "00100", "00110"],
        (False, False): ["11000", "11000", "11100", "11110"],
        (False, True): ["10000", "11000", "11100", "11110"],
    }
    for (apart, causal), rows in wanted.items():
        model = seeded(tiny(decoder_sep_mask=apart, decoder_causal_mask=causal))
        mask = model._target_mask(targets)[0, 0]
        assert ["".join("01"[int(seen)] for seen in row) for row in mask[:4]] == rows
        assert mask[4].any(), "every place sees something"


def vector_model() -> FourM:
    modalities = {
        "rgb@32": ModalityInfo(kind="pixels", tokens=4, grid=(2, 2)),
        "rgb@48": ModalityInfo(kind="pixels", tokens=9, grid=(3, 3)),
        "t5_caption": ModalityInfo(kind="vectors", width=6, tokens=7),
        "tok_depth": ModalityInfo(kind="grid", vocabulary=11, tokens=9, grid=(3, 3)),
    }
    return seeded(tiny(domains_in=tuple(modalities), domains_out=("tok_depth",), modalities=modalities))


def test_embedded_inputs_and_pixels_of_two_sizes_are_taken_where_they_are_named() -> None:
    model, rng = vector_model(), torch.Generator().manual_seed(0)
    pixels = {"rgb@32": torch.randn(1, 3, 32, 32, generator=rng), "rgb@48": torch.randn(1, 3, 48, 48, generator=rng)}
    vectors = torch.randn(1, 7, 6, generator=rng)
    inputs = inputs_of([[(0, 3, 0), (1, 8, 0), (2, 0, 5), (2, 1, 2)]], 4)  # positions 0, 1 hold the vectors 5, 2
    inputs = replace(inputs, pixels_B3SS=pixels, vectors={"t5_caption": vectors})
    want = model.encode(inputs)
    for row, seen in ((5, True), (2, True), (0, False), (1, False)):
        changed = vectors.clone()
        changed[0, row] += 1
        got = model.encode(replace(inputs, vectors={"t5_caption": changed}))
        assert torch.equal(got, want) is not seen
    for name, corner in (("rgb@32", 31), ("rgb@48", 47)):
        changed = pixels[name].clone()
        changed[..., 0, 0] += 1  # of the first patch, which is no input
        assert torch.equal(model.encode(replace(inputs, pixels_B3SS={**pixels, name: changed})), want)
        changed[..., corner, corner] += 1
        assert not torch.equal(model.encode(replace(inputs, pixels_B3SS={**pixels, name: changed})), want)
    with pytest.raises(ValueError, match="name tokens of 't5_caption' but hold no vectors"):
        model.encode(replace(inputs, vectors=None))
    with pytest.raises(ValueError, match="name patches of pixels but hold no pixels"):
        model.encode(replace(inputs, pixels_B3SS={"rgb@32": pixels["rgb@32"]}))


def test_positions_of_global_tokens_are_learned_and_those_of_grids_are_not() -> None:
    for grid, learned in ((None, True), ((1, 9), True), ((3, 3), False), ((9, 1), False)):
        info = ModalityInfo(kind="grid", vocabulary=11, tokens=9, grid=grid)
        names = {"rgb": ModalityInfo(kind="pixels", tokens=1, grid=(1, 1)), "tok_x": info}
        model = seeded(tiny(domains_in=tuple(names), domains_out=("tok_x",), modalities=names))
        parameters = dict(model.named_parameters())
        assert ("encoder_embeddings.tok_x.pos_emb" in parameters) is learned
        assert ("decoder_embeddings.tok_x.pos_emb" in parameters) is learned
        assert "encoder_embeddings.rgb.pos_emb" not in parameters


def test_sizes_are_4ms_and_single_numbers_win() -> None:
    found = [ModelConfig(size=s) for s in ("tiny", "small", "b", "l", "xl")]
    assert [(c.dim, c.encoder_depth, c.decoder_depth, c.num_heads) for c in found] == [
        (384, 6, 6, 6),
        (512, 8, 8, 8),
        (768, 12, 12, 12),
        (1024, 24, 24, 16),
        (2048, 24, 24, 32),
    ]
    own = ModelConfig.model_validate({"size": "b", "decoder_depth": 3})
    assert (own.dim, own.encoder_depth, own.decoder_depth, own.size) == (768, 12, 3, None)
    assert own == ModelConfig(dim=768, encoder_depth=12, decoder_depth=3, num_heads=12)
    assert ModelConfig().dim == 192
    with pytest.raises(ValueError, match="'tiny', 'small', 'b', 'l' or 'xl'"):
        ModelConfig.model_validate({"size": "huge"})


@pytest.mark.parametrize("changes", [{"gated_mlp": True}, {"gated_mlp": False}, {"num_register_tokens": 3}])
def test_flops_are_those_that_torch_counts(changes: dict[str, object]) -> None:
    modalities = {
        "rgb": ModalityInfo(kind="pixels", tokens=4, grid=(2, 2)),
        "tok_depth": ModalityInfo(kind="grid", vocabulary=44, tokens=9, grid=(3, 3)),
        "tok_caption": ModalityInfo(kind="sequence", vocabulary=20, tokens=12),
    }
    architecture = tiny(modalities=modalities, decoder_depth=3, **changes)
    model = seeded(architecture)
    pixels = torch.zeros(2, 3, 32, 32)
    shown = [(0, 0, 0), (0, 1, 0), (1, 2, 7), (1, 3, 7), (2, 0, 3), (2, 1, 9)]
    inputs = inputs_of([shown] * 2, 6, pixels)
    targets = targets_of([[(1, 0, 0, 4), (1, 1, 0, 4), (2, 0, 5, 8), (2, 1, 8, 3)]] * 2, 4)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(inputs, targets)
    assert 3 * counter.get_total_flops() / 2 == flops_per_sample(architecture, 6, 4)
    counter = FlopCounterMode(display=False)
    with counter:
        model(inputs, targets).total.backward()
    no_gradient_of_pixels = 2 * 2 * 768 * 32  # two patches a sample
    assert counter.get_total_flops() / 2 == flops_per_sample(architecture, 6, 4) - no_gradient_of_pixels


def test_published_sizes_of_4m_b_take_the_flops_that_its_parameters_suggest() -> None:
    grid = {f"tok_{i}": ModalityInfo(kind="grid", vocabulary=8192, tokens=196, grid=(14, 14)) for i in range(7)}
    architecture = Architecture(size="b", domains_in=tuple(grid), domains_out=tuple(grid), modalities=grid)
    trunk, logits = 12 * 12 * 768**2 + 16 * 12 * 768**2, 8192 * 768
    assert flops_per_sample(architecture, 128, 128) == pytest.approx(6 * 128 * (trunk + logits), rel=0.05)
