"""Training a tokenizer by several processes under torchrun: one network, one run's examples, one checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import config, training

from fourmill.tokenizers.networks.weights import pack
from fourmill.tokenizers.training.workers import Workers, join_workers


@pytest.mark.parametrize("parts", [1, 2])
def test_processes_share_the_rows_of_a_step(parts: int) -> None:
    rows = list(range(16))
    found = [Workers("cpu", rank, 2).share(rows, part, parts) for part in range(parts) for rank in range(2)]
    assert [row for share in found for row in share] == rows
    assert {len(share) for share in found} == {8 // parts}


def test_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size 16 is not a multiple of 3 processes x accumulate 1"):
        join_workers("cpu", 16, 1)


pytestmark = pytest.mark.timeout(400)  # imports of torch in two more processes, on a busy machine

PROCESS = """
import json, sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from fourmill.tokenizers.training.run import train_spatial
from fourmill.tokenizers.networks.weights import pack
from tiny_training import config, examples_of, training

out = Path(sys.argv[3])
for name, network in json.loads(sys.argv[4]).items():
    run = training(config(out, network=network, steps=16, ema=0.9, state=str(out / f"state-{name}"), save_every=8))
    run.fit()
    file = out / f"{name}-{run.workers.count}-{run.workers.rank}"
    with run.average.applied():
        file.write_bytes(pack(run.network, half=False))
    file.with_suffix(".json").write_text(json.dumps(run.losses))
chosen = config(out / "published", steps=10)
result = train_spatial(examples_of(chosen), chosen)
(out / f"figures-{run.workers.rank}.json").write_text(json.dumps(result.figures))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes, and one, ended with."""
    out, tests = tmp_path_factory.mktemp("processes"), Path(__file__).parent
    (out / "process.py").write_text(PROCESS)
    networks = {"vq": {}, "fsq": {"quantizer": "fsq", "levels": [5, 5, 5]}}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(out / "process.py"), str(tests.parent), str(tests), str(out), json.dumps(networks)]
    found = subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    for name, network in networks.items():
        run = training(config(out, network=network, steps=16, ema=0.9))
        run.fit()
        with run.average.applied():
            (out / f"{name}-1-0").write_bytes(pack(run.network, half=False))
        (out / f"{name}-1-0.json").write_text(json.dumps(run.losses))
    return out


@pytest.mark.parametrize("name", ["vq", "fsq"])
def test_two_processes_end_with_one_network_and_codebook(two_processes: Path, name: str) -> None:
    first, second = ((two_processes / f"{name}-2-{rank}").read_bytes() for rank in (0, 1))
    assert first == second


def test_first_of_two_processes_measures_and_publishes(two_processes: Path) -> None:
    first, second = (json.loads((two_processes / f"figures-{rank}.json").read_text()) for rank in (0, 1))
    assert (list(first), second) == (["abs_rel"], {})
    assert (two_processes / "published" / "config.json").is_file()


def test_two_processes_learn_what_one_does(two_processes: Path) -> None:
    """Gradients are summed in another order, so not to the last bit; k-means begins from other samples, too."""
    losses = {
        (name, count): json.loads((two_processes / f"{name}-{count}-0.json").read_text())
        for name in ("vq", "fsq")
        for count in (1, 2)
    }
    assert losses["fsq", 2] == pytest.approx(losses["fsq", 1], rel=1e-4)
    assert losses["vq", 2][:1] == pytest.approx(losses["vq", 1][:1], rel=1e-4)  # before it is quantized
    assert losses["vq", 2][-1] == pytest.approx(losses["vq", 1][-1], rel=0.2)


def test_lfq_of_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourmill.tokenizers.training.fitting.join_workers", lambda *given: Workers("cpu", 0, 2))
    with pytest.raises(ValueError, match="'lfq' learns in one process only"):
        training(config(tmp_path, network={"quantizer": "lfq"}))
