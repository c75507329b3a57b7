"""The trainers of the demo teachers still run: a few steps each, in seconds, and what they save loads again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fourmill.demo.teacher_cards import VALIDATION_SEED, Outcome, history, record
from fourmill.demo.teacher_figures import normal_figures
from fourmill.demo.teacher_sam import surfaces
from fourmill.demo.teacher_tasks import TASKS
from fourmill.demo.teacher_words import mirror_summary, mirror_words
from fourmill.demo.teachers import CHECKPOINTS, Settings, evaluate, train
from fourmill.demo.tokenizer_scenes import labels
from fourmill.scenes import render
from fourmill.scenes.cache import open_cache


@pytest.fixture(scope="module")
def scene_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rendered once for all smoke runs; 128 scenes are one batch of CLIP."""
    return str(tmp_path_factory.mktemp("scenes"))


def _settings(cache: str, steps: int = 2, start: Path | None = None) -> Settings:
    return Settings(steps=steps, scenes=128, validation=2, cache=cache, start=str(start) if start else None)


@pytest.mark.parametrize("name", TASKS)
def test_trainer_runs_saves_and_its_folder_reloads(name: str, tmp_path: Path, scene_cache: str) -> None:
    outcome = train(name, tmp_path / name, _settings(scene_cache))
    assert (outcome.task, outcome.steps) == (name, 2)
    assert outcome.watched in outcome.validation
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]  # nothing half-written beside it
    figures = evaluate(name, tmp_path / name, count=1)
    assert outcome.watched in figures


def test_training_by_steps_is_repeatable(tmp_path: Path, scene_cache: str) -> None:
    for folder in ("one", "two"):
        train("semseg", tmp_path / folder, _settings(scene_cache))
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two")]
    assert weights[0] == weights[1]


def test_training_on_starts_from_the_saved_weights(tmp_path: Path, scene_cache: str) -> None:
    """At a learning rate of zero the continued run saves what it started from, batch norm statistics aside."""
    first = train("semseg", tmp_path / "first", _settings(scene_cache))
    again = Settings(
        steps=1, scenes=128, validation=2, cache=scene_cache, start=str(tmp_path / "first"), rate=0.0, seed=5
    )
    train("semseg", tmp_path / "second", again)
    old, new = (_weights(tmp_path / folder) for folder in ("first", "second"))
    assert all(torch.equal(new[name], old[name]) for name in old if "running" not in name and "tracked" not in name)
    assert first.seed == 0


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_training_on_from_another_network_is_refused(tmp_path: Path, scene_cache: str) -> None:
    with pytest.raises(ValueError, match="holds a 'dpt' network; this teacher is a 'segformer'"):
        train("semseg", tmp_path / "semseg", _settings(scene_cache, start=CHECKPOINTS / "depth"))


def test_training_on_from_a_folder_with_a_missing_weight_is_refused(tmp_path: Path, scene_cache: str) -> None:
    from safetensors.torch import save_file

    shutil.copytree(CHECKPOINTS / "semseg", tmp_path / "broken")
    weights = _weights(tmp_path / "broken")
    del weights["decode_head.classifier.bias"]
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .*: decode_head\.classifier\.bias"):
        train("semseg", tmp_path / "semseg", _settings(scene_cache, start=tmp_path / "broken"))


def test_card_tells_every_run_and_what_a_longer_one_may_gain(tmp_path: Path) -> None:
    curve = [(step, step / 100) for step in range(10, 70, 10)]
    outcome = Outcome("semseg", "miou", 60, 960, 600.0, 1234, 0, curve, {"miou": 0.6})
    record("semseg", tmp_path, [outcome], {"miou": 0.5}, count=10)
    assert history(tmp_path) == [outcome]
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert "| miou | 0.500 |" in card
    assert (
        "(steps 40 to 60, with a falling learning rate) the validation figure `miou` went from 0.4000 to 0.6000" in card
    )
    record("semseg", tmp_path, [*history(tmp_path), outcome], {"miou": 0.5}, count=10)
    assert "2 runs, 1200 CPU seconds" in (tmp_path / "README.md").read_text()
    assert len(json.loads((tmp_path / "training.json").read_text())) == 2


def test_unknown_teacher_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known: depth, normal, semseg, panoptic, detection, sam, clip, caption"):
        train("dpeth", "unused", Settings(steps=1))


def test_cache_keeps_instances_and_normals_of_the_scene(tmp_path: Path) -> None:
    cache, scene = open_cache(tmp_path, seed=2, count=3, size=32), render(2, 1, 32)
    assert (cache.instances[1] == scene.instances).all()
    angles = normal_figures(cache.normals[1].astype(np.float32), scene.normals)
    assert angles["mean_deg"] < 0.3


def test_surfaces_number_floor_wall_and_each_object() -> None:
    semantic = np.array([[0, 1, 3, 3]], dtype=np.uint8)
    instances = np.array([[0, 0, 1, 2]], dtype=np.uint8)
    assert surfaces(semantic, instances).tolist() == [[0, 1, 2, 3]]


def test_mirrored_captions_swap_only_sides() -> None:
    assert mirror_words("a red box left of a cone, with two cones") == "a red box right of a cone, with two cones"


def test_mirrored_summaries_name_the_objects_from_the_other_side() -> None:
    plain = "an orange box, a red cone and a blue sphere on a gray floor before a white wall"
    assert mirror_summary(plain) == "a blue sphere, a red cone and an orange box on a gray floor before a white wall"
    assert mirror_summary("a red box on a gray floor before a blue wall").startswith("a red box on a gray floor")


@pytest.mark.parametrize(("name", "shape"), [("depth", (128, 128)), ("semseg", (128, 128)), ("clip", (128, 8, 8))])
def test_tokenizers_learn_from_what_the_shipped_teachers_say(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    cache = open_cache(tmp_path, VALIDATION_SEED, 2, 128)
    assert [value.shape for value in labels(name, cache, 2)] == [shape] * 2
