"""Tiny denoisers with and without weights of their own, for tests of diffusion decoders."""

import torch
from torch import Tensor, nn

from fourmill.tokenizers.networks.diffusion import NoiseSchedule, build_denoiser
from fourmill.tokenizers.networks.diffusion_config import DiffusionConfig, UNetConfig, UViTConfig

UNET = UNetConfig(patch_size=2, dim=16, multipliers=(1, 1), blocks=1, attention_at=(2,), groups=8)
UVIT = UViTConfig(
    patch_size=2, widths=(16,), blocks=1, layers=2, heads=2, dim=32, position_grid=4, groups=8, dropout=0.0
)
XATTN = UViTConfig(**{**UVIT.model_dump(), "conditioning": "xattn"})


class Oracle(nn.Module):
    """A denoiser that knows the clean values, and which timesteps it was asked about."""

    def __init__(self, schedule: NoiseSchedule, clean_BCSS: Tensor) -> None:
        super().__init__()
        self.schedule, self.clean, self.sizes, self.channels = schedule, clean_BCSS, UNET, clean_BCSS.shape[1]
        self.asked: list[int] = []

    def forward(self, noised: Tensor, timesteps: Tensor, codes: Tensor, cond_mask: Tensor | None = None) -> Tensor:
        self.asked.append(int(timesteps[0]))
        level = self.schedule.levels_T[timesteps].view(-1, 1, 1, 1)
        noise = (noised - level.sqrt() * self.clean) / (1 - level).sqrt()
        return self.schedule.target(self.clean, noise, timesteps)


class Recorder(nn.Module):
    """A denoiser that outputs one thing for codes it sees and 1 for masked ones, and keeps what it was given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output, self.sizes, self.channels = output, UNET, output.shape[1]
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, noised: Tensor, timesteps: Tensor, codes: Tensor, cond_mask: Tensor | None = None) -> Tensor:
        self.calls.append((noised, timesteps, cond_mask))
        return self.output if cond_mask is None else torch.ones_like(self.output)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awake(sizes: UNetConfig | UViTConfig) -> nn.Module:
    """A denoiser of one channel and 4-channel codes none of whose weights is 0, as some are at the start."""
    network = build_denoiser(DiffusionConfig(denoiser=sizes), 1, 4, 16).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return network
