"""Diffusion decoders: the noise that a denoiser learns from, and sampling with few steps (4M's DiVAE).

A denoiser reconstructs a value from noise and from the codes of its tokens. Invariants: the schedule has no weights;
all arithmetic on noise is float32, whatever the denoiser computes in; with a seed per sample, a row of tokens decodes
to the same value in whatever batch it stands.

Timesteps, steps and outputs are ml-4m's, but for two things where it does not do what its names say: the steps are as
many as asked for also where they do not divide the timesteps (trailing), and each leads to the next one (linspace).

Shapes: B batch, C channels, S side in pixels, Z latent channels, h x w the codes' grid, T timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fourmill.tokenizers.networks.diffusion_config import DiffusionConfig, UNetConfig
from fourmill.tokenizers.networks.unet import UNet
from fourmill.tokenizers.networks.uvit import UViT

_LOSSES = {"mse": functional.mse_loss, "l1": functional.l1_loss, "smooth_l1": functional.smooth_l1_loss}
_LOG_SNR_LIMIT = 15.0  # of shifted cosines, as ml-4m
_MAX_BETA = 0.999  # of the cosine schedule: its last steps would otherwise be singular (arXiv 2102.09672)


def build_denoiser(config: DiffusionConfig, channels: int, latent_dim: int, size: int) -> nn.Module:
    """A new denoiser for values (B, channels, size, size) and codes (B, latent_dim, h, w); its state dict has the keys
    that ml-4m's checkpoints have below `decoder.`."""
    sizes = config.denoiser
    _check_side(size, sizes.multiple)
    if isinstance(sizes, UNetConfig):
        return UNet(sizes, channels, latent_dim)
    return UViT(sizes, channels, latent_dim)


def _check_side(size: int, multiple: int) -> None:
    if size < multiple or size % multiple:
        raise ValueError(f"size {size} is not a multiple of {multiple}, the denoiser's patch and its halvings")


def signal_levels(config: DiffusionConfig) -> Tensor:
    """Share of the clean value's variance at each timestep, float32 (T,), falling from nearly 1 to nearly or exactly 0.

    In float32 and in the order of ml-4m's own arithmetic: these are the levels that published decoders were trained on.
    """
    if config.shift is not None:
        position_T = torch.linspace(0, 1, config.timesteps).double()
        log_snr_T = -2 * ((position_T * math.pi / 2).tan().log() + math.log(config.shift))
        levels_T = log_snr_T.clamp(-_LOG_SNR_LIMIT, _LOG_SNR_LIMIT).float().sigmoid()
        levels_T[-1] = 0.0
        return levels_T
    alphas_T = 1.0 - _betas(config)
    return (_end_in_noise(alphas_T) if config.zero_terminal_snr else alphas_T).cumprod(0)


