"""The network: it computes what ml-4m computes, and no masked token can be felt.

Legend: B samples, N input tokens, M target tokens.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import inputs_of, ml4m_batch, seeded, targets_of, tiny

from fourmill.model.batch import Inputs, Targets
from fourmill.model.config import ModalityInfo
from fourmill.model.network import FourM, position_table
from fourmill.model.predict import predict
from fourmill.model.weights import load_model, save_model, to_bytes
from fourmill.pipeline.store import open_store

REFERENCE = Path(__file__).parents[2] / "shared" / "reference-data" / "ml4m"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no ml-4m reference data beside the repository")


def some_batch() -> tuple[Inputs, Targets]:
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    inputs = inputs_of([[(0, 0, 0), (0, 3, 0), (1, 2, 7), (2, 0, 33), (2, 1, 5)]], 7, pixels)
    targets = targets_of([[(1, 0, 0, 4), (1, 5, 0, 9), (2, 0, 5, 20), (2, 1, 20, 21), (2, 2, 21, 6)]], 6)
    return inputs, targets


def hidden(model: FourM, inputs: Inputs, targets: Targets) -> torch.Tensor:
    with torch.no_grad():
        return model.decode(model.encode(inputs), inputs.valid_BN, targets)


def nested(data: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """ml-4m's inputs by modality and part, from names such as `in.tok_rgb@224.input_mask`."""
    parts = [(*key.split(".")[1:], value) for key, value in data.items() if key.startswith("in.")]
    return {name: {part: value for n, part, value in parts if n == name} for name, _, _ in parts}


