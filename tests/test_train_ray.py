"""Ray Train runs the same training in its workers. Run serially: it starts a Ray cluster of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_pretrain as tiny

from fourmill.model.train import pretrain


@pytest.fixture
def ray_local(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import ray

    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default Ray's workers give way to everything else
    monkeypatch.setenv("PYTHONPATH", tiny.environment()["PYTHONPATH"])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_local")
def test_two_ray_workers_train_like_one_process_with_two_slices(tmp_path: Path) -> None:
    dataset = tiny.make_tokens(tmp_path / "dataset")
    result = pretrain(dataset, tiny.tiny_config(tmp_path / "ray", workers=2, strategy="fsdp"))
    one = pretrain(dataset, tiny.tiny_config(tmp_path / "one", accumulate=2))
    losses, wanted = ([entry["loss"] for entry in r.curve] for r in (result, one))
    assert losses == pytest.approx(wanted, rel=0, abs=1e-5)
    claim = json.loads((tmp_path / "ray" / "pretrain.json").read_text())
    assert claim["config"]["workers"] is None, "workers do not start workers"
