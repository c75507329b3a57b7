"""Diffusion decoders give ml-4m's numbers: weights, schedules, steps, both denoisers, and sampling.

`data/divae_reference.json` was recorded from ml-4m's own classes (PatchedUNetCondCat, UViT, DDIMScheduler,
DDPMScheduler, PipelineCond at apple/ml-4m commit cda590f, diffusers 0.20.0, torch 2.15 on a CPU, float32), built with
the sizes of `NETWORKS` and filled as `fill` does; inputs are those of `inputs`. Of each output the file holds `DIGITS`
values at even strides and the norm; of each named size the digest of all names and shapes of its weights.

Every weight is normal noise from a generator seeded with the CRC-32 of its name, times fan_in ** -0.5 (vectors: 0.1,
and 1 is added to weights of norms); the position embedding is left as built, so that it is compared too. Samplings are
5 steps, `trailing`, from the noise of one generator with seed 5.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourmill.tokenizers.networks.diffusion import NoiseSchedule, build_denoiser, signal_levels
from fourmill.tokenizers.networks.diffusion_config import DENOISERS, DiffusionConfig, UNetConfig, UViTConfig

REFERENCE = Path(__file__).parent / "data" / "divae_reference.json"
CHANNELS, LATENT_DIM, DIGITS = 3, 5, 48

UNET: dict[str, Any] = {"patch_size": 2, "dim": 32, "multipliers": (1, 2, 2), "blocks": 1, "attention_at": (2, 4)}
UVIT: dict[str, Any] = {"patch_size": 2, "widths": (32, 64), "layers": 3, "heads": 2, "dim": 16, "position_grid": 6}
NETWORKS: dict[str, UNetConfig | UViTConfig] = {
    "unet": UNetConfig(**UNET),
    "unet_heads": UNetConfig(**UNET, heads=2),
    "uvit_concat": UViTConfig(**UVIT),
    "uvit_xattn": UViTConfig(**UVIT, conditioning="xattn"),
    "uvit_concat_longskip": UViTConfig(**UVIT, long_skip=True),
    "uvit_xattn_longskip": UViTConfig(**UVIT, long_skip=True, conditioning="xattn"),
    "uvit_deep": UViTConfig(**{**UVIT, "widths": (32, 64, 32)}, blocks=1, downsample_middle=False),
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "sample": {"prediction": "sample"},
    "sample_clipped": {"prediction": "sample", "clip_sample": True, "beta_schedule": "squaredcos_cap_v2"},
    "v_shifted": {"prediction": "v_prediction", "beta_schedule": "shifted_cosine:0.5"},
    "v_thresholded": {"prediction": "v_prediction", "thresholding": True, "beta_schedule": "squaredcos_cap_v2"},
    "epsilon_clipped": {
        "prediction": "epsilon",
        "beta_schedule": "scaled_linear",
        "zero_terminal_snr": False,
        "clip_sample": True,
    },
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear_plain": {"zero_terminal_snr": False},
    "linear_100": {"timesteps": 100, "steps": 10, "beta_end": 0.1},
    "scaled_linear": {"beta_schedule": "scaled_linear"},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "squaredcos_plain": {"beta_schedule": "squaredcos_cap_v2", "zero_terminal_snr": False},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "shifted_cosine_less": {"beta_schedule": "shifted_cosine:0.5"},
    "shifted_cosine_more": {"beta_schedule": "shifted_cosine:2.0"},
}


def fill(network: nn.Module) -> nn.Module:
    """Set every weight from its name, as the module's docstring says; the stored twin of a convolution like it."""
    state = network.state_dict()
    for name, weight in state.items():
        if not name.endswith("mid_pos_emb"):
            state[name] = _drawn(name.replace("Conv2d_0", "conv"), weight.shape)
    network.load_state_dict(state)
    return network.eval()


def _drawn(name: str, shape: torch.Size) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) > 1:
        return noise * shape[1:].numel() ** -0.5
    return noise * 0.1 + float(name.endswith("weight"))


