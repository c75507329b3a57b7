"""Ingest: rows as they should be, bad ones quarantined exactly, and a rerun, after any end, gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import (
    Dataset,
    all_records,
    as_rows,
    ingested,
    make_jpeg,
    make_png,
    png_claiming,
    samples,
    write_files,
    write_parquet,
    write_tar,
)

from fourmill.pipeline.corpus import Sample, open_corpus
from fourmill.pipeline.ingest import IngestConfig, ingest
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.store import open_store

ROOT = Path(__file__).parent.parent
JPEG, OTHER, PNG = make_jpeg(seed=1), make_jpeg(seed=2), make_png(seed=3)


# --- rows ----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[bytes, str]] = {
    "cut": (make_jpeg(64, 64)[:-300], "truncated or corrupt: "),
    "empty": (b"", "empty: "),
    "html": (b"<html>404</html>", "not an image: begins with b'<html>40'"),
    "huge": (png_claiming(20_000, 20_000), "too large: "),
}


@pytest.mark.parametrize("check", ["decode", "header"])
def test_bad_pictures_are_quarantined_exactly_and_shift_nothing(tmp_path: Path, check: str) -> None:
    good = {"a": JPEG, "dz": OTHER, "zz": PNG}
    everything = {**good, **{name: data for name, (data, _) in BAD.items()}}
    files = {f"{k}.jpg": v for k, v in everything.items()} | {f"{k}.txt": f"text of {k}" for k in everything}
    report, dataset = ingested(write_files(tmp_path / "c", files), tmp_path / "d", shard_size=3, check=check)
    expected = dict(BAD) if check == "decode" else {k: v for k, v in BAD.items() if k != "cut"}
    assert dataset.quarantine().keys() == expected.keys()
    assert all(dataset.quarantine()[k].startswith(reason) for k, (_, reason) in expected.items())
    keys = sorted(everything)
    assert [dataset.values(m).keys() == dict.fromkeys(keys).keys() for m in ("rgb", "alt_text", "source")] == [True] * 3
    assert dataset.values("rgb") == {k: None if k in expected else everything[k] for k in keys}
    assert dataset.values("alt_text") == {k: f"text of {k}" for k in keys}
    for key, source in dataset.values("source").items():
        size = (source["width"], source["height"])
        assert size == (None, None) if key in expected else size in ((32, 24), (64, 64))
        assert source["sha256"] == (hashlib.sha256(everything[key]).hexdigest() if everything[key] else None)
    assert report.quarantined == dict.fromkeys(sorted(r.split(":")[0] for _, r in expected.values()), 1)
    assert dataset.manifest.corpus["quarantined"] == report.quarantined
    assert "quarantined: 1 x too large" in str(report)


def test_source_says_what_the_picture_is_and_its_upright_size(tmp_path: Path) -> None:
    picture = make_jpeg(24, 32, orientation=6)
    src = write_files(tmp_path / "c", {"a.jpg": picture, "a.json": {"b": [1, {"c": None}], "a": "ü"}})
    _, dataset = ingested(src, tmp_path / "d")
    assert dataset.values("source")["a"] == {
        "origin": "a.jpg",
        "width": 24,
        "height": 32,
        "format": "JPEG",
        "mode": "RGB",
        "frames": 1,
        "orientation": 6,
        "sha256": hashlib.sha256(picture).hexdigest(),
        "metadata": {"b": [1, {"c": None}], "a": "ü"},
    }


def test_texts_and_metadata_that_cannot_be_stored_say_why_and_keep_the_picture(tmp_path: Path) -> None:
    files: dict[str, Any] = {f"{k}.jpg": JPEG for k in "abcdef"}
    files |= {"a.txt": b"caf\xe9", "b.txt": b"x" * 200_000, "c.json": b"{broken", "d.json": b"[" * 100_000}
    files |= {"e.json": b'{"caption": "half \\ud83d an emoji", "x": 1}', "f.txt": b"\xef\xbb\xbfbom\r\n"}
    report, dataset = ingested(write_files(tmp_path / "c", files), tmp_path / "d")
    assert dataset.quarantine("alt_text") == {
        "a": "text not utf-8: byte 0xe9 at 3",
        "b": "text too large: 200000 bytes, at most 131072 are kept",
    }
    texts = dataset.values("alt_text")
    assert texts == {"a": None, "b": None, "c": None, "d": None, "e": "half \ufffd an emoji", "f": "bom"}
    sources = dataset.values("source")
    assert sources["c"]["metadata"] == sources["d"]["metadata"] == {}
    assert sources["c"]["metadata_problem"].startswith("metadata not json: ")
    assert set(dataset.values("rgb").values()) == {JPEG}
    assert report.quarantined == {"metadata not json": 2, "text not utf-8": 1, "text too large": 1}


@pytest.fixture(scope="module")
def photographs() -> Path:
    """The photographs that come with scikit-image; a folder of JPEG, PNG, TIFF and GIF."""
    skimage = pytest.importorskip("skimage")
    return Path(skimage.data_dir)


def test_the_photographs_of_scikit_image_come_through_byte_for_byte(photographs: Path, tmp_path: Path) -> None:
    files = sorted(p for p in photographs.iterdir() if p.suffix in (".jpg", ".png", ".gif", ".tif"))
    assert len(files) > 10
    report, dataset = ingested(photographs, tmp_path / "d", format="folder")
    pictures = dataset.values("rgb")
    assert list(pictures) == [p.stem for p in files]
    unusable = {k for k, v in pictures.items() if v is None}
    assert unusable == dataset.quarantine().keys() <= {"multipage_rgb"}  # a layout that Pillow cannot read
    for path in files:
        if path.stem not in unusable:
            assert pictures[path.stem] == path.read_bytes()
    astronaut = dataset.values("source")["astronaut"]
    assert (astronaut["height"], astronaut["width"], astronaut["mode"]) == (512, 512, "RGB")
    assert report.samples == len(files)


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_the_same_photographs_are_the_same_rows_in_every_layout(photographs: Path, tmp_path: Path, layout: str) -> None:
    files = {p.stem: p for p in photographs.iterdir() if p.suffix in (".jpg", ".png") and p.stat().st_size < 300_000}
    if layout == "webdataset":
        write_tar(tmp_path / "c/x.tar", [(f"{k}{p.suffix}", p.read_bytes()) for k, p in sorted(files.items())])
    else:
        images = [{"bytes": p.read_bytes(), "path": p.name} for _, p in sorted(files.items())]
        write_parquet(tmp_path / "c/x.parquet", {"image": images, "key": sorted(files)})
    _, dataset = ingested(tmp_path / "c", tmp_path / "d")
    assert dataset.values("rgb") == {k: files[k].read_bytes() for k in sorted(files)}


# --- datasets ------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Seven samples in two tars, one of them unusable."""
    for tar, keys in (("0", "abcd"), ("1", "efg")):
        members = [(f"{k}.jpg", b"" if k == "f" else make_jpeg(seed=ord(k))) for k in keys]
        write_tar(tmp_path / "corpus" / f"{tar}.tar", [*members, *((f"{k}.txt", k.encode()) for k in keys)])
    return tmp_path / "corpus"


