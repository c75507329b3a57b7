"""Every published 4M checkpoint: its config.json gives a network with exactly its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fourmill.model.network import FourM
from fourmill.model.weights import architecture_of

SHAPES = Path(__file__).parents[2] / "shared" / "reference-data" / "ml4m" / "published_shapes"
needs_shapes = pytest.mark.skipif(not SHAPES.is_dir(), reason="no lists of published shapes beside the repository")

GRIDS = ["tok_rgb", "tok_depth", "tok_normal", "tok_semseg", "tok_clip"]
FAMILY: dict[str, Any] = {
    "mlp_ratio": 4,
    "qkv_bias": False,
    "proj_bias": False,
    "mlp_bias": False,
    "norm_bias": False,
    "act_layer": "SiLU",
    "gated_mlp": True,
    "image_size": 224,
    "patch_size": 16,
}
TEXTS_7, GRIDS_224 = ["caption", "det"], [f"{name}@224" for name in GRIDS]
FOUR_M_7: dict[str, Any] = {
    "domains_in": ["rgb@224", *TEXTS_7, *GRIDS_224],
    "domains_out": [*TEXTS_7, *GRIDS_224],
    **FAMILY,
}
TEXTS_21 = ["caption", "t5_caption", "det", "metadata", "human_poses", "color_palette", "sam_instance"]
GRIDS_21 = [
    *["tok_rgb@224", "tok_normal@224", "tok_depth@224", "tok_semseg@224", "tok_clip@224", "tok_dinov2@224"],
    *["tok_dinov2_global", "tok_imagebind@224", "tok_imagebind_global", "tok_sam_edge@224", "tok_canny_edge@224"],
]
FOUR_M_21: dict[str, Any] = {
    "domains_in": [*TEXTS_21, "rgb@224", *GRIDS_21],
    "domains_out": [*TEXTS_21, *GRIDS_21],
    "share_modality_embeddings": False,
    **FAMILY,
}
GRIDS_448 = [f"{name}@448" for name in GRIDS]
SUPER_RESOLUTION: dict[str, Any] = {
    "domains_in": [*TEXTS_7, "rgb@224", *GRIDS_224, "rgb@448", *GRIDS_448],
    "domains_out": GRIDS_448,
    **FAMILY,
}
B = {"encoder_depth": 12, "decoder_depth": 12, "dim": 768, "num_heads": 12}
L = {"encoder_depth": 24, "decoder_depth": 24, "dim": 1024, "num_heads": 16}
XL = {"encoder_depth": 24, "decoder_depth": 24, "dim": 2048, "num_heads": 32}
PUBLISHED = {
    "4M-7_B_CC12M": {**FOUR_M_7, **B},
    "4M-7_L_CC12M": {**FOUR_M_7, **L},
    "4M-7_XL_CC12M": {**FOUR_M_7, **XL},
    "4M-21_B": {**FOUR_M_21, **B},
    "4M-21_L": {**FOUR_M_21, **L},
    "4M-21_XL": {**FOUR_M_21, **XL},
    "4M-7-SR_L_CC12M": {**SUPER_RESOLUTION, **L},
}


@needs_shapes
def test_every_published_model_is_checked() -> None:
    assert {path.stem for path in SHAPES.glob("4M-*.json")} == set(PUBLISHED)


@needs_shapes
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_have_exactly_our_keys_and_shapes(name: str) -> None:
    published = json.loads((SHAPES / f"{name}.json").read_text())
    assert published["config"] == PUBLISHED[name]
    shapes = {key: tuple(shape) for key, (_, shape) in published["tensors"].items()}
    with torch.device("meta"):
        model = FourM(architecture_of(PUBLISHED[name], shapes))
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes
    assert {str(value.dtype) for value in model.state_dict().values()} == {"torch.float32"}


@needs_shapes
def test_kinds_and_lengths_follow_from_names_and_tensors() -> None:
    tensors = json.loads((SHAPES / "4M-21_B.json").read_text())["tensors"]
    architecture = architecture_of(PUBLISHED["4M-21_B"], {key: tuple(shape) for key, (_, shape) in tensors.items()})
    found = {n: (i.kind, i.tokens, i.grid) for n, i in architecture.modalities.items()}
    assert found == {
        "caption": ("sequence", 256, None),
        "t5_caption": ("vectors", 77, None),
        "det": ("sequence", 256, None),
        "metadata": ("sequence", 40, None),
        "human_poses": ("sequence", 263, None),
        "color_palette": ("sequence", 23, None),
        "sam_instance": ("sequence", 290, None),
        "rgb@224": ("pixels", 196, (14, 14)),
        **{name: ("grid", 196, (14, 14)) for name in GRIDS_21 if "imagebind" not in name and "dinov2" not in name},
        **dict.fromkeys(("tok_dinov2@224", "tok_imagebind@224"), ("grid", 256, (16, 16))),
        **dict.fromkeys(("tok_dinov2_global", "tok_imagebind_global"), ("grid", 16, None)),
    }
    assert architecture.domains_out == tuple(n for n in PUBLISHED["4M-21_B"]["domains_out"] if n != "t5_caption")
    assert architecture.modalities["t5_caption"].width == 4096


def test_text_with_a_table_of_another_length_is_a_text() -> None:
    config = {
        **FAMILY,
        **B,
        "dim": 16,
        "num_heads": 2,
        "domains_in": ["human_poses", "notes"],
        "domains_out": ["notes"],
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for side, name, rows in (("encoder", "human_poses", 263), ("encoder", "notes", 300), ("decoder", "notes", 300)):
        prefix = f"{side}_embeddings.{name}."
        shapes |= {
            prefix + "mod_emb": (1, 1, 16),
            prefix + "pos_emb": (1, rows, 16),
            prefix + "token_emb.weight": (9, 16),
        }
    shapes["decoder_embeddings.notes.to_logits.weight"] = (9, 16)
    modalities = architecture_of(config, shapes).modalities
    assert [(i.kind, i.tokens, i.positions) for i in modalities.values()] == [
        ("sequence", 263, 263),
        ("sequence", 256, 300),
    ]
    del shapes["encoder_embeddings.notes.token_emb.weight"]
    with pytest.raises(ValueError, match="'notes' has neither proj, emb_proj nor token_emb"):
        architecture_of(config, shapes)


def test_settings_that_change_nothing_are_named_and_unknown_activations_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = {
        **FAMILY,
        **B,
        "domains_in": [],
        "domains_out": [],
        "drop_path_rate_encoder": 0.1,
        "use_act_checkpoint": 0,
    }
    with pytest.raises(ValueError, match="domains_in"):
        architecture_of(config, {})
    assert "config.json: drop_path_rate_encoder: no effect here" in caplog.text
    with pytest.raises(ValueError, match="act_layer 'GELU'; an MLP of this kind has 'SiLU' here"):
        architecture_of({**config, "act_layer": "GELU"}, {})
