"""Sampling from diffusion decoders: codes decide what is decoded, a batch does not, and no step goes astray.

Numbers of ml-4m are compared in test_diffusion_reference.py.
"""

from typing import Any

import pytest
import torch
from tiny_diffusion import UNET, UVIT, XATTN, Oracle, Recorder, awake, noise

from fourmill.tokenizers.networks.diffusion import NoiseSchedule, signal_levels, starting_noise
from fourmill.tokenizers.networks.diffusion_config import DiffusionConfig, UNetConfig, UViTConfig


@pytest.mark.parametrize("sizes", [UNET, UVIT, XATTN])
def test_masked_codes_cannot_be_felt_and_others_can(sizes: UNetConfig | UViTConfig) -> None:
    network, noised, timesteps = awake(sizes), noise(1, 1, 16, 16), torch.tensor([400])
    mask = torch.tensor([[[True, False], [True, True]]])
    codes = noise(1, 4, 2, 2, seed=1)
    with torch.no_grad():
        before = network(noised, timesteps, codes, mask)
        changed = noise(1, 4, 2, 2, seed=2)
        masked = network(noised, timesteps, torch.where(mask[:, None], changed, codes), mask)
        seen = network(noised, timesteps, torch.where(mask[:, None], codes, changed), mask)
        bare = network(noised, timesteps, codes)
    assert torch.equal(before, masked)
    assert (before - seen).abs().max() > 1e-2
    assert (before - bare).abs().max() > 1e-2


@pytest.mark.parametrize("sizes", [UNET, UVIT, XATTN])
def test_a_sample_decodes_to_the_same_values_in_whatever_batch(sizes: UNetConfig | UViTConfig) -> None:
    network, schedule = awake(sizes), NoiseSchedule(DiffusionConfig(denoiser=sizes, clip_sample=True))
    codes = noise(3, 4, 2, 2, seed=1)
    together = schedule.sample(network, codes, 16, steps=3, seeds=[7, 8, 9])
    turned = schedule.sample(network, codes.flip(0), 16, steps=3, seeds=[9, 8, 7])
    alone = schedule.sample(network, codes[1:2], 16, steps=3, seeds=[8])
    torch.testing.assert_close(turned.flip(0), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, together[1:2], atol=1e-5, rtol=0)
    other = schedule.sample(network, codes[1:2], 16, steps=3, seeds=[10])
    assert (alone - other).abs().max() > 1e-2


def test_noise_of_a_seed_is_the_same_in_whatever_batch_and_differs_from_other_seeds() -> None:
    three = starting_noise(3, (1, 4, 4), [5, 6, 5], None)
    assert torch.equal(three[0], three[2])
    assert not torch.equal(three[0], three[1])
    assert torch.equal(starting_noise(1, (1, 4, 4), [6], None)[0], three[1])
    assert starting_noise(0, (1, 4, 4), [], None).shape == (0, 1, 4, 4)


def test_noise_needs_one_source() -> None:
    with pytest.raises(ValueError, match="either seeds, one for each sample, or a generator"):
        starting_noise(1, (1, 4, 4), None, None)
    with pytest.raises(ValueError, match="either seeds, one for each sample, or a generator"):
        starting_noise(1, (1, 4, 4), [1], torch.Generator())
    with pytest.raises(ValueError, match="2 seeds for 3 samples; each needs one"):
        starting_noise(3, (1, 4, 4), [1, 2], None)


def test_sampling_takes_any_fitting_side_and_refuses_others() -> None:
    network, schedule, codes = awake(UVIT), NoiseSchedule(DiffusionConfig(denoiser=UVIT)), noise(1, 4, 3, 3)
    assert schedule.sample(network, codes, 24, steps=2, seeds=[0]).shape == (1, 1, 24, 24)
    with pytest.raises(ValueError, match="size 22 is not a multiple of 4"):
        schedule.sample(network, codes, 22, steps=2, seeds=[0])


@pytest.mark.parametrize(
    ("spacing", "steps", "wanted"),
    [
        ("trailing", 1, [999]),
        ("trailing", 3, [999, 666, 332]),  # ml-4m takes four: 999, 666, 333, 0
        ("trailing", 4, [999, 749, 499, 249]),
        ("leading", 3, [666, 333, 0]),
        ("linspace", 1, [999]),
        ("linspace", 5, [999, 749, 499, 250, 0]),
        ("trailing", None, [999, 749, 499, 249]),
    ],
)
def test_timesteps_of_a_run(spacing: Any, steps: int | None, wanted: list[int]) -> None:
    assert NoiseSchedule(DiffusionConfig(spacing=spacing, steps=4)).timesteps(steps) == wanted


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_there_are_as_many_different_timesteps_as_asked_for(spacing: Any) -> None:
    schedule = NoiseSchedule(DiffusionConfig(spacing=spacing, timesteps=50))
    for steps in range(1, 51):
        timesteps = schedule.timesteps(steps)
        assert len(timesteps) == steps
        assert timesteps == sorted(set(timesteps), reverse=True)
        assert timesteps[-1] >= 0
        assert spacing == "leading" or timesteps[0] == 49


@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_timesteps_or_none_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps {steps} is not between 1 and the 1000 timesteps"):
        NoiseSchedule(DiffusionConfig()).timesteps(steps)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 7, 25])
