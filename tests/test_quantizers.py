"""Quantizers: which code a latent takes, what an id stands for, and that evaluation changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fourmill.tokenizers.config import NetworkConfig
from fourmill.tokenizers.networks.quantizers import build_quantizer, from_stored, to_stored

KINDS: dict[str, dict[str, Any]] = {
    "vq": {"codebook_size": 16, "latent_dim": 4},
    "fsq": {"levels": (4, 3, 3)},
    "lfq": {"codebook_size": 16},
    "memcodes": {"codebook_size": 16, "latent_dim": 8, "num_codebooks": 2},
}


def config(kind: str, **fields: Any) -> NetworkConfig:
    return NetworkConfig.model_validate({"dim": 16, "heads": 2, "quantizer": kind, **KINDS[kind], **fields})


def as_map(latents: list[list[float]]) -> torch.Tensor:
    """(N, Z) -> (1, Z, 1, N)."""
    return torch.tensor(latents).T[None, :, None, :]


def test_a_latent_takes_the_code_of_the_greatest_cosine_whatever_its_length() -> None:
    quantizer = build_quantizer(config("vq", codebook_size=3, latent_dim=2)).eval()
    quantizer.load_state_dict(
        {
            "inner._codebook.initted": torch.tensor(True),
            "inner._codebook.cluster_size": torch.ones(1, 3),
            "inner._codebook.embed": torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]]),
            "inner._codebook.embed_avg": torch.zeros(1, 3, 2),
        }
    )
    codes, ids, loss = quantizer(as_map([[5.0, 1.0], [0.1, 0.2], [-0.01, 0.005]]))
    assert ids.tolist() == [[[0, 1, 2]]]
    assert codes[0, :, 0].T.tolist() == [[1, 0], [0, 1], [-1, 0]]
    assert loss == 0


def test_finite_scalars_count_their_channels_from_the_first() -> None:
    quantizer = build_quantizer(config("fsq", levels=(3, 5))).eval()
    codes, ids, _ = quantizer(as_map([[-9.0, -9.0], [9.0, -9.0], [-9.0, 9.0], [9.0, 9.0], [0.0, 0.0]]))
    assert ids.tolist() == [[[0, 2, 12, 14, 7]]]  # id = level of channel 0 + 3 x level of channel 1
    assert codes[0, :, 0].T.tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1], [0, 0]]


def test_sign_bits_are_read_from_the_first_channel() -> None:
    quantizer = build_quantizer(config("lfq", codebook_size=8)).eval()
    codes, ids, _ = quantizer(as_map([[-1.0, -2.0, -3.0], [3.0, -1.0, -1.0], [-1.0, -1.0, 0.5], [1.0, 1.0, 1.0]]))
    assert ids.tolist() == [[[0, 4, 1, 7]]]
    assert torch.equal(codes.sign(), codes)


def test_each_codebook_of_memcodes_answers_for_its_part_of_the_vector() -> None:
    quantizer = build_quantizer(config("memcodes", codebook_size=2, latent_dim=4)).eval()
    with torch.no_grad():
        quantizer.codes.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 3.0]]]))
        quantizer.to_k.weight.copy_(torch.eye(2).expand(2, 2, 2))
        quantizer.to_v.weight.copy_(torch.eye(2).expand(2, 2, 2))
    codes, ids, _ = quantizer(as_map([[0.9, 0.1, 0.1, 0.9], [0.0, 5.0, 5.0, 0.0]]))
    assert ids.tolist() == [[[[0, 1]], [[1, 0]]]]  # (1, codebooks, 1, 2): sample-wise the pairs (0, 1) and (1, 0)
    assert codes[0, :, 0].T.tolist() == [[1, 0, 0, 3], [0, 1, 2, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_stand_for_the_codes_that_were_given(kind: str) -> None:
    torch.manual_seed(0)
    chosen = config(kind)
    quantizer = build_quantizer(chosen)
    latents = torch.randn(3, chosen.code_dim, 2, 2)
    quantizer.train()(latents)  # starts the codebook
    quantizer.eval()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    codes, ids, _ = quantizer(latents)
    places = ids if ids.ndim == 3 else ids.permute(0, 2, 3, 1)
    assert torch.equal(quantizer.lookup(places).permute(0, 3, 1, 2), codes)
    assert ids.min() >= 0
    assert ids.max() < chosen.vocabulary
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_latents(kind: str) -> None:
    torch.manual_seed(0)
    chosen = config(kind)
    latents = torch.randn(3, chosen.code_dim, 2, 2, requires_grad=True)
    codes, _, loss = build_quantizer(chosen).train()(latents)
    (codes.square().sum() + loss).backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


def test_a_codebook_that_was_stored_goes_on_learning_where_it_was() -> None:
    torch.manual_seed(0)
    live = build_quantizer(config("vq")).train()
    for _ in range(3):
        live(torch.randn(2, 4, 4, 4))
    state = {f"quantize.{name}": tensor for name, tensor in live.state_dict().items()}
    stored = to_stored(state)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        "quantize._codebook.initted": (1,),
        "quantize._codebook.cluster_size": (16,),
        "quantize._codebook.embed": (16, 4),
    }
    back = from_stored(stored)
    assert set(back) == set(state)
    assert torch.equal(back["quantize.inner._codebook.embed"], state["quantize.inner._codebook.embed"])
