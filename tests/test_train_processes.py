"""Several processes train the same model as one: DDP, FSDP2, another number of processes after a crash, torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_pretrain as tiny
import torch
import yaml
from safetensors.torch import load_file

from fourmill.model.train import Progress, pretrain
from fourmill.pipeline.store import open_store

pytestmark = pytest.mark.timeout(600)  # nine runs share one fixture; a busy machine takes minutes
CLOSE = {"rel": 0, "abs": 1e-5}


def train(folder: Path, out: str, crash: int | None = None, **changes: Any) -> None:
    """Train to the end, or to a crash in every process at step `crash`; whoever reports notes its rank and the step."""

    def progress(report: Progress) -> None:
        with (folder / f"{out}.reports").open("a") as file:
            file.write(f"{os.environ.get('RANK', '0')} {report.step}\n")
        if report.step == crash:
            raise RuntimeError(f"a crash at step {crash}, as the test wants it")

    pretrain(str(folder / "dataset"), tiny.tiny_config(folder / out, **changes), progress)


def scenarios(folder: Path) -> None:
    """All that needs two processes, in an interpreter that has computed nothing, so that it can be forked."""
    tiny.make_tokens(folder / "dataset")

    def run(count: int, out: str, **changes: Any) -> None:
        tiny.in_processes(count, folder, partial(train, folder, out, **changes))

    run(1, "one", accumulate=2, ema=0.5)
    run(2, "ddp", ema=0.5)
    run(2, "fsdp", strategy="fsdp", ema=0.5)
    run(1, "four_slices", accumulate=4, loss="token")
    run(2, "fsdp_two_slices", strategy="fsdp", accumulate=2, loss="token")
    for count, out in ((2, "to_one"), (1, "to_two")):
        with pytest.raises(RuntimeError, match=r"processes ended with \[1"):
            run(count, out, crash=6, strategy="fsdp", accumulate=2 // count, ema=0.5)
    run(1, "to_one", accumulate=2, ema=0.5)
    run(2, "to_two", strategy="fsdp", ema=0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    program = "import sys, pathlib, test_train_processes as t; t.scenarios(pathlib.Path(sys.argv[1]))"
    done = tiny.python(program, str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def result(folder: Path, out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / out / "metrics.json").read_text())
    return found


def losses(folder: Path, out: str) -> list[float]:
    return [entry["loss"] for entry in result(folder, out)["curve"]]


@pytest.mark.parametrize(
    ("out", "like"),
    [("ddp", "one"), ("fsdp", "one"), ("fsdp_two_slices", "four_slices"), ("to_one", "one"), ("to_two", "one")],
)
def test_curve_does_not_depend_on_how_slices_lie_on_processes(runs: Path, out: str, like: str) -> None:
    assert len(losses(runs, out)) == 10
    assert losses(runs, out) == pytest.approx(losses(runs, like), **CLOSE)
    norms, wanted = ([entry["grad_norm"] for entry in result(runs, one)["curve"]] for one in (out, like))
    assert norms == pytest.approx(wanted, rel=0, abs=5e-5)
    for figure in ("held_out", "held_out_ema"):
        assert result(runs, out)[figure] == pytest.approx(result(runs, like)[figure], **CLOSE)
    for figure in ("frequencies", "target_tokens", "input_tokens", "mixture"):
        assert result(runs, out)[figure] == result(runs, like)[figure]


@pytest.mark.parametrize("out", ["ddp", "fsdp", "to_two", "to_one"])
def test_checkpoints_hold_whole_models_equal_to_that_of_one_process(runs: Path, out: str) -> None:
    for name in ("model.safetensors", "ema/model.safetensors"):
        found, wanted = load_file(runs / out / name), load_file(runs / "one" / name)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-4, msg=f"{name} {key}")
    plain, averaged = (load_file(runs / out / n)["mask_token"] for n in ("model.safetensors", "ema/model.safetensors"))
    assert not torch.equal(plain, averaged)


def test_first_process_alone_reports(runs: Path) -> None:
    assert (runs / "ddp.reports").read_text().splitlines() == [f"0 {step}" for step in range(1, 11)]


def test_run_goes_on_from_the_state_and_not_from_the_start(runs: Path) -> None:
    steps = [int(line.split()[1]) for line in (runs / "to_two.reports").read_text().splitlines()]
    assert steps == [*range(1, 7), *range(5, 11)]  # the state was of step 4, the crash came at step 6


def test_token_loss_differs_from_the_modality_loss(runs: Path) -> None:
    assert losses(runs, "four_slices")[0] != pytest.approx(losses(runs, "one")[0], abs=1e-3)


def test_torchrun_starts_the_job_in_two_processes(tmp_path: Path) -> None:
    config = tiny.tiny_config(tmp_path / "out", steps=4, log_every=2)
    section = config.model_dump(mode="json")
    dataset = tiny.make_tokens(tmp_path / "dataset")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"dataset": dataset, "pretrain": section}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = [str(tiny.ROOT / "jobs" / "pretrain.py"), "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(
        [*command, *job], env=tiny.environment(), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 2/4  loss ") == 1
    assert done.stdout.count("step 4/4  loss ") == 1
    assert {i.name for i in open_store(config.out).list()} >= {"model.safetensors", "metrics.json", "tokenizers.json"}
    assert not list(open_store(config.out).names("state/"))


def test_batch_that_cannot_be_shared_out_is_refused() -> None:
    program = (
        "import tiny_pretrain as t\nfrom fourmill.model.train import pretrain\npretrain('x', t.tiny_config('unused'))"
    )
    done = tiny.python(program, WORLD_SIZE="3", RANK="0")
    assert "batch_size 8 is not a multiple of 3 processes x accumulate 1" in done.stderr
