"""Sample tables: what they say, that they follow from the shards alone, that a key is found by reading little, and that
DuckDB and pandas answer questions about a dataset in three lines."""

from __future__ import annotations

import ast
import hashlib
import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toys
from helpers import Dataset, ingested, make_jpeg, write_files, write_tar
from token_toys import Literal

from fourmill.modalities import modality
from fourmill.pipeline import codecs
from fourmill.pipeline.manifest import Manifest, Update, lookup, read_manifest, update_manifest
from fourmill.pipeline.manifest import samples as tables
from fourmill.pipeline.manifest import tables as records
from fourmill.pipeline.manifest.lookup import Place, find_key, nearest_keys, number_of_row, place_of_row
from fourmill.pipeline.manifest.samples import SampleTables, make_sample_tables, table_uris, uncovered
from fourmill.pipeline.shards import Spec, commit, producer_id, write_shard
from fourmill.pipeline.store import LocalStore, S3Store, Store, open_store

DOCS = Path(__file__).parent.parent / "docs/manifest.md"
SMALL, LARGE = make_jpeg(24, 32, seed=1), make_jpeg(300, 400, seed=2)


@pytest.fixture
def three(tmp_path: Path) -> Dataset:
    """Three samples in two shards: a small picture with a text and an address, an unusable one, a large one."""
    meta = {"url": "https://example.com/a.jpg"}
    files: dict[str, Any] = {"a.jpg": SMALL, "a.txt": "one", "a.json": meta, "b.jpg": b"<html>", "c.jpg": LARGE}
    return ingested(write_files(tmp_path / "corpus", files), tmp_path / "d", shard_size=2)[1]


def rows(manifest: Manifest) -> list[dict[str, Any]]:
    return [row for uri in table_uris(manifest)["samples"] for row in pq.read_table(uri).to_pylist()]


def test_a_table_says_where_each_sample_is_and_what_it_is(three: Dataset) -> None:
    (entry,) = three.manifest.sample_tables
    data = three.store.get(entry["name"])
    sha256 = hashlib.sha256(data).hexdigest()
    assert entry == {
        "name": f"manifest/samples/000000-000099.{sha256[:16]}.parquet",
        "digest": sha256,
        "num_bytes": len(data),
        "first_shard": 0,
        "last_shard": 1,
        "rows": 3,
        "first_key": "a",
        "last_key": "c",
    }
    digests = [hashlib.sha256(picture).hexdigest() for picture in (SMALL, b"<html>", LARGE)]
    found = rows(three.manifest)
    assert [r.pop("sha256") for r in found] == digests
    assert found == [
        {
            "key": "a",
            "shard": 0,
            "row": 0,
            "origin": "a.jpg",
            "url": "https://example.com/a.jpg",
            "width": 32,
            "height": 24,
            "format": "JPEG",
            "has_text": True,
            "quarantine": None,
        },
        {
            "key": "b",
            "shard": 0,
            "row": 1,
            "origin": "b.jpg",
            "url": None,
            "width": None,
            "height": None,
            "format": None,
            "has_text": False,
            "quarantine": three.quarantine()["b"],
        },
        {
            "key": "c",
            "shard": 1,
            "row": 0,
            "origin": "c.jpg",
            "url": None,
            "width": 400,
            "height": 300,
            "format": "JPEG",
            "has_text": False,
            "quarantine": None,
        },
    ]


