"""Losses beyond a source's own: between features, and of denoisers; and what TensorBoard shows of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourmill.tokenizers.training.config import PerceptualConfig, TrainTokenizerConfig
from fourmill.tokenizers.training.examples import ArrayExamples
from fourmill.tokenizers.training.fitting import SpatialTraining
from fourmill.tokenizers.training.perceptual import PerceptualLoss
from fourmill.tokenizers.training.run import settings_of, train_spatial

VIT: dict[str, Any] = {"size": 16, "patch_size": 4, "dim": 32, "encoder_blocks": 1, "decoder_blocks": 1, "heads": 2}
VIT |= {"latent_dim": 8, "codebook_size": 32}
UNET = {"patch_size": 2, "dim": 16, "multipliers": (1, 2), "blocks": 1, "attention_at": (2,), "groups": 8}
DIFFUSION = {"denoiser": {"kind": "unet", **UNET}, "timesteps": 50, "steps": 5}


def config(out: Path, name: str, network: dict[str, Any], **fields: Any) -> TrainTokenizerConfig:
    base = {"dataset": "none", "modality": name, "out": str(out), "steps": 12, "batch_size": 8, "lr": 2e-3}
    base |= {"warmup": 2, "unquantized": 4, "report_every": 6, "min_perplexity": 0, "device": "cpu", "num_threads": 1}
    return TrainTokenizerConfig.model_validate({**base, "held_out": 0.2, "network": network, **fields})


def numbered(values: list[Any]) -> ArrayExamples:
    return ArrayExamples([str(i) for i in range(len(values))], values)


def colours(count: int) -> list[Any]:
    """Pictures of one colour each."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 1, 1)).astype(np.uint8)
    return list(pixels.repeat(16, 2).repeat(16, 3))


# A network's eye.


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm network with random weights, in a folder as timm's users have them."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(1)
    network = timm.create_model("resnet10t", pretrained=False)
    save_file(network.state_dict(), folder / "model.safetensors")
    mean, std = [0.5, 0.25, 0.0], [0.5, 0.5, 1.0]
    data = {"mean": mean, "std": std, "input_size": [3, 32, 32], "num_classes": 1000}
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet10t", "pretrained_cfg": data}))
    return folder


def test_perceptual_loss_is_the_distance_of_features(resnet: Path) -> None:
    losses = {
        distance: PerceptualLoss(
            PerceptualConfig.model_validate(
                {"checkpoint": str(resnet), "blocks": ["layer1", "layer3"], "distance": distance}
            )
        )
        for distance in ("cosine", "l1", "l2")
    }
    torch.manual_seed(0)
    pictures = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    got, wanted = (losses["cosine"].features(p) for p in pictures)
    assert {name: tuple(x.shape) for name, x in got.items()} == {"layer1": (2, 64, 64), "layer3": (2, 4, 256)}
    units = [[torch.nn.functional.normalize(x[name], dim=-1) for name in got] for x in (got, wanted)]
    cosine = sum(1 - (a * b).sum(-1).mean() for a, b in zip(*units, strict=True))
    assert losses["cosine"](*pictures).item() == pytest.approx(float(cosine), rel=1e-4)
    assert losses["l2"](*pictures).item() == pytest.approx(2 * float(cosine), rel=1e-4)
    assert losses["l1"](*pictures).item() > losses["l2"](*pictures).item()
    assert losses["l1"](pictures[0], pictures[0]).item() == 0.0


def test_perceptual_network_sees_its_own_mean_size_and_no_training_mode(resnet: Path) -> None:
    loss = PerceptualLoss(PerceptualConfig(checkpoint=str(resnet), blocks=("layer1",))).train()
    assert not any(module.training for module in loss.modules())
    seen: list[torch.Tensor] = []
    loss.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels = torch.zeros(1, 3, 16, 16, requires_grad=True)  # 0.5 of 0..1
    loss(pixels, torch.ones(1, 3, 16, 16)).backward()
    assert pixels.grad is not None
    assert float(pixels.grad.abs().sum()) > 0
    assert seen[1][0, :, 0, 0].tolist() == [0.0, 0.5, 0.5]
    assert seen[1].shape == (1, 3, 32, 32)