def objects(uri: str | Path) -> dict[str, bytes]:
    store = open_store(uri)
    return {info.name: store.get(info.name) for info in store.list()}


def test_rerun_publishes_no_snapshot_and_changes_no_byte(corpus: Path, store_uri: str) -> None:
    first, _ = ingested(corpus, store_uri, shard_size=3)
    before = objects(store_uri)
    # Objects and records of three shards in three modalities; a record table for each; a sample table; the root.
    assert len(before) == 3 * 3 * 2 + 3 + 1 + 1
    assert ingest(str(corpus), store_uri, IngestConfig(shard_size=3, workers=1)) == first
    assert objects(store_uri) == before


def test_local_and_s3_corpora_and_datasets_hold_the_same_shards(corpus: Path, tmp_path: Path, s3_uri: str) -> None:
    copies = open_store(f"{s3_uri}/corpus")
    for path in corpus.iterdir():
        copies.create(path.name, path.read_bytes())
    _, local = ingested(corpus, tmp_path / "d")
    for src in (f"{s3_uri}/corpus", f"{s3_uri}/corpus/*.tar"):
        _, remote = ingested(src, f"{s3_uri}/d{len(src)}")
        assert all_records(remote.manifest) == all_records(local.manifest)
        assert remote.manifest.corpus["sources"] == [src]
    assert [s.key for s in samples(f"{s3_uri}/corpus/1.tar")] == ["e", "f", "g"]


