"""The runner on Ray: same bytes as in-process, and everything that can be killed, killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toys
import yaml
from helpers import all_records

from fourmill.config import Config
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.manifest.verify import verify
from fourmill.pipeline.runner import run
from fourmill.pipeline.shards import read_shard
from fourmill.pipeline.store import open_store

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ray_local(s3_server: str) -> Iterator[None]:  # the server first: workers inherit its environment
    """One local Ray for the module; the runner uses a Ray that is there already."""
    import ray

    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()


def digests(dataset: str) -> dict[str, str]:
    return {r.name: r.digest for r in all_records(read_manifest(open_store(dataset)))}


def quarantine(dataset: str, modality: str) -> dict[str, str]:
    store = open_store(dataset)
    shards = [read_shard(store, r.name) for r in read_manifest(store).records(modality)]
    return {k: v for s in shards for k, v in s.quarantine.items()}


def undisturbed(tmp_path: Path, **options: Any) -> dict[str, str]:
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "undisturbed"))
    run(Config(**toys.config(dataset, **options)))
    return digests(dataset)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("concurrent", [True, False])
def test_ray_makes_the_bytes_that_the_plain_process_makes(tmp_path: Path, concurrent: bool) -> None:
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "ray"))
    tree = toys.config(dataset, address="local")
    tree["ray"]["concurrent_stages"] = concurrent
    for name in tree["stages"]:
        tree["stages"][name] = {**tree["stages"][name], "cpus": 0.5, "workers": 2}
    assert run(Config(**tree)).ok
    assert digests(dataset) == undisturbed(tmp_path)


@pytest.mark.usefixtures("ray_local")
def test_sample_that_kills_its_worker_is_found_and_quarantined(tmp_path: Path) -> None:
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "ray"))
    report = run(Config(**toys.config(dataset, address="local", kill=["000000008"])))
    assert report.ok
    assert set(quarantine(dataset, "depth")) == {"000000008"}
    assert all(r.startswith("killed its worker") for r in quarantine(dataset, "depth").values())
    assert verify(open_store(dataset), read_manifest(open_store(dataset))).ok
    # What the killing labeler's options do not enter: ingest, crops and boxes. Boxes of its own shard lack the sample.
    names = ("rgb/", "alt_text/", "source/", "crop_settings/", "det/")
    others = {k: v for k, v in digests(dataset).items() if k.startswith(names) and not k.startswith("det/shard-000001")}
    assert len(others) == 5 * 4 - 1
    assert others.items() <= undisturbed(tmp_path).items()


def job(path: Path, *overrides: str, script: str = "pseudolabel", environment: dict[str, str] | None = None) -> Any:
    """Start a job as a user would, in a process group of its own."""
    command = [sys.executable, str(ROOT / "jobs" / f"{script}.py"), "--config", str(path), *overrides]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), **(environment or {})}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def kill_everything(process: Any) -> None:
    """SIGKILL the driver and every Ray process that it started, workers included."""
    children = _descendants(process.pid)
    for pid in [process.pid, *children]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def _descendants(pid: int) -> list[int]:
    table: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            table.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        for child in table.get(queue.pop(), []):
            found.append(child)
            queue.append(child)
    return found


def test_rerun_after_sigkill_of_driver_and_workers_gives_the_same_digests(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path, seconds=0.15)
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "killed"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(toys.config(dataset, address="local", seconds=0.15)))))
    process = job(path)
    deadline = time.monotonic() + 90
    while not list(open_store(dataset).list("depth/")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.02)
    kill_everything(process)
    done = [i.name for i in open_store(dataset).list("depth/") if i.name.endswith(".json")]
    assert len(done) < 4  # it was killed in the middle
    again = job(path)
    output = again.communicate(timeout=120)[0].decode()
    assert again.returncode == 0, output
    assert digests(dataset) == expected


def test_two_drivers_at_once_give_one_dataset_with_the_same_digests(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path, seconds=0.05)
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "two"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(toys.config(dataset, seconds=0.05)))))
    both = [job(path), job(path)]
    outputs = [p.communicate(timeout=120)[0].decode() for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert digests(dataset) == expected


def test_wrong_checkpoint_stops_the_job_with_one_line_and_code_2(tmp_path: Path) -> None:
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "d"))
    tree = {
        **toys.config(dataset),
        "labelers": {"depth": {"checkpoint": "demo:dept", "output": "metric"}},
        "stages": {},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(tree))))
    process = job(path)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 2
    assert "labelers.depth: no checkpoint 'demo:dept'" in output
    assert "Traceback" not in output


@pytest.mark.usefixtures("ray_local")
def test_dataset_in_object_storage_holds_the_bytes_of_the_one_on_disk(tmp_path: Path, s3_uri: str) -> None:
    dataset = toys.make_dataset(tmp_path, s3_uri)
    assert run(Config(**toys.config(dataset, address="local"))).ok
    assert digests(dataset) == undisturbed(tmp_path)
    assert verify(open_store(dataset), read_manifest(open_store(dataset))).ok
