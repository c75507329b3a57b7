"""The command line: exit codes, readable errors, and the manifest commands on a small dataset."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toys
import yaml

from fourmill.config import Config
from fourmill.pipeline.runner import run
from fourmill.pipeline.store import open_store

ROOT = Path(__file__).parent.parent


def fourmill(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    code = "import sys; from fourmill.cli import main; main()"
    env_path = f"{ROOT}:{ROOT / 'tests'}"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        capture_output=True,
        check=False,
        text=True,
        env={**_env(), "PYTHONPATH": env_path},
    )


def _env() -> dict[str, str]:
    import os

    return dict(os.environ)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    name = toys.make_dataset(tmp_path, str(tmp_path / "dataset"), count=12)
    run(Config(**toys.config(name)))
    return name


def test_show_as_json_tells_rows_presence_producer_and_vocabulary_use(dataset: str) -> None:
    done = fourmill("manifest", "show", dataset, "--json")
    assert done.returncode == 0, done.stderr
    tree: dict[str, Any] = json.loads(done.stdout)
    by_name = {m["name"]: m for m in tree["modalities"]}
    assert tree["corpus"]["samples"] == 12
    assert (by_name["depth"]["shards"], by_name["depth"]["rows"], by_name["depth"]["present"]) == (2, 12, 12)
    assert by_name["depth"]["producers"][0]["class"] == "Brightness"
    assert by_name["tok_depth"]["vocabulary"] == 256
    assert 16 < by_name["tok_depth"]["used"] < 256


def test_show_as_table_names_every_modality(dataset: str) -> None:
    done = fourmill("manifest", "show", dataset)
    assert done.returncode == 0, done.stderr
    for name in ("rgb", "alt_text", "source", "crop_settings", "depth", "semseg", "tok_depth", "det"):
        assert name in done.stdout


def test_verify_says_sound_with_0_and_damaged_with_1(dataset: str) -> None:
    assert fourmill("manifest", "verify", dataset).returncode == 0
    store = open_store(dataset)
    store.delete(next(i.name for i in store.list("depth/") if i.name.endswith(".arrow")))
    done = fourmill("manifest", "verify", dataset)
    assert done.returncode == 1
    assert "the object is gone" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["manifest", "show", "nowhere"], "no manifest"),
        (["pseudolabel", "--config", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        (["pseudolabel"], "--config"),
        (["ingest", "nowhere", "x"], "nowhere"),
        (["scenes", "x", "--size", "4"], "--size"),
        (["psuedolabel"], "psuedolabel"),
        (["manifest", "show", "gs://bucket"], "unknown kind of store 'gs://bucket'"),
    ],
)
def test_misuse_is_one_readable_message_and_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = fourmill(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_prints_the_plan_and_does_nothing(tmp_path: Path, dataset: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(toys.config(dataset, gain=2.0)))))
    before = [i.name for i in open_store(dataset).list()]
    done = fourmill("pseudolabel", "--config", str(path), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "2 x depth: stale: config.gain was 1.0, is 2.0" in done.stdout
    assert "2 x tok_depth: stale: its input depth changed (config.gain was 1.0, is 2.0)" in done.stdout
    assert "stage geometry" in done.stdout
    assert [i.name for i in open_store(dataset).list()] == before


def test_catalogue_is_listed(tmp_path: Path) -> None:
    done = fourmill("modalities", cwd=tmp_path)
    assert "tok_depth" in done.stdout
    assert "per crop" in done.stdout


def test_interrupt_says_how_to_go_on(tmp_path: Path, dataset: str) -> None:
    import signal
    import time

    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(toys.config(dataset, gain=3.0, seconds=0.5)))))
    # Tests that were started in the background inherit an ignored SIGINT, and would hand it on.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "; from fourmill.cli import main; main()"
    command = [sys.executable, "-c", code, "pseudolabel", "--config", str(path)]
    env = {**_env(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    before = len(list(open_store(dataset).list("depth/")))
    while len(list(open_store(dataset).list("depth/"))) == before:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "interrupted; run the same command again to go on" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
