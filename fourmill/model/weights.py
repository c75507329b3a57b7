"""Checkpoints of the model: our own and the published ml-4m ones, in one format.

    model.safetensors   every tensor under its published name; the header holds ml-4m's keys as its loader wants them
    config.json         ml-4m's keys and nothing else, so that its own classes accept it
    fourmill.json       what they leave out: kinds, vocabularies, grids, and the names that modalities have here

Both published layouts are read: with every key present, or with shared tensors stored once and named in the header.
Nothing is unpickled.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from fourmill.checkpoints import resolve
from fourmill.model.config import SEQUENCE_POSITIONS, Architecture, ModalityInfo
from fourmill.model.network import FourM
from fourmill.pipeline.store import Store

log = logging.getLogger(__name__)

FORMAT = 2  # of fourmill.json; format 1 was a part of config.json, with our own names of modalities throughout
# What ml-4m's network takes for a key that config.json lacks, for all keys that change what is computed.
_DEFAULTS = {
    **{"dim": 768, "encoder_depth": 12, "decoder_depth": 12, "num_heads": 12, "mlp_ratio": 4.0, "patch_size": 16},
    **{"qkv_bias": True, "proj_bias": True, "mlp_bias": True, "norm_bias": True, "gated_mlp": False, "qk_norm": False},
    **{"image_size": 224, "share_modality_embeddings": True, "num_register_tokens": 0},
    **{"decoder_causal_mask": False, "decoder_sep_mask": True},
}
# ml-4m's longest texts in tokens. It gives poses 275, but has no positions beyond 263 and uses the first again.
_LONGEST = {"caption": 256, "det": 256, "metadata": 40, "human_poses": 263, "color_palette": 23, "sam_instance": 290}
_LONGEST["t5_caption"] = 77


def load_model(reference: str | Path, device: str = "cpu") -> FourM:
    """The model of a checkpoint folder (path, s3:// URI or hub id), in evaluation mode.

    ValueError names the file and what is wrong with it: keys that are missing, left over or of another shape.
    """
    folder = _folder(str(reference))
    config, own = _configs(folder)
    tensors = read_tensors(folder / "model.safetensors")
    names = {published: name for name, published in own.get("names", {}).items()}
    tensors = {_renamed(key, names): tensor for key, tensor in tensors.items()}
    config |= {side: [names.get(n, n) for n in config[side]] for side in ("domains_in", "domains_out")}
    model = FourM(architecture_of({**config, "fourmill": own}, {k: tuple(t.shape) for k, t in tensors.items()}))
    load_tensors(model, tensors, str(folder))
    return model.to(device).eval()


def _configs(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """ml-4m's part of the configuration, from the weights' header where there is no file, and our own, if any."""
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    else:
        with safe_open(str(folder / "model.safetensors"), "pt") as file:
            config = {key: _literal(value) for key, value in (file.metadata() or {}).items()}
    missing = [side for side in ("domains_in", "domains_out") if side not in config]
    if missing:
        raise ValueError(f"{folder}: no {missing[0]} in config.json or in the header of model.safetensors")
    own = config.pop("fourmill", {})
    if (folder / "fourmill.json").is_file():
        own = json.loads((folder / "fourmill.json").read_text(encoding="utf-8"))
    if own and own.get("format") not in (1, FORMAT):
        raise ValueError(f"{folder} has format {own.get('format')!r}; this Fourmill reads formats 1 and {FORMAT}")
    return config, own


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """A tensor's key with the modality in it renamed."""
    parts = key.split(".")
    if parts[0] in ("encoder_embeddings", "decoder_embeddings"):
        parts[1] = names.get(parts[1], parts[1])
    return ".".join(parts)


def _folder(reference: str) -> Path:
    if Path(reference).expanduser().is_dir():
        return Path(reference).expanduser()
    checkpoint = resolve(reference)
    if checkpoint.is_local:
        return Path(checkpoint.location)
    from huggingface_hub import snapshot_download

    files = ["config.json", "fourmill.json", "model.safetensors"]
    return Path(snapshot_download(checkpoint.location, revision=checkpoint.revision, allow_patterns=files))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file; names that the header maps to a tensor stored once are filled in."""
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        header = file.metadata() or {}
    return {**{name: tensors[kept] for name, kept in header.items() if kept in tensors}, **tensors}


def load_tensors(model: FourM, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Fill `model` from a state dict; parts of modalities that the model does not have are logged and left out."""
    wanted = model.state_dict()
    known = tuple(f"{side}_embeddings.{n}." for side in ("encoder", "decoder") for n in model.architecture.names)
    foreign = {k for k in tensors if "_embeddings." in k and not k.startswith(known)}
    if foreign:
        log.warning("%s: left out %d tensors of modalities that this model does not have", where, len(foreign))
    missing, surplus = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted) - foreign)
    shapes = [
        f"{k} {tuple(tensors[k].shape)} instead of {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    if missing or surplus or shapes:
        raise ValueError(
            f"{where} does not fit its config.json: missing {missing[:3]}, left over {surplus[:3]}, shapes {shapes[:3]}"
        )
    model.load_state_dict({k: tensors[k] for k in wanted})


def architecture_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """The architecture that a config.json describes; without our own part, kinds and sizes follow from the tensors."""
    fields: dict[str, Any] = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    known = "SiLU" if fields["gated_mlp"] else "GELU"
    if config.get("act_layer", known) != known:
        raise ValueError(f"config.json: act_layer {config['act_layer']!r}; an MLP of this kind has {known!r} here")
    others = {*_DEFAULTS, "act_layer", "domains_in", "domains_out", "fourmill"}
    if ignored := sorted(key for key, value in config.items() if key not in others and value):
        log.warning("config.json: %s: no effect here", ", ".join(ignored))
    if own := config.get("fourmill"):
        domains = {side: config[side] for side in ("domains_in", "domains_out")}
        return Architecture(**fields, **domains, tie_logits=own["tie_logits"], modalities=own["modalities"])
    # ml-4m skips what has no embedding on a side, such as t5_caption among the outputs.
    inside = [n for n in config["domains_in"] if f"encoder_embeddings.{n}.mod_emb" in shapes]
    outside = [n for n in config["domains_out"] if f"decoder_embeddings.{n}.to_logits.weight" in shapes]
    fields["modalities"] = {n: _info(n, shapes) for n in dict.fromkeys((*inside, *outside))}
    return Architecture(**fields, domains_in=tuple(inside), domains_out=tuple(outside), tie_logits=False)


def _info(name: str, shapes: Mapping[str, tuple[int, ...]]) -> ModalityInfo:
    side = "encoder" if f"encoder_embeddings.{name}.pos_emb" in shapes else "decoder"
    prefix = f"{side}_embeddings.{name}."
    positions = shapes[prefix + "pos_emb"][1]
    root, base = round(positions**0.5), name.partition("@")[0]
    grid = (root, root) if root * root == positions and not name.endswith("_global") else None
    table = positions if positions != SEQUENCE_POSITIONS else None
    longest = min(_LONGEST.get(base, 256), positions)
    if prefix + "proj.weight" in shapes:
        return ModalityInfo(kind="pixels", tokens=positions, grid=grid)
    if prefix + "emb_proj.weight" in shapes:
        return ModalityInfo(kind="vectors", width=shapes[prefix + "emb_proj.weight"][1], tokens=longest, table=table)
    if prefix + "token_emb.weight" not in shapes:
        raise ValueError(
            f"{name!r} has neither proj, emb_proj nor token_emb; ml-4m's published models have one of them"
        )
    vocabulary = shapes[prefix + "token_emb.weight"][0]
    # Images are square; what is not, is text. The 16 codes of a global vector are a square number by chance.
    if base in _LONGEST or not (grid or name.endswith("_global")):
        return ModalityInfo(kind="sequence", vocabulary=vocabulary, tokens=longest, table=table)
    return ModalityInfo(kind="grid", vocabulary=vocabulary, tokens=positions, grid=grid)


def published_name(name: str, info: ModalityInfo, patch_size: int) -> str:
    """What ml-4m calls a modality of ours: `rgb@224` for `rgb`, `caption` for `tok_caption`, `tok_depth@224`."""
    if info.kind == "sequence":
        return name.removeprefix("tok_")
    if "@" in name or info.grid is None or not info.has_layout:
        return name
    side = patch_size if info.kind == "pixels" else 14 if name in ("tok_dinov2", "tok_imagebind") else 16
    return f"{name}@{info.grid[0] * side}"


def configs_of(architecture: Architecture) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes into config.json and into fourmill.json."""
    a, fields = architecture, architecture.model_dump(mode="json")
    names = {n: published_name(n, a.modalities[n], a.patch_size) for n in a.names}
    if len(set(names.values())) < len(names):  # two of ours are one of ml-4m's: keep them apart
        names = {n: n for n in a.names}
    config = {
        "domains_in": [names[n] for n in a.domains_in],
        "domains_out": [names[n] for n in a.domains_out],
        **{key: fields[key] for key in _DEFAULTS},
        "act_layer": "SiLU" if a.gated_mlp else "GELU",
    }
    own = {"format": FORMAT, "tie_logits": a.tie_logits, "modalities": fields["modalities"], "names": names}
    return config, own


def to_bytes(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> bytes:
    """A safetensors file with the same bytes for the same content; the library orders its header at random."""
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    entries = {"__metadata__": dict(sorted(header.items())), **json.loads(data[8 : 8 + length])}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def save_model(model: FourM, store: Store) -> None:
    """Write model.safetensors and fourmill.json, then config.json: a folder with a configuration has its weights."""
    config, own = configs_of(model.architecture)
    # ml-4m reads its configuration from the header, as Python's spelling of each value.
    header = {key: str(value) for key, value in config.items()}
    # Shared tensors are written out under each of their names, as published.
    tensors = {_renamed(name, own["names"]): t.detach().cpu().clone() for name, t in model.state_dict().items()}
    for name, data in (
        ("model.safetensors", to_bytes(tensors, header)),
        ("fourmill.json", json.dumps(own, indent=1).encode()),
        ("config.json", json.dumps(config, indent=1).encode()),
    ):
        if not store.create(name, data) and store.get(name) != data:
            raise ValueError(f"{name} is already in {store.uri} and is another model's; choose another folder")
