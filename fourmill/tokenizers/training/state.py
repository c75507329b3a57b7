"""The saved state of a tokenizer's training: one local file, replaced as a whole.

Invariant: a state is gone on from by the run that wrote it only: same configuration, same settings.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import torch

from fourmill.tokenizers.config import CheckpointConfig
from fourmill.tokenizers.networks.vq import VQNetwork
from fourmill.tokenizers.training.config import TrainTokenizerConfig

log = logging.getLogger(__name__)

# Where files lie, who may use them, and how the run is watched.
_FREE = {"out", "state", "save_every", "eval_samples", "licence", "num_threads", "tensorboard"}


def write_state(
    config: TrainTokenizerConfig,
    settings: CheckpointConfig,
    network: VQNetwork,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
) -> None:
    """Network, optimizer and what else there is, in place of the state before."""
    path = _path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    buffer = io.BytesIO()
    torch.save({"run": _identity(config, settings), **weights, **facts}, buffer)
    waiting = path.with_suffix(".partial")
    waiting.write_bytes(buffer.getvalue())
    os.replace(waiting, path)


def read_state(
    config: TrainTokenizerConfig,
    settings: CheckpointConfig,
    network: VQNetwork,
    optimizer: torch.optim.Optimizer,
    device: str,
) -> dict[str, Any] | None:
    """Load network and optimizer; the rest of the state, None if there is none. ValueError if it is another run's."""
    if config.state is None or not _path(config).is_file():
        return None
    state: dict[str, Any] = torch.load(_path(config), map_location=device, weights_only=True)
    if state["run"] != _identity(config, settings):
        raise ValueError(f"{_path(config)} is of another run; remove it or give another `state` folder")
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    log.info("%s goes on from step %d", config.modality, state["progress"][0])
    return state


def _path(config: TrainTokenizerConfig) -> Path:
    return Path(config.state or "") / "state.pt"


def _identity(config: TrainTokenizerConfig, settings: CheckpointConfig) -> str:
    chosen = config.model_dump_json(exclude=_FREE)
    return hashlib.sha256((chosen + settings.model_dump_json()).encode()).hexdigest()
