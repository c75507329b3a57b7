"""The loss of diffusion decoders: what is drawn and what counts; tiny denoisers learn a few maps and give them back."""

from typing import Any

import pytest
import torch
from tiny_diffusion import UNET, UVIT, Recorder, noise
from torch import Tensor, nn
from torch.nn import functional

from fourmill.tokenizers.networks.diffusion import NoiseSchedule, build_denoiser
from fourmill.tokenizers.networks.diffusion_config import DiffusionConfig, UNetConfig, UViTConfig


@pytest.mark.parametrize(("loss", "wanted"), [("mse", 6.5), ("l1", 2.5), ("smooth_l1", 2.0)])
def test_loss_against_outputs_of_zero(loss: Any, wanted: float) -> None:
    clean = torch.tensor([2.0, 3.0, -2.0, -3.0]).view(1, 1, 2, 2)
    schedule, recorder = NoiseSchedule(DiffusionConfig(loss=loss)), Recorder(torch.zeros(1, 1, 2, 2))
    value = schedule.loss(recorder, clean, noise(1, 4, 1, 1), torch.Generator().manual_seed(0))
    assert value.item() == pytest.approx(wanted)


def test_loss_leaves_invalid_pixels_out() -> None:
    clean = torch.tensor([2.0, 100.0, -2.0, 4.0]).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    valid = torch.tensor([True, False, True, True]).view(1, 1, 2, 2)
    schedule, recorder = NoiseSchedule(DiffusionConfig()), Recorder(torch.zeros(1, 3, 2, 2))
    generator = torch.Generator().manual_seed(0)
    assert schedule.loss(recorder, clean, noise(1, 4, 1, 1), generator, valid).item() == pytest.approx(8.0)
    assert schedule.loss(recorder, clean, noise(1, 4, 1, 1), generator, ~valid & valid).item() == 0.0


def test_loss_draws_every_timestep_equally_often_and_repeats_with_its_generator() -> None:
    schedule, recorder = NoiseSchedule(DiffusionConfig(timesteps=4, steps=1)), Recorder(torch.zeros(4000, 1, 1, 1))
    clean, codes = torch.zeros(4000, 1, 1, 1), torch.zeros(4000, 4, 1, 1)
    schedule.loss(recorder, clean, codes, torch.Generator().manual_seed(0))
    schedule.loss(recorder, clean, codes, torch.Generator().manual_seed(0))
    schedule.loss(recorder, clean, codes, torch.Generator().manual_seed(1))
    (first, drawn, _), (again, _, _), (other, _, _) = recorder.calls
    assert drawn.bincount(minlength=4).tolist() == pytest.approx([1000] * 4, abs=100)  # 3.6 standard deviations
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0, 0), (0.25, 200, 300), (1.0, 1000, 1000)])
def test_codes_of_whole_samples_are_masked_in_training(dropout: float, low: int, high: int) -> None:
    schedule = NoiseSchedule(DiffusionConfig(condition_dropout=dropout))
    recorder = Recorder(torch.zeros(1000, 1, 1, 1))
    schedule.loss(recorder, torch.zeros(1000, 1, 1, 1), torch.zeros(1000, 4, 2, 3), torch.Generator().manual_seed(0))
    mask = recorder.calls[0][2]
    if dropout == 0.0:
        assert mask is None
        return
    assert mask is not None
    assert mask.shape == (1000, 2, 3)
    assert torch.equal(mask.any(dim=(1, 2)), mask.all(dim=(1, 2)))
    assert low <= mask.all(dim=(1, 2)).sum() <= high


@pytest.mark.parametrize("sizes", [UNET, UVIT])
def test_training_on_four_maps_learns_them_and_few_steps_reconstruct_them(sizes: UNetConfig | UViTConfig) -> None:
    schedule, (maps, codes) = NoiseSchedule(DiffusionConfig(denoiser=sizes)), four_maps()
    network, losses = train(schedule, maps, codes, steps=120)
    values = schedule.sample(network, codes, 16, steps=3, seeds=[5, 6, 7, 8])
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
    assert (values - maps).abs().mean() < 0.15
    assert (values - maps.roll(1, 0)).abs().mean() > 0.3  # another sample's map, which other codes decode to


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_training_on_noise_and_velocity_learns(prediction: Any) -> None:
    config = DiffusionConfig(denoiser=UVIT, prediction=prediction, zero_terminal_snr=prediction != "epsilon")
    schedule, (maps, codes) = NoiseSchedule(config), four_maps()
    torch.manual_seed(0)
    new = build_denoiser(config, 1, 4, 16)
    learned, _ = train(schedule, maps, codes, steps=60)
    before, after = (
        schedule.loss(network, maps.repeat(16, 1, 1, 1), codes.repeat(16, 1, 1, 1), torch.Generator().manual_seed(1))
        for network in (new, learned)
    )
    assert after < 0.4 * before


def four_maps() -> tuple[Tensor, Tensor]:
    """-> smooth maps (4, 1, 16, 16) in about -1..1, and codes (4, 4, 2, 2) that say nothing but which map it is."""
    maps = functional.interpolate(noise(4, 1, 3, 3).clamp(-1, 1), (16, 16), mode="bicubic")
    return maps, functional.normalize(noise(4, 4, 2, 2, seed=2), dim=1)


def train(schedule: NoiseSchedule, maps: Tensor, codes: Tensor, steps: int) -> tuple[nn.Module, list[float]]:
    """AdamW at 3e-3, falling to 0, on two noisings of every map a step; -> the network and the losses."""
    torch.manual_seed(0)
    network = build_denoiser(schedule.config, 1, 4, 16)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        loss = schedule.loss(network, maps.repeat(2, 1, 1, 1), codes.repeat(2, 1, 1, 1), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    return network.eval(), losses
