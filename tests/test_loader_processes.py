"""Loaders in other processes: pickled, forked, killed; in threads. No shared memory anywhere."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loader_toys import TOKENS, Toy, config

from fourmill.model.data import TokenDataset
from fourmill.model.loader import Loader, read_ahead


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("processes") / "toy", 4)


def told(loader: Loader, steps: int = 5) -> list[Any]:
    """What a loader delivers, as plain values."""
    found = []
    for _ in range(steps):
        (batch,) = next(loader)
        pixels = None if batch.pixels is None else int(batch.pixels.sum())
        found.append((batch.keys, batch.tokens["tok_depth"].tolist(), pixels, batch.state))
    return found


def _work(loader: Loader, results: Queue[Any]) -> None:
    results.put(told(loader))


def in_process(method: str, loader: Loader) -> list[Any]:
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=_work, args=(loader, results))
    process.start()
    found: list[Any] = results.get(timeout=120)
    process.join()
    assert process.exitcode == 0
    return found


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_goes_on_in_another_process_where_it_was(toy: Toy, method: str) -> None:
    loader = Loader(toy.open(), 6, 1)
    told(loader, 3)  # maps, threads and an order are there when the process is made
    got = in_process(method, loader)
    assert got == told(loader)


def test_fork_while_another_thread_holds_the_lock_does_not_hang(toy: Toy) -> None:
    loader = Loader(toy.open(names=TOKENS), 6, 1)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with loader.dataset.shards.lock:  # type: ignore[union-attr]
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        got = in_process("fork", loader)
    finally:
        release.set()
        thread.join()
    assert got == told(loader)


def test_pickled_dataset_stays_with_its_snapshot(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "toy", 2, pictures=False)
    data = toy.open(names=TOKENS)
    pickled = pickle.dumps(data)
    toy.publish([record for shard in (2, 3) for record in toy._records(shard, False)])
    again = pickle.loads(pickled)
    assert (len(again), len(toy.open(names=TOKENS))) == (20, 40)
    assert again.batch(np.arange(20), np.zeros(20, int)).keys == data.keys(np.arange(20))


def _read_for_ever(uri: str, ready: Any) -> None:
    for step, _ in enumerate(read_ahead(Loader(TokenDataset(uri, config(cache_bytes=0)), 6, 0))):
        if step == 3:
            ready.set()


def test_killed_process_leaves_no_shared_memory_and_no_file(toy: Toy) -> None:
    def left() -> set[str]:
        return {*os.listdir("/dev/shm"), *(str(p) for p in Path(toy.uri).rglob("*"))}

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_read_for_ever, args=(toy.uri, ready))
    before = left()  # with the semaphores of the event
    process.start()
    assert ready.wait(60)
    time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert {name for name in left() - before if str(process.pid) in name or "fourmill" in name} == set()
    assert {name for name in left() - before if name.startswith(toy.uri)} == set()


def test_threads_read_the_right_values_while_shards_are_closed_under_them(toy: Toy) -> None:
    data = toy.open(names=TOKENS)
    want = data.batch(np.arange(40), np.zeros(40, int))
    data.shards.most = 1
    wrong: list[str] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            order = rng.permutation(40)[:8]
            got = data.batch(order, np.zeros(8, int))
            if not torch.equal(got.tokens["tok_depth"], want.tokens["tok_depth"][order]):
                wrong.append("tokens")
            if got.keys != [want.keys[i] for i in order]:
                wrong.append("keys")

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
