"""The tokenizers that belong to a trained model: written beside it when training ends, found again to use it.

    tokenizers.json   for each token modality of the model: the tokenizer's kind, checkpoint and options, what the
                      tokens are of, and who made those labels; from the lineage in the dataset's manifest

Invariant: tokens are decoded by the weights that made them, or by those that the user names. A description may come
from a stranger: it names only tokenizers of our own table. Published ml-4m models have no description; their tokenizers
are known by name.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fourmill.checkpoints import resolve
from fourmill.evaluate.tokens.rebuild import RebuildError, Rebuilt, drawn_at, recorded
from fourmill.modalities import CATALOGUE, Kind, modality
from fourmill.model.config import PIXELS, Architecture
from fourmill.model.generate.names import label_name, resolve_name, token_name
from fourmill.pipeline.manifest import Manifest, read_manifest
from fourmill.pipeline.store import open_store
from fourmill.tokenizers import TOKENIZERS
from fourmill.tokenizers.base import Tokenizer
from fourmill.tokenizers.files import has_file, read_file
from fourmill.tokenizers.published import read_settings

log = logging.getLogger(__name__)

FILE, FORMAT = "tokenizers.json", 1
TEXT = "text"  # `--tokenizer text=PATH` names the vocabulary of all text modalities
PUBLISHED = {
    "tok_rgb": "EPFL-VILAB/4M_tokenizers_rgb_16k_224-448",
    "tok_depth": "EPFL-VILAB/4M_tokenizers_depth_8k_224-448",
    "tok_normal": "EPFL-VILAB/4M_tokenizers_normal_8k_224-448",
    "tok_semseg": "EPFL-VILAB/4M_tokenizers_semseg_4k_224-448",
    "tok_canny_edge": "EPFL-VILAB/4M_tokenizers_edge_8k_224-512",
    "tok_clip": "EPFL-VILAB/4M_tokenizers_CLIP-B16_8k_224-448",
    "tok_dinov2": "EPFL-VILAB/4M_tokenizers_DINOv2-B14_8k_224-448",
    "tok_dinov2_global": "EPFL-VILAB/4M_tokenizers_DINOv2-B14-global_8k_16_224",
    "tok_imagebind": "EPFL-VILAB/4M_tokenizers_ImageBind-H14_8k_224-448",
    "tok_imagebind_global": "EPFL-VILAB/4M_tokenizers_ImageBind-H14-global_8k_16_224",
    "tok_sam_instance.masks": "EPFL-VILAB/4M_tokenizers_sam-instance_1k_64",
    "tok_human_poses.poses": "EPFL-VILAB/4M_tokenizers_human-poses_1k_8",
}
_PARTS = {"tok_sam_instance": "masks", "tok_human_poses": "poses"}  # networks beside the vocabulary, by their option


def describe(manifest: Manifest, names: Sequence[str]) -> dict[str, Any]:
    """JSON-able description of what made the tokens of `names` in a dataset; others than token modalities are left out.

    `tokenizers`, by modality: `options` to build it again (kind and checkpoint among them), `digest` of its weights,
    `source` modality, `spec` of the tokens, and `labels`: lineage of who made what they are of, and its spec. A
    tokenizer that cannot be described has its `problem` instead: training must not fail at its end.
    """
    have = [n for n in names if n in manifest.modalities and modality(n).is_tokens]
    entries = {name: _described(manifest, name) for name in have}
    return {"format": FORMAT, "tokenizers": entries}


def _described(manifest: Manifest, name: str) -> dict[str, Any]:
    source = str(modality(name).source)
    producer, spec = _foremost(manifest, name)
    lineage = manifest.producers.get(producer, {})
    try:
        options = {**drawn_at(name, manifest), **recorded(name, lineage)}
    except RebuildError as error:
        return {"source": source, "spec": spec, "problem": str(error)}
    digest = (lineage.get("checkpoint") or {}).get("digest")
    entry = {"options": options, "digest": digest, "source": source, "spec": spec}
    if source in manifest.modalities:
        maker, made = _foremost(manifest, source)
        entry["labels"] = {"spec": made, "lineage": manifest.producers.get(maker, {})}
    return entry


def _foremost(manifest: Manifest, name: str) -> tuple[str, dict[str, Any]]:
    """The producer of most of a modality's shards, and its spec."""
    shards: dict[str, int] = {}
    specs: dict[str, dict[str, Any]] = {}
    for record in manifest.records(name):
        shards[record.producer] = shards.get(record.producer, 0) + 1
        specs.setdefault(record.producer, record.spec)
    producer = max(shards, key=lambda p: shards[p])
    if len(shards) > 1:
        log.warning("%s was made in %d ways; that of %d shards is taken", name, len(shards), shards[producer])
    return producer, specs[producer]


