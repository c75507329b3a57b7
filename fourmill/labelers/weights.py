"""Checkpoints that are a bare file of weights, without the configuration that transformers keeps beside them.

torchvision and segment_anything publish such files. They come from strangers: safetensors or torch's weights-only
reader, which executes no pickle.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from fourmill.checkpoints import Checkpoint

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def is_bare(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is a bare file of weights rather than one that transformers saved."""
    path = Path(checkpoint.location)
    return path.is_file() or (path.is_dir() and "model_type" not in json_config(checkpoint))


def json_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json of a folder; empty if there is none."""
    file = Path(checkpoint.location) / "config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def weights_file(checkpoint: Checkpoint) -> Path:
    """The one file of weights at a checkpoint's location."""
    path = Path(checkpoint.location)
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix in _SUFFIXES)
    if len(files) != 1:
        names = ", ".join(p.name for p in files) or "none"
        raise ValueError(f"{checkpoint.reference} must hold one file of weights ({', '.join(_SUFFIXES)}), not {names}")
    return files[0]


def read_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's one file of weights, by name, on the CPU."""
    return read_tensors(weights_file(checkpoint))


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """A state dict, memory-mapped if the file's format allows it. ValueError for a file that holds anything else."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(file))
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than tensors, which is not loaded: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # a training checkpoint of torchvision's reference scripts
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{file} holds no state dict of tensors")
    return state
