"""The network of a spatial tokenizer: ViT encoder, quantizer, ViT decoder, after 4M (arXiv 2312.06647).

Invariants: in evaluation nothing changes the codebook; a token depends on its own sample only; a checkpoint that lacks
a weight is refused.

Shapes: B batch, C channels, S side in pixels, P patch side, L tokens a sample, D width, Z latent channels.
"""

from __future__ import annotations

import json
import math
import struct
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional

from fourmill.tokenizers.config import SpatialCheckpointConfig, SpatialNetworkConfig

# Of the position embedding, beside patches of unit variance: at 1 it hides them, and learning takes twice the steps.
POSITION_SCALE = 0.2
OUTPUT_SCALE = 0.3  # of the first outputs, as a share of the data's spread: small enough to be corrected soon
_BUFFERS = "quantizer."  # stays float32 in a float16 export: rounding a code would move every token near it


def patchify(maps_BCSS: Tensor, patch: int) -> Tensor:
    """(B, C, S, S) -> (B, L, C*P*P), patches in rows."""
    return functional.pixel_unshuffle(maps_BCSS, patch).flatten(2).transpose(1, 2)


def unpatchify(patches_BLD: Tensor, patch: int) -> Tensor:
    """(B, L, C*P*P) -> (B, C, S, S): the reverse of `patchify`."""
    batch, length, dim = patches_BLD.shape
    side = math.isqrt(length)
    return functional.pixel_shuffle(patches_BLD.transpose(1, 2).reshape(batch, dim, side, side), patch)


