"""Shards of object storage in a bounded folder: right or downloaded again, whole or not there, one download for all."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loader_toys import DEPTH, TOKENS, Toy, config, depth

from fourmill.model.config import ShardCacheConfig
from fourmill.model.data import TokenDataset
from fourmill.model.data.cache import Ranges, ShardCache
from fourmill.model.data.source import _Ends
from fourmill.model.loader import Loader
from fourmill.pipeline.store import open_store

FORK = multiprocessing.get_context("fork")


def content(number: int, size: int = 1000) -> bytes:
    return np.random.default_rng(number).bytes(size)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def cache_at(folder: Path, max_bytes: int = 10_000) -> ShardCache:
    return ShardCache(ShardCacheConfig(folder=str(folder), max_bytes=max_bytes))


class Downloads:
    """Objects by number, and a file with a line for each range that was read, from whatever process."""

    def __init__(self, folder: Path, pause_s: float = 0.0) -> None:
        self.log, self.pause_s = folder / "downloads", pause_s

    def ranges(self, number: int) -> Ranges:
        def read(start: int, length: int) -> bytes:
            with self.log.open("a") as file:
                file.write(f"{number}\n")
            time.sleep(self.pause_s)
            return content(number)[start : start + length]

        return read

    def open(self, cache: ShardCache, number: int) -> bytes:
        data = content(number)
        return bytes(cache.open(f"object {number}", len(data), sha(data), self.ranges(number)))

    @property
    def made(self) -> list[int]:
        return sorted(map(int, self.log.read_text().split())) if self.log.exists() else []


@pytest.fixture
def downloads(tmp_path: Path) -> Downloads:
    return Downloads(tmp_path)


def shards_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_object_is_downloaded_once_and_kept_under_its_digest(tmp_path: Path, downloads: Downloads) -> None:
    cache = cache_at(tmp_path / "cache")
    assert [downloads.open(cache, 1), downloads.open(cache, 1)] == [content(1)] * 2
    assert downloads.made == [1]
    assert shards_in(cache.folder) == [f"{sha(content(1))}.arrow"]
    assert downloads.open(cache_at(tmp_path / "cache"), 1) == content(1), "in another run too"
    assert downloads.made == [1]
    assert cache.folder.stat().st_mode & 0o077 == 0, "nobody else's business"


def test_least_recently_used_files_go_and_the_bound_holds(tmp_path: Path, downloads: Downloads) -> None:
    cache = cache_at(tmp_path / "cache", 5_000)
    for number in range(5):
        downloads.open(cache, number)
        os.utime(cache.folder / f"{sha(content(number))}.arrow", (number, number))
    downloads.open(cache, 0)  # used again, so 1 and 2 are the oldest; a tenth is freed beyond what is needed
    downloads.open(cache, 5)
    assert shards_in(cache.folder) == sorted(f"{sha(content(n))}.arrow" for n in (0, 3, 4, 5))
    for number in range(6, 40):
        downloads.open(cache, number)
        assert sum(path.stat().st_size for path in cache.folder.glob("*.arrow")) <= 5_000


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty"])
def test_damaged_file_is_downloaded_again(
    tmp_path: Path, downloads: Downloads, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_at(tmp_path / "cache")
    downloads.open(cache, 1)
    path, data = cache.folder / f"{sha(content(1))}.arrow", content(1)
    wrong = {"truncated": data[:500], "one bit": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[damage]
    path.write_bytes(wrong)
    with caplog.at_level(logging.WARNING):
        assert downloads.open(cache, 1) == content(1)
    assert downloads.made == [1, 1]
    assert path.read_bytes() == content(1)
    assert "object 1 is damaged in the cache and is downloaded again" in caplog.text


def test_object_that_differs_from_its_record_is_refused_and_not_kept(tmp_path: Path, downloads: Downloads) -> None:
    cache = cache_at(tmp_path / "cache")
    with pytest.raises(ValueError, match=rf"object 2 has digest {sha(content(3))}, its record says {sha(content(2))}"):
        cache.open("object 2", 1000, sha(content(2)), downloads.ranges(3))
    assert shards_in(cache.folder) == []


def test_object_larger_than_the_cache_is_refused(tmp_path: Path, downloads: Downloads) -> None:
    with pytest.raises(ValueError, match="an object of 1000 bytes does not fit into a cache of 999"):
        downloads.open(cache_at(tmp_path / "cache", 999), 1)


def _fill(folder: Path, log: Path, numbers: list[int], max_bytes: int) -> None:
    cache, downloads = cache_at(folder, max_bytes), Downloads(log, pause_s=0.002)
    for number in numbers:
        assert downloads.open(cache, number) == content(number)


def run_all(processes: list[Any]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def test_two_processes_fill_one_cache_with_one_download_each(tmp_path: Path, downloads: Downloads) -> None:
    numbers = list(range(30))
    arguments = [(tmp_path / "cache", tmp_path, order, 100_000) for order in (numbers, numbers[::2] + numbers[1::2])]
    run_all([FORK.Process(target=_fill, args=args) for args in arguments])
    assert downloads.made == numbers
    assert shards_in(tmp_path / "cache") == sorted(f"{sha(content(n))}.arrow" for n in numbers)


def test_processes_that_throw_out_each_others_files_still_read_right_ones(tmp_path: Path) -> None:
    arguments = [(tmp_path / "cache", tmp_path, list(range(k, k + 20)) * 2, 4_000) for k in range(3)]
    run_all([FORK.Process(target=_fill, args=args) for args in arguments])
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.arrow")) <= 4_000
    assert not list((tmp_path / "cache").glob("*.part"))


def _hang_halfway(folder: Path) -> None:
    def ranges(start: int, length: int) -> bytes:
        (folder / "half").touch()
        time.sleep(600)
        return b""

    cache_at(folder / "cache").open("object 1", 1000, sha(content(1)), ranges)


def test_download_of_a_killed_process_is_cleared_and_made_by_the_next(tmp_path: Path, downloads: Downloads) -> None:
    process = FORK.Process(target=_hang_halfway, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "half").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    name = sha(content(1))
    alive = cache_at(tmp_path / "cache")
    assert shards_in(alive.folder) == [f"{name}.part"], "a file that is being written is left alone"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert downloads.open(alive, 1) == content(1), "the lock died with its process"
    assert shards_in(alive.folder) == [f"{name}.arrow"]
    (alive.folder / "left.part").write_bytes(b"half")
    cache_at(tmp_path / "cache")
    assert shards_in(alive.folder) == [f"{name}.arrow"], "the next run removes what was left"


def test_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir(0o777)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ValueError, match="belongs to another user"):
        cache_at(tmp_path / "cache")


@pytest.fixture(scope="module")
def far(s3_server: str) -> Toy:
    """Six shards of 10 samples in object storage."""
    return Toy(f"s3://fourmill-tests/loader-{os.getpid()}-{time.monotonic_ns()}", 6, pictures=False)


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return Toy(tmp_path_factory.mktemp("near") / "toy", 6, pictures=False).open(names=TOKENS)


def open_far(far: Toy, folder: Path, max_bytes: int = 1 << 20, **changes: Any) -> TokenDataset:
    shard_cache = ShardCacheConfig(folder=str(folder), max_bytes=max_bytes, threads=2)
    return TokenDataset(far.uri, config(names=TOKENS, shuffle_shards=2, shard_cache=shard_cache, **changes))


def test_samples_from_object_storage_are_those_of_the_folder(far: Toy, near: TokenDataset, tmp_path: Path) -> None:
    data = open_far(far, tmp_path / "cache")
    assert data.digest == near.digest
    assert data.held_out.tolist() == near.held_out.tolist()
    order = np.random.default_rng(0).permutation(60)
    want, got = near.batch(order, order % 2), data.batch(order, order % 2)
    assert got.keys == want.keys
    for field in ("tokens", "lengths", "present"):
        for name, tensor in getattr(want, field).items():
            assert torch.equal(getattr(got, field)[name], tensor), (field, name)


def object_bytes(far: Toy) -> int:
    return sum(info.num_bytes for info in far.store.list("tok_") if info.name.endswith(".arrow"))


def bytes_in(folder: Path) -> int:
    """Of all files at one moment: a thread that downloads may rename one while they are counted."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return sum(path.stat().st_size for path in folder.iterdir())


