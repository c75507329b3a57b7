"""Tokenizers brought back from what a manifest says of them, so that stored tokens can be read without a configuration.

Invariant: tokens are decoded by the weights that made them. A checkpoint whose digest is not the recorded one is
refused where the manifest led to it, and told where a user pointed to it. A manifest may come from a stranger: it names
only tokenizers of our own table; code from elsewhere must be named by the user's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourmill.config import Config
from fourmill.modalities import Kind, modality, unknown
from fourmill.pipeline.manifest import Manifest
from fourmill.tokenizers import TOKENIZERS
from fourmill.tokenizers.base import Tokenizer

Checkpoints = Mapping[str, str]
# What decoding or measuring one value may stumble over; it is counted, and the pass goes on.
BAD_VALUE = (ValueError, KeyError, TypeError, IndexError)


class RebuildError(ValueError):
    """A tokenizer that cannot be brought back, and what would help."""


@dataclass(frozen=True)
class Rebuilt:
    """A loaded tokenizer, and what a reader of its output must know."""

    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()

    def restore(self, rows: Sequence[np.ndarray]) -> list[tuple[Any, list[str]]]:
        """For each row of ids its value, and one sentence for each piece of it that was malformed."""
        parse = getattr(self.tokenizer, "parse", None)
        if parse is not None and modality(self.tokenizer.source).kind is Kind.JSON:
            return [parse(row) for row in rows]
        return [(value, []) for value in self.tokenizer.decode(list(rows))]

    def restore_each(self, rows: Sequence[np.ndarray]) -> list[tuple[Any, list[str]] | Exception]:
        """The same, with the error in place of a row that cannot be decoded; the others are not touched by it."""
        try:
            return list(self.restore(rows))
        except BAD_VALUE as error:
            return [error] if len(rows) == 1 else [found for row in rows for found in self.restore_each([row])]


def checkpoints_of(texts: Sequence[str], manifest: Manifest) -> dict[str, str]:
    """`tok_depth=PATH …` as a mapping; `tok_sam_instance.masks=PATH` names an option that is a second checkpoint."""
    pairs = [text.partition("=") for text in texts]
    if bad := [text for text, (name, _, path) in zip(texts, pairs, strict=True) if not (name and path)]:
        raise ValueError(f"checkpoint {bad[0]!r}: give MODALITY=PATH, such as tok_depth=/models/tok_depth")
    producers_of(manifest, [name.partition(".")[0] for name, _, _ in pairs])  # refuses other names
    return {name: path for name, _, path in pairs}


def rebuild(
    manifest: Manifest,
    name: str,
    producer: str,
    config: Config | None = None,
    checkpoints: Checkpoints | None = None,
    device: str = "cpu",
) -> Rebuilt:
    """The tokenizer that made the tokens of one modality, loaded. RebuildError says why not, and what would help.

    The one that `config` names is taken if it has the weights that made the tokens, else the one that the manifest
    names. `checkpoints`, by token modality, say where weights lie now; what they say is not doubted.
    """
    lineage = manifest.producers.get(producer, {})
    places = {k: v for k, v in (checkpoints or {}).items() if k.partition(".")[0] == name}
    problems = []
    for options in _candidates(name, lineage, config):
        try:
            sized = {**drawn_at(name, manifest), **options}
            tokenizer = _opened(name, {**sized, **{_option(k): v for k, v in places.items()}})
            notes = _differences(tokenizer, lineage, chosen=bool(places))
            _check_vocabulary(tokenizer, manifest, producer, lineage)
            tokenizer.load(device)
            return Rebuilt(tokenizer, tuple(notes))
        except RebuildError as error:
            problems.append(error)
        except (ValueError, TypeError, OSError) as error:
            problems.append(_not_brought_back(name, error, lineage))
    raise problems[0]


def drawn_at(name: str, manifest: Manifest) -> dict[str, int]:
    """The side that masks are drawn at: that of the crops. Tokens do not depend on it, so their lineage lacks it."""
    if modality(name).source not in ("instance", "sam_instance"):
        return {}
    crops = [manifest.producers.get(producer, {}) for producer in manifest.generations("crop_settings")]
    sides = {lineage.get("config", {}).get("crops", {}).get("size") for lineage in crops} - {None}
    return {"size": sides.pop()} if len(sides) == 1 else {}


def _candidates(name: str, lineage: Mapping[str, Any], config: Config | None) -> list[dict[str, Any]]:
    """Options of a tokenizer, the configured ones first."""
    given = dict((config.tokenizers if config else {}).get(name, {}))
    try:
        return [given, recorded(name, lineage)] if given else [recorded(name, lineage)]
    except RebuildError:
        if given:
            return [given]
        raise


def _opened(name: str, options: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer without its weights."""
    found = TOKENIZERS.build(name, options)
    if not isinstance(found, Tokenizer):
        raise RebuildError(f"{type(found).__name__} makes {name} but is no tokenizer: it cannot decode")
    return found


