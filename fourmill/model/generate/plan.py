"""What to generate and how: a list of targets, one after another, each with its own settings.

A plan is data: YAML, or `Target` objects. Invariant: a setting that has no effect on a target is refused where that
would surprise (an order that the kind of modality cannot have), and a setting's default is stated once, here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from fourmill.config import check
from fourmill.modalities import unknown
from fourmill.model.config import Architecture
from fourmill.model.config.base import Section
from fourmill.model.generate.names import resolve_name, source_name

Order = Literal["maskgit", "roar", "autoregressive"]
FEATURES = ("clip", "dinov2", "imagebind", "clip_global", "dinov2_global", "imagebind_global")


class Target(Section):
    """One modality to generate."""

    name: str
    """The model's name of the modality, such as 'tok_depth'."""
    order: Order | None = None
    """How a grid is filled: 'maskgit', the most confident cells first (arXiv 2202.04200); 'roar', in random order (4M);
    texts are 'autoregressive'. By default 'maskgit' and 'autoregressive'."""
    steps: int = Field(default=1, ge=1)
    """Passes to fill a grid, at most its cells. No effect on texts."""
    schedule: Literal["cosine", "linear", "raised-cosine"] | None = None
    """Share of cells decided over the steps; by default 'cosine' for 'maskgit' and 'linear' for 'roar'."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token; else logits are divided by it and tokens drawn."""
    decay: Literal["constant", "linear", "onex"] = "constant"
    """How the temperature falls over the steps of a grid."""
    coldest: float = Field(default=0.5, gt=0)
    """Temperature of the last step under 'onex' (ml-4m's onex:0.5:0.5)."""
    power: float = Field(default=0.5, gt=0)
    """Of 'onex': temperatures fall as 1 / x^power."""
    gumbel: float = Field(default=0.0, ge=0)
    """'maskgit': this much Gumbel noise on the log-confidence, falling to 0 at the last step (MaskGIT's "choice
    temperature", 4.5 there; ml-4m has none)."""
    top_k: int | None = Field(default=None, ge=1)
    """Only the likeliest k tokens."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Of these only the fewest whose probabilities reach p."""
    truncate: Literal["before", "after"] = "before"
    """Whether top-k and top-p look at the probabilities before the temperature, as in ml-4m, or after it."""
    conditions: tuple[str, ...] | None = None
    """What this target is generated from; by default all that is given and all that was generated before it."""
    guidance: float | dict[str, float] = 1.0
    """Classifier-free guidance: one weight for all conditions together (1: none), or a weight for each of some of them;
    those not named then stand behind all of the passes. Negative weights push away."""
    sentinel: bool = False
    """Texts: show the encoder a [S_1] in the text's place, as ml-4m's sampler does."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Texts: longest, in tokens; by default the model's."""

    @property
    def fill_schedule(self) -> Literal["cosine", "linear", "raised-cosine"]:
        """The schedule, with its default."""
        return self.schedule or ("linear" if self.order == "roar" else "cosine")


def default_target(architecture: Architecture, name: str, pictured: bool) -> Target:
    """Settings that suit a kind of target, after ml-4m's demo; `pictured`: whether RGB is among the inputs.

    What a picture determines is read off in one pass; what it does not (RGB from a text, features first) needs steps,
    heat and guidance. Texts are nearly greedy from a picture, more varied without.
    """
    if architecture.modalities[name].kind == "sequence":
        words = source_name(name) in ("caption", "alt_text", "det")
        return Target(name=name, order="autoregressive", temperature=0.3 if words else 0.1, top_p=0.8)
    if pictured:
        return Target(name=name, order="roar", steps=1, temperature=0.0)
    hot: dict[str, Any] = {"order": "roar", "decay": "onex", "top_p": 0.8, "guidance": 2.0}
    source = source_name(name)
    if source == "rgb":
        return Target(name=name, steps=25, temperature=3.0, **hot)
    if source in FEATURES:
        return Target(name=name, steps=50, temperature=5.0, **{**hot, "guidance": 3.0})
    return Target(name=name, steps=8, temperature=3.0, **hot)


def plan_of(
    architecture: Architecture, targets: Sequence[str | Mapping[str, Any]], pictured: bool, **changes: Any
) -> list[Target]:
    """Names and mappings (of a YAML plan) as targets: their defaults, then `changes` that are not None, then what the
    mapping says. Names may be labels ('depth'). ValueError for what the model cannot generate."""
    plan = []
    for entry in targets:
        told = {"name": entry} if isinstance(entry, str) else dict(entry)
        if not isinstance(told.get("name"), str):
            raise ValueError(f"plan: an entry is a name or a mapping with a `name`, not {entry!r}")
        name = resolve_name(told.pop("name"), architecture.domains_out, "target")
        text = architecture.modalities[name].kind == "sequence"
        wanted = {k: v for k, v in changes.items() if v is not None and not (text and k in ("order", "steps"))}
        told = _own_names({**wanted, **told}, architecture)
        if pictured and not text and "steps" in told:  # of one pass the order does not matter, of several it does
            told = {"order": "maskgit", **told}
        fields = default_target(architecture, name, pictured).model_dump(exclude_unset=True)
        plan.append(check({**fields, **told}, Target, f"plan: {name}"))
    return plan


def _own_names(told: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The settings that name conditions, with the model's names."""
    found = dict(told)
    if told.get("conditions") is not None:
        found["conditions"] = tuple(resolve_name(n, architecture.domains_in, "condition") for n in told["conditions"])
    if isinstance(told.get("guidance"), Mapping):
        weights = told["guidance"].items()
        found["guidance"] = {resolve_name(n, architecture.domains_in, "condition"): float(w) for n, w in weights}
    return found


def check_plan(architecture: Architecture, plan: Sequence[Target], given: Sequence[str]) -> None:
    """ValueError for a plan that the model cannot follow from what is `given`."""
    there = set(given)
    for target in plan:
        if target.name not in architecture.domains_out:
            raise ValueError(f"target: {unknown('modality', target.name, architecture.domains_out)}")
        text = architecture.modalities[target.name].kind == "sequence"
        if target.order is not None and (target.order == "autoregressive") != text:
            kind = "a text" if text else "a grid"
            raise ValueError(f"{target.name} is {kind} and cannot be generated in the order {target.order!r}")
        weighted = tuple(target.guidance) if isinstance(target.guidance, dict) else ()
        lacking = [n for n in (*(target.conditions or ()), *weighted) if n not in there]
        if lacking:
            raise ValueError(f"{target.name}: condition {lacking[0]!r} is neither given nor generated before it")
        left_out = [n for n in weighted if target.conditions is not None and n not in target.conditions]
        if left_out:
            raise ValueError(f"{target.name}: {left_out[0]!r} has a guidance weight and is not among the conditions")
        there |= {target.name} & set(architecture.domains_in)