def test_an_epoch_downloads_every_object_once_though_the_cache_is_smaller(far: Toy, tmp_path: Path) -> None:
    corpus = object_bytes(far)
    data = open_far(far, tmp_path / "cache", max_bytes=int(0.8 * corpus), held_out=0.0)
    loader, largest = Loader(data, 4, 0), 0
    before = data.source.store.counters.as_dict()["bytes_read"]  # type: ignore[attr-defined]
    for _ in range(15):
        next(loader)
        largest = max(largest, bytes_in(tmp_path / "cache"))
    data.close()
    read = data.source.store.counters.as_dict()["bytes_read"] - before  # type: ignore[attr-defined]
    assert corpus <= read <= corpus * (6 + 4) / 6, "and at most the next epoch's first two windows"
    assert largest <= 0.8 * corpus + 20, "with the file that counts them"


def test_second_run_downloads_nothing(far: Toy, tmp_path: Path) -> None:
    for expected in (True, False):
        data = open_far(far, tmp_path / "cache", held_out=0.0)
        before = data.source.store.counters.as_dict()["bytes_read"]  # type: ignore[attr-defined]
        loader = Loader(data, 30, 0)
        assert [len(next(loader)[0]) for _ in range(2)] == [30, 30]
        data.close()
        assert (data.source.store.counters.as_dict()["bytes_read"] > before) is expected  # type: ignore[attr-defined]


