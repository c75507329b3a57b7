"""`fourmill manifest plan` as a script and a person meet it: exit codes, JSON, words, an estimate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toys
import yaml
from typer.testing import CliRunner, Result

from fourmill.cli import app
from fourmill.config import Config
from fourmill.pipeline.runner import run
from fourmill.pipeline.store import open_store


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """Labelled, and the configuration beside it."""
    uri = toys.make_dataset(tmp_path, str(tmp_path / "dataset"))
    tree = json.loads(json.dumps(toys.config(uri, seconds=0.01)))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    run(Config(**tree))
    return uri


def plan(dataset: str, *arguments: str) -> Result:
    config = str(Path(dataset).parent / "c.yaml")
    return CliRunner().invoke(app, ["manifest", "plan", dataset, "-c", config, *arguments], standalone_mode=False)


def test_nothing_to_do_is_0(dataset: str) -> None:
    done = plan(dataset)
    assert (done.return_value, "nothing to do" in done.stdout) == (0, True)


def test_work_to_do_is_1_and_told_in_words_with_what_it_may_take(dataset: str) -> None:
    done = plan(dataset, "labelers.bright.gain=0.5")
    assert done.return_value == 1
    words = " ".join(done.stdout.replace("│", " ").split())
    assert "depth: stale:" in words
    assert "worker hours" in words


def test_json_has_every_stage_with_counts_and_reasons(dataset: str) -> None:
    done = plan(dataset, "labelers.bright.gain=0.5", "--json")
    tree = json.loads(done.stdout)
    assert (done.return_value, tree["snapshot"], tree["units"], tree["unpublished"]) == (1, 2, 8, 0)
    assert tree["stages"]["labels"]["reasons"] == {"depth: stale: config.gain was 1.0, is 0.5": 4}
    assert tree["stages"]["geometry"]["shards_done"] == 4


def test_only_the_stages_asked_for_and_what_they_read_are_planned(dataset: str) -> None:
    tree = json.loads(plan(dataset, "--stage", "labels", "--json").stdout)
    assert list(tree["stages"]) == ["geometry", "labels"]
    assert "did you mean 'labels'" in str(plan(dataset, "--stage", "lables").exception)


def test_recheck_finds_what_the_store_has_lost(dataset: str) -> None:
    store = open_store(dataset)
    store.delete(next(info.name for info in store.list("depth/") if info.name.endswith(".arrow")))
    assert plan(dataset).return_value == 0
    done = plan(dataset, "--recheck", "--json")
    reasons = json.loads(done.stdout)["stages"]["labels"]["reasons"]
    assert reasons == {"depth: lost: the manifest names it, the store does not have it": 1}
