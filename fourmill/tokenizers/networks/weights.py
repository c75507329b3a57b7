"""Weights of a tokenizer's network as a safetensors file, and back."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fourmill.tokenizers.config import CheckpointConfig
from fourmill.tokenizers.networks.quantizers import from_stored, to_stored
from fourmill.tokenizers.networks.vq import VQNetwork

_QUANTIZER = "quantize."  # stays float32 in a float16 export: rounding a code would move every token near it
_DECODER = ("decoder.", "post_quant_proj.")  # what a job that only encodes need not hold


def pack(network: VQNetwork, half: bool = True) -> bytes:
    """The network as a safetensors file; `half`: weights as float16, the quantizer's own tensors as float32."""
    from safetensors.torch import save

    dtype = torch.float16 if half else torch.float32
    state = to_stored(network.state_dict())
    return save({k: _stored(v, torch.float32 if k.startswith(_QUANTIZER) else dtype) for k, v in state.items()})


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    kept = tensor.is_floating_point() or tensor.dtype == torch.bool  # `initted` is a float in ml-4m's files
    return tensor.detach().cpu().to(dtype if kept else tensor.dtype).contiguous()


def unpack(config: CheckpointConfig, data: bytes, where: str, decoder: bool = True) -> VQNetwork:
    """The network that `pack` stored, float32, in evaluation mode; without `decoder`, only what encodes. ValueError for
    a missing or misshapen weight; weights that nobody asked for are listed in a warning."""
    network = VQNetwork(config, decoder=decoder)
    found = read_tensors(data, where)
    if not decoder:
        found = {name: tensor for name, tensor in found.items() if not name.startswith(_DECODER)}
    adopt(network, found, where)
    return network.eval()


def read_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a name that it says was dropped for being shared comes back.

    huggingface_hub stores tensors that share memory once, and in the header under each dropped name the kept one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found = load(data)
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
    except (SafetensorError, struct.error, json.JSONDecodeError) as error:
        raise ValueError(f"{where} is not a safetensors file: {error}") from error
    shared = {name: kept for name, kept in header.get("__metadata__", {}).items() if kept in found}
    return {**{name: found[kept] for name, kept in shared.items()}, **found}


def adopt(network: VQNetwork, found: dict[str, Tensor], where: str) -> None:
    """Load stored tensors into the network, each in the network's own type."""
    wanted = network.state_dict()
    stored = to_stored(wanted)
    _refuse(where, "lacks", sorted(set(stored) - set(found)))
    wrong = [
        f"{k} {tuple(found[k].shape)}, not {tuple(stored[k].shape)}"
        for k in stored
        if found[k].shape != stored[k].shape
    ]
    if wrong:
        raise ValueError(f"{where} does not fit its config.json: {'; '.join(wrong[:8])}")
    extra = sorted(set(found) - set(stored))
    if extra:
        warnings.warn(f"{where} holds weights that are not used: {', '.join(extra[:8])}", stacklevel=3)
    live = from_stored({k: found[k].float() if found[k].is_floating_point() else found[k] for k in stored})
    network.load_state_dict({k: live[k].to(wanted[k].dtype) for k in wanted})


def _refuse(where: str, verb: str, names: Sequence[str]) -> None:
    if names:
        raise ValueError(f"{where} {verb} {len(names)} weights: {', '.join(names[:8])}")
