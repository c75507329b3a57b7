"""Which GELU a CLIP's image tower was trained with, so that it never runs with the other one.

OpenAI trained with QuickGELU, x * sigmoid(1.702 x), which is up to 0.02 away from GELU; DFN and MetaCLIP did too, most
of LAION did not. Nothing crashes with the wrong one: the features are simply others. The weights do not tell, and a
checkpoint's own configuration is sometimes wrong, so it is held against everything else that is known of its origin.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

Activation = Literal["gelu", "quick_gelu"]
log = logging.getLogger("fourmill.labelers")


@dataclass(frozen=True)
class Clue:
    """One thing that is known: `says`, and where that stands. `origin`: it identifies the weights, not the file."""

    says: Activation
    where: str
    origin: bool = False


def settle(asked: Activation | None, clues: Sequence[Clue], reference: str) -> Activation | None:
    """The activation to run with; None where nothing says that there is one to choose. ValueError if the clues
    contradict one another, or what is asked contradicts all of them and one of them knows the weights' origin."""
    said = sorted({clue.says for clue in clues})
    if not clues and asked:
        raise ValueError(f"{reference}: `activation` is {asked}, but the image tower has no such layer to choose")
    listed = "; ".join(f"{clue.where} says {clue.says}" for clue in clues)
    if asked is None and len(said) < 2:
        return said[0] if said else None
    if asked is None:
        raise ValueError(
            f"{reference}: QuickGELU mismatch: {listed}. The wrong one gives wrong features without an error: find out "
            "which one the weights were trained with, and set this labeler's `activation` to gelu or quick_gelu"
        )
    if asked not in said and any(clue.origin for clue in clues):
        raise ValueError(f"{reference}: QuickGELU mismatch: `activation` is {asked}, but {listed}")
    if said != [asked]:
        log.warning("%s runs with %s as its configuration asks, although %s", reference, asked, listed)
    return asked


def origin_clues(reference: str, folder: Path | None) -> list[Clue]:
    """What open_clip's table of checkpoints, the card, and the other libraries' configurations in `folder` tell."""
    names = [reference.split("@", 1)[0]]
    if folder is not None:
        names += [folder.name, *_base_models(folder / "README.md")]
    clues = [_known(name) for name in dict.fromkeys(names)]
    return [clue for clue in clues if clue] + (_sibling_clues(folder / "config.json") if folder is not None else [])


def transformers_clues(config: dict[str, Any]) -> list[Clue]:
    """What a configuration of transformers says of its image tower, and a CLIP's of its text tower: they are alike."""
    is_clip = str(config.get("model_type", "")).startswith(("clip", "metaclip"))
    towers = {"vision_config": config["vision_config"]} if "vision_config" in config else {"config.json": config}
    if is_clip and "hidden_act" in config.get("text_config", {}):
        towers["text_config"] = config["text_config"]
    default = "quick_gelu" if is_clip else None  # transformers' own, where the file does not say
    said = ((where, tower.get("hidden_act", default)) for where, tower in towers.items())
    return [Clue(act, f"hidden_act in {where}") for where, act in said if act in ("gelu", "quick_gelu")]


def _known(name: str) -> Clue | None:
    """open_clip's table, by hub id or by a folder that is called like the repository."""
    found = _trained_with().get(name.lower())
    if found is None and name.startswith("openai/clip-vit-"):
        found = "quick_gelu"
    return Clue(found, f"the origin {name!r}", origin=True) if found else None


@functools.cache
def _trained_with() -> dict[str, Activation]:
    import open_clip

    table: dict[str, Activation] = {}
    for model, tag in open_clip.list_pretrained():
        config = open_clip.get_pretrained_cfg(model, tag)
        repository = config.get("hf_hub", "").strip("/").lower()
        if repository.count("/") == 1:
            act: Activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
            table |= {repository: act, repository.split("/")[1]: act}
    return table


def _base_models(card: Path) -> list[str]:
    """`base_model` of a model card's front matter: what these weights were tuned from."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if not text.startswith("---"):
        return []
    try:
        matter = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError:
        return []
    found = matter.get("base_model") if isinstance(matter, dict) else None
    return [str(name) for name in found] if isinstance(found, list) else [str(found)] if found else []


def _sibling_clues(path: Path) -> list[Clue]:
    """config.json beside the weights: of transformers, or of timm, whose names say 'quickgelu' only sometimes."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    architecture = str(config.get("architecture", ""))
    return [Clue("quick_gelu", f"timm's {architecture}")] if "quickgelu" in architecture else transformers_clues(config)