def _betas(config: DiffusionConfig) -> Tensor:
    """Share of noise that each timestep adds, float32 (T,)."""
    count, start, end = config.timesteps, config.beta_start, config.beta_end
    if config.beta_schedule == "linear":
        return torch.linspace(start, end, count)
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count) ** 2
    if config.beta_schedule == "sigmoid":
        return torch.linspace(-6, 6, count).sigmoid() * (end - start) + start
    edges = torch.linspace(0, 1, count + 1, dtype=torch.float64)
    levels = ((edges + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (1 - levels[1:] / levels[:-1]).clamp(max=_MAX_BETA).float()


def _end_in_noise(alphas_T: Tensor) -> Tensor:
    """Alphas of the schedule whose signal is shifted and scaled to end at 0 and begin as before (arXiv 2305.08891)."""
    signal_T = alphas_T.cumprod(0).sqrt()
    first, last = signal_T[0].clone(), signal_T[-1].clone()
    levels_T = ((signal_T - last) * (first / (first - last))) ** 2
    return torch.cat([levels_T[:1], levels_T[1:] / levels_T[:-1]])


class NoiseSchedule:
    """Noise levels of one configuration: noising and targets for training, DDIM for sampling (arXiv 2010.02502)."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.levels_T = signal_levels(config)

    def _scales(self, timesteps_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """-> what clean value and noise are multiplied by at each timestep, float32 (B, 1, 1, 1) each."""
        levels_B = self.levels_T.to(like.device)[timesteps_B.to(like.device)]
        levels = levels_B.view(-1, *[1] * (like.ndim - 1))
        return levels.sqrt(), (1 - levels).sqrt()

    def add_noise(self, clean_BCSS: Tensor, noise_BCSS: Tensor, timesteps_B: Tensor) -> Tensor:
        """Clean values as they are at these timesteps."""
        signal, spread = self._scales(timesteps_B, clean_BCSS)
        return signal * clean_BCSS + spread * noise_BCSS

    def target(self, clean_BCSS: Tensor, noise_BCSS: Tensor, timesteps_B: Tensor) -> Tensor:
        """What the denoiser should output for `add_noise` of the same arguments."""
        if self.config.prediction == "sample":
            return clean_BCSS
        if self.config.prediction == "epsilon":
            return noise_BCSS
        signal, spread = self._scales(timesteps_B, clean_BCSS)
        return signal * noise_BCSS - spread * clean_BCSS

    def loss(
        self,
        denoiser: nn.Module,
        clean_BCSS: Tensor,
        codes_BZhw: Tensor,
        generator: torch.Generator,
        valid_B1SS: Tensor | None = None,
    ) -> Tensor:
        """Mean loss over uniformly drawn timesteps; `valid_B1SS`, bool, leaves pixels out of the mean.

        Timesteps, noise and masks are drawn from `generator` on its own device, so that a run repeats elsewhere.
        """
        batch, device, source = len(clean_BCSS), clean_BCSS.device, generator.device
        timesteps_B = torch.randint(self.config.timesteps, (batch,), generator=generator, device=source).to(device)
        noise_BCSS = torch.randn(clean_BCSS.shape, generator=generator, device=source).to(device)
        mask = None
        if self.config.condition_dropout:
            drops_B = torch.rand(batch, generator=generator, device=source).to(device) < self.config.condition_dropout
            mask = drops_B[:, None, None].expand(-1, *codes_BZhw.shape[-2:])
        noised_BCSS = self.add_noise(clean_BCSS, noise_BCSS, timesteps_B)
        output_BCSS = denoiser(noised_BCSS, timesteps_B, codes_BZhw, mask).float()
        wanted_BCSS = self.target(clean_BCSS, noise_BCSS, timesteps_B).float()
        losses = _LOSSES[self.config.loss](output_BCSS, wanted_BCSS, reduction="none")
        if valid_B1SS is None:
            return losses.mean()
        weights = valid_B1SS.expand_as(losses)
        return losses.where(weights, 0.0).sum() / weights.sum().clamp(min=1)

    def timesteps(self, steps: int | None = None) -> list[int]:
        """The timesteps of a sampling run, falling; `steps` of them, the configuration's number if not given."""
        steps, count = self.config.steps if steps is None else steps, self.config.timesteps
        if not 1 <= steps <= count:
            raise ValueError(
                f"steps {steps} is not between 1 and the {count} timesteps that the decoder was trained on"
            )
        if self.config.spacing == "leading":
            return [i * (count // steps) for i in reversed(range(steps))]
        end = 1 if self.config.spacing == "linspace" else count / steps
        stride = (count - end) / max(steps - 1, 1)
        return [round(count - i * stride) - 1 for i in range(steps)]

    def step(self, output_BCSS: Tensor, noised_BCSS: Tensor, timestep: int, following: int | None) -> Tensor:
        """Values at `timestep` and the denoiser's output for them -> values at the less noisy timestep `following`, or
        clean ones if that is None."""
        level = float(self.levels_T[timestep])
        signal, spread = level**0.5, (1 - level) ** 0.5
        if self.config.prediction == "epsilon":
            clean, noise = (noised_BCSS - spread * output_BCSS) / signal, output_BCSS
        elif self.config.prediction == "sample":
            clean, noise = output_BCSS, (noised_BCSS - signal * output_BCSS) / spread
        else:
            clean = signal * noised_BCSS - spread * output_BCSS
            noise = signal * output_BCSS + spread * noised_BCSS
        level = 1.0 if following is None else float(self.levels_T[following])
        return level**0.5 * self._bounded(clean) + (1 - level) ** 0.5 * noise

    def _bounded(self, clean_BCSS: Tensor) -> Tensor:
        """Predicted clean values within the configuration's bounds."""
        if self.config.thresholding:
            quantile_B = clean_BCSS.flatten(1).abs().quantile(self.config.threshold_ratio, dim=1)
            edge = quantile_B.clamp(1.0, self.config.threshold_max).view(-1, 1, 1, 1)
            return clean_BCSS.clamp(-edge, edge) / edge
        edge = self.config.clip_range
        return clean_BCSS.clamp(-edge, edge) if self.config.clip_sample else clean_BCSS

    @torch.no_grad()
    def sample(
        self,
        denoiser: nn.Module,
        codes_BZhw: Tensor,
        size: int,
        *,
        steps: int | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Codes (B, Z, h, w) -> values (B, C, size, size), float32.

        The noise to begin with comes from a seed for each sample, or from one generator for the whole batch.
        """
        sizes = denoiser.sizes
        _check_side(size, sizes.multiple)
        shape = denoiser.channels, size, size
        values_BCSS = starting_noise(len(codes_BZhw), shape, seeds, generator).to(codes_BZhw.device)
        timesteps = self.timesteps(steps)
        for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
            timesteps_B = torch.full((len(codes_BZhw),), timestep, device=codes_BZhw.device)
            output_BCSS = self._guided(denoiser, values_BCSS, timesteps_B, codes_BZhw)
            values_BCSS = self.step(output_BCSS, values_BCSS, timestep, following)
        return values_BCSS

    def _guided(self, denoiser: nn.Module, values_BCSS: Tensor, timesteps_B: Tensor, codes_BZhw: Tensor) -> Tensor:
        """The denoiser's output, float32, away from what it says without codes by the configured guidance."""
        told = denoiser(values_BCSS, timesteps_B, codes_BZhw).float()
        guidance, rescale = self.config.guidance, self.config.guidance_rescale
        if guidance == 1.0:
            return told
        batch, _, *grid = codes_BZhw.shape
        mask = torch.ones(batch, *grid, dtype=torch.bool, device=codes_BZhw.device)
        untold = denoiser(values_BCSS, timesteps_B, codes_BZhw, mask).float()
        guided = untold + guidance * (told - untold)
        if rescale == 0.0:
            return guided
        spreads = [x.std(dim=(1, 2, 3), keepdim=True) for x in (told, guided)]
        return guided * (1 - rescale + rescale * spreads[0] / spreads[1])


def starting_noise(
    batch: int, shape: tuple[int, int, int], seeds: Sequence[int] | None, generator: torch.Generator | None
) -> Tensor:
    """Normal noise (batch, *shape), float32, drawn on the CPU for `seeds`: one each, whatever else is in the batch."""
    if (seeds is None) == (generator is None):
        raise ValueError("sampling needs its noise from either seeds, one for each sample, or a generator")
    if generator is not None:
        return torch.randn(batch, *shape, generator=generator, device=generator.device)
    assert seeds is not None
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} samples; each needs one")
    if not seeds:
        return torch.empty(0, *shape)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
