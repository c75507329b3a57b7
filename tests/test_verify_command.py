"""`fourmill manifest verify` as a script meets it: exit codes, JSON, words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from damage import build, object_name
from typer.testing import CliRunner, Result

from fourmill.cli import app
from fourmill.pipeline.manifest.verify import CODES
from fourmill.pipeline.store import LocalStore

ROOT = Path(__file__).parent.parent


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    found = LocalStore(tmp_path / "dataset")
    build(found)
    return found


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["manifest", "verify", *arguments], standalone_mode=False)


def test_sound_is_0_and_wrong_is_1_in_json_with_code_object_and_place(store: LocalStore) -> None:
    assert call(store.uri).return_value == 0
    store.delete(object_name("depth", 1))
    done = call(store.uri, "--json")
    tree = json.loads(done.stdout)
    assert (done.return_value, tree["ok"], tree["deep"], tree["objects"], tree["checked"]) == (1, False, False, 21, 21)
    assert tree["counts"] == {"missing-object": 1}
    assert tree["problems"] == [
        {
            "code": "missing-object",
            "name": object_name("depth", 1),
            "what": "the object is gone",
            "modality": "depth",
            "shard": 1,
            "row": None,
            "key": None,
            "warning": False,
        }
    ]


def test_words_say_what_was_read_and_what_was_not(store: LocalStore) -> None:
    size = sum(p.stat().st_size for p in (store.root / "depth").glob("shard-00000[12]*.arrow"))
    assert call(store.uri, "--deep", "--modality", "depth", "--shards", "1:").stdout.splitlines() == [
        f"snapshot 1: read 2 record tables, read 2 of 21 objects ({size / 1e6:,.1f} MB): all sound",
        "  not looked at: 18 objects of other modalities",
        "  not looked at: 1 objects left out by --shards",
        "  not checked: keys that stand in a chosen shard and in one that is not",
    ]
    store.delete(object_name("depth", 1))
    assert call(store.uri).stdout.splitlines() == [
        f"missing-object: {object_name('depth', 1)}: the object is gone",
        "snapshot 1: read 7 record tables, asked for existence and size of 21 of 21 objects: 1 problem",
        "  1 x missing-object: a shard object is gone",
        "  not checked: what is in the objects; --deep reads them",
    ]


@pytest.mark.parametrize(("shards", "checked"), [("1", 7), ("1:", 14), (":1", 7), ("0:2", 14), ("7:9", 0)])
def test_shards_are_given_as_a_range_or_one(store: LocalStore, shards: str, checked: int) -> None:
    assert json.loads(call(store.uri, "--shards", shards, "--json").stdout)["checked"] == checked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shards", "1-3"], "A:B with shard numbers is needed"),
        (["--sample", "2"], "a share of 2 of the shards"),
        (["--modality", "dpeth"], "did you mean 'depth'"),
        (["--resume", "x"], "--resume without --deep has nothing to resume"),
        (["--at", "9"], "no manifest 9"),
    ],
)
def test_misuse_is_told_before_anything_is_read(store: LocalStore, arguments: list[str], words: str) -> None:
    done = call(store.uri, *arguments)
    assert words in str(done.exception)


def test_processes_and_a_journal_work_from_the_command_line(store: LocalStore, tmp_path: Path) -> None:
    code = "import sys; from fourmill.cli import main; main()"
    command = [sys.executable, "-c", code, "manifest", "verify", store.uri, "--deep", "--json"]
    command += ["--processes", "2", "--resume", str(tmp_path / "journal")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for read, resumed in ((21, 0), (0, 21)):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        tree = json.loads(done.stdout)
        assert (tree["read"], tree["resumed"], tree["problems"]) == (read, resumed, [])


def test_help_shows_examples() -> None:
    assert "fourmill manifest verify s3://bucket/x" in call("--help").stdout


def test_the_page_for_users_names_every_code() -> None:
    page = (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8")
    table = page[page.index("| code | what it means |") :]
    named = [line.split("`")[1] for line in table[: table.index("\n## ")].splitlines() if line.startswith("| `")]
    assert sorted(named) == sorted(CODES)