def position_embedding(side: int, dim: int) -> Tensor:
    """Fixed sines and cosines (side*side, dim): half the channels for the row, half for the column; base 10,000."""
    rates = 1e-4 ** (torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(side)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line.repeat_interleave(side, 0), line.repeat(side, 1)
    return POSITION_SCALE * torch.cat([rows, columns], dim=1)


class Block(nn.Module):
    """Pre-norm transformer block: attention over all tokens, then GELU MLP."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        hidden = int(dim * mlp_ratio)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, dim = x_BLD.shape
        qkv = self.qkv(self.norm1(x_BLD)).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = _attend(query, key, value).transpose(1, 2).reshape(batch, length, dim)
        x_BLD = x_BLD + self.proj(attended)
        return x_BLD + self.fc2(functional.gelu(self.fc1(self.norm2(x_BLD))))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over (B, heads, L, D/heads). Torch's fused backward on a CPU took 36 % of a training step at 64 tokens;
    written out it takes 5 %."""
    if query.device.type != "cpu" or not query.requires_grad:
        return functional.scaled_dot_product_attention(query, key, value)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.softmax(dim=-1).to(value.dtype) @ value


class Quantizer(nn.Module):
    """Latents to codes and ids, by a cosine codebook under moving averages, or by finite scalars."""

    def __init__(self, config: SpatialNetworkConfig, dead_code_threshold: float = 0.0) -> None:
        """`dead_code_threshold`: a code whose moving count of uses a step falls below it is restarted."""
        from vector_quantize_pytorch import FSQ, VectorQuantize

        super().__init__()
        self.uses_codebook = config.quantizer == "vq"
        if self.uses_codebook:
            self.inner = VectorQuantize(
                dim=config.latent_dim,
                codebook_size=config.codebook_size,
                decay=config.decay,
                use_cosine_sim=True,
                kmeans_init=True,  # from the first batch: random directions are nowhere near it, and one code takes all
                commitment_weight=1.0,
                threshold_ema_dead_code=dead_code_threshold,
                rotation_trick=False,
            )
        else:
            self.inner = FSQ(list(config.levels), dim=config.latent_dim)

    def forward(self, latents_BLZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> codes (B, L, Z), ids (B, L), the commitment loss (0 for finite scalars)."""
        latents_BLZ = latents_BLZ.float()  # ties between codes are decided in float32, whatever autocast does
        if self.uses_codebook:
            codes_BLZ, ids_BL, loss = self.inner(latents_BLZ)
            return codes_BLZ, ids_BL, loss.sum()
        codes_BLZ, ids_BL = self.inner(latents_BLZ)
        return codes_BLZ, ids_BL, latents_BLZ.new_zeros(())

    def lookup(self, ids_BL: Tensor) -> Tensor:
        """ids (B, L) -> codes (B, L, Z)."""
        if self.uses_codebook:
            return self.inner.get_output_from_indices(ids_BL)
        return self.inner.indices_to_codes(ids_BL)


class SpatialNetwork(nn.Module):
    """Encoder, quantizer and decoder of one checkpoint configuration."""

    def __init__(self, config: SpatialCheckpointConfig, dead_code_threshold: float = 0.0) -> None:
        super().__init__()
        sizes, patch_area = config.network, config.network.patch_size**2
        self.patch = sizes.patch_size
        in_channels, out_channels = config.channels, config.classes or config.channels
        self.class_embedding = nn.Embedding(config.classes + 1, in_channels) if config.classes else None
        self.patch_in = nn.Linear(in_channels * patch_area, sizes.dim)
        self.encoder = _blocks(sizes, sizes.encoder_blocks)
        self.to_latent = nn.Linear(sizes.dim, sizes.latent_dim)
        self.quantizer = Quantizer(sizes, dead_code_threshold)
        self.from_latent = nn.Linear(sizes.latent_dim, sizes.dim)
        self.decoder = _blocks(sizes, sizes.decoder_blocks)
        self.patch_out = nn.Linear(sizes.dim, out_channels * patch_area)
        self.register_buffer("positions_LD", position_embedding(sizes.grid[0], sizes.dim), persistent=False)
        self.apply(_initialise)

    @torch.no_grad()
    def start_from(self, inputs: Tensor) -> None:
        """Set the projections of patches to the principal components of prepared values; before training.

        On scenes the autoencoder's loss is then halved after 160 steps (0.037 against 0.093).
        """
        patches_ND = patchify(self._maps(inputs), self.patch).flatten(0, 1)
        basis_DQ, spread = _principal(patches_ND, self.patch_in.out_features)
        rank = basis_DQ.shape[1]
        self.patch_in.weight[:rank] = basis_DQ.T / spread
        self.patch_in.bias[:rank] = -(basis_DQ.T @ patches_ND.mean(0)) / spread
        if self.class_embedding is not None:  # outputs are logits: of the known classes, without void
            onehot = functional.one_hot(self._known(inputs), self.class_embedding.num_embeddings)[..., :-1]
            patches_ND = patchify(onehot.permute(0, 3, 1, 2).float(), self.patch).flatten(0, 1)
            basis_DQ, spread = _principal(patches_ND, self.patch_out.in_features)
        self.patch_out.weight[:, : basis_DQ.shape[1]] = basis_DQ * (OUTPUT_SCALE * spread)
        self.patch_out.bias.copy_(patches_ND.mean(0))

    def _known(self, ids_BSS: Tensor) -> Tensor:
        assert self.class_embedding is not None
        return ids_BSS.clamp(max=self.class_embedding.num_embeddings - 1)  # void, 255, is the last row

    def _maps(self, inputs: Tensor) -> Tensor:
        if self.class_embedding is None:
            return inputs
        return self.class_embedding(self._known(inputs)).permute(0, 3, 1, 2)

    def latents(self, inputs: Tensor) -> Tensor:
        """Prepared values, float (B, C, S, S) or class ids (B, S, S) -> latents (B, L, Z)."""
        patches_BLD = self.patch_in(patchify(self._maps(inputs), self.patch))
        return self.to_latent(self.encoder(patches_BLD + self.positions_LD))

    def reconstruct(self, codes_BLZ: Tensor) -> Tensor:
        """Codes (B, L, Z) -> outputs (B, C, S, S)."""
        hidden_BLD = self.decoder(self.from_latent(codes_BLZ) + self.positions_LD)
        return unpatchify(self.patch_out(hidden_BLD), self.patch)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> outputs (B, C, S, S), ids (B, L), commitment loss."""
        codes_BLZ, ids_BL, loss = self.quantizer(self.latents(inputs))
        return self.reconstruct(codes_BLZ), ids_BL, loss

    def unquantized(self, inputs: Tensor) -> Tensor:
        """-> outputs (B, C, S, S) of latents that pass the quantizer by: how training begins."""
        latents_BLZ = self.latents(inputs).float()
        return self.reconstruct(
            functional.normalize(latents_BLZ, dim=-1) if self.quantizer.uses_codebook else latents_BLZ
        )

    def tokens(self, inputs: Tensor) -> Tensor:
        """Prepared values -> ids (B, L)."""
        return self.quantizer(self.latents(inputs))[1]

    def values(self, ids_BL: Tensor) -> Tensor:
        """ids (B, L) -> outputs (B, C, S, S)."""
        return self.reconstruct(self.quantizer.lookup(ids_BL))


def _blocks(sizes: SpatialNetworkConfig, count: int) -> nn.Sequential:
    blocks = [Block(sizes.dim, sizes.heads, sizes.mlp_ratio) for _ in range(count)]
    return nn.Sequential(*blocks, nn.LayerNorm(sizes.dim, eps=1e-6))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, Block):  # children come first: a block starts as the identity
        nn.init.zeros_(module.proj.weight)
        nn.init.zeros_(module.fc2.weight)


def _principal(vectors_ND: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` principal directions (D, Q), and the standard deviation along them, all taken together."""
    centred_ND = vectors_ND - vectors_ND.mean(0)
    basis_DQ = torch.pca_lowrank(centred_ND, min(most, *centred_ND.shape), center=False, niter=3)[2]
    return basis_DQ, (centred_ND @ basis_DQ).std().clamp(min=1e-3)


def pack(network: SpatialNetwork, half: bool = True) -> bytes:
    """The network as a safetensors file; `half`: weights as float16, the quantizer's own tensors as float32."""
    from safetensors.torch import save

    dtype = torch.float16 if half else torch.float32
    state = network.state_dict()
    return save({k: _stored(v, torch.float32 if k.startswith(_BUFFERS) else dtype) for k, v in state.items()})


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def unpack(config: SpatialCheckpointConfig, data: bytes, where: str) -> SpatialNetwork:
    """The network that `pack` stored, float32, in evaluation mode. ValueError for a missing or misshapen weight;
    weights that nobody asked for are listed in a warning."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    network = SpatialNetwork(config)
    wanted = network.state_dict()
    try:
        found = load(data)
    except (SafetensorError, struct.error, json.JSONDecodeError) as error:
        raise ValueError(f"{where} is not a safetensors file: {error}") from error
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ValueError(f"{where} lacks {len(missing)} weights: {', '.join(missing[:8])}")
    wrong = [
        f"{k} {tuple(found[k].shape)}, not {tuple(wanted[k].shape)}"
        for k in wanted
        if found[k].shape != wanted[k].shape
    ]
    if wrong:
        raise ValueError(f"{where} does not fit its config.json: {'; '.join(wrong[:8])}")
    extra = sorted(set(found) - set(wanted))
    if extra:
        warnings.warn(f"{where} holds weights that are not used: {', '.join(extra)}", stacklevel=2)
    network.load_state_dict({k: found[k].to(wanted[k].dtype) for k in wanted})
    return network.eval()
