"""Quantizers: latents to codes and ids, and ids back to codes.

Learning goes through vector-quantize-pytorch (moving averages, restart of dead codes, k-means start, exchange between
GPUs); looking up is written out, so that tokens are an exact function of the stored codebook. Invariants: in evaluation
nothing changes a codebook, and a token depends on its own latent only.

Shapes: B batch, Z latent channels, h x w grid of tokens, H codebooks, K codes of a codebook, N = B*h*w latents.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from fourmill.tokenizers.config import NetworkConfig


class Quantizer(nn.Module):
    """What the network asks of a quantizer; latents and codes are float32 (B, Z, h, w), whatever autocast does."""

    def forward(self, latents_BZhw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> codes (B, Z, h, w), ids (B, h, w) or for several codebooks (B, H, h, w), the loss of the quantizer."""
        with torch.autocast(latents_BZhw.device.type, enabled=False):
            batch, channels, rows, columns = latents_BZhw.shape
            latents_NZ = latents_BZhw.float().permute(0, 2, 3, 1).reshape(-1, channels)
            codes_NZ, ids_N, loss = self.learn(latents_NZ) if self.training else (*self.nearest(latents_NZ), None)
        codes_BZhw = codes_NZ.view(batch, rows, columns, -1).permute(0, 3, 1, 2)
        ids = ids_N.view(batch, rows, columns, *ids_N.shape[1:])
        ids = ids if ids_N.ndim == 1 else ids.permute(0, 3, 1, 2)
        return codes_BZhw, ids, codes_NZ.new_zeros(()) if loss is None else loss

    @abstractmethod
    def learn(self, latents_NZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> codes (N, Z) that pass gradients on, ids (N,) or (N, H), loss; may change the codebook."""

    @abstractmethod
    def nearest(self, latents_NZ: Tensor) -> tuple[Tensor, Tensor]:
        """-> codes (N, Z), ids (N,) or (N, H); changes nothing."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """ids (...) or, for several codebooks, (..., H) -> codes (..., Z)."""

    @abstractmethod
    def relax(self, latents_BZhw: Tensor) -> Tensor:
        """Latents as they would be if there were infinitely many codes: how training begins."""


class CosineCodebook(Quantizer):
    """4M's: unit vectors, the code of greatest cosine, moving averages of the latents that chose it."""

    def __init__(self, config: NetworkConfig, dead_code_threshold: float = 0.0) -> None:
        """`dead_code_threshold`: a code whose moving count of uses a step falls below it is restarted."""
        from vector_quantize_pytorch import VectorQuantize

        super().__init__()
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

    @property
    def codes(self) -> Tensor:
        return self.inner._codebook.embed[0]

    def learn(self, latents_NZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes_1NZ, ids_1N, loss = self.inner(latents_NZ[None])
        return codes_1NZ[0], ids_1N[0], loss.sum()

    def nearest(self, latents_NZ: Tensor) -> tuple[Tensor, Tensor]:
        # The latent's length changes no order; the codes' would, and stored ones need not be of length 1 exactly.
        ids_N = (functional.normalize(latents_NZ, dim=-1) @ functional.normalize(self.codes, dim=-1).T).argmax(-1)
        return self.lookup(ids_N), ids_N

    def lookup(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.codes)

    def relax(self, latents_BZhw: Tensor) -> Tensor:
        return functional.normalize(latents_BZhw.float(), dim=1)


class FiniteScalars(Quantizer):
    """Each channel rounded to one of a few levels (FSQ, arXiv 2309.15505); there is no codebook to collapse."""

    def __init__(self, config: NetworkConfig) -> None:
        from vector_quantize_pytorch import FSQ

        super().__init__()
        self.inner = FSQ(list(config.levels))

    def learn(self, latents_NZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes_1NZ, ids_1N = self.inner(latents_NZ[None])
        return codes_1NZ[0], ids_1N[0].long(), latents_NZ.new_zeros(())

    def nearest(self, latents_NZ: Tensor) -> tuple[Tensor, Tensor]:
        codes_NZ, ids_N, _ = self.learn(latents_NZ)
        return codes_NZ, ids_N

    def lookup(self, ids: Tensor) -> Tensor:
        return self.inner.indices_to_codes(ids.reshape(1, -1)).view(*ids.shape, -1)

    def relax(self, latents_BZhw: Tensor) -> Tensor:
        return latents_BZhw.float().tanh()


class SignBits(Quantizer):
    """Each channel's sign is one bit of the id (LFQ, arXiv 2310.05737), kept varied by an entropy loss."""

    def __init__(self, config: NetworkConfig) -> None:
        from vector_quantize_pytorch import LFQ

        super().__init__()
        self.inner = LFQ(dim=config.code_dim, codebook_size=config.codebook_size, commitment_loss_weight=0.25)

    def learn(self, latents_NZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes_1NZ, ids_1N, loss = self.inner(latents_NZ[None])
        return codes_1NZ[0], ids_1N[0].long(), loss.sum()

    def nearest(self, latents_NZ: Tensor) -> tuple[Tensor, Tensor]:
        codes_1NZ, ids_1N, _ = self.inner(latents_NZ[None])
        return codes_1NZ[0], ids_1N[0].long()

    def lookup(self, ids: Tensor) -> Tensor:
        return self.inner.indices_to_codes(ids.reshape(1, -1)).view(*ids.shape, -1)

    def relax(self, latents_BZhw: Tensor) -> Tensor:
        return latents_BZhw.float().tanh()


class Memcodes(Quantizer):
    """Product quantization by attention over memories (NWT, arXiv 2106.04283): each of H parts of the latent asks the
    keys of its K codes, and the value of the best one takes its place; Gumbel noise (arXiv 1611.01144) explores."""

    def __init__(self, config: NetworkConfig, temperature: float = 1.0) -> None:
        super().__init__()
        heads, part = config.num_codebooks, config.latent_dim // config.num_codebooks
        self.temperature = temperature
        self.codes = nn.Parameter(torch.randn(heads, config.codebook_size, part))
        self.to_k, self.to_v = _PerHead(heads, part), _PerHead(heads, part)

    def _scores(self, latents_NZ: Tensor) -> Tensor:
        heads, _, part = self.codes.shape
        query_HND = latents_NZ.view(-1, heads, part).transpose(0, 1) * part**-0.5
        return query_HND @ self.to_k(self.codes).transpose(1, 2)

    def learn(self, latents_NZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen_HNK = functional.gumbel_softmax(self._scores(latents_NZ), tau=self.temperature, hard=True)
        codes_HND = chosen_HNK @ self.to_v(self.codes)
        return codes_HND.transpose(0, 1).flatten(1), chosen_HNK.argmax(-1).T, latents_NZ.new_zeros(())

    def nearest(self, latents_NZ: Tensor) -> tuple[Tensor, Tensor]:
        ids_NH = self._scores(latents_NZ).argmax(-1).T
        return self.lookup(ids_NH), ids_NH

    def lookup(self, ids: Tensor) -> Tensor:
        values_HKD = self.to_v(self.codes)
        heads = torch.arange(len(values_HKD), device=ids.device)
        return values_HKD[heads, ids].flatten(-2)

    def relax(self, latents_BZhw: Tensor) -> Tensor:
        return latents_BZhw.float()


class _PerHead(nn.Module):
    """A linear map of its own for each head, without bias: (H, N, D) -> (H, N, D)."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, dim, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, x_HND: Tensor) -> Tensor:
        return x_HND @ self.weight


def build_quantizer(config: NetworkConfig, dead_code_threshold: float = 0.0) -> Quantizer:
    """The quantizer that the configuration names."""
    if config.quantizer == "vq":
        return CosineCodebook(config, dead_code_threshold)
    return {"fsq": FiniteScalars, "lfq": SignBits, "memcodes": Memcodes}[config.quantizer](config)


# ml-4m stores the one codebook without the library's leading axis and without the running sums.
_STORED, _LIVE = "quantize._codebook.", "quantize.inner._codebook."


def to_stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's state as it is stored: a cosine codebook as `initted` (1,), `cluster_size` (K,), `embed` (K, Z)."""
    stored = {}
    for name, tensor in state.items():
        if name.startswith(_LIVE) and not name.endswith(".embed_avg"):
            stored[name.replace(_LIVE, _STORED)] = tensor.reshape(1) if tensor.ndim == 0 else tensor[0]
        elif not name.startswith(_LIVE):
            stored[name] = tensor
    return stored


def from_stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `to_stored`; the running sums are put together again from codes and counts."""
    live = {name: tensor for name, tensor in state.items() if not name.startswith(_STORED)}
    found = {name.removeprefix(_STORED): t for name, t in state.items() if name.startswith(_STORED)}
    if {"initted", "cluster_size", "embed"} <= set(found):
        count_K, codes_KZ = found["cluster_size"], found["embed"]
        live[f"{_LIVE}initted"] = found["initted"].reshape(()).bool()
        live[f"{_LIVE}cluster_size"] = count_K[None]
        live[f"{_LIVE}embed"] = codes_KZ[None]
        live[f"{_LIVE}embed_avg"] = (codes_KZ * count_K[:, None])[None]
    return live
