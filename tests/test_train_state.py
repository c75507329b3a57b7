"""Training states: only complete ones count, the newest are kept, and a run goes on from them bit by bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_pretrain as tiny
from safetensors.torch import load_file

from fourmill.model import state
from fourmill.model.config import PretrainConfig
from fourmill.model.train import Progress, pretrain
from fourmill.pipeline.store import open_store

EMA = {"ema": 0.9, "loss": "token", "schedule": "wsd", "accumulate": 2}


class StopError(RuntimeError):
    """Stands for a crash."""


def stop_at(step: int) -> Any:
    def progress(report: Progress) -> None:
        if report.step == step:
            raise StopError

    return progress


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.make_tokens(tmp_path_factory.mktemp("state") / "dataset")


@pytest.fixture(scope="module")
def undisturbed(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("state") / "undisturbed"
    pretrain(dataset, tiny.tiny_config(out, **EMA))
    return out


def outcome(out: Path) -> dict[str, Any]:
    """Everything that must not depend on stops: weights, averages, curve, tokens."""
    found = json.loads((out / "metrics.json").read_text())
    files = [load_file(out / folder / "model.safetensors") for folder in ("", "ema")]
    tensors = {f"{i}{k}": v.numpy().tobytes() for i, file in enumerate(files) for k, v in file.items()}
    return {**tensors, **{k: found[k] for k in ("curve", "input_tokens", "target_tokens", "held_out_ema", "mixture")}}


def test_run_that_was_stopped_three_times_has_the_same_curve_weights_and_averages(
    dataset: str, undisturbed: Path, tmp_path: Path
) -> None:
    config = tiny.tiny_config(tmp_path / "out", checkpoint_every=1, **EMA)
    for step in (2, 5, 9):
        with pytest.raises(StopError):
            pretrain(dataset, config, stop_at(step))
    pretrain(dataset, config)
    assert outcome(tmp_path / "out") == outcome(undisturbed)


def test_incomplete_state_is_not_read_and_goes(dataset: str, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = tiny.tiny_config(out, **EMA)
    with pytest.raises(StopError):
        pretrain(dataset, config, stop_at(9))
    assert state.complete_states(open_store(out)) == ["state/step-00000004", "state/step-00000008"]
    (out / "state" / "step-00000008" / "complete").unlink()
    seen: list[int] = []
    pretrain(dataset, config, lambda report: seen.append(report.step))
    assert seen[0] == 5
    assert outcome(out) == outcome(undisturbed)


@pytest.mark.parametrize("keep", [1, 3])
def test_newest_states_are_kept(dataset: str, tmp_path: Path, keep: int) -> None:
    config = tiny.tiny_config(tmp_path / "out", checkpoint_every=1, keep_states=keep)
    with pytest.raises(StopError):
        pretrain(dataset, config, stop_at(7))
    folders = [f"state/step-{step:08d}" for step in range(7 - keep, 7)]
    assert state.complete_states(open_store(tmp_path / "out")) == folders
    assert sorted(p.name for p in (tmp_path / "out" / "state").iterdir() if any(p.iterdir())) == [
        folder.removeprefix("state/") for folder in folders
    ]


def test_state_holds_no_pickle(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        pretrain(dataset, tiny.tiny_config(tmp_path / "out", ema=0.5), stop_at(5))
    folder = tmp_path / "out" / "state" / "step-00000004"
    (tensors,) = folder.glob("*.safetensors")
    assert {p.name for p in folder.iterdir()} == {tensors.name, "complete"}
    names = {name.partition(".")[0] for name in load_file(tensors)}
    assert names == {"model", "exp_avg", "exp_avg_sq", "step", "ema"}
    assert json.loads((folder / "complete").read_bytes())["step"] == 4


def test_state_of_an_earlier_version_is_refused_and_kept(dataset: str, tmp_path: Path) -> None:
    old = tmp_path / "out" / "state" / "step-00000004.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"step-00000004.safetensors is a state of an earlier Fourmill"):
        pretrain(dataset, tiny.tiny_config(tmp_path / "out"))
    assert old.read_bytes() == b"old"


KILLED_WHILE_SAVING = """
import os, signal, sys
from fourmill.model import state, train
from fourmill.model.config import PretrainConfig
finish, saves = state._Writer.finish, []
def killed(self, metadata, results):
    saves.append(1)
    if len(saves) == 2: os.kill(os.getpid(), signal.SIGKILL)
    finish(self, metadata, results)
state._Writer.finish = killed
train.pretrain(sys.argv[1], PretrainConfig.model_validate_json(sys.argv[2]))
"""


def test_process_killed_while_it_writes_a_state_goes_on_from_the_one_before(
    dataset: str, undisturbed: Path, tmp_path: Path
) -> None:
    config = tiny.tiny_config(tmp_path / "out", **EMA)
    done = tiny.python(KILLED_WHILE_SAVING, dataset, config.model_dump_json())
    assert done.returncode == -signal.SIGKILL, done.stderr
    half = tmp_path / "out" / "state" / "step-00000008"
    assert list(half.glob("*.safetensors"))
    assert not (half / "complete").exists()
    seen: list[int] = []
    pretrain(dataset, config, lambda report: seen.append(report.step))
    assert seen[0] == 5
    assert outcome(tmp_path / "out") == outcome(undisturbed)


SLOW_AT_STEP_5 = """
import pathlib, sys, time
from fourmill.cli import main
from fourmill.model import step
path, advance = sys.argv.pop(), step.Training.advance
def slowly(run, *rest):
    if run.step == 5:
        pathlib.Path(path + ".five").touch()
        time.sleep(3)
    return advance(run, *rest)
step.Training.advance = slowly
main("pretrain", "--config", path)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_ends_the_step_saves_it_and_exits_130(
    dataset: str, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = tiny.tiny_config(tmp_path / "out", checkpoint_every=1000, **EMA)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"dataset": dataset, "pretrain": config.model_dump(mode="json")}))
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_AT_STEP_5, str(path)], env=tiny.environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        while not Path(f"{path}.five").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "run the same command again to go on" in errors
    assert state.complete_states(open_store(config.out)) == ["state/step-00000006"]
    pretrain(dataset, config)
    assert outcome(tmp_path / "out") == outcome(undisturbed)


def test_settings_that_are_new_since_a_run_began_do_not_make_it_another(dataset: str, tmp_path: Path) -> None:
    config = tiny.tiny_config(tmp_path / "out", steps=2)
    first = pretrain(dataset, config)
    path = tmp_path / "out" / "pretrain.json"
    claim = json.loads(path.read_text())
    for name in ("schedule", "ema", "loss", "on_spike"):
        del claim["config"][name]
    path.write_text(json.dumps(claim))
    assert pretrain(dataset, config) == first


@pytest.mark.parametrize(
    "free",
    [
        {"activation_checkpointing": True},
        # Minutes of a C++ compiler on a busy machine.
        pytest.param({"compile": True}, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_blocks_compiled_or_recomputed_give_the_same_curve(
    dataset: str, undisturbed: Path, tmp_path: Path, free: dict[str, bool]
) -> None:
    config: PretrainConfig = tiny.tiny_config(tmp_path / "out", **EMA, **free)
    pretrain(dataset, config)
    curves = [[e["loss"] for e in outcome(out)["curve"]] for out in (tmp_path / "out", undisturbed)]
    assert curves[0] == pytest.approx(curves[1], rel=0, abs=1e-5)