def load_tokenizers(
    reference: str | Path, architecture: Architecture, overrides: Sequence[str] = (), device: str = "cpu"
) -> Tokenizers:
    """The tokenizers of a model's checkpoint (folder, s3:// URI or hub id); their weights are loaded when asked for.

    `overrides`: `depth=PATH`, `tok_depth@224=PATH`, `sam_instance.masks=PATH`, or `text=PATH` for all texts.
    """
    known = [n for n in architecture.names if architecture.modalities[n].kind != "pixels"]
    return Tokenizers(str(reference), architecture, _overrides(overrides, known), device)


def _overrides(texts: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """`depth=PATH` … -> paths by the model's name of the modality, with the option behind a dot."""
    found = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"tokenizer {text!r}: give MODALITY=PATH, such as depth=/models/tok_depth")
        base, dot, option = name.partition(".")
        found[(base if base == TEXT else resolve_name(base, known)) + dot + option] = path
    return found


def _description(reference: str) -> dict[str, Any]:
    """Entries by modality; of a run from before descriptions were written, from the dataset it was trained on."""
    files = {name: _file(reference, name) for name in (FILE, "pretrain.json")}
    if (data := files[FILE]) is not None:
        found = json.loads(data)
        if found.get("format") != FORMAT:
            raise ValueError(f"{FILE} of {reference} has format {found.get('format')!r}; this Fourmill reads {FORMAT}")
        return dict(found["tokenizers"])
    if (data := files["pretrain.json"]) is None:
        return {}
    dataset = str(json.loads(data).get("dataset"))
    try:
        manifest = read_manifest(open_store(dataset))
    except (FileNotFoundError, ValueError) as error:
        log.warning("%s has no %s, and the dataset it was trained on cannot be read: %s", reference, FILE, error)
        return {}
    return dict(describe(manifest, manifest.modalities)["tokenizers"])


def _file(reference: str, name: str) -> bytes | None:
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return (folder / name).read_bytes() if (folder / name).is_file() else None
    checkpoint = resolve(reference)
    return read_file(checkpoint, name) if has_file(checkpoint, name) else None


