"""The demo teachers: the trainers still run, and the shipped weights still understand scenes they never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fourmill.demo.teacher_figures import caption_figures, depth_figures, retrieval_figures, semseg_figures
from fourmill.demo.teacher_tasks import TASKS, mirror_words
from fourmill.demo.teachers import CHECKPOINTS, Settings, evaluate, train

NAMES = tuple(TASKS)


@pytest.fixture(scope="module")
def scene_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rendered once for all four smoke runs; 128 scenes are one batch of CLIP."""
    return str(tmp_path_factory.mktemp("scenes"))


@pytest.mark.parametrize("name", NAMES)
def test_trainer_runs_saves_and_its_folder_reloads(name: str, tmp_path: Path, scene_cache: str) -> None:
    settings = Settings(steps=2, scenes=128, validation=8, cache=scene_cache)
    outcome = train(name, tmp_path / name, settings)
    assert outcome.steps == 2
    figures = evaluate(name, tmp_path / name, count=3)
    assert all(np.isfinite(value) for value in figures.values())


def test_training_by_steps_is_repeatable(tmp_path: Path, scene_cache: str) -> None:
    settings = Settings(steps=2, scenes=128, validation=8, cache=scene_cache)
    for folder in ("one", "two"):
        train("semseg", tmp_path / folder, settings)
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two")]
    assert weights[0] == weights[1]


# Thresholds stand well below the figures in each folder's README.md: 48 scenes are few.
SHIPPED = {
    "depth": {"absrel": (None, 0.12), "aligned_absrel": (None, 0.12), "aligned_delta1": (0.90, None)},
    "semseg": {"miou": (0.72, None), "pixel_accuracy": (0.93, None)},
    "clip": {"image_to_text_r1": (0.50, None)},
    "caption": {"word_f1": (0.75, None), "phrase_f1": (0.45, None)},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [128, 224])
def test_shipped_teacher_understands_unseen_scenes(name: str, size: int) -> None:
    figures = evaluate(name, CHECKPOINTS / name, count=48, size=size)
    for key, (low, high) in SHIPPED[name].items():
        assert low is None or figures[key] >= low, (key, figures)
        assert high is None or figures[key] <= high, (key, figures)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_folder_is_small_carries_a_card_and_no_paths(name: str) -> None:
    folder = CHECKPOINTS / name
    assert sum(p.stat().st_size for p in folder.iterdir()) < 6_000_000
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "understands only the procedural rooms" in card
    for path in folder.glob("*.json"):
        assert '"/' not in path.read_text(), f"{path.name} holds an absolute path"


def test_unknown_teacher_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known: depth, semseg, clip, caption"):
        train("dpeth", "unused", Settings(steps=1))


def test_perfect_and_scaled_depth() -> None:
    truth = np.random.default_rng(0).uniform(1, 8, (2, 8, 8))
    figures = depth_figures(2 * truth, truth)
    assert figures["absrel"] == pytest.approx(1.0)
    assert figures["aligned_absrel"] == pytest.approx(0.0, abs=1e-9)
    assert (figures["delta1"], figures["aligned_delta1"]) == (0.0, 1.0)


def test_class_maps_half_right() -> None:
    truth = np.repeat(np.arange(6, dtype=np.uint8), 4).reshape(1, 4, 6)
    wrong = truth.copy()
    wrong[0, :, :] = 0
    assert semseg_figures(truth, truth)["miou"] == 1.0
    assert semseg_figures(wrong, truth)["pixel_accuracy"] == pytest.approx(4 / 24)


def test_retrieval_of_identical_and_of_shifted_features() -> None:
    features = torch.eye(6)
    assert retrieval_figures(features, features)["image_to_text_r1"] == 1.0
    assert retrieval_figures(features, features.roll(1, dims=0))["text_to_image_r1"] == 0.0


def test_caption_phrases_count_as_a_multiset() -> None:
    figures = caption_figures(["a red box and a red box"], ["a red box and a blue cone"])
    assert figures["phrase_f1"] == 0.5
    assert caption_figures(["a red box"], ["a red box"])["exact"] == 1.0


def test_mirrored_captions_swap_only_sides() -> None:
    assert mirror_words("a red box left of a cone, with two cones") == "a red box right of a cone, with two cones"
