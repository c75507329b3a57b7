"""What a fine-tuned network is stored as, and the states from which a stopped run continues.

model.safetensors, config.json   the network; `load_finetuned` reads them
state/step-00000500.safetensors  while the run lasts: parameters, AdamW's averages, the step and the curve
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import nn

from fourmill.checkpoints import resolve
from fourmill.model.config import Architecture
from fourmill.model.finetune.network import ClassHead, DenseHead, Finetuned, RgbEncoder
from fourmill.model.network import FourM
from fourmill.model.weights import to_bytes
from fourmill.pipeline.store import Store

FORMAT = 1
_STATE = re.compile(r"state/step-(\d{8})\.safetensors")
_AVERAGES = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps for each parameter


def build(model: FourM, facts: dict[str, Any]) -> Finetuned:
    """Encoder of `model` and a new head, as `facts` (those of config.json) say; weights from torch's generator."""
    a, c = model.architecture, facts["config"]
    head: nn.Module = ClassHead(a.dim, facts["outputs"])
    if c["task"] != "classification":
        head = DenseHead(a.dim, facts["outputs"], a.patch_size, c["head_width"], c["head_depth"])
    return Finetuned(RgbEncoder(model, c["image_size"], c["drop_path"]), head, c["freeze_encoder"])


def save_finetuned(network: Finetuned, facts: dict[str, Any], store: Store) -> None:
    """Write model.safetensors, then config.json: a folder with a configuration has its weights."""
    tensors = {name: t.detach().cpu().clone() for name, t in network.state_dict().items()}
    store.create("model.safetensors", to_bytes(tensors, {"format": "pt"}))
    store.create("config.json", json.dumps({"fourmill_finetuned": FORMAT, **facts}, indent=1).encode())


def load_finetuned(reference: str, device: str = "cpu") -> tuple[Finetuned, dict[str, Any]]:
    """The network of a folder that fine-tuning wrote, in evaluation mode, and its facts: `config`, `classes`, …

    ValueError if it is none.
    """
    folder = Path(resolve(reference).location)
    file = folder / "config.json"
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if facts.get("fourmill_finetuned") != FORMAT:
        raise ValueError(f"{reference} holds no fine-tuned network of format {FORMAT}")
    with torch.random.fork_rng(devices=[]):
        network = build(FourM(Architecture.model_validate(facts["architecture"])), facts)
    with safe_open(str(folder / "model.safetensors"), "pt") as tensors:
        network.load_state_dict({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    return network.to(device).eval(), facts


def write_state(store: Store, network: Finetuned, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
    """Publish the state after `facts['step']` steps and drop all but the last two."""
    tensors = {f"model.{name}": t.detach() for name, t in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for average in _AVERAGES if parameter in optimizer.state else ():
            tensors[f"{average}.{name}"] = optimizer.state[parameter][average]
    data = to_bytes({k: t.cpu().contiguous() for k, t in tensors.items()}, {"facts": json.dumps(facts)})
    store.create(f"state/step-{facts['step']:08d}.safetensors", data)
    for old in _states(store)[:-2]:
        store.delete(old)


def read_state(store: Store, network: Finetuned, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Put the newest state into network and optimizer; its facts, or None if there is none."""
    names = _states(store)
    if not names:
        return None
    data = store.get(names[-1])
    tensors = load(data)
    network.load_state_dict({k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")})
    for name, parameter in network.named_parameters():
        if f"step.{name}" in tensors:  # frozen parameters have no averages
            averages = {a: tensors[f"{a}.{name}"].clone().to(parameter.device) for a in _AVERAGES}
            optimizer.state[parameter] = averages
    length = int.from_bytes(data[:8], "little")
    facts: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["facts"])
    return facts


def drop_states(store: Store) -> None:
    """A finished run needs none."""
    for name in _states(store):
        store.delete(name)


def _states(store: Store) -> list[str]:
    return sorted(info.name for info in store.list("state/") if _STATE.fullmatch(info.name))
