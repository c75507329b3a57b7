"""QuickGELU: every way to run a CLIP with the activation that it was not trained with, and what is said of each."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_words import save_open_clip, save_open_clip_resnet, save_transformers_clip

from fourmill.labelers import LABELERS
from fourmill.labelers.clip_activation import Clue, origin_clues, settle
from fourmill.pipeline.component import Batch

OPENAI_NAME = "vit_base_patch16_clip_224.openai"


def features(folder: Path, **options: Any) -> np.ndarray:
    """The embeddings of two pictures, (2, C)."""
    labeler = LABELERS.build("clip", {"checkpoint": str(folder), "outputs": ["clip_global"], **options})
    labeler.load("cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 48, 48), dtype=np.uint8)
    return np.stack(labeler.run(Batch(["a", "b"], pixels))["clip_global"])


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change model_cfg of an open_clip checkpoint."""
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"] |= changes
    path.write_text(json.dumps(config))
    return folder


def plain(folder: Path) -> Path:
    """An open_clip checkpoint whose configuration does not mention QuickGELU, which means GELU to open_clip."""
    return save_open_clip(folder)


def with_card(folder: Path, base: str) -> Path:
    (plain(folder) / "README.md").write_text(f"---\nlicense: mit\nbase_model:\n- {base}\n---\nTuned.\n")
    return folder


def with_config(folder: Path, **config: Any) -> Path:
    (plain(folder) / "config.json").write_text(json.dumps(config))
    return folder


MISMATCHES = {
    "the folder is named like OpenAI's repository": lambda at: plain(at / OPENAI_NAME),
    "the card's base model is OpenAI's": lambda at: with_card(at / "mine", "openai/clip-vit-base-patch16"),
    "the card's base model is DFN's": lambda at: with_card(at / "mine", "apple/DFN2B-CLIP-ViT-B-16"),
    "transformers' configuration beside it says so": lambda at: with_config(
        at / "mine", model_type="clip", vision_config={"hidden_act": "quick_gelu"}
    ),
    "transformers' configuration says so by its default": lambda at: with_config(
        at / "mine", model_type="clip", vision_config={"patch_size": 16}
    ),
    "timm's architecture says so": lambda at: with_config(
        at / "mine", architecture="vit_base_patch16_clip_quickgelu_224"
    ),
    "a flag that LAION's weights do not have": lambda at: edit_config(
        plain(at / "CLIP-ViT-B-16-laion2B-s34B-b88K"), quick_gelu=True
    ),
    "a flag that timm's tower ignores": lambda at: save_open_clip(
        at / "mine", vision_cfg={"timm_model_name": "test_vit", "image_size": 160}, quick_gelu=True
    ),
    "transformers' weights of OpenAI with GELU": lambda at: save_transformers_clip(at / OPENAI_NAME, act="gelu"),
}


@pytest.mark.parametrize("make", MISMATCHES.values(), ids=MISMATCHES.keys())
def test_quickgelu_mismatch_is_an_error_that_says_who_says_what(tmp_path: Path, make: Any) -> None:
    folder = make(tmp_path)
    with pytest.raises(ValueError, match="QuickGELU mismatch") as error:
        features(folder)
    assert all(part in str(error.value) for part in (" says gelu", " says quick_gelu", "`activation` to gelu or"))


def test_towers_of_one_transformers_clip_with_two_activations_are_a_mismatch(tmp_path: Path) -> None:
    folder = save_transformers_clip(tmp_path / "clip", act="quick_gelu", hidden_act="gelu")
    with pytest.raises(ValueError, match="hidden_act in vision_config says gelu; hidden_act in text_config says quick"):
        features(folder)


def test_activation_asked_for_is_used_where_the_checkpoint_cannot_tell(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    silent = plain(tmp_path / "silent")
    flagged = edit_config(plain(tmp_path / "flagged"), quick_gelu=True)
    with caplog.at_level(logging.WARNING):
        asked = features(silent, activation="quick_gelu")
    assert "runs with quick_gelu as its configuration asks, although the absence of quick_gelu" in caplog.text
    expected, other = features(flagged), features(silent)
    np.testing.assert_array_equal(asked, expected)
    assert np.abs(asked - other).max() > 1e-3  # what the mismatch would cost


def test_activation_asked_for_is_used_by_transformers_too(tmp_path: Path) -> None:
    folder = save_transformers_clip(tmp_path / "clip", act="gelu")
    expected = save_transformers_clip(tmp_path / "other", act="quick_gelu")
    asked = features(folder, activation="quick_gelu")
    np.testing.assert_array_equal(asked, features(expected))


def test_activation_asked_for_settles_a_mismatch_but_not_against_a_known_origin(tmp_path: Path) -> None:
    doubtful = plain(tmp_path / OPENAI_NAME)  # its name says quick_gelu, its configuration gelu
    one, other = (features(doubtful, activation=act) for act in ("gelu", "quick_gelu"))
    assert np.abs(one - other).max() > 1e-3
    certain = edit_config(doubtful, quick_gelu=True)  # now both say quick_gelu
    with pytest.raises(ValueError, match=f"QuickGELU mismatch: `activation` is gelu, but .*{OPENAI_NAME}"):
        features(certain, activation="gelu")


def test_activation_of_a_tower_without_gelu_cannot_be_chosen(tmp_path: Path) -> None:
    folder = save_open_clip_resnet(tmp_path / "resnet")
    with pytest.raises(ValueError, match="`activation` is quick_gelu, but the image tower has no such layer"):
        features(folder, activation="quick_gelu")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("timm/vit_base_patch16_clip_224.openai", "quick_gelu"),
        ("timm/vit_base_patch16_clip_224.openai@abc123", "quick_gelu"),
        ("openai/clip-vit-large-patch14", "quick_gelu"),
        ("apple/DFN5B-CLIP-ViT-H-14", "quick_gelu"),
        ("timm/vit_base_patch16_clip_224.metaclip_2pt5b", "quick_gelu"),
        ("timm/vit_base_patch16_clip_224.laion400m_e32", "gelu"),
        ("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "gelu"),
    ],
)
def test_origin_of_a_hub_id_is_known(reference: str, says: str) -> None:
    assert [clue.says for clue in origin_clues(reference, None)] == [says]


def test_clues_that_agree_settle_and_no_clue_settles_nothing() -> None:
    clues = [Clue("gelu", "the file"), Clue("gelu", "the origin", origin=True)]
    assert settle(None, clues, "x") == "gelu"
    assert settle("gelu", clues, "x") == "gelu"
    assert settle(None, [], "x") is None
    assert origin_clues("someone/unheard-of", None) == []
