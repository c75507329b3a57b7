"""Which tokens a sample shows and which it asks for: token budgets and how modalities share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

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


class ModalityMasking(Section):
    """Bounds of one modality's budgets, and how its texts are masked."""

    min_input: int = Field(default=0, ge=0)
    """Fewest visible tokens in a sample that has the modality and whose mixture gives it a share."""
    max_input: int | None = Field(default=None, ge=0)
    """Most visible tokens; None: as many as there are."""
    min_target: int = Field(default=0, ge=0)
    """The same for targets."""
    max_target: int | None = Field(default=None, ge=0)
    """The same for targets."""
    keep: Literal["random", "all", "none", "binary"] = "random"
    """Texts: the probability with which each token is shown before the budget lowers it: drawn uniformly from 0 to 1
    for each text, 1, 0, or one of the two. Grids show whatever their budget allows."""
    chunk: int = Field(default=1, ge=1)
    """Texts: tokens that are shown or hidden together; metadata is pairs of type and value: 2."""

    @model_validator(mode="after")
    def _ordered(self) -> ModalityMasking:
        for side in ("input", "target"):
            least, most = getattr(self, f"min_{side}"), getattr(self, f"max_{side}")
            if most is not None and least > most:
                raise ValueError(f"min_{side} {least} is above max_{side} {most}")
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
    modalities: dict[str, ModalityMasking] = Field(default_factory=dict)
    """Bounds and schemes of the modalities that have their own."""
    num_sentinels: int = Field(default=200, ge=3)
    """Sentinels [S_0], [S_1], … of the text vocabulary, ids 4 and up. [S_0] is never used, as in 4M."""

    @model_validator(mode="after")
    def _ordered(self) -> MaskingConfig:
        for low, high in (("min_input_tokens", "num_input_tokens"), ("min_target_tokens", "num_target_tokens")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and least > most:
                raise ValueError(f"{low} {least} is above {high} {most}")
        for side, most in (("input", self.num_input_tokens), ("target", self.num_target_tokens)):
            if (least := sum(getattr(m, f"min_{side}") for m in self.modalities.values())) > most:
                raise ValueError(f"min_{side} of all modalities is {least} together; num_{side}_tokens is {most}")
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
        known = list(dict.fromkeys((*domains_in, *domains_out)))
        for name in self.modalities:
            if name not in known:
                raise ValueError(f"masking.modalities: {unknown('modality', name, known)}")
