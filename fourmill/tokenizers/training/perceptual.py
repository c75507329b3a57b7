"""A perceptual loss: distance between what a frozen timm network sees in two pictures (arXiv 1801.03924, and 4M's).

Invariants: nothing is downloaded; the network has no gradient, no dropout and no running statistics of its own.

Shapes: B batch, S side in pixels, N positions, C channels.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fourmill.tokenizers.training.config import PerceptualConfig


class PerceptualLoss(nn.Module):
    """Pictures (B, 3, S, S) in -1..1, reconstructed and true -> mean distance of their features, summed over blocks."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: PerceptualConfig) -> None:
        import timm.data

        super().__init__()
        self.config = config
        self.network = _load(config).eval().requires_grad_(False)
        data = timm.data.resolve_model_data_config(self.network)
        self.size: tuple[int, int] = tuple(data["input_size"][-2:])
        self.register_buffer("mean", torch.tensor(data["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(data["std"]).view(1, 3, 1, 1))
        self._seen: dict[str, Tensor] = {}
        for name in config.blocks:
            self._module(name).register_forward_hook(self._keep(name))

    def _module(self, name: str) -> nn.Module:
        modules = dict(self.network.named_modules())
        if name not in modules:
            near = ", ".join(difflib.get_close_matches(name, modules, n=5, cutoff=0.3)) or ", ".join(list(modules)[1:9])
            raise ValueError(f"perceptual.blocks: {self.config.checkpoint} has no module {name!r}; it has: {near}, …")
        return modules[name]

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
                raise ValueError(f"perceptual.blocks: {name!r} gives no features but {type(output).__name__}")
            self._seen[name] = output

        return hook

    def train(self, mode: bool = True) -> PerceptualLoss:
        """It stays in evaluation mode, whatever the module around it does."""
        return super().train(False)

    def forward(self, found_B3SS: Tensor, true_B3SS: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(true_B3SS)
        got = self.features(found_B3SS)
        return torch.stack([self._distance(got[name], wanted[name]) for name in self.config.blocks]).sum()

    def features(self, pixels_B3SS: Tensor) -> dict[str, Tensor]:
        """What each block gives, channels last: (B, N, C), float32."""
        inputs = ((pixels_B3SS.float() + 1) / 2 - self.mean) / self.std
        if inputs.shape[-2:] != self.size:
            inputs = functional.interpolate(inputs, self.size, mode="bilinear", antialias=True)
        self.network(inputs)
        seen, self._seen = self._seen, {}
        channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
        return {name: _positions(output.float(), channels_last) for name, output in seen.items()}

    def _distance(self, got_BNC: Tensor, wanted_BNC: Tensor) -> Tensor:
        if self.config.distance == "cosine":
            return 1 - functional.cosine_similarity(got_BNC, wanted_BNC, dim=-1).mean()
        errors = functional.normalize(got_BNC, dim=-1) - functional.normalize(wanted_BNC, dim=-1)
        return (errors.abs() if self.config.distance == "l1" else errors.square()).sum(-1).mean()


def _positions(output: Tensor, channels_last: bool) -> Tensor:
    """Maps (B, C, h, w), or (B, h, w, C), tokens (B, N, C) or vectors (B, C) -> (B, N, C)."""
    if output.ndim == 2:
        return output[:, None]
    if output.ndim == 3:
        return output
    return output.flatten(1, 2) if channels_last else output.flatten(2).transpose(1, 2)


def _load(config: PerceptualConfig) -> nn.Module:
    """The timm network of a local folder, or of a local file; ValueError if something of it is not there."""
    import timm

    path = Path(config.checkpoint).expanduser()
    if path.is_dir():
        missing = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
        if missing or config.model:
            what = f"lacks {missing[0]}" if missing else "names its own `model`"
            raise ValueError(f"perceptual.checkpoint {config.checkpoint}: this timm folder {what}")
        return timm.create_model(f"local-dir:{path.absolute()}", pretrained=True)
    if not path.is_file():
        raise ValueError(f"perceptual.checkpoint {config.checkpoint!r} is neither a local folder nor a local file")
    if config.model is None:
        raise ValueError(f"perceptual.checkpoint {config.checkpoint} is a file: give timm's name of it as `model`")
    return timm.create_model(config.model, pretrained=False, checkpoint_path=str(path))
