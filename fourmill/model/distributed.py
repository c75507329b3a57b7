"""The processes that train one model: one, those that torchrun has started, or Ray Train's workers.

Invariant: the gradient of a step is that of its `batch_size` samples, however many processes and slices share them.
Losses are therefore weighted with the token counts of all slices before any backward pass, and summed, not averaged.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import distributed, nn

from fourmill.model.blocks import checkpoint_blocks, compile_blocks
from fourmill.model.config import PretrainConfig
from fourmill.model.network import FourM, Loss
from fourmill.tokenizers.training.workers import Workers, join_workers

__all__ = ["Workers", "gradients_stay_here", "joined", "prepare", "shard", "whole_state"]


@contextlib.contextmanager
def joined(config: PretrainConfig) -> Iterator[Workers]:
    """This process's place among the others, whose group is left again if it was entered here."""
    before = distributed.is_initialized()
    workers = join_workers(config.device, config.batch_size, config.accumulate)
    try:
        yield workers
    finally:
        if distributed.is_initialized() and not before:
            distributed.destroy_process_group()


def prepare(model: FourM, config: PretrainConfig, workers: Workers) -> nn.Module:
    """What the training step calls in place of `model`, whose parameters it trains."""
    if config.activation_checkpointing:
        checkpoint_blocks(model)
    if config.compile:
        compile_blocks(model)
    if config.strategy == "fsdp" and distributed.is_initialized():
        return shard(model, half=config.autocast and workers.device.startswith("cuda"))
    return workers.wrap(model, find_unused=False)


def shard(model: FourM, half: bool) -> FourM:
    """FSDP2: each process holds a slice of every parameter, and all of a block's only while it computes.

    `half`: parameters travel as bfloat16; gradients are reduced in float32 in any case.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _know_loss()
    kind = next(model.parameters()).device.type
    mesh = init_device_mesh(kind, (distributed.get_world_size(),))
    # Autocast decides what is computed in bfloat16, as it does in one process; so inputs are not cast here.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, **({"mp_policy": policy} if half else {})}
    for block in (*model.encoder, *model.decoder):
        fully_shard(block, **options)
    sharded: FourM = fully_shard(model, **options)
    return sharded


@functools.cache
def _know_loss() -> None:
    """FSDP looks for tensors in what a forward pass returns; it must be told what a Loss is made of."""
    torch.export.register_dataclass(Loss)


@contextlib.contextmanager
def gradients_stay_here(network: nn.Module, stay: bool) -> Iterator[None]:
    """While `stay`, backward passes within sum gradients in this process: another slice of the step follows."""
    if stay and hasattr(network, "no_sync"):
        with network.no_sync():
            yield
        return
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(not stay)
    yield


def whole_state(model: FourM) -> dict[str, torch.Tensor]:
    """The model's state dict with nothing in shards. All processes take part."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