def test_sequence_does_not_depend_on_the_cache(far: Toy, tmp_path: Path) -> None:
    found = []
    for max_bytes in (int(0.8 * object_bytes(far)), 1 << 30):
        data = open_far(far, tmp_path / f"cache-{max_bytes}", max_bytes)
        loader = Loader(data, 7, 3)
        found.append([next(loader)[0].keys for _ in range(12)])
        data.close()
    assert found[0] == found[1]


def test_cache_that_does_not_hold_two_windows_is_refused(far: Toy, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"shard_cache.max_bytes 5000 is too small: two windows of 2 shards .* take \d+"
    ):
        open_far(far, tmp_path / "cache", max_bytes=5000)


def test_some_samples_come_from_few_shards(far: Toy, near: TokenDataset, tmp_path: Path) -> None:
    data = open_far(far, tmp_path / "cache", held_out=0.0)
    chosen = data.some("train", 15, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 15
    assert len({int(n) // 10 for n in chosen}) == 2
    rng = np.random.default_rng(0)
    assert near.some("train", 15, np.random.default_rng(0)).tolist() == rng.permutation(near.train)[:15].tolist()


def test_object_replaced_in_the_bucket_is_refused(s3_uri: str, tmp_path: Path) -> None:
    toy = Toy(s3_uri, 1, pictures=False)
    (name,) = (n for n in toy.store.names("tok_depth/") if n.endswith(".arrow"))
    other = toy.make("tok_depth", 0, [[depth(n + 1, i) for n in range(10)] for i in range(2)], DEPTH)
    toy.store.delete(name)
    toy.store.create(name, toy.store.get(other.name))
    with pytest.raises(ValueError, match=r"tok_depth/shard-000000.* has digest .*, its record says"):
        open_far(toy, tmp_path / "cache").batch(np.array([1]), np.zeros(1, int))


def test_split_of_a_large_dataset_is_kept_and_a_damaged_one_made_again(
    near: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fourmill.model.data import splits

    monkeypatch.setattr(splits, "_KEPT_FROM", 60)
    kept = ShardCacheConfig(folder=str(tmp_path / "cache"))
    want = splits.held_out(near.source, 0.125, kept)
    (path,) = (tmp_path / "cache").glob("*.split")
    assert np.flatnonzero(want).tolist() == near.held_out.tolist()
    monkeypatch.setattr(type(near.source), "keys", lambda *_: pytest.fail("the keys are not needed again"))
    assert np.array_equal(splits.held_out(near.source, 0.125, kept), want)
    monkeypatch.undo()
    monkeypatch.setattr(splits, "_KEPT_FROM", 60)
    data = path.read_bytes()
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(damaged)
        assert np.array_equal(splits.held_out(near.source, 0.125, kept), want)
        assert path.read_bytes() == data


def test_keys_of_a_far_shard_take_two_requests(far: Toy, near: TokenDataset, tmp_path: Path) -> None:
    data = open_far(far, tmp_path / "cache", held_out=0.0)
    before = data.source.store.counters.as_dict()  # type: ignore[attr-defined]
    assert data.keys(np.array([35, 31])) == near.keys(np.array([35, 31])) == ["s3-5", "s3-1"]
    after = data.source.store.counters.as_dict()  # type: ignore[attr-defined]
    assert after["requests"] - before["requests"] <= 2


def test_ends_of_an_object_are_read_once_and_its_middle_as_asked(tmp_path: Path) -> None:
    data = content(1, 300_000)
    store = open_store(tmp_path)
    store.create("object", data)
    file = _Ends(store, "object", len(data))
    for start, size in [
        (299_990, 10),
        (250_000, 40_000),
        (0, 8),
        (60_000, 5),
        (65_530, 10),
        (100_000, 70_000),
        (10, 0),
    ]:
        file.seek(start)
        assert file.read(size) == data[start : start + size]
        assert file.tell() == start + size
    assert store.counters.as_dict()["requests"] == 1 + 4, "two ends, and what crosses or lies between them"
    file.seek(-7, 2)
    assert file.read() == data[-7:]
    assert _Ends(store, "object", 100).read(5) == data[:5]
