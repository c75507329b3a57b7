"""What the trainers of all demo teachers share: the shape of a task, its pictures and its folder.

Shape legend: B batch, S side of the picture (128).
Invariants: a saved folder loads with the library's own `from_pretrained` and nothing of this project; weights are
stored in float16; pictures enter a network as (x / 255 - 0.5) / 0.5, which is also what the saved processor does.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fourmill.demo.teacher_figures import Figures
from fourmill.scenes import CLASSES
from fourmill.scenes.cache import SceneCache

SIZE = 128
HALF = [0.5, 0.5, 0.5]
Rows = NDArray[np.intp]
Flip = NDArray[np.bool_]


class Task(Protocol):
    """One teacher in training: `watched` is its headline figure, `size` its batch, `rate` its peak learning rate."""

    name: str
    watched: str
    size: int
    rate: float
    model: nn.Module

    def loss(self, cache: SceneCache, rows: Rows, flip: Flip) -> torch.Tensor:
        """Mean loss over these rows, those in `flip` mirrored. Called under autocast."""
        ...

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        """What to maximise on validation scenes, and the figures it was taken from."""
        ...

    def save(self, folder: Path) -> None:
        """Write a folder that the library loads by itself; the model in training stays as it is."""
        ...

    def load(self, folder: Path) -> None:
        """Start from the weights of such a folder."""
        ...


def pixels(cache: SceneCache, rows: Rows, flip: Flip) -> torch.Tensor:
    """(B, 3, S, S) float32 in -1..1, channels last."""
    images = torch.from_numpy(mirrored(cache.images[rows], flip)).permute(0, 3, 1, 2)
    return images.float().div_(127.5).sub_(1)


def mirrored(arrays: NDArray[Any], flip: Flip) -> NDArray[Any]:
    """These (B, S, S, ...) arrays with those in `flip` turned left to right, in place."""
    arrays[flip] = arrays[flip][:, :, ::-1]
    return arrays


def all_rows(cache: SceneCache) -> list[tuple[Rows, Flip]]:
    """Every row once, in batches of about 64, none mirrored."""
    return [(rows, np.zeros(len(rows), bool)) for rows in np.array_split(np.arange(len(cache)), -(-len(cache) // 64))]


def patch_class_loss(head: nn.Module, tokens: torch.Tensor, semantic: NDArray[np.uint8]) -> torch.Tensor:
    """Cross-entropy of the classes at 4 x 4 points of each patch, named by `head` from its token (B, G, G, C).

    Where points or words alone would teach a fresh encoder shapes very slowly, this teaches it in minutes.
    """
    count, grid = tokens.shape[:2]
    step = semantic.shape[1] // (4 * grid)
    logits = head(tokens).float().view(count * grid * grid * 16, len(CLASSES))
    points = torch.from_numpy(semantic[:, step // 2 :: step, step // 2 :: step]).long()
    classes = points.view(count, grid, 4, grid, 4).transpose(2, 3)
    return functional.cross_entropy(logits, classes.flatten())


def save_half(model: Any, folder: Path, drop: tuple[str, ...] = ()) -> None:
    """`save_pretrained` of a float16 copy without the parts in `drop`, which only training needs."""
    small = copy.deepcopy(model)
    for name in drop:
        delattr(small, name)
    small.half().save_pretrained(folder)


def load_half(model: Any, folder: Path, extra: str = " ") -> None:
    """Copy the weights of a saved folder into `model`; only names that start with `extra` may be missing there."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind != model.config.model_type:
        raise ValueError(f"{folder} holds a {kind!r} network; this teacher is a {model.config.model_type!r}")
    saved, report = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    absent, _ = model.load_state_dict(saved.state_dict(), strict=False)
    absent = [*report["missing_keys"], *(name for name in absent if not name.startswith(extra))]
    if absent:  # the library would make them up
        raise ValueError(f"{folder} lacks {len(absent)} weights of {type(model).__name__}: {', '.join(sorted(absent))}")
