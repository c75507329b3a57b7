"""`manifest quarantine`: what could not be made, why, which rows; putting exactly their shards back into the plan."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import toys
from helpers import all_records

from fourmill.cli.options import parse_shards
from fourmill.config import Config
from fourmill.modalities import modality
from fourmill.pipeline import codecs
from fourmill.pipeline.manifest import Manifest, read_manifest, snapshots
from fourmill.pipeline.manifest.quarantine import Choice, plan_retry, reasons, reasons_in, retry, rows
from fourmill.pipeline.plan import make_plan
from fourmill.pipeline.runner import run
from fourmill.pipeline.shards import Spec, commit, open_shard, write_shard
from fourmill.pipeline.store import LocalStore, Store, open_store

ROOT = Path(__file__).parent.parent
FAULTY = {"000000007", "000000009", "000000020"}  # shards of six: in 1, 1 and 3


class Flaky(toys.Brightness):
    """Makes depth, but not of the keys that are bad today."""

    bad: frozenset[str] = frozenset(FAULTY)

    def run(self, batch: Any) -> dict[str, list[Any]]:
        if found := sorted(set(batch.keys) & Flaky.bad):
            raise RuntimeError(f"camera: the lens of {found[0]} is dirty")
        return super().run(batch)


@pytest.fixture(autouse=True)
def _bad_today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flaky, "bad", frozenset(FAULTY))


def config(dataset: str) -> Config:
    tree = toys.config(dataset)
    tree["labelers"]["bright"]["kind"] = f"{__name__}:Flaky"
    return Config(**tree)


def labelled(folder: Path, uri: str | None = None) -> tuple[Config, Store]:
    """24 samples in 4 shards, three of which have no depth; picture 2 is damaged."""
    dataset = toys.make_dataset(folder, uri or str(folder / "dataset"), damaged={2: b"not a picture"})
    run(config(dataset))
    return config(dataset), open_store(dataset)


def named(manifest: Manifest) -> dict[tuple[str, int], str]:
    return {(r.modality, r.shard): r.name for r in all_records(manifest)}


def units(chosen: Config, store: Store) -> set[tuple[str, int]]:
    """What the plan would make."""
    return {(m, u.shard) for u in make_plan(store, read_manifest(store), chosen).units() for m in u.makes}


def test_reasons_are_counted_by_modality(tmp_path: Path) -> None:
    _, store = labelled(tmp_path)
    found = [(r.modality, r.reason, r.rows, r.share) for r in reasons(read_manifest(store))]
    assert found == [("depth", "RuntimeError", 3, 3 / 24), ("rgb", "not an image", 1, 1 / 24)]


def test_of_some_shards_the_record_tables_are_asked(tmp_path: Path) -> None:
    _, store = labelled(tmp_path)
    found = reasons(read_manifest(store), Choice(("depth",), None, range(3, 10)))
    assert [(r.modality, r.rows) for r in found] == [("depth", 1)]
    assert reasons(read_manifest(store), Choice(("depth",), None, range(0, 1))) == []


class Counting(LocalStore):
    """A local store that remembers what was read, and how much."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.reads: list[tuple[str, int]] = []

    def get(self, name: str) -> bytes:
        data = super().get(name)
        self.reads.append((name, len(data)))
        return data

    def get_range(self, name: str, start: int, length: int) -> bytes:
        data = super().get_range(name, start, length)
        self.reads.append((name, len(data)))
        return data


def test_rows_are_listed_with_full_reasons_and_only_their_objects_are_read(tmp_path: Path) -> None:
    labelled(tmp_path)
    store = Counting(str(tmp_path / "dataset"))
    manifest = read_manifest(store)
    found = [(r.modality, r.shard, r.key, r.reason) for r in rows(manifest, Choice(("depth",)))]
    assert [(m, s, k) for m, s, k, _ in found] == [
        ("depth", 1, "000000007"), ("depth", 1, "000000009"), ("depth", 3, "000000020"),
    ]  # fmt: skip
    assert all(f"the lens of {key} is dirty" in reason for _, _, key, reason in found)
    objects = {name for name, _ in store.reads if name.endswith(".arrow")}
    assert objects == {named(manifest)["depth", 1], named(manifest)["depth", 3]}


