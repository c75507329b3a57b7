"""The table of teachers, and `fourmill labelers check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fourmill.checkpoints import DEMO_FOLDER
from fourmill.cli import app
from fourmill.labelers import LABELERS
from fourmill.labelers.catalogue import ENTRIES, entry, is_present, rows
from fourmill.labelers.check import check
from fourmill.modalities import CATALOGUE
from fourmill.pipeline.component import Batch
from fourmill.scenes import render


def test_every_line_can_be_put_into_a_configuration() -> None:
    assert len({e.id for e in ENTRIES}) == len(ENTRIES)
    for line in ENTRIES:
        fields = LABELERS.load(line.labeler).Config(**line.configuration)
        assert fields.model_dump()["checkpoint"] == line.checkpoint
        assert set(line.makes) <= set(CATALOGUE)


def test_lines_make_what_their_labelers_make() -> None:
    for line in (e for e in ENTRIES if e.checkpoint.startswith("demo:")):
        built = LABELERS.build(line.labeler, line.configuration)
        assert set(line.makes) <= set(built.makes), line.id


def test_all_seven_teachers_have_a_demo_checkpoint_and_a_free_published_one() -> None:
    seven = {"depth", "normal", "segmentation", "detection", "clip", "sam", "caption"}
    assert {e.labeler for e in ENTRIES if e.checkpoint.startswith("demo:")} == seven
    assert {e.labeler for e in ENTRIES if not e.checkpoint.startswith("demo:") and not e.non_commercial} >= seven
    assert all((DEMO_FOLDER / e.checkpoint[5:]).is_dir() for e in ENTRIES if e.checkpoint.startswith("demo:"))


def test_non_commercial_weights_are_marked() -> None:
    assert entry("omnidata-normal").non_commercial
    assert entry("depth-anything-v2-large").non_commercial
    assert not entry("depth-anything-v2-small").non_commercial


def test_presence_is_looked_up_where_checkpoints_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert is_present("demo:depth")
    assert is_present(str(tmp_path))
    assert not is_present("Intel/dpt-large")
    assert {r["id"] for r in rows() if r["present"]} >= {"demo:depth", "demo:sam"}


def test_unknown_teacher_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown teacher 'dpt-hybird'; did you mean 'dpt-hybrid'"):
        check("dpt-hybird")


def test_check_runs_a_teacher_on_a_photo_and_draws_it(tmp_path: Path) -> None:
    photo, out = tmp_path / "photo.png", tmp_path / "out" / "depth.png"
    Image.fromarray(render(10, 3, 160).image[:, 10:150]).save(photo)
    found = check("demo:depth", str(photo), str(out), size=96, batch=2)
    assert found.problems == {}
    assert found.outputs["depth"].startswith("float32 (96, 96), ")
    assert found.outputs["depth"].endswith(", metric")
    assert (found.licence, found.checkpoint, found.batch) == ("apache-2.0", "demo:depth", 2)
    assert found.gflops > 0.1
    assert found.megabytes > 1
    with Image.open(out) as drawn:
        assert drawn.width > 2 * 224


def test_check_takes_any_labeler_with_a_checkpoint() -> None:
    found = check("clip", options={"checkpoint": "demo:clip"}, size=128, batch=1)
    assert set(found.outputs) == {"clip", "clip_global"}


def test_check_refuses_what_does_not_look_at_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="annotated_boxes reads source, crop_settings, not a picture alone"):
        check("annotated_boxes")
    (tmp_path / "no.jpg").write_text("words")
    with pytest.raises(ValueError, match=r"cannot use the picture .*no\.jpg: not an image"):
        check("demo:depth", str(tmp_path / "no.jpg"))


def test_check_says_what_would_be_quarantined(monkeypatch: pytest.MonkeyPatch) -> None:
    from fourmill.labelers.depth import DepthLabeler

    def dead(self: Any, batch: Batch) -> dict[str, list[Any]]:
        return {"depth": [np.full((32, 32), 2.0, np.float32)] * len(batch)}

    monkeypatch.setattr(DepthLabeler, "run", dead)
    assert check("demo:depth", size=32, batch=1).problems == {"depth": "constant output: every value is 2"}


def test_command_prints_the_table_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    app(args=["labelers", "--json"], standalone_mode=False)
    table = json.loads(capsys.readouterr().out)
    assert set(table["labelers"]) == set(LABELERS.table)
    line = next(t for t in table["teachers"] if t["id"] == "dpt-hybrid")
    assert (line["checkpoint"], line["makes"], line["pixels"]) == ("Intel/dpt-hybrid-midas", ["depth"], 384)
