"""`manifest show`: totals from the root alone, licences, lineage back to the corpus, history."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toys

from fourmill.cli.units import human_bytes, human_count, human_number, human_seconds, human_share, plain
from fourmill.config import Config
from fourmill.pipeline.manifest import BLOCK, BlockInfo, Manifest, Update, read_manifest, update_manifest
from fourmill.pipeline.manifest.quarantine import Choice, retry
from fourmill.pipeline.manifest.show import Ancestor, history, licences, lineage, restricted, summarise
from fourmill.pipeline.runner import run
from fourmill.pipeline.shards import Spec, commit, producer_id, write_shard
from fourmill.pipeline.store import LocalStore, Store, open_store

ROOT = Path(__file__).parent.parent


def labelled(folder: Path, **options: Any) -> Store:
    dataset = toys.make_dataset(folder, str(folder / "dataset"), damaged={2: b"not a picture"})
    run(Config(**toys.config(dataset, **options)))
    return open_store(dataset)


def put(store: Store, name: str, shards: range, producer: dict[str, Any], **parts: Any) -> Manifest:
    """A snapshot with blank shards of one modality in it."""
    records = []
    for shard in shards:
        mark = f"{shard + 1000 * len(str(producer)):016x}"
        data = write_shard(name, shard, mark, ["a", "b"], [["x", None]], Spec(), producer, {})
        records.append(commit(store, data, {"seconds": 2.0, "attempts": 1}))
    return update_manifest(store, lambda old: Update(records, {producer_id(producer): producer}, **parts))


def test_a_line_for_each_modality(tmp_path: Path) -> None:
    manifest = read_manifest(labelled(tmp_path))
    found = {line.name: line for line in summarise(manifest)}
    depth, tokens = found["depth"], found["tok_depth"]
    assert (depth.shards, depth.missing, depth.rows, depth.present) == (4, 0, 24, 23)
    assert depth.num_bytes == sum(r.num_bytes for r in manifest.records("depth"))
    assert (depth.spent["attempts"], list(depth.recipes.values())) == (4, [4])
    assert depth.producers[0]["class"] == "Brightness"
    assert (depth.vocabulary, depth.used) == (None, None)
    assert tokens.vocabulary == 256
    assert tokens.used is not None
    assert tokens.perplexity is not None
    assert 1 < tokens.perplexity < tokens.used < 256
    assert found["rgb"].quarantined == {"not an image": 1}


def test_shards_that_a_modality_lacks_are_counted(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    put(store, "alt_text", range(3), {"class": "ingest"})
    found = {line.name: line.missing for line in summarise(put(store, "caption", range(1), {"class": "C"}))}
    assert found == {"alt_text": 0, "caption": 2}


def test_a_million_shards_are_shown_from_the_root_alone(tmp_path: Path) -> None:
    """12 modalities of 100 blocks; the store has nothing but the root."""
    info = BlockInfo("manifest/records/x", "0" * 64, 1, BLOCK, 0, BLOCK - 1, 10**7, 10**7 - 5, 10**9, {"r": BLOCK},
                     {"decode": 5}, {"seconds": 60.0, "gpu_seconds": 30.0, "attempts": BLOCK}, "f", "k")  # fmt: skip
    names = ["rgb", "caption", *(f"tok_rgb@{i}" for i in range(10))]
    manifest = Manifest(LocalStore(tmp_path), {"snapshot": 7, "producers": {"r": {"class": "R"}}})
    for name in names:
        manifest.blocks[name] = {b: replace(info, first=b * BLOCK, last=(b + 1) * BLOCK - 1) for b in range(100)}
    start = time.monotonic()
    found = summarise(manifest)
    assert time.monotonic() - start < 2
    assert [(m.shards, m.rows, m.quarantined, m.used) for m in found] == [(10**6, 10**9, {"decode": 500}, None)] * 12
    assert found[0].spent == {"seconds": 6000, "gpu_seconds": 3000, "attempts": 10**6}


def test_licences_of_code_and_weights_and_what_they_forbid(tmp_path: Path) -> None:
    weights = {"reference": "owner/net", "digest": "d", "licence": "cc-by-nc-4.0"}
    producer = {"class": "C", "version": 1, "licence": "MIT", "checkpoint": weights}
    assert licences(producer) == ("MIT", "cc-by-nc-4.0")
    assert licences({"class": "ingest"}) == ("", "")
    assert licences({"checkpoint": {"reference": "x"}}) == ("", "unknown")
    manifest = put(LocalStore(tmp_path), "caption", range(1), producer)
    assert restricted(manifest) == ["owner/net (cc-by-nc-4.0)"]


# Lineage


def flat(node: Ancestor) -> Any:
    return node.modality, node.producer.get("class"), [flat(part) for part in node.inputs]


def test_lineage_goes_back_to_the_corpus(tmp_path: Path) -> None:
    manifest = read_manifest(labelled(tmp_path))
    (tree,) = lineage(manifest, "tok_depth")
    rgb: Any = ("rgb", "ingest", [])
    (reads_source,) = flat(lineage(manifest, "crop_settings")[0])[2]
    crops = ("crop_settings", "CropSettings", [reads_source])
    assert flat(tree) == ("tok_depth", "BlockTokens", [("depth", "Brightness", [crops, rgb])])
    assert tree.shards == 4
    assert tree.inputs[0].recipe == manifest.generations("depth")[0]
    assert flat(lineage(manifest, "rgb")[0]) == rgb
    with pytest.raises(ValueError, match="did you mean 'depth'"):
        lineage(manifest, "dept")


def test_each_generation_has_its_own_lineage_the_commonest_first(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    put(store, "caption", range(3), {"class": "C", "version": 1, "inputs": {"rgb": "corpus"}})
    manifest = put(store, "caption", range(1), {"class": "C", "version": 22, "inputs": {"rgb": "corpus"}})
    trees = lineage(manifest, "caption")
    assert [(t.producer["version"], t.shards) for t in trees] == [(1, 2), (22, 1)]
    assert trees[0].inputs == (Ancestor("rgb", ""),)  # this manifest has no pictures


# History


def test_history_tells_what_changed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    put(store, "alt_text", range(2), {"class": "ingest"}, corpus={"samples": 4})
    put(store, "caption", range(1), {"class": "C", "version": 1})
    put(store, "caption", range(1, 3), {"class": "C", "version": 1})
    put(store, "caption", range(1), {"class": "C", "version": 22})
    recipe = next(r for r, p in read_manifest(store).producers.items() if p.get("version") == 22)
    found = list(history(store))
    assert [(c.snapshot, c.shards, c.changes) for c in found] == [
        (4, 5, {f"1 shard by another recipe ({recipe})": ["caption"]}),
        (3, 5, {"2 shards more": ["caption"]}),
        (2, 3, {"new, 1 shard": ["caption"]}),
        (1, 2, {"new, 2 shards": ["alt_text"]}),
    ]
    assert (found[0].samples, found[0].num_bytes) == (6, sum(m.num_bytes for m in summarise(read_manifest(store))))
    assert found[0].created.endswith("Z")
    assert [c.snapshot for c in history(store, last=2)] == [4, 3]
    assert [c.snapshot for c in history(store, last=2, until=2)] == [2, 1]


def test_history_tells_of_retries_and_of_shards_made_again(tmp_path: Path) -> None:
    store = labelled(tmp_path, fail=["000000007"])
    retry(store, Choice(("depth",)))
    run(Config(**toys.config(store.uri, fail=["000000007"])))
    changes = [c.changes for c in history(store, last=2)]
    assert changes[1] == {"rows in quarantine were put back into the plan": []}
    assert changes[0] == {"some shards made again": ["depth", "semseg", "tok_depth"]}


# Numbers and the command


def test_numbers_are_short_and_not_rounded_to_all_or_nothing() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 1_250_000, 3e12)] == ["0 B", "999 B", "1 kB", "1.25 MB", "3 TB"]
    assert [human_seconds(s) for s in (0, 0.25, 119, 120, 7200, 5e6)] == [
        "",
        "0.25 s",
        "119 s",
        "2 min",
        "2 h",
        "1,389 h",
    ]
    parts = [(0, 5), (5, 5), (9999, 10_000), (1, 100_000), (2, 10**7), (1, 3), (0, 0)]
    shares = ["0 %", "100 %", ">99.9 %", "0.001 %", "0.00002 %", "33.3 %", ""]
    assert [human_share(part, whole) for part, whole in parts] == shares
    assert [human_number(v) for v in (None, 3.0, 12345, 0.123456, 2e9)] == ["?", "3", "12,345", "0.1235", "2e+09"]


def test_what_a_terminal_would_obey_is_spelt_out() -> None:
    assert plain("Köln \x1b[31mred\n") == "Köln \\x1b[31mred\\n"
    assert (human_count(1, "row"), human_count(1200, "row")) == ("1 row", "1,200 rows")


def shown(dataset: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from fourmill.cli import main; main()"
    call = [sys.executable, "-c", code, "manifest", "show", dataset, *arguments]
    return subprocess.run(call, cwd=ROOT, capture_output=True, check=False, text=True)


def test_command(tmp_path: Path) -> None:
    dataset = labelled(tmp_path).uri
    tree = json.loads(shown(dataset, "--json").stdout)
    assert (tree["snapshot"], tree["corpus"]["samples"], tree["non_commercial"]) == (2, 24, [])
    first = json.loads(shown(dataset, "--at", "1", "--json").stdout)
    assert {m["name"] for m in first["modalities"]} == {"rgb", "alt_text", "source"}
    text = shown(dataset, "--lineage", "tok_depth").stdout
    for words in ("tok_depth by BlockTokens v1, recipe", "depth by Brightness", '"gain": 1.0', "corpus sources: ["):
        assert words in text
    assert json.loads(shown(dataset, "--history", "--json").stdout)["snapshots"][-1]["snapshot"] == 1
    assert "new, 4 shards: alt_text, rgb, source" in shown(dataset, "--history").stdout
    tables = json.loads(shown(dataset, "--tables", "--json").stdout)
    assert {Path(uri).parent.name for uri in tables["records"]} == {m["name"] for m in tree["modalities"]}
    assert shown(dataset, "--history", "--tables").returncode == 2
    assert shown(dataset, "--at", "99").returncode == 2


@pytest.mark.parametrize("width", [80, 160])
def test_lines_fit_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    from rich.console import Console

    from fourmill.cli import manifest_show as command

    store = labelled(tmp_path)
    out = Console(width=width, record=True)
    monkeypatch.setattr(command, "console", lambda: out)
    command.manifest_show(store.uri)
    command.manifest_show(store.uri, lineage="tok_depth")
    command.manifest_show(store.uri, history=True)
    text = out.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text  # nothing is cut off
    for words in ("95.8 %", "BlockTokens v1", "Apache-2.0", "crop_settings"):
        assert words in text
