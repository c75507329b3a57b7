"""Checkpoints of the model: our own and the published ml-4m ones, in one format.

    model.safetensors   every tensor under its published name; the header holds ml-4m's keys as its loader wants them
    config.json         ml-4m's keys, and under `fourmill` what they leave out: kinds, vocabularies, grids

Both published layouts are read: with every key present, or with shared tensors stored once and named in the header.
Nothing is unpickled.
"""

from __future__ import annotations

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

FORMAT = 1  # of the `fourmill` part of config.json
_BIASES = ("qkv_bias", "proj_bias", "mlp_bias", "norm_bias")
_TRUNK = ("encoder_depth", "decoder_depth", "dim", "num_heads", "mlp_ratio", "gated_mlp", "image_size", "patch_size")


def load_model(reference: str | Path, device: str = "cpu") -> FourM:
    """The model of a checkpoint folder (path, s3:// URI or hub id), in evaluation mode.

    ValueError names the file and what is wrong with it: keys that are missing, left over or of another shape.
    """
    folder = _folder(str(reference))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = read_tensors(folder / "model.safetensors")
    model = FourM(architecture_of(config, {k: tuple(t.shape) for k, t in tensors.items()}))
    load_tensors(model, tensors, str(folder))
    return model.to(device).eval()


def _folder(reference: str) -> Path:
    if Path(reference).expanduser().is_dir():
        return Path(reference).expanduser()
    checkpoint = resolve(reference)
    if checkpoint.is_local:
        return Path(checkpoint.location)
    from huggingface_hub import snapshot_download

    files = ["config.json", "model.safetensors"]
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
    for key in _BIASES:
        if config.get(key):
            raise ValueError(f"config.json: {key} is true; only the published bias-free family is supported")
    fields: dict[str, Any] = {k: config[k] for k in (*_TRUNK, "qk_norm", "share_modality_embeddings") if k in config}
    if "fourmill" in config:
        own = config["fourmill"]
        if own.get("format") != FORMAT:
            raise ValueError(f"config.json has format {own.get('format')!r}; this Fourmill reads format {FORMAT}")
        domains = {side: config[side] for side in ("domains_in", "domains_out")}
        return Architecture(**fields, **domains, tie_logits=own["tie_logits"], modalities=own["modalities"])
    # t5_caption enters as embeddings and has no tokens; everything else a published model knows is taken.
    inside = [n for n in config["domains_in"] if f"encoder_embeddings.{n}.emb_proj.weight" not in shapes]
    outside = [n for n in config["domains_out"] if f"decoder_embeddings.{n}.to_logits.weight" in shapes]
    fields["modalities"] = {n: _info(n, shapes) for n in dict.fromkeys((*inside, *outside))}
    return Architecture(**fields, domains_in=tuple(inside), domains_out=tuple(outside), tie_logits=False)


def _info(name: str, shapes: Mapping[str, tuple[int, ...]]) -> ModalityInfo:
    side = "encoder" if f"encoder_embeddings.{name}.pos_emb" in shapes else "decoder"
    prefix = f"{side}_embeddings.{name}."
    positions = shapes[prefix + "pos_emb"][1]
    root = round(positions**0.5)
    grid = (root, root) if root * root == positions else None
    if prefix + "proj.weight" in shapes:
        return ModalityInfo(kind="pixels", tokens=positions, grid=grid)
    vocabulary = shapes[prefix + "token_emb.weight"][0]
    if positions == SEQUENCE_POSITIONS:
        return ModalityInfo(kind="sequence", vocabulary=vocabulary, tokens=256)  # 4M's longest texts
    if name.endswith("_global"):  # 16 codes of one vector, a square number by chance
        grid = None
    return ModalityInfo(kind="grid", vocabulary=vocabulary, tokens=positions, grid=grid)


def config_json(architecture: Architecture) -> dict[str, Any]:
    """What goes into config.json."""
    fields = architecture.model_dump(mode="json")
    trunk = {key: fields[key] for key in (*_TRUNK, "qk_norm", "share_modality_embeddings")}
    return {
        "domains_in": fields["domains_in"],
        "domains_out": fields["domains_out"],
        **trunk,
        **dict.fromkeys(_BIASES, False),
        "act_layer": "SiLU" if architecture.gated_mlp else "GELU",
        "fourmill": {"format": FORMAT, "tie_logits": fields["tie_logits"], "modalities": fields["modalities"]},
    }


def to_bytes(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> bytes:
    """A safetensors file with the same bytes for the same content; the library orders its header at random."""
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    entries = {"__metadata__": dict(sorted(header.items())), **json.loads(data[8 : 8 + length])}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def save_model(model: FourM, store: Store) -> None:
    """Write model.safetensors, then config.json: a folder with a configuration has its weights."""
    config = config_json(model.architecture)
    # ml-4m reads its configuration from the header, as Python's spelling of each value.
    header = {key: str(value) for key, value in config.items() if key != "fourmill"}
    # Shared tensors are written out under each of their names, as published.
    tensors = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    for name, data in (
        ("model.safetensors", to_bytes(tensors, header)),
        ("config.json", json.dumps(config, indent=1).encode()),
    ):
        if not store.create(name, data) and store.get(name) != data:
            raise ValueError(f"{name} is already in {store.uri} and is another model's; choose another folder")
