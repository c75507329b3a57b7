"""Masks are distributed as ml-4m's own: its UnifiedMasking, from the checkout that FOURMILL_ML4M names, against ours.

Where the two differ on purpose (budget that a modality cannot use goes to the others here, and is lost there), budgets
are chosen that no modality exceeds.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.loader_ml4m import stand_ins
from fourmill.model.batch import RawBatch
from fourmill.model.config import Architecture, MaskingConfig, ModalityInfo
from fourmill.model.masking import Masker

COUNT, CELLS, WORDS, BUDGET = 1500, 196, 30, 48
GRIDS = ("tok_rgb", "tok_depth", "tok_semseg")
ALPHAS = (0.5, 2.0, 1.0, 1.0)  # of the three grids and the text


def ours() -> dict[str, np.ndarray]:
    """Per sample: tokens shown of each modality, and of the text how many words; tokens asked for; cells shown."""
    info = {n: ModalityInfo(kind="grid", vocabulary=512, tokens=CELLS, grid=(14, 14)) for n in GRIDS}
    info["tok_caption"] = ModalityInfo(kind="sequence", vocabulary=30_000, tokens=256)
    alphas = dict(zip(info, ALPHAS, strict=True))
    mixture = {"input_alphas": alphas, "target_alphas": alphas}
    shape = Architecture(dim=16, num_heads=1, domains_in=tuple(info), domains_out=tuple(info), modalities=info)
    settings = MaskingConfig(num_input_tokens=BUDGET, num_target_tokens=BUDGET, mixtures=(mixture,))
    tokens = {n: torch.zeros(COUNT, CELLS, dtype=torch.uint16) for n in GRIDS}
    tokens["tok_caption"] = torch.full((COUNT, WORDS), 5000, dtype=torch.uint16)
    present = {n: torch.ones(COUNT, dtype=torch.bool) for n in info}
    batch = RawBatch([""] * COUNT, tokens, {"tok_caption": torch.full((COUNT,), WORDS)}, present, None, {})
    inputs, targets = Masker(shape, settings)(batch, torch.Generator().manual_seed(0))
    text = inputs.modality_BN == 3
    return {
        "shown": np.stack([(inputs.modality_BN == d).sum(1).numpy() for d in range(4)], 1),
        "words": ((inputs.ids_BN == 5000) & text).sum(1).numpy(),
        "asked": np.stack([(targets.modality_BM == d).sum(1).numpy() for d in range(4)], 1),
        "cells": np.bincount(inputs.position_BN[inputs.modality_BN == 1].numpy(), minlength=CELLS),
    }


@pytest.fixture(scope="module")
def theirs() -> dict[str, np.ndarray]:
    """The same of ml-4m's masking."""
    checkout = os.environ.get("FOURMILL_ML4M")
    if not checkout:
        pytest.skip("FOURMILL_ML4M names no checkout of apple/ml-4m")
    for name in ("webdataset", "braceexpand", "einops", "datasets"):
        pytest.importorskip(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(checkout)
        for name, module in stand_ins().items():
            patch.setitem(sys.modules, name, module)
        masking = importlib.import_module("fourm.data.masking")
        found = measure(masking, Path(checkout))
        for name in [n for n in sys.modules if n == "fourm" or n.startswith("fourm.")]:
            del sys.modules[name]
    return found


def measure(masking: Any, checkout: Path) -> dict[str, np.ndarray]:
    from tokenizers import Tokenizer

    folder = checkout / "fourm" / "utils" / "tokenizer" / "trained"
    tokenizer = Tokenizer.from_file(str(folder / "text_tokenizer_4m_wordpiece_30k.json"))
    info: dict[str, Any] = {n: {"type": "img", "min_tokens": 0, "max_tokens": CELLS} for n in GRIDS}
    info["caption"] = {"type": "seq", "min_tokens": 0, "max_tokens": 256, "keep": ["random"]}
    for entry, alpha in zip(info.values(), ALPHAS, strict=True):
        entry.update(input_alphas=[alpha], target_alphas=[alpha])
    masker = masking.UnifiedMasking(info, tokenizer, BUDGET, BUDGET)
    torch.manual_seed(0)
    random.seed(0)
    word = tokenizer.encode("dog").ids
    assert len(word) == 1
    found: dict[str, list[Any]] = {"shown": [], "words": [], "asked": [], "cells": []}
    for _ in range(COUNT):
        made = masker({**{n: torch.zeros(CELLS, dtype=torch.long) for n in GRIDS}, "caption": "dog " * WORDS})
        found["shown"].append([int((~made[n]["input_mask"]).sum()) for n in info])
        asked = [int((~made[n]["target_mask"]).sum()) for n in info]
        # It counts the ids of a text's target; the decoder is given all but the last.
        found["asked"].append([*asked[:3], max(asked[3] - 1, 0)])
        text = made["caption"]
        found["words"].append(int(((text["tensor"] == word[0]) & ~text["input_mask"]).sum()))
        found["cells"].append((~made["tok_depth"]["input_mask"]).numpy())
    arrays = {name: np.array(values) for name, values in found.items()}
    return {**arrays, "cells": arrays["cells"].sum(0)}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov–Smirnov: the largest difference of two cumulative distributions of counts."""
    places = np.arange(max(a.max(), b.max()) + 1)
    return float(np.abs((a[:, None] <= places).mean(0) - (b[:, None] <= places).mean(0)).max())


CRITICAL = 1.95 * (2 / COUNT) ** 0.5  # one in a thousand for continuous values, rarer for counts


@pytest.mark.parametrize("modality", range(3))
def test_tokens_of_a_grid_are_shared_out_as_ml4m_does(theirs: dict[str, np.ndarray], modality: int) -> None:
    mine = ours()
    # Its remainders go by one draw each, ours by systematic rounding, so a token more or less is allowed for; and what
    # its texts cannot use is lost: a tenth of this budget's targets, which here the grids get.
    for side, lost in (("shown", 0.0), ("asked", 0.05)):
        a, b = mine[side][:, modality], theirs[side][:, modality]
        assert min(distance(a, b + shift) for shift in (-1, 0, 1)) < CRITICAL + lost, side


def test_texts_are_shown_and_asked_for_as_much_as_in_ml4m(theirs: dict[str, np.ndarray]) -> None:
    mine = ours()
    assert distance(mine["words"], theirs["words"]) < CRITICAL
    assert distance(mine["shown"][:, 3], theirs["shown"][:, 3]) < CRITICAL
    # A target that is cut has one place less in ml-4m, where the budget counts the last id, which is only predicted.
    assert min(distance(mine["asked"][:, 3], theirs["asked"][:, 3] + cut) for cut in (0, 1)) < CRITICAL


def test_cells_are_equally_likely_in_both(theirs: dict[str, np.ndarray]) -> None:
    for cells in (ours()["cells"], theirs["cells"]):
        expected = cells.sum() / CELLS
        assert float(((cells - expected) ** 2 / expected).sum()) < 263.0  # chi-square, 195 degrees: one in a thousand