def test_sampling_from_a_perfect_denoiser_ends_at_the_clean_value(spacing: Any, prediction: Any, steps: int) -> None:
    schedule = NoiseSchedule(
        DiffusionConfig(prediction=prediction, spacing=spacing, zero_terminal_snr=prediction != "epsilon")
    )
    oracle = Oracle(schedule, noise(2, 1, 8, 8).clamp(-1, 1))
    values = schedule.sample(oracle, noise(2, 4, 2, 2), 8, steps=steps, seeds=[1, 2])
    assert oracle.asked == schedule.timesteps(steps)
    torch.testing.assert_close(values, oracle.clean, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_every_step_leads_to_the_noise_level_of_the_next(spacing: Any) -> None:
    schedule = NoiseSchedule(DiffusionConfig(spacing=spacing))
    recorder = Recorder(torch.zeros(1, 1, 8, 8))  # predicts 0: what is left is noise, and its spread the level
    schedule.sample(recorder, noise(1, 4, 2, 2), 8, steps=5, seeds=[3])
    start = recorder.calls[0][0]
    for noised, timesteps, _ in recorder.calls:
        spread = (1 - schedule.levels_T[timesteps[0]]).sqrt()
        torch.testing.assert_close(noised, spread * start)


def test_signal_falls_from_nearly_all_to_none() -> None:
    levels = signal_levels(DiffusionConfig())
    assert levels[0].item() == pytest.approx(0.9999, abs=1e-6)
    assert levels[-1].item() == 0.0
    assert bool((levels.diff() < 0).all())
    plain = signal_levels(DiffusionConfig(zero_terminal_snr=False))
    assert plain[1].item() == pytest.approx(0.9999 * (1 - 1e-4 - 0.0199 / 999), abs=1e-7)
    assert 0 < plain[-1].item() < 1e-4
    cosine = signal_levels(DiffusionConfig(beta_schedule="shifted_cosine:1"))
    assert 2e-7 < 1 - cosine[0].item() < 4e-7  # sigmoid(-15), in steps of 6e-8: log SNR is bounded
    assert cosine[-1].item() == 0.0


def test_noised_values_and_targets_of_a_hand_made_level() -> None:
    schedule = NoiseSchedule(DiffusionConfig(prediction="v_prediction"))
    schedule.levels_T = torch.tensor([0.64, 0.0])
    clean, added = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), -1.0)
    timesteps = torch.tensor([0, 1])
    assert schedule.add_noise(clean, added, timesteps).flatten().tolist() == pytest.approx([1.0, -1.0])
    assert schedule.target(clean, added, timesteps).flatten().tolist() == pytest.approx([-2.0, -2.0])


def test_bounds_on_predicted_values() -> None:
    output = torch.tensor([0.5, -4.0, 1.0, 2.0]).view(1, 1, 2, 2)
    for settings, wanted in [
        ({}, [0.5, -4.0, 1.0, 2.0]),
        ({"clip_sample": True, "clip_range": 1.5}, [0.5, -1.5, 1.0, 1.5]),
        ({"thresholding": True, "threshold_ratio": 1.0, "threshold_max": 8.0}, [0.125, -1.0, 0.25, 0.5]),
        ({"thresholding": True}, [0.5, -1.0, 1.0, 1.0]),
    ]:
        schedule = NoiseSchedule(DiffusionConfig(**settings))  # type: ignore[arg-type]
        assert schedule.step(output, noise(1, 1, 2, 2), 999, None).flatten().tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(("guidance", "calls"), [(1.0, 1), (3.0, 2), (0.0, 2)])
def test_guidance_goes_away_from_masked_codes(guidance: float, calls: int) -> None:
    recorder = Recorder(noise(2, 1, 8, 8))
    schedule = NoiseSchedule(DiffusionConfig(guidance=guidance))
    values = schedule.sample(recorder, noise(2, 4, 2, 2), 8, steps=1, seeds=[1, 2])
    assert len(recorder.calls) == calls
    torch.testing.assert_close(values, guidance * recorder.output + 1 - guidance)
    if calls == 2:
        mask = recorder.calls[1][2]
        assert mask is not None
        assert mask.shape == (2, 2, 2)
        assert bool(mask.all())


@pytest.mark.parametrize(("rescale", "factor"), [(1.0, 1 / 3), (0.25, 5 / 6), (0.0, 1.0)])
def test_rescaled_guidance_gets_back_the_spread_of_the_unguided_output(rescale: float, factor: float) -> None:
    recorder = Recorder(noise(2, 1, 8, 8))
    schedule = NoiseSchedule(DiffusionConfig(guidance=3.0, guidance_rescale=rescale))
    values = schedule.sample(recorder, noise(2, 4, 2, 2), 8, steps=1, seeds=[1, 2])
    torch.testing.assert_close(values, factor * (3 * recorder.output - 2))


def test_sampling_computes_in_float32_around_a_denoiser_in_bfloat16() -> None:
    network, schedule, codes = awake(UNET), NoiseSchedule(DiffusionConfig(denoiser=UNET)), noise(2, 4, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = schedule.sample(network, codes, 16, steps=2, seeds=[1, 2])
    full = schedule.sample(network, codes, 16, steps=2, seeds=[1, 2])
    assert low.dtype == torch.float32
    assert 0 < (low - full).abs().max() < 0.1 * full.abs().max()
