"""`ray job submit --working-dir . -- python jobs/…` on a cluster of its own: labels, tokens, a model."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import _free_ports

from fourmill.pipeline.ingest import IngestConfig, ingest
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.manifest.verify import verify
from fourmill.pipeline.store import open_store
from fourmill.scenes import write_corpus

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).parent / "ray"


@pytest.fixture(scope="module")
def cluster(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A running head node; yields the environment in which `ray job submit` reaches it."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(secrets.token_hex(32))
    port, dashboard, agent, agent_grpc, client = _free_ports(5)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment.pop("PYTHONPATH", None)
    environment["PATH"] = (
        f"{RAY.parent}{os.pathsep}{environment['PATH']}"  # `python` must be the one with the dependencies
    )
    start = [
        str(RAY),
        "start",
        "--head",
        f"--port={port}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        # The default ports may be another Ray's on this machine: without its own the head cannot run jobs.
        f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--ray-client-server-port={client}",
    ]
    start += ["--num-cpus=2", "--object-store-memory=200000000", "--disable-usage-stats", "--block"]
    head = subprocess.Popen(
        start, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        from test_runner import kill_everything

        kill_everything(head)


def submit(cluster: dict[str, str], *command: str) -> str:
    """Run a job on the cluster to its end; AssertionError with its log if it fails."""
    retry = [str(RAY), "job", "list"]
    for _ in range(60):  # the dashboard answers some seconds after the head is up
        if subprocess.run(retry, env=cluster, capture_output=True, check=False).returncode == 0:
            break
    full = [str(RAY), "job", "submit", "--working-dir", ".", "--", "python", *command]
    for _ in range(10):
        done = subprocess.run(full, env=cluster, cwd=ROOT, capture_output=True, text=True, check=False)
        if "No available agent to submit job, please try again later" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def corpus(tmp_path: Path, dataset: str) -> list[str]:
    """24 scenes ingested; the arguments that every job gets."""
    write_corpus(tmp_path / "corpus", count=24, size=128, seed=7)
    ingest(str(tmp_path / "corpus"), dataset, IngestConfig(shard_size=12))
    return ["--config", "configs/demo.yaml", f"dataset={dataset}"]


@pytest.mark.timeout(600)
def test_submitted_jobs_label_tokenize_and_train_on_a_dataset_in_object_storage(
    tmp_path: Path, cluster: dict[str, str], s3_uri: str
) -> None:
    _check_line(tmp_path, cluster, s3_uri, f"{s3_uri}-model")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_submitted_jobs_label_tokenize_and_train_on_a_local_dataset(tmp_path: Path, cluster: dict[str, str]) -> None:
    _check_line(tmp_path, cluster, str(tmp_path / "dataset"), str(tmp_path / "model"))


def _check_line(tmp_path: Path, cluster: dict[str, str], dataset: str, model: str) -> None:
    arguments = corpus(tmp_path, dataset)
    submit(cluster, "jobs/pseudolabel.py", *arguments)
    submit(cluster, "jobs/tokenize.py", *arguments)
    store = open_store(dataset)
    manifest = read_manifest(store)
    assert {"depth", "semseg", "clip", "caption", "det", "tok_depth", "tok_det", "tok_rgb"} <= set(manifest.modalities)
    assert verify(store, manifest).ok
    small = ["pretrain.steps=3", "pretrain.batch_size=8", "pretrain.autocast=false", f"pretrain.out={model}"]
    submit(cluster, "jobs/pretrain.py", *arguments, *small)
    assert json.loads(open_store(model).get("metrics.json"))["steps"] == 3
    assert open_store(model).head("model.safetensors") is not None


def test_relative_dataset_is_refused_in_a_submitted_job(cluster: dict[str, str]) -> None:
    with pytest.raises(AssertionError, match="is relative, and a submitted job runs in Ray's temporary copy"):
        submit(cluster, "jobs/pseudolabel.py", "--config", "configs/demo.yaml")
