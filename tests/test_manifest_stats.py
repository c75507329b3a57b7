"""`manifest stats`: figures of all rows, the same whatever was killed, resumed or made again on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from fourmill.config import Config
from fourmill.pipeline.manifest import Manifest, Update, read_manifest, snapshots, update_manifest
from fourmill.pipeline.manifest.quarantine import Choice, retry
from fourmill.pipeline.manifest.stats import Distribution, Statistics, sparkline, statistics
from fourmill.pipeline.runner import run
from fourmill.pipeline.shards import Spec, canonical, commit, digest, producer_id, read_shard, write_shard
from fourmill.pipeline.statistics import compute, merged
from fourmill.pipeline.store import LocalStore, Store, open_store

ROOT = Path(__file__).parent.parent


def config(dataset: str, **options: Any) -> Config:
    return Config(**toys.config(dataset, **options))


def labelled(folder: Path, name: str = "dataset") -> Store:
    dataset = toys.make_dataset(folder, str(folder / name))
    run(config(dataset))
    return open_store(dataset)


def counted_anew(manifest: Manifest, name: str) -> dict[str, dict[str, Any]]:
    """Statistics of the objects that the snapshot names, by recipe, from their values."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in manifest.records(name):
        found.setdefault(record.producer, []).append(compute(read_shard(manifest.store, record.name)))
    return {recipe: merged(parts) for recipe, parts in found.items()}


def without_bounds(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {k: without_bounds(v) for k, v in tree.items() if k not in ("min", "max")}


def test_figures_are_those_of_the_stored_values(tmp_path: Path) -> None:
    manifest = read_manifest(labelled(tmp_path))
    shards = [read_shard(manifest.store, r.name) for r in manifest.records("tok_depth")]
    ids = np.concatenate([s.tokens().reshape(-1) for s in shards])
    (found,) = statistics(manifest, ["tok_depth"])
    shares = np.bincount(ids)[np.bincount(ids) > 0] / len(ids)
    entropy = -(shares * np.log2(shares)).sum()
    assert found.codes is not None
    assert (found.codes.tokens, found.codes.values, found.codes.vocabulary) == (24 * 16, 24, 256)
    assert (found.codes.used, found.codes.min, found.codes.max) == (len(set(ids)), ids.min(), ids.max())
    assert found.codes.entropy == pytest.approx(entropy)
    assert found.codes.perplexity == pytest.approx(2**entropy)
    assert sum(found.codes.ranked) == pytest.approx(1)

    maps = np.stack([v for r in manifest.records("depth") for v in read_shard(manifest.store, r.name).values()])
    depth = statistics(manifest, ["depth"])[0].distributions["values"]
    assert (depth.count, depth.min, depth.max) == (maps.size, maps.min(), maps.max())
    assert depth.mean == pytest.approx(maps.mean(dtype=np.float64))
    assert depth.quantiles["0.5"] == pytest.approx(np.median(maps), rel=0.25)

    semseg = np.stack([v for r in manifest.records("semseg") for v in read_shard(manifest.store, r.name).values()])
    counts = {"dark": int((semseg == 0).sum()), "bright": int((semseg == 1).sum())}
    assert statistics(manifest, ["semseg"])[0].shares["classes"] == counts


def test_a_resumed_run_has_the_statistics_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    whole = read_manifest(labelled(tmp_path, "whole"))
    store = labelled(tmp_path, "resumed")
    for number in snapshots(store)[1:]:  # as if killed before any snapshot, after the objects
        store.delete(f"manifest/snapshot-{number:06d}.json")
    for info in list(store.list("tok_depth/"))[:3]:  # and between an object and its record, too
        store.delete(info.name)
    for info in [i for i in store.list("semseg/") if i.name.endswith(".json")]:
        store.delete(info.name)
    run(config(store.uri))
    resumed = read_manifest(store)
    for name in whole.modalities:
        assert resumed.statistics(name) == whole.statistics(name), name
    assert [s.to_json() for s in statistics(resumed)] == [s.to_json() for s in statistics(whole)]


def test_counts_of_shards_that_were_made_again_are_gone(tmp_path: Path) -> None:
    store = labelled(tmp_path)
    run(config(store.uri, gain=0.5))
    manifest = read_manifest(store)
    for name in ("depth", "semseg", "tok_depth"):
        assert manifest.statistics(name) == counted_anew(manifest, name)
    assert len(manifest.statistics("tok_depth")) == 1


def test_shards_that_were_put_back_are_counted_once(tmp_path: Path) -> None:
    dataset = toys.make_dataset(tmp_path, str(tmp_path / "dataset"))
    chosen = config(dataset, fail=["000000007"])
    run(chosen)
    store = open_store(dataset)
    before = read_manifest(store)
    assert retry(store, Choice(("depth",)))[0].shards == {"depth": [1]}
    run(chosen)
    after = read_manifest(store)
    for name in ("depth", "semseg", "tok_depth"):
        assert without_bounds(after.statistics(name)) == without_bounds(before.statistics(name))
        assert without_bounds(after.statistics(name)) == without_bounds(counted_anew(after, name))
    (codes,) = statistics(after, ["tok_depth"])
    assert (codes.codes and codes.codes.tokens, codes.present) == (23 * 16, 23)


def published(store: Store, update: Update) -> Manifest:
    return update_manifest(store, lambda old: update)


rows_of_ids = st.lists(st.none() | st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=3)
# One snapshot each: (shard, version of its maker, values); a shard that comes again replaces the old one.
replacements = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 2), rows_of_ids), min_size=1, max_size=3), max_size=5
)


