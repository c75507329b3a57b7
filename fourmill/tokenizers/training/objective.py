"""What a step of training minimises: the network and its losses as one module, which data parallelism needs.

Invariant: with a frozen encoder nothing that decides tokens changes, neither weights nor codebook.

Shapes: B batch, C channels, S side.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from fourmill.tokenizers.networks.vq import VQNetwork
from fourmill.tokenizers.sources.base import Source
from fourmill.tokenizers.sources.maps import UNKNOWN
from fourmill.tokenizers.training.config import TrainTokenizerConfig
from fourmill.tokenizers.training.perceptual import PerceptualLoss

FIXED_CODES = ("fsq", "lfq")  # quantizers without a codebook that would follow the latents
RANGE = 2.0  # tanh(2) = 0.96: every level of 'fsq' up to 25 of them is within


class Objective(nn.Module):
    """Prepared values -> loss, and the ids they got."""

    def __init__(self, network: VQNetwork, source: Source, config: TrainTokenizerConfig) -> None:
        super().__init__()
        self.network, self.source, self.config = network, source, config
        self.perceptual = PerceptualLoss(config.perceptual) if config.perceptual else None
        parts = (
            [network.encoder, network.quant_proj, network.quantize, network.cls_emb] if config.freeze_encoder else []
        )
        self.frozen = [part.requires_grad_(False) for part in parts if part is not None]
        self.train()

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, inputs: Tensor, quantized: bool, seed: int) -> tuple[Tensor, Tensor | None]:
        """`quantized`: whether latents pass the quantizer; `seed`: of a diffusion decoder's noise."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.config.autocast):
            codes_BZhw, ids, commitment = self._codes(inputs, quantized)
            if self.network.schedule is not None:
                return self._denoising(inputs, codes_BZhw, seed) + commitment, ids
            outputs_BCSS = self.network.reconstruct(codes_BZhw)
        loss = self.source.loss(outputs_BCSS.float(), inputs) + commitment
        if self.perceptual is None or self.config.perceptual is None:
            return loss, ids
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.config.autocast):
            return loss + self.config.perceptual.weight * self.perceptual(outputs_BCSS.float(), inputs), ids

    def _codes(self, inputs: Tensor, quantized: bool) -> tuple[Tensor, Tensor | None, Tensor | float]:
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            latents_BZhw = self.network.latents(inputs)
            excess = self._excess(latents_BZhw)
            if not quantized:
                return self.network.quantize.relax(latents_BZhw), None, excess
            codes_BZhw, ids, commitment = self.network.quantize(latents_BZhw)
        return codes_BZhw, ids, commitment + excess

    def _excess(self, latents_BZhw: Tensor) -> Tensor | float:
        """How far latents lie beyond the range of levels or signs that are fixed.

        Nothing else holds them there: in 30 steps of AdamW on scenes' depth their deviation grew from 1 to 27, into
        the flat part of tanh. 'fsq' then used 14 % of 512 codes after 150 steps, with this 60 %. Squared, it took all
        of the clipped gradient for 100 steps.
        """
        if self.network.sizes.quantizer not in FIXED_CODES:
            return 0.0
        return functional.relu(latents_BZhw.float().abs() - RANGE).mean()

    def _denoising(self, inputs: Tensor, codes_BZhw: Tensor, seed: int) -> Tensor:
        assert self.network.schedule is not None
        generator = torch.Generator(inputs.device).manual_seed(seed)
        known_B1SS = self._known(inputs)
        # What is not known must not show in the noised value either: it would not be there in sampling.
        clean_BCSS = inputs if known_B1SS is None else torch.where(known_B1SS, inputs, 0.0)
        return self.network.schedule.loss(self.network.decoder, clean_BCSS, codes_BZhw, generator, known_B1SS)

    def _known(self, inputs: Tensor) -> Tensor | None:
        """Which pixels of depth and normals hold a value, bool (B, 1, S, S); None where all do."""
        settings = self.source.config
        if settings.source == "normal":
            return inputs.norm(dim=1, keepdim=True) > 0.5
        if settings.normalisation.kind == "log":
            return inputs > UNKNOWN + 0.5
        return None