@pytest.mark.parametrize("layout", ["folder", "parquet", "table"])
def test_folders_and_parquet_are_read_from_s3(s3_uri: str, layout: str) -> None:
    store = open_store(s3_uri)
    if layout == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"image": [JPEG, PNG], "caption": ["one", "two"], "key": ["a", "b/c"]}), sink)
        store.create("x.parquet", sink.getvalue().to_pybytes())
    else:
        store.create("a.jpg", JPEG)
        store.create("b/c.png", PNG)
        store.create(*(("a.txt", b"one") if layout == "folder" else ("captions.csv", b"image,text\na.jpg,one\n")))
    expected = [("a", "one", JPEG), ("b/c", "two" if layout == "parquet" else None, PNG)]
    assert as_rows(s3_uri) == expected
    with pytest.raises(ValueError, match=r"no corpus at 's3://.*/nothing': it does not exist"):
        open_corpus(f"{s3_uri}/nothing")


def test_the_manifest_says_what_was_read_and_how(corpus: Path, tmp_path: Path) -> None:
    report, dataset = ingested(corpus, tmp_path / "d", shard_size=3, limit=5)
    entry = dict(dataset.manifest.corpus)
    assert entry.pop("digest") == report.digest
    assert entry == {
        "sources": [str(corpus)],
        "format": "webdataset",
        "settings": {"shard_size": 3, "text_field": None, "image_field": None, "check": "decode", "limit": 5},
        "samples": 5,
        "shards": 2,
        "quarantined": {},
        "renamed": 0,
        "ignored": {},
        "damaged": [],
    }
    (producer,) = dataset.manifest.producers.values()
    config = {"format": "webdataset", "text_field": None, "image_field": None, "check": "decode"}
    assert producer == {"class": "ingest", "version": 1, "config": config}
    assert len({r.keys_digest for r in all_records(dataset.manifest) if r.shard == 0}) == 1


def test_threads_and_shard_size_do_not_change_a_row(corpus: Path, tmp_path: Path) -> None:
    results = []
    for number, (workers, shard_size) in enumerate([(1, 3), (4, 3), (2, 100)]):
        ingest(str(corpus), str(tmp_path / f"{number}"), IngestConfig(workers=workers, shard_size=shard_size))
        results.append(Dataset(tmp_path / f"{number}"))
    assert all_records(results[0].manifest) == all_records(results[1].manifest)
    for modality in ("rgb", "alt_text", "source"):
        assert results[0].values(modality) == results[2].values(modality)


def other_corpus(tmp_path: Path, how: str, corpus: Path) -> tuple[Path, dict[str, Any]]:
    """A corpus, or settings, that differ from `corpus` in one thing."""
    changed = tmp_path / "changed"
    shutil.copytree(corpus, changed)
    if how == "more":
        write_tar(changed / "2.tar", [("h.jpg", JPEG)])
    if how == "fewer":
        (changed / "1.tar").unlink()
    if how == "other text":
        write_tar(changed / "1.tar", [(f"{k}.{e}", b"" if e == "jpg" else b"?") for k in "efg" for e in ("jpg", "txt")])
    return changed, {"check": "header"} if how == "settings" else {}


@pytest.mark.parametrize("how", ["more", "fewer", "other text", "settings"])
def test_another_corpus_is_refused_and_nothing_changes(corpus: Path, tmp_path: Path, how: str) -> None:
    ingested(corpus, tmp_path / "d", shard_size=4)
    before = objects(tmp_path / "d")
    changed, config = other_corpus(tmp_path, how, corpus)
    with pytest.raises(ValueError, match=f"holds the corpus '{corpus}'.*is another.*ingest into another dataset"):
        ingest(str(changed), str(tmp_path / "d"), IngestConfig(shard_size=4, **config))
    assert objects(tmp_path / "d") == before