@settings(max_examples=40, deadline=None)
@given(replacements)
def test_sums_are_those_of_the_shards_there_are_whatever_was_replaced(updates: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        for update in updates:
            made: dict[int, tuple[Any, dict[str, Any]]] = {}
            for shard, version, values in update:
                producer, keys = {"class": "T", "version": version}, [f"k{i}" for i in range(len(values))]
                mark = digest(canonical([shard, version, values]))[:16]
                data = write_shard("tok_caption", shard, mark, keys, [values], Spec(vocabulary=12), producer, {})
                made[shard] = commit(store, data), producer
            records, producers = [r for r, _ in made.values()], {producer_id(p): p for _, p in made.values()}
            manifest = published(store, Update(records, producers))
            anew = {recipe: sums for recipe, sums in counted_anew(manifest, "tok_caption").items() if sums}
            assert without_bounds(manifest.statistics("tok_caption")) == without_bounds(anew)


def with_generations(folder: Path) -> Manifest:
    """Captions of two shards by one recipe and of one by another."""
    store, producers, records = LocalStore(folder), {}, []
    for shard, version, words in ((0, 1, "one"), (1, 1, "one two"), (2, 2, "one two three")):
        producer = {"class": "Captions", "version": version, "inputs": {"rgb": "corpus"}}
        data = write_shard("caption", shard, f"{shard:016x}", ["a", "b"], [[words, None]], Spec(), producer, {})
        producers[producer_id(producer)] = producer
        records.append(commit(store, data))
    return update_manifest(store, lambda old: Update(records, producers))


def test_generations_are_told_apart(tmp_path: Path) -> None:
    found = sorted(statistics(with_generations(tmp_path)), key=lambda s: s.shards)
    assert [(s.modality, s.shards, s.producer) for s in found] == [
        ("caption", 1, "Captions v2"), ("caption", 2, "Captions v1"),
    ]  # fmt: skip
    assert [s.distributions["words"].mean for s in found] == [3, 1.5]
    assert found[1].distributions["words"].bins == ((1, 1, 1), (2, 2, 1))


def test_a_modality_of_which_nothing_is_counted_is_listed_all_the_same(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    data = write_shard("tok_rgb", 0, "0" * 16, ["a"], [[None]], Spec(vocabulary=8, length=4), {"class": "T"}, {})
    manifest = update_manifest(store, lambda old: Update([commit(store, data)], {}))
    (found,) = statistics(manifest)
    assert (found.modality, found.codes, found.distributions, found.counts) == ("tok_rgb", None, {}, {})
    assert "no statistics" in shown(tmp_path).stdout
    with pytest.raises(ValueError, match="did you mean 'tok_rgb'"):
        statistics(manifest, ["tok_rgp"])


# Drawn as text


def test_a_sparkline_shows_shares_of_the_highest() -> None:
    assert sparkline([0, 1, 4, 8]) == " ▁▄█"
    assert sparkline([0, 0]) == "  "
    assert sparkline([]) == ""


def spread(bins: tuple[tuple[float, float, int], ...], low: float, high: float) -> Distribution:
    total = sum(count for _, _, count in bins)
    return Distribution(total, 0.0, low, high, {"0.01": low, "0.99": high}, 0, bins)


def test_bars_have_columns_of_one_width() -> None:
    assert spread(((0, 1, 4), (1, 2, 4), (2, 4, 4)), 0, 4).bars(4) == ("██▄▄", 0, 4)
    assert spread(((0, 0, 8), (1, 1, 8), (3, 3, 8)), 0, 3).bars(6)[0] == "█ █  █"
    assert spread(((5, 5, 9),), 5, 5).bars(5)[0] == "  █  "


# The command


def shown(dataset: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from fourmill.cli import main; main()"
    call = [sys.executable, "-c", code, "manifest", "stats", str(dataset), *arguments]
    return subprocess.run(call, cwd=ROOT, capture_output=True, check=False, text=True)


def test_command_prints_tables_and_json(tmp_path: Path) -> None:
    store = labelled(tmp_path)
    done = shown(store.uri)
    assert done.returncode == 0, done.stderr
    for words in ("Codes", "Values", "Names", "tok_depth", "depth: values", "alt_text: words", "bright"):
        assert words in done.stdout
    tree = json.loads(shown(store.uri, "--json", "--modality", "tok_depth,depth").stdout)
    assert [s["modality"] for s in tree["statistics"]] == ["tok_depth", "depth"]
    assert tree["statistics"][0]["codes"]["vocabulary"] == 256
    assert sum(count for _, _, count in tree["statistics"][1]["distributions"]["values"]["bins"]) == 24 * 16 * 16
    assert shown(store.uri, "--modality", "dept").returncode == 2


def test_lines_fit_a_terminal_of_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from fourmill.cli import manifest_stats as command

    store = labelled(tmp_path)
    found: list[Statistics] = statistics(read_manifest(store))
    narrow = Console(width=80, record=True)
    monkeypatch.setattr(command, "console", lambda: narrow)
    command.manifest_stats(store.uri, modality=",".join(s.modality for s in found))
    text = narrow.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text  # nothing is cut off