def inputs(side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> noised values, timesteps, codes on a 4 x 4 grid, and a mask of half of one sample, all of the other."""
    generator = torch.Generator().manual_seed(3)
    noised = torch.randn(2, CHANNELS, side, side, generator=generator)
    codes = torch.randn(2, LATENT_DIM, 4, 4, generator=generator)
    mask = torch.rand(2, 4, 4, generator=generator) < torch.tensor([0.5, 1.0])[:, None, None]
    return noised, torch.tensor([7, 731]), codes, mask


def digest(output: Tensor) -> dict[str, Any]:
    """What is kept of an output."""
    flat = output.double().flatten()
    return {"values": flat[:: max(1, len(flat) // DIGITS)][:DIGITS].tolist(), "norm": flat.norm().item()}


def shapes_digest(network: nn.Module) -> str:
    """SHA-256 of the sorted names and shapes of all weights."""
    lines = sorted(f"{name} {list(weight.shape)}" for name, weight in network.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return json.loads(REFERENCE.read_text(encoding="utf-8"))


def build(name: str, **schedule: Any) -> tuple[nn.Module, NoiseSchedule]:
    config = DiffusionConfig(denoiser=NETWORKS[name], **schedule)
    return fill(build_denoiser(config, CHANNELS, LATENT_DIM, 16)), NoiseSchedule(config)


def assert_agrees(output: Tensor, recorded: dict[str, Any], tolerance: float) -> None:
    ours = digest(output)
    assert ours["values"] == pytest.approx(recorded["values"], abs=tolerance)
    assert ours["norm"] == pytest.approx(recorded["norm"], rel=tolerance)


@pytest.mark.parametrize("conditioning", ["concat", "xattn"])
@pytest.mark.parametrize("name", DENOISERS)
def test_named_sizes_have_the_weights_of_ml_4m(name: str, conditioning: str, reference: dict[str, Any]) -> None:
    sizes = DENOISERS[name]
    if isinstance(sizes, UViTConfig):
        sizes = UViTConfig(**{**sizes.model_dump(), "conditioning": conditioning})
    with torch.device("meta"):
        network = build_denoiser(DiffusionConfig(denoiser=sizes), CHANNELS, 32, 224)
    assert shapes_digest(network) == reference["shapes"][f"{name} {conditioning}"]


@pytest.mark.parametrize("side", [16, 24])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_denoiser_outputs_are_those_of_ml_4m(name: str, masked: bool, side: int, reference: dict[str, Any]) -> None:
    network, _ = build(name)
    noised, timesteps, codes, mask = inputs(side)
    with torch.no_grad():
        output = network(noised, timesteps, codes, mask if masked else None)
    assert output.std() > 0.1
    assert_agrees(output, reference["forward"][f"{name} {side}{' masked' if masked else ''}"], 1e-5)


@pytest.mark.parametrize("settings", SAMPLINGS)
@pytest.mark.parametrize("name", ["unet", "uvit_concat", "uvit_xattn"])
def test_five_ddim_steps_end_where_ml_4m_ends(name: str, settings: str, reference: dict[str, Any]) -> None:
    network, schedule = build(name, **SAMPLINGS[settings])
    codes, generator = inputs(16)[2], torch.Generator().manual_seed(5)
    values = schedule.sample(network, codes, 16, steps=5, generator=generator)
    assert_agrees(values, reference["sample"][f"{name} {settings}"], 1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_signal_levels_are_those_of_ml_4m(name: str, reference: dict[str, Any]) -> None:
    levels = signal_levels(DiffusionConfig(**SCHEDULES[name])).double()
    recorded = reference["levels"][name]
    assert levels[:: len(levels) // 50].tolist() == pytest.approx(recorded["values"], abs=1e-6)
    assert levels[-1].item() == pytest.approx(recorded["last"], abs=1e-9)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 5, 25, 50])
def test_timesteps_are_those_of_ml_4m(spacing: Any, steps: int, reference: dict[str, Any]) -> None:
    schedule = NoiseSchedule(DiffusionConfig(spacing=spacing))
    assert schedule.timesteps(steps) == reference["timesteps"][f"{spacing} {steps}"]


@pytest.mark.parametrize("bound", ["free", "clipped", "thresholded"])
@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize(("timestep", "following"), [(999, 799), (599, 399), (199, None)])
def test_one_ddim_step_is_that_of_ml_4m(
    timestep: int, following: int | None, prediction: Any, bound: str, reference: dict[str, Any]
) -> None:
    config = DiffusionConfig(
        prediction=prediction,
        zero_terminal_snr=prediction != "epsilon",
        clip_sample=bound == "clipped",
        thresholding=bound == "thresholded",
        threshold_max=1.5,
        threshold_ratio=0.75,
    )
    noised, output = step_inputs()
    values = NoiseSchedule(config).step(output, noised, timestep, following)
    recorded = torch.tensor(reference["steps"][f"{prediction} {bound} {timestep}"])
    assert values.flatten().tolist() == pytest.approx(recorded.tolist(), rel=1e-6, abs=1e-6)


def step_inputs() -> tuple[Tensor, Tensor]:
    """-> noised values and a denoiser's output for them, (2, 1, 3, 3)."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(2, 1, 3, 3, generator=generator), 2 * torch.randn(2, 1, 3, 3, generator=generator)


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_noised_values_and_velocities_are_those_of_ml_4m(prediction: Any, reference: dict[str, Any]) -> None:
    schedule = NoiseSchedule(DiffusionConfig(prediction=prediction, zero_terminal_snr=False))
    clean, noise = step_inputs()
    timesteps = torch.tensor([3, 640])
    wanted = {"sample": clean, "epsilon": noise}
    if prediction == "v_prediction":
        wanted[prediction] = torch.tensor(reference["velocity"]).view_as(clean)
    noised = schedule.add_noise(clean, noise, timesteps)
    assert noised.flatten().tolist() == pytest.approx(reference["noised"], abs=1e-6)
    torch.testing.assert_close(schedule.target(clean, noise, timesteps), wanted[prediction], atol=1e-6, rtol=0)