def test_a_changed_text_changes_the_name_of_its_shard_and_of_no_other(tmp_path: Path) -> None:
    records = []
    for name, text in (("one", "x"), ("two", "y")):
        src = write_files(tmp_path / name, {"a.jpg": JPEG, "a.txt": text, "b.jpg": OTHER, "b.txt": "b"})
        _, dataset = ingested(src, tmp_path / f"d-{name}", shard_size=1)
        records.append({(r.modality, r.shard): r for r in all_records(dataset.manifest)})
    changed = {k for k in records[0] if records[0][k].name != records[1][k].name}
    assert changed == {("alt_text", 0)}
    assert {k for k in records[0] if records[0][k].digest != records[1][k].digest} == changed


def test_the_same_corpus_from_another_place_is_the_same(corpus: Path, tmp_path: Path) -> None:
    first, _ = ingested(corpus, tmp_path / "d")
    moved = shutil.copytree(corpus, tmp_path / "moved")
    again, dataset = ingested(moved, tmp_path / "d")
    assert (again.digest, again.snapshot) == (first.digest, 1)
    assert dataset.manifest.corpus["sources"] == [str(corpus)]


def test_a_lost_object_is_written_again_by_a_rerun(corpus: Path, tmp_path: Path) -> None:
    _, dataset = ingested(corpus, tmp_path / "d")
    before = objects(tmp_path / "d")
    dataset.store.delete(next(dataset.manifest.records("rgb")).name)
    ingested(corpus, tmp_path / "d")
    assert objects(tmp_path / "d") == before


_DIES_AFTER = """
import os, signal, sys
from fourmill.pipeline import store
from fourmill.pipeline.ingest import IngestConfig, ingest
create, left = store.LocalStore.create, [int(sys.argv[3])]
def mortal(self, name, data):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return create(self, name, data)
store.LocalStore.create = mortal
ingest(sys.argv[1], sys.argv[2], IngestConfig(shard_size=3, workers=1))
"""


@pytest.mark.parametrize("writes", [0, 5, 18, 19, 22])
def test_rerun_after_a_kill_writes_identical_shards(corpus: Path, tmp_path: Path, writes: int) -> None:
    # 18 objects and records, then the sample table, three record tables and the root.
    command = [sys.executable, "-c", _DIES_AFTER, str(corpus), str(tmp_path / "d"), str(writes)]
    killed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with pytest.raises(FileNotFoundError):
        read_manifest(open_store(tmp_path / "d"))
    ingested(corpus, tmp_path / "whole", shard_size=3)
    ingested(corpus, tmp_path / "d", shard_size=3)
    again, whole = objects(tmp_path / "d"), objects(tmp_path / "whole")
    root = "manifest/snapshot-000001.json"
    assert undated(again.pop(root)) == undated(whole.pop(root))
    assert again == whole


def undated(root: bytes) -> dict[str, Any]:
    """A snapshot's root without the time it was made at: all else follows from the corpus."""
    tree: dict[str, Any] = json.loads(root)
    assert tree.pop("created").endswith("Z")
    return tree


def test_progress_hears_of_every_shard(corpus: Path, tmp_path: Path) -> None:
    heard: list[int] = []
    ingest(str(corpus), str(tmp_path / "d"), IngestConfig(shard_size=3), heard.append)
    assert heard == [3, 6, 7]


def test_reading_is_lazy(tmp_path: Path) -> None:
    write_files(tmp_path / "c", {f"{i}.jpg": JPEG for i in range(9)})
    corpus = open_corpus(str(tmp_path / "c"))
    rows: Iterator[Sample] = iter(corpus)
    assert next(rows).key == "0"
    (tmp_path / "c/1.jpg").write_bytes(OTHER)
    (tmp_path / "c/2.jpg").unlink()
    assert next(rows).image == OTHER
    assert next(rows).problems["rgb"].startswith("unreadable: ")


def test_a_dataset_inside_its_corpus_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match="lies inside the corpus"):
        ingest(str(corpus), str(corpus / "dataset"))


@pytest.mark.parametrize("fields", [{"shard_size": 0}, {"limit": 0}, {"check": "no"}, {"fromat": "folder"}])
def test_impossible_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        IngestConfig(**fields)