def _not_brought_back(name: str, error: Exception, lineage: Mapping[str, Any]) -> RebuildError:
    return RebuildError(f"the tokenizer of {name} cannot be brought back: {error}; {_help(name, lineage)}")


def producers_of(manifest: Manifest, names: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """(token modality, producer id) of all that a snapshot holds, or of those `names`; ValueError for another name."""
    have = [m for m in manifest.modalities if modality(m).is_tokens]
    for name in names or ():
        if name not in have:
            raise ValueError(unknown("token modality", name, have))
    return [(name, producer) for name in (names or have) for producer in manifest.generations(name)]


def recorded(name: str, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a producer's lineage, with the checkpoint that it names."""
    recorded = lineage.get("config")
    options = dict(recorded) if isinstance(recorded, Mapping) else {}
    kind = str(options.get("kind", "?"))
    if kind not in TOKENIZERS.table:
        known = ", ".join(sorted(TOKENIZERS.table))
        raise RebuildError(
            f"{name} was made by {lineage.get('class', '?')} of kind {kind!r}, which is none of Fourmill's tokenizers "
            f"({known}); a manifest may not name other code: give --config with {name} in its `tokenizers`"
        )
    defaults = {k: field.default for k, field in TOKENIZERS.load(kind).Config.model_fields.items()}
    chosen = {k: v for k, v in options.items() if k not in defaults or v != defaults[k]}
    return {**chosen, **_references(lineage)}


def _references(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Every checkpoint that a lineage records, by the option that names it; hub ids pinned to their commit."""
    words = lineage.get("checkpoint")
    if not isinstance(words, Mapping) or "reference" not in words:
        return {}
    parts = {name: part for name, part in words.items() if isinstance(part, Mapping) and "reference" in part}
    return {name: _pinned(entry) for name, entry in {"checkpoint": words, **parts}.items()}


def _pinned(entry: Mapping[str, Any]) -> str:
    reference, digest = str(entry["reference"]), str(entry.get("digest"))
    commit = digest.removeprefix("hub:")
    return reference if commit == digest else f"{reference.partition('@')[0]}@{commit}"


def _option(place: str) -> str:
    return place.partition(".")[2] or "checkpoint"


def _differences(tokenizer: Tokenizer, lineage: Mapping[str, Any], chosen: bool) -> list[str]:
    """What differs from the tokenizer that made the tokens. RebuildError for other weights that nobody chose."""
    recorded, here = lineage.get("checkpoint") or {}, tokenizer.lineage().get("checkpoint") or {}
    found = []
    if recorded.get("digest") != here.get("digest"):
        digests = [str(side.get("digest"))[:12] for side in (here, recorded)]
        found.append(
            f"{here.get('reference')!r} does not hold the weights that made {tokenizer.name}: digest {digests[0]}, "
            f"recorded is {digests[1]} of {recorded.get('reference')!r}"
        )
    if found and not chosen:
        raise RebuildError(f"{found[0]}; {_help(tokenizer.name, lineage)}")
    if lineage.get("version") != tokenizer.version:
        maker, now = f"version {lineage.get('version')} of {lineage.get('class', '?')}", tokenizer.version
        found.append(f"made by {maker}, decoded by version {now}")
    return found


def _check_vocabulary(tokenizer: Tokenizer, manifest: Manifest, producer: str, lineage: Mapping[str, Any]) -> None:
    name = tokenizer.name
    spec = next((r.spec for r in manifest.records(name) if r.producer == producer), {})
    here = tokenizer.spec(name)
    for what, recorded, now in (
        ("vocabulary", spec.get("vocabulary"), here.vocabulary),
        ("tokens in a row", spec.get("length"), here.length),
    ):
        if recorded is not None and recorded != now:
            raise RebuildError(
                f"{name} was stored with {what} {recorded}; this tokenizer's is {now}: {_help(name, lineage)}"
            )


def _help(name: str, lineage: Mapping[str, Any]) -> str:
    places = [name, *(f"{name}.{part}" for part in _references(lineage) if part != "checkpoint")]
    flags = " ".join(f"--checkpoint {place}=PATH" for place in places)
    return f"point to the weights with {flags}, or to a configuration that names them with --config"
