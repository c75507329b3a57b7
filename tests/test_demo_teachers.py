"""The demo teachers that ship understand scenes they never saw, at their own size and at another."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourmill.demo.teacher_tasks import TASKS
from fourmill.demo.teachers import CHECKPOINTS, evaluate

# (at least, at most): well within the figures in each folder's README.md, as a few dozen scenes say little.
SHIPPED: dict[str, dict[str, tuple[float, float]]] = {
    "depth": {"absrel": (0, 0.12), "aligned_absrel": (0, 0.12), "aligned_delta1": (0.90, 1)},
    "normal": {"median_deg": (0, 5), "within_30": (0.85, 1)},
    "semseg": {"miou": (0.72, 1), "pixel_accuracy": (0.93, 1)},
    "panoptic": {"pq": (0.5, 1)},
    "detection": {"ap50": (0.80, 1)},
    "sam": {"best_iou": (0.65, 1)},
    "clip": {"image_to_text_r1": (0.50, 1)},
    "caption": {"word_f1": (0.75, 1), "phrase_f1": (0.45, 1)},
}
# Each point is a pass of SAM's decoder; the other networks see a picture once.
COUNT = {"sam": 12}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("size", [128, 224])
def test_shipped_teacher_understands_unseen_scenes(name: str, size: int) -> None:
    figures = evaluate(name, CHECKPOINTS / name, count=COUNT.get(name, 48), size=size)
    outside = {key: figures[key] for key, (low, high) in SHIPPED[name].items() if not low <= figures[key] <= high}
    assert not outside


@pytest.mark.parametrize("name", TASKS)
def test_shipped_folder_carries_a_card_and_no_paths(name: str) -> None:
    folder = CHECKPOINTS / name
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "understands only the procedural rooms" in card
    for path in folder.glob("*.json"):
        assert '"/' not in path.read_text(), f"{path.name} holds an absolute path"


def test_all_shipped_teachers_together_stay_small() -> None:
    assert sum(_bytes(CHECKPOINTS / name) for name in TASKS) <= 26_000_000


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
