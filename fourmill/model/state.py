"""The state of a training run, from which a killed run continues as if nothing had happened.

One state is one object, `state/step-00000500.safetensors`: parameters, the optimizer's averages, and in the header the
step, the loader's three integers and the curve so far. It is created whole or not at all, locally and in object
storage alike. Random numbers need no state: masks, crops and order are functions of seed and step.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from safetensors.torch import load

from fourmill.model.network import FourM
from fourmill.model.weights import to_bytes
from fourmill.pipeline.store import Store

_NAME = re.compile(r"state/step-(\d{8})\.safetensors")
_AVERAGES = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps for each parameter


def write_state(store: Store, model: FourM, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
    """Publish the state after `facts['step']` steps and drop all but the last two."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for average in _AVERAGES if parameter in optimizer.state else ():
            tensors[f"{average}.{name}"] = optimizer.state[parameter][average]
    data = to_bytes({k: t.cpu().contiguous() for k, t in tensors.items()}, {"facts": json.dumps(facts)})
    store.create(f"state/step-{facts['step']:08d}.safetensors", data)
    for old in state_names(store)[:-2]:
        store.delete(old)


def state_names(store: Store) -> list[str]:
    """The states that there are, oldest first."""
    return sorted(info.name for info in store.list("state/") if _NAME.fullmatch(info.name))


def read_state(store: Store, model: FourM, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Put the newest state into the model and the optimizer; its facts, or None if there is none."""
    names = state_names(store)
    if not names:
        return None
    data = store.get(names[-1])
    tensors = load(data)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            if f"step.{name}" in tensors:  # a parameter without a gradient so far has no averages
                averages = {a: tensors[f"{a}.{name}"].clone().to(parameter.device) for a in _AVERAGES}
                optimizer.state[parameter] = averages
    return _facts(data)


def _facts(data: bytes) -> dict[str, Any]:
    """The header's own facts; `load` drops them."""
    length = int.from_bytes(data[:8], "little")
    facts: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["facts"])
    return facts


def drop_states(store: Store) -> None:
    """A finished run needs none."""
    for name in state_names(store):
        store.delete(name)