def test_perceptual_loss_is_added_with_its_weight(resnet: Path, tmp_path: Path) -> None:
    found: list[Any] = []
    for weight in (0.0, 0.5, 2.0):
        extra = {"checkpoint": str(resnet), "blocks": ["layer1"], "weight": weight}
        chosen = config(tmp_path, "tok_rgb", VIT, **({"perceptual": extra} if weight else {}))
        examples = numbered(colours(24))
        run = SpatialTraining(examples, range(24), chosen, settings_of(examples, [0], chosen, 0))
        run.network.load_state_dict(found[0][1] if found else run.network.state_dict())
        inputs = run.source.prepare(examples.values(range(8)))
        found.append((run.objective(inputs, False, 0)[0].item(), run.network.state_dict()))
    plain, half, double = (loss for loss, _ in found)
    assert half > plain
    assert double - plain == pytest.approx(4 * (half - plain), rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": ["layer9"]}, "has no module 'layer9'; it has: .*layer"),
        ({"checkpoint": "timm/resnet10t"}, "neither a local folder nor a local file"),
        ({"model": "resnet10t"}, "names its own `model`"),
    ],
)
def test_perceptual_network_that_is_not_there_is_refused(resnet: Path, fields: dict[str, Any], message: str) -> None:
    chosen = PerceptualConfig.model_validate({"checkpoint": str(resnet), "blocks": ["layer1"], **fields})
    with pytest.raises(ValueError, match=message):
        PerceptualLoss(chosen)


def test_perceptual_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        PerceptualLoss(PerceptualConfig(checkpoint=str(tmp_path), blocks=("layer1",)))


# Diffusion decoders.


def ramps(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    rows, columns = np.mgrid[:16, :16] / 16
    return [(1 + 4 * abs(a * rows + b * columns)).astype(np.float32) for a, b in rng.uniform(-1, 1, (count, 2))]


def test_denoiser_is_learned_with_its_encoder(tmp_path: Path) -> None:
    network = {**VIT, "diffusion": DIFFUSION}
    chosen = config(tmp_path, "tok_depth", network, steps=120, batch_size=16, report_every=20, unquantized=30)
    result = train_spatial(numbered(ramps(64)), chosen)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.figures["abs_rel"] < 0.35  # pure noise gives 1.0


def test_denoiser_alone_goes_on_from_its_state_and_keeps_the_tokens(tmp_path: Path) -> None:
    train_spatial(numbered(ramps(48)), config(tmp_path / "first", "tok_depth", VIT))
    fields = {"init": str(tmp_path / "first"), "freeze_encoder": True, "ema": 0.9, "held_out": 0.0}
    examples = numbered(ramps(48))

    def run(**more: Any) -> SpatialTraining:
        chosen = config(tmp_path / "second", "tok_depth", {**VIT, "diffusion": DIFFUSION}, **fields, **more)
        return SpatialTraining(examples, range(48), chosen, settings_of(examples, range(48), chosen, 0))

    whole = run()
    before = {k: v.clone() for k, v in whole.network.state_dict().items()}
    whole.fit()
    after = whole.network.state_dict()
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"decoder"}

    kept = {"state": str(tmp_path / "state"), "save_every": 5}
    run(**kept).fit(until=7)
    second = run(**kept)
    assert second.step == 5
    second.fit()
    assert all(torch.equal(v, after[k]) for k, v in second.network.state_dict().items())


def test_unknown_depth_is_neither_shown_to_a_denoiser_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(tmp_path, "tok_depth", {**VIT, "diffusion": DIFFUSION}, held_out=0.0)
    values = [np.where(np.arange(16) < 4, 0, 1 + v).astype(np.float32) for v in ramps(8)]
    examples = numbered(values)
    run = SpatialTraining(examples, range(8), chosen, settings_of(examples, range(8), chosen, 0))
    asked: list[Any] = []

    def note(*given: Any) -> torch.Tensor:
        asked.append(given)
        return torch.zeros(())

    monkeypatch.setattr(run.network.schedule, "loss", note)
    inputs = run.source.prepare(values)
    run.objective(inputs, True, 0)
    _, clean, _, _, known = asked[0]
    assert known.sum().item() == 8 * 16 * 12
    assert clean[~known].abs().max().item() == 0.0
    assert torch.equal(clean[known], inputs[known])


# TensorBoard.


def test_tensorboard_has_scalars_and_reconstructions(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "board"
    chosen = config(tmp_path / "out", "tok_depth", VIT, tensorboard=str(folder))
    result = train_spatial(numbered(ramps(40)), chosen)
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        *(f"train/{name}" for name in ("loss", "lr", "grad_norm", "samples_per_s")),
        *(f"codebook/{name}" for name in ("usage", "perplexity", "entropy")),
    }
    assert [round(e.value, 6) for e in events.Scalars("train/loss")] == [round(x, 6) for x in result.losses]
    assert [e.step for e in events.Scalars("train/loss")] == [6, 12]
    picture = events.Images("label_and_reconstruction")[0]
    assert (picture.width, picture.height) == (4 * 16, 2 * 16)