class Tokenizers:
    """A model's modalities' tokenizers, loaded on first use. ValueError says what is wrong and how to name another."""

    def __init__(self, reference: str, architecture: Architecture, overrides: Mapping[str, str], device: str) -> None:
        self.reference, self.architecture, self.overrides, self.device = reference, architecture, overrides, device
        self._loaded: dict[str, Rebuilt] = {}

    @functools.cached_property
    def entries(self) -> dict[str, Any]:
        """What is described, by modality."""
        return _description(self.reference)

    def entry(self, name: str) -> dict[str, Any]:
        """What is described of a modality; empty if nothing."""
        return dict(self.entries.get(name, {}))

    def options(self, name: str) -> dict[str, Any]:
        """What builds the tokenizer: as described, else as published, with the user's paths in place of theirs."""
        entry, token = self.entry(name), token_name(name)
        text = self.architecture.modalities[name].kind == "sequence"
        options = dict(entry.get("options") or self._published(token, text))
        if options.get("kind") not in TOKENIZERS.table:
            raise ValueError(f"{name}: {entry.get('problem') or 'its tokenizer is not known'}; {self._help(name)}")
        given = {"checkpoint": self.overrides.get(TEXT)} if text and TEXT in self.overrides else {}
        for place, path in self.overrides.items():
            if place.partition(".")[0] == name:
                given[place.partition(".")[2] or "checkpoint"] = path
        return {**options, **given}

    def _published(self, token: str, text: bool) -> dict[str, Any]:
        """What ml-4m's models go with; our own, whose names are the catalogue's, go with nothing by themselves."""
        if token not in CATALOGUE:
            return {}
        ours = all(name == PIXELS or name.startswith("tok_") for name in self.architecture.names)
        if text:
            kind, part = ("text", None) if token not in _PARTS else (token.removeprefix("tok_"), _PARTS[token])
            return {"kind": kind, **({part: PUBLISHED[f"{token}.{part}"]} if part and not ours else {})}
        kind = "vector" if token.endswith("_global") else "spatial"
        return {"kind": kind, **({} if ours else {"checkpoint": PUBLISHED.get(token)})}

    def get(self, name: str) -> Rebuilt:
        """The loaded tokenizer of a modality."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> Rebuilt:
        options = self.options(name)
        if not options.get("checkpoint"):
            raise ValueError(f"{name}: this checkpoint does not say what tokenizes it; {self._help(name)}")
        try:
            tokenizer = self._open(name, options)
            notes = self._check(name, tokenizer)
            tokenizer.load(self.device)
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"the tokenizer of {name} cannot be used: {error}; {self._help(name)}") from error
        return Rebuilt(tokenizer, tuple(notes))

    def _open(self, name: str, options: dict[str, Any]) -> Tokenizer:
        token, info = token_name(name), self.architecture.modalities[name]
        if CATALOGUE[token].kind is Kind.GRID and options["kind"] == "spatial" and info.grid is not None:
            settings = read_settings(resolve(options["checkpoint"]), str(CATALOGUE[token].source))
            options = {**options, "size": info.grid[0] * settings.network.patch_size}
        found = TOKENIZERS.build(token, options)
        assert isinstance(found, Tokenizer)
        return found

    def _check(self, name: str, tokenizer: Tokenizer) -> list[str]:
        """What a reader must know. ValueError for a tokenizer whose ids are not the model's."""
        info, spec = self.architecture.modalities[name], tokenizer.spec(tokenizer.name)
        if spec.vocabulary != info.vocabulary or (spec.length is not None and spec.length != info.tokens):
            raise ValueError(
                f"it has {spec.length or 'any number of'} tokens of {spec.vocabulary} ids, the model {info.tokens} of "
                f"{info.vocabulary}"
            )
        recorded, here = self.entry(name).get("digest"), tokenizer.lineage().get("checkpoint", {}).get("digest")
        if recorded is None or recorded == here:
            return []
        text = f"its weights ({str(here)[:12]}) are not those that made the tokens ({str(recorded)[:12]})"
        if not any(place.partition(".")[0] in (name, TEXT) for place in self.overrides):
            raise ValueError(text)
        log.warning("%s: %s", name, text)
        return [text]

    def _help(self, name: str) -> str:
        label = label_name(name)
        if self.architecture.modalities[name].kind == "sequence":
            part = f" --tokenizer {label}.{_PARTS[token_name(name)]}=PATH" if token_name(name) in _PARTS else ""
            return (
                f"name its vocabulary with --tokenizer {label}=PATH{part}, or that of all texts with --tokenizer "
                f"text=PATH (published models: text_tokenizer_4m_wordpiece_30k.json of ml-4m's source)"
            )
        return f"name its tokenizer with --tokenizer {label}=PATH"
