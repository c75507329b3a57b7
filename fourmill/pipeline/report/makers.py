"""Who made what: the producers of a snapshot as a reader of the page sees them, with modalities, weights and licences.

What others wrote into a lineage is shown, but no password or signature that a URI carries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fourmill.checkpoints import is_non_commercial
from fourmill.pipeline.manifest import Manifest

_USER = re.compile(r"(?<=://)[^/@\s\"']+@")
_SIGNED = re.compile(r"([?&](?:x-amz-[\w-]+|signature|sig|token|awsaccesskeyid|key)=)[^&\s\"']+", re.IGNORECASE)


@dataclass(frozen=True)
class Weights:
    """One checkpoint of a maker."""

    reference: str
    digest: str
    licence: str

    @property
    def non_commercial(self) -> bool:
        return is_non_commercial(self.licence)

    @property
    def unknown(self) -> bool:
        return self.licence.lower() in ("", "unknown", "other")


@dataclass(frozen=True)
class Maker:
    """A producer. `modalities`: what it made that the snapshot holds; `inputs`: recipe by modality, 'corpus' for what
    was ingested."""

    recipe: str
    modalities: tuple[str, ...]
    name: str
    version: str
    licence: str
    weights: tuple[Weights, ...]
    inputs: Mapping[str, str]

    @property
    def title(self) -> str:
        return f"{self.name} v{self.version}"

    @property
    def non_commercial(self) -> bool:
        return is_non_commercial(self.licence) or any(w.non_commercial for w in self.weights)

    @property
    def licence_unknown(self) -> bool:
        return any(w.unknown for w in self.weights)

    @property
    def shown(self) -> str:
        """Its modalities, or what it is called where it only served others."""
        return ", ".join(self.modalities) or f"({self.name})"


def makers(manifest: Manifest) -> list[Maker]:
    """Every producer of a snapshot, those of ingested modalities first."""
    made: dict[str, list[str]] = {}
    for name in manifest.modalities:
        for recipe in manifest.generations(name):
            made.setdefault(recipe, []).append(name)
    recipes = [*manifest.producers, *(r for r in made if r not in manifest.producers)]
    found = [_maker(r, tuple(made.get(r, ())), manifest.producers.get(r, {})) for r in recipes]
    return sorted(found, key=lambda m: (bool(m.inputs), m.modalities, m.recipe))


def _maker(recipe: str, modalities: tuple[str, ...], lineage: Mapping[str, Any]) -> Maker:
    inputs = lineage.get("inputs")
    return Maker(
        recipe=recipe,
        modalities=modalities,
        name=str(lineage.get("class", "unknown")),
        version=str(lineage.get("version", "?")),
        licence=str(lineage.get("licence", "")),
        weights=tuple(_weights(lineage.get("checkpoint"))),
        inputs=inputs if isinstance(inputs, Mapping) else {},
    )


def _weights(entry: Any) -> list[Weights]:
    """The checkpoint of a lineage and those within it: a tokenizer may have a second one."""
    if not isinstance(entry, Mapping):
        return []
    one = Weights(*(without_secrets(str(entry.get(n, ""))) for n in ("reference", "digest", "licence")))
    return [one, *(w for part in entry.values() for w in _weights(part))]


def without_secrets(text: str) -> str:
    """A text without the passwords and signatures of the URIs in it."""
    return _SIGNED.sub(r"\1…", _USER.sub("", text))
