"""Against ml-4m's own classes, from a checkout that FOURMILL_ML4M names: equal weights and inputs, equal results, and
each reads the other's checkpoints. Every family of 4M models, and the settings that its published files do not use."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ml4m_batch, seeded

from benchmarks.loader_ml4m import stand_ins
from fourmill.model.config import Architecture, ModalityInfo
from fourmill.model.network import FourM
from fourmill.model.weights import load_model, save_model
from fourmill.pipeline.store import open_store

SWIGLU: dict[str, Any] = {
    **dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias", "norm_bias"), False),
    "act_layer": "SiLU",
    "gated_mlp": True,
}
GELU: dict[str, Any] = {
    **dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias", "norm_bias"), True),
    "act_layer": "GELU",
    "gated_mlp": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "swiglu": SWIGLU,
    "gelu": GELU,
    "qknorm": {**SWIGLU, "qk_norm": True},
    "gelu_qknorm": {**GELU, "qk_norm": True},
    "unshared": {**SWIGLU, "share_modality_embeddings": False},
    "registers": {**SWIGLU, "num_register_tokens": 3},
    "causal": {**SWIGLU, "decoder_causal_mask": True},
    "mixed": {**SWIGLU, "decoder_sep_mask": False},
    "mixed_causal": {**SWIGLU, "decoder_causal_mask": True, "decoder_sep_mask": False},
}
DOMAINS_IN = ["rgb@224", "caption", "t5_caption", "human_poses", "tok_depth@224", "tok_dinov2@224", "tok_dinov2_global"]
DOMAINS_OUT = ["caption", "human_poses", "tok_depth@224", "tok_dinov2_global", "tok_semseg@224"]
SIZES = {"rgb@224": 196, "tok_depth@224": 196, "tok_semseg@224": 196, "tok_dinov2@224": 256, "tok_dinov2_global": 16}
VOCABULARIES = {"tok_depth@224": 8192, "tok_semseg@224": 4096, "tok_dinov2@224": 8192, "tok_dinov2_global": 8192}


@pytest.fixture(scope="module")
def fourm() -> Iterator[Any]:
    """The module of ml-4m's network. Its decoder shuffles modalities; here they keep their order."""
    checkout = os.environ.get("FOURMILL_ML4M")
    if not checkout:
        pytest.skip("FOURMILL_ML4M names no checkout of apple/ml-4m")
    for name in ("webdataset", "braceexpand", "einops", "datasets"):
        pytest.importorskip(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(checkout)
        for name, stand_in in stand_ins().items():  # of its data code only
            if name not in sys.modules:
                patch.setitem(sys.modules, name, stand_in)
        module = importlib.import_module("fourm.models.fm")
        patch.setattr(module, "random", types.SimpleNamespace(sample=lambda items, count: list(items)[:count]))
        yield module
        for name in [n for n in sys.modules if n == "fourm" or n.startswith("fourm.")]:
            del sys.modules[name]


def theirs(fourm: Any, family: str, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A tiny network of ml-4m's, every parameter random, and its configuration."""
    config = {
        **{"domains_in": DOMAINS_IN, "domains_out": DOMAINS_OUT, "image_size": 224, "patch_size": 16, "mlp_ratio": 4},
        **{"encoder_depth": 2, "decoder_depth": 2, "dim": 32, "num_heads": 2},
        **FAMILIES[family],
    }
    torch.manual_seed(seed)
    model = fourm.FM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(centre, 0.1 if "norm" in name or "bias" in name else 0.3 if "emb" in name else 0.15)
    return model, config


def batch_of(domains: dict[str, str], seed: int = 0, size: int = 3) -> dict[str, dict[str, torch.Tensor]]:
    """ml-4m's tensors and masks (True is hidden) for a few samples of everything, fewer in the later ones."""
    rng, chooser = torch.Generator().manual_seed(seed), random.Random(seed)
    made = {}
    for name, kind in domains.items():
        length = SIZES.get(name, 77 if kind == "vectors" else 60)
        hide_in, hide_out = torch.ones(2, size, length, dtype=torch.bool)
        attention = torch.zeros(size, length, dtype=torch.long)
        if kind == "grid":
            tensor = torch.randint(0, VOCABULARIES[name], (size, length), generator=rng)
        elif kind == "sequence":
            tensor = torch.randint(0, 30_000, (size, length), generator=rng)
        else:
            shape = (3, 224, 224) if kind == "pixels" else (77, 4096)
            tensor = torch.randn(size, *shape, generator=rng)
        for i in range(size):
            order = chooser.sample(range(length), length) if kind in ("pixels", "grid") else list(range(length))
            hide_in[i, order[: 8 - 2 * i]] = False
            if kind == "grid":
                asked = sorted(order[8 : 17 - i])
                hide_out[i, asked], attention[i, asked[0]] = False, len(asked)
            elif kind == "sequence":  # the first shifts the others by one and is no target itself
                hide_out[i, 30 : 41 - i], attention[i, 30 : 41 - i] = False, 1
        made[name] = {
            "tensor": tensor,
            "input_mask": hide_in,
            "target_mask": hide_out,
            "decoder_attention_mask": attention,
        }
    return made


def assert_equal_results(fourm: Any, their: Any, our: FourM) -> None:
    domains = {n: our.architecture.modalities[n].kind for n in our.architecture.names}
    wanted: dict[str, Any] = {}
    batch = batch_of(domains)
    hooks = [
        their.encoder_norm.register_forward_hook(lambda *call: wanted.update(encoded=call[2])),
        their.decoder_norm.register_forward_hook(lambda *call: wanted.update(decoded=call[2])),
    ]
    our.encoder_norm.register_forward_hook(lambda *call: wanted.update(our_encoded=call[2]))
    copied = {n: {k: v.clone() for k, v in d.items()} for n, d in batch.items()}
    inputs, targets = ml4m_batch(our.architecture, batch)
    width_in, width_out = inputs.ids_BN.shape[1], targets.ids_BM.shape[1]
    loss, by_modality = their(copied, num_encoder_tokens=width_in, num_decoder_tokens=width_out, loss_type="mod")
    loss.backward()
    got = our(inputs, targets)
    got.total.backward()
    with torch.no_grad():
        hidden = our.decode(our.encode(inputs), inputs.valid_BN, targets)
    real = torch.nn.functional.pad(inputs.valid_BN, (our.architecture.num_register_tokens, 0), value=True)
    torch.testing.assert_close(wanted["our_encoded"][real], wanted["encoded"][real], atol=1e-4, rtol=0)
    hidden, decoded = hidden[targets.valid_BM], wanted["decoded"][targets.valid_BM].detach()
    assert inputs.valid_BN.any(0).all()
    assert not inputs.valid_BN.all()
    torch.testing.assert_close(hidden, decoded, atol=1e-4, rtol=0)
    for name in our.architecture.domains_out:
        logits = their.decoder_embeddings[name].forward_logits(decoded)
        torch.testing.assert_close(our.logits(hidden, name), logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(got.sums[name] / got.counts[name], by_modality[name].detach(), atol=1e-4, rtol=0)
    torch.testing.assert_close(got.total, loss, atol=1e-4, rtol=0)
    gradients = dict(our.named_parameters())
    for name, parameter in their.named_parameters():
        if parameter.grad is not None:
            found = gradients[name].grad
            torch.testing.assert_close(found, parameter.grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_weights_and_inputs_give_ml4ms_results_and_gradients(fourm: Any, family: str, tmp_path: Path) -> None:
    their, config = theirs(fourm, family)
    their.save_pretrained(tmp_path, config=config)
    our = load_model(tmp_path)
    kinds = [i.kind for i in our.architecture.modalities.values()]
    assert [*our.architecture.names] == [*DOMAINS_IN, "tok_semseg@224"]
    assert kinds == ["pixels", "sequence", "vectors", "sequence", "grid", "grid", "grid", "grid"]
    assert_equal_results(fourm, their, our)


@pytest.mark.parametrize("family", FAMILIES)
def test_ml4m_loads_what_we_write(fourm: Any, family: str, tmp_path: Path) -> None:
    their, config = theirs(fourm, family, seed=1)
    their.save_pretrained(tmp_path / "theirs", config=config)
    our = load_model(tmp_path / "theirs")
    save_model(our, open_store(tmp_path / "ours"))
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {key: written[key] for key in config} == config
    assert_equal_results(fourm, fourm.FM.from_pretrained(tmp_path / "ours").eval(), our)


def test_ml4ms_header_route_reads_a_model_trained_here_under_its_own_names(fourm: Any, tmp_path: Path) -> None:
    """The route of ml-4m's README: `load_safetensors`, `FM(config)`, `load_state_dict`."""
    modalities = {
        "rgb": ModalityInfo(kind="pixels", tokens=196, grid=(14, 14)),
        "tok_caption": ModalityInfo(kind="sequence", vocabulary=30_000, tokens=256),
        "tok_depth": ModalityInfo(kind="grid", vocabulary=8192, tokens=196, grid=(14, 14)),
        "tok_dinov2": ModalityInfo(kind="grid", vocabulary=8192, tokens=256, grid=(16, 16)),
        "tok_rgb": ModalityInfo(kind="grid", vocabulary=16_384, tokens=784, grid=(28, 28)),
    }
    trunk = {"dim": 32, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 2, "domains_in": tuple(modalities)}
    our = seeded(Architecture(**trunk, domains_out=tuple(modalities)[1:], modalities=modalities))
    save_model(our, open_store(tmp_path))
    loader = importlib.import_module("fourm.utils.checkpoint")
    tensors, config = loader.load_safetensors(str(tmp_path / "model.safetensors"))
    assert config["domains_in"] == ["rgb@224", "caption", "tok_depth@224", "tok_dinov2@224", "tok_rgb@448"]
    their = fourm.FM(config=config).eval()
    their.load_state_dict(tensors)
    got = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, got[name]) for name, value in their.state_dict().items())
    row = their.encoder_embeddings["caption"].token_emb.weight[7]
    assert torch.equal(row, our.encoder_embeddings["tok_caption"].token_emb.weight[7])  # type: ignore[union-attr]
