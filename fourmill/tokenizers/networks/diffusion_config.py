"""Configuration of a diffusion decoder (4M's DiVAE); importable without torch.

A decoder is a denoiser (a UNet on patches, or a UViT) and a noise schedule. `DENOISERS` holds ml-4m's named sizes; a
configuration takes such a name or sizes of its own. Settings that cannot work together are refused here, before weights
are built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
SHIFTED_COSINE = "shifted_cosine:"  # followed by the shift, as in ml-4m's configurations


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _refuse_groups(widths: tuple[int, ...], groups: int) -> None:
    wrong = [width for width in widths if width % groups]
    if wrong or not widths:
        raise ValueError(
            f"widths {list(widths)} must be multiples of the {groups} groups of a normalisation, one or more"
        )


class UNetConfig(_Strict):
    """Sizes of a UNet (arXiv 2105.05233) whose pixels are patches (arXiv 2207.04316); the defaults are ml-4m's."""

    kind: Literal["unet"] = "unet"
    patch_size: int = Field(default=4, ge=1, le=64)
    """Side of the square of pixels that is one position of the UNet."""
    dim: int = Field(default=256, ge=2)
    """Channels that `multipliers` multiply."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Width of each level as a multiple of `dim`; every level after the first has half the side of the one before."""
    blocks: int = Field(default=3, ge=1, le=16)
    """Residual blocks per level on the way down; one more on the way up."""
    attention_at: tuple[int, ...] = (4, 8)
    """Levels with attention, named by how many times smaller their side is: 1, 2, 4, ..."""
    heads: int = Field(default=1, ge=1)
    """Heads of each attention."""
    groups: int = Field(default=32, ge=1)
    """Groups of channels that are normalised together."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """In residual blocks, in training."""

    @model_validator(mode="after")
    def _consistent(self) -> UNetConfig:
        _refuse_groups(self.widths, self.groups)
        if any(width % self.heads for width in self.widths):
            raise ValueError(f"widths {list(self.widths)} are not multiples of heads {self.heads}")
        known = [2**level for level in range(len(self.multipliers))]
        if not set(self.attention_at) <= set(known):
            raise ValueError(f"attention_at {list(self.attention_at)}: the levels are {known}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(multiplier * self.dim for multiplier in self.multipliers)

    @property
    def multiple(self) -> int:
        """The side of a picture must be a multiple of this."""
        return self.patch_size * 2 ** (len(self.multipliers) - 1)


class UViTConfig(_Strict):
    """Sizes of a UViT (arXiv 2301.11093): convolutions around a transformer; the defaults are ml-4m's."""

    kind: Literal["uvit"] = "uvit"
    patch_size: int = Field(default=4, ge=1, le=64)
    """Side of the square of pixels that is one position of the first level."""
    widths: tuple[int, ...] = (128, 256)
    """Channels of each convolutional level; every level after the first has half the side of the one before."""
    blocks: int = Field(default=2, ge=1, le=16)
    """Residual blocks per level on the way down; one more on the way up."""
    downsample_middle: bool = True
    """Whether the transformer works at half the side of the last level."""
    layers: int = Field(default=12, ge=1, le=64)
    """Transformer blocks; odd with `long_skip`."""
    heads: int = Field(default=12, ge=1)
    """Attention heads of each of them."""
    dim: int = Field(default=768, ge=4)
    """Width of the transformer: a multiple of 4 and of `heads`."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Width of a block's hidden layer, as a multiple of `dim`."""
    position_grid: int = Field(default=32, ge=1)
    """Side of the stored position embedding, which is interpolated to other sides."""
    long_skip: bool = False
    """Connect the first half of the transformer to the second (arXiv 2209.12152)."""
    conditioning: Literal["concat", "xattn"] = "concat"
    """How codes enter: 'concat' adds them to the transformer's input (ml-4m's name), 'xattn' is cross-attention."""
    groups: int = Field(default=32, ge=1)
    """Groups of channels that are normalised together."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Of the transformer's attention outputs and MLPs, in training."""

    @model_validator(mode="after")
    def _consistent(self) -> UViTConfig:
        _refuse_groups(self.widths, self.groups)
        if self.dim % 4 or self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of 4 and of heads {self.heads}")
        if self.long_skip and self.layers % 2 == 0:
            raise ValueError(f"layers {self.layers} must be odd with long_skip: one stands between the two halves")
        return self

    @property
    def multiple(self) -> int:
        """The side of a picture must be a multiple of this."""
        return self.patch_size * 2 ** (len(self.widths) - 1 + self.downsample_middle)


DenoiserConfig = Annotated[UNetConfig | UViTConfig, Field(discriminator="kind")]

_LARGE: dict[str, Any] = {"layers": 24, "heads": 16, "dim": 1024}
_HUGE: dict[str, Any] = {"layers": 32, "heads": 16, "dim": 1280}
_DEEP: dict[str, Any] = {"widths": (128, 256, 512), "downsample_middle": False}
DENOISERS: dict[str, UNetConfig | UViTConfig] = {
    "unet_patched": UNetConfig(),
    "uvit_b_p4_f16": UViTConfig(),
    "uvit_l_p4_f16": UViTConfig(**_LARGE),
    "uvit_h_p4_f16": UViTConfig(**_HUGE),
    "uvit_b_p4_f16_longskip": UViTConfig(layers=13, long_skip=True),
    "uvit_l_p4_f16_longskip": UViTConfig(**{**_LARGE, "layers": 25}, long_skip=True),
    "uvit_b_p4_f8": UViTConfig(downsample_middle=False),
    "uvit_l_p4_f8": UViTConfig(**_LARGE, downsample_middle=False),
    "uvit_b_p4_f16_extraconv": UViTConfig(**_DEEP),
    "uvit_l_p4_f16_extraconv": UViTConfig(**_LARGE, **_DEEP),
}
"""ml-4m's names: b, l, h the transformer's size; p4 the patch; f16, f8 how much smaller the transformer's side is."""