@needs_reference
@pytest.mark.parametrize("file", ["model.safetensors", "model_with_metadata.safetensors"])
def test_reference_checkpoint_gives_the_logits_and_loss_of_ml4m(file: str, tmp_path: Path) -> None:
    folder = REFERENCE / "fm_swiglu_nobias"
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / file).read_bytes())
    model, data = load_model(tmp_path), load_file(folder / "ref.safetensors")
    inputs, targets = ml4m_batch(model.architecture, nested(data))
    got = hidden(model, inputs, targets)
    for name in model.architecture.domains_out:
        chosen = targets.modality_BM == model.architecture.names.index(name)
        torch.testing.assert_close(model.logits(got[chosen], name), data[f"logits.{name}"], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        loss = model(inputs, targets)
    torch.testing.assert_close(loss.total, data["loss.mod"][0], atol=1e-4, rtol=0)


@needs_reference
def test_position_table_encodes_the_row_in_the_first_half() -> None:
    table = position_table(ModalityInfo(kind="grid", vocabulary=2, tokens=6, grid=(2, 3)), 8)[0]
    assert table.shape == (6, 8)
    torch.testing.assert_close(table[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    sin, cos = torch.sin(torch.tensor([1.0, 0.01])), torch.cos(torch.tensor([1.0, 0.01]))
    torch.testing.assert_close(table[3], torch.cat([sin, cos, torch.tensor([0.0, 0, 1, 1])]))  # row 1, column 0
    torch.testing.assert_close(table[1], torch.cat([torch.tensor([0.0, 0, 1, 1]), sin, cos]))  # row 0, column 1


def test_padding_is_never_seen() -> None:
    model, (inputs, targets) = seeded(tiny()), some_batch()
    want = hidden(model, inputs, targets)[:, :5]
    longer_in = inputs_of([[*[(int(m), int(p), int(i)) for m, p, i in zip(*real(inputs), strict=True)]]], 30)
    longer_in = replace(longer_in, pixels_B3SS=inputs.pixels_B3SS)
    junk = replace(inputs, ids_BN=torch.where(inputs.valid_BN, inputs.ids_BN, 9))
    torch.testing.assert_close(hidden(model, longer_in, targets)[:, :5], want)
    torch.testing.assert_close(hidden(model, junk, targets)[:, :5], want, rtol=0, atol=0)


def real(inputs: Inputs) -> tuple[list[int], list[int], list[int]]:
    """Modality, position and id of the valid inputs of the first sample."""
    valid = inputs.valid_BN[0]
    parts = (inputs.modality_BN[0][valid], inputs.position_BN[0][valid], inputs.ids_BN[0][valid])
    return parts[0].tolist(), parts[1].tolist(), parts[2].tolist()


def test_pixels_of_patches_that_are_not_inputs_are_never_seen() -> None:
    model, (inputs, targets) = seeded(tiny()), some_batch()
    want = hidden(model, inputs, targets)
    pixels = inputs.pixels_B3SS.clone()  # type: ignore[union-attr]
    pixels[:, :, :16, 16:] += 100  # patch 1
    pixels[:, :, 16:, :16] += 100  # patch 2; patches 0 and 3 are inputs
    assert torch.equal(hidden(model, replace(inputs, pixels_B3SS=pixels), targets), want)
    pixels[:, :, 31, 31] += 1
    assert not torch.equal(hidden(model, replace(inputs, pixels_B3SS=pixels), targets), want)


def test_text_target_sees_what_came_before_and_nothing_after() -> None:
    model, (inputs, targets) = seeded(tiny()), some_batch()
    want = hidden(model, inputs, targets)[0]
    ids = targets.ids_BM.clone()
    ids[0, 3] = 30  # the second of three text targets, at places 2, 3, 4
    got = hidden(model, inputs, replace(targets, ids_BM=ids))[0]
    assert torch.equal(got[:3], want[:3]), "grid targets and the first text target"
    assert not torch.allclose(got[3], want[3])
    assert not torch.allclose(got[4], want[4])


def test_grid_targets_see_each_others_places_but_no_ids_and_no_text() -> None:
    model, (inputs, targets) = seeded(tiny()), some_batch()
    want = hidden(model, inputs, targets)[0]
    ids, position = targets.ids_BM.clone(), targets.position_BM.clone()
    ids[0, :2] = 8
    assert torch.equal(hidden(model, inputs, replace(targets, ids_BM=ids))[0], want)
    position[0, 1] = 6
    moved = hidden(model, inputs, replace(targets, position_BM=position))[0]
    assert not torch.allclose(moved[0], want[0]), "attention is full within a grid"
    assert torch.equal(moved[2:], want[2:]), "and ends at the modality"


def test_labels_reach_the_loss_only() -> None:
    model, (inputs, targets) = seeded(tiny()), some_batch()
    changed = replace(targets, label_BM=targets.label_BM.clone())
    changed.label_BM[0, 0] = 5
    assert torch.equal(hidden(model, inputs, targets), hidden(model, inputs, changed))


def test_loss_is_the_mean_over_modalities_of_their_mean() -> None:
    model, (inputs, targets) = seeded(tiny()), some_batch()
    rows = hidden(model, inputs, targets)[0]
    nats = {}
    for name, places in (("tok_depth", [0, 1]), ("tok_caption", [2, 3, 4])):
        log_p = model.logits(rows[places], name).log_softmax(1)
        nats[name] = -log_p[range(len(places)), targets.label_BM[0][places]]
    loss = model(inputs, targets)
    torch.testing.assert_close(loss.total, (nats["tok_depth"].mean() + nats["tok_caption"].mean()) / 2)
    assert loss.counts == {"tok_depth": 2, "tok_caption": 3}
    torch.testing.assert_close(loss.sums["tok_caption"], nats["tok_caption"].sum())


def test_sample_without_inputs_or_targets_gives_a_finite_loss_and_gradient() -> None:
    model = seeded(tiny())
    inputs = inputs_of([[], [(1, 2, 7)]], 4)
    targets = targets_of([[(1, 0, 0, 4)], []], 4)
    model(inputs, targets).total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert float(model(inputs, targets_of([[], []], 4)).total.detach()) == 0


def test_bfloat16_on_a_cpu_agrees_with_float32_and_masks_alike() -> None:
    model, (inputs, targets) = seeded(tiny()), some_batch()
    want = hidden(model, inputs, targets)
    with torch.autocast("cpu", torch.bfloat16):
        got = hidden(model, inputs, targets)
        ids = targets.ids_BM.clone()
        ids[0, 4] = 30
        later = hidden(model, inputs, replace(targets, ids_BM=ids))
    torch.testing.assert_close(got[:, :5], want[:, :5], atol=0.1, rtol=0.1)
    assert torch.equal(later[:, :4], got[:, :4])


@pytest.mark.parametrize(
    "changes", [{}, {"tie_logits": False, "share_modality_embeddings": False}, {"gated_mlp": False, "qk_norm": True}]
)
def test_saved_model_is_read_back_bit_for_bit(tmp_path: Path, changes: dict[str, bool]) -> None:
    model, (inputs, targets) = seeded(tiny(**changes)), some_batch()
    save_model(model, open_store(tmp_path))
    again = load_model(tmp_path)
    assert again.architecture == model.architecture
    assert torch.equal(hidden(again, inputs, targets), hidden(model, inputs, targets))
    assert len(list(again.parameters())) == len(list(model.parameters())), "sharing survives"
    header = safe_open(tmp_path / "model.safetensors", "pt").metadata()
    assert (header["dim"], header["domains_in"]) == ("32", "['rgb@32', 'tok_depth@48', 'caption']")


def test_checkpoint_of_format_1_is_read(tmp_path: Path) -> None:
    """What this project wrote first: its own part within config.json, and its own names of modalities everywhere."""
    model, (inputs, targets) = seeded(tiny()), some_batch()
    save_model(model, open_store(tmp_path))
    own, config = (json.loads((tmp_path / f).read_text()) for f in ("fourmill.json", "config.json"))
    (tmp_path / "fourmill.json").unlink()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "model.safetensors").write_bytes(to_bytes(tensors, {}))
    config |= {"domains_in": list(model.architecture.domains_in), "domains_out": list(model.architecture.domains_out)}
    own = {"format": 1, "tie_logits": own["tie_logits"], "modalities": own["modalities"]}
    for key in ("num_register_tokens", "decoder_causal_mask", "decoder_sep_mask"):  # were not written
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps({**config, "fourmill": own}))
    again = load_model(tmp_path)
    assert again.architecture == model.architecture
    assert torch.equal(hidden(again, inputs, targets), hidden(model, inputs, targets))
    (tmp_path / "config.json").write_text(json.dumps({**config, "fourmill": {**own, "format": 3}}))
    with pytest.raises(ValueError, match="has format 3; this Fourmill reads formats 1 and 2"):
        load_model(tmp_path)


@needs_reference
def test_configuration_in_the_header_alone_is_enough(tmp_path: Path) -> None:
    file = REFERENCE / "fm_swiglu_nobias" / "model_with_metadata.safetensors"
    (tmp_path / "model.safetensors").write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").chmod(0o644)
    config = json.loads((REFERENCE / "fm_swiglu_nobias" / "config.json").read_text())
    assert load_model(tmp_path).architecture.domains_in == tuple(config["domains_in"])
    (tmp_path / "model.safetensors").write_bytes(to_bytes({"mask_token": torch.zeros(1)}, {"dim": "32"}))
    with pytest.raises(ValueError, match=r"no domains_in in config\.json or in the header"):
        load_model(tmp_path)


def test_checkpoint_that_does_not_fit_its_configuration_is_refused(tmp_path: Path) -> None:
    save_model(seeded(tiny()), open_store(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"encoder_depth": 3}, r"missing \['encoder\.2\.attn\.proj\.weight'"),
        ({"qkv_bias": True}, r"missing \['decoder\.0\.cross_attn\.kv\.bias'"),
        ({"gated_mlp": False}, "act_layer 'SiLU'; an MLP of this kind has 'GELU' here"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)


def test_another_model_is_never_written_over_the_first(tmp_path: Path) -> None:
    save_model(seeded(tiny()), open_store(tmp_path))
    save_model(seeded(tiny()), open_store(tmp_path))
    with pytest.raises(ValueError, match=r"model\.safetensors is already in"):
        save_model(seeded(tiny(), seed=1), open_store(tmp_path))


def test_eight_samples_are_learnt_by_heart() -> None:
    rng = torch.Generator().manual_seed(0)
    depth = torch.randint(0, 11, (8, 9), generator=rng).tolist()
    words = torch.randint(7, 40, (8, 5), generator=rng).tolist()
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=rng)
    inputs = inputs_of([[(0, p, 0) for p in range(4)]] * 8, 4, pixels)
    text = [[(2, i, a, b) for i, (a, b) in enumerate(zip([5, *w], [*w, 3], strict=True))] for w in words]
    targets = targets_of(
        [[(1, p, 0, d) for p, d in enumerate(row)] + t for row, t in zip(depth, text, strict=True)], 15
    )
    model = seeded(tiny()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(inputs, targets).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    got = predict(model.eval(), {"rgb": pixels}, ["tok_depth", "tok_caption"])
    assert got["tok_depth"].tolist() == depth
    assert [text.tolist() for text in got["tok_caption"]] == words


def test_grid_is_filled_whole_in_any_number_of_steps() -> None:
    model, (inputs, _) = seeded(tiny()), some_batch()
    for order in ("confident", "random"):
        for steps in (1, 2, 8, 9, 50):
            rng = torch.Generator().manual_seed(1)
            got = predict(
                model,
                {"rgb": inputs.pixels_B3SS},
                ["tok_depth"],
                steps=steps,
                order=order,
                temperature=1.0,
                generator=rng,
            )
            assert got["tok_depth"].shape == (1, 9)


def test_chained_prediction_sees_what_was_predicted_before() -> None:
    model, (inputs, _) = seeded(tiny()), some_batch()
    free = predict(model, {"rgb": inputs.pixels_B3SS}, ["tok_depth", "tok_caption"])
    chain = predict(model, {"rgb": inputs.pixels_B3SS}, ["tok_depth", "tok_caption"], chained=True)
    given = predict(model, {"rgb": inputs.pixels_B3SS, "tok_depth": free["tok_depth"]}, ["tok_caption"])
    assert torch.equal(chain["tok_depth"], free["tok_depth"])
    assert torch.equal(chain["tok_caption"][0], given["tok_caption"][0])


@pytest.mark.parametrize(
    ("given", "asked", "message"),
    [
        ({"tok_dpeth": 0}, ["tok_caption"], "input: unknown modality 'tok_dpeth'; did you mean 'tok_depth'"),
        ({"rgb": 0}, ["rgb"], "target: unknown modality 'rgb'"),
        ({"tok_depth": 0}, ["tok_depth"], "'tok_depth' is given and cannot be a target too"),
        ({}, ["tok_depth"], "no inputs"),
        ({"tok_depth": [[1, 2, 3]]}, ["tok_caption"], "tok_depth: 3 tokens a sample, the model has 9"),
    ],
)
def test_impossible_predictions_are_refused(given: dict[str, object], asked: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(seeded(tiny()), given, asked)
