"""A dataset and a configuration whose steps take milliseconds, and processes that train together."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from fourmill.model.config import MaskingConfig, Mixture, ModelConfig, PretrainConfig
from fourmill.pipeline.manifest import Update, update_manifest
from fourmill.pipeline.shards import Spec, commit, write_shard
from fourmill.pipeline.store import open_store

ROOT = Path(__file__).parent.parent
NAMES = ("tok_normal", "tok_depth", "tok_caption")


def make_tokens(folder: Path | str, rows: int = 96) -> str:
    """Two shards without pictures: normals name a number from 0 to 3, depth and caption follow from it."""
    store, rng, records = open_store(folder), np.random.default_rng(0), []
    for shard in range(2):
        keys = [f"s{shard}-{row}" for row in range(rows)]
        kinds = rng.integers(0, 4, rows)
        grid = Spec(vocabulary=16, length=4, grid=(2, 2))
        columns: dict[str, tuple[list[Any], Spec]] = {
            "tok_normal": ([np.full(4, k, np.uint16) for k in kinds], grid),
            "tok_depth": ([np.arange(k, k + 4, dtype=np.uint16) for k in kinds], grid),
            "tok_caption": ([np.array([30, 40 + k, 31], np.uint16) for k in kinds], Spec(vocabulary=50)),
        }
        for name, (values, spec) in columns.items():
            records.append(commit(store, write_shard(name, shard, "0" * 16, keys, [values], spec, {"who": name}, {})))
    update_manifest(store, lambda _: Update(records, {r.producer: {} for r in records}))
    return str(folder)


def tiny_config(out: Path | str, **changes: Any) -> PretrainConfig:
    fields: dict[str, Any] = {
        "out": str(out),
        "inputs": NAMES[:2],
        "targets": NAMES[1:],
        "model": ModelConfig(dim=32, encoder_depth=1, decoder_depth=1, num_heads=2),
        "masking": MaskingConfig(
            num_input_tokens=4, num_target_tokens=6, num_sentinels=10, mixtures=(Mixture(target_default=0.3),)
        ),
        "batch_size": 8,
        "steps": 10,
        "warmup": 2,
        "lr": 4e-3,
        "eval_samples": 16,
        "num_threads": 1,
        "log_every": 1,
        "eval_every": 5,
        "checkpoint_every": 4,
        "device": "cpu",
        "tensorboard": False,
        **changes,
    }
    return PretrainConfig(**fields)


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def python(program: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that runs `program`."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, check=False)


def in_processes(count: int, folder: Path, work: Callable[[], None]) -> None:
    """Fork `count` processes that torch can join over gloo, each of which does `work`; RuntimeError if one fails.

    To be called where no tensor has been computed yet: torch's threads do not survive a fork.
    """
    store = folder / f"join-{os.getpid()}-{len(list(folder.glob('join-*')))}"
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            try:
                _join(rank, count, store)
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise RuntimeError(f"processes ended with {codes}")


def _join(rank: int, count: int, store: Path) -> None:
    from torch import distributed

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
