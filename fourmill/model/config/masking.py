"""Which tokens a sample shows and which it asks for: token budgets and how modalities share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field, model_validator

from fourmill.modalities import unknown
from fourmill.model.config.base import Section


class Mixture(Section):
    """One way to share out the token budgets: Dirichlet concentrations over the modalities that a sample has.

    Small alphas concentrate a budget on few modalities, large ones spread it evenly, 0 leaves a modality out.
    4M's RGB-to-all is `input_alphas: {rgb: 1000}, input_default: 0, target_default: 0.5`.
    """

    weight: float = Field(default=1.0, gt=0)
    """How often this mixture is drawn, relative to the others."""
    input_alphas: dict[str, float] = Field(default_factory=dict)
    """Concentration of each input modality."""
    input_default: float = Field(default=0.5, ge=0)
    """Concentration of the inputs not named."""
    target_alphas: dict[str, float] = Field(default_factory=dict)
    """Concentration of each target modality."""
    target_default: float = Field(default=0.5, ge=0)
    """Concentration of the targets not named."""

    @model_validator(mode="after")
    def _not_negative(self) -> Mixture:
        for name, alpha in {**self.input_alphas, **self.target_alphas}.items():
            if alpha < 0:
                raise ValueError(f"the alpha of {name!r} is {alpha}; 0 leaves a modality out, there is nothing below")
        return self


class MaskingConfig(Section):
    """Which tokens a sample shows and which it asks for."""

    num_input_tokens: int = Field(default=128, ge=1)
    """Most visible tokens of a sample, over all modalities."""
    num_target_tokens: int = Field(default=128, ge=1)
    """Most predicted tokens of a sample."""
    min_input_tokens: int | None = Field(default=None, ge=1)
    """If set, a sample's input budget is uniform from here to `num_input_tokens`; else always the most."""
    min_target_tokens: int | None = Field(default=None, ge=1)
    """The same for targets."""
    mixtures: tuple[Mixture, ...] = Field(default=(Mixture(),), min_length=1)
    """One is drawn for each sample, by weight, among those with an input and a target that the sample has."""
    num_sentinels: int = Field(default=200, ge=3)
    """Sentinels [S_0], [S_1], … of the text vocabulary, ids 4 and up. [S_0] is never used, as in 4M."""

    @model_validator(mode="after")
    def _ordered(self) -> MaskingConfig:
        for low, high in (("min_input_tokens", "num_input_tokens"), ("min_target_tokens", "num_target_tokens")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and least > most:
                raise ValueError(f"{low} {least} is above {high} {most}")
        return self

    def check(self, domains_in: Sequence[str], domains_out: Sequence[str]) -> None:
        """ValueError for an alpha that names a modality the model does not have on that side."""
        for mixture in self.mixtures:
            sides: tuple[tuple[str, Mapping[str, float], Sequence[str]], ...]
            sides = (("input", mixture.input_alphas, domains_in), ("target", mixture.target_alphas, domains_out))
            for side, alphas, known in sides:
                for name in alphas:
                    if name not in known:
                        raise ValueError(f"{side}_alphas: {unknown('modality', name, list(known))}")
