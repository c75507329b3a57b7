"""The UViT denoiser of a diffusion decoder: convolutions at high resolution, a transformer at low (arXiv 2301.11093).

Codes enter at the transformer. Names and shapes are those of ml-4m's checkpoints. Every sample is computed by itself.

Shapes: B batch, C channels, S side in pixels, Z latent channels, h x w the codes' grid, D channels, H x W positions,
E channels of the timestep's embedding.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from fourmill.tokenizers.networks.diffusion_config import UViTConfig
from fourmill.tokenizers.networks.unet import Upsample, timestep_embedding
from fourmill.tokenizers.networks.uvit_middle import Block, Middle


class ResnetBlock(nn.Module):
    """Two convolutions with the timestep's embedding added between them, and a way round."""

    def __init__(self, width_in: int, width_out: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, width_in), nn.GroupNorm(groups, width_out)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x_BDHW: Tensor, embedding_BE: Tensor) -> Tensor:
        hidden = self.conv1(functional.silu(self.norm1(x_BDHW)))
        hidden = hidden + self.time_emb_proj(functional.silu(embedding_BE))[..., None, None]
        return self.conv_shortcut(x_BDHW) + self.conv2(functional.silu(self.norm2(hidden)))


class Downsample(nn.Module):
    """Half the side, by a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        return self.conv(x_BDHW)


class Level(nn.Module):
    """Residual blocks of one resolution and the step to the next, if any."""

    def __init__(self, widths_in: list[int], width: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(w, width, embedding, groups) for w in widths_in])


class UViT(nn.Module):
    """Noised values (B, C, S, S), timesteps (B,) and codes (B, Z, h, w) -> the schedule's target (B, C, S, S)."""

    def __init__(self, sizes: UViTConfig, channels: int, latent_dim: int) -> None:
        super().__init__()
        self.sizes, self.channels = sizes, channels
        first, last, patch = sizes.widths[0], sizes.widths[-1], sizes.patch_size
        embedding = 4 * first
        self.conv_in = nn.Conv2d(channels, first, patch, patch)
        layers = {
            "linear_1": nn.Linear(first, embedding),
            "act": nn.SiLU(),
            "linear_2": nn.Linear(embedding, embedding),
        }
        self.time_embedding = nn.Sequential(OrderedDict(layers))
        self.down_blocks = nn.ModuleList(_levels_down(sizes, embedding))
        self.up_blocks = nn.ModuleList(_levels_up(sizes, embedding))
        if sizes.downsample_middle:
            self.downsample_mid, self.upsample_mid = Downsample(last), Upsample(last)
            self.downsample_mid.register_state_dict_post_hook(_add_twin)
            self.downsample_mid.register_load_state_dict_pre_hook(_take_twin)
        self.mid_block = Middle(sizes, latent_dim, embedding)
        self.conv_norm_out = nn.GroupNorm(sizes.groups, first)
        self.conv_out = nn.ConvTranspose2d(first, channels, patch, patch)
        self.apply(_initialise)

    def forward(
        self, noised_BCSS: Tensor, timesteps_B: Tensor, codes_BZhw: Tensor, cond_mask: Tensor | None = None
    ) -> Tensor:
        """`cond_mask`, bool (B, h, w): codes that are not to be seen."""
        waves = timestep_embedding(timesteps_B, self.sizes.widths[0])
        embedding_BE = self.time_embedding(waves.to(self.conv_in.weight.dtype))
        hidden = self.conv_in(noised_BCSS)
        kept = [hidden]
        for level in self.down_blocks:
            for resnet in level.resnets:
                hidden = resnet(hidden, embedding_BE)
                kept.append(hidden)
            if hasattr(level, "downsamplers"):
                hidden = level.downsamplers[0](hidden)
                kept.append(hidden)
        if self.sizes.downsample_middle:
            hidden = self.downsample_mid(hidden)
        hidden = self.mid_block(hidden, embedding_BE, codes_BZhw, cond_mask)
        if self.sizes.downsample_middle:
            hidden = self.upsample_mid(hidden)
        for level in self.up_blocks:
            for resnet in level.resnets:
                hidden = resnet(torch.cat([hidden, kept.pop()], dim=1), embedding_BE)
            if hasattr(level, "upsamplers"):
                hidden = level.upsamplers[0](hidden)
        return self.conv_out(functional.silu(self.conv_norm_out(hidden)))


def _levels_down(sizes: UViTConfig, embedding: int) -> list[Level]:
    levels, before = [], sizes.widths[0]
    for i, width in enumerate(sizes.widths):
        level = Level([before] + [width] * (sizes.blocks - 1), width, embedding, sizes.groups)
        if i < len(sizes.widths) - 1:
            level.downsamplers = nn.ModuleList([Downsample(width)])
        levels.append(level)
        before = width
    return levels


def _levels_up(sizes: UViTConfig, embedding: int) -> list[Level]:
    """From the transformer to the first level; each block takes also what the way down left at its resolution."""
    levels, before = [], sizes.widths[-1]
    for i in reversed(range(len(sizes.widths))):
        width, below = sizes.widths[i], sizes.widths[max(i - 1, 0)]
        comes = [before] + [width] * sizes.blocks
        left = [width] * sizes.blocks + [below]
        level = Level([a + b for a, b in zip(comes, left, strict=True)], width, embedding, sizes.groups)
        if i:
            level.upsamplers = nn.ModuleList([Upsample(width)])
        levels.append(level)
        before = width
    return levels


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, ResnetBlock):  # children come first: every branch starts closed
        nn.init.zeros_(module.conv2.weight)
        nn.init.zeros_(module.conv2.bias)
    if isinstance(module, Block):
        nn.init.zeros_(module.adaLN_gate.weight)


# ml-4m's files hold the convolution before the transformer under two names. A second name for one module would be
# stored, averaged and loaded twice; so the twin exists in state dicts only.
def _add_twin(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    for name in ("weight", "bias"):
        state[f"{prefix}Conv2d_0.{name}"] = state[f"{prefix}conv.{name}"].clone()


def _take_twin(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    for name in ("weight", "bias"):
        twin = state.pop(f"{prefix}Conv2d_0.{name}", None)
        if twin is not None:
            state.setdefault(f"{prefix}conv.{name}", twin)