class DiffusionConfig(_Strict):
    """A diffusion decoder: its denoiser, the noise that it was trained on, and how it samples."""

    denoiser: DenoiserConfig = UNetConfig()
    """The network: sizes, or one of the names in `DENOISERS`."""
    timesteps: int = Field(default=1000, ge=2)
    """Noise levels in training, 0 the least."""
    beta_schedule: str = "linear"
    """How noise grows: linear, scaled_linear, squaredcos_cap_v2, sigmoid, or shifted_cosine:X (arXiv 2305.18231), where
    X below 1 is less noise, for codes that say much about the picture."""
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    """Share of noise added by the first timestep; not of the cosine schedules."""
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    """Share of noise added by the last."""
    zero_terminal_snr: bool = True
    """Rescale the schedule so that the last timestep is pure noise, which is where sampling starts (arXiv 2305.08891).
    A shifted cosine ends so by itself."""
    prediction: Literal["sample", "epsilon", "v_prediction"] = "sample"
    """What the denoiser outputs: the clean value, the noise, or the velocity between them (arXiv 2202.00512)."""
    loss: Literal["mse", "l1", "smooth_l1"] = "mse"
    """Between output and target."""
    condition_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of training samples whose codes are all masked; what guidance needs."""
    clip_sample: bool = False
    """Clip the predicted clean value at every step of sampling, to -clip_range..clip_range."""
    clip_range: float = Field(default=1.0, gt=0)
    """See `clip_sample`."""
    thresholding: bool = False
    """Scale the predicted clean value down where it saturates (arXiv 2205.11487), instead of clipping."""
    threshold_ratio: float = Field(default=0.995, gt=0, le=1)
    """Quantile of a sample's magnitudes that becomes 1."""
    threshold_max: float = Field(default=1.0, ge=1)
    """Largest such quantile that is scaled; 1 is the same as clipping at 1."""
    steps: int = Field(default=25, ge=1)
    """Steps of sampling unless another number is asked for."""
    spacing: Literal["trailing", "leading", "linspace"] = "trailing"
    """Which timesteps they are (arXiv 2305.08891, table 2); only 'leading' does not begin with the last one."""
    guidance: float = Field(default=1.0, ge=0)
    """Weight of codes against masked codes (arXiv 2207.12598); 1 is the denoiser as it is, at half the cost."""
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """Share in which a guided output gets back the spread of the unguided one (arXiv 2305.08891, section 3.4)."""

    @field_validator("denoiser", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value not in DENOISERS:
            raise ValueError(f"unknown denoiser {value!r}; known: {', '.join(DENOISERS)}, or sizes with a kind")
        return DENOISERS[value]

    @model_validator(mode="after")
    def _consistent(self) -> DiffusionConfig:
        if self.shift is None and self.beta_schedule not in BETA_SCHEDULES:
            known = ", ".join((*BETA_SCHEDULES, SHIFTED_COSINE + "0.5"))
            raise ValueError(f"unknown beta_schedule {self.beta_schedule!r}; known: {known}")
        if self.prediction == "epsilon" and (self.zero_terminal_snr or self.shift is not None):
            raise ValueError(
                "prediction 'epsilon' says nothing about the picture where all is noise: set zero_terminal_snr to "
                "false with another schedule than shifted_cosine, or predict 'sample' or 'v_prediction'"
            )
        if self.steps > self.timesteps:
            raise ValueError(f"steps {self.steps} is more than the {self.timesteps} timesteps there are")
        return self

    @property
    def shift(self) -> float | None:
        """X of 'shifted_cosine:X'; None for other schedules. ValueError if it is not a positive number."""
        name, colon, text = self.beta_schedule.partition(":")
        if name + colon != SHIFTED_COSINE:
            return None
        try:
            shift = float(text)
        except ValueError:
            shift = 0.0
        if not 0 < shift < float("inf"):
            raise ValueError(f"beta_schedule {self.beta_schedule!r}: the shift must be a positive number")
        return shift


def from_published(config: Mapping[str, Any]) -> DiffusionConfig:
    """The decoder that ml-4m's DiVAE builds from the keys of its `config.json`; other keys are left to the caller.

    Absent keys have ml-4m's defaults. `conditioning` means nothing to a UNet (published: 'add'). `scheduler` is not
    read: 'ddpm' and 'ddim' have the same noise levels, and sampling is by DDIM.
    """
    name = config.get("dec_type", "unet_patched")
    denoiser = DENOISERS.get(name)
    if denoiser is None:
        raise ValueError(f"dec_type {name!r} is not a diffusion decoder; known: {', '.join(DENOISERS)}")
    if isinstance(denoiser, UViTConfig):
        sizes = denoiser.model_dump()
        sizes["conditioning"] = config.get("conditioning", "concat")
        sizes["dropout"] = config.get("dec_transformer_dropout", 0.2)
        denoiser = UViTConfig(**sizes)
    return DiffusionConfig(
        denoiser=denoiser,
        timesteps=config.get("num_train_timesteps", 1000),
        beta_schedule=config.get("beta_schedule", "squaredcos_cap_v2"),
        prediction=config.get("prediction_type", "v_prediction"),
        clip_sample=config.get("clip_sample", False),
        thresholding=config.get("thresholding", True),
        zero_terminal_snr=config.get("zero_terminal_snr", True),
        condition_dropout=config.get("cls_free_guidance_dropout", 0.0),
    )
