"""Beginning a tokenizer's training from another checkpoint: 4M's second stage at several sizes, or a new decoder."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fourmill.checkpoints import resolve
from fourmill.tokenizers.config import CheckpointConfig
from fourmill.tokenizers.files import read_file
from fourmill.tokenizers.networks.quantizers import to_stored
from fourmill.tokenizers.networks.vq import VQNetwork
from fourmill.tokenizers.networks.weights import adopt, read_tensors
from fourmill.tokenizers.published import read_settings
from fourmill.tokenizers.training.config import TrainTokenizerConfig

SPREAD = 0.7  # deviation of first latents: tanh is still steep at twice that
_WEIGHTS = "model.safetensors"
_OWN = {"size", "decay"}  # what of the network's sizes no weight depends on
_DECODER_SIZES = {"decoder_blocks", "diffusion", "out_conv"}
_DECODER = ("decoder.", "post_quant_proj.")


def settings_from(config: TrainTokenizerConfig) -> CheckpointConfig:
    """The settings of `config.init`, whose weights mean its normalisation and classes, with this run's network sizes.

    ValueError if its encoder or quantizer has other sizes.
    """
    assert config.init is not None
    settings = read_settings(resolve(config.init), config.source)
    differ = [name for name in _differences(settings, config) if name not in _DECODER_SIZES]
    if differ:
        theirs, ours = settings.network, config.network
        what = "; ".join(f"{name}: {getattr(theirs, name)} there, {getattr(ours, name)} here" for name in differ)
        raise ValueError(f"init {config.init!r} has another network ({what}); set `network` as its config.json has it")
    return settings.model_copy(update={"network": config.network})


def _differences(settings: CheckpointConfig, config: TrainTokenizerConfig) -> list[str]:
    theirs, ours = settings.network.model_dump(exclude=_OWN), config.network.model_dump(exclude=_OWN)
    return [name for name in ours if theirs[name] != ours[name]]


def start_from_checkpoint(network: VQNetwork, config: TrainTokenizerConfig) -> None:
    """Load the checkpoint's weights; of a decoder of another kind or size only what stands before it.

    Position embeddings are interpolated to the network's own grid.
    """
    assert config.init is not None
    checkpoint = resolve(config.init)
    where = f"{_WEIGHTS} of init {config.init!r}"
    found, own = read_tensors(read_file(checkpoint, _WEIGHTS), where), to_stored(network.state_dict())
    if _differences(read_settings(checkpoint, config.source), config):
        found = {name: tensor for name, tensor in found.items() if not name.startswith(_DECODER)}
        found |= {name: tensor for name, tensor in own.items() if name.startswith(_DECODER)}
    for name in ("encoder.pos_emb", "decoder.pos_emb"):
        if name in own and name in found:
            found[name] = _interpolated(found[name], own[name])
    adopt(network, found, where)


@torch.no_grad()
def spread_latents(network: VQNetwork, inputs: Tensor) -> None:
    """Set the projection to latents so that those of prepared values are uncorrelated, of deviation `SPREAD`: for
    quantizers whose codes are fixed. At first all channels say the same, the first principal component of patches."""
    latents_NZ = network.latents(inputs).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean_Z, projection = latents_NZ.mean(0), network.quant_proj
    covariance_ZZ = torch.cov(latents_NZ.T).reshape(len(mean_Z), len(mean_Z))
    floor = 1e-4 * covariance_ZZ.diagonal().mean().clamp(min=1e-6)
    factor_ZZ = torch.linalg.cholesky(covariance_ZZ + floor * torch.eye(len(mean_Z), device=mean_Z.device))
    weight_ZD = torch.linalg.solve_triangular(factor_ZZ, projection.weight.flatten(1).double(), upper=False)
    shift_Z1 = torch.linalg.solve_triangular(factor_ZZ, (projection.bias - mean_Z)[:, None], upper=False)
    projection.weight.copy_(SPREAD * weight_ZD.view_as(projection.weight))
    projection.bias.copy_(SPREAD * shift_Z1[:, 0])


def _interpolated(stored: Tensor, own: Tensor) -> Tensor:
    """Position embeddings (1, D, h, w) on the grid of the network's own."""
    if stored.ndim != 4 or stored.shape[-2:] == own.shape[-2:]:
        return stored
    return functional.interpolate(stored.float(), own.shape[-2:], mode="bicubic", align_corners=False)