@pytest.fixture(params=["local", "s3"])
def twelve(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Twelve samples in six shards, in three tables of two shards, on both backends."""
    monkeypatch.setattr(tables, "SHARDS", 2)
    monkeypatch.setattr(tables, "_ROW_GROUP", 2)
    uri = str(tmp_path / "d") if request.param == "local" else str(request.getfixturevalue("s3_uri"))
    return Dataset(toys.make_dataset(tmp_path, uri, count=12, shard_size=2, damaged={5: b"cut"}))


def test_tables_made_afterwards_are_the_bytes_that_ingest_wrote(twelve: Dataset) -> None:
    written = twelve.manifest.sample_tables
    assert [(e["first_shard"], e["last_shard"], e["rows"]) for e in written] == [(0, 1, 4), (2, 3, 4), (4, 5, 4)]
    update_manifest(twelve.store, lambda old: Update(sample_tables=[written[1]]))
    for entry in written:
        twelve.store.delete(entry["name"])
    made = make_sample_tables(twelve.store)
    assert (made.snapshot, made.sample_tables) == (3, written)
    for entry in written:
        assert hashlib.sha256(twelve.store.get(entry["name"])).hexdigest() == entry["digest"]
    assert make_sample_tables(twelve.store).snapshot == 3


def test_ingesting_again_brings_back_lost_tables_and_no_snapshot(tmp_path: Path) -> None:
    write_tar(tmp_path / "c/0.tar", [("a.jpg", SMALL), ("a.txt", b"one")])
    _, dataset = ingested(tmp_path / "c", tmp_path / "d")
    (entry,) = dataset.manifest.sample_tables
    dataset.store.delete(entry["name"])
    report, _ = ingested(tmp_path / "c", tmp_path / "d")
    assert report.snapshot == 1
    assert hashlib.sha256(dataset.store.get(entry["name"])).hexdigest() == entry["digest"]


def test_a_dataset_without_source_and_text_gets_tables_of_its_keys(tmp_path: Path) -> None:
    data = Literal(str(tmp_path / "d"), ["x", "y", "z"], shards=2)
    data.put("caption", ["one", None, "three"])
    made = make_sample_tables(open_store(data.done()))
    assert [(r["key"], r["shard"], r["row"], r["width"], r["has_text"]) for r in rows(made)] == [
        ("x", 0, 0, None, False),
        ("y", 0, 1, None, False),
        ("z", 1, 0, None, False),
    ]
    assert find_key(made, "z") == Place(1, 0)


def test_sources_that_a_stranger_wrote_break_no_table(tmp_path: Path) -> None:
    data = Literal(str(tmp_path / "d"), ["x", "y"])
    data.put(
        "source", [{"width": "wide", "height": -3, "origin": 7, "metadata": [1], "sha256": None}, {"width": 1 << 40}]
    )
    found = rows(make_sample_tables(open_store(data.done())))
    assert [{r[n] for n in ("width", "height", "origin", "url", "sha256")} for r in found] == [{None}, {None}]


def test_shards_that_are_not_aligned_are_named(tmp_path: Path) -> None:
    data = Literal(str(tmp_path / "d"), ["x", "y"])
    data.put("source", [{}, {}])
    data.keys = ["y", "x"]
    data.put("alt_text", ["one", "two"])
    with pytest.raises(ValueError, match=r"alt_text/shard-000000\..* does not hold the same keys in the same order"):
        make_sample_tables(open_store(data.done()))


# --- look-ups ------------------------------------------------------------------------------------------------------


def test_every_key_is_found_where_it_is(twelve: Dataset) -> None:
    for number in range(12):
        assert find_key(twelve.manifest, f"{number:09}") == Place(number // 2, number % 2)


class Counted:
    """Counts what is read of a store, by object."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for kind in (LocalStore, S3Store):
            for method in ("get", "get_range", "local_path"):
                monkeypatch.setattr(kind, method, self._counting(getattr(kind, method)))

    def _counting(self, read: Any) -> Any:
        def counted(store: Store, name: str, *rest: Any) -> Any:
            self.names.append(name)
            return read(store, name, *rest)

        return counted


def test_a_sorted_key_is_found_in_one_table_and_opens_no_shard(
    twelve: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(twelve.store)
    counted = Counted(monkeypatch)
    assert find_key(manifest, "000000006") == Place(3, 0)
    assert set(counted.names) == {manifest.sample_tables[1]["name"]}


def test_of_a_table_only_the_row_group_that_can_hold_the_key_is_read(
    twelve: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, list[str]]] = []
    whole = lookup._columns

    def noting(file: pq.ParquetFile, group: int, names: list[str]) -> pa.Table:
        read.append((group, names))
        return whole(file, group, names)

    monkeypatch.setattr(lookup, "_columns", noting)
    assert find_key(twelve.manifest, "000000006") == Place(3, 0)
    assert read == [(1, ["key"]), (1, ["shard", "row"])]


def test_keys_in_no_order_are_found_by_scanning_all_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SHARDS", 1)
    keys = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(60)]
    data = Literal(str(tmp_path / "d"), keys, shards=20)
    data.put("alt_text", [f"text {i}" for i in range(60)])
    manifest = make_sample_tables(open_store(data.done()))
    assert len(manifest.sample_tables) == 20
    assert [find_key(manifest, key) for key in keys] == [Place(i // 3, i % 3) for i in range(60)]


def test_shards_without_a_table_are_looked_through_too(twelve: Dataset) -> None:
    only = twelve.manifest.sample_tables[1:2]
    manifest = update_manifest(twelve.store, lambda old: Update(sample_tables=only))
    assert uncovered(manifest).tolist() == [0, 1, 4, 5]
    assert [find_key(manifest, f"{n:09}") for n in (1, 6, 11)] == [Place(0, 1), Place(3, 0), Place(5, 1)]


@pytest.mark.parametrize(
    ("wrong", "first"),
    [("0000000007", "000000007"), ("00000007", "000000007"), ("000000012", "000000010"), ("x00000003", "000000003")],
)
def test_an_unknown_key_is_answered_with_its_nearest(twelve: Dataset, wrong: str, first: str) -> None:
    with pytest.raises(ValueError, match=f"no sample '{wrong}' in .*; the nearest keys are .*'{first}'"):
        find_key(twelve.manifest, wrong)
    assert len(nearest_keys(twelve.manifest, wrong)) == 3


def test_row_numbers_count_all_rows_of_all_shards(twelve: Dataset) -> None:
    for number in range(12):
        place = Place(number // 2, number % 2)
        assert place_of_row(twelve.manifest, number) == place
        assert number_of_row(twelve.manifest, place) == number
    for number in (12, -1):
        with pytest.raises(ValueError, match=f"row {number}: .* has 12 samples, rows 0 to 11"):
            place_of_row(twelve.manifest, number)
    with pytest.raises(ValueError, match="row 2: shard 3 has rows 0 to 1"):
        number_of_row(twelve.manifest, Place(3, 2))
    with pytest.raises(ValueError, match=r"shard 6: .* has no such shard"):
        number_of_row(twelve.manifest, Place(6, 0))


def test_row_numbers_go_over_blocks_with_shards_of_different_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BLOCK", 2)
    data = Literal(str(tmp_path / "d"), [f"k{i}" for i in range(11)], shards=4)  # 3, 3, 3 and 2 rows
    data.put("rgb", [b"x"] * 11)
    manifest = read_manifest(open_store(data.done()))
    assert sorted(manifest.blocks["rgb"]) == [0, 1]
    places = [Place(0, 0), Place(0, 1), Place(0, 2), Place(1, 0), Place(1, 1), Place(1, 2)]
    places += [Place(2, 0), Place(2, 1), Place(2, 2), Place(3, 0), Place(3, 1)]
    assert [place_of_row(manifest, n) for n in range(11)] == places
    assert [number_of_row(manifest, place) for place in places] == list(range(11))


def test_a_table_of_a_hundred_full_shards_is_small_and_a_look_up_reads_a_hundredth_of_it(tmp_path: Path) -> None:
    store = open_store(tmp_path / "d")
    writer = SampleTables(store)
    for shard in range(100):
        keys = [f"{shard * 1000 + row:012}" for row in range(1000)]
        known = {"width": 512, "height": 384, "format": "JPEG"}
        sources = [{"origin": f"{shard:05}.tar:{key}.jpg", **known} for key in keys]
        writer.add(tables.Facts(shard, keys, sources, [True] * 1000, {}))
    (entry,) = writer.close()
    assert (entry["rows"], entry["first_key"], entry["last_key"]) == (100_000, "0" * 12, "000000099999")
    assert entry["num_bytes"] < 2_000_000
    read: list[int] = []

    class Remote(LocalStore):
        def local_path(self, name: str) -> Path | None:
            return None

        def get_range(self, name: str, start: int, length: int) -> bytes:
            read.append(length)
            return super().get_range(name, start, length)

    assert lookup._in_table(Remote(tmp_path / "d"), entry, "000000054321") == Place(54, 321)
    assert sum(read) < 150_000  # 65,536 of them are Parquet's look for the footer


# --- questions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(three: Dataset) -> str:
    """The three samples with depth, of which one is missing; the shards took 10 and 30 GPU-seconds."""
    spent = {0: 10.0, 1: 30.0}
    maker = {"class": "Literal", "version": 1, "inputs": {}}
    found = []
    for shard, keys in ((0, ["a", "b"]), (1, ["c"])):
        values = [None if key == "b" else codecs.encode(modality("depth"), np.ones((2, 2))) for key in keys]
        reasons = {"b": "decode: no picture"} if shard == 0 else {}
        data = write_shard("depth", shard, f"{shard:016x}", keys, [values], Spec(), maker, reasons)
        found.append(commit(three.store, data, {"gpu_seconds": spent[shard]}))
    update_manifest(three.store, lambda old: Update(found, {producer_id(maker): maker}))
    return three.store.uri


def documented(uri: str) -> list[Any]:
    """What the statements of the documentation's section on tables give, for this dataset."""
    section = (
        DOCS.read_text(encoding="utf-8").partition("## Tables, and questions in three lines")[2].partition("\n## ")[0]
    )
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    namespace: dict[str, Any] = {}
    values = []
    for block in blocks:
        for statement in ast.parse(block.replace("runs/demo/dataset", uri)).body:
            if isinstance(statement, ast.Expr):
                values.append(eval(compile(ast.Expression(statement.value), "docs", "eval"), namespace))
            else:
                exec(compile(ast.Module([statement], []), "docs", "exec"), namespace)
    return values


@pytest.mark.skipif(not DOCS.is_file(), reason="docs/manifest.md is not in this copy")
def test_the_documented_queries_answer_their_questions(labelled: str) -> None:
    costly, small, present, costly_too, present_too = documented(labelled)
    assert costly.fetchall()[:2] == [("depth", 1, 30.0), ("depth", 0, 10.0)]
    assert small.fetchall() == [(1,)]
    shares = {"alt_text": 1 / 3, "depth": 2 / 3, "rgb": 2 / 3, "source": 1.0}
    assert dict(present.fetchall()) == pytest.approx(shares)
    assert costly_too.head(2).values.tolist() == [["depth", 1, 30.0], ["depth", 0, 10.0]]
    assert present_too.to_dict() == pytest.approx(shares)


def test_samples_and_shards_are_joined_by_shard(labelled: str) -> None:
    uris = table_uris(read_manifest(open_store(labelled)))
    usable = """
        SELECT r.shard, r.present, count(*) FROM read_parquet(?) s JOIN read_parquet(?) r USING (shard)
        WHERE r.modality = 'rgb' AND s.quarantine IS NULL GROUP BY ALL ORDER BY r.shard"""
    assert duckdb.execute(usable, [uris["samples"], uris["records"]]).fetchall() == [(0, 1, 1), (1, 1, 1)]
    samples = pd.concat(map(pd.read_parquet, uris["samples"]))
    assert samples["quarantine"].notna().tolist() == [False, True, False]