def test_tables_of_blocks_without_such_rows_are_not_read(tmp_path: Path) -> None:
    labelled(tmp_path)
    store = Counting(str(tmp_path / "dataset"))
    manifest = read_manifest(store)
    store.reads.clear()
    assert list(rows(manifest, Choice(("depth", "semseg", "rgb"), ("not an image",))))
    assert {name.split("/")[2] for name, _ in store.reads if name.startswith("manifest/")} == {"rgb"}


def test_only_the_chosen_reasons_are_listed(tmp_path: Path) -> None:
    _, store = labelled(tmp_path)
    manifest = read_manifest(store)
    assert {(r.modality, r.key) for r in rows(manifest, Choice(None, ("not an image",)))} == {("rgb", "000000002")}


def shard_with(store: Store, count: int, pad: int = 0) -> str:
    """A depth shard of `count` rows without a value, each with a reason; its name."""
    keys = [f"{i:09}" for i in range(count)]
    data = write_shard(
        "depth",
        0,
        "a" * 16,
        keys,
        [[None] * count],
        Spec(),
        {"class": "X"},
        {k: f"decode: {'x' * pad}{k}" for k in keys},
    )
    return commit(store, data).name


def test_reasons_are_read_from_the_head_of_an_object_however_many_there_are(tmp_path: Path) -> None:
    store = Counting(str(tmp_path))
    name = shard_with(store, 5000, pad=40)
    store.reads.clear()
    found = reasons_in(store, name)
    assert (len(found), found["000004999"]) == (5000, f"decode: {'x' * 40}000004999")
    assert len(store.reads) == 2
    assert open_shard(pa.py_buffer(store.get(name)), name).quarantine == found


def test_values_are_not_read(tmp_path: Path) -> None:
    store = Counting(str(tmp_path))
    maps = [codecs.encode(modality("depth"), np.random.default_rng(i).random((64, 64))) for i in range(50)]
    keys = [f"{i:09}" for i in range(51)]
    data = write_shard("depth", 0, "b" * 16, keys, [[*maps, None]], Spec(), {}, {keys[-1]: "decode: x"})
    name = commit(store, data).name
    store.reads.clear()
    assert reasons_in(store, name) == {keys[-1]: "decode: x"}
    assert sum(size for _, size in store.reads) < len(data) / 3


@pytest.mark.parametrize("damage", [b"", b"ARROW1\0\0", b"ARROW1\0\0\xff\xff\xff\xff\xff\xff\xff\x7f", b"PK" * 40])
def test_an_object_that_is_none_is_named(tmp_path: Path, damage: bytes) -> None:
    store = LocalStore(tmp_path)
    store.create("depth/shard-000000.cccccccccccccccc.arrow", damage)
    with pytest.raises(ValueError, match=r"depth/shard-000000\.c+\.arrow in .* is not a whole shard object"):
        reasons_in(store, "depth/shard-000000.cccccccccccccccc.arrow")


# Once more


