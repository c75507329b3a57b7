"""The paths of a training step that a GPU alone has: bfloat16, compiled blocks, FSDP over nccl, masking in a stream."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_pretrain as tiny
import torch
from torch import distributed

from fourmill.model.train import Progress, pretrain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SIZES = {"model": {"dim": 128, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 2}, "steps": 20}


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one process, in which FSDP has something to join."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/join", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_half_precision_and_compiled_blocks_learn_as_float32_does(tmp_path: Path) -> None:
    dataset = tiny.make_tokens(tmp_path / "dataset")
    plain = pretrain(dataset, tiny.tiny_config(tmp_path / "plain", device="cuda", **SIZES))
    fast = pretrain(dataset, tiny.tiny_config(tmp_path / "fast", device="cuda", autocast=True, compile=True, **SIZES))
    assert fast.curve[0]["loss"] == pytest.approx(plain.curve[0]["loss"], abs=0.03)
    assert fast.curve[-1]["loss"] < plain.curve[0]["loss"] - 0.3
    assert fast.held_out["tok_depth"] == pytest.approx(plain.held_out["tok_depth"], abs=0.2)


@pytest.mark.usefixtures("group")
def test_fsdp_on_one_gpu_stops_goes_on_and_ends_like_the_plain_model(tmp_path: Path) -> None:
    dataset = tiny.make_tokens(tmp_path / "dataset")
    options = {"device": "cuda", "autocast": True, "activation_checkpointing": True, "ema": 0.9, **SIZES}
    plain = pretrain(dataset, tiny.tiny_config(tmp_path / "plain", **options))

    def stop(report: Progress) -> None:
        if report.step == 6:
            raise RuntimeError("stopped")

    config = tiny.tiny_config(tmp_path / "sharded", strategy="fsdp", compile=True, **options)
    with pytest.raises(RuntimeError, match="stopped"):
        pretrain(dataset, config, stop)
    sharded = pretrain(dataset, config)
    assert [e["step"] for e in sharded.curve] == list(range(1, 21))
    assert sharded.curve[0]["loss"] == pytest.approx(plain.curve[0]["loss"], abs=0.03)
    assert sharded.held_out["tok_depth"] == pytest.approx(plain.held_out["tok_depth"], abs=0.2)


def test_known_gpu_reports_its_utilisation(tmp_path: Path) -> None:
    result = pretrain(
        tiny.make_tokens(tmp_path / "dataset"), tiny.tiny_config(tmp_path / "out", device="cuda", autocast=True)
    )
    known = any(part in torch.cuda.get_device_name() for part in ("H100", "H200", "A100"))
    assert (result.mfu is not None and 0 < result.mfu < 1) or not known


def test_masks_of_a_seed_are_the_same_in_every_run_on_a_gpu(tmp_path: Path) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    dataset = tiny.make_tokens(tmp_path / "dataset")
    first, second = (pretrain(dataset, tiny.tiny_config(tmp_path / out, device="cuda")) for out in "ab")
    assert first.target_tokens == second.target_tokens
    assert first.curve[0]["loss"] == pytest.approx(second.curve[0]["loss"], abs=1e-4)
