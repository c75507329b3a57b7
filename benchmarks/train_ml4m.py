"""ml-4m's network, optimizer and batches for benchmarks/train.py, from an unmodified checkout.

What is mended from outside, none of it within what is timed: OpenCV and albumentations, which only its data code calls,
need not be installed, and `random.sample` is given a list where ml-4m hands it a dictionary's view, which Python
refuses since 3.11.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import random
import sys
import types
from typing import Any

import torch

from fourmill.model.batch import Inputs, RawBatch, Targets
from fourmill.model.config import Architecture, ModalityInfo
from fourmill.model.network import PIXEL_MEAN, PIXEL_STD

ModDict = dict[str, dict[str, torch.Tensor]]  # ml-4m's batch: tensors by modality


def load(checkout: str) -> Any:
    """The module `fourm.models.fm` of a checkout, usable on this Python."""
    for unused in ("albumentations", "cv2"):
        if unused not in sys.modules and importlib.util.find_spec(unused) is None:
            sys.modules[unused] = types.ModuleType(unused)
    sys.path.insert(0, checkout)
    fm: Any = importlib.import_module("fourm.models.fm")
    fm.random = types.SimpleNamespace(sample=lambda population, count: random.sample(list(population), count))
    return fm


def network(fm: Any, architecture: Architecture, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Its network for our architecture, with our weights. ValueError if a parameter is missing or left over."""
    a = architecture
    info = importlib.import_module("fourm.data.modality_info").MODALITY_INFO

    def embeddings(side: str, names: tuple[str, ...]) -> dict[str, Any]:
        return {n: info[n][f"{side}_embedding"](**_sizes(a, a.modalities[n])) for n in names}

    norm = functools.partial(fm.LayerNorm, eps=1e-6, bias=False)
    model: torch.nn.Module = fm.FourM(
        embeddings("encoder", a.domains_in),
        embeddings("decoder", a.domains_out),
        info,
        **{name: getattr(a, name) for name in ("dim", "encoder_depth", "decoder_depth", "num_heads", "mlp_ratio")},
        **{f"{part}_bias": False for part in ("qkv", "proj", "mlp")},
        act_layer=torch.nn.SiLU,
        norm_layer=norm,
        gated_mlp=True,
    )
    wanted = {name for name in model.state_dict() if not name.endswith("pos_emb")}  # tables of sines, cut differently
    if absent := wanted ^ {name for name in weights if not name.endswith("pos_emb")}:
        raise ValueError(f"ml-4m's network and ours differ in {sorted(absent)[:3]}")
    model.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    return model.train()


def _sizes(architecture: Architecture, info: ModalityInfo) -> dict[str, int]:
    if info.kind == "sequence":
        return {}
    return {"patch_size": architecture.patch_size, "image_size": architecture.image_size}


def optimizer(model: torch.nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> Any:
    """The optimizer that its training script makes."""
    factory = importlib.import_module("fourm.utils.optim_factory")
    options = types.SimpleNamespace(
        opt="adamw",
        lr=lr,
        weight_decay=weight_decay,
        opt_betas=betas,
        opt_eps=1e-8,
        decoder_decay=None,
        no_lr_scale_list="",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return factory.create_optimizer(options, model)


def batch(architecture: Architecture, raw: RawBatch, inputs: Inputs, targets: Targets) -> ModDict:
    """Our masked batch in ml-4m's layout: every modality whole, with masks that are False where a token counts."""
    made = {}
    for number, name in enumerate(architecture.names):
        info = architecture.modalities[name]
        shown, asked = inputs.modality_BN == number, targets.modality_BM == number
        if info.kind == "sequence":
            made[name] = _text(info, inputs, targets, shown, asked)
        else:
            values = _normalised(raw) if info.kind == "pixels" else raw.tokens[name].long()
            made[name] = _grid(info, values, inputs.position_BN, targets.position_BM, shown, asked)
    return made


def _normalised(raw: RawBatch) -> torch.Tensor:
    assert raw.pixels is not None
    mean, std = (torch.tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))
    return (raw.pixels.float() / 255 - mean) / std


def _grid(
    info: ModalityInfo,
    values: torch.Tensor,
    input_position: torch.Tensor,
    target_position: torch.Tensor,
    shown: torch.Tensor,
    asked: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The number of targets stands at the first of them: all of them may see each other."""
    masks = []
    for chosen, position in ((shown, input_position), (asked, target_position)):
        mask = torch.ones(len(values), info.tokens, dtype=torch.bool)
        mask[chosen.nonzero()[:, 0], position[chosen]] = False
        masks.append(mask)
    attention = torch.zeros(len(values), info.tokens, dtype=torch.int)
    attention[torch.arange(len(values)), (~masks[1]).int().argmax(1)] = asked.sum(1).int()
    return {"tensor": values, "input_mask": masks[0], "target_mask": masks[1], "decoder_attention_mask": attention}


def _text(
    info: ModalityInfo, inputs: Inputs, targets: Targets, shown: torch.Tensor, asked: torch.Tensor
) -> dict[str, torch.Tensor]:
    """2 (T + 1) places, as ml-4m has them: inputs from the first, targets and the one that ends them from T + 1 on."""
    shape = (len(shown), 2 * (info.tokens + 1))
    ids, attention = torch.zeros(shape, dtype=torch.int), torch.zeros(shape, dtype=torch.int)
    input_mask, target_mask = (torch.ones(shape, dtype=torch.bool) for _ in range(2))
    row, place = shown.nonzero()[:, 0], inputs.position_BN[shown]
    ids[row, place] = inputs.ids_BN[shown].int()
    input_mask[row, place] = False
    row, place = asked.nonzero()[:, 0], targets.position_BM[asked] + info.tokens + 1
    ids[row, place + 1] = targets.label_BM[asked].int()
    ids[row, place] = targets.ids_BM[asked].int()
    for offset in (0, 1):
        target_mask[row, place + offset] = False
        attention[row, place + offset] = 1
    return {"tensor": ids, "input_mask": input_mask, "target_mask": target_mask, "decoder_attention_mask": attention}
