"""Downloads and uploads go on while a worker computes: shown by the order of events, not by the clock."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import toys
from helpers import all_records

from fourmill.config import Config
from fourmill.pipeline import runner, worker
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.runner import run
from fourmill.pipeline.store import LocalStore, open_store

_LONG_S = 20.0  # a wait that ends in failure


class _Remote(LocalStore):
    """A folder that is not local: objects are fetched whole. Events say who waits for whom."""

    def __init__(self, root: str, events: dict[str, threading.Event]) -> None:
        super().__init__(root)
        self.events, self.waited = events, list[bool]()

    def local_path(self, name: str) -> Path | None:
        return None

    def get(self, name: str) -> bytes:
        data = super().get(name)
        if name.startswith("rgb/shard-000001.") and not self.events["fetched"].is_set():
            self.counters.add_retry("SlowDown")
            self.events["fetched"].set()
        return data

    def create(self, name: str, data: bytes) -> bool:
        if name.startswith("depth/shard-000000.") and name.endswith(".arrow"):
            self.waited.append(self.events["computed"].wait(_LONG_S))
        return super().create(name, data)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Remote:
    """A dataset whose first shard's upload ends only after the second shard was fetched and computed."""
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "dataset"))
    store = _Remote(dataset, {name: threading.Event() for name in ("fetched", "computed")})
    plain = toys.Brightness.run

    def watched(self: toys.Brightness, batch: Any) -> Any:
        if "000000006" in batch.keys:
            store.events["computed"].set()
        elif "000000000" in batch.keys:
            store.waited.append(store.events["fetched"].wait(_LONG_S))
        return plain(self, batch)

    monkeypatch.setattr(toys.Brightness, "run", watched)
    for module in (runner, worker):
        monkeypatch.setattr(module, "open_store", lambda uri, _=None: store if uri == dataset else open_store(uri))
    return store


def test_next_shard_is_fetched_and_computed_while_the_last_one_is_uploaded(tmp_path: Path, remote: _Remote) -> None:
    stages = {"labels": {"labelers": ["bright"]}}
    report = run(Config(**toys.config(remote.uri, stages=stages)))
    assert report.ok
    assert remote.waited == [True, True]  # fetched while the first was computed; computed while it was uploaded
    assert [n.partition(": ")[2] for n in report.notes] == ["1 storage requests tried again: SlowDown"]
    undisturbed = toys.make_dataset(tmp_path, str(tmp_path / "undisturbed"))
    run(Config(**toys.config(undisturbed, stages=stages)))
    expected, found = (all_records(read_manifest(open_store(uri))) for uri in (undisturbed, remote.uri))
    assert [r.digest for r in found] == [r.digest for r in expected]