def test_retry_makes_exactly_the_shards_again_and_what_goes_back_to_them(
    tmp_path: Path, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, store = labelled(tmp_path, store_uri)
    before = named(read_manifest(store))
    plan, manifest = retry(store, Choice(("depth",)))
    assert (plan.shards, plan.rows) == ({"depth": [1, 3]}, {"depth": 3})
    assert plan.redone == {"depth": (2, 12), "semseg": (2, 12), "tok_depth": (2, 12)}
    again = {(name, shard) for name in plan.redone for shard in (1, 3)}
    assert units(chosen, store) == again
    assert named(manifest) == before  # the old objects stand until the new ones are there

    monkeypatch.setattr(Flaky, "bad", frozenset())
    assert run(chosen).ok
    after = read_manifest(store)
    assert {place for place, name in named(after).items() if before[place] != name} == again
    assert after.totals("depth").quarantined == {}
    assert after.totals("depth").present == after.totals("tok_depth").present == 23  # without the damaged picture
    assert units(chosen, store) == set()


def test_what_a_dry_run_says_is_what_a_retry_does_and_it_changes_nothing(tmp_path: Path) -> None:
    _, store = labelled(tmp_path)
    said = plan_retry(read_manifest(store), Choice(("depth",), None, range(3, 4)))
    assert said.redone == {"depth": (1, 6), "semseg": (1, 6), "tok_depth": (1, 6)}
    last = snapshots(store)
    done, manifest = retry(store, Choice(("depth",), None, range(3, 4)))
    assert done == said
    assert (last, manifest.snapshot) == (snapshots(store)[:-1], last[-1] + 1)


def test_shards_that_wait_already_are_not_put_back_twice(tmp_path: Path) -> None:
    chosen, store = labelled(tmp_path)
    _, first = retry(store, Choice(("depth",)))
    plan, second = retry(store, Choice(("depth",)))
    assert (plan.shards, plan.pending) == ({}, {"depth": 2})
    assert second.snapshot == first.snapshot
    wanted = units(chosen, store)
    run(chosen)  # the lens is still dirty
    third, manifest = retry(store, Choice(("depth",)))
    assert third.shards == {"depth": [1, 3]}
    assert units(chosen, store) == wanted
    assert manifest.retries.text(("depth",), 1) == "depth:2"


def test_rows_that_came_damaged_with_the_corpus_are_refused(tmp_path: Path) -> None:
    _, store = labelled(tmp_path)
    plan, manifest = retry(store, Choice(("rgb",)))
    assert (plan.refused, plan.shards, plan.redone) == ({"rgb": 1}, {}, {})
    assert manifest.snapshot == max(snapshots(store))
    everything, _ = retry(store)
    assert (everything.refused, sorted(everything.shards)) == ({"rgb": 1}, ["depth"])


def test_two_that_retry_at_once_lose_nothing(tmp_path: Path) -> None:
    _, store = labelled(tmp_path)
    parts = [Choice(("depth",), None, range(1, 2)), Choice(("depth",), None, range(3, 4))]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda choice: retry(store, choice), parts))
    texts = [read_manifest(store).retries.text(("depth",), shard) for shard in range(4)]
    assert texts == ["", "depth:1", "", "depth:1"]


# Words and commands


def test_shards_are_a_number_or_a_range() -> None:
    assert (parse_shards("12"), parse_shards("3:5"), parse_shards(":4")) == (range(12, 13), range(3, 5), range(4))
    assert 10**9 in parse_shards("7:")
    for text in ("x", "5:5", "-1", "1:b"):
        with pytest.raises(ValueError, match=r"shards .*A:B"):
            parse_shards(text)


def test_unknown_names_are_corrected(tmp_path: Path) -> None:
    _, store = labelled(tmp_path)
    manifest = read_manifest(store)
    with pytest.raises(ValueError, match="unknown modality 'dept'; did you mean 'depth'"):
        reasons(manifest, Choice(("dept",)))
    with pytest.raises(ValueError, match="unknown reason 'kamera'"):
        list(rows(manifest, Choice(None, ("kamera",))))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from fourmill.cli import main; main()"
    call = [sys.executable, "-c", code, "manifest", "quarantine", *arguments]
    return subprocess.run(call, cwd=ROOT, capture_output=True, check=False, text=True)


def printed(*arguments: str) -> Any:
    done = command(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_command(tmp_path: Path) -> None:
    _, store = labelled(tmp_path)
    dataset = str(tmp_path / "dataset")
    assert "of its rows" in command(dataset).stdout
    counts: Sequence[dict[str, Any]] = printed(dataset)["quarantined"]
    assert {(c["modality"], c["rows"]) for c in counts} == {("depth", 3), ("rgb", 1)}
    keys = printed(dataset, "--keys", "--modality", "depth")["rows"]
    assert [k["key"] for k in keys] == sorted(FAULTY)
    last = max(snapshots(store))
    dry = printed(dataset, "--retry", "--dry-run")
    assert (dry["snapshot"], dry["shards"], dry["refused"]) == (last, {"depth": [1, 3]}, {"rgb": 1})
    told = command(dataset, "--retry").stdout
    assert "depth: to be tried again: 3 rows in 2 shards" in told
    assert "makes again tok_depth: 2 shards, 12 rows" in told
    assert "rgb: 1 row cannot be tried again here" in told
    assert f"snapshot {last + 1} is published" in told
    assert "waiting to be made again already: 2 shards" in command(dataset, "--retry").stdout
    for misused in (["--dry-run"], ["--retry", "--keys"], ["--retry", "--at", "1"], ["--shards", "b"]):
        done = command(dataset, *misused)
        assert (done.returncode, done.stdout) == (2, ""), misused
