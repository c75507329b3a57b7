"""Steps of training a tokenizer: their mathematics, sizes, parts, processes and averages; how runs begin and end."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import config, examples_of, ramps, training

from fourmill.tokenizers.networks.vq import VQNetwork
from fourmill.tokenizers.networks.weights import pack
from fourmill.tokenizers.sources import source_of
from fourmill.tokenizers.training.average import WeightAverage
from fourmill.tokenizers.training.fitting import Report, learning_rate, size_at
from fourmill.tokenizers.training.health import health_of
from fourmill.tokenizers.training.run import train_spatial


def published(folder: Path, **fields: Any) -> Path:
    """A trained checkpoint folder."""
    chosen = config(folder, **fields)
    train_spatial(examples_of(chosen), chosen)
    return folder


def test_steps_are_these_lines(tmp_path: Path) -> None:
    chosen = config(tmp_path, sizes=[16, 24])
    run = training(chosen)
    run.fit()

    torch.manual_seed(0)
    dead = 16 * 36 / 32 / 32  # a 32nd of a fair share of the largest grid's tokens
    network = VQNetwork(run.settings, dead).train()
    source = source_of(run.settings, 24)
    values, order = run.examples, run.order
    network.start_from(source.prepare(values.values(order.batch(0, 64))))
    matrices = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / 20))
        size = (16, 24)[np.random.default_rng([0, step]).integers(2)]
        inputs = source.resize(source.prepare(values.values(order.batch(step, 16))), size)
        outputs, commitment = network.unquantized(inputs), 0.0
        if step >= 8:
            outputs, _, commitment = network(inputs)
        optimizer.zero_grad()
        (source.loss(outputs, inputs) + commitment).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    assert pack(run.network, half=False) == pack(network, half=False)


def test_size_of_a_step_follows_from_seed_and_step(tmp_path: Path) -> None:
    sizes = [size_at(step, config(tmp_path, sizes=[16, 24, 32])) for step in range(60)]
    assert sizes[:8] == [32, 24, 32, 24, 24, 32, 24, 32]
    assert min(sizes.count(size) for size in (16, 24, 32)) > 8
    assert [size_at(step, config(tmp_path)) for step in range(3)] == [16, 16, 16]


def test_parts_of_a_step_have_the_gradient_of_the_whole(tmp_path: Path) -> None:
    fsq = {"quantizer": "fsq", "levels": [5, 5, 5]}  # its loss is a plain mean and it keeps no averages
    whole, parts = (training(config(tmp_path, network=fsq, accumulate=n, steps=6)) for n in (1, 4))
    whole.fit()
    parts.fit()
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for found, wanted in zip(parts.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)


def test_average_of_weights_is_this_one() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 1.0)
    average = WeightAverage(network, 0.5)
    for step, value in enumerate((3.0, 7.0, 0.0), start=1):
        torch.nn.init.constant_(network.weight, value)
        average.update(step)
    # Decays 1/10, 2/11, 3/12: 2.8, then 2.8 * 2/11 + 7 * 9/11, then a quarter of that.
    mean = (2.8 * 2 + 7 * 9) / 11 / 4
    with average.applied():
        assert network.weight.item() == pytest.approx(mean, rel=1e-6)
    assert network.weight.item() == 0.0


def test_average_is_what_is_published(tmp_path: Path) -> None:
    last, mean = published(tmp_path / "last"), published(tmp_path / "mean", ema=0.9)
    files = [(folder / "model.safetensors").read_bytes() for folder in (last, mean)]
    assert files[0] != files[1]
    run = training(config(tmp_path, ema=0.9, held_out=0.02))
    assert pack(run.network) not in files


@pytest.mark.parametrize("fields", [{"ema": 0.9, "sizes": [16, 24]}, {"accumulate": 2}])
def test_interrupted_run_ends_with_the_same_weights_and_averages(tmp_path: Path, fields: dict[str, Any]) -> None:
    whole = training(config(tmp_path, **fields))
    whole.fit()
    kept = {"state": str(tmp_path / "state"), "save_every": 7, **fields}
    training(config(tmp_path, **kept)).fit(until=16)  # the state is of step 14
    torch.rand(3)
    second = training(config(tmp_path, **kept))
    assert second.step == 14
    second.fit()
    assert second.losses == whole.losses
    with second.average.applied(), whole.average.applied():
        assert pack(second.network, half=False) == pack(whole.network, half=False)


def test_sigterm_saves_the_state_and_stops(tmp_path: Path) -> None:
    def terminate(report: Report) -> None:
        if report.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    chosen = config(tmp_path, state=str(tmp_path / "state"))
    with pytest.raises(KeyboardInterrupt, match="tok_depth was stopped at step 10"):
        training(chosen, progress=terminate).fit()
    assert signal.getsignal(signal.SIGTERM) is before
    assert training(chosen).step == 10


def test_loss_that_is_no_number_names_its_step_and_is_not_saved(tmp_path: Path) -> None:
    run = training(config(tmp_path, state=str(tmp_path / "state"), save_every=6))
    run.fit(until=3)
    with torch.no_grad():
        run.network.post_quant_proj.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="loss of tok_depth is nan at step 4; lower lr"):
        run.fit()
    assert not (tmp_path / "state" / "state.pt").exists()


def test_report_tells_the_state_of_the_codebook(tmp_path: Path) -> None:
    reports: list[Report] = []
    training(config(tmp_path), progress=reports.append).fit()
    assert [report.step for report in reports] == [5, 10, 15, 20]
    assert reports[0].health is None
    assert "not quantized yet" in str(reports[0])
    assert "% of codes used, perplexity" in str(reports[-1])
    assert reports[-1].lr == learning_rate(19, config(tmp_path))


def test_codebook_health_of_known_histograms() -> None:
    even = health_of(np.array([5, 5, 5, 5, 0, 0, 0, 0]))
    assert (even.usage, even.entropy, even.perplexity) == (0.5, 2.0, 4.0)
    assert str(even) == "50.0% of codes used, perplexity 4.0, 2.00 bits a token"
    two = health_of(np.array([[1, 1, 1, 1], [3, 3, 0, 0]]))
    assert (two.usage, two.entropy, two.lowest) == (0.75, 1.5, 2.0)
    assert health_of(np.zeros(4, dtype=np.int64)).entropy == 0.0


# Beginning from a checkpoint.


def test_second_stage_begins_with_the_first_ones_weights(tmp_path: Path) -> None:
    first = published(tmp_path / "first", steps=60)
    run = training(config(tmp_path, init=str(first), network={"size": 32}, sizes=[16, 32], lr=1e-3))
    ours, theirs = pack(run.network), (first / "model.safetensors").read_bytes()
    assert run.unquantized == 0
    assert run.network.encoder.pos_emb.shape == (1, 32, 8, 8)
    from safetensors.torch import load

    assert all(torch.equal(load(ours)[k], v) for k, v in load(theirs).items() if not k.endswith("pos_emb"))
    run.fit()
    assert run.losses[0] < 0.25  # from scratch it is 0.65
    assert run.losses[-1] < run.losses[0]


def test_frozen_encoder_keeps_every_token(tmp_path: Path) -> None:
    first = published(tmp_path / "first")
    chosen = config(tmp_path / "second", init=str(first), freeze_encoder=True, network={"decoder_blocks": 2})
    result = train_spatial(examples_of(chosen), chosen)
    assert result.losses[-1] < result.losses[0]
    from fourmill.checkpoints import resolve
    from fourmill.tokenizers.published import read_settings
    from fourmill.tokenizers.spatial import open_codec

    found = []
    for folder in (first, tmp_path / "second"):
        checkpoint = resolve(str(folder))
        codec = open_codec(checkpoint, read_settings(checkpoint, "depth"), "cpu")
        found.append((codec.encode(ramps(8, 5)), codec.decode(codec.encode(ramps(8, 5)))))
    assert np.array_equal(found[0][0], found[1][0])
    assert not np.array_equal(found[0][1], found[1][1])


def test_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    first = published(tmp_path / "first")
    with pytest.raises(ValueError, match="codebook_size: 32 there, 64 here"):
        training(config(tmp_path, init=str(first), network={"codebook_size": 64}))


# Codes that do not follow the latents.


@pytest.mark.parametrize("quantizer", [{"quantizer": "fsq", "levels": [5, 5, 5]}, {"quantizer": "lfq"}])
def test_fixed_codes_begin_with_latents_that_differ(tmp_path: Path, quantizer: dict[str, Any]) -> None:
    run = training(config(tmp_path, network=quantizer))
    with torch.no_grad():
        inputs = run.source.prepare(run.examples.values(run.order.batch(0, 64)))
        latents_ZN = run.network.latents(inputs).transpose(0, 1).flatten(1)
    assert latents_ZN.mean(1).abs().max() < 0.01
    assert torch.allclose(torch.cov(latents_ZN), 0.49 * torch.eye(len(latents_ZN)), atol=0.02)


def test_latents_beyond_fixed_codes_are_drawn_back(tmp_path: Path) -> None:
    run = training(config(tmp_path, network={"quantizer": "fsq", "levels": [5, 5]}))
    with torch.no_grad():
        run.network.quant_proj.weight.zero_()
        run.network.quant_proj.bias.copy_(torch.tensor([5.0, -1.0]))
        inputs = run.source.prepare(run.examples.values([0, 1]))
        loss, _ = run.objective(inputs, True, 0)
        outputs, _, _ = run.network(inputs)
    assert (loss - run.source.loss(outputs, inputs)).item() == pytest.approx(1.5, rel=1e-4)  # (5 - 2 + 0) / 2
