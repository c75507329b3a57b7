"""The network of a tokenizer: encoder, quantizer, decoder, after 4M (arXiv 2312.06647).

Parameters have ml-4m's names and shapes, so that published checkpoints are read without renaming and what is trained
here is read by ml-4m. Invariants: in evaluation nothing changes the codebook; a token depends on its own sample only; a
checkpoint that lacks a weight is refused.

Shapes: B batch, C channels, S side in pixels, P patch side, L = h*w tokens a sample, D width, Z latent channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fourmill.tokenizers.config import CheckpointConfig, NetworkConfig
from fourmill.tokenizers.networks.diffusion import NoiseSchedule, build_denoiser
from fourmill.tokenizers.networks.mlp import ResidualMlp
from fourmill.tokenizers.networks.quantizers import build_quantizer
from fourmill.tokenizers.networks.vit import ViTDecoder, ViTEncoder, patchify

OUTPUT_SCALE = 0.3  # of the first outputs, as a share of the data's spread: small enough to be corrected soon


class VQNetwork(nn.Module):
    """Encoder, quantizer and decoder of one checkpoint configuration.

    Inputs are prepared values: float (B, C, S, S), vectors (B, C, 1, 1), or class rows (B, S, S), where row 0 is void
    and row k + 1 is class k. Any side that is a multiple of the patch is taken.
    """

    def __init__(self, config: CheckpointConfig, dead_code_threshold: float = 0.0, *, decoder: bool = True) -> None:
        """`decoder=False`: of what encodes only."""
        super().__init__()
        sizes = config.network
        self.sizes, self.channels = sizes, config.channels
        rows = config.classes + 1 if config.classes else 0
        self.cls_emb = nn.Embedding(rows, config.channels) if rows else None
        self.encoder = _encoder(sizes, config.channels)
        self.quant_proj = nn.Conv2d(sizes.dim, sizes.code_dim, 1)
        self.quantize = build_quantizer(sizes, dead_code_threshold)
        self.apply(_initialise)
        self.decodes = decoder
        self.schedule: NoiseSchedule | None = None  # of a diffusion decoder
        if decoder:
            self._add_decoder(config, rows or config.channels)

    def _add_decoder(self, config: CheckpointConfig, channels: int) -> None:
        sizes = config.network
        if sizes.diffusion is None:
            self.post_quant_proj = nn.Conv2d(sizes.code_dim, sizes.dim, 1).apply(_initialise)
            self.decoder: nn.Module = _decoder(sizes, channels).apply(_initialise)
            return
        side = sizes.decoder_size or sizes.size
        self.decoder = build_denoiser(sizes.diffusion, config.channels, sizes.code_dim, side)
        self.schedule = NoiseSchedule(sizes.diffusion)

    @torch.no_grad()
    def start_from(self, inputs: Tensor) -> None:
        """Set the projections of patches to the principal components of prepared values; before training a ViT.

        On scenes the autoencoder's loss is then halved after 160 steps (0.037 against 0.093).
        """
        if self.sizes.architecture != "vit":
            return
        patches_ND = patchify(self._maps(inputs), self.sizes.patch_size).flatten(0, 1)
        basis_DQ, spread = _principal(patches_ND, self.sizes.dim)
        rank = basis_DQ.shape[1]
        projection = self.encoder.proj
        projection.weight.view(self.sizes.dim, -1)[:rank] = basis_DQ.T / spread
        projection.bias[:rank] = -(basis_DQ.T @ patches_ND.mean(0)) / spread
        if self.schedule is None:
            self._start_outputs(inputs)

    def _start_outputs(self, inputs: Tensor) -> None:
        wanted = inputs
        if self.cls_emb is not None:  # outputs are logits
            wanted = functional.one_hot(inputs, self.cls_emb.num_embeddings).permute(0, 3, 1, 2).float()
        patches_ND = patchify(wanted, self.sizes.patch_size).flatten(0, 1)
        basis_DQ, spread = _principal(patches_ND, self.sizes.dim)
        assert isinstance(self.decoder, ViTDecoder)
        self.decoder.out_proj.weight[:, : basis_DQ.shape[1]] = basis_DQ * (OUTPUT_SCALE * spread)
        self.decoder.out_proj.bias.copy_(patches_ND.mean(0))

    def _maps(self, inputs: Tensor) -> Tensor:
        return inputs if self.cls_emb is None else self.cls_emb(inputs).permute(0, 3, 1, 2)

    def latents(self, inputs: Tensor) -> Tensor:
        """Prepared values -> latents (B, Z, h, w)."""
        return self.quant_proj(self.encoder(self._maps(inputs)))

    def reconstruct(self, codes_BZhw: Tensor) -> Tensor:
        """Codes -> outputs (B, C, S, S): values, or logits (B, classes + 1, S, S). Not for diffusion decoders."""
        assert self.schedule is None, "a diffusion decoder samples: see `values`"
        return self.decoder(self.post_quant_proj(codes_BZhw))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> outputs (B, C, S, S), ids as the quantizer gives them, the quantizer's loss."""
        codes_BZhw, ids, loss = self.quantize(self.latents(inputs))
        return self.reconstruct(codes_BZhw), ids, loss

    def unquantized(self, inputs: Tensor) -> Tensor:
        """-> outputs of latents that pass the quantizer by: how training begins."""
        return self.reconstruct(self.relaxed(inputs))

    def relaxed(self, inputs: Tensor) -> Tensor:
        """-> latents (B, Z, h, w) as infinitely many codes would leave them."""
        return self.quantize.relax(self.latents(inputs))

    def tokens(self, inputs: Tensor) -> Tensor:
        """Prepared values -> ids (B, L); for several codebooks one after the other (B, H)."""
        return self.quantize(self.latents(inputs))[1].flatten(1)

    def codes(self, ids_BL: Tensor) -> Tensor:
        """ids (B, L) of a square grid, or (B, H) of several codebooks -> codes (B, Z, h, w)."""
        if self.sizes.num_codebooks > 1:
            return self.quantize.lookup(ids_BL)[:, :, None, None]
        side = math.isqrt(ids_BL.shape[1])
        return self.quantize.lookup(ids_BL.view(-1, side, side)).permute(0, 3, 1, 2)

    def values(self, ids_BL: Tensor, *, steps: int | None = None, seed: int = 0) -> Tensor:
        """ids (B, L) -> outputs (B, C, S, S). `steps`, `seed`: of a diffusion decoder; the noise of every sample comes
        from the seed, so that a row of ids decodes to the same value in whatever batch."""
        codes_BZhw = self.codes(ids_BL)
        if self.schedule is None:
            return self.reconstruct(codes_BZhw)
        side = codes_BZhw.shape[-1] * self.sizes.patch_size
        return self.schedule.sample(self.decoder, codes_BZhw, side, steps=steps, seeds=[seed] * len(ids_BL))


def _encoder(sizes: NetworkConfig, channels: int) -> nn.Module:
    if sizes.architecture == "mlp":
        return ResidualMlp(channels, sizes.dim, sizes.dim, sizes.encoder_blocks, sizes.mlp_ratio)
    return ViTEncoder(sizes, channels)


def _decoder(sizes: NetworkConfig, channels: int) -> nn.Module:
    if sizes.architecture == "mlp":
        return ResidualMlp(sizes.dim, sizes.dim, channels, sizes.decoder_blocks, sizes.mlp_ratio)
    return ViTDecoder(sizes, channels)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for last in getattr(module, "starts_at_zero", ()):  # children come first: a block starts as the identity
        nn.init.zeros_(last.weight)


def _principal(vectors_ND: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` principal directions (D, Q), and the standard deviation along them, all taken together."""
    centred_ND = vectors_ND - vectors_ND.mean(0)
    basis_DQ = torch.pca_lowrank(centred_ND, min(most, *centred_ND.shape), center=False, niter=3)[2]
    return basis_DQ, (centred_ND @ basis_DQ).std().clamp(min=1e-3)
